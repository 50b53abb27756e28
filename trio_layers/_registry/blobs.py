"""Blobs: fetched into a sink that keeps received bytes, and resumed at its end.

This follows moby's ``distribution/pull_v2.go``, with two differences: a range is continued if the
server sends less than requested, and a blob that cannot be resumed is started over at once.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Final, TypeAlias, final

import attrs
import trio

from .._digest import Digest, Verifier
from .._errors import RegistryError, VerificationError
from .._lifetime import Lifetime
from .._manifest import Descriptor
from .._progress import Status
from .._util import made_by
from ..abc import BlobSink, ReportProgress
from .encoding import ContentDecoder, NotEncoded, coding_of, named_encoding, slices_of
from .error_responses import mark_final
from .response import RegistryResponse

__all__ = ["BlobChunks", "BlobFetch", "EntityTags", "Open", "write_embedded"]

MAX_TAGS: Final = 1000
# Bytes. Shorter ranges before the blob's end are continued only a few times in an attempt.
# Otherwise a server that sends single bytes would never end.
SHORT: Final = 64 * 1024
MAX_SHORT: Final = 10

Open: TypeAlias = Callable[[Mapping[str, str]], AbstractAsyncContextManager[RegistryResponse]]
"""Asks for a blob with these header fields; the answer is a success or a 416."""

# The unit's name is in any case (RFC 9110, 14.1).
_CONTENT_RANGE = re.compile(
    r"bytes ([0-9]{1,18})-([0-9]{1,18})/(?:([0-9]{1,18})|\*)\Z", re.ASCII | re.IGNORECASE
)


@final
class EntityTags:
    """The strong entity tags of partial blobs, to resume the same representation.

    See RFC 9110, 13.1.5.
    """

    def __init__(self) -> None:
        self._tags: dict[Digest, str] = {}

    def get(self, digest: Digest) -> str | None:
        return self._tags.get(digest)

    def see(self, digest: Digest, answer: RegistryResponse) -> None:
        tag = answer.headers.get("ETag", "")
        self.forget(digest)
        if tag.startswith('"') and tag.isascii():  # W/"…" is weak
            if len(self._tags) >= MAX_TAGS:
                del self._tags[next(iter(self._tags))]
            self._tags[digest] = tag

    def forget(self, digest: Digest) -> None:
        self._tags.pop(digest, None)


@made_by("RegistryClient.open_blob")
@final
class BlobChunks:
    """A blob as it arrives, in pieces of any size.

    Iterate over it once, in the block of `RegistryClient.open_blob`. The pieces are verified only
    once the iteration has ended.

    Raises:
        VerificationError: in place of the end, if the digest differs; at once if there are more
            bytes than the blob's size.
        RegistryError: if the connection breaks, or nothing comes for as long as the stall limit.
        ClientClosed: if the client's block has ended.
    """

    def __init__(
        self, answer: RegistryResponse, digest: Digest, size: int | None, lifetime: Lifetime
    ) -> None:
        self._lifetime = lifetime
        self._answer = answer
        self._digest = digest
        self._size = size
        self._verifier = Verifier(digest)
        self._decoder = self._make_decoder()
        self._slices: Iterator[bytes] = iter(())
        self._decoded: Iterator[bytes] = iter(())
        self._ended = False

    def __repr__(self) -> str:
        return f"<BlobChunks: {self._verifier.size} bytes of {self._digest}>"

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        # Raise StopAsyncIteration outside the context manager: it would become a RuntimeError.
        async with self._lifetime.use():
            chunk = await self._next()
        if chunk is None:
            wrong_size = self._size is not None and self._verifier.size != self._size
            if wrong_size or self._verifier.digest != self._digest:
                raise self._wrong()
            raise StopAsyncIteration
        self._verifier.update(chunk)
        if self._size is not None and self._verifier.size > self._size:
            raise self._wrong()
        return chunk

    def _make_decoder(self) -> ContentDecoder | None:
        """Make a decoder for an encoded body, if it needs one.

        A body is read as received if its Content-Length is the blob's size, or if that size is
        unknown.
        """
        coding = coding_of(self._answer)
        length = self._answer.headers.get("Content-Length")
        if coding is None or self._size is None or length == str(self._size):
            return None
        return ContentDecoder(coding, self._size)

    async def _next(self) -> bytes | None:
        if self._decoder is None:
            return await _next_or_none(self._answer.chunks)
        try:
            while (piece := next(self._decoded, None)) is None:
                if (part := next(self._slices, None)) is not None:
                    await trio.lowlevel.checkpoint()
                    self._decoded = self._decoder.feed(part)
                elif self._ended:
                    return None
                elif (chunk := await _next_or_none(self._answer.chunks)) is not None:
                    self._slices = slices_of(chunk)
                else:
                    self._ended = True
                    self._decoded = self._decoder.finish()
        except NotEncoded as error:
            raise self._wrong() from error
        return piece

    def _wrong(self) -> VerificationError:
        return VerificationError(
            f"what {self._answer.host} sent as blob {self._digest} is not that: its digest or size "
            f"differs{named_encoding(self._answer)}",
            digest=self._digest,
        )


async def _next_or_none(chunks: AsyncIterator[bytes]) -> bytes | None:
    async for chunk in chunks:
        return chunk
    return None


async def write_embedded(
    data: bytes, descriptor: Descriptor, sink: BlobSink, progress: ReportProgress
) -> None:
    """Write the verified blob that a descriptor embeds to a sink."""
    if sink.offset > 0:
        await sink.restart()
    await sink.write(data)
    progress(Status.DOWNLOADING, sink.offset, descriptor.size)
    progress(Status.VERIFYING)
    progress(Status.DOWNLOAD_COMPLETE)


@final
@attrs.define(eq=False)
class BlobFetch:
    """One attempt to bring a blob into a sink; see `RegistryClient.fetch_blob`.

    Attributes:
        decoding: Whether all bodies with a ``Content-Encoding`` are decoded. The first attempt
            decodes only a body whose length is not the blob's.
    """

    descriptor: Descriptor
    sink: BlobSink
    progress: ReportProgress
    tags: EntityTags
    open: Open
    decoding: bool = False
    started_over: bool = False
    short: int = 0
    _source: RegistryResponse | None = attrs.field(default=None, init=False)
    _as_is: bool = attrs.field(default=False, init=False)
    _unfit: bool = attrs.field(default=False, init=False)

    async def run(self) -> None:
        try:
            await self._fetch()
            return
        except (RegistryError, VerificationError):
            if not (self._unfit and self._as_is) or self.decoding:
                raise
        # The received bytes are not the blob, and some had a Content-Encoding: decode them.
        self.decoding, self.started_over = True, False
        await self._start_over()
        await self._fetch()

    async def _fetch(self) -> None:
        sink, size, digest = self.sink, self.descriptor.size, self.descriptor.digest
        if sink.offset > size:
            await sink.restart()
        resumed = sink.offset > 0
        while sink.offset < size:
            async with self.open(self._range()) as answer:
                self._source = answer
                end = await self._place(answer)
                if end is not None:
                    resumed = sink.offset > 0
                    await self._receive(answer, end, resumed)
        self.progress(Status.VERIFYING)
        if sink.digest != digest:
            raise await self._wrong(resumed)
        self.tags.forget(digest)
        self.progress(Status.DOWNLOAD_COMPLETE)

    def _range(self) -> dict[str, str]:
        if self.sink.offset == 0:
            return {}
        # Name the range's end, because some servers require one (go-containerregistry's registry).
        fields = {"Range": f"bytes={self.sink.offset}-{self.descriptor.size - 1}"}
        tag = self.tags.get(self.descriptor.digest)
        if tag is not None:
            fields["If-Range"] = tag
        return fields

    async def _place(self, answer: RegistryResponse) -> int | None:
        """Return the position in the blob at which the response's body ends.

        ``None`` stands for a response that cannot be used. The sink is empty then, and the blob is
        requested from the start.
        """
        sink, size = self.sink, self.descriptor.size
        end: int | None = None
        if answer.status == 200:
            # The whole blob in place of the requested range (RFC 9110, 14.2).
            if sink.offset > 0:
                await sink.restart()
            end = size
        elif answer.status == 206:
            end = _range_end(answer.headers.get("Content-Range", ""), sink.offset, size)
        if end is not None:
            self._check_length(answer, end)
            self.tags.see(self.descriptor.digest, answer)
        elif sink.offset == 0 or self.started_over:
            # This is the second time in one attempt, and it might repeat for ever.
            asked = "as a whole" if sink.offset == 0 else f"from byte {sink.offset} on"
            raise RegistryError(
                f"{answer.host} answered {answer.status} for blob {self.descriptor.digest}, "
                f"which was asked for {asked}",
                host=answer.host,
                status=answer.status,
            )
        else:
            self.started_over = True
            await self._start_over()
        return end

    def _check_length(self, answer: RegistryResponse, end: int) -> None:
        length = end - self.sink.offset
        if end == self.descriptor.size or length >= SHORT:
            return
        self.short += 1
        if self.short > MAX_SHORT:
            raise RegistryError(
                f"{answer.host} gives blob {self.descriptor.digest} in pieces as small as {length} "
                "bytes",
                host=answer.host,
                status=answer.status,
            )

    async def _receive(self, answer: RegistryResponse, end: int, resumed: bool) -> None:
        sink, size = self.sink, self.descriptor.size
        decoder = self._make_decoder(answer, end)
        async for chunk in answer.chunks:
            if decoder is None:
                await self._take((chunk,), end, resumed)
                continue
            for part in slices_of(chunk):
                await self._take(decoder.feed(part), end, resumed)
                await trio.lowlevel.checkpoint()
        if decoder is not None:
            await self._take(decoder.finish(), end, resumed)
        if sink.offset < end:
            if sink.digest == self.descriptor.digest:
                # The response is the whole blob, so the descriptor's size is wrong.
                raise await self._wrong(resumed=False)
            self._unfit = True
            raise RegistryError(
                f"{answer.host} ended blob {self.descriptor.digest} after {sink.offset} of {size} "
                f"bytes{named_encoding(answer)}",
                host=answer.host,
                status=answer.status,
                transient=True,
            )

    async def _take(self, pieces: Iterable[bytes], end: int, resumed: bool) -> None:
        sink = self.sink
        try:
            for piece in pieces:
                if len(piece) > end - sink.offset:
                    break
                await sink.write(piece)
                self.progress(Status.DOWNLOADING, sink.offset, self.descriptor.size)
            else:
                return
        except NotEncoded:
            pass
        raise await self._wrong(resumed)

    def _make_decoder(self, answer: RegistryResponse, end: int) -> ContentDecoder | None:
        """Make a decoder if this body, up to ``end``, needs one."""
        coding, size = coding_of(answer), end - self.sink.offset
        length = answer.headers.get("Content-Length", "")
        if coding and (self.decoding or (length.isdecimal() and int(length[:20]) != size)):
            return ContentDecoder(coding, size)
        self._as_is = self._as_is or bool(coding)
        return None

    async def _wrong(self, resumed: bool) -> VerificationError:
        """Empty the sink, and make the error for wrong bytes.

        The error is final if all bytes came in one response. Otherwise the sink's earlier bytes may
        have been wrong, and another attempt may succeed.
        """
        await self._start_over()
        self._unfit = True
        digest, source = self.descriptor.digest, self._source
        text = f"filesystem layer verification failed for digest {digest}"  # moby's words
        if source is not None:
            text += f": {source.host} sent other bytes{named_encoding(source)}"
        error = VerificationError(text, digest=digest)
        return error if resumed else mark_final(error)

    async def _start_over(self) -> None:
        self.tags.forget(self.descriptor.digest)
        await self.sink.restart()


def _range_end(text: str, offset: int, size: int) -> int | None:
    """Return the end of a range that continues at ``offset``; ``None`` for any other range."""
    match = _CONTENT_RANGE.match(text.strip())
    if match is None:
        return None
    first, last = int(match[1]), int(match[2])
    total = size if match[3] is None else int(match[3])
    if first != offset or not first <= last < size or total != size:
        return None
    return last + 1
