"""The registry client: from a reference to an image's documents, and to its layers' bytes.

It speaks the pull half of the OCI distribution specification, which is also that of Docker's
registry protocol, version 2.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, TypeAlias, TypeVar, TypeVarTuple, Unpack, final

import attrs
import trio

from .._choice import MAX_INDEX_DEPTH, check_platform, choose_image
from .._digest import DiffID, Digest, digest_of, parse_digest
from .._errors import HostsError, LayersError, ManifestError, VerificationError
from .._manifest import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_DOCUMENT_SIZE,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    check_image,
    check_layer_count,
    decode_config,
    decode_manifest,
)
from .._platform import Platform, host_platform
from .._reference import Reference
from ..abc import BlobSink, ReportProgress
from .answers import RateLimit, is_final
from .blobs import BlobFetch
from .credentials import CredentialsFor
from .http import AsyncClient, InvalidURL, new_client
from .sites import Site, Sites, ask_in_turn
from .transport import STALL_LIMIT, Answer, Connections
from .trust import Trust, make_context

__all__ = ["RegistryClient", "RegistryStatistics", "ResolvedImage", "open_registry_client"]

DEFAULT_MAX_CONNECTIONS: Final = 20
# Larger documents are decoded in a thread: 64 KiB of JSON take about a millisecond.
INLINE_SIZE: Final = 64 * 1024

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_ACCEPT: Final = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))


@attrs.frozen
class ResolvedImage:
    """What a reference stands for, for one platform: every document of it, verified.

    Attributes:
        reference: What was asked for.
        descriptor: The image's manifest: its digest identifies the image.
        manifest: The manifest, decoded.
        manifest_bytes: The manifest as it was served.
        config: The image's config, decoded; ``config.raw`` is as it was served.
        index: The index in which the manifest was found; ``None`` if the reference leads to the
            manifest itself.
        index_bytes: The index as it was served.
    """

    reference: Reference
    descriptor: Descriptor
    manifest: Manifest
    manifest_bytes: bytes = attrs.field(repr=False)
    config: ImageConfig
    index: Descriptor | None = None
    index_bytes: bytes | None = attrs.field(default=None, repr=False)

    @property
    def layers(self) -> tuple[Descriptor, ...]:
        """The layers' blobs, bottom first."""
        return self.manifest.layers

    @property
    def diff_ids(self) -> tuple[DiffID, ...]:
        """What the layers hash to once decompressed; as many as `layers`, in the same order."""
        return self.config.diff_ids

    @property
    def config_bytes(self) -> bytes:
        """The image's config as it was served."""
        return self.config.raw


@attrs.frozen
class RegistryStatistics:
    """What a `RegistryClient` is doing.

    Attributes:
        active: Requests under way, bodies included.
        waiting: Requests that wait for one of those to end.
        max_connections: How many may be active.
    """

    active: int
    waiting: int
    max_connections: int


Known: TypeAlias = Callable[[Digest], Awaitable[bytes | None]]
"""Gives the document of a digest, if it is at hand."""


@asynccontextmanager
async def open_registry_client(
    *,
    client: AsyncClient | None = None,
    credentials: CredentialsFor | None = None,
    plain_http: bool = False,
    tls_verify: bool = True,
    hosts_dir: str | os.PathLike[str] | None = None,
    stall_limit: float = STALL_LIMIT,
    max_connections: int = DEFAULT_MAX_CONNECTIONS,
) -> AsyncIterator[RegistryClient]:
    """Open a client for all registries, for as long as the block runs.

    Args:
        client: Sends the requests, and is closed by whoever made it. It must allow
            ``max_connections`` connections, and nothing else should use it meanwhile: see
            encode/httpcore#961. ``None``: one of our own, which takes proxies and certificates
            from the environment, asks this machine without a proxy, and closes its connections
            at the end.
        credentials: For those who ask for them. They are sent over plain HTTP only where that
            may be used at all.
        plain_http: Whether registries that do not answer over HTTPS are asked over plain HTTP.
            Those on this machine always are.
        tls_verify: Whether certificates are checked, by our own client.
        hosts_dir: A directory of containerd's configuration of hosts: mirrors, certificates. Who
            has certificates of its own there, or need not have a valid one, is asked by a client
            of ours in any case. ``None``: every registry is asked itself.
        stall_limit: Seconds without a byte after which a request is given up.
        max_connections: How many requests are under way at once; more wait.

    Raises:
        ValueError: if ``max_connections`` is less than 1, if ``stall_limit`` is not more than 0,
            or if ``tls_verify`` is switched off for a client that was given.
        HostsError: if ``hosts_dir`` is no directory. What is in it is looked at when a registry is
            first asked.
        LayersError: if the environment's proxies or certificates cannot be used.
    """
    if max_connections < 1:
        raise ValueError(f"max_connections is {max_connections}: at least 1 is needed")
    if not stall_limit > 0:
        raise ValueError(f"stall_limit is {stall_limit}: more than 0 seconds are needed")
    if client is not None and not tls_verify:
        raise ValueError("tls_verify is for our own client: make yours with verify=False")
    directory = None if hosts_dir is None else Path(hosts_dir)
    if directory is not None and not await trio.to_thread.run_sync(directory.is_dir):
        raise HostsError(str(directory), "it is no directory")

    def make(trust: Trust) -> AsyncClient:
        return _make_client(trust, max_connections)

    async with AsyncExitStack() as stack:
        if client is None:
            own = await trio.to_thread.run_sync(_make_client, tls_verify, max_connections)
            client = await stack.enter_async_context(own)
        connections = await stack.enter_async_context(
            Connections(client, make, max_connections=max_connections, stall_limit=stall_limit)
        )
        sites = Sites(
            connections,
            credentials,
            plain_http=plain_http,
            tls_verify=tls_verify,
            hosts_dir=directory,
        )
        yield RegistryClient(connections, sites)


def _make_client(trust: bool | Trust, max_connections: int) -> AsyncClient:
    try:
        verify = trust if isinstance(trust, bool) else make_context(trust)
        return new_client(verify, max_connections)
    except InvalidURL:
        # What it says may be a part of a proxy's password: it takes that for the port, if there
        # is a slash in it. Nothing is raised in here, which would be shown together with it.
        problem, cause = "one of them is no URL", None
    except (OSError, ValueError, ImportError) as error:
        problem, cause = str(error), error
    raise LayersError(
        "a proxy or a certificate file that the environment names (HTTPS_PROXY, ALL_PROXY, "
        f"NO_PROXY, SSL_CERT_FILE and their like) cannot be used: {problem}"
    ) from cause


@final
class RegistryClient:
    """Asks registries for images. It comes from `open_registry_client`.

    All of it may be used by any number of tasks at once. A call that is cancelled leaves
    nothing behind but what a sink was given.
    """

    def __init__(self, connections: Connections, sites: Sites) -> None:
        self._connections = connections
        self._sites = sites

    def __repr__(self) -> str:
        now = self.statistics()
        return (
            f"<RegistryClient: {now.active} of {now.max_connections} connections active, "
            f"{now.waiting} requests waiting>"
        )

    def statistics(self) -> RegistryStatistics:
        """What the client is doing now."""
        now = self._connections.limiter.statistics()
        return RegistryStatistics(now.borrowed_tokens, now.tasks_waiting, int(now.total_tokens))

    @property
    def rate_limits(self) -> dict[str, RateLimit]:
        """What hosts have said of how many requests are left, by name, if they did: Docker Hub
        does, as ``registry-1.docker.io``."""
        return self._sites.rate_limits

    async def resolve(
        self,
        reference: Reference,
        *,
        platform: Platform | None = None,
        known: Known | None = None,
    ) -> ResolvedImage:
        """Ask what a reference stands for now: manifest and config, for one platform.

        Every document is checked against the digest and the size by which it was found; the
        first against the reference's digest, or, by tag, against the digest that the registry
        says it has. Each document is asked for at one host after the other, where there are
        several; nothing is tried twice there. A tag means what the first says that answers.

        Args:
            reference: What to ask for.
            platform: Which of an index's images, with containerd's fallbacks (see
                `trio_layers._platform.order`). ``None``: the host's; then an image that is not
                in an index is taken whatever it is for.
            known: Gives documents that need not be asked for.

        Raises:
            PlatformError: if there is no image for the platform.
            ManifestError: if what the registry has is no valid image.
            VerificationError: if what came is not what was asked for.
            NotFound: if the registry does not have it.
            AuthenticationError: if it wants (other) credentials.
            RateLimited: if it asks for patience.
            RegistryError: if it fails otherwise, or cannot be reached.
            InvalidDigest: if the reference's digest is not a SHA-256 one.
            InvalidReference: if its domain cannot be a host.
            HostsError: if what is configured for it cannot be used.
        """
        if reference.digest is not None:
            parse_digest(reference.digest)
        try:
            return await self._resolve(reference, platform, known or _unknown)
        except ManifestError as error:
            raise ManifestError(f"{reference}: {error}") from error

    async def _resolve(
        self, reference: Reference, platform: Platform | None, known: Known
    ) -> ResolvedImage:
        index: Descriptor | None = None
        index_bytes: bytes | None = None
        wanted = platform or host_platform()
        descriptor, data, document = await self._get_manifest(reference)
        for _ in range(MAX_INDEX_DEPTH):
            if not isinstance(document, Index):
                break
            if index is None:
                index, index_bytes = descriptor, data
            descriptor = choose_image(str(reference), document, wanted)
            data = await self._get_document(reference, "manifests", descriptor, known)
            document = await _decode(decode_manifest, data, descriptor.media_type)
        if isinstance(document, Index):
            raise ManifestError(f"more than {MAX_INDEX_DEPTH} indexes lead to one another")

        check_image(document)
        config_bytes = await self._get_document(reference, "blobs", document.config, known)
        config = await _decode(decode_config, config_bytes)
        check_layer_count(document, config)
        # An index's entry need not say what it is for, and an image alone never does.
        said = index is not None and descriptor.platform is not None
        matters = not said and (index is not None or platform is not None)
        if matters:
            check_platform(str(reference), config.platform, wanted)
        return ResolvedImage(reference, descriptor, document, data, config, index, index_bytes)

    async def fetch_blob(
        self,
        reference: Reference,
        descriptor: Descriptor,
        sink: BlobSink,
        progress: ReportProgress,
    ) -> None:
        """Bring a blob into a sink, which may have some of it already; returns when all of it
        is there and verified. One attempt: what it raises says whether another is worth it.

        It continues where the sink ends, by Range. A server that sends the whole blob instead
        is taken at that; one that cannot continue there, or says that it continues elsewhere,
        is asked for the whole. Never is more read than the descriptor's size, but for a chunk.
        ``Downloading`` is reported for each chunk, in bytes of the blob, then
        ``Verifying Checksum``, then ``Download complete``.

        Where there are mirrors, one host goes on where the other has failed.

        Cancelled, or failed halfway, what is there stays in the sink, to be resumed.

        Args:
            reference: In whose repository it is.
            descriptor: Digest, and size in bytes.
            sink: Where it goes. What it raises comes out as it is.
            progress: Is told. It does not wait.

        Raises:
            VerificationError: if the bytes are not those of the digest, or too many. The sink
                is empty then. If all came in one answer it is caused by `DoNotRetry`; if what
                was there before may be to blame, another attempt may do better.
            RegistryError: as for `resolve`; caused by `DoNotRetry` for statuses of the client's
                fault, except 408, 416 and 429. Also if nothing came for as long as the stall limit.
        """
        path = f"blobs/{descriptor.digest}"
        what = f"blob {descriptor.digest} of {reference.name}"
        tried = False

        async def attempt(site: Site) -> None:
            nonlocal tried

            def ask(headers: Mapping[str, str]) -> AbstractAsyncContextManager[Answer]:
                return site.ask(reference, path, what, headers)

            of_another = tried and sink.offset > 0
            tried = True
            fetch = BlobFetch(descriptor, sink, progress, site.tags, ask)
            try:
                await fetch.run()
            except VerificationError as error:
                if not of_another or is_final(error):
                    raise
                # What the other sent may be to blame. It is dropped: now all of it from this one.
                await fetch.run()

        await trio.lowlevel.checkpoint()  # there may be nothing left to fetch
        await ask_in_turn(await self._sites.find(reference, "pull"), attempt)

    async def _get_manifest(
        self, reference: Reference
    ) -> tuple[Descriptor, bytes, Manifest | Index]:
        """The document that the reference leads to, verified as far as can be."""
        path = f"manifests/{reference.fetched_by}"
        what = f"the manifest of {reference}"

        async def attempt(site: Site) -> tuple[Descriptor, bytes, Manifest | Index]:
            async with site.ask(reference, path, what, {"Accept": _ACCEPT}) as answer:
                content_type: str = answer.headers.get("Content-Type", "")
                promised = reference.digest or answer.headers.get("Docker-Content-Digest")
                data = await answer.read(MAX_DOCUMENT_SIZE)
            if len(data) > MAX_DOCUMENT_SIZE:
                raise ManifestError(f"the manifest is larger than {MAX_DOCUMENT_SIZE} bytes")
            digest = digest_of(data)
            # A digest of another algorithm is one that cannot be checked.
            if promised is not None and promised.startswith("sha256:") and promised != digest:
                promised = answer.readable(promised)
                raise VerificationError(
                    f"{answer.host} sent {digest} as {what}, which should be {promised}",
                    digest=promised,
                )
            media_type = content_type.partition(";")[0].strip().lower()
            # In here, since a mirror may answer with whatever page it has.
            document = await _decode(decode_manifest, data, media_type)
            return Descriptor(media_type, digest, len(data)), data, document

        needed = ("pull",) if reference.digest is not None else ("pull", "resolve")
        return await ask_in_turn(await self._sites.find(reference, *needed), attempt)

    async def _get_document(
        self, reference: Reference, kind: str, descriptor: Descriptor, known: Known
    ) -> bytes:
        """A manifest (``manifests``) or config (``blobs``) by descriptor, verified."""
        digest, size = descriptor.digest, descriptor.size
        if size > MAX_DOCUMENT_SIZE:
            raise ManifestError(f"{digest} has {size} bytes, more than {MAX_DOCUMENT_SIZE}")
        there = await known(digest)
        if there is not None and len(there) == size and digest_of(there) == digest:
            return there
        what = f"{descriptor.media_type} {digest} of {reference}"
        headers = {"Accept": descriptor.media_type}

        async def attempt(site: Site) -> bytes:
            async with site.ask(reference, f"{kind}/{digest}", what, headers) as answer:
                data = await answer.read(size)
            if len(data) != size or digest_of(data) != digest:
                raise VerificationError(
                    f"what {answer.host} sent as {what} is not that: its digest or size differs",
                    digest=digest,
                )
            return data

        return await ask_in_turn(await self._sites.find(reference, "pull"), attempt)


async def _unknown(digest: Digest) -> bytes | None:
    return None


async def _decode(decode: Callable[[bytes, Unpack[Ts]], T], data: bytes, *args: *Ts) -> T:
    if len(data) <= INLINE_SIZE:
        return decode(data, *args)
    return await trio.to_thread.run_sync(decode, data, *args)
