"""Decompresses a layer's blob, counts its bytes and hashes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Final, final

from .._compression import Decompressor
from .._digest import DiffID, Digest
from .._errors import LimitExceeded, UnpackError
from .._printable import printable_path
from .limits import Limits
from .read_ahead import ReadAhead

__all__ = ["Inflated"]

# A larger slice gains nothing; a smaller one keeps cancellation near.
_SLICE: Final = 256 * 1024


@final
class Inflated:
    """The plain bytes of a blob: read, inflated, counted and hashed as they are asked for.

    Attributes:
        entry: The name of the entry that is at work, for messages.
        size: How many bytes were given, all that were read ahead included.
    """

    def __init__(
        self,
        read: Callable[[int], bytes],
        limits: Limits,
        check: Callable[[], None],
        *,
        ahead: bool = False,
    ) -> None:
        self.check = check
        self.entry = b""
        self.size = 0
        self._read = read
        self._limits = limits
        self._compressed = 0
        self._holes = 0
        self._hash = hashlib.sha256()
        self._ahead = ReadAhead(self._inflate()) if ahead else None
        self._plain = self._count(iter(self._ahead or self._inflate()))
        # What has come and was not asked for yet, and where it goes on.
        self._held = b""
        self._view = memoryview(self._held)
        self._position = 0

    @property
    def diff_id(self) -> DiffID:
        """The digest of all that was read so far."""
        return DiffID(Digest(f"sha256:{self._hash.hexdigest()}"))

    def expect(self, size: int, holes: int) -> None:
        """Raise unless so many bytes more, and holes besides, are within the limits.

        What there is of the blob for bytes that are still to come nobody knows; holes are here.
        """
        if not holes and self._position + size <= len(self._held):
            # It has been counted.
            return
        self._holes += holes
        end = self.size - len(self._held) + self._position + size
        self._allow(max(self.size, end) + self._holes)
        self._allow_of_blob(self.size + self._holes)

    def read(self, size: int) -> bytes:
        """``size`` plain bytes, fewer only at the end."""
        start = self._position
        end = start + size
        if end <= len(self._held):
            self._position = end
            return self._held[start:end]
        return b"".join(self.pieces(size))

    def pieces(self, size: int) -> Iterator[memoryview]:
        """``size`` plain bytes as they come, fewer only at the end."""
        while size > 0:
            start = self._position
            if start >= len(self._held):
                self._hold(next(self._plain, b""))
                if not self._held:
                    return
                start = 0
            piece = self._view[start : start + size]
            self._position = start + len(piece)
            size -= len(piece)
            yield piece

    def drain(self) -> None:
        """Read on to the end: a diff ID covers what follows the archive, too."""
        self._hold(b"")
        for _ in self._plain:
            pass

    def _hold(self, piece: bytes) -> None:
        self._held, self._view, self._position = piece, memoryview(piece), 0

    def close(self) -> None:
        """Wait until nobody reads any more."""
        if self._ahead is not None:
            self._ahead.close()

    def _inflate(self) -> Iterator[tuple[bytes, int]]:
        """Pieces, and how many bytes of the blob they and those before them took."""
        limits = self._limits
        decompressor = Decompressor(max_window=limits.max_window, max_members=limits.max_members)
        compressed = 0
        while data := self._read(_SLICE):
            # Not all input gives output.
            self.check()
            compressed += len(data)
            for piece in decompressor.feed(data):
                self._hash.update(piece)
                yield piece, compressed
        for piece in decompressor.finish():
            self._hash.update(piece)
            yield piece, compressed

    def _count(self, inflated: Iterator[tuple[bytes, int]]) -> Iterator[bytes]:
        while True:
            try:
                made = next(inflated, None)
            except UnpackError as error:
                if not self.entry:
                    raise
                # Tell which entry was read; something has been inflated ahead.
                raise type(error)(
                    f"{printable_path(self.entry)}, or soon after it: {error}"
                ) from error
            if made is None:
                return
            piece, self._compressed = made
            self.check()
            self.size += len(piece)
            self._allow(self.size + self._holes)
            self._allow_of_blob(self.size + self._holes)
            yield piece

    def _allow(self, size: int) -> None:
        if size > self._limits.max_unpacked_bytes:
            raise LimitExceeded(
                f"{self._where()}more bytes, unpacked, than the limit max_unpacked_bytes, "
                f"{self._limits.max_unpacked_bytes}, allows"
            )

    def _allow_of_blob(self, size: int) -> None:
        if size > self._limits.max_ratio_from and size > self._limits.max_ratio * self._compressed:
            raise LimitExceeded(
                f"{self._where()}{size} bytes, unpacked, of {self._compressed}: more than "
                f"the limit max_ratio, {self._limits.max_ratio}, allows"
            )

    def _where(self) -> str:
        return f"{printable_path(self.entry)}: " if self.entry else ""
