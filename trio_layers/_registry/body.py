"""Reads a response's body at a least rate, and closes it completely."""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from .._errors import ClientClosed, RegistryError
from .failures import client_closed_error, request_error
from .http import CLOSE_GRACE, AsyncByteStream, AsyncClient, HTTPError, Response, StreamError
from .http_log import discreet
from .http_send import close_connection
from .redaction import redact_error

__all__ = ["LEAST_RATE", "open_body"]

LEAST_RATE: Final = 1024.0
"""Bytes per second. A slower server is given up, since it would hold its connection for ever."""

# The largest number of nested generators of a body. httpx and httpcore together have five.
MAX_CHAIN: Final = 20


@asynccontextmanager
async def open_body(
    client: AsyncClient, response: Response, host: str, subject: str, stall_limit: float
) -> AsyncIterator[AsyncIterator[bytes]]:
    """Yield the chunks of a body, and close the body and its connection after the block.

    The block may leave the body before its end. The chunks come through a chain of async
    generators of httpx and httpcore. Closing the outermost one would leave the others to the
    garbage collector, for which trio issues a `ResourceWarning` each. The body is therefore read
    once more in a cancelled scope: the cancellation is raised in the innermost generator, and ends
    all of them.
    """
    chunks = _read_body(client, response, host, subject, stall_limit)
    try:
        yield chunks
    finally:
        with trio.CancelScope(shield=True) as scope:
            scope.cancel()
            try:
                async for _ in chunks:
                    pass
            except (RegistryError, ClientClosed):
                pass  # the caller has left the body, so its errors no longer matter
        with trio.move_on_after(CLOSE_GRACE, shield=True), discreet():
            await response.aclose()
            if client.is_closed:
                await close_connection(response)


async def _read_body(
    client: AsyncClient, response: Response, host: str, subject: str, stall_limit: float
) -> AsyncIterator[bytes]:
    """Yield the chunks of a body, and give up a server that is slower than the least rate.

    A server is behind by the seconds of waiting, minus the seconds that its bytes would take at
    `LEAST_RATE`. It is never ahead, so that a fast beginning does not excuse a later stall. A
    server that is behind by the stall limit is given up. The wait for n bytes therefore takes at
    most n / `LEAST_RATE` seconds plus the stall limit. The caller's own time does not count.
    """
    # aiter_raw() yields the same, but refuses the ready-made responses of an in-memory transport,
    # which httpx takes for consumed.
    assert isinstance(response.stream, AsyncByteStream)
    stream = aiter(response.stream)
    behind = 0.0
    try:
        while True:
            chunk: bytes | None = None
            began = trio.current_time()
            try:
                # Bytes that complete no chunk, such as a chunk's size line, do not extend this
                # deadline.
                with trio.CancelScope(deadline=began + stall_limit - behind), discreet():
                    part = await anext(stream)
                    # Reading a body in memory, or one of many small chunks, is no checkpoint.
                    await trio.lowlevel.checkpoint()
                    chunk = part
            except StopAsyncIteration:
                return
            except (HTTPError, StreamError) as error:
                redact_error(error, ())
                if client.is_closed:
                    raise client_closed_error() from error
                raise request_error(
                    f"{host} broke off while it sent {subject}", host, error
                ) from error
            if chunk is None:
                raise RegistryError(
                    f"{host} broke off while it sent {subject}: "
                    + (
                        f"{stall_limit:g} seconds behind {LEAST_RATE:g} bytes per second"
                        if behind
                        else f"nothing for {stall_limit:g} seconds"
                    ),
                    host=host,
                    transient=True,
                )
            behind = max(0.0, behind + trio.current_time() - began - len(chunk) / LEAST_RATE)
            yield chunk
    finally:
        with trio.move_on_after(CLOSE_GRACE, shield=True), discreet():
            await _close_chain(stream)


async def _close_chain(stream: AsyncIterator[bytes]) -> None:
    """Close nested async generators, the innermost first.

    Closing the outermost generator leaves those inside it to the garbage collector. Closing one
    that has ended has no effect.
    """
    chain: list[object] = [stream]
    for _ in range(MAX_CHAIN):
        inner = [each for each in gc.get_referents(chain[-1]) if isinstance(each, AsyncGenerator)]
        if not inner or inner[0] in chain:
            break
        chain.append(inner[0])
    for generator in reversed(chain):
        if isinstance(generator, AsyncGenerator):
            await generator.aclose()
