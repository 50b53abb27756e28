"""The registry client: from a reference to an image's documents, and to its layers' bytes.

It speaks the pull half of the OCI distribution specification, which is also that of Docker's
registry protocol, version 2.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias, TypeVar, TypeVarTuple, Unpack, final
from urllib.parse import urlencode

import attrs
import trio

from .._blocks import opens_block
from .._digest import DiffID, Digest, digest_of, parse_digest, parse_verifiable
from .._errors import (
    ClientClosed,
    HostsError,
    InvalidDigest,
    ManifestError,
    NotFound,
    RegistryError,
    VerificationError,
    is_final,
)
from .._lifetime import Lifetime, while_open
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
from .._offload import run_large
from .._platform import Platform, host_platform, parse_platform
from .._reference import Reference, parse_reference
from .._select import MAX_INDEX_DEPTH, check_platform, choose_image
from ..abc import BlobSink, ReportProgress
from .answers import RateLimit, mark_final
from .blobs import BlobChunks, BlobFetch, write_embedded
from .credentials import CredentialsFor
from .encoding import coding_of, looks_like_json, named_encoding, read_fitting
from .endpoints import Endpoint, Endpoints, try_each
from .foreign_urls import ForeignURL
from .http import AsyncClient, never_connected
from .pagination import Pages, decode_tags
from .retries import Announce, Retries, is_transient
from .tls import TLSConfig
from .transport import STALL_LIMIT, Connections, RegistryResponse

__all__ = ["RegistryClient", "RegistryStatistics", "ResolvedImage", "open_registry_client"]

log = logging.getLogger("trio_layers.registry")

DEFAULT_MAX_CONNECTIONS: Final = 20
# Larger documents are decoded in a thread, because 16 KiB of JSON already take a millisecond.
INLINE_SIZE: Final = 16 * 1024
LARGE_SIZE: Final = 256 * 1024

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# "*/*" is there because some servers answer 406 if they know a document by another media type than
# those listed (RFC 9110, 12.5.1).
_MANIFESTS: Final = {"Accept": ", ".join((*MANIFEST_TYPES, *INDEX_TYPES, "*/*"))}
_BLOBS: Final = {"Accept": "*/*"}
_JSON: Final = {"Accept": "application/json, */*"}
_REFERRERS: Final = {"Accept": f"{INDEX_TYPES[0]}, */*"}

_PAGE: Final = 1000
"""How many tags are asked for at once: no registry known to us allows more."""
_NO_LENGTH: Final = (400, 416, 422, 501)
"""Statuses of registries that refuse this page size."""
_NO_REFERRERS: Final = (400, 404, 405, 406, 501)
"""Answers of registries that do not know such requests."""

_SIZE = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)


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


def _tell_nobody(action: str, current: int = 0, total: int = 0) -> None:
    """Progress that nobody wants."""


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
    """Open a client for all registries, for as long as the block runs.

    Args:
        client: Sends the requests, and is closed by whoever made it. It must allow
            ``max_connections`` connections, and nothing else should use it meanwhile: see
            encode/httpcore#961. ``None``: clients of our own. They take proxies and certificates
            from the environment when a request needs them, use no proxy for this machine, and
            are closed when the block ends.
        credentials: For those who ask for them. They are sent over plain HTTP only where that
            may be used at all.
        plain_http: Whether registries that do not answer over HTTPS are asked over plain HTTP.
            Those on this machine always are.
        tls_verify: Whether certificates are checked, by our own client.
        hosts_dir: A directory of containerd's configuration of hosts: mirrors, certificates. Who
            has certificates of its own there, or need not have a valid one, is asked by a client
            of ours in any case. ``None``: every registry is asked itself.
        stall_limit: Seconds without a byte after which a request is given up; so is one whose
            answer is so many seconds behind 1 KiB/s, or has not begun for several times as long
            (see ``docs/compatibility.md``, "Patience").
        max_connections: How many requests are under way at once; more wait.
        retry_tick: Scales the random pauses between attempts: their seconds last this many real
            seconds.

    Raises:
        ValueError: if ``max_connections`` is less than 1, if ``stall_limit`` or ``retry_tick`` is
            not more than 0, or if ``tls_verify`` is false and ``client`` is given.
        HostsError: if ``hosts_dir`` is no directory. What is in it is looked at when a registry is
            first asked.
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
        registry = RegistryClient(connections, endpoints, retry_tick)
        try:
            yield registry
        finally:
            await registry._lifetime.close()


def _closed() -> ClientClosed:
    return ClientClosed("the registry client is closed: its block was left")


@final
class RegistryClient:
    """Asks registries for images and whatever else they have. It comes from
    `open_registry_client`.

    References are `Reference` values, or texts as `parse_reference` takes them. A registry with
    several hosts is tried host by host. After a transient failure (no connection, a body cut short,
    a stall, 408, 429, 5xx) the client retries, with at most five attempts in all and random pauses
    of at most 0.5, 1, 2 and 4 seconds. `fetch_blob` retries only if a host sends ``Retry-After``.

    All of it may be used by any number of tasks at once. A call that is cancelled leaves
    nothing behind but what a sink was given.

    When the block of `open_registry_client` ends, each call under way in any task raises
    `ClientClosed`, and the block waits for these calls. Every later call raises `ClientClosed` at
    once.
    """

    def __init__(self, connections: Connections, endpoints: Endpoints, retry_tick: float) -> None:
        self._lifetime = Lifetime(_closed)
        self._connections = connections
        self._endpoints = endpoints
        self._retry_tick = retry_tick

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
        does, as ``registry-1.docker.io``.
        """
        return self._endpoints.rate_limits

    @while_open
    async def resolve(self, reference: Reference | str) -> Descriptor:
        """Ask which manifest or index a reference stands for now.

        The client sends a HEAD request, which Docker Hub does not count as a pull. If the registry
        refuses HEAD with any status, omits the digest or the size, or names another digest than
        the reference's, the client fetches the document itself.

        Returns:
            What the registry says: media type, digest and size. Nothing of it is verified
            before the document is there.

        Raises:
            VerificationError: if the registry sends a document with another digest than the
                reference's.
            LayersError: as for `resolve_image`, where it is no matter of the document.
        """
        reference = _parsed(reference)
        try:
            found, _ = await self._look_up(reference, None)
        except ManifestError as error:
            raise ManifestError(f"{reference}: {error}") from error
        return found

    async def _look_up(
        self, reference: Reference, announce: Announce | None
    ) -> tuple[Descriptor, bytes | None]:
        """With the document, if that had to be fetched."""
        path = f"manifests/{reference.fetched_by}"
        what = f"the manifest of {reference}"

        async def attempt(endpoint: Endpoint) -> tuple[Descriptor, bytes | None]:
            try:
                async with endpoint.ask(reference, path, what, _MANIFESTS, "HEAD") as answer:
                    found = _descriptor_of(answer)
                if found is not None and reference.digest in (None, found.digest):
                    return found, None
            except RegistryError as error:
                if never_connected(error.__cause__):
                    raise
                # Some registries refuse HEAD alone, with any status. If GET fails as well, the
                # error of GET is raised.
                log.debug("HEAD is refused, and GET tried: %s", error)
            return await _fetch_manifest(endpoint, reference)

        endpoints = await self._endpoints.find(reference, *_needed(reference))
        return await try_each(endpoints, attempt, self._retries(announce))

    def _retries(self, announce: Announce | None = None) -> Retries:
        return Retries(announce, tick=self._retry_tick)

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
        """Ask what image a reference stands for now: manifest and config, for one platform.

        Every document is checked against the digest and the size by which it was found; the
        first against the reference's digest, or, by tag, against the digest that the registry
        says it has. A tag means what the first host says that answers.

        Args:
            reference: What to ask for.
            platform: Which of an index's images, with containerd's fallbacks (see
                `trio_layers._platform.order`). ``None``: the host's; then an image that is not
                in an index is taken whatever it is for.
            known: Gives documents that need not be asked for.
            head_first: Whether ``known`` probably gives the first document, too, once its digest is
                known. That is asked for first then, as by `resolve`: where ``known`` does not give
                it, or there is none, this is a request more.
            announce: Receives a text such as ``Retrying in 2 seconds``, once a second, before each
                further attempt. Its exceptions pass through unchanged.

        Raises:
            PlatformError: if there is no image for the platform.
            ManifestError: if what the registry has is no valid image.
            VerificationError: if what came is not what was asked for.
            NotFound: if the registry does not have it.
            AuthenticationError: if it wants (other) credentials.
            RateLimited: if it asks for patience.
            RegistryError: if it fails otherwise, or cannot be reached.
            InvalidDigest: if the reference's digest is not a SHA-256 one.
            InvalidReference: if it does not follow the grammar, or its domain cannot be a host.
            HostsError: if what is configured for it cannot be used.
            NetworkSettingError: if an environment variable names an unusable proxy or certificate
                file.
            ClientClosed: if the client's block ended, before or during the call.
        """
        reference = _parsed(reference)
        if platform is not None and not isinstance(platform, Platform):
            platform = parse_platform(platform)
        try:
            return await self._resolve_image(
                reference, platform, known or _unknown, head_first, announce
            )
        except ManifestError as error:
            raise ManifestError(f"{reference}: {error}") from error

    async def _resolve_image(
        self,
        reference: Reference,
        platform: Platform | None,
        known: Known,
        head_first: bool,
        announce: Announce | None,
    ) -> ResolvedImage:
        index: Descriptor | None = None
        index_bytes: bytes | None = None
        wanted = platform or host_platform()
        first = await self._recall_manifest(reference, known, announce) if head_first else None
        descriptor, data, document = first or await self._find_manifest(reference, announce)
        first = None
        for _ in range(MAX_INDEX_DEPTH):
            if not isinstance(document, Index):
                break
            if index is None:
                index, index_bytes = descriptor, data
            last_reference = [document]
            del document
            descriptor = await _decode(_choose, data, str(reference), last_reference, wanted)
            data = await self._get_document(
                reference, "manifests", _MANIFESTS, descriptor, known, announce
            )
            document = await _decode(decode_manifest, data, descriptor.media_type)
        if isinstance(document, Index):
            raise ManifestError(f"more than {MAX_INDEX_DEPTH} indexes lead to one another")

        await _decode(_check_image, data, document)
        config_bytes = await self._get_document(
            reference, "blobs", _BLOBS, document.config, known, announce
        )
        listed = None if index is None else descriptor.platform
        config = await _decode(decode_config, config_bytes, listed)
        check_layer_count(document, config)
        # An index's entry need not say what it is for, and an image alone never does.
        said = index is not None and descriptor.platform is not None
        matters = not said and (index is not None or platform is not None)
        if matters:
            check_platform(str(reference), config.platform, wanted)
        return ResolvedImage(reference, descriptor, document, data, config, index, index_bytes)

    @while_open
    async def get_manifest(self, reference: Reference | str) -> tuple[Descriptor, bytes]:
        """Fetch the document that a reference stands for, as it was served, of whatever kind:
        an index, an image's manifest or an artifact's.

        Returns:
            Its media type, digest and size, and its bytes. They are those of the reference's
            digest; by tag, those of the digest that the registry says it has.

        Raises:
            ManifestError: if it is larger than 4 MiB.
            LayersError: as for `resolve_image`, where it is no matter of what is in it.
        """
        reference = _parsed(reference)

        async def attempt(endpoint: Endpoint) -> tuple[Descriptor, bytes]:
            return await _fetch_manifest(endpoint, reference)

        try:
            return await try_each(
                await self._endpoints.find(reference, *_needed(reference)), attempt, self._retries()
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
        """Fetch a small blob, such as a config or a signature, verified. For a large one there
        are `open_blob`, and `fetch_blob`, which resumes it.

        Args:
            reference: In whose repository it is; its tag does not matter.
            blob: Its descriptor, or its digest alone.
            max_size: How many bytes it may have.

        Raises:
            InvalidDigest: if its digest cannot be verified.
            VerificationError: if what came is not that, or larger than ``max_size``.
            RegistryError: as for `resolve_image`.
        """
        reference = _parsed(reference)
        digest, size = _digest_and_size(blob)
        what = f"blob {digest} of {reference.name}"
        if size is not None and size > max_size:
            raise VerificationError(
                f"{what} has {size} bytes, which is more than {max_size}", digest=digest
            )

        async def attempt(endpoint: Endpoint | ForeignURL) -> bytes:
            path = f"blobs/{digest}"
            return await _read(endpoint, reference, path, what, _BLOBS, digest, size, max_size)

        return await try_each(await self._sites_of(reference, blob), attempt, self._retries())

    @opens_block
    async def open_blob(
        self, reference: Reference | str, blob: Descriptor | str
    ) -> AsyncIterator[BlobChunks]:
        """Fetch a blob piece by piece during the block.

        The block holds a connection, and the blob is not resumed if that breaks. Failed requests
        are retried until an answer begins.

        Args:
            reference: In whose repository it is; its tag does not matter.
            blob: Its descriptor, or its digest alone.

        Raises:
            InvalidDigest: if its digest cannot be verified.
            RegistryError: as for `resolve_image`; and while it is read.
        """
        reference = _parsed(reference)
        digest, size = _digest_and_size(blob)
        what = f"blob {digest} of {reference.name}"
        async with AsyncExitStack() as stack:

            async def attempt(endpoint: Endpoint | ForeignURL) -> RegistryResponse:
                return await stack.enter_async_context(
                    endpoint.ask(reference, f"blobs/{digest}", what, _BLOBS)
                )

            async with self._lifetime.use():
                endpoints = await self._sites_of(reference, blob)
                answer = await try_each(endpoints, attempt, self._retries())
            yield BlobChunks(answer, digest, size, self._lifetime)

    @while_open
    async def fetch_blob(
        self,
        reference: Reference | str,
        descriptor: Descriptor,
        sink: BlobSink,
        progress: ReportProgress = _tell_nobody,
    ) -> None:
        """Fetch a blob into a sink, which may hold its beginning already.

        This returns once the sink holds the whole blob, verified. Failures are not retried, except
        after a ``Retry-After`` or, once, after wrong bytes. Another call may succeed unless the
        error is caused by `DoNotRetry`.

        A blob that its descriptor embeds (see `Descriptor.data`) needs no request. Any other blob
        is requested from the sink's end on, by Range. A server that sends the whole blob instead
        is taken at that; one that cannot continue there, or says that it continues elsewhere,
        is asked for the whole. Never is more read than the descriptor's size, but for a chunk.
        ``Downloading`` is reported for each chunk, in bytes of the blob, then
        ``Verifying Checksum``, then ``Download complete``.

        Where there are mirrors, one host goes on where the other has failed. A foreign layer (see
        `Descriptor.is_foreign`) is asked for at its URLs first, without credentials.

        Cancelled, or failed halfway, what is there stays in the sink, to be resumed.

        Args:
            reference: In whose repository it is.
            descriptor: Digest, and size in bytes.
            sink: Where it goes. What it raises comes out as it is.
            progress: Is told; by default nobody is. It does not wait.

        Raises:
            InvalidDigest: if its digest is not a SHA-256 one, as sinks have them.
            VerificationError: if the bytes are not those of the digest, or too many. The sink
                is empty then. The error is caused by `DoNotRetry` if the wrong bytes came twice,
                each time as the whole blob in one answer, and from two hosts where there are two.
                It is not if the sink's earlier bytes may have been wrong: another attempt may
                succeed then.
            RegistryError: as for `resolve_image`; also if no bytes, or too few, arrived for the
                stall limit. The error is caused by `DoNotRetry` for client error statuses, except
                408, 416 and 429, and except most of those from a host that the registry redirected
                to.
        """
        reference = _parsed(reference)
        parse_digest(descriptor.digest)
        path = f"blobs/{descriptor.digest}"
        what = f"blob {descriptor.digest} of {reference.name}"
        tried = False
        decoding: set[Endpoint | ForeignURL] = set()

        async def attempt(endpoint: Endpoint | ForeignURL) -> None:
            nonlocal tried

            def ask(headers: Mapping[str, str]) -> AbstractAsyncContextManager[RegistryResponse]:
                return endpoint.ask(reference, path, what, {**_BLOBS, **headers})

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
        endpoints = await self._sites_of(reference, descriptor)
        retries = Retries(tick=self._retry_tick, only_if_asked=True)
        await try_each(endpoints, attempt, retries)

    @while_open
    async def tags(self, reference: Reference | str) -> tuple[str, ...]:
        """List a repository's tags, in the registry's order, which should be the alphabet's and
        often is not.

        Args:
            reference: The repository, ``debian`` or ``quay.io/org/name``; its tag does not matter.

        Raises:
            RegistryError: as for `resolve_image`; also if the list has no end.
        """
        reference = _parsed(reference)
        what = f"the tags of {reference.name}"
        retries = self._retries()
        # Keep the pages that each host has sent: the next attempt continues at the failed page.
        begun: dict[Endpoint, tuple[Pages, dict[str, None]]] = {}

        async def attempt(endpoint: Endpoint) -> tuple[str, ...]:
            try:
                return await listed(endpoint, f"n={_PAGE}")
            except RegistryError as error:
                if error.status not in _NO_LENGTH:
                    raise
            begun.pop(endpoint, None)
            return await listed(endpoint, "")

        async def listed(endpoint: Endpoint, query: str) -> tuple[str, ...]:
            def open_page(query: str) -> AbstractAsyncContextManager[RegistryResponse]:
                return endpoint.ask(reference, f"tags/list?{query}".rstrip("?"), what, _JSON)

            pages, tags = begun.pop(endpoint, (Pages(query, what, open_page, "list"), {}))
            try:
                async for page in pages:
                    await _decode(_add_tags, page.data, page.host, tags)
                    retries.reset()
            except RegistryError as error:
                if is_transient(error):
                    begun[endpoint] = pages, tags
                raise
            return tuple(tags)

        endpoints = await self._endpoints.find(reference, "pull", "resolve")
        return await try_each(endpoints, attempt, retries)

    @while_open
    async def referrers(
        self, reference: Reference | str, *, artifact_type: str | None = None
    ) -> tuple[Descriptor, ...]:
        """List what refers to an image: signatures, SBOMs, attestations (OCI distribution
        specification, "Listing Referrers").

        A registry without that API is asked for the tag that the specification has in its place,
        ``sha256-…``. Nothing says that what is listed is there.

        Args:
            reference: Whose; by tag, what the tag stands for now, which for an image for several
                platforms is the index.
            artifact_type: Only those of this type.

        Returns:
            Their manifests; none where nothing is known of any.

        Raises:
            ManifestError: if the list is none.
            LayersError: as for `resolve_image`.
        """
        reference = _parsed(reference)
        digest = reference.digest or (await self.resolve(reference)).digest
        try:
            found = await self._list_referrers(reference, digest, artifact_type)
            if found is None:
                found = await self._tagged_referrers(reference, digest)
        except ManifestError as error:
            raise ManifestError(f"the referrers of {reference}: {error}") from error
        # Some registries filter, others do not.
        return tuple(
            each for each in found if artifact_type is None or each.artifact_type == artifact_type
        )

    async def _list_referrers(
        self, reference: Reference, digest: Digest, artifact_type: str | None
    ) -> tuple[Descriptor, ...] | None:
        """``None``: there is no such API anywhere."""
        path, what = f"referrers/{digest}", f"the referrers of {reference.name}@{digest}"
        query = "" if artifact_type is None else urlencode({"artifactType": artifact_type})
        retries = self._retries()
        begun: dict[Endpoint, tuple[Pages, dict[Descriptor, None]]] = {}

        async def attempt(endpoint: Endpoint) -> tuple[Descriptor, ...]:
            def open_page(query: str) -> AbstractAsyncContextManager[RegistryResponse]:
                return endpoint.ask(reference, f"{path}?{query}".rstrip("?"), what, _REFERRERS)

            pages, found = begun.pop(endpoint, (Pages(query, what, open_page, digest), {}))
            try:
                async for page in pages:
                    if page.media_type != INDEX_TYPES[0]:
                        # Some servers send the same page for every path.
                        text = f"{page.host} sent something else than {what}"
                        raise NotFound(text, host=page.host, status=404)
                    await _decode(_add_referrers, page.data, page.media_type, found)
                    retries.reset()
            except RegistryError as error:
                if error.status in _NO_REFERRERS:
                    mark_final(error)  # this host lacks the API, so do not retry
                elif is_transient(error):
                    begun[endpoint] = pages, found
                raise
            return tuple(found)

        endpoints = await self._endpoints.find(reference)
        able = [endpoint for endpoint in endpoints if "referrers" in endpoint.capabilities]
        if not able:
            return None
        try:
            return await try_each(able, attempt, retries)
        except RegistryError as error:
            if error.status not in _NO_REFERRERS:
                raise
            return None

    async def _tagged_referrers(
        self, reference: Reference, digest: Digest
    ) -> tuple[Descriptor, ...]:
        tag = attrs.evolve(reference, tag=digest.replace(":", "-"), digest=None)
        try:
            _, _, document = await self._find_manifest(tag, None)
        except NotFound:
            return ()
        if not isinstance(document, Index):
            raise ManifestError(f"{tag} is no index")
        return document.manifests

    async def _recall_manifest(
        self, reference: Reference, known: Known, announce: Announce | None
    ) -> tuple[Descriptor, bytes, Manifest | Index] | None:
        """What the reference leads to, if it is known; ``None`` if it has to be fetched."""
        found, data = await self._look_up(reference, announce)
        if data is None:
            data = await known(found.digest)
            if data is None or len(data) != found.size:
                return None
            if await _decode(digest_of, data) != found.digest:
                return None
        try:
            return found, data, await _decode(decode_manifest, data, found.media_type)
        except ManifestError:
            # Who says so may be wrong, or no registry: ask as if for the first time.
            return None

    async def _find_manifest(
        self, reference: Reference, announce: Announce | None
    ) -> tuple[Descriptor, bytes, Manifest | Index]:
        """The document that the reference leads to, verified as far as can be."""

        async def attempt(endpoint: Endpoint) -> tuple[Descriptor, bytes, Manifest | Index]:
            found, data = await _fetch_manifest(endpoint, reference)
            # In here, since a mirror may answer with whatever page it has.
            return found, data, await _decode(decode_manifest, data, found.media_type)

        endpoints = await self._endpoints.find(reference, *_needed(reference))
        return await try_each(endpoints, attempt, self._retries(announce))

    async def _sites_of(
        self, reference: Reference, blob: Descriptor | str
    ) -> list[Endpoint | ForeignURL]:
        """Who is asked for a blob."""
        endpoints = await self._endpoints.find(reference, "pull")
        if isinstance(blob, str):
            return [*endpoints]
        return [*self._endpoints.elsewhere(reference, blob), *endpoints]

    async def _get_document(
        self,
        reference: Reference,
        kind: str,
        headers: Mapping[str, str],
        descriptor: Descriptor,
        known: Known,
        announce: Announce | None,
    ) -> bytes:
        """A manifest (``manifests``) or config (``blobs``) by descriptor, verified."""
        digest, size = descriptor.digest, descriptor.size
        if size > MAX_DOCUMENT_SIZE:
            raise ManifestError(f"{digest} has {size} bytes, more than {MAX_DOCUMENT_SIZE}")
        there = await known(digest)
        if there is not None and len(there) != size:
            there = None
        if there is not None and await _decode(digest_of, there, digest) == digest:
            return there
        if descriptor.data is not None:
            return descriptor.data
        path = f"{kind}/{digest}"
        what = f"{descriptor.media_type} {digest} of {reference}"

        async def attempt(endpoint: Endpoint) -> bytes:
            return await _read(endpoint, reference, path, what, headers, digest, size, size)

        endpoints = await self._endpoints.find(reference, "pull")
        return await try_each(endpoints, attempt, self._retries(announce))


def _parsed(reference: Reference | str) -> Reference:
    if not isinstance(reference, Reference):
        reference = parse_reference(reference)
    if reference.digest is not None:
        parse_digest(reference.digest)
    return reference


def _needed(reference: Reference) -> tuple[str, ...]:
    """What a host must be good for that is asked what the reference leads to."""
    return ("pull",) if reference.digest is not None else ("pull", "resolve")


def _digest_and_size(blob: Descriptor | str) -> tuple[Digest, int | None]:
    if isinstance(blob, Descriptor):
        return blob.digest, blob.size
    return parse_verifiable(blob), None


def _descriptor_of(answer: RegistryResponse) -> Descriptor | None:
    """What a header says of the document; ``None`` if that is not all."""
    size = answer.headers.get("Content-Length", "")
    try:
        digest = parse_digest(answer.headers.get("Docker-Content-Digest", ""))
    except InvalidDigest:  # also one of another algorithm
        return None
    if coding_of(answer) is not None:  # Content-Length is the encoded body's
        return None
    if not answer.media_type or answer.media_type.startswith("text/") or not _SIZE.fullmatch(size):
        return None
    return Descriptor(answer.media_type, digest, int(size))


async def _fetch_manifest(endpoint: Endpoint, reference: Reference) -> tuple[Descriptor, bytes]:
    what = f"the manifest of {reference}"
    path = f"manifests/{reference.fetched_by}"
    async with endpoint.ask(reference, path, what, _MANIFESTS) as answer:
        promised = reference.digest or answer.headers.get("Docker-Content-Digest")
        if promised is not None and not promised.startswith("sha256:"):
            promised = None  # only SHA-256 can be checked

        def fits(data: bytes) -> bool:
            return looks_like_json(data) if promised is None else digest_of(data) == promised

        data = await read_fitting(answer, MAX_DOCUMENT_SIZE, fits)
    if answer.media_type.startswith("text/"):
        # A page that some servers have at every path: a mirror's may not be the answer.
        raise ManifestError(f"{answer.host} sent a page of text in place of a manifest")
    if len(data) > MAX_DOCUMENT_SIZE:
        raise ManifestError(f"the manifest is larger than {MAX_DOCUMENT_SIZE} bytes")
    digest = await _decode(digest_of, data)
    # A digest of another algorithm is one that cannot be checked.
    if promised is not None and promised.startswith("sha256:") and promised != digest:
        promised = answer.printable_line(promised)
        error = VerificationError(
            f"{answer.host} sent {digest} as {what}, which should be {promised}"
            f"{named_encoding(answer)}",
            digest=promised,
        )
        raise mark_final(error)
    return Descriptor(answer.media_type, digest, len(data)), data


async def _read(
    endpoint: Endpoint | ForeignURL,
    reference: Reference,
    path: str,
    what: str,
    headers: Mapping[str, str],
    digest: Digest,
    size: int | None,
    max_size: int,
) -> bytes:
    """What has this digest, and this size if it is known."""
    async with endpoint.ask(reference, path, what, headers) as answer:
        data = await read_fitting(
            answer,
            max_size if size is None else size,
            lambda data: size in (None, len(data)) and digest_of(data, digest) == digest,
        )
    if size is None and len(data) > max_size:
        text = f"{what} has more than {max_size} bytes{named_encoding(answer)}"
        raise mark_final(VerificationError(text, digest=digest))
    if size not in (None, len(data)) or await _decode(digest_of, data, digest) != digest:
        text = (
            f"what {answer.host} sent as {what} is not that: its digest or size differs"
            f"{named_encoding(answer)}"
        )
        raise mark_final(VerificationError(text, digest=digest))
    return data


async def _unknown(digest: Digest) -> bytes | None:
    return None


def _choose(data: bytes, name: str, last_reference: list[Index], wanted: Platform) -> Descriptor:
    """Call `choose_image` in `_decode`, because its time grows with the document.

    The list's only reference to the index is popped, so that the index is freed in here, too: this
    takes 20 ms for a large one.
    """
    return choose_image(name, last_reference.pop(), wanted)


def _add_tags(data: bytes, host: str, tags: dict[str, None]) -> None:
    """Add a page's tags, one at a time.

    One call into C for all of them would hold the GIL for 200 ms.
    """
    for tag in decode_tags(data, host):
        tags[tag] = None


def _add_referrers(data: bytes, media_type: str, found: dict[Descriptor, None]) -> None:
    index = decode_manifest(data, media_type)
    assert isinstance(index, Index)
    for each in index.manifests:
        found[each] = None


def _check_image(data: bytes, manifest: Manifest) -> None:
    check_image(manifest)


async def _decode(decode: Callable[[bytes, Unpack[Ts]], T], data: bytes, *args: *Ts) -> T:
    if len(data) <= INLINE_SIZE:
        return decode(data, *args)
    if len(data) <= LARGE_SIZE:
        return await trio.to_thread.run_sync(decode, data, *args)
    return await run_large(partial(decode, data, *args))
