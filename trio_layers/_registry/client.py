"""The registry client: from a reference to an image's documents, and to its layers' bytes.

It speaks the pull half of the OCI distribution specification, which is also that of Docker's
registry protocol, version 2.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Final, final

import attrs
import trio

from .._blocks import opens_block
from .._digest import Digest, parse_digest, parse_verifiable
from .._errors import ClientClosed, HostsError, ManifestError, VerificationError, is_final
from .._lifetime import Lifetime, while_open
from .._manifest import MAX_DOCUMENT_SIZE, Descriptor
from .._platform import Platform, parse_platform
from .._reference import Reference, parse_reference
from .._util import construct, made_by
from ..abc import BlobSink, ReportProgress
from .blobs import BlobChunks, BlobFetch, write_embedded
from .connections import Connections
from .credentials import CredentialsFor
from .documents import BLOBS, capabilities_for, fetch_manifest, read_verified
from .endpoints import Endpoint, Endpoints, try_each
from .error_responses import RateLimit
from .foreign_urls import ForeignURL
from .http import AsyncClient
from .listing import Lists
from .resolving import Known, ResolvedImage, Resolver
from .response import RegistryResponse
from .retries import Announce, Retries
from .tls import TLSConfig
from .transport import STALL_LIMIT

__all__ = ["RegistryClient", "RegistryStatistics", "open_registry_client"]

DEFAULT_MAX_CONNECTIONS: Final = 20


@attrs.frozen
class RegistryStatistics:
    """The present activity of a `RegistryClient`.

    Attributes:
        active: Number of requests in progress, bodies included.
        waiting: Number of requests that wait for the end of an active one.
        max_connections: The largest number of active requests.
    """

    active: int
    waiting: int
    max_connections: int


def _tell_nobody(action: str, current: int = 0, total: int = 0) -> None:
    """Ignore progress."""


@opens_block
async def open_registry_client(
    *,
    client: AsyncClient | None = None,
    credentials: CredentialsFor | None = None,
    plain_http: bool = False,
    tls_verify: bool = True,
    hosts_dir: str | os.PathLike[str] | None = None,
    stall_limit: float = STALL_LIMIT,
    max_connections: int = DEFAULT_MAX_CONNECTIONS,
    retry_tick: float = 1.0,
) -> AsyncIterator[RegistryClient]:
    """Open a client for all registries during the block.

    Leaving the block ends the calls of all tasks with `ClientClosed`.

    Cancellation: entering leaves nothing open.

    Args:
        client: The httpx client for the requests, which the caller closes. It must allow
            ``max_connections`` connections, and no other code should use it meanwhile: see
            encode/httpcore#961. ``None``: our own clients. They take proxies and certificates from
            the environment when a request needs them, use no proxy for this machine, and are closed
            when the block ends.
        credentials: The credentials for registries that want some. They are sent over plain HTTP
            only where plain HTTP is allowed.
        plain_http: Whether registries without HTTPS are asked over plain HTTP. Those on this
            machine always are.
        tls_verify: Whether our own clients check certificates.
        hosts_dir: A directory of containerd's configuration of hosts: mirrors, certificates. Hosts
            with certificates of their own there, or without verification, are always asked through
            our own clients. ``None``: no mirrors.
        stall_limit: Seconds without a byte that end a request. A request also ends if its response
            is so many seconds behind 1 KiB/s, or has not begun for several times as long (see
            ``docs/compatibility.md``, "Patience").
        max_connections: The largest number of requests in progress; further ones wait.
        retry_tick: Scales the random pauses between attempts: their seconds last this many real
            seconds.

    Raises:
        ValueError: if ``max_connections`` is less than 1, if ``stall_limit`` or ``retry_tick`` is
            not more than 0, or if ``tls_verify`` is false and ``client`` is given.
        HostsError: if ``hosts_dir`` is not a directory. Its files are read when a registry is first
            asked.
    """
    if max_connections < 1:
        raise ValueError(f"max_connections is {max_connections}: at least 1 is needed")
    if not stall_limit > 0:
        raise ValueError(f"stall_limit is {stall_limit}: more than 0 seconds are needed")
    if not retry_tick > 0:
        raise ValueError(f"retry_tick must be more than 0 seconds, not {retry_tick}")
    if client is not None and not tls_verify:
        raise ValueError("tls_verify is for our own client: make yours with verify=False")
    directory = None if hosts_dir is None else Path(hosts_dir)
    if directory is not None and not await trio.to_thread.run_sync(directory.is_dir):
        raise HostsError(str(directory), "it is no directory")

    async with Connections(
        client,
        TLSConfig(verify=tls_verify),
        max_connections=max_connections,
        stall_limit=stall_limit,
    ) as connections:
        endpoints = Endpoints(
            connections,
            credentials,
            plain_http=plain_http,
            tls_verify=tls_verify,
            hosts_dir=directory,
        )
        registry = construct(RegistryClient, connections, endpoints, retry_tick)
        try:
            yield registry
        finally:
            await registry._lifetime.close()


def _closed() -> ClientClosed:
    return ClientClosed("the registry client is closed: its block was left")


@made_by("open_registry_client")
@final
class RegistryClient:
    """Asks registries for images, tags, manifests, blobs and referrers.

    It comes from `open_registry_client`. References are `Reference` values, or texts as for
    `parse_reference`. A registry with several hosts is tried host by host. After a transient
    failure (no connection, a body cut short, a stall, 408, 429, 5xx) the client retries, with at
    most five attempts in all and random pauses of at most 0.5, 1, 2 and 4 seconds. `fetch_blob`
    retries only if a host sends ``Retry-After``.

    Any number of tasks may use the client at once.

    Cancellation: a cancelled call leaves nothing behind, except the bytes in a sink.

    When the block of `open_registry_client` ends, each running call in any task raises
    `ClientClosed`, and the block waits for these calls. Every later call raises `ClientClosed` at
    once.
    """

    def __init__(self, connections: Connections, endpoints: Endpoints, retry_tick: float) -> None:
        self._lifetime = Lifetime(_closed)
        self._connections = connections
        self._endpoints = endpoints
        self._retry_tick = retry_tick
        self._resolver = Resolver(endpoints, retry_tick)
        self._lists = Lists(endpoints, self._resolver)

    def __repr__(self) -> str:
        now = self.statistics()
        return (
            f"<RegistryClient: {now.active} of {now.max_connections} connections active, "
            f"{now.waiting} requests waiting>"
        )

    def statistics(self) -> RegistryStatistics:
        """Return the present activity of the client."""
        now = self._connections.limiter.statistics()
        return RegistryStatistics(now.borrowed_tokens, now.tasks_waiting, int(now.total_tokens))

    @property
    def rate_limits(self) -> dict[str, RateLimit]:
        """The rate limits that hosts have announced, by host.

        Docker Hub announces its limit, as ``registry-1.docker.io``.
        """
        return self._endpoints.rate_limits

    @while_open
    async def resolve(self, reference: Reference | str) -> Descriptor:
        """Ask for the descriptor of the manifest or index that a reference points to.

        The client sends a HEAD request, which Docker Hub does not count as a pull. If the registry
        refuses HEAD with any status, omits the digest or the size, or names another digest than the
        reference's, the client fetches the document itself.

        Cancellation: nothing is left behind.

        Returns:
            Media type, digest and size, as the registry gives them. They are verified only with the
                document.

        Raises:
            VerificationError: if the registry sends a document with another digest than the
                reference's.
            LayersError: as for `resolve_image`, except errors in the document.
        """
        reference = _parsed(reference)
        try:
            found, _ = await self._resolver.look_up(reference, None)
        except ManifestError as error:
            raise ManifestError(f"{reference}: {error}") from error
        return found

    @while_open
    async def resolve_image(
        self,
        reference: Reference | str,
        *,
        platform: Platform | str | None = None,
        known: Known | None = None,
        head_first: bool = False,
        announce: Announce | None = None,
    ) -> ResolvedImage:
        """Ask for the image of a reference on one platform: its manifest and config.

        Every document is checked against the digest and the size in its descriptor. The first
        document is checked against the reference's digest, or, by tag, against the digest that the
        registry announces. The first host that answers decides the meaning of a tag.

        Cancellation: nothing is left behind.

        Args:
            reference: The image's reference.
            platform: The platform to choose from an index, with containerd's fallbacks (see
                `trio_layers._platform.order`). ``None``: the host's. An image without an index then
                matches in any case.
            known: Returns documents that need not be requested.
            head_first: Whether ``known`` probably has the first document, too, once its digest is
                known. The digest is then requested first, as by `resolve`. If ``known`` lacks the
                document, or is not given, this costs one more request.
            announce: Receives a text such as ``Retrying in 2 seconds``, once a second, before each
                further attempt. Its exceptions pass through unchanged.

        Raises:
            PlatformError: if there is no image for the platform.
            ManifestError: if the registry has no valid image.
            VerificationError: if a document does not match its digest or size.
            NotFound: if the registry lacks the image.
            AuthenticationError: if the registry wants (other) credentials.
            RateLimited: if the registry asks to wait.
            RegistryError: if the registry fails otherwise, or cannot be reached.
            InvalidDigest: if the reference's digest is not a SHA-256 one.
            InvalidReference: if the reference does not follow the grammar, or its domain cannot be
                a host.
            HostsError: if the configuration of the registry cannot be used.
            NetworkSettingError: if an environment variable names an unusable proxy or certificate
                file.
            ClientClosed: if the client's block ended, before or during the call.
        """
        reference = _parsed(reference)
        if platform is not None and not isinstance(platform, Platform):
            platform = parse_platform(platform)
        try:
            return await self._resolver.resolve_image(
                reference, platform, known, head_first, announce
            )
        except ManifestError as error:
            raise ManifestError(f"{reference}: {error}") from error

    @while_open
    async def get_manifest(self, reference: Reference | str) -> tuple[Descriptor, bytes]:
        """Fetch the document of a reference as it was served: manifest, index or artifact.

        Cancellation: nothing is left behind.

        Returns:
            The descriptor and the bytes. They match the reference's digest; by tag, the digest that
                the registry announces.

        Raises:
            ManifestError: if the document is larger than 4 MiB.
            LayersError: as for `resolve_image`, except errors in the document.
        """
        reference = _parsed(reference)

        async def attempt(endpoint: Endpoint) -> tuple[Descriptor, bytes]:
            return await fetch_manifest(endpoint, reference)

        try:
            return await try_each(
                await self._endpoints.find(reference, *capabilities_for(reference)),
                attempt,
                self._resolver.retries(),
            )
        except ManifestError as error:
            raise ManifestError(f"{reference}: {error}") from error

    @while_open
    async def get_blob(
        self,
        reference: Reference | str,
        blob: Descriptor | str,
        *,
        max_size: int = MAX_DOCUMENT_SIZE,
    ) -> bytes:
        """Fetch a small blob, such as a config or a signature, verified.

        For a large blob use `open_blob`, or `fetch_blob`, which can resume.

        Cancellation: nothing is left behind.

        Args:
            reference: The blob's repository; its tag does not matter.
            blob: The blob's descriptor, or its digest alone.
            max_size: The largest size in bytes.

        Raises:
            InvalidDigest: if the digest cannot be verified.
            VerificationError: if the blob does not match, or is larger than ``max_size``.
            RegistryError: as for `resolve_image`.
        """
        reference = _parsed(reference)
        digest, size = _digest_and_size(blob)
        subject = f"blob {digest} of {reference.name}"
        if size is not None and size > max_size:
            raise VerificationError(
                f"{subject} has {size} bytes, which is more than {max_size}", digest=digest
            )

        async def attempt(endpoint: Endpoint | ForeignURL) -> bytes:
            path = f"blobs/{digest}"
            return await read_verified(
                endpoint, reference, path, subject, BLOBS, digest, size, max_size
            )

        return await try_each(
            await self._endpoints_for(reference, blob), attempt, self._resolver.retries()
        )

    @opens_block
    async def open_blob(
        self, reference: Reference | str, blob: Descriptor | str
    ) -> AsyncIterator[BlobChunks]:
        """Fetch a blob piece by piece during the block.

        The block holds a connection, and does not resume the blob if that breaks. Failed requests
        are retried until a response begins.

        Cancellation: entering leaves nothing open.

        Args:
            reference: The blob's repository; its tag does not matter.
            blob: The blob's descriptor, or its digest alone.

        Raises:
            InvalidDigest: if the digest cannot be verified.
            RegistryError: as for `resolve_image`, also while the blob is read.
        """
        reference = _parsed(reference)
        digest, size = _digest_and_size(blob)
        subject = f"blob {digest} of {reference.name}"
        async with AsyncExitStack() as stack:

            async def attempt(endpoint: Endpoint | ForeignURL) -> RegistryResponse:
                return await stack.enter_async_context(
                    endpoint.ask(reference, f"blobs/{digest}", subject, BLOBS)
                )

            async with self._lifetime.use():
                endpoints = await self._endpoints_for(reference, blob)
                answer = await try_each(endpoints, attempt, self._resolver.retries())
            yield construct(BlobChunks, answer, digest, size, self._lifetime)

    @while_open
    async def fetch_blob(
        self,
        reference: Reference | str,
        descriptor: Descriptor,
        sink: BlobSink,
        *,
        progress: ReportProgress = _tell_nobody,
    ) -> None:
        """Fetch a blob into a sink, which may already hold its beginning.

        The call returns once the sink holds the whole blob, verified. Failures are not retried,
        except after a ``Retry-After`` or, once, after wrong bytes. Another call may succeed unless
        the error is caused by `DoNotRetry`.

        An embedded blob (see `Descriptor.data`) needs no request. Any other blob is requested from
        the sink's end on, by Range. A response with the whole blob is accepted. If a server cannot
        continue there, or continues elsewhere, the whole blob is requested. At most one chunk more
        than the descriptor's size is read. ``Downloading`` is reported for each chunk, in bytes of
        the blob, then ``Verifying Checksum``, then ``Download complete``.

        With mirrors, one host goes on where another has failed. A foreign layer (see
        `Descriptor.is_foreign`) is requested at its URLs first, without credentials.

        Cancellation: as after an error, the received bytes stay in the sink, to be resumed.

        Args:
            reference: The blob's repository.
            descriptor: The blob's digest, and its size in bytes.
            sink: The target. Its exceptions come out unchanged.
            progress: Receives the reports. It does not wait.

        Raises:
            InvalidDigest: if the digest is not a SHA-256 one, as sinks have them.
            VerificationError: if the bytes do not match the digest, or are too many. The sink is
                empty then. The error is caused by `DoNotRetry` if the wrong bytes came twice, each
                time as the whole blob in one response, and from two hosts if there are two. It is
                not if the sink's earlier bytes may have been wrong: another attempt may succeed
                then.
            RegistryError: as for `resolve_image`; also if no bytes, or too few, arrived for the
                stall limit. The error is caused by `DoNotRetry` for client error statuses, except
                408, 416 and 429, and except most of those from a host that the registry redirected
                to.
        """
        reference = _parsed(reference)
        parse_digest(descriptor.digest)
        path = f"blobs/{descriptor.digest}"
        subject = f"blob {descriptor.digest} of {reference.name}"
        tried = False
        decoding: set[Endpoint | ForeignURL] = set()

        async def attempt(endpoint: Endpoint | ForeignURL) -> None:
            nonlocal tried

            def ask(headers: Mapping[str, str]) -> AbstractAsyncContextManager[RegistryResponse]:
                return endpoint.ask(reference, path, subject, {**BLOBS, **headers})

            of_another = tried and sink.offset > 0
            tried = True
            fetch = BlobFetch(descriptor, sink, progress, endpoint.tags, ask, endpoint in decoding)
            try:
                await fetch.run()
                return
            except VerificationError as error:
                if fetch.decoding:
                    decoding.add(endpoint)
                if not of_another or is_final(error):
                    raise
            # The previous host's bytes may have been the wrong ones. The sink has dropped them, so
            # fetch the whole blob from this host.
            await fetch.run()

        await trio.lowlevel.checkpoint()  # there may be nothing left to fetch
        if descriptor.data is not None:
            await write_embedded(descriptor.data, descriptor, sink, progress)
            return
        endpoints = await self._endpoints_for(reference, descriptor)
        retries = Retries(tick=self._retry_tick, only_if_asked=True)
        await try_each(endpoints, attempt, retries)

    @while_open
    async def tags(self, reference: Reference | str) -> tuple[str, ...]:
        """List a repository's tags, in the registry's order, which need not be alphabetical.

        Cancellation: nothing is left behind.

        Args:
            reference: The repository, ``debian`` or ``quay.io/org/name``; its tag does not matter.

        Raises:
            RegistryError: as for `resolve_image`; also if the list has no end.
        """
        return await self._lists.tags(_parsed(reference))

    @while_open
    async def referrers(
        self, reference: Reference | str, *, artifact_type: str | None = None
    ) -> tuple[Descriptor, ...]:
        """List the referrers of an image: signatures, SBOMs, attestations.

        See the OCI distribution specification, "Listing Referrers". A registry without this API is
        asked for the tag that the specification has in its place, ``sha256-…``. The registry may
        lack listed manifests.

        Cancellation: nothing is left behind.

        Args:
            reference: The image. A tag of an image for several platforms stands for the index.
            artifact_type: The type of the wanted referrers; ``None``: all types.

        Returns:
            The descriptors of the referrers' manifests; empty if the registry knows none.

        Raises:
            ManifestError: if the registry sends an invalid list.
            LayersError: as for `resolve_image`.
        """
        reference = _parsed(reference)
        digest = reference.digest or (await self.resolve(reference)).digest
        try:
            found = await self._lists.referrers(reference, digest, artifact_type)
        except ManifestError as error:
            raise ManifestError(f"the referrers of {reference}: {error}") from error
        # Some registries do not filter.
        return tuple(
            each for each in found if artifact_type is None or each.artifact_type == artifact_type
        )

    async def _endpoints_for(
        self, reference: Reference, blob: Descriptor | str
    ) -> list[Endpoint | ForeignURL]:
        """Return the hosts and URLs to ask for a blob."""
        endpoints = await self._endpoints.find(reference, "pull")
        if isinstance(blob, str):
            return [*endpoints]
        return [*self._endpoints.elsewhere(reference, blob), *endpoints]


def _parsed(reference: Reference | str) -> Reference:
    if not isinstance(reference, Reference):
        reference = parse_reference(reference)
    if reference.digest is not None:
        parse_digest(reference.digest)
    return reference


def _digest_and_size(blob: Descriptor | str) -> tuple[Digest, int | None]:
    if isinstance(blob, Descriptor):
        return blob.digest, blob.size
    return parse_verifiable(blob), None
