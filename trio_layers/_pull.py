"""From a reference to an image: the registry client, the engine and the store, tied together."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from functools import partial
from typing import Final, Literal, TypeAlias, final, get_args

import attrs
import trio

from ._arguments import check_choice, check_path, check_seconds, check_sink, check_whole
from ._blocks import opens_block
from ._digest import Digest
from ._engine.download import DownloadManager, DownloadStatistics, open_download_manager
from ._engine.foreign import tell
from ._errors import ManagerClosed, StoreError
from ._image import (
    ImageLayer,
    ImageSource,
    check_diff_ids,
    check_storable,
    choose_stored,
    layers_of,
    off_the_loop,
)
from ._lifetime import Lifetime, while_open
from ._manifest import ImageConfig, Manifest, decode_config, decode_manifest
from ._platform import Platform, parse_platform
from ._progress import Progress, Status
from ._reference import Reference, parse_reference
from ._registry.client import RegistryClient, RegistryStatistics, open_registry_client
from ._registry.credentials import CredentialsFor
from ._registry.error_responses import RateLimit
from ._registry.http import AsyncClient
from ._registry.resolving import ResolvedImage
from ._registry.transport import STALL_LIMIT
from ._rootfs.view import RootfsView
from ._store.directory import DirectoryStore, open_store
from ._store.statistics import StoreStatistics
from ._tar.limits import Limits
from ._util import construct, made_by
from .abc import BlobSink, ProgressSink, ReportProgress

__all__ = ["Image", "PullPolicy", "Puller", "PullerStatistics", "open_puller"]

PullPolicy: TypeAlias = Literal["always", "missing", "never"]
"""When to ask a registry: each time, for the newest image; only if the store has no such
image; or not at all."""

UNLIMITED_DOWNLOADS: Final = 90
"""Downloads at once without a limit. With ten more for other requests, these are as many
connections as httpx allows by default."""


@attrs.frozen(repr=False)
class Image:
    """An image in the store.

    Attributes:
        reference: The requested reference in full.
        digest: The digest of the image's manifest.
        platform: The platform of the image.
        config: The image's config: command, environment, user and so on.
        layers: The layers, bottom first.
        rootfs: The root file system: the files of all layers, merged.
    """

    reference: str
    digest: Digest
    platform: Platform
    config: ImageConfig
    layers: tuple[ImageLayer, ...]
    rootfs: RootfsView = attrs.field(eq=False)

    def __repr__(self) -> str:
        return (
            f"<Image {self.reference}: {self.digest}, {self.platform}, {len(self.layers)} layers>"
        )


@opens_block
async def open_puller(
    store: str | os.PathLike[str] | DirectoryStore,
    *,
    client: AsyncClient | None = None,
    credentials: CredentialsFor | None = None,
    plain_http: bool = False,
    tls_verify: bool = True,
    hosts_dir: str | os.PathLike[str] | None = None,
    stall_limit: float = STALL_LIMIT,
    max_concurrent_downloads: int = 3,
    max_download_attempts: int = 5,
    retry_tick: float = 1.0,
    limits: Limits | None = None,
) -> AsyncIterator[Puller]:
    """Open a puller, in whose block images are pulled into ``store``.

    Simultaneous pulls share their downloads. Layers are unpacked in processes (see `open_store`).
    Leaving the block cancels all running pulls, and waits until they have stopped. An exception of
    the block comes out unchanged.

    Cancellation: entering leaves nothing open.

    Args:
        store: The directory of a store, created if it is missing, or an open store.
        client: The httpx client for the registries, which the caller closes. ``None``: our own
            clients.
        credentials: The credentials for registries that want some: one for all of them; or a
            mapping by domain; or a function that finds them, such as `LoginFiles`. ``None``:
            anonymous.
        plain_http: Whether registries on other machines may be asked without TLS.
        tls_verify: Whether certificates are checked.
        hosts_dir: A directory of mirrors and certificates in containerd's format, such as
            ``/etc/containerd/certs.d``, with a directory and a ``hosts.toml`` for each registry
            (see ``docs/compatibility.md``). Hosts with certificates of their own there are not
            asked through ``client``. ``None``: no mirrors.
        stall_limit: Seconds without a byte that end an attempt. An attempt also ends if it is so
            many seconds behind 1 KiB/s, or if its response has not begun for several times as long
            (see ``docs/compatibility.md``, "Patience").
        max_concurrent_downloads: The largest number of layers that move data at once; 0 means no
            limit but that of 90 connections.
        max_download_attempts: The number of attempts at a layer before its pulls fail.
        retry_tick: Seconds between two steps of the countdown to another attempt at a layer. The
            waits between attempts at other requests are proportional to ``retry_tick``.
        limits: The limits on each layer; ``None``: the defaults, or those of an open store.

    Raises:
        StoreError: if the directory is not a store, or cannot be used as one.
        HostsError: if ``hosts_dir`` is not a directory. The pulls that need a file in it report the
            errors of that file.
        ValueError: for options out of range (see `open_download_manager`), and for limits with a
            store that was opened with its own.
    """
    check_whole("max_concurrent_downloads", max_concurrent_downloads, least=0)
    check_whole("max_download_attempts", max_download_attempts, least=1)
    check_seconds("retry_tick", retry_tick)
    async with AsyncExitStack() as stack:
        if not isinstance(store, DirectoryStore):
            check_path("store", store, "a directory's path, or the store that open_store opened")
            opened = open_store(store, limits=limits or Limits())
            store = await stack.enter_async_context(opened)
        elif limits is not None:
            raise ValueError("an open store has its limits already: give them to open_store")
        registry = await stack.enter_async_context(
            open_registry_client(
                client=client,
                credentials=credentials,
                plain_http=plain_http,
                tls_verify=tls_verify,
                hosts_dir=hosts_dir,
                stall_limit=stall_limit,
                retry_tick=retry_tick,
                # Ten more, so that downloads never delay requests for manifests.
                max_connections=(max_concurrent_downloads or UNLIMITED_DOWNLOADS) + 10,
            )
        )
        manager = await stack.enter_async_context(
            open_download_manager(
                store,
                max_concurrent_downloads=max_concurrent_downloads,
                max_download_attempts=max_download_attempts,
                retry_tick=retry_tick,
            )
        )
        lifetime = Lifetime(lambda: ManagerClosed("the puller was closed"))
        stack.push_async_callback(lifetime.close)
        yield construct(Puller, store, registry, manager, lifetime)


@attrs.frozen
class PullerStatistics:
    """The present activity of a `Puller`.

    Attributes:
        downloads: The activity of its download manager.
        registry: The activity of its registry client.
        store: The activity of its store.
    """

    downloads: DownloadStatistics
    registry: RegistryStatistics
    store: StoreStatistics


@made_by("open_puller")
@final
class Puller:
    """Pulls images into a store. It comes from `open_puller`."""

    def __init__(
        self,
        store: DirectoryStore,
        registry: RegistryClient,
        manager: DownloadManager,
        lifetime: Lifetime,
    ) -> None:
        self._lifetime = lifetime
        self._store = store
        self._registry = registry
        self._manager = manager

    def __repr__(self) -> str:
        return f"<Puller: {self._store!r}, {self._manager!r}>"

    @property
    def store(self) -> DirectoryStore:
        """The store that the puller fills."""
        return self._store

    @property
    def max_concurrent_downloads(self) -> int:
        """The largest number of downloads at once; see `DownloadManager.max_concurrent_downloads`.

        0 means no limit except that of the puller's connections.
        """
        return self._manager.max_concurrent_downloads

    @max_concurrent_downloads.setter
    def max_concurrent_downloads(self, limit: int) -> None:
        self._manager.max_concurrent_downloads = limit

    def statistics(self) -> PullerStatistics:
        """Return the present activity of the puller."""
        return PullerStatistics(
            self._manager.statistics(), self._registry.statistics(), self._store.statistics()
        )

    @property
    def rate_limits(self) -> dict[str, RateLimit]:
        """The rate limits that hosts have announced, by host.

        Docker Hub announces its limit, as ``registry-1.docker.io``.
        """
        return self._registry.rate_limits

    @while_open
    async def resolve(
        self, reference: str | Reference, *, platform: str | Platform | None = None
    ) -> ResolvedImage:
        """Ask the registry for the image of a reference: its manifest and config, verified.

        Cancellation: nothing is left behind.

        Args:
            reference: The image's name, such as ``demo``, ``debian:12`` or
                ``quay.io/org/name@sha256:…``.
            platform: The platform to choose from an index; ``None``: the host's.

        Raises:
            InvalidReference: if the reference does not follow the grammar.
            PlatformError: if the image has nothing for the platform.
            ManifestError: if the registry has something else than an image.
            HostsError: if ``hosts_dir`` has an unusable file for the registry.
            RegistryError: if the registry fails; its subclasses say how.
            VerificationError: if a document does not match its digest.
            ManagerClosed: if the puller's block was left before or during the call.
        """
        return await self._resolve(*_parsed(reference, platform), None)

    async def _resolve(
        self, reference: Reference, platform: Platform | None, progress: ProgressSink | None
    ) -> ResolvedImage:
        announced = False

        async def announce(action: str) -> None:
            nonlocal announced
            assert progress is not None
            announced = True
            await tell(progress, Progress(str(reference), action))

        resolved = await self._registry.resolve_image(
            reference,
            platform=platform,
            known=self._store.find_document,
            # Docker Hub does not count HEAD requests.
            head_first=bool(await self._store.images(str(reference))),
            announce=None if progress is None else announce,
        )
        if announced:
            # Without this event the retry countdown would stay on the terminal.
            await announce(Status.DOWNLOAD_COMPLETE)
        return resolved

    @opens_block
    async def pull(
        self,
        reference: str | Reference,
        *,
        platform: str | Platform | None = None,
        policy: PullPolicy = "always",
        progress: ProgressSink | None = None,
    ) -> AsyncIterator[Image]:
        """Get an image into the store, and keep it there while the block runs.

        Entering waits until the whole image is there, verified and on disk. Blobs and layers in the
        store are not downloaded again. After the block the image stays in the store until it is
        removed. No nursery is open while the block runs.

        Cancellation: if entering is cancelled or fails, only whole layers become visible in the
        store, and partial downloads are kept for a resumption.

        Args:
            reference: As for `resolve`.
            platform: As for `resolve`.
            policy: When to ask the registry. With ``"missing"``, an image that the store has under
                this reference, for this platform, needs no network. With ``"never"``, a missing
                image is an error.
            progress: Takes the pull's events; see `DownloadManager.download`. An image from the
                store causes none. Retries of requests for a manifest, a config or a token cause
                events such as ``Retrying in 2 seconds``. Their ID is the full reference, such as
                ``docker.io/library/debian:12``.

        Raises:
            LayersError: as for `resolve` and `DownloadManager.download`.
            StoreError: if the store lacks the image and ``policy`` is ``"never"``.
            ManagerClosed: if the puller's block was left before or during the entry.
            ValueError: for an unknown policy.
        """
        check_choice("policy", policy, get_args(PullPolicy))
        check_sink(progress)
        reference, platform = _parsed(reference, platform)
        # Leaving the puller's block cancels this entry in any task, but not the caller's block.
        async with self._lifetime.use(), AsyncExitStack() as entering:
            image = await self._enter(entering, reference, platform, policy, progress)
            stack = entering.pop_all()
        async with stack:
            yield image

    async def _enter(
        self,
        stack: AsyncExitStack,
        reference: Reference,
        platform: Platform | None,
        policy: PullPolicy,
        progress: ProgressSink | None,
    ) -> Image:
        """Get an image into the store, with a lease until `stack` closes."""
        if policy != "always":
            whole = policy == "missing"  # with "never", damage causes an error, not a new pull
            image = await self._find_stored(stack, reference, platform, whole=whole)
            if image is not None:
                return image
        if policy == "never":
            what = f" for {platform}" if platform else ""
            raise StoreError(f"{reference}{what} is not in the store: pull it")
        resolved = await self._resolve(reference, platform, progress)
        count = len(resolved.layers)
        sources = await off_the_loop(count, partial(self._sources_of, resolved))
        layers = tuple(source.layer for source in sources)
        digests = await off_the_loop(count, partial(_storable_digests, resolved, layers))
        await stack.enter_async_context(self._store.lease(*digests))
        # If the store has the top layer, this one look-up finds all layers.
        top = await self._store.find(layers[-1].chain_id) if layers else None
        download = self._manager.download(sources, progress=progress)
        rootfs = await stack.enter_async_context(download)
        del top
        check_diff_ids(layers, rootfs)
        # ``rootfs.chain_id`` would hash the whole chain once more.
        chain = layers[-1].chain_id if layers else None
        await self._store.put_image(
            str(resolved.reference),
            manifest=resolved.descriptor,
            config=resolved.manifest.config,
            platform=str(resolved.config.platform),
            chain_id=chain,
            index=resolved.index,
            documents=_documents_of(resolved),
        )
        return Image(
            reference=str(resolved.reference),
            digest=resolved.descriptor.digest,
            platform=resolved.config.platform,
            config=resolved.config,
            layers=layers,
            rootfs=await self._store.rootfs(chain),
        )

    def _sources_of(self, resolved: ResolvedImage) -> list[_RegistryLayer]:
        return [
            _RegistryLayer(self._store, self._registry, resolved.reference, layer)
            for layer in layers_of(resolved.layers, resolved.diff_ids)
        ]

    async def _find_stored(
        self,
        stack: AsyncExitStack,
        reference: Reference,
        platform: Platform | None,
        *,
        whole: bool,
    ) -> Image | None:
        """Find an image in the store, with a lease until `stack` closes.

        Returns:
            The image, or ``None`` if the store lacks the image. With ``whole`` also ``None`` if a
            quick check finds damage, or an earlier reader has found some.
        """
        stored = choose_stored(await self._store.images(str(reference)), platform)
        if stored is None:
            return None
        index = None if stored.index is None else stored.index.digest
        held = (stored.manifest.digest, stored.config.digest, index, stored.chain_id)
        async with AsyncExitStack() as lease:
            await lease.enter_async_context(self._store.lease(*held))
            if await self._store.image(stored.reference, platform=stored.platform) != stored:
                return None  # the image was removed or replaced before the lease
            if whole and not await self._store.looks_whole(stored):
                return None
            manifest_bytes = await self._store.read_blob(stored.manifest.digest)
            config_bytes = await self._store.read_blob(stored.config.digest)
            manifest = await trio.to_thread.run_sync(
                decode_manifest, manifest_bytes, stored.manifest.media_type
            )
            listed = None if stored.platform is None else parse_platform(stored.platform)
            config = await trio.to_thread.run_sync(decode_config, config_bytes, listed)
            assert isinstance(manifest, Manifest)
            if stored.chain_id is None and manifest.layers:
                return None  # its layers were never unpacked
            stacked = partial(layers_of, manifest.layers, config.diff_ids)
            layers = await off_the_loop(len(manifest.layers), stacked)
            rootfs = await self._store.rootfs(stored.chain_id)
            stack.push_async_exit(lease.pop_all())
        return Image(
            reference=str(reference),
            digest=stored.manifest.digest,
            platform=config.platform,
            config=config,
            layers=layers,
            rootfs=rootfs,
        )


def _documents_of(resolved: ResolvedImage) -> dict[Digest, bytes]:
    documents = {
        resolved.manifest.config.digest: resolved.config_bytes,
        resolved.descriptor.digest: resolved.manifest_bytes,
    }
    if resolved.index is not None and resolved.index_bytes is not None:
        documents[resolved.index.digest] = resolved.index_bytes
    return documents


def _parsed(
    reference: str | Reference, platform: str | Platform | None
) -> tuple[Reference, Platform | None]:
    if not isinstance(reference, Reference):
        reference = parse_reference(reference)
    if platform is not None and not isinstance(platform, Platform):
        platform = parse_platform(platform)
    return reference, platform


def _storable_digests(resolved: ResolvedImage, layers: tuple[ImageLayer, ...]) -> list[Digest]:
    """The digests of all parts of an image, for its lease.

    The lease must hold all of them from the download's first byte on.

    Raises:
        ManifestError: as `check_storable` does.
    """
    digests = list(_digests_of(resolved, layers))
    check_storable([*digests, *resolved.diff_ids])
    return digests


def _digests_of(resolved: ResolvedImage, layers: tuple[ImageLayer, ...]) -> Iterator[Digest]:
    yield resolved.descriptor.digest
    yield resolved.manifest.config.digest
    if resolved.index is not None:
        yield resolved.index.digest
    for layer in layers:
        yield layer.descriptor.digest
        yield layer.chain_id


@final
class _RegistryLayer(ImageSource):
    """A layer source whose data comes from a registry, through the store's ingest file.

    See `trio_layers.abc.LayerSource`, and moby's ``distribution/pull_v2.go``.
    """

    def __init__(
        self,
        store: DirectoryStore,
        registry: RegistryClient,
        reference: Reference,
        layer: ImageLayer,
    ) -> None:
        super().__init__(layer)
        self.layer = layer
        self._store = store
        self._registry = registry
        self._reference = reference

    async def download(self, progress: ReportProgress) -> tuple[trio.abc.ReceiveStream, int]:
        digest = self.descriptor.digest
        async with self._store.ingest(self.descriptor) as ingest:
            if ingest.committed:  # another pull has brought the blob
                progress(Status.DOWNLOAD_COMPLETE)
            else:
                await self._registry.fetch_blob(
                    self._reference, self.descriptor, ingest, progress=progress
                )
                await ingest.commit()
        return await self._store.open_blob(digest), self.descriptor.size

    async def download_into(self, sink: BlobSink, progress: ReportProgress) -> None:
        await self._registry.fetch_blob(self._reference, self.descriptor, sink, progress=progress)

    def close(self) -> None:
        """Do nothing: the received bytes stay in the store."""
