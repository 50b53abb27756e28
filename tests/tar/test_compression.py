"""The decompressor: formats, errors and their time, and bounded memory."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import sys
import tracemalloc
import zlib

import pytest

from trio_layers import _compression
from trio_layers._compression import PIECE, Decompressor
from trio_layers._errors import DecompressionError, UnpackError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PLAIN = random.Random(1).randbytes(3000) + bytes(700_000) + random.Random(2).randbytes(40_000)


def gzip_header(*, extra: bytes = b"", name: bytes = b"", comment: bytes = b"") -> bytes:
    """Return a header with all optional fields, including a checksum."""
    flags = 2 | (4 if extra else 0) | (8 if name else 0) | (16 if comment else 0)
    header = b"\x1f\x8b\x08" + bytes([flags]) + bytes(5) + b"\x03"
    if extra:
        header += len(extra).to_bytes(2, "little") + extra
    header += b"".join(text + b"\0" for text in (name, comment) if text)
    return header + (zlib.crc32(header) & 0xFFFF).to_bytes(2, "little")


FULL = gzip_header(extra=b"e" * 300, name=b"name", comment=b"c" * 511)
SKIPPABLE = bytes.fromhex("532a4d18") + (5).to_bytes(4, "little") + b"hello"
GZIP = gzip.compress(PLAIN, mtime=0)

STREAMS = {
    "none": PLAIN,
    "gzip": GZIP,
    "gzip-full-header": FULL + GZIP[10:],
    "gzip-members": gzip.compress(PLAIN[:9])
    + gzip.compress(b"")
    + FULL
    + gzip.compress(PLAIN[9:])[10:],
    "gzip-zeros-behind": GZIP + bytes(1000),
    "gzip-zeros-between": gzip.compress(PLAIN[:99]) + bytes(512) + gzip.compress(PLAIN[99:]),
    "bzip2": bz2.compress(PLAIN),
    "bzip2-streams": bz2.compress(PLAIN[:99]) + bz2.compress(PLAIN[99:]),
    "xz": lzma.compress(PLAIN),
    "xz-streams": lzma.compress(PLAIN[:99]) + bytes(8) + lzma.compress(PLAIN[99:]),
    "zstd": zstd.compress(PLAIN),
    "zstd-frames": zstd.compress(PLAIN[:99]) + SKIPPABLE + zstd.compress(PLAIN[99:]) + SKIPPABLE,
    "zstd-skippable-first": SKIPPABLE + zstd.compress(PLAIN),
}


def decompress(data: bytes, step: int = 1 << 16) -> bytes:
    decompressor = Decompressor()
    pieces: list[bytes] = []
    for start in range(0, len(data), step):
        pieces.extend(decompressor.feed(data[start : start + step]))
    pieces.extend(decompressor.finish())
    assert decompressor.opened
    assert all(0 < len(piece) <= PIECE for piece in pieces)
    return b"".join(pieces)


@pytest.mark.parametrize("step", [1, 7, 1000, 1 << 30])
@pytest.mark.parametrize("name", STREAMS)
def test_plain_bytes(name: str, step: int) -> None:
    """Every format is decompressed, however the input is split."""
    data = STREAMS[name]
    if step == 1 and len(data) > 100_000:
        data, step = data[:100_000], 3
        assert PLAIN.startswith(b"".join(Decompressor().feed(data)))
        return
    assert decompress(data, step) == PLAIN


def test_no_bytes_are_valid() -> None:
    """An empty layer is decompressed to nothing (moby accepts such layers)."""
    assert decompress(b"") == b""


@pytest.mark.parametrize("text", [b"a", b"short", b"\x1f\x8b", b"\x28\xb5", b"P*M\x18abc"])
def test_short_input_is_plain(text: bytes) -> None:
    """Input that is shorter than any magic number is plain data."""
    assert decompress(text) == text


@pytest.mark.parametrize("name", sorted(STREAMS.keys() - {"none"}))
def test_truncated(name: str) -> None:
    """Truncated input is an error; within 10 bytes, it is an error of the beginning."""
    data = STREAMS[name].rstrip(b"\0")
    start = len(SKIPPABLE) if name == "zstd-skippable-first" else 0
    header = len(FULL) if name == "gzip-full-header" else 10
    for length in {start + 7, start + 9, header - 1, header, header + 20, len(data) // 2}:
        expected = DecompressionError if length < header else UnpackError
        with pytest.raises(expected, match="near byte"):
            decompress(data[:length])


@pytest.mark.parametrize(
    "header",
    [
        b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * 512 + b"\0",
        b"\x1f\x8b\x08\x10" + bytes(6) + b"n" * 600,
        FULL[:-1] + bytes([FULL[-1] ^ 1]),
    ],
    ids=["long-name", "endless-comment", "checksum"],
)
def test_bad_gzip_header(header: bytes) -> None:
    """The beginning of gzip data is its whole header."""
    with pytest.raises(DecompressionError, match="header"):
        decompress(header + GZIP[10:])


@pytest.mark.parametrize("position", [-8, -5, -4, -1])
def test_gzip_trailer_is_checked(position: int) -> None:
    """The checksum and length of each gzip member are verified, not only of the last."""
    damaged = bytearray(GZIP)
    damaged[position] ^= 0x10
    for data in (bytes(damaged), bytes(damaged) + GZIP):
        with pytest.raises(UnpackError, match="gzip"):
            decompress(data)


@pytest.mark.parametrize("name", ["gzip", "bzip2", "xz", "zstd"])
def test_garbage_behind(name: str) -> None:
    """Data after a member must be another member or zeros."""
    with pytest.raises(UnpackError):
        decompress(STREAMS[name] + b"garbage, and enough of it to be looked at")


def test_opened() -> None:
    """The beginning ends after ten bytes, for gzip after the header."""
    plain, packed = Decompressor(), Decompressor()
    for start in range(9):
        assert list(plain.feed(b"p")) == []
        assert not plain.opened, start
    assert b"".join(plain.feed(b"p")) == b"p" * 10
    assert plain.opened
    list(packed.feed(FULL[:-1]))
    assert not packed.opened
    list(packed.feed(FULL[-1:]))
    assert packed.opened
    assert packed.compression == "gzip"


@pytest.mark.parametrize("name", ["gzip", "zstd"])
def test_bomb_in_constant_memory(name: str) -> None:
    """A small input that expands a thousandfold is returned in small pieces."""
    zeros = bytes(64 << 20)
    bomb = gzip.compress(zeros) if name == "gzip" else zstd.compress(zeros)
    del zeros
    tracemalloc.start()
    try:
        assert sum(len(piece) for piece in Decompressor().feed(bomb)) == 64 << 20
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_no_memory_is_no_fault_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec's error about lack of memory is raised as it is."""

    class Codec:
        def decompress(self, data: bytes, max_length: int = -1) -> bytes:
            raise MemoryError

    monkeypatch.setitem(_compression._CODECS, "xz", lambda window: Codec())
    with pytest.raises(MemoryError):
        decompress(STREAMS["xz"])


def test_zeros_between_tiny_members() -> None:
    """One input may contain thousands of headers with all optional fields."""
    data = (FULL + gzip.compress(b"x", mtime=0)[10:] + bytes(3)) * 5000
    assert b"".join(Decompressor().feed(data)) == b"x" * 5000


def test_many_tiny_members_are_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec copies its unused input, so it gets only a small piece at first."""
    handed: list[int] = []

    class Counting:
        def __init__(self, window: int) -> None:
            self.inner = _compression._gzip(window)

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        def decompress(self, data: bytes, max_length: int = -1) -> bytes:
            handed.append(len(data))
            return self.inner.decompress(data, max_length)

    monkeypatch.setitem(_compression._CODECS, "gzip", Counting)
    data = gzip.compress(b"", mtime=0) * 5000
    assert list(Decompressor().feed(data)) == []
    assert sum(handed) < 2 * len(data)
