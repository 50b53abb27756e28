"""What is not said: secrets, wherever others' words are shown.

A server may repeat what it was sent, as proxies do in their complaints. It may know it; who reads
a log, or an error, need not. What it repeats whole is taken out of its words. What it has cut, or
written in another way than those below, is not found.
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

# Characters. What is shorter is a part of too many words.
MIN_SECRET: Final = 4
WITHHELD: Final = "[withheld]"

# Everybody may see what is in these: it is no secret, and is what errors speak of.
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
# Of what is sent to a token server.
_SECRET_FIELDS: Final = frozenset({"refresh_token"})


def secrets_of(
    headers: Iterable[tuple[str, str]], form: bytes = b"", query: bytes = b""
) -> frozenset[str]:
    """What a request has in it that nobody but its server is to see.

    Args:
        headers: All of its fields.
        form: Its body, as ``application/x-www-form-urlencoded``.
        query: Of its URL, if that may hold a secret.
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
    """A text without them."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, WITHHELD)
    return text


# A line of a broken answer, or a part of a URL, with whatever it has of a signature or a cookie.
_QUOTED = re.compile(r"(bytearray\(|(?<=Invalid URL in location header): ).*", re.DOTALL)


def redact_error(error: BaseException, secrets: Iterable[str]) -> None:
    """Take secrets, what is quoted of an answer, and control characters out of the texts of an
    error of httpx's, and of those that it was caused by: who shows ours shows them, too.
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
            # A part of the URL, and who knows which: here, and in what it was raised for.
            following.args = ("a redirect to what is no URL",)
            following.__context__ = following.__cause__ = None
        if following.__cause__ is not None:  # what it was raised in is nobody's, if it is another
            following.__context__ = following.__cause__
        following = following.__cause__ or following.__context__


def _decode(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode("utf-8", "replace")
    except ValueError:  # as is binascii.Error
        return ""


def _fields(text: bytes) -> list[tuple[str, str]]:
    return parse_qsl(text.decode("ascii", "replace"), errors="replace")
