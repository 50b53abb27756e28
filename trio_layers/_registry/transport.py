"""Sends one request at a time: connections, redirects, and errors of httpx as ours.

A request has a token of the limiter from before it is sent until its body is closed, so that no
request ever waits in httpcore's pool. If a request is cancelled while it waits there, the pool
loses a connection for good (encode/httpcore#961).
"""

from __future__ import annotations

import logging
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, Literal, TypeAlias, final

import trio

from .._errors import RegistryError
from .._printable import printable_line
from .body import open_body
from .connections import Connections
from .credentials import as_sent
from .error_responses import mark_final
from .failures import causes_of, client_closed_error, host_of, request_error, through_proxy
from .hosts import HostSettings, is_loopback, origin_of
from .http import (
    URL,
    AsyncClient,
    Headers,
    HTTPError,
    InvalidURL,
    Request,
    Response,
    Timeout,
    proxy_of,
)
from .http_send import send
from .redaction import redact_error, secrets_of
from .response import RegistryResponse
from .tls import TLSConfig

__all__ = ["STALL_LIMIT", "Method", "Transport"]

log = logging.getLogger("trio_layers.registry")

MAX_REDIRECTS: Final = 5

STALL_LIMIT: Final = 60.0
"""Seconds without a byte that end an attempt, and seconds that a server may be behind the least
rate."""

CONNECT_LIMIT: Final = 30.0

# Seconds. Some servers take a TLS handshake for the beginning of a long request, and stay silent.
PROBE_LIMIT: Final = 5.0

Method: TypeAlias = Literal["GET", "HEAD", "POST"]

PROXY_REFUSES: Final = "Proxy Authentication Required"

_NOTHING: Final[Mapping[str, str]] = {}


@final
class Transport:
    """Sends requests.

    Args:
        connections: The httpx clients.
        plain_http: Whether redirects to plain HTTP are followed.
        local: Whether redirects from this machine to plain HTTP on this machine are followed in
            any case.
        settings: The settings for a configured host; ``None``: there are none.
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
        """Return whether the host is an HTTPS server. If not, plain HTTP may be tried."""
        try:
            async with self._send(url, "its version", connect_limit=PROBE_LIMIT, probe=True):
                return True
        except RegistryError as error:
            # A server with an untrusted certificate speaks TLS. The request itself then fails with
            # this error.
            return any(isinstance(each, ssl.SSLCertVerificationError) for each in causes_of(error))

    @asynccontextmanager
    async def get(
        self,
        url: URL,
        subject: str,
        *,
        headers: Mapping[str, str] = _NOTHING,
        authorization: str | None = None,
        authorize_redirected: Callable[[URL], Awaitable[str | None]] | None = None,
        method: Method = "GET",
    ) -> AsyncIterator[RegistryResponse]:
        """Send a request, follow redirects, and yield the response with its body open.

        Args:
            url: The first URL.
            subject: The requested thing in words, for errors.
            headers: Header fields for every host.
            authorization: The Authorization field for the origin of ``url`` alone.
            authorize_redirected: Returns the Authorization field for another host that the request
                is redirected to. No connection is held while it runs.
            method: ``HEAD`` requests the header only.

        Raises:
            RegistryError: if there is no response, or if its body breaks off. A redirect to plain
                HTTP is an error unless plain HTTP is allowed, or leads from this machine to
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
            sending = self._send(
                target, subject, headers=fields, redirected=redirected, method=method
            )
            async with sending as response:
                if response.location is None:
                    yield response
                    return
                await response.skip()
            target = self._redirected(target, response.location, subject)
            # Once redirected, even a redirect back to the first host gets no secrets: another host
            # has chosen its URL.
            redirected = redirected or origin_of(target) != origin_of(url)
        raise RegistryError(
            f"{host_of(url)} redirects more than {MAX_REDIRECTS} times for {subject}",
            host=host_of(url),
        )

    @asynccontextmanager
    async def post(
        self, url: URL, subject: str, *, form: Mapping[str, str]
    ) -> AsyncIterator[RegistryResponse]:
        """Send a form, which may have secrets, and follow no redirect.

        Args:
            url: The URL.
            subject: The requested thing in words, for errors.
            form: The fields of the form.

        Raises:
            RegistryError: as for `get`, and if there is a redirect.
        """
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        fields = {name: as_sent(value) for name, value in form.items()}
        body = urllib.parse.urlencode(fields).encode()
        async with self._send(url, subject, headers=headers, method="POST", body=body) as response:
            if response.location is not None:
                raise RegistryError(
                    f"{host_of(url)} redirects to {host_of(response.location)} for {subject}, "
                    "which is not followed: a secret would be sent along",
                    host=host_of(url),
                )
            yield response

    def allows(self, target: URL, origin: URL) -> bool:
        """Return whether ``origin`` may lead to ``target``."""
        # A remote registry must not reach plain HTTP servers on this machine.
        local = self._local and is_loopback(origin) and is_loopback(target)
        return target.scheme == "https" or (target.scheme == "http" and (self._plain_http or local))

    def _redirected(self, url: URL, target: URL, subject: str) -> URL:
        if not self.allows(target, url):
            raise RegistryError(
                f"{host_of(url)} redirects to {printable_line(target.scheme)}://{host_of(target)} "
                f"for {subject}, which is not followed: allow plain HTTP if that is meant",
                host=host_of(url),
            )
        try:
            # The registry could choose a host for a name and password in the URL.
            return target.copy_with(username=None, password=None)
        except InvalidURL:
            raise RegistryError(
                f"{host_of(url)} redirects to an invalid URL for {subject}", host=host_of(url)
            ) from None

    @asynccontextmanager
    async def _send(
        self,
        url: URL,
        subject: str,
        *,
        headers: Mapping[str, str] = _NOTHING,
        connect_limit: float = CONNECT_LIMIT,
        redirected: bool = False,
        probe: bool = False,
        method: Method = "GET",
        body: bytes | None = None,
    ) -> AsyncIterator[RegistryResponse]:
        """Send one request, and yield the response with its body open."""
        tls, fields, connect_limit = self._settings_for(url, connect_limit, redirected=redirected)
        client = await self._connections.client(tls, url, probe=probe)
        # A content encoding would change the bytes, and so their digest.
        fields.update({"Accept-Encoding": "identity", **headers})
        stall_limit = self._connections.stall_limit
        # The pool needs no limit: see the top of this file.
        limits = Timeout(connect=connect_limit, read=stall_limit, write=stall_limit, pool=None)
        limiter, borrower = self._connections.limiter, object()
        await limiter.acquire_on_behalf_of(borrower)
        try:
            request = client.build_request(
                method, url, headers=fields, content=body, timeout=limits
            )
            if "Authorization" not in fields:
                # The client's default Authorization is meant for other hosts.
                request.headers.pop("Authorization", None)
            query = url.query if redirected else b""
            # Computed for errors only: a token of some thousand characters takes a millisecond.
            secrets = partial(secrets_of, request.headers.multi_items(), body or b"", query)
            # httpx limits each step, but a header that comes byte by byte has steps without end. So
            # all steps together are limited: connection, TLS, waiting and reading, and the same
            # with a proxy before.
            patience = 2 * (min(connect_limit, stall_limit) + stall_limit)
            response = await _receive_header(client, request, url, subject, patience, secrets)
            # httpx's own log line would show the URL, which may have a signature.
            log.debug("%s %s for %s: %d", method, host_of(url), subject, response.status_code)
            async with open_body(client, response, host_of(url), subject, stall_limit) as chunks:
                _check_proxy(client, url, subject, response)
                following = response.next_request
                yield RegistryResponse(
                    host_of(url),
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

    def _settings_for(
        self, url: URL, connect_limit: float, *, redirected: bool
    ) -> tuple[TLSConfig | None, Headers, float]:
        """Return TLS settings, header fields and the connect limit for a URL."""
        settings = self._settings
        if origin_of(url) in settings.origins and not redirected:
            limit = min(connect_limit, settings.connect_limit or connect_limit)
            return settings.tls, Headers(settings.headers), limit
        tls = None if settings.tls is None else settings.tls.of_others()
        return tls, Headers(), connect_limit


async def _receive_header(
    client: AsyncClient,
    request: Request,
    url: URL,
    subject: str,
    patience: float,
    secrets: Callable[[], frozenset[str]],
) -> Response:
    """Send a request, and return the response with its body open.

    Raises:
        RegistryError: if there is no response, also within ``patience`` seconds.
        ClientClosed: if the caller's httpx client is closed.
    """
    host = host_of(url)
    response: Response | None = None
    try:
        if client.is_closed:
            raise client_closed_error()
        with trio.move_on_after(patience):
            response = await send(client, request)
    # UnicodeError: the host, perhaps of a redirect, has an invalid name. InvalidURL: another part
    # of the redirect's URL is invalid.
    except (HTTPError, InvalidURL, UnicodeError, RuntimeError) as error:
        redact_error(error, secrets())
        if client.is_closed:
            raise client_closed_error() from error
        if isinstance(error, RuntimeError):
            raise
        text = f"{host} could not be asked for {subject}{through_proxy(proxy_of(client, url))}"
        raise request_error(text, host, error) from error
    if response is None:
        raise RegistryError(
            f"{host} had not answered {patience:g} seconds after it was asked for "
            f"{subject}{through_proxy(proxy_of(client, url))}",
            host=host,
            transient=True,
        )
    return response


def _check_proxy(client: AsyncClient, url: URL, subject: str, response: Response) -> None:
    """Raise the proxy's refusal of a plain request like its refusal of a tunnel.

    Raises:
        RegistryError: if a proxy answered 407 in place of the host.
    """
    if response.status_code == 407 and (proxy := proxy_of(client, url)) is not None:
        host = host_of(url)
        text = f"{host} could not be asked for {subject}{through_proxy(proxy)}: 407 {PROXY_REFUSES}"
        raise mark_final(RegistryError(text, host=host, status=407))
