"""One request after the other: slots, redirects, bodies, and httpx's errors as ours.

A slot is held from before a request is sent until its body is closed, so that no request ever
waits in httpcore's pool: it loses a connection for good whenever a request is cancelled that
waits for one (encode/httpcore#961).
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import ssl
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias, final

import attrs
import trio

from .._errors import ClientClosed, NetworkSettingError, RegistryError
from .._printable import printable_line
from .answers import mark_final
from .credentials import as_sent
from .hosts import is_loopback, origin_of
from .http import (
    CLOSE_GRACE,
    URL,
    AsyncByteStream,
    AsyncClient,
    Headers,
    HTTPError,
    InvalidURL,
    Response,
    StreamError,
    Timeout,
    close_connection,
    connection_failed,
    discreet,
    new_client,
    proxy_of,
    send,
)
from .proxies import Proxies
from .redaction import redact_error, secrets_of, without_secrets
from .tls import TLSConfig, make_context, trust_nobody

__all__ = ["STALL_LIMIT", "Connections", "HostSettings", "Method", "RegistryResponse", "Transport"]

log = logging.getLogger("trio_layers.registry")

MAX_REDIRECTS: Final = 5

# Seconds. No byte for as long ends an attempt; so does a server that is behind by as much.
STALL_LIMIT: Final = 60.0
# Bytes in a second. Who sends less is behind: it would hold its slot for ever.
LEAST_RATE: Final = 1024.0
CONNECT_LIMIT: Final = 30.0
# A server that takes TLS for the beginning of a long request is given up with this one.
PROBE_LIMIT: Final = 5.0
# Bytes.
MAX_SKIPPED: Final = 64 * 1024
# The most nested generators of a body. httpx and httpcore together have five.
MAX_CHAIN: Final = 20

Method: TypeAlias = Literal["GET", "HEAD", "POST"]

PROXY_REFUSES: Final = "Proxy Authentication Required"

_NOTHING: Final[Mapping[str, str]] = {}


@final
@attrs.frozen(eq=False)
class RegistryResponse:
    """What a server says, while its body is open.

    Attributes:
        host: Who says it, with the port; not who was asked, after a redirect.
        status: The HTTP status.
        headers: The header fields; the same name may be there several times.
        redirected: Whether this is the answer of somebody else than the origin that was asked, or
            one that somebody else has asked for.
        location: Where it redirects to; ``None`` if it does not.
        chunks: The body as it arrives, without any decoding of its content.
        secrets: Gives what it was sent that others must not see.
        url: The URL that this response came from.
    """

    host: str
    status: int
    # There may be signed URLs in it, and cookies.
    headers: Headers = attrs.field(repr=False)
    redirected: bool
    location: URL | None = attrs.field(repr=False)
    chunks: AsyncIterator[bytes] = attrs.field(repr=False)
    secrets: Callable[[], frozenset[str]] = attrs.field(default=frozenset, repr=False)
    url: URL | None = attrs.field(default=None, repr=False)

    def printable_line(self, text: str) -> str:
        """What it says, fit for a message (see `readable`), and without what it was sent."""
        return printable_line(without_secrets(text, self.secrets()))

    @property
    def media_type(self) -> str:
        """What the body is, without parameters; empty if that is not said."""
        said: str = self.headers.get("Content-Type", "")
        return said.partition(";")[0].strip().lower()

    async def read(self, limit: int) -> bytes:
        """The body, and if it is longer than ``limit`` bytes, only its beginning: longer than
        ``limit`` all the same, by no more than a chunk.
        """
        data = bytearray()
        async for chunk in self.chunks:
            data += chunk
            if len(data) > limit:
                break
        return bytes(data)

    async def skip(self) -> None:
        """Read what is no use, so that the connection is: one whose body is left before its end
        is closed. A long body is not worth it.
        """
        await self.read(MAX_SKIPPED)


@final
class Connections:
    """The httpx clients, and one limiter over all of them.

    Hosts with the same certificates and the same proxy share one client. Our own clients are made
    when a request needs them, read the environment at that moment, and are closed when the block
    ends. Each allows as many connections as the limiter, so that no request waits in its pool.

    Args:
        client: For hosts without certificates of their own. It is not closed. ``None``: clients of
            our own.
        usual: The TLS tls for those hosts, in our own clients.
        max_connections: How many requests are under way at once.
        stall_limit: After how many seconds without a byte a request is given up, or with fewer
            than `LEAST_RATE` has for them.
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
        # The keys are a tls and a proxy's URL. The tls `None` accepts no certificate.
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
            tls: The host's own tls. ``None``: the usual tls.
            url: The URL of the request.
            probe: Whether the request only tests whether the host speaks TLS.

        Raises:
            HostsError: if the host's certificates cannot be used.
            NetworkSettingError: if the environment names an unusable proxy or certificate file.
                Plain HTTP and probes on this machine do not need either, and go without.
        """
        if tls is None and self._given is not None:
            return self._given
        tls = tls or self._usual
        proxy = self._proxies.find(url)
        client = self._clients.get((tls, proxy))
        if client is not None:
            return client
        try:
            context = await self._context(tls)
        except NetworkSettingError:
            if not (is_loopback(url) and (probe or url.scheme == "http")):
                raise
            return self._keep(None, None, trust_nobody())
        return self._keep(tls, proxy, context)

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


@attrs.frozen
class HostSettings:
    """How one host is spoken to, and nobody else but where that is said; nor the host itself,
    where others have referred to it.

    Attributes:
        origins: Its scheme, host and port, perhaps in several ways.
        headers: What it is sent with each request.
        tls: By which certificates it is known, and we are; ``None``: the usual ones. Whom it
            refers to, for a token or a blob, is known by the same, but not shown ours.
        connect_limit: Seconds that connecting to it may take; ``None``: as long as usual.
    """

    origins: frozenset[tuple[str, str, int | None]]
    headers: tuple[tuple[bytes, bytes], ...] = attrs.field(default=(), repr=False)
    tls: TLSConfig | None = None
    connect_limit: float | None = None


@final
class Transport:
    """Sends requests.

    Args:
        connections: Through these.
        plain_http: Whether anybody may lead to plain HTTP.
        local: Whether this machine may lead to plain HTTP on itself in any case.
        settings: How a host is spoken to that is configured; ``None``: nothing is said.
    """

    def __init__(
        self,
        connections: Connections,
        *,
        plain_http: bool,
        local: bool = True,
        settings: HostSettings | None = None,
    ) -> None:
        self._connections = connections
        self._plain_http = plain_http
        self._local = local
        self._settings = HostSettings(frozenset()) if settings is None else settings

    async def speaks_tls(self, url: URL) -> bool:
        """Whether an HTTPS server is there. If not, plain HTTP may be tried."""
        try:
            async with self._send(url, {}, "its version", connect_limit=PROBE_LIMIT, probe=True):
                return True
        except RegistryError as error:
            # A server whose certificate is not trusted is one. Let the request itself say so.
            return any(isinstance(each, ssl.SSLCertVerificationError) for each in _causes(error))

    @asynccontextmanager
    async def get(
        self,
        url: URL,
        what: str,
        *,
        headers: Mapping[str, str] = _NOTHING,
        authorization: str | None = None,
        authorize_redirected: Callable[[URL], Awaitable[str | None]] | None = None,
        method: Method = "GET",
    ) -> AsyncIterator[RegistryResponse]:
        """Send a request, follow redirects, and give the answer with its body open.

        Args:
            url: Who is asked.
            what: What is asked for, in words, for errors.
            headers: Go to whoever answers in the end.
            authorization: Goes to the origin of ``url`` alone.
            authorize_redirected: Returns the Authorization field for another host that the request
                is redirected to. No connection is held while it runs.
            method: ``HEAD``: the same without its body.

        Raises:
            RegistryError: if there is no answer, also while the body is read. A redirect to plain
                HTTP is followed only where that may be used anyway, and from this machine to
                itself.
        """
        target, redirected = url, False
        for _ in range(MAX_REDIRECTS + 1):
            fields = dict(headers)
            if authorization is not None and not redirected:
                fields["Authorization"] = authorization
            if redirected and authorize_redirected is not None:
                theirs = await authorize_redirected(target)
                if theirs is not None:
                    fields["Authorization"] = theirs
            async with self._send(
                target,
                fields,
                what,
                connect_limit=CONNECT_LIMIT,
                redirected=redirected,
                method=method,
            ) as answer:
                if answer.location is None:
                    yield answer
                    return
                await answer.skip()
            target = self._redirected(target, answer.location, what)
            # For good: nobody else decides what is asked for with a secret, once it comes back.
            redirected = redirected or origin_of(target) != origin_of(url)
        raise RegistryError(
            f"{_host(url)} redirects more than {MAX_REDIRECTS} times for {what}", host=_host(url)
        )

    @asynccontextmanager
    async def post(
        self, url: URL, what: str, *, form: Mapping[str, str]
    ) -> AsyncIterator[RegistryResponse]:
        """Send a form, in which there may be secrets: no redirect is followed.

        Args:
            url: Who is asked.
            what: What is asked for, in words, for errors.
            form: What is sent.

        Raises:
            RegistryError: as for `get`, and if there is a redirect.
        """
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        fields = {name: as_sent(value) for name, value in form.items()}
        body = urllib.parse.urlencode(fields).encode()
        async with self._send(
            url, headers, what, connect_limit=CONNECT_LIMIT, method="POST", body=body
        ) as answer:
            if answer.location is not None:
                raise RegistryError(
                    f"{_host(url)} redirects to {_host(answer.location)} for {what}, which is not "
                    "followed: a secret would be sent along",
                    host=_host(url),
                )
            yield answer

    def allows(self, target: URL, origin: URL) -> bool:
        """Whether whoever speaks for ``origin`` may have us ask there."""
        # What listens on this machine without TLS is not for a registry elsewhere to reach.
        local = self._local and is_loopback(origin) and is_loopback(target)
        return target.scheme == "https" or (target.scheme == "http" and (self._plain_http or local))

    def _redirected(self, url: URL, target: URL, what: str) -> URL:
        if not self.allows(target, url):
            raise RegistryError(
                f"{_host(url)} redirects to {printable_line(target.scheme)}://{_host(target)} for "
                f"{what}, which is not followed: allow plain HTTP if that is meant",
                host=_host(url),
            )
        try:
            # A name and password in it would be sent to whoever the registry likes.
            return target.copy_with(username=None, password=None)
        except InvalidURL:
            raise RegistryError(
                f"{_host(url)} redirects to what is no URL for {what}", host=_host(url)
            ) from None

    @asynccontextmanager
    async def _send(
        self,
        url: URL,
        headers: Mapping[str, str],
        what: str,
        *,
        connect_limit: float,
        redirected: bool = False,
        probe: bool = False,
        method: Method = "GET",
        body: bytes | None = None,
    ) -> AsyncIterator[RegistryResponse]:
        host = _host(url)
        settings, stall_limit = self._settings, self._connections.stall_limit
        tls = settings.tls
        fields = Headers()
        if origin_of(url) in settings.origins and not redirected:
            fields = Headers(settings.headers)
            connect_limit = min(connect_limit, settings.connect_limit or connect_limit)
        elif tls is not None:
            tls = tls.of_others()
        client = await self._connections.client(tls, url, probe=probe)
        # The pool needs no limit: see above.
        limits = Timeout(connect=connect_limit, read=stall_limit, write=stall_limit, pool=None)
        # Content that is encoded for the way would not have the digest it is known by.
        fields.update({"Accept-Encoding": "identity", **headers})
        limiter = self._connections.limiter
        borrower = object()
        await limiter.acquire_on_behalf_of(borrower)
        try:
            request = client.build_request(
                method, url, headers=fields, content=body, timeout=limits
            )
            if "Authorization" not in fields:
                # The client's own is for whatever else it was made for.
                request.headers.pop("Authorization", None)
            # httpx's limits are for one step each, of which there is no end if a header comes byte
            # by byte. All of them together: to connect and to speak TLS, to wait and to read, or
            # the same with a proxy before.
            patience = 2 * (min(connect_limit, stall_limit) + stall_limit)
            # Not yet: a token of some thousand characters takes a millisecond.
            query = url.query if redirected else b""
            secrets = partial(secrets_of, request.headers.multi_items(), body or b"", query)
            response: Response | None = None
            try:
                if client.is_closed:
                    raise _given_is_closed()
                with trio.move_on_after(patience):
                    response = await send(client, request)
            # UnicodeError: a host, perhaps of a redirect, whose name cannot be. InvalidURL: what
            # else cannot be in a redirect.
            except (HTTPError, InvalidURL, UnicodeError, RuntimeError) as error:
                redact_error(error, secrets())
                if client.is_closed:
                    raise _given_is_closed() from error
                if isinstance(error, RuntimeError):
                    raise
                through = _through(proxy_of(client, url))
                text = f"{host} could not be asked for {what}{through}"
                raise _failed(text, host, error) from error
            if response is None:
                through = _through(proxy_of(client, url))
                raise RegistryError(
                    f"{host} had not answered {patience:g} seconds after it was asked for "
                    f"{what}{through}",
                    host=host,
                    transient=True,
                )
            # In our own words: a URL that somebody else has made may hold a signature.
            log.debug("%s %s for %s: %d", method, host, what, response.status_code)
            async with _open_body(client, response, host, what, stall_limit) as chunks:
                if response.status_code == 407 and (proxy := proxy_of(client, url)) is not None:
                    # As if it had been asked for a tunnel: the host has said nothing.
                    through = _through(proxy)
                    text = f"{host} could not be asked for {what}{through}: 407 {PROXY_REFUSES}"
                    raise mark_final(RegistryError(text, host=host, status=407))
                following = response.next_request
                yield RegistryResponse(
                    host,
                    response.status_code,
                    response.headers,
                    redirected=redirected,
                    location=None if following is None else following.url,
                    chunks=chunks,
                    secrets=secrets,
                    url=url,
                )
        finally:
            limiter.release_on_behalf_of(borrower)


@asynccontextmanager
async def _open_body(
    client: AsyncClient, response: Response, host: str, what: str, stall_limit: float
) -> AsyncIterator[AsyncIterator[bytes]]:
    """The body's chunks, which may be left before their end, and the connection's with it.

    They come through a chain of async generators, httpx's and httpcore's. To close the outermost
    leaves the others to the garbage collector, and trio says so, in a `ResourceWarning` each.
    So the body is read once more in a cancelled scope: the cancellation is raised in the innermost
    generator, and ends all of them.
    """
    chunks = _read_body(client, response, host, what, stall_limit)
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
    client: AsyncClient, response: Response, host: str, what: str, stall_limit: float
) -> AsyncIterator[bytes]:
    """The body's chunks, from a server that sends them at the least rate.

    It is behind by the seconds it was waited for, less those that what came was worth; never
    ahead, so that no beginning, however fast, is of use later on. Behind by the stall limit it is
    given up. So a body of n bytes is waited for no longer than n / `LEAST_RATE` and the stall
    limit. What the caller does meanwhile does not count.
    """
    # This is what aiter_raw() gives, but that refuses the ready-made responses of an in-memory
    # transport, which httpx takes for consumed.
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
                    raise _given_is_closed() from error
                raise _failed(f"{host} broke off while it sent {what}", host, error) from error
            if chunk is None:
                raise RegistryError(
                    f"{host} broke off while it sent {what}: "
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


def _given_is_closed() -> ClientClosed:
    text = "the httpx client that was given is closed: keep it open as long as the registry client"
    return ClientClosed(text)


def _through(proxy: str | None) -> str:
    return "" if proxy is None else f" through the proxy {proxy}"


def _failed(text: str, host: str, error: Exception) -> RegistryError:
    # What OpenSSL says reaches us without its words, which are further down.
    said = [str(error), *(str(each) for each in _causes(error) if isinstance(each, OSError))]
    reason = next(filter(None, map(printable_line, said)), type(error).__name__)
    return RegistryError(f"{text}: {reason}", host=host, transient=_may_pass(error))


def _may_pass(error: Exception) -> bool:
    """Return whether a new connection may succeed after this failure."""
    for cause in _causes(error):
        if isinstance(cause, socket.gaierror):
            return cause.errno == socket.EAI_AGAIN  # the other errors are permanent
        if isinstance(cause, ssl.SSLError):
            # A connection that broke within TLS may succeed again. Other TLS errors, such as an
            # invalid certificate, are permanent.
            return isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError)
    return connection_failed(error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause = error.__cause__ or error.__context__
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _host(url: URL) -> str:
    return printable_line(url.netloc.decode("ascii", "replace"))
