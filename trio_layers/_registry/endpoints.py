"""The hosts of a registry's images, and the fallback from one to the next.

The hosts are the registry itself, or mirrors first.
"""

from __future__ import annotations

import logging
import re
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar, final
from urllib.parse import quote

import attrs
import trio

from .._errors import (
    AuthenticationError,
    CredentialsError,
    HostsError,
    LayersError,
    ManifestError,
    RateLimited,
    RegistryError,
    VerificationError,
    is_final,
)
from .._manifest import Descriptor
from .._reference import Reference
from .._single_flight import SingleFlight
from .auth import Authenticator, Challenge, RedirectedAccess, parse_challenges
from .blobs import EntityTags
from .connections import Connections
from .credentials import Credentials, CredentialsFor
from .error_responses import RateLimit, rate_limit, read_error
from .foreign_urls import MAX_URLS, ForeignURL
from .hosts import HostSettings, base_urls, is_loopback, origin_of, parse_url, registry_of
from .http import URL, InvalidURL
from .response import RegistryResponse
from .retries import Retries, is_transient
from .tls import TLSConfig
from .transport import Method, Transport

if TYPE_CHECKING:
    from .._hosts_toml import Configuration, Host

__all__ = ["Endpoint", "Endpoints", "try_each"]

log = logging.getLogger("trio_layers.registry")

# Seconds for which an unreachable host is not asked, if there are others.
COOLDOWN: Final = 60.0
# The number of foreign layers' URLs whose entity tags are remembered.
MAX_ELSEWHERE: Final = 1000

# Statuses with which registries hide a private repository from anonymous requests.
_MAY_HIDE: Final = (401, 403, 404)
# Statuses of ``/v2/`` that are permanent, so that its challenges can be remembered.
_TELLING: Final = (200, 401, 404)

T = TypeVar("T")
EndpointT = TypeVar("EndpointT", bound="Endpoint | ForeignURL")


@final
class Endpoint:
    """A host that serves the images of one registry.

    Its challenges, tokens and entity tags are for this host alone.

    Attributes:
        rate_limit: The rate limit that it last announced.

    Args:
        name: Host and port, for people.
        urls: The possible URLs of its API, in the order in which to try them.
        transport: Sends requests to it.
        authenticator: Authenticates requests to it.
        others: Authenticates requests to the hosts that it redirects to.
        upstream: The registry that it mirrors; ``None`` if it is the registry itself.
        capabilities: The supported ones of ``pull``, ``resolve`` and ``referrers``.
    """

    def __init__(
        self,
        name: str,
        urls: Sequence[URL],
        transport: Transport,
        authenticator: Authenticator,
        others: Authenticator,
        *,
        upstream: str | None = None,
        capabilities: frozenset[str] = frozenset({"pull", "resolve", "referrers"}),
    ) -> None:
        self.name = name
        self.capabilities = capabilities
        self.tags = EntityTags()
        self.rate_limit: RateLimit | None = None
        self._urls = urls
        self._base: URL | None = None
        self._transport = transport
        self._authenticator = authenticator
        self._others = others
        self._root: SingleFlight[tuple[Challenge, ...]] = SingleFlight()
        self._upstream = upstream
        self._trouble: RegistryError | None = None
        self._rests_until = 0.0

    def __repr__(self) -> str:
        # The repr leaves out the cooldown, which needs the clock of a trio run.
        return f"<Endpoint {self.name} for {self._upstream or 'itself'}>"

    @property
    def trouble(self) -> RegistryError | None:
        """The recent failure to reach the host, or ``None``."""
        return self._trouble if trio.current_time() < self._rests_until else None

    def note(self, error: LayersError) -> None:
        """Remember a failure to reach the host, so that other tasks need not try."""
        if isinstance(error, RegistryError) and error.status is None:
            self._trouble = error
            self._rests_until = trio.current_time() + COOLDOWN

    @asynccontextmanager
    async def ask(
        self,
        reference: Reference,
        path: str,
        subject: str,
        headers: Mapping[str, str],
        method: Method = "GET",
    ) -> AsyncIterator[RegistryResponse]:
        """Send an authenticated request, and yield the successful response.

        A 416 counts as a success, too: only requests for a range can get it.

        Args:
            reference: The reference of the repository.
            path: The path behind the repository, with a query if there is one.
            subject: The requested thing in words, for errors.
            headers: The header fields of the request.
            method: ``HEAD`` requests the header only.

        Raises:
            RegistryError: if there is no such response.
            CredentialsError: if the source of the credentials fails.
        """
        base = await self._find_base()
        url, reference = self._localize(base, reference, path)
        access = self._authenticator.access(reference)
        redirected = RedirectedAccess(self._others, reference, url)
        while True:
            try:
                authorization = await access.authorization()
            except AuthenticationError:
                access.failed()
                raise
            async with self._transport.get(
                url,
                subject,
                headers=headers,
                authorization=authorization,
                authorize_redirected=redirected.authorization,
                method=method,
            ) as answer:
                self._base = base
                self._trouble = None
                self.rate_limit = rate_limit(answer) or self.rate_limit
                unsatisfiable = "Range" in headers and answer.status == 416
                if 200 <= answer.status < 300 or unsatisfiable:
                    access.granted()
                    yield answer
                    return
                error = await read_error(answer, subject, sent_there=answer.redirected)
            # Answer challenges once the connection is released, because the source of the
            # credentials may wait for a person to type a password.
            if answer.redirected:
                if answer.status == 401 and await redirected.refused(answer):
                    continue
                raise error
            if answer.status == 401 and await access.refused(answer):
                continue
            if answer.status in _MAY_HIDE:
                try:
                    if await access.hidden(answer, partial(self._ask_root, base)):
                        continue
                except CredentialsError as trouble:
                    error.args = (f"{error}; {trouble}",)
                except RegistryError as trouble:
                    # The challenge may come with another attempt, so the refusal is not final.
                    error.args = (f"{error}; {trouble}",)
                    error.transient, error.__cause__ = trouble.transient, trouble
            if answer.status in (401, 403):
                access.failed()
            raise error

    def _localize(self, base: URL, reference: Reference, path: str) -> tuple[URL, Reference]:
        """Return the URL at this host, and the reference by which the host knows the image."""
        url = base.join(f"{reference.path}/{path}")
        if self._upstream is None:
            return url, reference
        # A mirror issues tokens for its own name, and for the repository's path at the mirror: a
        # cache for several registries, such as Harbor, has each in a directory.
        inside = base.path.partition("/v2/")[2]
        reference = attrs.evolve(reference, domain=self.name, path=inside + reference.path)
        return url.copy_set_param("ns", self._upstream), reference

    async def _ask_root(self, base: URL) -> tuple[Challenge, ...]:
        """Return the challenges of ``/v2/``; none if it has none, or its refusal is final.

        Raises:
            RegistryError: if another attempt may succeed.
        """
        root, found, _ = base.path.partition("/v2/")
        url = base.copy_with(path=f"{root}/v2/") if found else base
        subject = "how it wants to be asked"

        async def ask() -> tuple[Challenge, ...]:
            async with self._transport.get(url, subject) as answer:
                if answer.status in _TELLING and not answer.redirected:
                    fields = answer.headers.get_list("WWW-Authenticate")
                    return tuple(parse_challenges(fields)) if answer.status == 401 else ()
                error = await read_error(answer, subject)
            raise error

        try:
            return await self._root.get(lambda _: True, ask)
        except RegistryError as error:
            if is_transient(error):
                raise
            log.info("%s is not asked with credentials: %s", self.name, error)
            return ()

    async def _find_base(self) -> URL:
        """Return the base URL of the API. It is remembered after the first success."""
        if self._base is not None:
            return self._base
        first, *plain = self._urls
        if plain and not await self._transport.speaks_tls(first):
            return plain[0]
        return first


@final
class Endpoints:
    """The hosts of all registries.

    Args:
        connections: The httpx clients.
        credentials: The credentials for registries, by the domain in references, and for mirrors,
            by their own names. Credentials without a name are for registries only.
        plain_http: Whether registries without HTTPS are asked over plain HTTP.
        tls_verify: Whether certificates are checked where no file says otherwise.
        hosts_dir: The directory of containerd's configuration of hosts; ``None``: no mirrors.
    """

    def __init__(
        self,
        connections: Connections,
        credentials: CredentialsFor | None,
        *,
        plain_http: bool,
        tls_verify: bool,
        hosts_dir: Path | None,
    ) -> None:
        self._connections = connections
        self._credentials = credentials
        self._plain_http = plain_http
        self._tls_verify = tls_verify
        self._hosts_dir = hosts_dir
        self._transport = Transport(connections, plain_http=plain_http)
        self._authenticator = Authenticator(self._transport, credentials)
        self._others = Authenticator(self._transport, _named(credentials))
        self._endpoints: dict[str, tuple[Endpoint, ...]] = {}
        self._abroad = Transport(connections, plain_http=plain_http, local=False)
        self._elsewhere: dict[tuple[str, Transport], ForeignURL] = {}

    @property
    def rate_limits(self) -> dict[str, RateLimit]:
        """The rate limits that hosts have announced, by name."""
        endpoints = (endpoint for endpoints in self._endpoints.values() for endpoint in endpoints)
        return {
            endpoint.name: endpoint.rate_limit
            for endpoint in endpoints
            if endpoint.rate_limit is not None
        }

    async def find(self, reference: Reference, *needed: str) -> list[Endpoint]:
        """Return the hosts with the needed capabilities, in the order in which to ask them.

        There is at least one. A registry's configuration is read once, when it is first needed.

        Raises:
            HostsError: if the configuration cannot be used, or no host is left.
            InvalidReference: if the reference's domain cannot be a host.
        """
        domain = reference.domain
        endpoints = self._endpoints.get(domain)
        if endpoints is None:
            # Another task may have read it first. Its endpoints may have tokens, so they are used.
            endpoints = self._endpoints.setdefault(domain, await self._open(reference))
        able = [endpoint for endpoint in endpoints if endpoint.capabilities.issuperset(needed)]
        if not able:
            assert self._hosts_dir is not None
            wanted = " and ".join(repr(name) for name in needed)
            raise HostsError(
                str(self._hosts_dir),
                f"none of the hosts for {domain} has {wanted} among its capabilities",
            )
        return able

    def elsewhere(self, reference: Reference, layer: Descriptor) -> list[ForeignURL]:
        """Return the URLs to ask for a foreign layer before the registry.

        They are the first URLs in the manifest, and none for layers that the registry must have.

        Raises:
            InvalidReference: if the reference's domain cannot be a host.
        """
        if not layer.is_foreign:
            return []
        local = is_loopback(base_urls(reference, plain_http=False)[0])
        transport = self._transport if local else self._abroad
        found = []
        for text in dict.fromkeys(layer.urls[:MAX_URLS]):
            if (text, transport) not in self._elsewhere:
                if len(self._elsewhere) >= MAX_ELSEWHERE:
                    del self._elsewhere[next(iter(self._elsewhere))]
                self._elsewhere[text, transport] = ForeignURL(text, transport)
            found.append(self._elsewhere[text, transport])
        return found

    async def _open(self, reference: Reference) -> tuple[Endpoint, ...]:
        domain = reference.domain
        if self._hosts_dir is not None and domain:
            from .._hosts_toml import read_configuration  # not without mirrors

            found = await trio.to_thread.run_sync(read_configuration, self._hosts_dir, domain)
            if found.directory is not None:
                return tuple([await self._configured(host, domain, found) for host in found.hosts])
        urls = base_urls(reference, plain_http=self._plain_http)
        name = registry_of(domain)
        return (Endpoint(name, urls, self._transport, self._authenticator, self._others),)

    async def _configured(self, host: Host, domain: str, found: Configuration) -> Endpoint:
        assert found.directory is not None
        itself = host.host in (domain, registry_of(domain))
        urls = _urls_of(host, found, plain_http=self._plain_http and host.implied)
        # A host with an explicit plain HTTP URL may redirect to plain HTTP.
        said = not host.implied and any(url.scheme == "http" for url in urls)
        plain_http = self._plain_http or said
        settings = HostSettings(
            frozenset(map(origin_of, urls)),
            headers=_headers_of(host, found),
            tls=self._trust_of(host, str(found.directory)),
            connect_limit=host.dial_timeout,
        )
        await self._connections.check(settings.tls)  # raises HostsError for unusable certificates
        transport = Transport(self._connections, plain_http=plain_http, settings=settings)
        # Credentials without a name are for the registries that references name.
        credentials = self._credentials if itself else _named(self._credentials)
        return Endpoint(
            host.host,
            urls,
            transport,
            Authenticator(transport, credentials),
            Authenticator(transport, _named(self._credentials)),
            upstream=None if itself else domain,
            capabilities=host.capabilities,
        )

    def _trust_of(self, host: Host, directory: str) -> TLSConfig | None:
        verify = host.verify
        if host.skip_verify is None and not self._tls_verify:
            verify = False
        tls = TLSConfig(
            host.ca or (),
            # An empty second file became the directory itself, because names are joined with the
            # directory's path.
            tuple(
                (file, None if key in ("", directory) else key) for file, key in host.client or ()
            ),
            verify,
        )
        return None if tls == TLSConfig(verify=self._tls_verify) else tls


def _named(credentials: CredentialsFor | None) -> CredentialsFor | None:
    """Return the credentials for hosts that no reference names.

    Credentials that are not tied to a host (a single `Credentials`) are for the registries that
    references name, and no other host gets them.
    """
    return None if isinstance(credentials, Credentials) else credentials


def _urls_of(host: Host, found: Configuration, *, plain_http: bool) -> tuple[URL, ...]:
    shown = f"{host.scheme}://{host.host}{host.path}"
    try:
        url = parse_url(f"{host.scheme}://{host.host}/")
    except InvalidURL as error:
        raise HostsError(found.source, f"{shown!r} cannot be asked: {error}") from error
    if url.scheme not in ("https", "http") or not url.host:
        raise HostsError(found.source, f"{shown!r} is no URL of a host")
    path = quote(host.path.encode("utf-8", "surrogateescape"), safe="/:@!$&'()*+,;=")
    url = url.copy_with(raw_path=f"/{path.strip('/')}/".replace("//", "/").encode("ascii"))
    if url.scheme == "https" and (host.http_fallback or plain_http):
        return url, url.copy_with(scheme="http")
    return (url,)


_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
# These fields describe the message itself.
_RESERVED: Final = frozenset({"host", "content-length", "transfer-encoding", "connection"})


def _headers_of(host: Host, found: Configuration) -> tuple[tuple[bytes, bytes], ...]:
    fields = []
    for name, values in host.header.items():
        # Header values are not shown, because they may be secrets.
        if not _FIELD_NAME.match(name) or name.lower() in _RESERVED:
            raise HostsError(found.source, f"{name!r} cannot be a header field of one's own")
        for value in values:
            if any(ord(c) < 0x20 or ord(c) == 0x7F for c in value if c != "\t"):
                raise HostsError(
                    found.source, f"the header field {name} has control characters in it"
                )
            fields.append((name.encode("ascii"), value.strip().encode()))
    return tuple(fields)


async def try_each(
    endpoints: Sequence[EndpointT], attempt: Callable[[EndpointT], Awaitable[T]], retries: Retries
) -> T:
    """Try each endpoint in turn until one succeeds, as containerd does.

    A registry, verification or manifest error at one endpoint leads to the next endpoint; any
    other error is raised at once. When all endpoints have failed, the endpoints with transient
    failures are tried in another round.

    Endpoints that could not be reached a moment ago are tried last, and only if no other endpoint
    has failed with a final error.

    If exactly one endpoint sent a wrong blob or document, and all endpoints' errors are final, that
    endpoint is tried once more: a disk or a proxy may have damaged the bytes on the way.

    Args:
        endpoints: The hosts, in the order in which to try them. The registry itself is the last.
        attempt: Makes the request at one endpoint.
        retries: Decides on another round, and waits for it.

    Raises:
        LayersError: the error of the last endpoint, with the other endpoints' errors in its text.
            It is final only if the errors of all endpoints are.
    """
    failures: dict[EndpointT, LayersError] = {}
    wrong: list[EndpointT] = []
    turns: Iterable[EndpointT] = _turns(endpoints, failures)
    while True:
        for endpoint in turns:
            try:
                return await attempt(endpoint)
            except (RegistryError, VerificationError, ManifestError) as error:
                failures[endpoint] = error
                if isinstance(error, VerificationError) and is_final(error):
                    wrong.append(endpoint)
                if len(endpoints) > 1:
                    endpoint.note(error)
                    log.info("%s failed, so other hosts are asked: %s", endpoint.name, error)
        hopeful = _hopeful(endpoints, failures)
        if await retries.wait([failures[endpoint] for endpoint in hopeful]):
            turns = hopeful
        elif len(wrong) == 1 and all(map(is_final, failures.values())):
            turns = list(wrong)
        else:
            raise _combine([failures[endpoint] for endpoint in endpoints])


def _hopeful(
    endpoints: Sequence[EndpointT], failures: Mapping[EndpointT, LayersError]
) -> list[EndpointT]:
    """Return the endpoints for another round."""
    settled = is_final(failures[endpoints[-1]])
    hopeful = [
        endpoint
        for endpoint in endpoints
        # If the registry's answer is final, do not wait for mirrors that cannot be reached.
        if is_transient(failures[endpoint]) and not (settled and endpoint.trouble)
    ]
    # A host that asks to wait does not delay the retries of the others.
    return [each for each in hopeful if not _asks_to_wait(failures[each])] or hopeful


def _combine(failures: Sequence[LayersError]) -> LayersError:
    """Return the error of the last endpoint, with the texts of the others."""
    *others, last = failures
    if not others:
        return last
    error = last.copy_to_raise()
    error.args = ("; before that, ".join([str(last), *map(str, others)]),)
    error.__cause__ = next((each for each in (last, *others) if not is_final(each)), last)
    return error


def _asks_to_wait(error: LayersError) -> bool:
    return isinstance(error, RateLimited) and bool(error.retry_after)


def _turns(
    endpoints: Sequence[EndpointT], failures: dict[EndpointT, LayersError]
) -> Iterator[EndpointT]:
    """Yield the endpoints in the order of trying, unreachable endpoints last.

    The caller adds each failure to ``failures`` between two endpoints. If a registry or mirror has
    failed with a final error, the unreachable endpoints are not yielded: their earlier errors are
    added to ``failures``.
    """
    resting = {endpoint: trouble for endpoint in endpoints if (trouble := endpoint.trouble)}
    yield from [endpoint for endpoint in endpoints if endpoint not in resting]
    # Errors of a foreign layer's URLs do not count: they say nothing about the registry's blobs.
    if any(
        isinstance(endpoint, Endpoint) and is_final(error) for endpoint, error in failures.items()
    ):
        failures |= resting
    else:
        yield from resting
