"""The store on disk: layers, blobs and images in one directory that processes share.

A method that few programs call imports its module itself, because each module takes milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

import trio

from .._arguments import check_path
from .._blocks import opens_block
from .._catalog.catalog import Catalog, closed_error, while_busy
from .._catalog.rows import StoredImage, StoredTree, find_image, find_images
from .._digest import ChainID, Digest, parse_digest
from .._lifetime import Lifetime, while_open
from .._manifest import Descriptor
from .._platform import Platform, specifier
from .._reference import Reference, full_name
from .._rootfs.view import RootfsView
from .._tar.limits import Limits
from .._util import construct, made_by
from .._workers.build import Builder
from .._workers.pool import open_workers
from ..abc import Layer, ReportArrived
from .commits import open_commits
from .content import BlobStream, Content
from .images import DOCUMENT_LIMIT, Images
from .ingest import Ingest, open_ingest
from .layers import DirectoryLayer, Layers, missing_layer_error, read_tar_size
from .layout import is_index_right, open_directory
from .leases import Lease, open_lease, open_lease_counts
from .parts import StoreParts
from .recognition import locate, open_to_read
from .scratch import open_scratch
from .staging import DirectoryStage, Staging
from .statistics import StoreStatistics
from .trees import Trees

if TYPE_CHECKING:
    from .batch import Batch
    from .check import CheckReport
    from .collect import Collected
    from .usage import StoreUsage

__all__ = ["DirectoryStore", "open_store", "open_with_builder"]

_NOTHING: Final[Mapping[Digest, bytes]] = {}


@opens_block
async def open_store(
    path: str | os.PathLike[str],
    *,
    limits: Limits = Limits(),  # noqa: B008  a frozen value
    create: bool = True,
    read_only: bool = False,
) -> AsyncIterator[DirectoryStore]:
    """Open the store in a directory for the block.

    Any number of processes may have a store open at once.

    Layers that arrive are unpacked in worker processes, one for each core, but at least two and at
    most eight. They start, with ``sys.executable``, when there is something to unpack. They do not
    import the program's own modules, and end with the block or with the program.

    Leaving the block removes the unfinished files that were made in it. After a crash, the next
    program that opens the store removes them.

    Cancellation: entering leaves nothing open. Leaving is shielded, and takes a few milliseconds.

    Args:
        path: The store's directory. If it is empty or missing, a new store is made there, with
            mode 0700.
        limits: The limits on each layer that is unpacked in the block. Layers in the store stay,
            whatever their size.
        create: Whether to make a new store if there is none.
        read_only: Whether to open the store without writing, for a read-only file system, or as
            root for another user's store. Reads see the store's state at opening. Leases protect
            nothing in this mode: other processes may remove and collect images meanwhile. Methods
            that write raise `StoreReadOnly`.

    Raises:
        StoreNotFound: if there is no store, and ``create`` is false or ``read_only`` is true.
        UnsupportedStore: if the directory has other contents, or a store that a newer version
            made, or a store made by or for another user. Nothing in it is changed. With
            ``read_only``, another user's store is accepted, but a store that an older version
            made is not.
        StoreReadOnly: if the store cannot be written.
        StoreError: for other errors of the disk.
    """
    check_path("path", path, "the path of a store's directory")
    async with open_workers(limits) as workers:
        opened = open_with_builder(path, workers, limits=limits, create=create, read_only=read_only)
        async with opened as store:
            yield store


@asynccontextmanager
async def open_with_builder(
    path: str | os.PathLike[str],
    builder: Builder,
    *,
    limits: Limits = Limits(),  # noqa: B008  a frozen value
    create: bool = True,
    read_only: bool = False,
) -> AsyncIterator[DirectoryStore]:
    """Open a store like `open_store`, with other workers; tests use threads."""
    create = create and not read_only
    root = await trio.to_thread.run_sync(partial(locate, Path(path), create=create))
    check = trio.from_thread.check_cancelled
    opening = partial(open_directory, create=create, check_cancelled=check)
    connection = await while_busy(
        lambda: trio.to_thread.run_sync(open_to_read if read_only else opening, root)
    )
    catalog = Catalog(connection, root)
    try:
        async with (
            open_scratch(root, catalog, read_only=read_only) as scratch,
            open_lease_counts(
                catalog, scratch.holder, scratch.process, read_only=read_only
            ) as leases,
            open_commits(catalog, root) as commits,
        ):
            lifetime = Lifetime(partial(closed_error, root))
            parts = StoreParts(root, limits, catalog, scratch, commits, leases, builder, lifetime)
            store = construct(DirectoryStore, parts)
            if not (read_only or await catalog.read(is_index_right, root)):
                await catalog.write(store._images.write_index)
            try:
                yield store
            finally:
                await lifetime.close()
                store._content.close_streams()
    finally:
        await catalog.close()


@made_by("open_store")
@final
class DirectoryStore:
    """Layers, blobs and images in a directory. It comes from `open_store`.

    It is a `~trio_layers.abc.LayerStore`, and an OCI image layout that other tools can read.
    Everything visible in it has been verified and is durable. After a crash, a failure or a
    cancellation, nothing half-made is ever visible. The methods may be called from any number of
    tasks at once. All async methods raise `StoreError` for errors of the disk, of which
    `StoreFull` and `StoreReadOnly` are kinds.

    Cancellation: unless a method says more, a cancelled call leaves the store as it was, or has
    done its work.

    Leaving the store's block ends the running calls in all tasks. These calls, and all later
    ones, raise `StoreClosed`.
    """

    def __init__(self, parts: StoreParts) -> None:
        self._parts = parts
        self._catalog = parts.catalog
        self._lifetime = parts.lifetime
        self._content = Content(parts)
        self._trees = Trees(parts, self._content)
        self._layers = Layers(parts, self._content, self._trees)
        self._images = Images(parts, self._content, self._layers)
        self._staging = Staging(parts, self._content, self._trees, self._put_layer)

    def __repr__(self) -> str:
        now = self.statistics()
        return (
            f"<DirectoryStore {str(self.path)!r}: {now.layers} layers in use, "
            f"{now.unpacking} unpacking, {now.waiting} waiting>"
        )

    @property
    def path(self) -> Path:
        """The store's directory, as an absolute path."""
        return self._parts.root

    @property
    def limits(self) -> Limits:
        """The limits on each layer that is unpacked."""
        return self._parts.limits

    def statistics(self) -> StoreStatistics:
        """Return the present activity of the store in this process."""
        builder = self._parts.builder
        now = [limiter.statistics() for limiter in (self._trees.threads, builder.limiter)]
        return StoreStatistics(
            layers=self._layers.in_use,
            references=self._layers.references,
            unpacking=sum(each.borrowed_tokens for each in now),
            waiting=sum(each.tasks_waiting for each in now) + builder.waiting,
        )

    # Layers.

    @while_open
    async def get(self, chain_id: ChainID) -> DirectoryLayer | None:
        """Find a layer and take a reference to it; ``None`` if the store lacks the layer.

        A layer that is known to be damaged counts as missing.

        Cancellation: no reference is taken.
        """
        return await self._layers.get(chain_id)

    @while_open
    async def find(self, chain_id: ChainID) -> DirectoryLayer | None:
        """Find a layer without a reference; ``None`` if the store lacks the layer.

        Unless something else holds the layer, it may be removed at any time. While the object
        exists, held layers below it are not looked up again.
        """
        return await self._layers.find(chain_id)

    @while_open
    async def tar_size(self, layer: Layer) -> int:
        """Return the size of a layer's tar in bytes, uncompressed.

        Raises:
            StoreError: if the store lacks the layer.
        """
        return await self._catalog.read(read_tar_size, layer.chain_id)

    @while_open
    async def register(
        self,
        stream: trio.abc.ReceiveStream,
        parent: ChainID | None,
        descriptor: Descriptor | None = None,
    ) -> DirectoryLayer:
        """Unpack a compressed stream on top of ``parent``, and return the layer.

        The caller gets a reference to the layer. The stream is read to its end, unless the store
        has the blob that ``descriptor`` names and has unpacked it before. The caller closes the
        stream. The store also keeps the blob. Leave the `ingest` of a blob before the call. Two
        calls for one blob, in any process, do not do the work twice: one waits.

        Cancellation: the store lacks the layer, or the layer is returned all the same. The
        received bytes are kept if ``descriptor`` is given.

        Args:
            stream: The layer, compressed or not.
            parent: The chain ID of the layer below; ``None`` for the bottom layer.
            descriptor: The blob's descriptor, if it is known.

        Raises:
            DecompressionError: as for `LayerStore.register`.
            UnpackError: if the layer is damaged, or has an entry that must not be unpacked.
            VerificationError: if the stream is not the blob that ``descriptor`` names.
            StoreError: if the store lacks the layer ``parent``, or for errors of the disk.
            Exception: an error raised by the stream.
        """
        return await self._layers.register(stream, parent, descriptor)

    def stage(
        self, descriptor: Descriptor, waiting: ReportArrived | None = None
    ) -> AbstractAsyncContextManager[DirectoryStage]:
        """Receive a blob and unpack it meanwhile; see `~trio_layers.abc.StagingStore`.

        Cancellation: entering leaves nothing behind. Leaving keeps the received bytes.

        Raises:
            InvalidDigest: if the descriptor's digest is invalid.
            VerificationError: if the store has the blob with another size.
            StoreError: for errors of the disk.
        """
        return self._staging.open(descriptor, waiting)

    @while_open
    async def _put_layer(
        self, parent: ChainID | None, tree: StoredTree | None, blob: Digest
    ) -> DirectoryLayer:
        return await self._layers.put(parent, tree, blob)

    def release(self, layer: Layer) -> None:
        """Give back one reference. The layer stays in the store until a `collect` removes it."""
        self._layers.release(layer)

    @while_open
    async def rootfs(self, chain_id: ChainID | None) -> RootfsView:
        """Open the root file system of a layer: the merged files of the layer and all below it.

        Args:
            chain_id: The top layer; ``None`` for an empty root file system.

        Raises:
            StoreError: if the store lacks the layer.
        """
        layer = None
        if chain_id is None:
            await trio.lowlevel.checkpoint()
        else:
            layer = await self._layers.find(chain_id)
            if layer is None:
                raise missing_layer_error(chain_id)
        return construct(
            RootfsView,
            self._layers.merged(layer),
            self._parts.scratch.name,
            self._lifetime,
            self._parts.leases.holding_trees,
        )

    # Blobs.

    @while_open
    async def blob(self, digest: Digest) -> Path | None:
        """Return the path of a blob's file, which must not be changed; ``None`` if missing."""
        stored = await self._content.find(digest)
        return None if stored is None else self._content.path(digest)

    @while_open
    async def whole_blob(self, digest: Digest) -> Path | None:
        """Find a blob like `blob`, but return ``None`` for a damaged one, too.

        The check is a quick one. The caller must download a damaged blob again.
        """
        whole = await self._catalog.read(self._content.has_whole, digest)
        return self._content.path(digest) if whole else None

    def ingest(self, descriptor: Descriptor) -> AbstractAsyncContextManager[Ingest]:
        """Receive a blob in the block, and commit it there.

        Entering waits until no other task or process receives or unpacks this blob. The store may
        then have all of it (`Ingest.committed`) or a part (`Ingest.offset`). Without a commit, the
        received bytes are kept, and the next ingest goes on from there. While an ingest is open,
        never wait for another blob, nor for `register` of this one.

        Cancellation: entering leaves nothing behind. Leaving keeps the received bytes.

        Raises:
            InvalidDigest: if the descriptor's digest is invalid.
            VerificationError: if the store has the blob with another size.
            StoreError: for errors of the disk.
        """
        return open_ingest(self._content, descriptor)

    def batch(self) -> AbstractAsyncContextManager[Batch]:
        """Receive blobs in the block whose digests are not known before; see `Batch`.

        Leaving the block removes the blobs that were not committed.

        Raises:
            StoreError: for errors of the disk.
        """
        from .batch import open_batch

        return open_batch(self._content)

    @while_open
    async def put_blob(self, descriptor: Descriptor, data: bytes) -> None:
        """Store a blob that is in memory, unless the store has it.

        Raises:
            VerificationError: if ``data`` does not match ``descriptor``.
        """
        await self._content.put(descriptor, data)

    @while_open
    async def read_blob(self, digest: Digest, *, limit: int = DOCUMENT_LIMIT) -> bytes:
        """Return the bytes of a small blob, such as a manifest, verified once more.

        Args:
            digest: The blob's digest.
            limit: The most bytes to read into memory. The default is the largest manifest that
                registries must accept: 4 MiB (OCI distribution specification, "Pushing
                Manifests").

        Raises:
            StoreError: if the store lacks the blob, or the blob is larger than ``limit``.
            VerificationError: if the blob is damaged.
        """
        return await self._content.read(digest, limit=limit)

    @while_open
    async def find_document(self, digest: Digest) -> bytes | None:
        """Return the bytes of a manifest, config or index, if they are here and undamaged.

        Return ``None`` for a missing or damaged blob, for another digest than SHA-256, and for a
        blob of more than 4 MiB.
        """
        return await self._content.find_document(digest, limit=DOCUMENT_LIMIT)

    @while_open
    async def open_blob(self, digest: Digest) -> BlobStream:
        """Open a stream of a blob; the caller closes it.

        Raises:
            StoreError: if the store lacks the blob.
        """
        return await self._content.open(digest)

    # Images.

    @while_open
    async def put_image(
        self,
        reference: str | Reference,
        *,
        manifest: Descriptor,
        config: Descriptor,
        platform: str | Platform | None,
        chain_id: ChainID | None,
        index: Descriptor | None = None,
        documents: Mapping[Digest, bytes] = _NOTHING,
    ) -> None:
        """Point a reference to an image. All parts of the image must be in the store.

        An image that had the reference before, on the same platform, loses it but stays in the
        store. Nothing is written if the reference points to the image already. Other tools find
        the image in the layout under its reference: ``skopeo inspect oci:STORE:REFERENCE``.

        Args:
            reference: The image's name; ``demo`` stands for ``docker.io/library/demo:latest``.
            manifest: The image's manifest.
            config: The image's config.
            platform: The image's platform, as ``os/architecture/variant``. One reference can
                point to one image for each platform.
            chain_id: The image's top layer; ``None`` if the image has no layers, or they are not
                unpacked.
            index: The index that listed the manifest, if the store has it.
            documents: The bytes of manifest, config and index, where the store may lack them.

        Raises:
            StoreError: if the store lacks a part of the image.
            VerificationError: if a document does not match its digest.
            InvalidReference: if ``reference`` does not follow the grammar.
            PlatformError: if ``platform`` is invalid.
        """
        name, platform = full_name(reference), specifier(platform)
        image = StoredImage(name, platform, manifest, config, chain_id, index)
        await self._images.put_image(image, documents)

    @while_open
    async def put_images(self, images: Sequence[StoredImage]) -> None:
        """Point several references to their images in one transaction; see `put_image`.

        If the call fails, no reference has changed.

        Args:
            images: References and images. All parts of the images must be in the store.

        Raises:
            StoreError: if the store lacks a part of an image.
            PlatformError: if the platform of an image is invalid.
        """
        await self._images.put_images(images)

    @while_open
    async def image(
        self, reference: str | Reference, *, platform: str | Platform | None = None
    ) -> StoredImage | None:
        """Return the image of a reference; ``None`` if there is none.

        Args:
            reference: The image's name; ``demo`` stands for ``docker.io/library/demo:latest``.
            platform: The platform it was stored for; ``None``: the platform stored last.

        Raises:
            InvalidReference: if ``reference`` does not follow the grammar.
            PlatformError: if ``platform`` is invalid.
        """
        return await self._catalog.read(find_image, full_name(reference), specifier(platform))

    @while_open
    async def looks_whole(self, image: StoredImage) -> bool:
        """Return whether an image is free of visible or known damage.

        The documents are compared with their digests. The layers get a quick check only, and
        must not have been found damaged before.
        """
        return await self._images.looks_whole(image)

    @while_open
    async def images(self, reference: str | Reference | None = None) -> list[StoredImage]:
        """Return all images by reference. Of one reference, the platform stored last comes first.

        Args:
            reference: The name of the wanted images; ``None``: all images.

        Raises:
            InvalidReference: if ``reference`` does not follow the grammar.
        """
        name = None if reference is None else full_name(reference)
        return await self._catalog.read(find_images, name)

    @opens_block
    async def lease(self, *digests: Digest | None) -> AsyncIterator[Lease]:
        """Keep blobs, layers and images in the store during the block; see `Lease.hold`.

        The lease ends with the block, at the latest with the process.

        Cancellation: entering leaves no lease. Leaving ends the lease all the same.
        """
        async with open_lease(self._parts.leases, self._lifetime) as lease:
            await lease.hold(*digests)
            yield lease

    @while_open
    async def remove(
        self, reference: str | Reference, *, platform: str | Platform | None = None
    ) -> bool:
        """Delete a reference, and return whether it existed.

        The image stays until the next `collect`. That removes the image if it has no other
        reference and no lease.

        Args:
            reference: The image's name; or the digest of its manifest (``sha256:…``), to delete
                the image with all its references.
            platform: The platform it was stored for; ``None``: all platforms.

        Raises:
            InvalidReference: if ``reference`` does not follow the grammar.
            InvalidDigest: if ``reference`` begins like a digest and is none.
            PlatformError: if ``platform`` is invalid.
        """
        if isinstance(reference, str) and reference.startswith("sha256:"):
            return await self._images.remove_image(parse_digest(reference))
        return await self._images.remove(full_name(reference), specifier(platform))

    @while_open
    async def collect(self, *, dry_run: bool = False) -> Collected:
        """Delete images without a reference, unneeded layers, trees and blobs, and leftovers.

        A layer, tree or blob is unneeded if no image with a reference has it. Leftovers are
        broken-off downloads and unfinished files of crashed processes.

        Everything with a lease or a reference in a live process stays, and so do blobs that are
        being received or unpacked. Pulls go on meanwhile: their blobs stay while their leases
        last. Blobs that are stored without a lease (`ingest`, `put_blob`) may be deleted at once.

        Cancellation: a part of the garbage has been removed. The disk space of that part is freed
        when the store is left, at the latest when it is next opened.

        Args:
            dry_run: Only report the garbage.
        """
        from .collect import Collector

        await self._parts.leases.drop_idle()
        collector = Collector(self._parts)
        return await (collector.find() if dry_run else collector.remove())

    @while_open
    async def usage(self) -> StoreUsage:
        """Measure the disk space of the store and its images.

        The call looks at every file, which takes a while. Files that come or go meanwhile may be
        counted or not.
        """
        from .usage import find_parts, measure

        root = self._parts.root
        parts = await self._catalog.read(find_parts)
        check = trio.from_thread.check_cancelled
        return await trio.to_thread.run_sync(partial(measure, root, parts, check_cancelled=check))

    @while_open
    async def check(self, *, repair: bool = False) -> CheckReport:
        """Verify all blobs, trees, rows of the catalog, and the layout for other tools.

        Each blob is compared with its digest. Each tree is compared with its list of entries:
        names, types, owners, modes, times, attributes and contents. The rows of the catalog are
        compared with each other and with the images' documents. ``index.json`` is compared with
        the catalog.

        The check reads every byte of the store. Other tasks and processes may use the store
        meanwhile, and their new blobs and layers are not checked. Leftovers of a crash are no
        damage: the next `collect` removes them.

        Cancellation: nothing has changed, or all repairs are made.

        Args:
            repair: Drop damaged blobs and trees, with the layers that need them, even if they are
                in use. The next pull of an image brings back the missing parts only. A broken
                catalog cannot be repaired.
        """
        from .check import Checker
        from .collect import Collector

        parts, collector = self._parts, Collector(self._parts)
        checker = Checker(parts, self._content, self._trees, collector, self._images.write_index)
        return await checker.run(repair=repair)
