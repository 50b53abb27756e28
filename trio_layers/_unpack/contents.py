"""What a store's files hold, when they are written elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from .._entries import Entry
from .._errors import StoreError

__all__ = ["Source", "damaged", "reading"]


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
    """
    try:
        descriptor = source.open(entry.path)
    except OSError as error:
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
        f"{name!r} cannot be read from the store ({reason}); remove the image and pull it again"
    )
