"""Formats text from outside for messages: one line, bounded, without control characters."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["printable", "printable_line", "printable_path", "printable_value", "without_login"]

MAX_LINE: Final = 300

# A password may contain characters that end it for a parser of URLs, so this match is greedy.
_LOGIN: Final = re.compile(r"\A([a-z][a-z0-9+.-]*://)?.*@", re.IGNORECASE | re.DOTALL)


def printable(text: str) -> str:
    """Replace characters that could rewrite a terminal."""
    return "".join(c if c.isprintable() else "�" for c in text)


def printable_line(text: str) -> str:
    """Format a server's text: one line, at most `MAX_LINE` characters, no control characters."""
    line = "".join(c if c.isprintable() else " " for c in text[: 2 * MAX_LINE])
    line = " ".join(line.split())
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}…"


def printable_path(path: bytes) -> str:
    """Quote a path from a layer; the middle of a long path is left out."""
    text = repr(path.decode("utf-8", "backslashreplace"))
    return text if len(text) <= 256 else f"{text[:120]}…{text[-120:]}"


def printable_value(value: object) -> str:
    """Quote a JSON value, or name its type if it is an array or an object."""
    if value is None:
        return "missing"
    text = repr(value) if isinstance(value, str | int | float) else type(value).__name__
    return text if len(text) <= 100 else f"{text[:100]}…"


def without_login(url: str) -> str:
    """Replace the name and password of a URL, or of a malformed one, by an ellipsis."""
    return _LOGIN.sub(r"\1…@", url)
