"""Sends a request, and takes back connections that a cancelled request leaves in the pool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, final

import httpcore
import trio
from httpx import (
    AsyncClient,
    ConnectError,
    ConnectTimeout,
    HTTPError,
    NetworkError,
    ProxyError,
    ReadError,
    RemoteProtocolError,
    Request,
    Response,
    TimeoutException,
    WriteError,
)

from .http import CLOSE_GRACE, pools_of
from .http_log import discreet

__all__ = ["ConnectionTrace", "close_connection", "connection_failed", "never_connected", "send"]

_SENT_TWICE: Final = frozenset({"GET", "HEAD"})


async def send(client: AsyncClient, request: Request) -> Response:
    """Send a request, follow no redirect, and return the response with its body open.

    A server may close an idle connection in the moment in which a request is sent on it. A GET or
    HEAD request is then sent again, as by Go's `net/http` (transport.go, `shouldRetryRequest`): on
    the next idle connection, or on a new one, where it is sent once.

    Cancellation: as after an error, nothing of the request is left in the client's pool. httpcore
    itself forgets a connection that is being made, and counts it for ever as one in use: over TLS,
    if the cancellation comes in the last step of the handshake; through a proxy, in any step.

    Raises:
        HTTPError: as for `httpx.AsyncClient.send`.
        UnicodeError: for a host whose name is invalid.
    """
    while True:
        trace = ConnectionTrace()
        request.extensions["trace"] = trace.note
        try:
            with discreet():
                return await _send_once(client, request, trace)
        except BaseException as error:
            lost = [*_take_lost(client)]
            with trio.move_on_after(CLOSE_GRACE, shield=True):
                for stream in trace.unowned:
                    await stream.aclose()
                for connection in lost:
                    await connection.aclose()
            # Each round uses up one idle connection.
            if not (trace.reused and request.method in _SENT_TWICE and _closed_unanswered(error)):
                raise


async def close_connection(response: Response) -> None:
    """Close the connection of a response whose client has been closed.

    A pool that is closed while a connection is being made forgets that connection (httpcore).
    """
    stream = response.extensions.get("network_stream")
    if isinstance(stream, httpcore.AsyncNetworkStream):
        await stream.aclose()


async def _send_once(client: AsyncClient, request: Request, trace: ConnectionTrace) -> Response:
    try:
        return await client.send(request, stream=True, follow_redirects=False, auth=None)
    except HTTPError:
        raise
    except Exception as error:
        # httpcore expects a SOCKS proxy's reply to be correct and to arrive in one piece. Any other
        # reply raises an exception that is not httpx's.
        if not trace.greets_socks:
            raise
        text = "the SOCKS proxy sent an invalid reply"
        raise ProxyError(text, request=request) from error


@final
class ConnectionTrace:
    """Records how httpcore sends a request."""

    def __init__(self) -> None:
        # New connections, until httpcore becomes responsible for closing them.
        self.unowned: list[httpcore.AsyncNetworkStream] = []
        # Whether the request was sent on an idle connection of an earlier request.
        self.reused = False
        # Whether the SOCKS handshake with the proxy is in progress.
        self.greets_socks = False
        self._connected = False

    async def note(self, event: str, info: Mapping[str, object]) -> None:
        """Record an event; httpcore calls this."""
        if event.endswith(".connect_tcp.complete"):
            stream = info["return_value"]
            assert isinstance(stream, httpcore.AsyncNetworkStream)
            self.unowned.append(stream)
            self._connected = True
        elif ".setup_socks5_connection." in event:
            self.greets_socks = not event.endswith(".complete")
        elif event.endswith(".connect_unix_socket.complete"):
            self._connected = True
        elif event.endswith(".send_request_headers.started"):
            # From here on, httpcore's connection object closes the stream.
            self.unowned.clear()
            self.reused = not self._connected


def _closed_unanswered(error: BaseException) -> bool:
    # httpx has no exception type for a connection that ends before the status line.
    return isinstance(error, (ReadError, WriteError)) or (
        isinstance(error, RemoteProtocolError) and str(error).startswith("Server disconnected")
    )


def connection_failed(error: Exception) -> bool:
    """Return whether a request failed because of its connection.

    The connection was refused, reset or silent, or it ended before the response did. For any other
    error, the request or the response is at fault.
    """
    if isinstance(error, RemoteProtocolError):
        # httpx has no exception types for a response that is cut short.
        return str(error).startswith(("Server disconnected", "peer closed connection"))
    if isinstance(error, ProxyError):
        # An HTTP proxy's error begins with its status.
        status = str(error)[:3]
        return not status.isdecimal() or status in ("408", "429") or status >= "500"
    return isinstance(error, NetworkError | TimeoutException)


def never_connected(error: BaseException | None) -> bool:
    """Return whether a request failed before its connection was made."""
    return isinstance(error, ConnectError | ConnectTimeout)


def _take_lost(client: AsyncClient) -> Iterator[httpcore.AsyncConnectionInterface]:
    """Remove lost connections from the client's pools; the caller closes them.

    A lost connection belongs to no request, and no request can get it. This function must not
    await, because a connection in a pool belongs to its request from the first moment.
    """
    for pool in pools_of(client):
        connections: object = getattr(pool, "_connections", None)
        requests: object = getattr(pool, "_requests", None)
        if not isinstance(connections, list) or not isinstance(requests, list):
            continue
        used = [getattr(request, "connection", None) for request in requests]
        for connection in list(connections):
            if not (connection in used or connection.is_idle() or connection.is_closed()):
                connections.remove(connection)
                yield connection
