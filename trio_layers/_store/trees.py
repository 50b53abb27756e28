"""Layers, unpacked: from a stream to a tree with a row.

A tree depends on its layer alone, so that it is shared by all images that have the layer, as
long as what the layer leaves open is below it as the unpacker assumed. Where it is not, the
layer is unpacked once more through what is below, into a tree of that one chain.
"""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, Protocol, final

import attrs
import trio

from .._catalog.catalog import Catalog
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
from .._entries import Summary
from .._errors import DecompressionError, UnpackError, VerificationError, text_of
from .._files import disk_errors, file_name
from .._manifest import Descriptor
from .._rootfs.merged import MergedTree
from .._rootfs.view import Exporter
from .._workers.build import Arrival, Source, Unpack, Unpacked, build, describe
from .._workers.lending import Lending, follow_in_thread
from .commits import Commits
from .content import Content, Partial
from .leases import LeaseCounts
from .scratch import Scratch

__all__ = ["Base", "Builder", "Threads", "Trees", "Unpacked", "Unpacker", "stored_tree"]

_CHUNK: Final = 256 * 1024

# The longest beginning that is looked at again when a stream fails: a gzip header is shorter.
_BEGINNING: Final = 128 * 1024


class Unpacker(Exporter, Protocol):
    """Makes trees, and writes them elsewhere. Its functions block, and are called in worker
    threads, several at once.
    """

    @property
    def unpack(self) -> Unpack: ...

    def holds(self, assumed: tuple[bytes, ...], lower: MergedTree) -> bool:
        """Whether what was assumed is so on top of ``lower``."""
        ...

    def verify(self, target: Path, *, check_cancelled: Callable[[], None]) -> Summary:
        """Compare a tree with its list of entries, whose summary is returned.

        Raises:
            StoreError: if there is a difference; the message names it, but not the tree.
        """
        ...


class Builder(Protocol):
    """Makes trees of blobs while they arrive, several at once, in workers of some kind.

    Attributes:
        limiter: A token of it is a worker.
    """

    limiter: trio.CapacityLimiter

    @property
    def waiting(self) -> int:
        """Number of blobs that wait for a worker, including blobs that gave one back."""
        ...

    def prepare(self) -> None:
        """There will be something to do soon."""
        ...

    async def follow(self, arrival: Arrival) -> Unpacked:
        """See `trio_layers._workers.build.follow`. However this ends, nobody is at work in the
        arrival's ``target`` any more.

        Raises:
            Recalled, WorkerLost: if the caller must start over with an empty target.
            WorkerError: if two workers died of this blob or did not answer.
        """
        ...


@final
class Threads:
    """A `Builder` that uses threads of this process."""

    def __init__(self, unpack: Unpack, number: int) -> None:
        self.limiter: trio.CapacityLimiter = trio.CapacityLimiter(number)
        self._lending = Lending(self.limiter)
        self._threads = trio.CapacityLimiter(math.inf)
        self._unpack = unpack

    @property
    def waiting(self) -> int:
        return self._lending.waiting

    def prepare(self) -> None:
        """Threads start at once."""

    async def follow(self, arrival: Arrival) -> Unpacked:
        async with self._lending.lend(arrival) as loan:
            return await follow_in_thread(self._unpack, loan, self._threads)


@attrs.frozen
class Base:
    """What a layer is put on.

    Attributes:
        chain_id: The chain ID of the layer below; ``None``: nothing is below.
        lower: What is below, merged; it is read from disk when it is first needed.
    """

    chain_id: ChainID | None
    lower: MergedTree


@final
class _Reader:
    """A stream of trio, counted, hashed and, if its blob is not in the store yet, kept on its
    way.
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
            if self._opened():
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
        """Read on to the end; the digest and the size of it all."""
        while self.read(_CHUNK):
            pass
        if self._kept is not None:
            return self._kept.digest(), self._kept.size
        return self._verifier.digest, self._verifier.size

    def _opened(self) -> bool:
        """Whether the unpacker's decompressor has the beginning of the stream behind it."""
        if self._beginning is None:
            return True
        decompressor = Decompressor()
        # The unpacker's limits may be others, and what fails is the stream.
        with suppress(DecompressionError, UnpackError):
            for _ in decompressor.feed(self._beginning):
                pass
        return decompressor.opened


@final
class Trees:
    """The trees of a store, and how they come about."""

    def __init__(
        self,
        root: Path,
        *,
        catalog: Catalog,
        content: Content,
        scratch: Scratch,
        commits: Commits,
        holds: LeaseCounts,
        unpacker: Unpacker,
        builder: Builder | None,
    ) -> None:
        self._trees = root / "trees" / "sha256"
        self._catalog = catalog
        self._commits = commits
        self._holds = holds
        self._content = content
        self._scratch = scratch
        self._unpacker = unpacker
        # Inflating and hashing keep a core busy, and some wait for bytes that have not arrived.
        number = max(4, 2 * (os.cpu_count() or 1))
        self.threads = trio.CapacityLimiter(number)
        self.builder: Builder = builder or Threads(unpacker.unpack, number)

    def path(self, id: Digest) -> Path:
        """Where a tree is, if it is there."""
        return self._trees / file_name(id)

    async def register(
        self, stream: trio.abc.ReceiveStream, base: Base, descriptor: Descriptor | None
    ) -> StoredLayer:
        """Make the layer visible that the stream holds, and hold it; see
        `DirectoryStore.register`.
        """
        if descriptor is None:
            async with self._scratch.name("partial") as path, self._partial(path) as kept:
                return await self._from_stream(stream, base, None, kept)
        async with self._holds.holding(descriptor.digest):
            layer = await self._known(descriptor, base)
            if layer is not None:
                return layer
            return await self._register_locked(stream, base, descriptor)

    async def _known(self, descriptor: Descriptor, base: Base) -> StoredLayer | None:
        """Find a layer by its existing blob and a tree that fits.

        The caller then need not wait for the blob's lock: an image may contain one layer thousands
        of times.
        """
        blob, tree = await self._catalog.read(self._find_unpacked, descriptor.digest)
        if blob is None or tree is None or blob.size != descriptor.size:
            return None
        if not await self._fits(tree, base):
            return None
        # A hold on the blob also protects the tree that was made of it.
        return await self._put(tree, base, blob.digest)

    def _find_unpacked(
        self, connection: sqlite3.Connection, digest: Digest
    ) -> tuple[StoredBlob | None, StoredTree | None]:
        """Find a blob and its tree, where neither is known to be damaged."""
        blob = find_blob(connection, digest)
        if blob is None or blob.diff_id is None or not self._content.has_whole(connection, digest):
            return None, None
        return blob, self._find_whole(connection, blob.diff_id)

    async def _register_locked(
        self, stream: trio.abc.ReceiveStream, base: Base, descriptor: Descriptor
    ) -> StoredLayer:
        """Register a layer, with a hold on its blob."""
        # The lock is held until the tree is there, so that others who want it wait, and find it.
        async with self._content.lock(descriptor.digest):
            blob = await self._content.claim(descriptor)
            if blob is None:
                path = self._scratch.partial(descriptor.digest)
                async with self._partial(path) as kept:
                    return await self._from_stream(stream, base, descriptor, kept)
            layer = await self._from_what_is_there(blob, base)
            return layer or await self._from_stream(stream, base, descriptor, None)

    async def _from_what_is_there(self, blob: StoredBlob, base: Base) -> StoredLayer | None:
        """The layer, if its blob has been unpacked before: the stream need not be read."""
        if blob.diff_id is None:
            return None
        chain = extend_chain(base.chain_id, blob.diff_id)
        layer = await self._holds.hold_with(chain, self._find_whole_layer, chain)
        if layer is not None:
            return layer
        self._holds.let_go([chain])
        tree = await self.find(blob)
        if tree is None:
            return None
        return await self.put_on(base, tree, blob.digest)

    async def find(self, blob: StoredBlob) -> StoredTree | None:
        """The tree that a blob was unpacked to, for layers to share."""
        if blob.diff_id is None:
            return None
        return await self._catalog.read(self._find_whole, blob.diff_id)

    def is_whole(self, layer: StoredLayer) -> bool:
        """Return whether a layer's tree passes a quick check; blocking."""
        return is_whole_tree(self.path(layer.tree))

    def _find_whole(self, connection: sqlite3.Connection, id: Digest) -> StoredTree | None:
        tree = find_tree(connection, id)
        return tree if tree is not None and is_whole_tree(self.path(id)) else None

    def _find_whole_layer(
        self, connection: sqlite3.Connection, chain_id: ChainID
    ) -> StoredLayer | None:
        layer = find_layer(connection, chain_id)
        return layer if layer is not None and self.is_whole(layer) else None

    async def put_on(self, base: Base, tree: StoredTree | None, blob: Digest) -> StoredLayer:
        """Make the layer visible, and hold it, whose tree is this one, where that fits. Else, and
        if it has none to share, it is unpacked once more, from its blob, which is stored. Both
        are to be held.
        """
        if tree is not None and await self._fits(tree, base):
            return await self._put(tree, base, blob)
        async with self._upon(base, blob) as tree:
            return await self._put(tree, base, blob)

    async def _put(self, tree: StoredTree, base: Base, blob: Digest) -> StoredLayer:
        layer = StoredLayer(
            extend_chain(base.chain_id, tree.diff_id), tree.diff_id, base.chain_id, tree.id, blob
        )
        # Trees and blobs are durable; the row is with the image's.
        return await self._holds.hold_with(layer.chain_id, _add_layer, layer)

    def add_tree(
        self, connection: sqlite3.Connection, *, target: Path, tree: StoredTree, blob: Digest
    ) -> None:
        """A job for `Commits`: give the tree at ``target`` its place unless it has one, and its
        row. It is what ``blob`` unpacks to.
        """
        place = self.path(tree.id)
        stored = find_tree(connection, tree.id) is not None
        if not (stored and is_whole_tree(place)):
            # The tree is damaged, or has no row, because a crash came just before the row's write.
            self._scratch.discard(place)
            os.rename(target, place)
            forget_damage(place)
            if not stored:
                add_tree(connection, tree)
        set_diff_id(connection, blob, tree.diff_id)

    async def _from_stream(
        self,
        stream: trio.abc.ReceiveStream,
        base: Base,
        descriptor: Descriptor | None,
        kept: Partial | None,
    ) -> StoredLayer:
        since = self._commits.failures
        async with self._scratch.name("tree") as target:
            unpacked, blob = await self._unpack(_Reader(stream, kept), target, expected=descriptor)
            async with self._holds.holding(blob.digest):
                if kept is not None:
                    await self._content.keep(kept, blob)
                tree = None
                if not unpacked.needs_lower:
                    tree = stored_tree(unpacked, unpacked.diff_id)
                    if await self._fits(tree, base):
                        job = partial(self.add_tree, target=target, tree=tree, blob=blob.digest)
                        await self._commits.commit(job, since=since)
                        return await self._put(tree, base, blob.digest)
                return await self.put_on(base, None, blob.digest)

    @asynccontextmanager
    async def _upon(self, base: Base, digest: Digest) -> AsyncIterator[StoredTree]:
        """Unpack a stored blob through what is below it; the tree is held for the block."""
        blob = await self._content.stored(digest)
        since = self._commits.failures
        async with self._scratch.name("tree") as target:
            try:
                async with await self._content.open(digest) as stream:
                    unpacked, _ = await self._unpack(
                        _Reader(stream),
                        target,
                        lower=base.lower,
                        expected=describe(digest, blob.size),
                    )
            except (DecompressionError, UnpackError, VerificationError) as error:
                await self._content.expect_whole(digest, error)
                raise
            tree = stored_tree(unpacked, tree_upon(base.chain_id, unpacked.diff_id))
            async with self._holds.holding(tree.id):
                job = partial(self.add_tree, target=target, tree=tree, blob=digest)
                await self._commits.commit(job, since=since)
                yield tree

    @asynccontextmanager
    async def _partial(self, path: Path) -> AsyncIterator[Partial]:
        new = partial(Partial, path, since=self._commits.failures, fresh=True)
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
                return self._unpacker.holds(tree.assumed, base.lower)

        return await trio.to_thread.run_sync(check)

    async def _unpack(
        self,
        reader: Source,
        target: Path,
        *,
        lower: MergedTree | None = None,
        expected: Descriptor | None = None,
    ) -> tuple[Unpacked, Descriptor]:
        """The tree, not durable yet, and the descriptor of what was read."""
        work = partial(build, self._unpacker.unpack, reader, target, lower=lower, expected=expected)
        return await trio.to_thread.run_sync(work, limiter=self.threads)


def _add_layer(connection: sqlite3.Connection, layer: StoredLayer) -> StoredLayer:
    add_layer(connection, layer)
    there = find_layer(connection, layer.chain_id)
    assert there is not None
    return there


def tree_upon(base: ChainID | None, diff_id: DiffID) -> Digest:
    """The ID of a layer's tree that is for one base only: the layer's chain ID. Upon nothing
    that would be the diff ID, which is the ID of the tree that others share.
    """
    return extend_chain(ChainID(Digest("")) if base is None else base, diff_id)


def stored_tree(unpacked: Unpacked, id: Digest) -> StoredTree:
    return StoredTree(id, unpacked.diff_id, unpacked.size, unpacked.entries, unpacked.assumed)
