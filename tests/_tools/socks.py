"""A SOCKS 5 proxy with an optional login (RFC 1928, RFC 1929)."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import attrs
import trio

from trio_layers._nursery import open_hidden_nursery


@attrs.define(eq=False)
class SocksProxy:
    """A running proxy.

    Attributes:
        host: The proxy's host and port.
        login: The required login, as ``name:password``. ``None``: the proxy requires no login.
        garbage: The bytes that replace each of the proxy's replies.
        refuses: The error code that replaces success in replies; 0 for none.
        asked: The hosts and ports that clients have asked for.
    """

    host: str
    login: str | None = None
    garbage: bytes | None = None
    refuses: int = 0
    asked: list[str] = attrs.field(factory=list)

    @property
    def url(self) -> str:
        """The proxy's URL, as an environment variable names it."""
        return f"socks5://{'' if self.login is None else self.login + '@'}{self.host}"

    async def handle(self, client: trio.SocketStream) -> None:
        async with client:
            try:
                await self._handle(client)
            except (trio.BrokenResourceError, EOFError):
                pass  # the client or the server has closed its connection

    async def _handle(self, client: trio.SocketStream) -> None:
        _, count = await _read(client, 2)
        offered = await _read(client, count)
        if self.garbage is not None:
            if self.garbage:
                await client.send_all(self.garbage)
            return
        method = 0 if self.login is None else 2
        if method not in offered:
            await client.send_all(b"\x05\xff")
            return
        await client.send_all(bytes([5, method]))
        if self.login is not None:
            [_, length] = await _read(client, 2)
            name = await _read(client, length)
            [length] = await _read(client, 1)
            password = await _read(client, length)
            good = f"{name.decode()}:{password.decode()}" == self.login
            await client.send_all(bytes([1, not good]))
            if not good:
                return
        _, _, _, kind = await _read(client, 4)
        if kind == 3:
            [length] = await _read(client, 1)
            name = (await _read(client, length)).decode()
        else:
            family, length = (socket.AF_INET, 4) if kind == 1 else (socket.AF_INET6, 16)
            name = socket.inet_ntop(family, await _read(client, length))
        port = int.from_bytes(await _read(client, 2), "big")
        self.asked.append(f"{name}:{port}")
        await client.send_all(bytes([5, self.refuses, 0, 1, 0, 0, 0, 0, 0, 0]))
        if self.refuses:
            return
        async with await trio.open_tcp_stream(name, port) as server, trio.open_nursery() as nursery:
            nursery.start_soon(_pass_on, client, server)
            await _pass_on(server, client)
            nursery.cancel_scope.cancel()


async def _read(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = await stream.receive_some(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


async def _pass_on(source: trio.SocketStream, target: trio.SocketStream) -> None:
    async for data in source:
        await target.send_all(data)


@asynccontextmanager
async def run_socks_proxy(
    *, login: str | None = None, garbage: bytes | None = None, refuses: int = 0
) -> AsyncIterator[SocksProxy]:
    """Run a proxy on a free port of 127.0.0.1 during the block."""
    async with open_hidden_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        proxy = SocksProxy(f"127.0.0.1:{port}", login, garbage, refuses)
        await nursery.start(partial(trio.serve_listeners, proxy.handle, listeners))
        yield proxy
        nursery.cancel_scope.cancel()
