"""The httpx clients for hosts, and one limit on all their connections."""

from __future__ import annotations

import os
import ssl
from types import TracebackType
from typing import Self, final

import trio

from .._errors import NetworkSettingError
from .hosts import is_loopback
from .http import CLOSE_GRACE, URL, AsyncClient, new_client
from .proxies import Proxies
from .tls import TLSConfig, make_context, trust_nobody

__all__ = ["Connections"]


@final
class Connections:
    """The httpx clients, with one limiter for all of them.

    Hosts with the same certificates and the same proxy share one client. Our own clients are made
    when a request needs them, read the environment at that moment, and are closed when the block
    ends. Each allows as many connections as the limiter, so that no request waits in its pool.

    Args:
        client: The client for hosts without certificates of their own. It is not closed.
            ``None``: our own clients.
        usual: The TLS settings of our own clients for those hosts.
        max_connections: The largest number of requests at once.
        stall_limit: Seconds without a byte, or behind `LEAST_RATE`, that end a request.
    """

    def __init__(
        self,
        client: AsyncClient | None,
        usual: TLSConfig,
        *,
        max_connections: int,
        stall_limit: float,
    ) -> None:
        self.limiter: trio.CapacityLimiter = trio.CapacityLimiter(max_connections)
        self.stall_limit = stall_limit
        self._given = client
        self._usual = usual
        self._max_connections = max_connections
        self._proxies = Proxies(os.environ)
        # The keys are TLS settings and a proxy's URL. Clients without settings accept no
        # certificate.
        self._clients: dict[tuple[TLSConfig | None, str | None], AsyncClient] = {}
        self._contexts: dict[TLSConfig, ssl.SSLContext] = {}
        self._making = trio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for client in self._clients.values():
            with trio.move_on_after(CLOSE_GRACE, shield=True):
                await client.aclose()

    async def check(self, tls: TLSConfig | None) -> None:
        """Load a host's own certificates, if it has any.

        Raises:
            HostsError: if the certificates cannot be used.
        """
        try:
            if tls is not None:
                await self._context(tls)
        except NetworkSettingError:
            pass  # a request that needs the environment's certificates raises this error again

    async def client(self, tls: TLSConfig | None, url: URL, *, probe: bool = False) -> AsyncClient:
        """Return the client for a request.

        Args:
            tls: The host's own TLS settings; ``None``: the usual ones.
            url: The URL of the request.
            probe: Whether the request only tests whether the host speaks TLS.

        Raises:
            HostsError: if the host's certificates cannot be used.
            NetworkSettingError: if the environment names an unusable proxy or certificate file.
                Plain HTTP and probes on this machine do not need either, and go without.
        """
        if tls is None:
            if self._given is not None:
                return self._given
            if is_loopback(url) and (probe or url.scheme == "http"):
                # Loading the usual certificates takes tens of milliseconds. A server's certificate
                # that is not trusted tells the probe enough.
                return self._clients.get((None, None)) or self._keep(None, None, trust_nobody())
            tls = self._usual
        proxy = self._proxies.find(url)
        client = self._clients.get((tls, proxy))
        return client or self._keep(tls, proxy, await self._context(tls))

    async def _context(self, tls: TLSConfig) -> ssl.SSLContext:
        async with self._making:
            if tls not in self._contexts:
                self._contexts[tls] = await trio.to_thread.run_sync(make_context, tls)
        return self._contexts[tls]

    def _keep(
        self, tls: TLSConfig | None, proxy: str | None, context: ssl.SSLContext
    ) -> AsyncClient:
        key = tls, proxy
        if key not in self._clients:
            self._clients[key] = new_client(context, self._max_connections, proxy)
        return self._clients[key]
