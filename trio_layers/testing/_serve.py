"""Serves answers over sockets: HTTP/1.1 with h11, one task per connection."""

from __future__ import annotations

import math
import socket
import ssl
import struct
from collections.abc import Mapping
from typing import final

import h11
import trio

from ._http import Answer, BodyStream, ConnectionCut, ConnectionReset, Request
from ._transport import Respond

__all__ = ["serve"]

RECEIVE = 64 * 1024
LARGEST_FORM = 64 * 1024


async def serve(
    respond: Respond,
    listeners: list[trio.SocketListener],
    scheme: str,
    ssl_context: ssl.SSLContext | None,
    *,
    task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve connections until cancelled.

    Cancellation: all connections and listeners are closed.

    Args:
        respond: Returns the answer to a request.
        listeners: The listeners; closed at the end.
        scheme: ``http`` or ``https``.
        ssl_context: The context for TLS; ``None`` for plain HTTP.
        task_status: Reports the start when connections are accepted.
    """

    async def handle(stream: trio.SocketStream) -> None:
        transport: trio.abc.Stream = stream
        if ssl_context is not None:
            transport = trio.SSLStream(stream, ssl_context, server_side=True, https_compatible=True)
        try:
            await _Connection(transport, respond, scheme).run()
        except ConnectionReset:
            # A socket sends a reset if it is closed with a linger time of 0.
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except (trio.BrokenResourceError, ConnectionCut):
            pass  # the client has gone, or a fault closes the connection
        finally:
            # A TLS client must not get a proper end of the connection after half an answer.
            await trio.aclose_forcefully(transport)

    await trio.serve_listeners(handle, listeners, task_status=task_status)


@final
class _Connection:
    def __init__(self, stream: trio.abc.Stream, respond: Respond, scheme: str) -> None:
        self._stream = stream
        self._respond = respond
        self._scheme = scheme
        self._http = h11.Connection(h11.SERVER)

    async def run(self) -> None:
        """Answer the requests in order; pipelined requests wait in h11's buffer."""
        while True:
            try:
                request = await self._next_request()
            except h11.RemoteProtocolError as error:
                # The client speaks TLS to a plain port, for example. The answer makes it fail.
                await self._send_head(error.error_status_hint, {"Connection": "close"})
                return
            if request is None:
                return
            answer, exchange = self._respond(request, trio.current_time())
            body = BodyStream(answer, exchange)
            try:
                await trio.sleep(answer.delay)
                if answer.raw is not None:
                    await self._stream.send_all(answer.raw)
                if answer.dropped or answer.raw is not None:
                    return
                await self._send(answer, body)
            finally:
                with trio.CancelScope(shield=True):
                    await body.aclose()
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                return
            self._http.start_next_cycle()

    async def _next_request(self) -> Request | None:
        """Read the next request and its body; ``None`` if the client has closed."""
        event = await self._next_event()
        if not isinstance(event, h11.Request):
            return None
        if self._http.they_are_waiting_for_100_continue:
            await self._stream.send_all(
                self._http.send(h11.InformationalResponse(status_code=100, headers=[])) or b""
            )
        body = bytearray()
        while isinstance(data := await self._next_event(), h11.Data):
            body += data.data
            if len(body) > LARGEST_FORM:
                raise h11.RemoteProtocolError("too large", error_status_hint=413)
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in event.headers}
        path, _, query = event.target.decode("ascii").partition("?")
        return Request(
            method=event.method.decode("ascii"),
            origin=f"{self._scheme}://{headers.get('host', '')}",
            path=path,
            query=query,
            headers=headers,
            body=bytes(body),
        )

    async def _next_event(self) -> h11.Event:
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(bytes(await self._stream.receive_some(RECEIVE)))
            elif isinstance(event, h11.Event):
                return event
            else:
                raise AssertionError("h11 is asked for an event only once a cycle has begun")

    async def _send(self, answer: Answer, body: BodyStream) -> None:
        await self._send_head(answer.status, answer.headers, answer.head_bytes_per_second)
        while data := await body.receive_some():
            # Passing data through avoids a copy together with its framing.
            for piece in self._http.send_with_data_passthrough(h11.Data(data=data)) or ():
                await self._stream.send_all(piece)
        end = self._http.send(h11.EndOfMessage())
        if end:
            await self._stream.send_all(end)

    async def _send_head(
        self, status: int, headers: Mapping[str, str], bytes_per_second: float = math.inf
    ) -> None:
        head = h11.Response(status_code=status, headers=list(headers.items()))
        data = self._http.send(head) or b""
        if bytes_per_second == math.inf:
            await self._stream.send_all(data)
            return
        began = trio.current_time()
        for number, byte in enumerate(data, 1):
            await trio.sleep_until(began + number / bytes_per_second)
            await self._stream.send_all(bytes((byte,)))
