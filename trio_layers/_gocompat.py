"""Paths, durations, URLs and strings as Go's library reads them.

Python's own functions accept other input, and leave out other parts.
"""

from __future__ import annotations

import base64
import posixpath
import re
from fractions import Fraction
from typing import Final

__all__ = ["clean_path", "decode_base64", "parse_duration", "split_url", "without_surrogates"]


def decode_base64(text: str) -> bytes:
    """Decode like Go's ``base64.StdEncoding``: padding is required, line breaks are ignored.

    Raises:
        ValueError: if the text is not base64.
    """
    text = text.replace("\r", "").replace("\n", "")
    if len(text) % 4:
        raise ValueError("it is not base64: its length is no multiple of 4")
    return base64.b64decode(text, validate=True)


_SURROGATES = re.compile("[\ud800-\udfff]")


def without_surrogates(text: str) -> str:
    """Replace each lone surrogate of a JSON string by U+FFFD, as ``encoding/json`` does."""
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text)


def clean_path(path: str) -> str:
    """Normalise a path like Go's ``path.Clean``. POSIX would keep two leading slashes."""
    cleaned = posixpath.normpath(path)
    return cleaned[1:] if cleaned.startswith("//") else cleaned


# Go counts nanoseconds in 63 bits.
_UNITS: Final = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,  # the micro sign
    "μs": 10**3,  # the Greek letter
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_NUMBER_AND_UNIT = r"([0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(ns|us|µs|μs|ms|s|m|h)"
_DURATION = re.compile(rf"[-+]?(?:{_NUMBER_AND_UNIT})+\Z")
_DURATION_PART = re.compile(_NUMBER_AND_UNIT)
_MAX_DURATION: Final = 2**63 - 1


def parse_duration(text: str) -> float | None:
    """Return the seconds of a Go duration, such as ``1m30s`` (``time.ParseDuration``)."""
    if text in ("0", "+0", "-0"):
        return 0.0
    if not _DURATION.match(text):
        return None
    parts = _DURATION_PART.findall(text)
    total = sum(int(Fraction(number) * _UNITS[unit]) for number, unit in parts)
    if total > _MAX_DURATION:
        return None
    seconds = total // 10**9 + total % 10**9 / 1e9
    return -seconds if text.startswith("-") else seconds


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_HOST = re.compile(r"(\[[0-9A-Za-z:.%~_-]+\]|[^:\[\]/?#@\\^`{|}% \x00-\x1f\x7f]*)(:[0-9]*)?\Z")
_USER = re.compile(r"[A-Za-z0-9._:~!$&'()*+,;=%@-]*\Z")
_ESCAPE = re.compile(r"%(?:([0-9A-Fa-f]{2})|)")


def split_url(url: str) -> tuple[str, str, str]:
    """Return scheme, host with port, and path of a URL, as Go's ``url.Parse`` does.

    It accepts hosts that httpx would not, and missing parts are empty.

    Raises:
        ValueError: if the URL is invalid.
    """
    if any(ord(c) < 0x20 or ord(c) == 0x7F for c in url):
        raise ValueError("it has control characters in it")
    rest, _, fragment = url.partition("#")
    _unquoted(fragment)
    scheme = ""
    if match := _SCHEME.match(rest):
        scheme, rest = match[1].lower(), rest[match.end() :]
    rest = rest.partition("?")[0]
    if not rest.startswith("/"):
        if scheme:
            return scheme, "", ""
        if ":" in rest.partition("/")[0]:
            raise ValueError("its beginning has a colon, and is no scheme")
        return "", "", _unquoted(rest)
    if not scheme or not rest.startswith("//"):
        return scheme, "", _unquoted(rest)
    authority, slash, path = rest[2:].partition("/")
    user, _, host = authority.rpartition("@")
    _unquoted(user)
    if not _USER.match(user) or not _HOST.match(host):
        # The text is not shown: a parser takes a password with a slash in it for the port.
        raise ValueError("it has no host, or no valid one")
    return scheme, host, _unquoted(slash + path)


def _unquoted(path: str) -> str:
    def replace(match: re.Match[str]) -> str:
        if match[1] is None:
            raise ValueError("it has a % in it without two hex digits")
        return chr(int(match[1], 16))

    text = _ESCAPE.sub(replace, path.encode().decode("latin-1"))
    return text.encode("latin-1").decode("utf-8", "surrogateescape")
