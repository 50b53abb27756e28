"""Decodes bodies with an unrequested ``Content-Encoding`` (RFC 9110, 8.4).

Requests ask for ``identity``. Some proxies compress the body nevertheless. Some stores send the
blob unchanged, and describe the blob's own compression in ``Content-Encoding``. So the client first
compares the bytes as received with the digest, and decodes them only if they do not match.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, final

import trio

from .._compression import PIECE, Decompressor
from .._errors import DecompressionError, UnpackError
from .._printable import printable_line

if TYPE_CHECKING:
    from .response import RegistryResponse

__all__ = [
    "ContentDecoder",
    "NotEncoded",
    "coding_of",
    "looks_like_json",
    "named_encoding",
    "read_fitting",
    "slices_of",
]

# An encoded body may have twice the bytes of the plain body, and this many more.
SLACK: Final = 64 * 1024
# Bytes that are decoded between two checkpoints. Even if they hold only empty gzip members, they
# take just a few milliseconds.
SLICE: Final = 4 * 1024

_BY_MAGIC: Final = {"gzip": "gzip", "x-gzip": "gzip", "zstd": "zstd"}


class NotEncoded(Exception):
    """A body's bytes do not have the encoding that its header names."""


def coding_of(answer: RegistryResponse) -> str | None:
    """Return a response's content coding, if it can be decoded.

    ``None`` stands for no coding, an unknown coding, or several codings: no server is known to send
    several.
    """
    said = ",".join(answer.headers.get_list("Content-Encoding")).strip().lower()
    return said if said in _BY_MAGIC or said == "deflate" else None


def named_encoding(answer: RegistryResponse) -> str:
    """Describe the response's encoding for an error message; empty without an encoding."""
    said = printable_line(", ".join(answer.headers.get_list("Content-Encoding")))
    return f" (with Content-Encoding {said})" if said not in ("", "identity") else ""


def looks_like_json(data: bytes) -> bool:
    """Return whether the data may be a JSON object or array.

    This stands in for the check of a digest where the digest is unknown.
    """
    return data.lstrip()[:1] in (b"{", b"[")


def slices_of(chunk: bytes) -> Iterator[bytes]:
    """Cut a chunk into slices that decode in a few milliseconds each."""
    return (chunk[start : start + SLICE] for start in range(0, len(chunk), SLICE))


@final
class ContentDecoder:
    """Decodes a body piece by piece, in bounded memory.

    Args:
        coding: The coding that `coding_of` returned.
        size: The expected size of the plain body. Input of more than twice this size and `SLACK`
            is refused, because a stream of empty members would never end. The caller limits the
            output.
    """

    def __init__(self, coding: str, size: int) -> None:
        compression = _BY_MAGIC.get(coding)
        self._codec = _Inflater() if compression is None else _ByMagic(compression)
        self._input_left = 2 * size + SLACK

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Decode more data, and yield plain bytes.

        Raises:
            NotEncoded: if the data have another encoding, or are too long.
        """
        self._input_left -= len(data)
        if self._input_left < 0:
            raise NotEncoded("the encoded body is too long")
        yield from self._codec.feed(data)

    def finish(self) -> Iterator[bytes]:
        """Yield the plain bytes that remain at the end of the data.

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
    """Decodes ``deflate``: zlib's format by RFC 9110, raw deflate from some servers."""

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


async def read_fitting(
    answer: RegistryResponse, limit: int, fits: Callable[[bytes], bool]
) -> bytes:
    """Read a small body; decode it if only the decoded bytes fit.

    Args:
        answer: The response, with its body unread.
        limit: The most bytes that the plain body may have. Of a longer body, only a beginning of
            more than ``limit`` bytes is returned.
        fits: Returns whether the bytes are the expected body. It runs in a thread, since a hash
            may take some milliseconds.
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
