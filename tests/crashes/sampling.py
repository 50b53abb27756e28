"""Chooses among the very many ways to break a pull.

The suite takes those steps that make something durable or visible, once each, and a few random
ones. With ``TRIO_LAYERS_CRASHES=all`` every test takes every step, at its first and its last
occurrence, and 200 random times; ``python -m crashes`` goes on for as long as it is told.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import attrs

ALL = os.environ.get("TRIO_LAYERS_CRASHES") == "all"

_DECISIVE = ("rename", "replace", "COMMIT", "syncfs", "fsync")


@attrs.frozen
class Point:
    """The moment before or after the ``nth`` step of a name."""

    name: str
    nth: int
    when: str

    def __str__(self) -> str:
        return f"{self.when} {self.name} ({self.nth})"

    @property
    def request(self) -> dict[str, object]:
        return attrs.asdict(self)


def points(counts: Mapping[str, int], *, each: bool) -> Iterator[Point]:
    """Return the points at which to break a pull that took so many steps of each name.

    Args:
        counts: The number of steps of each name.
        each: Whether the suite also takes all other names, except for files in trees.
    """
    for name, count in counts.items():
        if ALL:
            for nth in sorted({1, count}):
                yield Point(name, nth, "before")
                yield Point(name, nth, "after")
        elif is_decisive(name):
            # The state after one step is that before the next, except for the last.
            yield Point(name, 1, "before")
            if name.startswith(("COMMIT", "replace")):
                yield Point(name, count, "after")
        elif each and " in tr" not in name:
            yield Point(name, 1, "before")


def is_decisive(name: str) -> bool:
    """Whether a step makes something durable or visible, or the opposite."""
    return name.startswith(_DECISIVE) and " in tr" not in name
