"""Trees: unpacked layers, from a stream to a durable tree with a row.

A tree depends on its layer alone, so all images with the layer share it, as long as the layers
below fit the unpacker's assumptions (see `Unpacked.assumed`). Where they do not fit, the layer is
unpacked once more through the layers below, into a tree for this one chain.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, final

import attrs
import trio

from .._catalog.rows import (
    StoredBlob,
    StoredLayer,
    StoredTree,
    add_layer,
    add_tree,
    find_blob,
    find_layer,
    find_tree,
    set_diff_id,
)
from .._compression import Decompressor
from .._damage import forget_damage, is_whole_tree
from .._digest import ChainID, DiffID, Digest, Verifier, extend_chain
from .._disk_errors import disk_errors
from .._errors import DecompressionError, UnpackError, VerificationError, text_of
from .._files import file_name
from .._manifest import Descriptor
from .._rootfs.merged import MergedTree
from .._tree.unpacked import Unpacked, assumptions_hold
from .._workers.build import BlobReader, blob_descriptor, build
from .._workers.threads import THREADS
from .content import Content
from .partial import Partial
from .parts import StoreParts

__all__ = ["Base", "Trees", "stored_tree", "tree_upon"]

_READ: Final = 256 * 1024

# Number of bytes at the beginning of a stream to look at again if it fails: more than the longest
# gzip header.
_BEGINNING: Final = 128 * 1024


@attrs.frozen
class Base:
    """The layers below a new layer.

    Attributes:
        chain_id: The chain ID of the layer below; ``None`` below the bottom layer.
        lower: The layers below, merged. They are read from disk when first needed.
    """

    chain_id: ChainID | None
    lower: MergedTree


@final
class _StreamReader:
    """Reads a trio stream in a worker thread, hashes its bytes, and may keep them.

    Args:
        stream: The compressed layer.
        kept: The file for the bytes, if the store lacks the blob.

    Attributes:
        failure: The error that the stream raised, if any.
    """

    def __init__(self, stream: trio.abc.ReceiveStream, kept: Partial | None = None) -> None:
        self._stream = stream
        self._kept = kept
        self._verifier = Verifier()
        self._beginning: bytes | None = b""
        self.failure: Exception | None = None

    def read(self, size: int) -> bytes:
        try:
            data = bytes(trio.from_thread.run(self._stream.receive_some, size))
        except Exception as error:
            self.failure = error
            if self._decompression_began():
                raise
            raise DecompressionError(text_of(error)) from error
        if self._kept is not None:
            self._kept.append(data)
        else:
            self._verifier.update(data)
        if self._beginning is not None:
            self._beginning += data
            if len(self._beginning) > _BEGINNING:
                self._beginning = None
        return data

    def check(self) -> None:
        trio.from_thread.check_cancelled()

    def finish(self) -> tuple[Digest, int]:
        while self.read(_READ):
            pass
        if self._kept is not None:
            return self._kept.digest(), self._kept.size
        return self._verifier.digest, self._verifier.size

    def _decompression_began(self) -> bool:
        """Return whether the bytes read include the whole header of a compressed stream."""
        if self._beginning is None:
            return True
        decompressor = Decompressor()
        # The unpacker may have other limits, and the error is the stream's in any case.
        with suppress(DecompressionError, UnpackError):
            for _ in decompressor.feed(self._beginning):
                pass
        return decompressor.opened


@final
class Trees:
    """The trees of a store."""

    def __init__(self, parts: StoreParts, content: Content) -> None:
        self._parts = parts
        self._content = content
        self._catalog = parts.catalog
        self._leases = parts.leases
        self._trees = parts.root / "trees" / "sha256"
        self.threads: trio.CapacityLimiter = trio.CapacityLimiter(THREADS)

    def path(self, id: Digest) -> Path:
        """Return the path of a tree, which need not exist."""
        return self._trees / file_name(id)

    async def register(
        self, stream: trio.abc.ReceiveStream, base: Base, descriptor: Descriptor | None
    ) -> StoredLayer:
        """Make a stream's layer visible, and hold it; see `DirectoryStore.register`."""
        if descriptor is None:
            async with self._parts.scratch.name("partial") as path, self._partial(path) as kept:
                return await self._register_stream(stream, base, None, kept)
        async with self._leases.holding(descriptor.digest):
            layer = await self._find_registered(descriptor, base)
            if layer is not None:
                return layer
            return await self._register_locked(stream, base, descriptor)

    async def _find_registered(self, descriptor: Descriptor, base: Base) -> StoredLayer | None:
        """Register a layer from its existing blob and a tree that fits, if there are such.

        The caller then need not wait for the blob's lock: an image may contain one layer thousands
        of times.
        """
        blob, tree = await self._catalog.read(self._find_unpacked, descriptor.digest)
        if blob is None or tree is None or blob.size != descriptor.size:
            return None
        if not await self._fits(tree, base):
            return None
        # A hold on the blob also protects the tree that was made of it.
        return await self._write_layer_row(tree, base, blob.digest)

    def _find_unpacked(
        self, connection: sqlite3.Connection, digest: Digest
    ) -> tuple[StoredBlob | None, StoredTree | None]:
        """Find a blob and its tree, if neither is known to be damaged."""
        blob = find_blob(connection, digest)
        if blob is None or blob.diff_id is None or not self._content.has_whole(connection, digest):
            return None, None
        return blob, self._find_whole_tree(connection, blob.diff_id)

    async def _register_locked(
        self, stream: trio.abc.ReceiveStream, base: Base, descriptor: Descriptor
    ) -> StoredLayer:
        """Register a layer whose blob the caller holds, under the blob's lock.

        Other calls for the same blob wait for the lock, and then find the tree.
        """
        async with self._content.lock(descriptor.digest):
            blob = await self._content.claim(descriptor)
            if blob is None:
                path = self._parts.scratch.partial(descriptor.digest)
                async with self._partial(path) as kept:
                    return await self._register_stream(stream, base, descriptor, kept)
            layer = await self._register_stored(blob, base)
            return layer or await self._register_stream(stream, base, descriptor, None)

    async def _register_stored(self, blob: StoredBlob, base: Base) -> StoredLayer | None:
        """Register a layer whose blob was unpacked before, without the stream."""
        if blob.diff_id is None:
            return None
        chain = extend_chain(base.chain_id, blob.diff_id)
        layer = await self._leases.hold_with(chain, self._find_whole_layer, chain)
        if layer is not None:
            return layer
        self._leases.let_go([chain])
        tree = await self.find(blob)
        if tree is None:
            return None
        return await self.put_on(base, tree, blob.digest)

    async def find(self, blob: StoredBlob) -> StoredTree | None:
        """Find the tree of a blob that all images share."""
        if blob.diff_id is None:
            return None
        return await self._catalog.read(self._find_whole_tree, blob.diff_id)

    def is_whole(self, layer: StoredLayer) -> bool:
        """Return whether a layer's tree passes a quick check; blocking."""
        return is_whole_tree(self.path(layer.tree))

    def _find_whole_tree(self, connection: sqlite3.Connection, id: Digest) -> StoredTree | None:
        tree = find_tree(connection, id)
        return tree if tree is not None and is_whole_tree(self.path(id)) else None

    def _find_whole_layer(
        self, connection: sqlite3.Connection, chain_id: ChainID
    ) -> StoredLayer | None:
        layer = find_layer(connection, chain_id)
        return layer if layer is not None and self.is_whole(layer) else None

    async def put_on(self, base: Base, tree: StoredTree | None, blob: Digest) -> StoredLayer:
        """Make a layer visible, and hold it.

        If its tree does not fit the base, or there is none, the stored blob is unpacked once
        more. The caller holds blob and tree.
        """
        if tree is not None and await self._fits(tree, base):
            return await self._write_layer_row(tree, base, blob)
        async with self._unpack_upon(base, blob) as tree:
            return await self._write_layer_row(tree, base, blob)

    async def _write_layer_row(self, tree: StoredTree, base: Base, blob: Digest) -> StoredLayer:
        """Write the row of a layer, and hold the layer.

        Tree and blob are durable already. The row becomes durable with that of the image.
        """
        layer = StoredLayer(
            extend_chain(base.chain_id, tree.diff_id), tree.diff_id, base.chain_id, tree.id, blob
        )
        return await self._leases.hold_with(layer.chain_id, _find_or_add_layer, layer)

    def add_tree(
        self, connection: sqlite3.Connection, *, target: Path, tree: StoredTree, blob: Digest
    ) -> None:
        """Move a tree to its place and add its row (a job for `Commits`).

        Args:
            connection: The catalog, in a transaction.
            target: The directory where the tree was made.
            tree: The tree. If the store already has it, nothing is moved.
            blob: The digest of the blob that unpacks to the tree.
        """
        place = self.path(tree.id)
        stored = find_tree(connection, tree.id) is not None
        if not (stored and is_whole_tree(place)):
            # The tree is damaged, or has no row, because a crash came just before the row's write.
            self._parts.scratch.discard(place)
            os.rename(target, place)
            forget_damage(place)
            if not stored:
                add_tree(connection, tree)
        set_diff_id(connection, blob, tree.diff_id)

    async def _register_stream(
        self,
        stream: trio.abc.ReceiveStream,
        base: Base,
        descriptor: Descriptor | None,
        kept: Partial | None,
    ) -> StoredLayer:
        """Unpack a stream and register the layer; keep the blob in ``kept``, if given."""
        since = self._parts.commits.failures
        async with self._parts.scratch.name("tree") as target:
            reader = _StreamReader(stream, kept)
            unpacked, blob = await self._unpack(reader, target, expected=descriptor)
            async with self._leases.holding(blob.digest):
                if kept is not None:
                    await self._content.keep(kept, blob)
                tree = None
                if not unpacked.needs_lower:
                    tree = stored_tree(unpacked, unpacked.diff_id)
                    if await self._fits(tree, base):
                        job = partial(self.add_tree, target=target, tree=tree, blob=blob.digest)
                        await self._parts.commits.commit(job, since=since)
                        return await self._write_layer_row(tree, base, blob.digest)
                return await self.put_on(base, None, blob.digest)

    @asynccontextmanager
    async def _unpack_upon(self, base: Base, digest: Digest) -> AsyncIterator[StoredTree]:
        """Unpack a stored blob through the layers below it, and hold the tree for the block."""
        blob = await self._content.require(digest)
        since = self._parts.commits.failures
        async with self._parts.scratch.name("tree") as target:
            try:
                async with await self._content.open(digest) as stream:
                    unpacked, _ = await self._unpack(
                        _StreamReader(stream),
                        target,
                        lower=base.lower,
                        expected=blob_descriptor(digest, blob.size),
                    )
            except (DecompressionError, UnpackError, VerificationError) as error:
                await self._content.expect_whole(digest, error)
                raise
            tree = stored_tree(unpacked, tree_upon(base.chain_id, unpacked.diff_id))
            async with self._leases.holding(tree.id):
                job = partial(self.add_tree, target=target, tree=tree, blob=digest)
                await self._parts.commits.commit(job, since=since)
                yield tree

    @asynccontextmanager
    async def _partial(self, path: Path) -> AsyncIterator[Partial]:
        new = partial(Partial, path, since=self._parts.commits.failures, fresh=True)
        kept = await trio.to_thread.run_sync(new)
        try:
            yield kept
        finally:
            kept.close()

    async def _fits(self, tree: StoredTree, base: Base) -> bool:
        if not tree.assumed:
            return True

        def check() -> bool:
            with disk_errors(self._trees):
                return assumptions_hold(tree.assumed, base.lower)

        return await trio.to_thread.run_sync(check)

    async def _unpack(
        self,
        reader: BlobReader,
        target: Path,
        *,
        lower: MergedTree | None = None,
        expected: Descriptor | None = None,
    ) -> tuple[Unpacked, Descriptor]:
        """Return the tree, not durable yet, and the descriptor of the bytes read."""
        limits = self._parts.limits
        work = partial(build, reader, target, limits=limits, lower=lower, expected=expected)
        return await trio.to_thread.run_sync(work, limiter=self.threads)


def _find_or_add_layer(connection: sqlite3.Connection, layer: StoredLayer) -> StoredLayer:
    add_layer(connection, layer)
    found = find_layer(connection, layer.chain_id)
    assert found is not None
    return found


def tree_upon(base: ChainID | None, diff_id: DiffID) -> Digest:
    """Return the ID of a layer's tree that fits one base only: the layer's chain ID.

    Without a base, the chain ID is the diff ID, which is the ID of the shared tree. The ID is
    then the chain ID upon an empty string.
    """
    return extend_chain(ChainID(Digest("")) if base is None else base, diff_id)


def stored_tree(unpacked: Unpacked, id: Digest) -> StoredTree:
    """Return the row of a new tree."""
    return StoredTree(id, unpacked.diff_id, unpacked.size, unpacked.entries, unpacked.assumed)
