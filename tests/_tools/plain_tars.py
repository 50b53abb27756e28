"""Makes archives for tests, and the source of bytes that the tar reader needs."""

from __future__ import annotations

from collections.abc import Iterator

from cases.layers import maketar


def archive(*entries: dict) -> bytes:
    """Return a tar of entries as in the cases (``FORMAT.md``)."""
    return b"".join(maketar.iter_tar({"entries": list(entries)}))


class Plain:
    """A `PlainSource` over bytes that returns pieces of an odd size."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def read(self, size: int) -> bytes:
        return b"".join(self.pieces(size))

    def pieces(self, size: int) -> Iterator[bytes]:
        while size > 0:
            piece = self._data[self._position : self._position + min(size, 1000)]
            if not piece:
                return
            self._position += len(piece)
            size -= len(piece)
            yield piece
