"""JSON documents from strangers, read in one way only.

Readers differ about a document that names a member twice: some take the first, others the last,
and Go's take both, one over the other. Such a document is refused, since it would be one image to
us and another to the tool that checked it. The grammar is that of RFC 8259.

The reader is a loop in Python, not the standard library's scanner in C. That one holds the GIL, and
so the event loop, for as long as a document takes: 250 ms for 4 MiB of empty objects, and a second
with a hook for each. It also recurses as deep as the document does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Final

from ._as_go import without_surrogates

__all__ = ["MAX_DEPTH", "AmbiguousJSON", "check_names", "dismantle", "fold_names", "parse_json"]

MAX_DEPTH: Final = 200
"""How deep arrays and objects may be nested. The documents of images have ten levels."""

# Integers up to 64 bits are exact, as in Go. Longer ones would take quadratic time.
_MAX_DIGITS: Final = 20

# No match is longer than a millisecond of work: the GIL is held for all of one.
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
    """Readers differ about the document: an object names a member twice, or in an odd way."""


def parse_json(data: bytes, *, nonfinite: bool = False) -> object:
    """Decode a document. Lone surrogates in strings become U+FFFD, as Go's readers have them.

    Nothing in the result may be changed: all empty objects in it are one, and so are empty arrays,
    since a document has room for a million.

    Args:
        data: UTF-8, without a byte order mark.
        nonfinite: Whether ``NaN`` and infinities are taken, which Python writes though JSON has
            none.

    Raises:
        AmbiguousJSON: if an object in it names a member twice.
        ValueError: if it is not JSON, or is nested deeper than `MAX_DEPTH`.
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
    """Free a document that nobody needs any more, piece by piece.

    Freed as a whole, a large one holds the GIL, and so the event loop, for as long as that takes.
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
    """Names of members by what Go's readers compare."""
    return {name.casefold(): name for name in names}


def check_names(
    members: Iterable[str], exact: Mapping[str, str], others: Mapping[str, str] | None = None
) -> None:
    """Check that all readers find the same members in an object.

    Go's readers take a name in any case for a field's, and other readers do not.

    Args:
        members: The names in the object.
        exact: Names, by `fold_names`, that must be spelt so.
        others: Names that must not be there in two spellings.

    Raises:
        AmbiguousJSON: if readers differ.
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
        """The value that begins there, and where it ends."""
        text = self._text
        # The open containers: of objects, with the name whose value comes next.
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
        """The name of a member, and where its value begins."""
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
