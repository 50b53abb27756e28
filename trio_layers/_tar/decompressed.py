"""Decompresses a blob, counts its bytes and hashes them."""

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

__all__ = ["DecompressedBlob"]

# A larger slice is not faster, and it delays cancellation.
_SLICE: Final = 256 * 1024


@final
class DecompressedBlob:
    """Reads, decompresses, counts and hashes a blob's bytes as the caller asks for them.

    Attributes:
        check_cancelled: Called at each piece; what it raises comes out as it is.
        entry_name: The name of the current entry, for messages; empty before the first entry.
        size: The number of decompressed bytes handed out or buffered so far.
    """

    def __init__(
        self,
        read: Callable[[int], bytes],
        limits: Limits,
        check_cancelled: Callable[[], None],
        *,
        read_ahead: bool = False,
    ) -> None:
        self.check_cancelled = check_cancelled
        self.entry_name = b""
        self.size = 0
        self._read = read
        self._limits = limits
        self._compressed_size = 0
        self._holes = 0
        self._hash = hashlib.sha256()
        self._read_ahead = ReadAhead(self._decompress()) if read_ahead else None
        self._pieces = self._checked_pieces(iter(self._read_ahead or self._decompress()))
        # The current piece, and the position in it up to which the caller has read.
        self._buffer = b""
        self._view = memoryview(self._buffer)
        self._position = 0

    @property
    def diff_id(self) -> DiffID:
        """The digest of the decompressed bytes so far."""
        return DiffID(Digest(f"sha256:{self._hash.hexdigest()}"))

    def require_room(self, size: int, holes: int) -> None:
        """Check that a file's data and holes stay within the limits, before they are read.

        The ratio is checked only for the holes. The number of compressed bytes of data that is
        still to come is not known.

        Raises:
            LimitExceeded: If the data or the holes exceed a limit.
        """
        if not holes and self._position + size <= len(self._buffer):
            # All of the data is in the buffer and was counted.
            return
        self._holes += holes
        end = self.size - len(self._buffer) + self._position + size
        self._check_size(max(self.size, end) + self._holes)
        self._check_ratio(self.size + self._holes)

    def read(self, size: int) -> bytes:
        """Return ``size`` decompressed bytes, fewer only at the end."""
        start = self._position
        end = start + size
        if end <= len(self._buffer):
            self._position = end
            return self._buffer[start:end]
        return b"".join(self.pieces(size))

    def pieces(self, size: int) -> Iterator[memoryview]:
        """Iterate over ``size`` decompressed bytes, fewer only at the end."""
        while size > 0:
            start = self._position
            if start >= len(self._buffer):
                self._set_buffer(next(self._pieces, b""))
                if not self._buffer:
                    return
                start = 0
            piece = self._view[start : start + size]
            self._position = start + len(piece)
            size -= len(piece)
            yield piece

    def drain(self) -> None:
        """Read the rest: a diff ID also covers the bytes after the archive's end."""
        self._set_buffer(b"")
        for _ in self._pieces:
            pass

    def _set_buffer(self, piece: bytes) -> None:
        self._buffer, self._view, self._position = piece, memoryview(piece), 0

    def close(self) -> None:
        """Wait until the thread that reads ahead has ended."""
        if self._read_ahead is not None:
            self._read_ahead.close()

    def _decompress(self) -> Iterator[tuple[bytes, int]]:
        """Iterate over pieces, each with the number of compressed bytes read so far."""
        limits = self._limits
        decompressor = Decompressor(max_window=limits.max_window, max_members=limits.max_members)
        compressed_size = 0
        while data := self._read(_SLICE):
            # Some input gives no output, so the check for each piece is not enough.
            self.check_cancelled()
            compressed_size += len(data)
            for piece in decompressor.feed(data):
                self._hash.update(piece)
                yield piece, compressed_size
        for piece in decompressor.finish():
            self._hash.update(piece)
            yield piece, compressed_size

    def _checked_pieces(self, decompressed: Iterator[tuple[bytes, int]]) -> Iterator[bytes]:
        while True:
            try:
                result = next(decompressed, None)
            except UnpackError as error:
                if not self.entry_name:
                    raise
                # The damage may lie after the current entry, because data is decompressed ahead.
                raise type(error)(
                    f"{printable_path(self.entry_name)}, or soon after it: {error}"
                ) from error
            if result is None:
                return
            piece, self._compressed_size = result
            self.check_cancelled()
            self.size += len(piece)
            self._check_size(self.size + self._holes)
            self._check_ratio(self.size + self._holes)
            yield piece

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_unpacked_bytes:
            raise LimitExceeded(
                f"{self._entry_prefix()}more unpacked bytes than the limit max_unpacked_bytes, "
                f"{self._limits.max_unpacked_bytes}"
            )

    def _check_ratio(self, size: int) -> None:
        if (
            size > self._limits.max_ratio_from
            and size > self._limits.max_ratio * self._compressed_size
        ):
            raise LimitExceeded(
                f"{self._entry_prefix()}{size} bytes unpacked from {self._compressed_size}: "
                f"more than the limit max_ratio, {self._limits.max_ratio}"
            )

    def _entry_prefix(self) -> str:
        return f"{printable_path(self.entry_name)}: " if self.entry_name else ""
