"""What a store's files hold, when they are written elsewhere."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from .._entries import Entry
from .._errors import StoreError

__all__ = ["Source", "damaged", "reading"]

# What says that the process or the system is at its limits, and nothing about the store.
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class Source(Protocol):
    """A merged tree."""

    def walk(self) -> list[Entry]:
        """All there is, sorted by path; the root is first."""
        ...

    def open(self, path: bytes) -> int:
        """A descriptor to read the file that is there; its taker closes it."""
        ...


@contextmanager
def reading(source: Source, entry: Entry) -> Iterator[int]:
    """A descriptor, for the block, of a file that has the size it should have.

    Raises:
        StoreError: if it does not, or cannot be opened.
        OSError: if nothing more can be opened at all.
    """
    try:
        descriptor = source.open(entry.path)
    except OSError as error:
        if error.errno in _EXHAUSTED:
            raise
        raise damaged(entry.path, error.strerror) from error
    try:
        if os.fstat(descriptor).st_size != entry.size:
            raise damaged(entry.path, "its size is wrong")
        yield descriptor
    finally:
        os.close(descriptor)


def damaged(path: bytes, reason: str | None) -> StoreError:
    """An error that says what is wrong with a path in the store."""
    name = path.decode("utf-8", "backslashreplace")[:256]
    return StoreError(
        f"{name!r} cannot be read from the store ({reason}): pull its image again, and what is "
        "damaged comes anew"
    )
