"""Credentials for registries, and their sources."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

import attrs

__all__ = ["Credentials", "CredentialsFor", "CredentialsSource", "as_sent"]


@attrs.frozen
class Credentials:
    """A login at a registry. Empty parts are missing; no secret is in the repr.

    Attributes:
        username: The user's name.
        password: The password, or an access token in its place.
        identity_token: A refresh token of OAuth2, for which a token server issues tokens.
        registry_token: A token for the registry itself, sent as it is, and instead of all others.
    """

    username: str = ""
    password: str = attrs.field(default="", repr=False)
    identity_token: str = attrs.field(default="", repr=False, kw_only=True)
    registry_token: str = attrs.field(default="", repr=False, kw_only=True)

    def __bool__(self) -> bool:
        return any((self.username, self.password, self.identity_token, self.registry_token))

    def basic(self) -> str | None:
        """The value of a header field with name and password (RFC 7617).

        It is ``None`` if there are none.
        """
        if not self.password and (not self.username or self.identity_token):
            return None
        pair = as_sent(f"{self.username}:{self.password}")
        return f"Basic {base64.b64encode(pair).decode()}"


def as_sent(text: str) -> bytes:
    """Return a secret's bytes.

    A secret from a login file need not be UTF-8: it was read with ``surrogateescape``. Other
    surrogates are replaced, because an encoding error would quote the whole secret.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


CredentialsSource: TypeAlias = Callable[[str, Credentials | None], Awaitable[Credentials | None]]
"""Returns the credentials for a repository, such as ``docker.io/library/debian``.

It is called when the registry wants some; ``None`` means that there are none. The result is kept
until the registry refuses it. The function is then called once more, with the refused credentials,
which are ``None`` at the first call. Several tasks may call it at once, for different repositories.
"""

CredentialsFor: TypeAlias = Credentials | Mapping[str, Credentials] | CredentialsSource
"""Credentials for every registry; or a mapping by the domain in references; or a function.

Domains are such as ``docker.io`` or ``registry.example.com:5000``. A mirror is a registry of its
own name, and gets no credentials without a name.
"""
