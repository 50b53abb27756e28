"""Members of JSON documents, with the types that Go's decoder gives them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Final, NoReturn

from ._errors import ManifestError
from ._gocompat import without_surrogates
from ._printable import printable_value

__all__ = [
    "as_keys",
    "as_list",
    "as_object",
    "as_optional_object",
    "as_text",
    "as_text_map",
    "as_texts",
    "as_time",
    "check_flag",
    "refuse",
]

_TIME: Final = re.compile(
    r"(?P<year>\d{4})(?P<rest>-\d\d-\d\dT\d\d:\d\d:\d\d)"
    r"(?:\.\d+)?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)\Z",
    re.ASCII,
)


def as_object(value: object, where: str) -> Mapping[str, object]:
    """Return an object."""
    if not isinstance(value, dict):
        refuse(f"{where} is {printable_value(value)}, not an object")
    return value


def as_optional_object(value: object, where: str) -> Mapping[str, object]:
    """Return an object; a missing one or null is empty."""
    return {} if value is None else as_object(value, where)


def as_keys(value: object, where: str) -> tuple[str, ...]:
    """Return the members of an object that stands for a set, as Go writes sets."""
    members = as_optional_object(value, where)
    for key, each in members.items():
        as_optional_object(each, f"{where}: {printable_value(key)}")
    return tuple(as_text(key, where) for key in members)


def as_list(value: object, where: str) -> list[object]:
    """Return an array as a list."""
    if not isinstance(value, list):
        refuse(f"{where} is {printable_value(value)}, not an array")
    return value


def as_text(value: object, where: str) -> str:
    """Return a string like Go's decoder: a missing one or null is empty.

    U+FFFD replaces a lone surrogate, which could not be encoded later.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        refuse(f"{where} is {printable_value(value)}, not a string")
    return without_surrogates(value)


def as_time(value: object, where: str) -> str:
    """Return a time of RFC 3339 as it was written; empty if it is missing or null."""
    text = as_text(value, where)
    if value is None:
        return text
    match = _TIME.match(text)
    try:
        if match is None:
            raise ValueError
        # The calendar repeats every 400 years, and RFC 3339 allows a year 0, unlike Python.
        year = 2000 + int(match["year"]) % 400
        datetime.fromisoformat(f"{year}{match['rest']}")
    except ValueError:
        refuse(f"{where} is {printable_value(value)}, not a time in the format of RFC 3339")
    return text


def check_flag(value: object, where: str) -> None:
    """Check that a member is true, false, null or missing."""
    if value is not None and not isinstance(value, bool):
        refuse(f"{where} is {printable_value(value)}, neither true nor false")


def as_texts(value: object, where: str) -> tuple[str, ...]:
    """Return an array of strings; a missing one or null is empty."""
    return () if value is None else tuple(as_text(each, where) for each in as_list(value, where))


def as_text_map(value: object, where: str) -> dict[str, str]:
    """Return an object with strings as values; a missing one or null is empty."""
    members = as_optional_object(value, where)
    return {as_text(key, where): as_text(each, where) for key, each in members.items()}


def refuse(message: str) -> NoReturn:
    """Raise a `ManifestError`."""
    raise ManifestError(message)
