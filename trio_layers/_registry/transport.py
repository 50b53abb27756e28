"""One request after the other: slots, redirects, bodies, and httpx's errors as ours.

A slot is held from before a request is sent until its body is closed, so that no request ever
waits in httpcore's pool: it loses a connection for good whenever a request is cancelled that
waits for one (encode/httpcore#961).
"""

from __future__ import annotations

import logging
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Final, Self, final

import attrs
import trio

from .._errors import RegistryError
from .answers import readable
from .credentials import as_sent
from .discretion import hush, secrets_of, without_secrets
from .hosts import is_loopback, origin_of
from .http import (
    URL,
    AsyncByteStream,
    AsyncClient,
    Headers,
    HTTPError,
    Response,
    StreamError,
    Timeout,
    discreet,
)
from .trust import Trust

__all__ = ["STALL_LIMIT", "Answer", "Connections", "Manner", "Transport"]

log = logging.getLogger("trio_layers.registry")

MAX_REDIRECTS: Final = 5

# Seconds. No byte for as long ends an attempt.
STALL_LIMIT: Final = 60.0
CONNECT_LIMIT: Final = 30.0
# A server that takes TLS for the beginning of a long request is given up with this one.
PROBE_LIMIT: Final = 5.0
CLOSE_GRACE: Final = 5.0
# Bytes.
MAX_SKIPPED: Final = 64 * 1024

_NOTHING: Final[Mapping[str, str]] = {}


@final
@attrs.frozen(eq=False)
class Answer:
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
    """

    host: str
    status: int
    # There may be signed URLs in it, and cookies.
    headers: Headers = attrs.field(repr=False)
    redirected: bool
    location: URL | None = attrs.field(repr=False)
    chunks: AsyncIterator[bytes] = attrs.field(repr=False)
    secrets: Callable[[], frozenset[str]] = attrs.field(default=frozenset, repr=False)

    def readable(self, text: str) -> str:
        """What it says, fit for a message (see `readable`), and without what it was sent."""
        return readable(without_secrets(text, self.secrets()))

    async def read(self, limit: int) -> bytes:
        """The body, and if it is longer than ``limit`` bytes, only its beginning: longer than
        ``limit`` all the same, by no more than a chunk."""
        data = bytearray()
        async for chunk in self.chunks:
            data += chunk
            if len(data) > limit:
                break
        return bytes(data)

    async def skip(self) -> None:
        """Read what is no use, so that the connection is: one whose body is left before its end
        is closed. A long body is not worth it."""
        await self.read(MAX_SKIPPED)


@final
class Connections:
    """The httpx clients, one for all who are trusted alike, and one limiter over all of them.

    Each client allows as many connections as the limiter, so that nobody ever waits in its pool.
    The clients that are made here are closed when its block is left.

    Args:
        client: For whoever needs no certificates of its own. It is not closed.
        make_client: Makes one for those who do. It is called in a thread.
        max_connections: How many requests are under way at once.
        stall_limit: After how many seconds without a byte a request is given up.
    """

    def __init__(
        self,
        client: AsyncClient,
        make_client: Callable[[Trust], AsyncClient],
        *,
        max_connections: int,
        stall_limit: float,
    ) -> None:
        self.limiter: trio.CapacityLimiter = trio.CapacityLimiter(max_connections)
        self.stall_limit = stall_limit
        self._make_client = make_client
        self._clients: dict[Trust | None, AsyncClient] = {None: client}
        self._making = trio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for trust, client in self._clients.items():
            if trust is not None:
                with trio.move_on_after(CLOSE_GRACE, shield=True):
                    await client.aclose()

    async def client(self, trust: Trust | None) -> AsyncClient:
        """The client for those who are trusted so.

        Raises:
            HostsError: if certificates cannot be used.
        """
        client = self._clients.get(trust)
        if client is not None:
            return client
        assert trust is not None
        async with self._making:
            if trust not in self._clients:
                self._clients[trust] = await trio.to_thread.run_sync(self._make_client, trust)
        return self._clients[trust]


@attrs.frozen
class Manner:
    """How one host is spoken to, and nobody else but where that is said; nor the host itself,
    where others have referred to it.

    Attributes:
        origins: Its scheme, host and port, perhaps in several ways.
        headers: What it is sent with each request.
        trust: By which certificates it is known, and we are; ``None``: the usual ones. Whom it
            refers to, for a token or a blob, is known by the same, but not shown ours.
        connect_limit: Seconds that connecting to it may take; ``None``: as long as usual.
    """

    origins: frozenset[tuple[str, str, int | None]]
    headers: tuple[tuple[bytes, bytes], ...] = attrs.field(default=(), repr=False)
    trust: Trust | None = None
    connect_limit: float | None = None


@final
class Transport:
    """Sends requests.

    Args:
        connections: Through these.
        plain_http: Whether HTTPS may lead to plain HTTP.
        manner: How a host is spoken to that is configured; ``None``: nothing is said.
    """

    def __init__(
        self, connections: Connections, *, plain_http: bool, manner: Manner | None = None
    ) -> None:
        self._connections = connections
        self._plain_http = plain_http
        self._manner = Manner(frozenset()) if manner is None else manner

    async def speaks_tls(self, url: URL) -> bool:
        """Whether an HTTPS server is there. If not, plain HTTP may be tried."""
        try:
            async with self._send(url, {}, "its version", connect_limit=PROBE_LIMIT):
                return True
        except RegistryError as error:
            # A server whose certificate is not trusted is one. Let the request itself say so.
            cause = error.__cause__
            while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
                cause = cause.__cause__ or cause.__context__
            return cause is not None

    @asynccontextmanager
    async def get(
        self,
        url: URL,
        what: str,
        *,
        headers: Mapping[str, str] = _NOTHING,
        authorization: str | None = None,
    ) -> AsyncIterator[Answer]:
        """Send a request, follow redirects, and give the answer with its body open.

        Args:
            url: Who is asked.
            what: What is asked for, in words, for errors.
            headers: Go to whoever answers in the end.
            authorization: Goes to the origin of ``url`` alone.

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
            async with self._send(
                target, fields, what, connect_limit=CONNECT_LIMIT, redirected=redirected
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
    async def post(self, url: URL, what: str, *, form: Mapping[str, str]) -> AsyncIterator[Answer]:
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
        async with self._send(url, headers, what, connect_limit=CONNECT_LIMIT, body=body) as answer:
            if answer.location is not None:
                raise RegistryError(
                    f"{_host(url)} redirects to {_host(answer.location)} for {what}, which is not "
                    "followed: a secret would be sent along",
                    host=_host(url),
                )
            yield answer

    def _redirected(self, url: URL, target: URL, what: str) -> URL:
        # What listens on this machine without TLS is not for a registry elsewhere to reach.
        local = is_loopback(url) and is_loopback(target)
        allowed = target.scheme == "https" or (
            target.scheme == "http" and (self._plain_http or local)
        )
        if not allowed:
            raise RegistryError(
                f"{_host(url)} redirects to {readable(target.scheme)}://{_host(target)} for "
                f"{what}, which is not followed: allow plain HTTP if that is meant",
                host=_host(url),
            )
        # A name and password in it would be sent to whoever the registry likes.
        return target.copy_with(username=None, password=None)

    @asynccontextmanager
    async def _send(
        self,
        url: URL,
        headers: Mapping[str, str],
        what: str,
        *,
        connect_limit: float,
        redirected: bool = False,
        body: bytes | None = None,
    ) -> AsyncIterator[Answer]:
        host = _host(url)
        manner, stall_limit = self._manner, self._connections.stall_limit
        trust = manner.trust
        fields = Headers()
        if origin_of(url) in manner.origins and not redirected:
            fields = Headers(manner.headers)
            connect_limit = min(connect_limit, manner.connect_limit or connect_limit)
        elif trust is not None:
            trust = trust.of_others()
        client = await self._connections.client(trust)
        # The pool needs no limit: see above.
        limits = Timeout(connect=connect_limit, read=stall_limit, write=stall_limit, pool=None)
        # Content that is encoded for the way would not have the digest it is known by.
        fields.update({"Accept-Encoding": "identity", **headers})
        limiter = self._connections.limiter
        borrower = object()
        await limiter.acquire_on_behalf_of(borrower)
        try:
            method = "GET" if body is None else "POST"
            request = client.build_request(
                method, url, headers=fields, content=body, timeout=limits
            )
            if "Authorization" not in fields:
                # The client's own is for whatever else it was made for.
                request.headers.pop("Authorization", None)
            # Not yet: a token of some thousand characters takes a millisecond.
            query = url.query if redirected else b""
            secrets = partial(secrets_of, request.headers.multi_items(), body or b"", query)
            try:
                with discreet():
                    response = await client.send(
                        request, stream=True, follow_redirects=False, auth=None
                    )
            # UnicodeError: a host, perhaps of a redirect, whose name cannot be.
            except (HTTPError, UnicodeError) as error:
                hush(error, secrets())
                raise _failed(f"{host} could not be asked for {what}", host, error) from error
            # In our own words: a URL that somebody else has made may hold a signature.
            log.debug("%s %s for %s: %d", method, host, what, response.status_code)
            async with _open_body(response, host, what) as chunks:
                following = response.next_request
                yield Answer(
                    host,
                    response.status_code,
                    response.headers,
                    redirected=redirected,
                    location=None if following is None else following.url,
                    chunks=chunks,
                    secrets=secrets,
                )
        finally:
            limiter.release_on_behalf_of(borrower)


@asynccontextmanager
async def _open_body(
    response: Response, host: str, what: str
) -> AsyncIterator[AsyncIterator[bytes]]:
    """The body's chunks, which may be left before their end, and the connection's with it.

    They come through a chain of async generators, httpx's and httpcore's. To close the outermost
    leaves the others to the garbage collector, and trio says so, in a `ResourceWarning` each.
    A cancelled read goes through all of them from the inside.
    """
    chunks = _read_body(response, host, what)
    try:
        yield chunks
    finally:
        with trio.CancelScope(shield=True) as scope:
            scope.cancel()
            try:
                async for _ in chunks:
                    pass
            except RegistryError:
                pass  # nobody wants the rest any more
        with trio.move_on_after(CLOSE_GRACE, shield=True):
            await response.aclose()


async def _read_body(response: Response, host: str, what: str) -> AsyncIterator[bytes]:
    # This is what aiter_raw() gives, but that refuses the ready-made responses of an in-memory
    # transport, which httpx takes for consumed.
    assert isinstance(response.stream, AsyncByteStream)
    try:
        async for chunk in response.stream:
            yield chunk
    except (HTTPError, StreamError) as error:
        hush(error, ())
        raise _failed(f"{host} broke off while it sent {what}", host, error) from error


def _failed(text: str, host: str, error: Exception) -> RegistryError:
    return RegistryError(f"{text}: {readable(str(error)) or type(error).__name__}", host=host)


def _host(url: URL) -> str:
    return readable(url.netloc.decode("ascii", "replace"))
