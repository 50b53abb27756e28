"""Who asks: what a registry can be shown, and where it comes from."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

import attrs

__all__ = ["Credentials", "CredentialsFor", "CredentialsSource", "as_sent"]


@attrs.frozen
class Credentials:
    """What a registry takes for a login. What is empty is not there; no secret is in the repr.

    Attributes:
        username: The name.
        password: Its password, or an access token that the registry takes for one.
        identity_token: A refresh token of OAuth2, which a token server gives tokens for.
        registry_token: A token for the registry itself, sent as it is. Then nothing else is.
    """

    username: str = ""
    password: str = attrs.field(default="", repr=False)
    identity_token: str = attrs.field(default="", repr=False, kw_only=True)
    registry_token: str = attrs.field(default="", repr=False, kw_only=True)

    def __bool__(self) -> bool:
        return any((self.username, self.password, self.identity_token, self.registry_token))

    def basic(self) -> str | None:
        """The value of a header field that proves name and password (RFC 7617); ``None`` if
        there are none.
        """
        if not self.password and (not self.username or self.identity_token):
            return None
        pair = as_sent(f"{self.username}:{self.password}")
        return f"Basic {base64.b64encode(pair).decode()}"


def as_sent(text: str) -> bytes:
    """A secret's bytes. One from a login file need not be UTF-8: then it has been read with
    ``surrogateescape``. What no bytes can have been read as is replaced: an error would hold the
    whole secret.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


CredentialsSource: TypeAlias = Callable[[str, Credentials | None], Awaitable[Credentials | None]]
"""Asked for the credentials for a repository, such as ``docker.io/library/debian``, when its
registry wants some; ``None``: there are none. The answer is kept until the registry refuses it:
then it is asked once more, with what was refused, which is ``None`` the first time. It may be
called by several tasks at once, for different repositories."""

CredentialsFor: TypeAlias = Credentials | Mapping[str, Credentials] | CredentialsSource
"""Credentials for every registry that is asked; or for each its own, by the domain that the
references name, such as ``docker.io`` or ``registry.example.com:5000``; or who knows them. A mirror
is a registry of its own name, and gets none that have no name."""
