"""An HTTP proxy for tunnels (CONNECT) and plain requests, with an optional login."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import attrs
import trio

from trio_layers._nursery import open_hidden_nursery

REFUSAL = b"407 Proxy Authentication Required\r\nProxy-Authenticate: Basic"


@attrs.define(eq=False)
class Proxy:
    """A running proxy.

    Attributes:
        host: Host and port.
        login: The required ``name:password``; ``None``: none is required.
        heads: The heads of received requests as bytes, without requests inside tunnels.
    """

    host: str
    login: str | None = None
    heads: list[str] = attrs.field(factory=list)

    @property
    def url(self) -> str:
        """The proxy's URL, as an environment variable names it."""
        return f"http://{'' if self.login is None else self.login + '@'}{self.host}"

    @property
    def asked(self) -> list[str]:
        """The first line of each request, without the version."""
        return [head.partition("\r\n")[0].removesuffix(" HTTP/1.1") for head in self.heads]

    async def handle(self, client: trio.SocketStream) -> None:
        try:
            await self._handle(client)
        except trio.BrokenResourceError:
            pass  # one side has closed its connection

    async def _handle(self, client: trio.SocketStream) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            more = await client.receive_some()
            if not more:
                return
            received += more
        head, _, rest = received.partition(b"\r\n\r\n")
        self.heads.append(head.decode())
        first, *fields = head.split(b"\r\n")
        method, target, _ = first.split()
        proof = b"Basic " + base64.b64encode((self.login or "").encode())
        if self.login is not None and b"Proxy-Authorization: " + proof not in fields:
            await client.send_all(b"HTTP/1.1 " + REFUSAL + b"\r\nContent-Length: 0\r\n\r\n")
            return
        authority, path = target, b""
        if method != b"CONNECT":
            authority, _, path = target.removeprefix(b"http://").partition(b"/")
        host, _, port = authority.decode().partition(":")
        async with await trio.open_tcp_stream(host, int(port or 80)) as server:
            if method == b"CONNECT":
                await client.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
            else:
                kept = [each for each in fields if not each.lower().startswith(b"proxy-")]
                lines = [b"%b /%b HTTP/1.1" % (method, path), *kept, b"Connection: close"]
                rest = b"\r\n".join(lines) + b"\r\n\r\n" + rest
            await server.send_all(rest)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_pass_on, client, server)
                await _pass_on(server, client)
                nursery.cancel_scope.cancel()


async def _pass_on(source: trio.SocketStream, target: trio.SocketStream) -> None:
    async for data in source:
        await target.send_all(data)


@asynccontextmanager
async def run_proxy(*, login: str | None = None) -> AsyncIterator[Proxy]:
    """Run a proxy on a free port of 127.0.0.1 during the block."""
    async with open_hidden_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        proxy = Proxy(f"127.0.0.1:{listeners[0].socket.getsockname()[1]}", login)
        await nursery.start(partial(trio.serve_listeners, proxy.handle, listeners))
        yield proxy
        nursery.cancel_scope.cancel()
