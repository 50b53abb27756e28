"""A layer on its way in: unpacked while it arrives, before what it stands on is known.

Two things happen side by side: whoever downloads writes into the stage, and a worker thread
follows the file and makes the tree. When both have ended well, blob and tree become durable and
visible together. What is left is cheap: to put the layer on its parent.

The lock on the blob is held until then, and no longer: who holds it waits for nothing that has to
do with another layer.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import final

import attrs
import trio

from .._manifest import Descriptor
from .._nursery import open_hidden_nursery
from .catalog import StoredTree, set_diff_id
from .commits import Commits
from .content import Content, Ingest
from .growth import Follower, Growth, StartedOver
from .scratch import Scratch
from .trees import Trees, Unpacked, stored_tree

__all__ = ["StagedLayer", "Staging"]


@final
@attrs.frozen
class Staging:
    """Where layers are staged."""

    content: Content
    trees: Trees
    scratch: Scratch
    commits: Commits

    @asynccontextmanager
    async def open(self, descriptor: Descriptor) -> AsyncIterator[StagedLayer]:
        """Stage a layer in the block; see `DirectoryStore.stage`."""
        layer = StagedLayer(self, descriptor)
        async with open_hidden_nursery() as nursery:
            try:
                await nursery.start(layer.work)
                yield layer
            finally:
                # The worker thread heeds no other cancellation.
                layer.growth.abandon()
                nursery.cancel_scope.cancel()


@final
class StagedLayer:
    """A layer between its first byte and its registration.

    Attributes:
        descriptor: Its blob.
        sink: Takes its bytes, until `arrived`.
        growth: How much of them is there.
        failed: It cannot become a layer, whatever comes.
    """

    sink: Ingest

    def __init__(self, staging: Staging, descriptor: Descriptor) -> None:
        self.descriptor = descriptor
        self.growth = Growth()
        self.failed = trio.Event()
        self._staging = staging
        self._arrived = trio.Event()
        self._ended = trio.Event()
        self._follower: Follower | None = None
        self._tree: StoredTree | None = None
        self._error: Exception | None = None

    @property
    def unpacked(self) -> int:
        """How many bytes of the blob have been unpacked."""
        if self._ended.is_set():
            return self.descriptor.size
        return 0 if self._follower is None else self._follower.position

    async def arrived(self) -> None:
        """All bytes have come. They are verified, and unpacked to their end.

        Raises:
            VerificationError: if they are not what the descriptor names; they are dropped.
            StoreError: for what the disk does.
        """
        await self.sink.finish()
        self._arrived.set()

    async def wait(self) -> StoredTree | None:
        """Wait until blob and tree are visible, and return the tree; ``None`` if the layer must
        be unpacked on what is below it.

        Raises:
            UnpackError: (and others) what unpacking has failed with.
        """
        await self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._tree

    async def work(self, task_status: trio.TaskStatus[None]) -> None:
        """Hold the lock while there is something to do under it."""
        content, trees = self._staging.content, self._staging.trees
        async with content.ingest(self.descriptor) as self.sink:
            if self.sink.committed:
                self._arrived.set()
                self.growth.grow(self.descriptor.size)
                self.growth.complete()
                self._tree = await trees.find(await content.stored(self.descriptor.digest))
            else:
                self.growth = self.sink.growth
            task_status.started()
            try:
                if self._tree is None:
                    await self._build()
            except Exception as error:
                self._error = error
                self.failed.set()
                # Until then the lock is for those who write.
                await self._arrived.wait()
        self._ended.set()

    async def _build(self) -> None:
        """Make the tree of all that comes, as often as that is started over."""
        staging = self._staging
        since = staging.commits.failures
        while True:
            async with staging.scratch.name("tree") as target:
                try:
                    unpacked = await staging.trees.follow(self._follow, target, self.descriptor)
                except StartedOver:
                    continue
                if not unpacked.needs_lower:
                    self._tree = stored_tree(unpacked, unpacked.diff_id)
                job = partial(self._place, target=target, unpacked=unpacked)
                await self.sink.commit_with(job, since=since)
                return

    def _follow(self) -> Follower:
        path = self._staging.content.path(self.descriptor.digest)
        if not self.sink.committed:
            path = self._staging.scratch.partial(self.descriptor.digest)
        self._follower = Follower(path, self.growth, self.descriptor)
        return self._follower

    def _place(self, connection: sqlite3.Connection, *, target: Path, unpacked: Unpacked) -> None:
        staging, digest = self._staging, self.descriptor.digest
        if not self.sink.committed:
            path = staging.scratch.partial(digest)
            staging.content.place(connection, path=path, descriptor=self.descriptor)
        if self._tree is not None:
            staging.trees.add_tree(connection, target=target, tree=self._tree, blob=digest)
        set_diff_id(connection, digest, unpacked.diff_id)
