"""Decodes untrusted JSON, and refuses documents that decoders read in different ways.

JSON decoders differ about an object that has a member twice: some take the first value, others the
last, and Go's decoder merges both. This decoder refuses such a document, because it could mean one
image here and another image to the tool that checked it. The grammar is that of RFC 8259.

The decoder is a loop in Python, because the standard library's C scanner holds the GIL, and so
stops the event loop, until a document's end: 250 ms for 4 MiB of empty objects, and a second with
a hook for each object. The C scanner also recurses once per level of nesting.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Final

from ._gocompat import without_surrogates

__all__ = ["MAX_DEPTH", "AmbiguousJSON", "check_names", "dismantle", "fold_names", "parse_json"]

MAX_DEPTH: Final = 200
"""The most levels of nested arrays and objects. Documents of images have ten."""

# The longest integer that is decoded exactly: 64 bits have at most 20 characters. Longer numbers
# become floats, because int() takes quadratic time.
_MAX_DIGITS: Final = 20

# The repetitions have limits because `re` holds the GIL for a whole match: each match takes at
# most a millisecond.
_SPACE: Final = re.compile(r"[ \t\n\r]{0,65536}")
_STRING: Final = re.compile(r'"([^"\\\x00-\x1f]{0,65536})"')
_PLAIN: Final = re.compile(r'[^"\\\x00-\x1f]{1,65536}')
_ESCAPES: Final = re.compile(
    r"(?:\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r'|\\u[0-9a-fA-F]{4}|\\["\\/bfnrt]){1,4096}'
)
_NUMBER: Final = re.compile(
    r"(-?(?:0|[1-9][0-9]{0,9999}))((?:\.[0-9]{1,9999})?(?:[eE][-+]?[0-9]{1,9999})?)(?![0-9])"
)
_EMPTY_OBJECT: Final[dict[str, object]] = {}
_EMPTY_ARRAY: Final[list[object]] = []
_WORD: Final = re.compile(r"-?[A-Za-z]+")
_CONSTANTS: Final[dict[str, object]] = {"true": True, "false": False, "null": None}
_NONFINITE: Final[dict[str, object]] = {
    "NaN": math.nan,
    "Infinity": math.inf,
    "-Infinity": -math.inf,
}


class AmbiguousJSON(ValueError):
    """Decoders differ about a document: a member occurs twice, or is misspelt."""


def parse_json(data: bytes, *, nonfinite: bool = False) -> object:
    """Decode a JSON document.

    Lone surrogates in strings become U+FFFD, as in Go's decoder. The caller must not change the
    result: all empty objects in it are the same object, and all empty arrays the same list, because
    a document has room for a million of them.

    Args:
        data: The document in UTF-8, without a byte order mark.
        nonfinite: Whether to accept ``NaN`` and infinities. JSON has none, but Python writes them.

    Raises:
        AmbiguousJSON: if an object in the document has a member twice.
        ValueError: if the document is not JSON, or is nested deeper than `MAX_DEPTH`.
    """
    text = data.decode()
    reader = _Reader(text, nonfinite)
    try:
        value, end = reader.read(_end_of_space(text, 0))
    except IndexError:
        raise ValueError("it ends too early") from None
    if _end_of_space(text, end) != len(text):
        raise _unexpected(text, end)
    return value


def dismantle(document: object) -> None:
    """Empty a document that is no longer needed, piece by piece.

    Python holds the GIL, and so stops the event loop, while it frees a large document as a whole.
    """
    todo = [document]
    while todo:
        container = todo.pop()
        if isinstance(container, list):
            while container:
                value = container.pop()
                if isinstance(value, list | dict) and value:
                    todo.append(value)
        elif isinstance(container, dict):
            while container:
                value = container.popitem()[1]
                if isinstance(value, list | dict) and value:
                    todo.append(value)


def fold_names(*names: str) -> Mapping[str, str]:
    """Map each name's case-folded form, which Go's decoder compares, to the name."""
    return {name.casefold(): name for name in names}


def check_names(
    members: Iterable[str], exact: Mapping[str, str], others: Mapping[str, str] | None = None
) -> None:
    """Check that all decoders find the same members in an object.

    Go's decoder matches a member to a field in any case, and other decoders do not.

    Args:
        members: The names in the object.
        exact: Names from `fold_names` that may occur in this spelling only.
        others: Names from `fold_names` that may occur in one spelling only, whichever that is.

    Raises:
        AmbiguousJSON: if decoders differ.
    """
    seen: dict[str, str] = {}
    for name in members:
        folded = name.casefold()
        known = exact.get(folded)
        if known is not None and known != name:
            raise AmbiguousJSON(f"some readers take {_shown(name)} for {known!r}")
        if others is not None and folded in others:
            other = seen.setdefault(folded, name)
            if other != name:
                raise AmbiguousJSON(f"some readers take {_shown(name)} for {_shown(other)}")


class _Reader:
    def __init__(self, text: str, nonfinite: bool) -> None:
        self._text = text
        self._constants = _CONSTANTS | _NONFINITE if nonfinite else _CONSTANTS

    def read(self, at: int) -> tuple[object, int]:
        """Return the value at a position, and the position after it."""
        text = self._text
        # The containers around the current one. Each object is paired with the name of the member
        # that is being read.
        stack: list[tuple[list[object] | dict[str, object], str]] = []
        name = ""
        value: object
        container: list[object] | dict[str, object] | None = None
        while True:
            # A value begins here.
            first = text[at]
            if first in "{[":
                if len(stack) + 1 >= MAX_DEPTH and container is not None:
                    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
                at += 1
                if text[at] in " \t\n\r":
                    at = _end_of_space(text, at)
                if text[at] != ("}" if first == "{" else "]"):
                    if container is not None:
                        stack.append((container, name))
                    if first == "{":
                        container = {}
                        name, at = self._name(at, container)
                    else:
                        container = []
                    continue
                value = _EMPTY_OBJECT if first == "{" else _EMPTY_ARRAY
                at += 1
            elif first == '"':
                value, at = self._string(at)
            else:
                value, at = self._scalar(at)
            # A value has ended here.
            while container is not None:
                if type(container) is list:
                    container.append(value)
                    close = "]"
                else:
                    container[name] = value  # type: ignore[call-overload]
                    close = "}"
                if text[at] in " \t\n\r":
                    at = _end_of_space(text, at)
                following = text[at]
                if following == ",":
                    at += 1
                    if text[at] in " \t\n\r":
                        at = _end_of_space(text, at)
                    if close == "}":
                        name, at = self._name(at, container)
                    break
                if following != close:
                    raise _unexpected(text, at)
                at += 1
                value = container
                container, name = stack.pop() if stack else (None, "")
            else:
                return value, at

    def _name(self, at: int, members: object) -> tuple[str, int]:
        """Return a member's name, and the position of its value."""
        text = self._text
        if text[at] != '"':
            raise _unexpected(text, at)
        name, at = self._string(at)
        assert isinstance(members, dict)
        if name in members:
            raise AmbiguousJSON(f"it has the member {_shown(name)} twice in one object")
        if text[at] in " \t\n\r":
            at = _end_of_space(text, at)
        if text[at] != ":":
            raise _unexpected(text, at)
        at += 1
        if text[at] in " \t\n\r":
            at = _end_of_space(text, at)
        return name, at

    def _string(self, at: int) -> tuple[str, int]:
        match = _STRING.match(self._text, at)
        if match is not None:
            return match[1], match.end()
        pieces: list[str] = []
        at += 1
        while self._text[at] != '"':
            if match := _PLAIN.match(self._text, at):
                pieces.append(match[0])
            elif match := _ESCAPES.match(self._text, at):
                pieces.append(json.loads(f'"{match[0]}"'))
            else:
                raise ValueError(f"the string at character {at} has what JSON's must not have")
            at = match.end()
        return without_surrogates("".join(pieces)), at + 1

    def _scalar(self, at: int) -> tuple[object, int]:
        match = _NUMBER.match(self._text, at)
        if match is not None:
            whole, rest = match.groups()
            exact = not rest and len(whole) <= _MAX_DIGITS
            return int(whole) if exact else float(whole + rest), match.end()
        match = _WORD.match(self._text, at)
        word = "" if match is None else match[0]
        if match is None or word not in self._constants:
            if word in _NONFINITE:
                raise ValueError(f"{word} is not JSON")
            if self._text[at] in "-0123456789":
                raise ValueError(f"the number at character {at} is malformed, or too long")
            raise _unexpected(self._text, at)
        return self._constants[word], match.end()


def _end_of_space(text: str, at: int) -> int:
    while match := _SPACE.match(text, at):
        if match.end() == at:
            break
        at = match.end()
    return at


def _unexpected(text: str, at: int) -> ValueError:
    at = _end_of_space(text, at)
    return ValueError(f"{_shown(text[at])} at character {at} is out of place")


def _shown(text: str) -> str:
    shown = repr(text[:64])
    return shown if len(text) <= 64 else f"{shown}…"
