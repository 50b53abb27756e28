"""Requests and answers as values, and the body of an answer as it goes out."""

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
    """Bytes, or a file of them, whose size is known without asking the file system."""

    content: Content = attrs.field(repr=False)
    size: int


@attrs.frozen(kw_only=True)
class Request:
    """A request, as far as a registry looks at it.

    Attributes:
        method: In capitals.
        origin: What the client takes the server for, such as ``http://127.0.0.1:5000``.
        path: From the slash to the question mark, as sent.
        query: What follows the question mark, as sent.
        headers: By lower-case name.
        body: A form, or nothing.
    """

    method: str
    origin: str
    path: str
    query: str = ""
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    body: bytes = attrs.field(default=b"", repr=False)


@attrs.frozen(kw_only=True)
class Answer:
    """An answer, and how it is to be delivered.

    The body is the part of ``blob`` from ``start`` to ``stop``. Its ``Content-Length`` is among
    the headers, since the answer to HEAD has one and no body. What is to happen to the body
    happens before its end, or not at all.

    Attributes:
        status: The HTTP status.
        headers: By name, as sent.
        blob: What the body is part of.
        start: Where in the blob the body starts.
        stop: Where in the blob it ends.
        delay: Seconds that pass before the answer.
        dropped: The connection is closed instead of the answer.
        raw: What is sent instead of the answer, before the connection is closed.
        cut_after: The connection is closed after so many bytes of the body.
        cut_by_reset: It is reset then.
        stall_after: After so many bytes of the body nothing comes for ``stall_seconds``.
        stall_seconds: How long a stall lasts.
        head_bytes_per_second: How fast what comes before the body goes out at most, byte by byte.
        bytes_per_second: How fast the body goes out at most.
        slow_after: After how many bytes of the body that begins.
        flipped: Offsets in the blob of bytes that go out wrong.
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
    """An error as the OCI distribution specification wants it (``spec.md``, error codes)."""
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
    """A request that a registry got, and what became of it.

    Attributes:
        method: In capitals.
        path: From the slash to the question mark.
        query: What follows the question mark.
        headers: The request's, by lower-case name; credentials are among them.
        status: Of the answer; 0 if there was none, or is none yet.
        bytes_sent: How much of the body has gone out so far.
        at: When the request came, in trio's time.
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
        """Whether the registry is done with it, whatever the end was."""
        return self._end.is_set()

    async def wait_ended(self) -> None:
        """Wait until the registry is done with it. That a client has gone is noticed over a
        socket only when more is sent to it.
        """
        await self._end.wait()

    def end(self) -> None:
        """The registry is done with it."""
        self._end.set()


class ConnectionCut(Exception):
    """The connection is to be closed now, mid-answer."""


class ConnectionReset(ConnectionCut):
    """It is to be reset."""


@final
class BodyStream(trio.abc.ReceiveStream):
    """The body of an answer, at the pace and with the faults that the answer asks for.

    Files are read in threads, a piece at a time. What is handed out counts as sent.
    """

    def __init__(self, answer: Answer, exchange: Exchange) -> None:
        self._answer = answer
        self._exchange = exchange
        self._position = answer.start
        self._stalled = False
        self._descriptor: int | None = None
        self._started: float | None = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next piece; ``b""`` at the end.

        Raises:
            ConnectionCut: if the answer is to end here.
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
        """How long the next piece is: up to where something happens."""
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
                raise ConnectionCut(f"{content} is shorter than it was")
        wrong = [offset - start for offset in self._answer.flipped]
        if any(0 <= offset < len(data) for offset in wrong):
            changed = bytearray(data)
            for offset in wrong:
                if 0 <= offset < len(data):
                    changed[offset] ^= 0xFF
            return bytes(changed)
        return data

    async def aclose(self) -> None:
        """Close the file, if there is one. Done also where it is cancelled."""
        self._exchange.end()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        await trio.lowlevel.checkpoint()
