"""Redacts secrets from errors that quote a server.

A server may repeat its request, as proxies do in their complaints. Readers of a log or an error
must not see the request's secrets. Secrets that a server repeats whole are replaced. Secrets that
it has cut, or encoded in another way than those below, are not found.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import parse_qsl, quote, quote_plus

from .._printable import printable_line
from .http import InvalidURL

__all__ = ["redact_error", "secrets_of", "without_secrets"]

# Characters. A shorter text would be a part of too many words.
MIN_SECRET: Final = 4
WITHHELD: Final = "[withheld]"

# The values of these fields are public, and errors may quote them.
_PLAIN: Final = frozenset(
    {
        "accept",
        "accept-encoding",
        "connection",
        "content-length",
        "content-type",
        "host",
        "if-range",
        "range",
        "user-agent",
    }
)
# The secret fields in a form for a token server.
_SECRET_FIELDS: Final = frozenset({"refresh_token"})


def secrets_of(
    headers: Iterable[tuple[str, str]], form: bytes = b"", query: bytes = b""
) -> frozenset[str]:
    """Return the secrets of a request, which only its server may see.

    Args:
        headers: All header fields.
        form: The body, as ``application/x-www-form-urlencoded``.
        query: The query of the URL, if it may have a secret.
    """
    found = set()
    for name, value in headers:
        if name.lower() in _PLAIN:
            continue
        scheme, _, rest = value.partition(" ")
        found |= {value, rest.strip()}
        if scheme.lower() == "basic":
            pair = _decode(rest.strip())
            found |= {pair, pair.partition(":")[2]}
    found |= {value for name, value in _fields(form) if name in _SECRET_FIELDS}
    found |= {query.decode("ascii", "replace"), *(value for _, value in _fields(query))}
    found |= {quote(each, safe="") for each in found} | {quote_plus(each) for each in found}
    return frozenset(each for each in found if len(each) >= MIN_SECRET)


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """Replace secrets in a text."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, WITHHELD)
    return text


# A line of a broken response, or a part of a URL, may have a signature or a cookie.
_QUOTED = re.compile(r"(bytearray\(|(?<=Invalid URL in location header): ).*", re.DOTALL)


def redact_error(error: BaseException, secrets: Iterable[str]) -> None:
    """Remove secrets, quoted responses and control characters from an error of httpx.

    The same happens to its causes, because a traceback shows them, too.
    """
    following: BaseException | None = error
    while following is not None:
        following.args = tuple(
            # httpcore's has that of h11 as its text.
            printable_line(without_secrets(_QUOTED.sub("", str(each)), secrets))
            if isinstance(each, str | BaseException)
            else each
            for each in following.args
        )
        if isinstance(following, OSError) and isinstance(following.strerror, str):
            following.strerror = printable_line(without_secrets(following.strerror, secrets))
        if isinstance(following, InvalidURL):
            # The text quotes an unknown part of the URL, and so does the context.
            following.args = ("a redirect to what is no URL",)
            following.__context__ = following.__cause__ = None
        if following.__cause__ is not None:  # the context adds nothing to an explicit cause
            following.__context__ = following.__cause__
        following = following.__cause__ or following.__context__


def _decode(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode("utf-8", "replace")
    except ValueError:  # binascii.Error is a ValueError, too
        return ""


def _fields(text: bytes) -> list[tuple[str, str]]:
    return parse_qsl(text.decode("ascii", "replace"), errors="replace")
