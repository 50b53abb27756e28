"""Bodies that are encoded for the way although nobody asked for that (RFC 9110, 8.4).

Requests ask for ``identity``. Some proxies compress all the same; some stores name the coding of
the blob itself, which then is no coding of the body. So the bytes are taken as they are first, and
decoded if they are not those of the digest.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, final

import trio

from .._compression import PIECE, Decompressor
from .._errors import DecompressionError, UnpackError
from .answers import readable

if TYPE_CHECKING:
    from .transport import Answer

__all__ = [
    "ContentDecoder",
    "NotEncoded",
    "coding_of",
    "looks_like_json",
    "named_encoding",
    "read_fitting",
    "slices_of",
]

# Bytes by which an encoded body may be longer than twice the plain one.
SLACK: Final = 64 * 1024
# Bytes that are decoded without a pause: those of empty members take some milliseconds.
SLICE: Final = 4 * 1024

_BY_MAGIC: Final = {"gzip": "gzip", "x-gzip": "gzip", "zstd": "zstd"}


class NotEncoded(Exception):
    """The bytes of a body are not encoded as its header says."""


def coding_of(answer: Answer) -> str | None:
    """The coding of an answer's body; ``None`` if there is none, or none that can be undone here.
    Of several, one upon the other, there is no case known."""
    said = ",".join(answer.headers.get_list("Content-Encoding")).strip().lower()
    return said if said in _BY_MAGIC or said == "deflate" else None


def named_encoding(answer: Answer) -> str:
    """The encoding in words, to follow a statement about the body; empty if there is none."""
    said = readable(", ".join(answer.headers.get_list("Content-Encoding")))
    return f" (with Content-Encoding {said})" if said not in ("", "identity") else ""


def looks_like_json(data: bytes) -> bool:
    """Whether this may be a JSON document whose digest is not known."""
    return data.lstrip()[:1] in (b"{", b"[")


def slices_of(chunk: bytes) -> Iterator[bytes]:
    """A chunk in slices that are decoded in a few milliseconds each."""
    return (chunk[start : start + SLICE] for start in range(0, len(chunk), SLICE))


@final
class ContentDecoder:
    """Undoes a coding piece by piece, in bounded memory.

    Args:
        coding: As `coding_of` gives it.
        size: The most bytes that may come out. Input far longer than that is refused, too: empty
            members have no end otherwise.
    """

    def __init__(self, coding: str, size: int) -> None:
        compression = _BY_MAGIC.get(coding)
        self._codec = _Inflater() if compression is None else _ByMagic(compression)
        self._input_left = 2 * size + SLACK

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The plain bytes that ``data`` completes.

        Raises:
            NotEncoded: if the data are not encoded so, or too long.
        """
        self._input_left -= len(data)
        if self._input_left < 0:
            raise NotEncoded("the encoded body is too long")
        yield from self._codec.feed(data)

    def finish(self) -> Iterator[bytes]:
        """The plain bytes that the end of the data completes.

        Raises:
            NotEncoded: if the data end too early.
        """
        yield from self._codec.finish()


@final
class _ByMagic:
    def __init__(self, compression: str) -> None:
        self._compression = compression
        self._decompressor = Decompressor()

    def feed(self, data: bytes) -> Iterator[bytes]:
        return self._check(self._decompressor.feed(data))

    def finish(self) -> Iterator[bytes]:
        return self._check(self._decompressor.finish())

    def _check(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        try:
            for piece in pieces:
                if self._decompressor.compression != self._compression:
                    raise NotEncoded(f"the body is not encoded with {self._compression}")
                yield piece
        except (DecompressionError, UnpackError) as error:
            raise NotEncoded(str(error)) from error


@final
class _Inflater:
    """``deflate``: zlib's format by the standard, bare deflate from some servers."""

    def __init__(self) -> None:
        self._codec = zlib.decompressobj()
        self._started = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        if not data:
            return
        if not self._started:
            self._started = True
            if data[0] & 0x0F != zlib.DEFLATED:
                self._codec = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
        try:
            while data and not self._codec.eof:
                piece = self._codec.decompress(data, PIECE)
                data = self._codec.unconsumed_tail
                if piece:
                    yield piece
        except zlib.error as error:
            raise NotEncoded(str(error)) from error

    def finish(self) -> Iterator[bytes]:
        if self._started and not self._codec.eof:
            raise NotEncoded("the encoded body ends too early")
        yield from ()


async def read_fitting(answer: Answer, limit: int, fits: Callable[[bytes], bool]) -> bytes:
    """Read a small body: as it is, or decoded if only that fits.

    Args:
        answer: With its body unread.
        limit: The most bytes that the plain body may have; if it has more, only its beginning is
            returned, longer than ``limit`` all the same.
        fits: Whether this is the body. It runs in a thread: a hash may take some milliseconds.
    """
    coding = coding_of(answer)
    data = await answer.read(2 * limit + SLACK if coding else limit)
    if coding is None:
        return data
    return await trio.to_thread.run_sync(_fitting, data, coding, limit, fits)


def _fitting(data: bytes, coding: str, limit: int, fits: Callable[[bytes], bool]) -> bytes:
    if len(data) <= limit and fits(data):
        return data
    decoded = _decode(data, coding, limit)
    return decoded if decoded is not None and fits(decoded) else data


def _decode(data: bytes, coding: str, limit: int) -> bytes | None:
    decoder, plain = ContentDecoder(coding, limit), bytearray()
    try:
        for pieces in (decoder.feed(data), decoder.finish()):
            for piece in pieces:
                plain += piece
                if len(plain) > limit:
                    return None
    except NotEncoded:
        return None
    return bytes(plain)
