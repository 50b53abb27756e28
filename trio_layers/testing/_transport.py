"""An httpx transport in memory, for any clock."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias, final

import httpx
import trio

from ._http import Answer, BodyStream, ConnectionCut, ConnectionReset, Exchange, Request

__all__ = ["RegistryTransport", "Respond"]

Respond: TypeAlias = Callable[[Request, float], tuple[Answer, Exchange]]


@final
class RegistryTransport(httpx.AsyncBaseTransport):
    """Raises the exceptions of a client on a socket, read timeouts included."""

    def __init__(self, respond: Respond) -> None:
        self._respond = respond

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await trio.lowlevel.checkpoint()
        value = Request(
            method=request.method,
            origin=f"{request.url.scheme}://{request.headers['host']}",
            path=request.url.raw_path.partition(b"?")[0].decode("ascii"),
            query=request.url.query.decode("ascii"),
            headers={name.lower(): text for name, text in request.headers.items()},
            body=await request.aread(),
        )
        timeout: float | None = request.extensions.get("timeout", {}).get("read")
        limit = math.inf if timeout is None else timeout
        answer, exchange = self._respond(value, trio.current_time())
        with _read_limit(request, limit):
            try:
                await trio.sleep(answer.delay)
            except trio.Cancelled:
                exchange.end()
                raise
        if answer.head_bytes_per_second != math.inf and not answer.dropped and answer.raw is None:
            await self._wait_for_head(request, answer, exchange, limit)
        if answer.dropped or answer.raw is not None:
            exchange.end()
            said = "illegal response" if answer.raw else "Server disconnected without a response."
            raise httpx.RemoteProtocolError(said, request=request)
        body = _Body(BodyStream(answer, exchange), request, limit)
        return httpx.Response(
            answer.status, headers=dict(answer.headers), stream=body, request=request
        )

    async def _wait_for_head(
        self, request: httpx.Request, answer: Answer, exchange: Exchange, limit: float
    ) -> None:
        """Wait for the header's bytes; equal intervals need one check of the limit."""
        fields = sum(len(name) + len(value) + 4 for name, value in answer.headers.items())
        size = len("HTTP/1.1 200 \r\n\r\n") + fields
        try:
            with _read_limit(request, limit):
                await trio.sleep(1 / answer.head_bytes_per_second)
            await trio.sleep((size - 1) / answer.head_bytes_per_second)
        except BaseException:
            exchange.end()
            raise


@final
class _Body(httpx.AsyncByteStream):
    def __init__(self, stream: BodyStream, request: httpx.Request, limit: float) -> None:
        self._stream = stream
        self._request = request
        self._limit = limit

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        with _read_limit(self._request, self._limit):
            try:
                data = await self._stream.receive_some()
            except ConnectionReset:
                raise httpx.ReadError("", request=self._request) from None
            except ConnectionCut:
                raise httpx.RemoteProtocolError(
                    "peer closed connection without sending complete message body",
                    request=self._request,
                ) from None
        if not data:
            raise StopAsyncIteration
        return data

    async def aclose(self) -> None:
        await self._stream.aclose()


@contextmanager
def _read_limit(request: httpx.Request, seconds: float) -> Iterator[None]:
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise httpx.ReadTimeout("", request=request)
