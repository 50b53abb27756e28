"""The store on disk: layers, blobs and images in one directory, which processes share."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, final
from weakref import WeakValueDictionary

import attrs
import trio

from .._blocks import opens_block
from .._catalog.catalog import Catalog, closed_error, while_busy
from .._catalog.rows import (
    StoredImage,
    StoredLayer,
    StoredTree,
    drop_image,
    drop_references,
    find_blob,
    find_image,
    find_images,
    find_index_rows,
    find_layer,
    find_layout,
    find_tree,
    put_image,
    set_layout,
)
from .._damage import any_noted, is_noted
from .._digest import ChainID, DiffID, Digest, digest_of
from .._errors import ManifestError, StoreError
from .._files import replace_file
from .._lifetime import Lifetime, while_open
from .._manifest import Descriptor, Manifest, decode_manifest
from .._platform import parse_platform
from .._rootfs.merged import MergedTree, Surveys, TreeStack
from .._rootfs.view import RootfsView
from ..abc import Layer, ReportArrived
from .check import Checker, CheckReport
from .collect import Collected, Collector
from .commits import Commits, Job, open_commits
from .content import Batch, BlobStream, Content, Ingest
from .layout import encode_index, locate, open_directory, open_to_read
from .leases import Lease, LeaseCounts, open_lease, open_lease_counts
from .scratch import Scratch, open_scratch
from .staging import DirectoryStage, Staging
from .trees import Base, Builder, Trees, Unpacker
from .usage import Meter, StoreUsage

__all__ = ["Batch", "DirectoryLayer", "DirectoryStore", "Lease", "StoreStatistics", "open_store"]

_DOCUMENT_LIMIT: Final = 4 * 1024 * 1024
_NOTHING: Final[Mapping[Digest, bytes]] = {}

# Number of layer objects to make between two checkpoints: a millisecond or two of work.
_STRIDE: Final = 256


@asynccontextmanager
async def open_store(
    path: str | os.PathLike[str],
    *,
    unpacker: Unpacker,
    builder: Builder | None = None,
    create: bool = True,
    read_only: bool = False,
) -> AsyncIterator[DirectoryStore]:
    """Open the store in a directory, for the block. Any number of processes may have it open.

    Args:
        path: The directory. If it is empty or not there, a store is made in it, mode 0700.
        unpacker: Makes trees of layers.
        builder: Makes those of layers that arrive; ``None``: threads with the ``unpacker``.
        create: Create the store if the path has none.
        read_only: Open the store for reading only, and write nothing.

    Raises:
        StoreNotFound: if the path has no store and the call may not create one.
        UnsupportedStore: if it is not a store, was made by a newer version, or by or for another
            user. Nothing in it is changed.
        StoreReadOnly: if it cannot be written.
        StoreError: for what else the disk does.

    Entering and leaving are checkpoints. Leaving removes what was left half-made in the block;
    where the block fails or is cancelled, the next who opens the store does.
    """
    create = create and not read_only
    root = await trio.to_thread.run_sync(partial(locate, Path(path), create=create))
    opening = open_to_read if read_only else partial(open_directory, create=create)
    connection = await while_busy(lambda: trio.to_thread.run_sync(opening, root))
    catalog = Catalog(connection, root)
    try:
        async with (
            open_scratch(root, catalog, read_only=read_only) as scratch,
            open_lease_counts(
                catalog, scratch.holder, scratch.process, read_only=read_only
            ) as holds,
            open_commits(catalog, root) as commits,
        ):
            store = DirectoryStore(root, catalog, scratch, commits, holds, unpacker, builder)
            if not (read_only or await catalog.read(store._is_index_right)):
                await catalog.write(store._write_index)
            try:
                yield store
            finally:
                await store._lifetime.close()
                store._content.close_streams()
    finally:
        await catalog.close()


@final
@attrs.frozen(eq=False)
class DirectoryLayer:
    """A layer of a `DirectoryStore`.

    Attributes:
        diff_id: The digest of its tar.
        chain_id: Names it together with what is below it.
        parent: What is below it.
        blob: The digest of the blob it was unpacked from, which is in the store.
        tree: Where it is unpacked: files in ``fs``, the list of them in ``entries``.
    """

    diff_id: DiffID
    chain_id: ChainID
    parent: DirectoryLayer | None = attrs.field(repr=False)
    blob: Digest
    tree: Path
    _content: Content = attrs.field(repr=False)
    _stack: TreeStack = attrs.field(repr=False)

    async def tar_stream(self) -> BlobStream:
        """The layer's blob, as it was registered: compressed as it came.

        Raises:
            StoreError: if it is not there any more.
        """
        return await self._content.open(self.blob)


@attrs.frozen
class StoreStatistics:
    """What goes on in an open store, in this process.

    Attributes:
        layers: How many layers are referred to.
        references: How many references to them are not released.
        unpacking: How many layers are being unpacked.
        waiting: Number of layers that wait for an unpacking worker, including layers that gave
            up their worker because their download is slow.
    """

    layers: int
    references: int
    unpacking: int
    waiting: int


@final
class DirectoryStore:
    """Layers, blobs and images in a directory. It comes from `open_store`.

    It is a `~trio_layers.abc.LayerStore`, and an OCI image layout that other tools can read.
    What is visible in it has been verified and is durable; what is half-made at a crash, a
    failure or a cancellation is never visible. Its methods may be called from any number of
    tasks at once, and all that are async raise `StoreError` for what the disk does, of which
    `StoreFull` and `StoreReadOnly` are kinds. Cancelled, each of them leaves the store as it was
    or has done its work.

    Leaving the store's block ends the calls that run in any task. These calls, and all later
    ones, raise `StoreClosed`.
    """

    def __init__(
        self,
        root: Path,
        catalog: Catalog,
        scratch: Scratch,
        commits: Commits,
        holds: LeaseCounts,
        unpacker: Unpacker,
        builder: Builder | None,
    ) -> None:
        self._root = root
        self._catalog = catalog
        self._scratch = scratch
        self._commits = commits
        self._holds = holds
        self._unpacker = unpacker
        self._lifetime = Lifetime(partial(closed_error, root))
        self._content = Content(root, catalog, scratch, commits, self._lifetime)
        self._trees = Trees(
            root,
            catalog=catalog,
            content=self._content,
            scratch=scratch,
            commits=commits,
            holds=holds,
            unpacker=unpacker,
            builder=builder,
        )
        self._staging = Staging(self._content, self._trees, scratch, commits, holds, self._put)
        self._collector = Collector(root, catalog, scratch)
        self._meter = Meter(root, catalog, self._content, self._trees)
        self._checker = Checker(
            root,
            catalog=catalog,
            content=self._content,
            trees=self._trees,
            holds=holds,
            collector=self._collector,
            unpacker=unpacker,
            write_index=self._write_index,
        )
        # One object for each layer, for as long as anybody has it.
        self._layers = WeakValueDictionary[ChainID, DirectoryLayer]()
        self._references: dict[ChainID, int] = {}
        # Layers that looked damaged when they were last looked up.
        self._damaged: set[ChainID] = set()
        self._surveys = Surveys()

    def __repr__(self) -> str:
        now = self.statistics()
        return (
            f"<DirectoryStore {str(self._root)!r}: {now.layers} layers in use, "
            f"{now.unpacking} unpacking, {now.waiting} waiting>"
        )

    @property
    def path(self) -> Path:
        """The directory, absolute."""
        return self._root

    @property
    def unpacker(self) -> Unpacker:
        """The functions that unpack layers into trees in this store."""
        return self._unpacker

    def statistics(self) -> StoreStatistics:
        """What goes on now."""
        builder = self._trees.builder
        now = [limiter.statistics() for limiter in (self._trees.threads, builder.limiter)]
        return StoreStatistics(
            layers=len(self._references),
            references=sum(self._references.values()),
            unpacking=sum(each.borrowed_tokens for each in now),
            waiting=sum(each.tasks_waiting for each in now) + builder.waiting,
        )

    # Layers.

    @while_open
    async def get(self, chain_id: ChainID) -> DirectoryLayer | None:
        """The layer of this chain ID, with a reference to it; ``None`` if it is not there."""
        # First held, then looked for: what is found stays.
        await self._holds.hold([chain_id])
        try:
            layer = await self._find(chain_id)
        except BaseException:
            self._holds.let_go([chain_id])
            raise
        if layer is None or chain_id in self._damaged:
            # A damaged layer counts as missing, so that the caller downloads it again.
            self._holds.let_go([chain_id])
            return None
        return self._refer(layer)

    @while_open
    async def find(self, chain_id: ChainID) -> DirectoryLayer | None:
        """Like `get`, without a reference: if nothing else holds the layer, it may be removed.
        While the object is there, layers below it that are held, too, are not looked up again.
        """
        return await self._find(chain_id)

    async def _find(self, chain_id: ChainID) -> DirectoryLayer | None:
        layer = self._sure(chain_id)
        if layer is not None:
            await trio.lowlevel.checkpoint()
            return layer
        rows, layer = await self._catalog.read(self._find_rows, chain_id)
        if not rows:
            return None
        for number, (row, tree) in enumerate(reversed(rows), 1):
            layer = self._object(row, tree, layer)
            if number % _STRIDE == 0:
                await trio.lowlevel.checkpoint()
        return layer

    @while_open
    async def tar_size(self, layer: Layer) -> int:
        """The length of a layer's tar in bytes, decompressed.

        Raises:
            StoreError: if the layer is not there.
        """
        return await self._catalog.read(_tar_size, layer.chain_id)

    @while_open
    async def register(
        self,
        stream: trio.abc.ReceiveStream,
        parent: ChainID | None,
        descriptor: Descriptor | None = None,
    ) -> DirectoryLayer:
        """Decompress the stream, unpack it on top of ``parent``, and return the layer with a
        reference to it.

        The stream is read to its end, unless the blob that ``descriptor`` names is in the store
        and has been unpacked before; closing it is the caller's. A blob that is not in the store
        yet is kept on the way, so leave its `ingest` before. Two calls for one blob, in any
        process, do not do the work twice: one waits.

        Cancellation: the layer is not there, or it is there and returned all the same. What
        came of the blob is kept if ``descriptor`` says which it is.

        Raises:
            DecompressionError: as for `LayerStore.register`.
            UnpackError: if the layer is damaged, or holds what must not be unpacked.
            VerificationError: if what came is not what ``descriptor`` names.
            StoreError: if there is no layer ``parent``, or for what the disk does.
            Exception: what the stream raises when read.
        """
        async with self._on(parent) as (base, below):
            row = await self._trees.register(stream, base, descriptor)
            return self._refer_new(row, below)

    def stage(
        self, descriptor: Descriptor, waiting: ReportArrived | None = None
    ) -> AbstractAsyncContextManager[DirectoryStage]:
        """Take a blob in, and unpack it while it arrives, in the block; see
        `~trio_layers.abc.StagingStore`.

        Raises:
            InvalidDigest: if the descriptor's digest is none.
            VerificationError: if the blob is there and has another size.
            StoreError: for what the disk does.
        """
        return self._staging.open(descriptor, waiting)

    @while_open
    async def _put(
        self, parent: ChainID | None, tree: StoredTree | None, blob: Digest
    ) -> DirectoryLayer:
        async with self._on(parent) as (base, below):
            row = await self._trees.put_on(base, tree, blob)
            return self._refer_new(row, below)

    @asynccontextmanager
    async def _on(
        self, parent: ChainID | None
    ) -> AsyncIterator[tuple[Base, DirectoryLayer | None]]:
        """What a layer is put on, with a reference to it for the block."""
        below = None
        if parent is not None:
            below = await self.get(parent)
            if below is None:
                raise StoreError(f"there is no layer {parent} to put another on")
        try:
            yield Base(parent, self._merged(below)), below
        finally:
            if below is not None:
                self.release(below)

    def release(self, layer: Layer) -> None:
        """Give one reference back. The layer stays in the store until it is removed
        (see `collect`).
        """
        references = self._references.pop(layer.chain_id)
        if references > 1:
            self._references[layer.chain_id] = references - 1
        self._holds.let_go([layer.chain_id])

    @while_open
    async def rootfs(self, chain_id: ChainID | None) -> RootfsView:
        """The files of a layer and all below it, merged; ``None``: of nothing.

        Raises:
            StoreError: if the layer is not there.
        """
        layer = None
        if chain_id is None:
            await trio.lowlevel.checkpoint()
        else:
            layer = await self.find(chain_id)
            if layer is None:
                raise StoreError(f"there is no layer {chain_id}: pull an image that has it")
        return RootfsView(
            self._merged(layer),
            self._unpacker,
            self._scratch.name,
            self._lifetime,
            self._holds.holding_trees,
        )

    # Blobs.

    @while_open
    async def blob(self, digest: Digest) -> Path | None:
        """The file of a blob, not to be changed; ``None`` if it is not there."""
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
        """Take a blob in, in the block, and commit it there.

        Entering waits until nobody else, in any process, takes this blob in or unpacks it; then
        it may be there (`Ingest.committed`), or part of it (`Ingest.offset`). Left without
        commit, what came is kept, and the next to take it in goes on from there. Never wait for
        one blob while taking in another, or for `register` of this one.

        Raises:
            InvalidDigest: if the descriptor's digest is none.
            VerificationError: if the blob is there and has another size.
            StoreError: for what the disk does.
        """
        return self._content.ingest(descriptor)

    def batch(self) -> AbstractAsyncContextManager[Batch]:
        """Take blobs in whose digests are not known before, in the block; see `Batch`. Those
        that are not committed there are removed, however it ends.

        Raises:
            StoreError: for what the disk does.
        """
        return self._content.batch()

    @while_open
    async def put_blob(self, descriptor: Descriptor, data: bytes) -> None:
        """Store a blob that is in memory. One that is there already stays.

        Raises:
            VerificationError: if ``data`` is not what ``descriptor`` names.
        """
        await self._content.put(descriptor, data)

    @while_open
    async def read_blob(self, digest: Digest, *, limit: int = _DOCUMENT_LIMIT) -> bytes:
        """All of a blob, verified once more; for manifests and the like.

        Args:
            digest: Its name.
            limit: The most bytes to take into memory. What registries allow a manifest, 4 MiB,
                if not given (OCI distribution specification, "Pushing Manifests").

        Raises:
            StoreError: if it is not there, or larger than ``limit``.
            VerificationError: if it is damaged.
        """
        return await self._content.read(digest, limit=limit)

    @while_open
    async def find_document(self, digest: Digest) -> bytes | None:
        """All of a blob; ``None`` if it is not there, is no SHA-256 one, or is larger than what
        registries allow a manifest. It is not verified.

        Raises:
            StoreError: for what the disk does.
        """
        return await self._content.find_document(digest, limit=_DOCUMENT_LIMIT)

    @while_open
    async def open_blob(self, digest: Digest) -> BlobStream:
        """A stream of a blob; whoever opens it closes it.

        Raises:
            StoreError: if it is not there.
        """
        return await self._content.open(digest)

    # Images.

    @while_open
    async def put_image(
        self,
        reference: str,
        *,
        manifest: Descriptor,
        config: Descriptor,
        platform: str | None,
        chain_id: ChainID | None,
        index: Descriptor | None = None,
        documents: Mapping[Digest, bytes] = _NOTHING,
    ) -> None:
        """Let a reference stand for an image from now on; all of it must be in the store, or in
        ``documents``. Nothing is written if it does already.

        An image that had the reference on the same platform loses it, and stays. Other tools
        find the image in the layout under its reference: ``skopeo inspect oci:STORE:REFERENCE``.

        Args:
            reference: The image's full name.
            manifest: The image's manifest.
            config: The image's config.
            platform: What the image runs on, as ``os/architecture/variant``; one reference has
                an image for each.
            chain_id: The image's top layer; ``None`` if it has none, or they are not unpacked.
            index: The index the image was chosen from, if that is in the store.
            documents: Its manifest, config and index, if they may be missing yet.

        Raises:
            StoreError: if something of the image is not in the store.
            VerificationError: if a document is not what its digest says.
            PlatformError: if ``platform`` is none.
        """
        if platform is not None:
            parse_platform(platform)
        image = StoredImage(reference, platform, manifest, config, chain_id, index)
        if await self._catalog.read(self._is_put, image):
            return
        document = documents.get(manifest.digest)
        if document is None:
            document = await self.read_blob(manifest.digest)
        layers = await trio.to_thread.run_sync(_blobs_of_layers, document, manifest)
        blobs = [blob for blob in (manifest, config, index) if blob is not None]
        new = [(blob, documents[blob.digest]) for blob in blobs if blob.digest in documents]
        since = self._commits.failures
        async with self._content.written(new) as place:
            job = partial(self._put_image, image, layers, place)
            await self._commits.commit(job, since=since)

    @while_open
    async def put_images(self, images: Sequence[StoredImage]) -> None:
        """Store several images under their references in one transaction.

        If the call fails, no reference has changed. See `put_image`.

        Args:
            images: References and images. All parts of the images must be in the store.

        Raises:
            StoreError: if the store lacks a part of an image.
            PlatformError: if the platform of an image is invalid.
        """
        since = self._commits.failures
        layers: dict[Digest, list[Digest]] = {}
        for manifest in {image.manifest.digest: image.manifest for image in images}.values():
            document = await self.read_blob(manifest.digest)
            blobs = await trio.to_thread.run_sync(_blobs_of_layers, document, manifest)
            layers[manifest.digest] = blobs
        await trio.to_thread.run_sync(_check_platforms, images)
        await self._commits.commit(partial(self._put_images, images, layers), since=since)

    @while_open
    async def image(self, reference: str, platform: str | None = None) -> StoredImage | None:
        """What a reference stands for; ``None`` if that is nothing.

        Args:
            reference: The image's full name.
            platform: The platform it was put under; ``None``: the one put last.
        """
        return await self._catalog.read(find_image, reference, platform)

    @while_open
    async def looks_whole(self, image: StoredImage) -> bool:
        """Return whether an image is free of visible or known damage.

        The documents are compared with their digests. The layers get a quick check only, and
        must not have been found damaged before.
        """
        documents = (image.manifest, image.config, image.index)
        for each in documents:
            if each is not None and await self.find_document(each.digest) is None:
                return False
        return await self._catalog.read(self._is_stack_whole, image.chain_id)

    @while_open
    async def images(self, reference: str | None = None) -> list[StoredImage]:
        """All images, by reference; of one reference's platforms, the one put last first.

        Args:
            reference: The full name of those wanted; ``None``: all.
        """
        return await self._catalog.read(find_images, reference)

    @opens_block
    async def lease(self, *digests: Digest | None) -> AsyncIterator[Lease]:
        """Keep blobs, layers and images in the store for the block; see `Lease.hold`.

        The lease ends with the block, at the latest with the process.
        """
        async with open_lease(self._holds, self._lifetime) as lease:
            await lease.hold(*digests)
            yield lease

    @while_open
    async def remove(self, reference: str, platform: str | None = None) -> bool:
        """Take a reference from the image it stands for; whether there was one.

        The image stays until the next `collect`, which removes it if no other reference stands
        for it and nobody has a lease on it.

        Args:
            reference: The image's full name; or the digest of its manifest: then the image is
                removed from the list of images with all the references it has.
            platform: The platform it was put under; ``None``: all.
        """
        return await self._catalog.write(self._remove, reference, platform)

    @while_open
    async def collect(self, *, dry_run: bool = False) -> Collected:
        """Remove what nobody needs: images that no reference stands for, and layers, trees and
        blobs that no image needs, downloads that were broken off, and what a crash left.

        What a live process, this one or another, has a lease on or a reference to stays, and so
        does what it takes in or unpacks at the moment. Pulls go on meanwhile, and a blob that one
        of them brings is not removed before its lease has ended; whoever brings blobs without a
        lease (`ingest`, `put_blob`) may lose them at once.

        Cancelled, it has removed some of it; what of that still takes space is freed when the
        store is left, at the latest when it is next opened.

        Args:
            dry_run: Only tell what would be removed.
        """
        await self._holds.drop_idle()
        if dry_run:
            return await self._collector.find()
        return await self._collector.remove()

    @while_open
    async def usage(self) -> StoreUsage:
        """What the store and its images take on the disk. It looks at every file, so it takes a
        while; what comes or goes meanwhile may be counted or not.
        """
        return await self._meter.measure()

    @while_open
    async def check(self, *, repair: bool = False) -> CheckReport:
        """Look at all that is there: whether each blob has its digest, each tree is what its list
        of entries says (names, types, owners, modes, times, attributes, contents), the rows of the
        catalog agree with each other and with the images' documents, and other tools see the
        same images.

        It reads every byte of the store. Others may use it meanwhile, and what they bring is
        not looked at. What a crash left is no damage: the next `collect` removes it.

        Cancelled, nothing has changed, or all repairs are made.

        Args:
            repair: Drop what is damaged, with the layers that need it, whoever has them: the
                next pull of an image brings back what is missing, and no more. A catalog that
                is broken itself cannot be repaired.
        """
        return await self._checker.run(repair=repair)

    def _remove(self, connection: sqlite3.Connection, reference: str, platform: str | None) -> bool:
        if reference.startswith("sha256:"):
            found = drop_image(connection, Digest(reference))
        else:
            found = drop_references(connection, reference, platform) > 0
        self._write_index(connection)
        return found

    def _is_put(self, connection: sqlite3.Connection, image: StoredImage) -> bool:
        """Return whether the reference points to this image, with undamaged documents."""
        documents = (image.manifest, image.config, image.index)
        return find_image(connection, image.reference, None) == image and all(
            self._content.has_whole(connection, each.digest) for each in documents if each
        )

    def _put_image(
        self,
        image: StoredImage,
        layers: list[Digest],
        place: Job,
        connection: sqlite3.Connection,
    ) -> None:
        place(connection)
        self._put_images([image], {image.manifest.digest: layers}, connection)

    def _put_images(
        self,
        images: Iterable[StoredImage],
        layers: Mapping[Digest, list[Digest]],
        connection: sqlite3.Connection,
    ) -> None:
        known: set[Digest] = set()
        put: set[Digest] = set()
        for image in images:
            for blob in (image.manifest, image.config, image.index):
                if blob is None or blob.digest in known:
                    continue
                if find_blob(connection, blob.digest) is None:
                    raise StoreError(
                        f"{image.reference} lacks the blob {blob.digest}: store it first"
                    )
                known.add(blob.digest)
            if image.chain_id is not None and image.chain_id not in known:
                if find_layer(connection, image.chain_id) is None:
                    raise StoreError(
                        f"{image.reference} lacks the layer {image.chain_id}: store it first"
                    )
                known.add(image.chain_id)
            is_new = image.manifest.digest not in put
            put_image(connection, image, layers[image.manifest.digest] if is_new else ())
            put.add(image.manifest.digest)
        self._write_index(connection)

    def _is_index_right(self, connection: sqlite3.Connection) -> bool:
        """Whether ``index.json`` is as the catalog has it. It is not where a crash came between
        the two; and where somebody has changed it, the catalog wins.
        """
        try:
            document = (self._root / "index.json").read_bytes()
        except FileNotFoundError:
            return False
        return find_layout(connection) == digest_of(document)

    def _write_index(self, connection: sqlite3.Connection) -> None:
        """In a transaction: whoever writes last has seen what the others wrote."""
        document = encode_index(find_index_rows(connection))
        digest = digest_of(document)
        if find_layout(connection) == digest and self._is_index_right(connection):
            return
        path = self._root / "index.json"
        replace_file(path, document, temporary=self._scratch.new("index"))
        set_layout(connection, digest)

    def _find_rows(
        self, connection: sqlite3.Connection, chain_id: ChainID
    ) -> tuple[list[tuple[StoredLayer, Path]], DirectoryLayer | None]:
        """Read the rows and trees of a layer and its parents, top first.

        The walk stops at the first parent with a live layer object, and returns this object, too:
        otherwise each lookup of a layer would read all its parents again.
        """
        rows: list[tuple[StoredLayer, Path]] = []
        below: DirectoryLayer | None = None
        above: ChainID | None = chain_id
        while above is not None and below is None:
            row = find_layer(connection, above)
            if row is None:
                break
            rows.append((row, self._trees.path(row.tree)))
            self._holds.note_found(row.chain_id)
            if self._is_row_whole(connection, row):
                self._damaged.discard(row.chain_id)
            else:
                self._damaged.add(row.chain_id)
            above = row.parent
            if above is not None:
                below = self._sure(above)
        return rows, below

    def _is_stack_whole(self, connection: sqlite3.Connection, chain_id: ChainID | None) -> bool:
        while chain_id is not None:
            row = find_layer(connection, chain_id)
            if row is None or not self._is_row_whole(connection, row):
                return False
            chain_id = row.parent
        return True

    def _is_row_whole(self, connection: sqlite3.Connection, row: StoredLayer) -> bool:
        return self._content.has_whole(connection, row.blob) and self._trees.is_whole(row)

    def _sure(self, chain_id: ChainID) -> DirectoryLayer | None:
        """A layer that we have an object of, and that has not been removed since."""
        layer = self._layers.get(chain_id) if self._holds.is_sure(chain_id) else None
        if layer is None or chain_id in self._damaged:
            return None
        if any_noted() and (is_noted(layer.tree) or is_noted(self._content.path(layer.blob))):
            return None
        return layer

    def _object(
        self, row: StoredLayer, tree: Path, parent: DirectoryLayer | None
    ) -> DirectoryLayer:
        """The one object of a layer, unless the layer is another one now, after it was removed."""
        known = self._layers.get(row.chain_id)
        if known is not None and (known.blob, known.tree, known.parent) == (row.blob, tree, parent):
            return known
        stack = TreeStack(tree, None if parent is None else parent._stack)
        layer = DirectoryLayer(
            row.diff_id, row.chain_id, parent, row.blob, tree, self._content, stack
        )
        self._layers[row.chain_id] = layer
        return layer

    def _refer_new(self, row: StoredLayer, below: DirectoryLayer | None) -> DirectoryLayer:
        """A reference to a layer that is held already."""
        self._holds.note_found(row.chain_id)
        self._damaged.discard(row.chain_id)
        return self._refer(self._object(row, self._trees.path(row.tree), below))

    def _refer(self, layer: DirectoryLayer) -> DirectoryLayer:
        self._references[layer.chain_id] = self._references.get(layer.chain_id, 0) + 1
        return layer

    def _merged(self, layer: DirectoryLayer | None) -> MergedTree:
        """The trees of a layer and those below it."""
        return MergedTree(
            None if layer is None else layer._stack,
            check_cancelled=trio.from_thread.check_cancelled,
            surveys=self._surveys,
        )


def _blobs_of_layers(document: bytes, descriptor: Descriptor) -> list[Digest]:
    manifest = decode_manifest(document, descriptor.media_type)
    if not isinstance(manifest, Manifest):
        raise ManifestError(f"{descriptor.digest} is an index, and not the manifest of an image")
    return [layer.digest for layer in manifest.layers]


def _check_platforms(images: Iterable[StoredImage]) -> None:
    for platform in {image.platform for image in images}:
        if platform is not None:
            parse_platform(platform)


def _tar_size(connection: sqlite3.Connection, chain_id: ChainID) -> int:
    layer = find_layer(connection, chain_id)
    tree = None if layer is None else find_tree(connection, layer.tree)
    if tree is None:
        raise StoreError(f"there is no layer {chain_id}: pull an image that has it")
    return tree.size
