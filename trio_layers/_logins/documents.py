"""JSON as Go's ``encoding/json`` reads it, for files of Go programs.

Member names match in any case, null counts as missing, and text after the first value is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

import attrs

from .._gocompat import without_surrogates

__all__ = ["Object", "as_object", "decode_mapping", "decode_text", "is_name", "parse_json"]

T = TypeVar("T")


@attrs.frozen
class Object:
    """A JSON object that keeps repeated names.

    Attributes:
        members: Names and values, in their order.
    """

    members: Sequence[tuple[str, object]] = attrs.field(default=(), repr=False)  # logins

    def find(self, name: str) -> list[object]:
        """Return all values under a name in any case, as Go's decoder takes all in turn."""
        return [value for key, value in self.members if is_name(key, name)]


def is_name(key: str, name: str) -> bool:
    """Whether Go takes ``key`` for a field's name. Its folding is of one character to one."""
    return key == name or (len(key) == len(name) and key.casefold() == name.casefold())


def parse_json(data: bytes, *, alone: bool = False) -> Object:
    """Return the object at the beginning of a text; an empty text is an empty object.

    Args:
        data: The text in UTF-8. Other bytes count as U+FFFD.
        alone: Whether no other value may follow.

    Raises:
        ValueError: if there is no object. The error quotes nothing of the text.
    """
    text = data.decode("utf-8", "replace").strip(_SPACE)
    problem = "is not valid JSON"
    document: object = None
    if text:
        try:
            document, end = _DECODER.raw_decode(text)
        except json.JSONDecodeError as error:
            problem += f" (line {error.lineno}, column {error.colno})"
        except (ValueError, RecursionError):
            pass
        else:
            # Go's Decoder.More takes a closing bracket for the end of the enclosing value.
            more = text[end:].lstrip(_SPACE)[:1] not in ("", "]", "}")
            problem = "has more than one JSON object" if alone and more else ""
        if problem:
            raise ValueError(f"it {problem}")  # not in the except block: its error has the text
    return as_object(document, "it")


def _no_number(text: str) -> float:
    raise ValueError


_SPACE: Final = " \t\r\n"
_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=Object, parse_int=float, parse_constant=_no_number
)


def decode_text(values: Iterable[object], subject: str) -> str:
    """Return the last of several strings; null and none at all count as empty.

    Raises:
        ValueError: if one is neither a string nor null.
    """
    text = ""
    for value in values:
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"{subject} is not a string")
        text = without_surrogates(value)
    return text


def decode_mapping(
    values: Iterable[object], subject: str, decode: Callable[[object], T]
) -> dict[str, T]:
    """Combine objects that stand for one mapping: each adds to the earlier, null empties it.

    Args:
        values: The objects.
        subject: The objects in words.
        decode: Decodes each value in them, also one that a later value replaces.

    Raises:
        ValueError: if one is neither an object nor null.
    """
    mapping: dict[str, T] = {}
    for value in values:
        if value is None:
            mapping.clear()
        else:
            mapping.update((key, decode(each)) for key, each in as_object(value, subject).members)
    return mapping


def as_object(value: object, subject: str) -> Object:
    """Return an object; null counts as an empty one.

    Raises:
        ValueError: if it is neither.
    """
    if value is None:
        return Object()
    if not isinstance(value, Object):
        raise ValueError(f"{subject} is not a JSON object")
    return value
