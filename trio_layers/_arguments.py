"""Checks of callers' arguments.

The errors name the argument and the accepted values.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence

__all__ = [
    "check_choice",
    "check_methods",
    "check_path",
    "check_seconds",
    "check_sink",
    "check_type",
    "check_whole",
]


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise a `ValueError` that lists the choices for any other value."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(choices)}")


def check_type(name: str, value: object, kinds: type | tuple[type, ...], advice: str) -> None:
    """Raise a `TypeError` unless the value is of one of the types."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name}={value!r} cannot be used: pass {advice}")


def check_path(name: str, value: object, advice: str = "the path of a directory") -> None:
    """Raise a `TypeError` for a non-path, a `ValueError` for an empty path."""
    check_type(name, value, (str, os.PathLike), advice)
    if value == "":
        raise ValueError(f"{name}='' is empty: pass {advice}, such as '.'")


def check_whole(name: str, value: object, least: int) -> None:
    """Raise a `TypeError` for a non-integer, a `ValueError` below ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is no whole number: pass an int")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def check_seconds(name: str, value: object) -> None:
    """Raise a `TypeError` for a non-number, a `ValueError` unless positive."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is no number: pass seconds")
    if math.isnan(value) or value <= 0:
        raise ValueError(f"{name} must be more than 0 seconds, not {value}")


def check_sink(value: object) -> None:
    """Raise a `TypeError` unless a progress sink is callable or ``None``."""
    if value is not None and not callable(value):
        raise TypeError(
            f"progress={value!r} cannot be called: pass an async function that takes a Progress, "
            "such as send_channel.send"
        )


def check_methods(what: str, value: object, methods: Iterable[str], protocol: str) -> None:
    """Raise a `TypeError` that names the protocol's methods an object lacks."""
    missing = [name for name in methods if not callable(getattr(value, name, None))]
    if missing:
        raise TypeError(
            f"{what} {value!r} lacks {', '.join(f'{name}()' for name in missing)}: "
            f"see trio_layers.abc.{protocol}"
        )
