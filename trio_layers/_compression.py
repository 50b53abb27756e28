"""Recognises and undoes a layer's compression, independent of its media type.

The model is moby's ``DecompressStream`` (go-archive ``compression/compression.go``): the magic
bytes decide, and data without known magic bytes is a plain tar. The code here does no I/O, so it
runs in a task as well as in a worker thread: the caller pushes bytes in and gets bytes out.
"""

from __future__ import annotations

import bz2
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Final, Protocol, final

from isal import igzip_lib
from isal.isal_zlib import crc32

from ._errors import DecompressionError, LimitExceeded, UnpackError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = [
    "DEFAULT_MAX_MEMBERS",
    "DEFAULT_MAX_WINDOW",
    "PIECE",
    "Decompressor",
    "crc32",
    "detect_compression",
]

PIECE: Final = 256 * 1024
"""The most bytes in one piece of output."""

# moby peeks at this many bytes; an error within them means that it could not open the data.
_HEAD_SIZE: Final = 10

DEFAULT_MAX_WINDOW: Final = 128 * 1024 * 1024
"""Default limit of a codec's window: the earlier output that it keeps in memory, in bytes."""

DEFAULT_MAX_MEMBERS: Final = 10_000
"""Default limit of members beyond one for each `_MIN_MEMBER_SIZE` bytes."""

# The least content of a member in formats with one member for each file: a tar header block.
_MIN_MEMBER_SIZE: Final = 512

# xz's memory apart from the dictionary ("DecMem" in the table of its manual), with a margin.
_XZ_OVERHEAD: Final = 16 * 1024 * 1024

# Go's gzip reader, and so every registry client in Go, refuses longer names and comments.
_MAX_GZIP_TEXT: Final = 512

_ZEROS: Final = re.compile(rb"\0*")


class _Codec(Protocol):
    """The interface that bz2, lzma, zstd and isal share: decompresses one member in pieces."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /, max_length: int = -1) -> bytes: ...


# Our code parses the headers: igzip computes a wrong header checksum if the checksum's bytes come
# in two parts, and `Decompressor.opened` depends on the end of the header.
def _gzip(_: int) -> _Codec:
    return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP_NO_HDR_VER)


def _bzip2(_: int) -> _Codec:
    return bz2.BZ2Decompressor()


def _zstd(window: int) -> _Codec:
    # The parameter is the exponent of a power of two, within bounds.
    key = zstd.DecompressionParameter.window_log_max
    low, high = key.bounds()
    options: dict[int, int] = {key: min(max(window.bit_length() - 1, low), high)}
    return zstd.ZstdDecompressor(options=options)


def _xz(window: int) -> _Codec:
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=window + _XZ_OVERHEAD)


_CODECS: Final[dict[str, Callable[[int], _Codec]]] = {
    "gzip": _gzip,
    "bzip2": _bzip2,
    "xz": _xz,
    "zstd": _zstd,
}


def detect_compression(head: bytes) -> str | None:
    """Return the compression of data that begins with ``head``, or ``None`` for none.

    ``head`` is at least 10 bytes, or all of the data.
    """
    if head.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    if head.startswith(b"BZh"):
        return "bzip2"
    if head.startswith(b"\xfd7zXZ\x00"):
        return "xz"
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return "zstd"
    # A zstd stream may start with a skippable frame (RFC 8878, 3.1.2).
    if len(head) >= 8 and 0x50 <= head[0] <= 0x5F and head[1:4] == b"\x2a\x4d\x18":
        return "zstd"
    return None


def _end_of_gzip_header(data: bytes, start: int) -> int | None:
    """Find the end of the gzip header at ``start`` (RFC 1952, 2.3).

    Returns ``None`` if the header continues after the end of ``data``.

    Raises:
        ValueError: If the header is invalid.
    """
    if not b"\x1f\x8b\x08".startswith(data[start : start + 3]):
        raise ValueError("invalid gzip header")
    end = start + 10
    if len(data) < end:
        return None
    flags = data[start + 3]
    if flags & 0x04:
        if len(data) < end + 2:
            return None
        end += 2 + int.from_bytes(data[end : end + 2], "little")
    for text in (0x08, 0x10):
        if flags & text:
            found = data.find(b"\0", end, end + _MAX_GZIP_TEXT)
            if found < 0:
                if len(data) >= end + _MAX_GZIP_TEXT:
                    raise ValueError("a name or comment in the gzip header is too long")
                return None
            end = found + 1
    if flags & 0x02:
        if len(data) < end + 2:
            return None
        if zlib.crc32(data[start:end]) & 0xFFFF != int.from_bytes(data[end : end + 2], "little"):
            raise ValueError("the checksum of the gzip header is wrong")
        end += 2
    return end if len(data) >= end else None


def _end_of_zeros(data: bytes, start: int) -> int:
    """Find the end of the zeros at ``start``."""
    match = _ZEROS.match(data, start)
    assert match is not None
    return match.end()


@final
class Decompressor:
    """Decompresses gzip, zstd, bzip2, xz or plain data, which it recognises by the first bytes.

    Push compressed bytes through `feed` and end with `finish`; exhaust each iterator before the
    next call. Memory stays bounded for every input, apart from the window that zstd and xz ask
    for. Several members or frames in a row are one stream, and zeros after the last one are
    ignored. Empty input is valid and gives empty output. Checksums are verified.

    Args:
        max_window: The most bytes of memory for the window; zstd's is a power of two.
        max_members: Limit of members, frames or streams beyond one for each 512 plain bytes. Each
            member needs its own codec, which is slow to make.

    Attributes:
        opened: Whether the beginning was read: 10 bytes or the end of the input and, for gzip,
            the whole first header. An earlier failure is a `DecompressionError`, a later one an
            `UnpackError`, the same distinction as in moby.
        compression: ``gzip``, ``zstd``, ``bzip2``, ``xz``; ``None`` for none, or not yet known.
    """

    def __init__(
        self, *, max_window: int = DEFAULT_MAX_WINDOW, max_members: int = DEFAULT_MAX_MEMBERS
    ) -> None:
        self.opened = False
        self.compression: str | None = None
        self._max_window = max_window
        self._max_members = max_members
        self._plain = 0
        self._detected = False
        self._codec: _Codec | None = None
        self._members = 0
        # The size of the codec's next input. The codec copies input that follows its member,
        # so a small first input keeps a stream of many tiny members linear.
        self._step = _HEAD_SIZE
        self._held = b""
        self._position = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Iterate over the plain bytes that ``data`` completes, in pieces of up to `PIECE` bytes.

        ``data`` is kept until the iterator is exhausted, so pass a large input in slices.

        Raises:
            DecompressionError: If the input's beginning is invalid.
            UnpackError: If the input is damaged after its beginning.
            LimitExceeded: If any part needs a window larger than ``max_window``, or the number of
                members exceeds ``max_members``.
        """
        return self._run(data, end=False)

    def finish(self) -> Iterator[bytes]:
        """End the input and iterate over the rest of the plain bytes.

        Raises:
            DecompressionError: If the input ends within its beginning.
            UnpackError: If the input ends within a member.
        """
        yield from self._run(b"", end=True)
        if self._codec is not None or self._held:
            raise self._error("the compressed data ends too early")
        self.opened = True

    def _run(self, data: bytes, *, end: bool) -> Iterator[bytes]:
        data, self._held = self._held + data, b""
        if not self._detected:
            if len(data) < _HEAD_SIZE and not end:
                self._held = data
                return
            self.compression = detect_compression(data)
            self._detected = True
            self.opened = self.compression is None
        if self.compression is None:
            for start in range(0, len(data), PIECE):
                yield data[start : start + PIECE]
            return
        start = 0
        while start < len(data):
            if self._codec is None:
                body = self._begin(data, start)
                self._position += body - start
                start = body
                if self._codec is None:
                    self._held = data[start:]
                    return
            part = data[start : start + self._step]
            self._step = min(self._step * 8, PIECE)
            yield from self._decode(self._codec, part)
            start += len(part)
            self._position += len(part)
            if self._codec.eof:
                rest = len(self._codec.unused_data)
                start -= rest
                self._position -= rest
                self._codec = None
            # For gzip, `_begin` has set it at the end of the first header.
            self.opened = self.opened or self._position >= _HEAD_SIZE

    def _begin(self, data: bytes, start: int) -> int:
        """Set up the codec for the member at ``start``, after zeros if it is not the first.

        Returns the start of the member's body or, if more input is needed, of the unread input.
        """
        if self._members and data[start] == 0:
            start = _end_of_zeros(data, start)
            if start == len(data):
                return start
        assert self.compression is not None
        if self.compression == "gzip":
            try:
                end = _end_of_gzip_header(data, start)
            except ValueError as error:
                raise self._error(str(error)) from None
            if end is None:
                return start
            start = end
            self.opened = True
        self._members += 1
        if self._members > self._max_members + self._plain // _MIN_MEMBER_SIZE:
            raise LimitExceeded(
                self._with_position(
                    f"more members or frames than the limit max_members, {self._max_members}, "
                    f"allows beyond one for each {_MIN_MEMBER_SIZE} bytes of content"
                )
            )
        self._codec = _CODECS[self.compression](self._max_window)
        self._step = _HEAD_SIZE
        return start

    def _decode(self, codec: _Codec, part: bytes) -> Iterator[bytes]:
        while True:
            try:
                plain = codec.decompress(part, PIECE)
            except MemoryError:
                raise
            except Exception as error:  # each library raises its own class
                text = str(error)
                # No library has an exception class for a window that is too large.
                if "memory" in text.lower():
                    text += f"; the limit max_window is {self._max_window}"
                    raise LimitExceeded(self._with_position(text)) from error
                raise self._error(text) from error
            if plain:
                self._plain += len(plain)
                yield plain
            if codec.eof or codec.needs_input:
                return
            part = b""

    def _error(self, text: str) -> DecompressionError | UnpackError:
        where = self._with_position(text)
        return UnpackError(where) if self.opened else DecompressionError(where)

    def _with_position(self, text: str) -> str:
        return f"{self.compression} data, near byte {self._position}: {text}"
