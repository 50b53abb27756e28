"""Requests and answers as values, and the stream of an answer's body."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias, final

import attrs
import trio

__all__ = [
    "Answer",
    "Blob",
    "BodyStream",
    "ConnectionCut",
    "ConnectionReset",
    "Content",
    "Exchange",
    "Request",
    "error_answer",
]

Content: TypeAlias = bytes | Path

MEMORY_CHUNK = 64 * 1024
FILE_CHUNK = 1024 * 1024


@attrs.frozen
class Blob:
    """Bytes or a file, with the size known beforehand."""

    content: Content = attrs.field(repr=False)
    size: int


@attrs.frozen(kw_only=True)
class Request:
    """The parts of a request that a registry uses.

    Attributes:
        method: The method, in capitals.
        origin: The server as the client names it, such as ``http://127.0.0.1:5000``.
        path: The path, as sent.
        query: The query without the question mark, as sent.
        headers: The headers, by lower-case name.
        body: The body: a form, or empty.
    """

    method: str
    origin: str
    path: str
    query: str = ""
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    body: bytes = attrs.field(default=b"", repr=False)


@attrs.frozen(kw_only=True)
class Answer:
    """An answer, and the way to send it.

    The body is the part of ``blob`` from ``start`` to ``stop``. Its ``Content-Length`` is among
    the headers, because the answer to HEAD has one, but no body. A cut or a stall does not happen
    at or after the end of the body.

    Attributes:
        status: The HTTP status.
        headers: The headers by name, as sent.
        blob: The blob that contains the body.
        start: The offset of the body's first byte in the blob.
        stop: The offset of the body's end in the blob.
        delay: Seconds before the answer.
        dropped: Whether to close the connection without an answer.
        raw: Bytes to send instead of the answer, before closing the connection.
        cut_after: The number of bytes of the body after which to close the connection.
        cut_by_reset: Whether to reset the connection there.
        stall_after: The number of bytes of the body after which to wait for ``stall_seconds``.
        stall_seconds: The length of a stall.
        head_bytes_per_second: The speed of the status line and headers, sent byte by byte.
        bytes_per_second: The highest speed of the body.
        slow_after: The number of bytes of the body before this limit applies.
        flipped: The offsets in the blob of bytes to change.
    """

    status: int
    headers: Mapping[str, str] = attrs.field(factory=dict)
    blob: Blob = Blob(b"", 0)
    start: int = 0
    stop: int = 0
    delay: float = 0
    dropped: bool = False
    raw: bytes | None = None
    cut_after: int | None = None
    cut_by_reset: bool = False
    stall_after: int | None = None
    stall_seconds: float = math.inf
    head_bytes_per_second: float = math.inf
    bytes_per_second: float = math.inf
    slow_after: int = 0
    flipped: frozenset[int] = frozenset()


def error_answer(
    status: int, code: str, message: str, headers: Mapping[str, str] | None = None
) -> Answer:
    """Return an error in the OCI distribution specification's form (``spec.md``, error codes)."""
    error = {"code": code, "message": message, "detail": {}}
    body = json.dumps({"errors": [error]}).encode()
    return Answer(
        status=status,
        headers={
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        },
        blob=Blob(body, len(body)),
        stop=len(body),
    )


@attrs.define(eq=False, kw_only=True)
class Exchange:
    """A request to a registry, and the state of its answer.

    Attributes:
        method: The method, in capitals.
        path: The path.
        query: The query without the question mark.
        headers: The request's headers by lower-case name, credentials included.
        status: The status of the answer; 0 without an answer.
        bytes_sent: The number of bytes of the body sent so far.
        at: The time of the request, in trio's time.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str] = attrs.field(repr=False)
    at: float
    status: int = 0
    bytes_sent: int = 0
    _end: trio.Event = attrs.field(factory=trio.Event, init=False, repr=False)

    @property
    def ended(self) -> bool:
        """Whether the registry has finished or given up the answer."""
        return self._end.is_set()

    async def wait_ended(self) -> None:
        """Wait until the registry has finished or given up the answer.

        Over a socket, the registry notices that a client has gone only when it sends more.

        Cancellation: only the waiting stops.
        """
        await self._end.wait()

    def end(self) -> None:
        """Mark the answer as finished or given up."""
        self._end.set()


class ConnectionCut(Exception):
    """Asks to close the connection in the middle of an answer."""


class ConnectionReset(ConnectionCut):
    """Asks to reset the connection in the middle of an answer."""


@final
class BodyStream(trio.abc.ReceiveStream):
    """The body of an answer, with the answer's speed and faults.

    Files are read in threads, a piece at a time. Received bytes count as sent.
    """

    def __init__(self, answer: Answer, exchange: Exchange) -> None:
        self._answer = answer
        self._exchange = exchange
        self._position = answer.start
        self._stalled = False
        self._descriptor: int | None = None
        self._started: float | None = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return the next piece; ``b""`` at the end.

        Raises:
            ConnectionCut: if the answer has to be cut here.
        """
        answer, sent = self._answer, self._position - self._answer.start
        await trio.lowlevel.checkpoint()
        if self._position >= answer.stop:
            return b""
        if sent == answer.stall_after and not self._stalled:
            await trio.sleep(answer.stall_seconds)
            self._stalled = True
        if sent == answer.cut_after:
            raise ConnectionReset if answer.cut_by_reset else ConnectionCut
        size = self._next_size(sent, max_bytes)
        if self._is_slow(sent):
            if self._started is None:
                self._started = trio.current_time()
            slowly = sent + size - answer.slow_after
            await trio.sleep_until(self._started + slowly / answer.bytes_per_second)
        data = await self._read(size)
        self._position += len(data)
        self._exchange.bytes_sent += len(data)
        return data

    def _is_slow(self, sent: int) -> bool:
        return self._answer.bytes_per_second != math.inf and sent >= self._answer.slow_after

    def _next_size(self, sent: int, max_bytes: int | None) -> int:
        """Return the size of the next piece, which ends where the next fault starts."""
        answer = self._answer
        size = MEMORY_CHUNK if isinstance(answer.blob.content, bytes) else FILE_CHUNK
        if self._is_slow(sent):
            size = min(size, max(1, int(answer.bytes_per_second / 10)))
        if max_bytes is not None:
            size = min(size, max_bytes)
        for event in (answer.cut_after, answer.stall_after, answer.slow_after):
            if event is not None and event > sent:
                size = min(size, event - sent)
        return min(size, answer.stop - self._position)

    async def _read(self, size: int) -> bytes:
        content, start = self._answer.blob.content, self._position
        if isinstance(content, bytes):
            data = content[start : start + size]
        else:
            if self._descriptor is None:
                self._descriptor = await trio.to_thread.run_sync(os.open, content, os.O_RDONLY)
            data = await trio.to_thread.run_sync(os.pread, self._descriptor, size, start)
            if not data:
                raise ConnectionCut(f"{content} has become shorter")
        wrong = [offset - start for offset in self._answer.flipped]
        if any(0 <= offset < len(data) for offset in wrong):
            changed = bytearray(data)
            for offset in wrong:
                if 0 <= offset < len(data):
                    changed[offset] ^= 0xFF
            return bytes(changed)
        return data

    async def aclose(self) -> None:
        """Close the file, if there is one, even if cancelled."""
        self._exchange.end()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        await trio.lowlevel.checkpoint()
