"""A layer on its way in: unpacked while it arrives, before what it stands on is known.

Two things happen side by side: whoever downloads writes into the stage, and a worker follows the
file and makes the tree. When both have ended well, blob and tree become durable and
visible together. What is left is cheap: to put the layer on its parent.

The lock on the blob is held until then, and no longer: who holds it waits for nothing that has to
do with another layer.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias, final

import trio

from .._catalog.catalog import closed_error
from .._catalog.rows import StoredTree, set_diff_id
from .._digest import ChainID, Digest
from .._errors import DecompressionError, UnpackError, VerificationError
from .._lifetime import while_open
from .._manifest import Descriptor
from .._nursery import open_hidden_nursery
from .._workers.arrival_state import ArrivalState, Recalled, StartedOver, WorkerLost
from .._workers.build import Arrival, Past
from ..abc import Layer, ReportArrived, ReportUnpacked
from .commits import Commits
from .content import Content, Ingest
from .leases import LeaseCounts
from .scratch import Scratch
from .trees import Trees, Unpacked, stored_tree

__all__ = ["DirectoryStage", "Staging"]

Put: TypeAlias = Callable[[ChainID | None, StoredTree | None, Digest], Awaitable[Layer]]


# What is written to, or unpacked, at once: each has two files open. More than there are downloads
# and workers, so that neither waits for the other.
_AT_ONCE: Final = 64

# Seconds between two looks at how far a worker is.
_LOOK: Final = 0.1


@final
class Staging:
    """Where layers are staged.

    Args:
        put: Puts a layer on what is below it, given its tree, if it has one to share, and its
            blob; `DirectoryStore` does it.
    """

    def __init__(
        self,
        content: Content,
        trees: Trees,
        scratch: Scratch,
        commits: Commits,
        holds: LeaseCounts,
        put: Put,
    ) -> None:
        self.content = content
        self.holds = holds
        self.trees = trees
        self.scratch = scratch
        self.commits = commits
        self.put = put
        self.limiter = trio.CapacityLimiter(_AT_ONCE)

    @asynccontextmanager
    async def open(
        self, descriptor: Descriptor, waiting: ReportArrived | None
    ) -> AsyncIterator[DirectoryStage]:
        stage = DirectoryStage(self, descriptor)
        lifetime = self.content.lifetime
        async with AsyncExitStack() as stack:
            async with lifetime.use():
                # The unpacked tree may wait for its parent layer for a long time.
                await stack.enter_async_context(self.holds.holding(descriptor.digest))
            # From here on, the end of the store waits for this layer's work.
            stack.callback(stage._left.set)
            stack.enter_context(lifetime.own(stage._close))
            nursery = await stack.enter_async_context(open_hidden_nursery())
            stage._nursery = nursery
            try:
                async with lifetime.use():
                    await nursery.start(stage._work, waiting)
                # Cancelled from outside, it must not leave the file before who writes into it.
                stage._scope.shield = True
                yield stage
            finally:
                stage._scope.cancel()
                # A worker thread heeds no other cancellation.
                stage._growth.abandon()
                nursery.cancel_scope.cancel()


@final
class DirectoryStage:
    """One layer between its first byte and its registration: a `~trio_layers.abc.Stage`."""

    _sink: Ingest
    _nursery: trio.Nursery

    def __init__(self, staging: Staging, descriptor: Descriptor) -> None:
        self._staging = staging
        self._descriptor = descriptor
        self._growth = ArrivalState()
        self._unpacked = 0
        self._complete = trio.Event()
        self._failed = trio.Event()
        self._ended = trio.Event()
        self._tree: StoredTree | None = None
        self._error: Exception | None = None
        self._scope = trio.CancelScope()
        self._lifetime = staging.content.lifetime
        self._left = trio.Event()

    @property
    def complete(self) -> bool:
        return self._complete.is_set()

    @property
    def offset(self) -> int:
        return self._sink.offset

    @property
    def digest(self) -> Digest:
        return self._sink.digest

    async def write(self, data: bytes) -> None:
        await self._sink.write(data)

    async def restart(self) -> None:
        await self._sink.restart()

    async def wait_failed(self) -> Exception:
        await self._failed.wait()
        assert self._error is not None
        return self._error

    @while_open
    async def finish(self, progress: ReportUnpacked) -> None:
        await self._sink.finish()
        self._complete.set()
        self._nursery.start_soon(self._report, progress)

    @while_open
    async def commit(self, parent: ChainID | None) -> Layer:
        await self._ended.wait()
        if self._error is not None:
            raise self._error
        return await self._staging.put(parent, self._tree, self._descriptor.digest)

    async def _close(self) -> None:
        """Close the file before the caller's block ends, as the store closes."""
        if self._error is None:
            self._error = closed_error(self._staging.content.root)
        self._failed.set()
        self._scope.cancel()
        self._growth.abandon()
        await self._left.wait()

    async def _report(self, progress: ReportUnpacked) -> None:
        reported = 0
        while not self._ended.is_set():
            # After a restart, the progress stays at its old position until it passes that again.
            if self._unpacked > reported:
                reported = self._unpacked
                progress(reported)
            with trio.move_on_after(_LOOK):
                await self._ended.wait()
        if self._error is None:
            progress(self._descriptor.size)

    async def _work(
        self, waiting: ReportArrived | None, task_status: trio.TaskStatus[None]
    ) -> None:
        """Hold the lock while there is something to do under it."""
        try:
            with self._scope:
                await self._unpack(waiting, task_status)
        finally:
            self._left.set()

    async def _unpack(
        self, waiting: ReportArrived | None, task_status: trio.TaskStatus[None]
    ) -> None:
        content, trees = self._staging.content, self._staging.trees
        ingest = content.ingest(self._descriptor, waiting)
        async with self._staging.limiter, ingest as self._sink:
            if self._sink.committed:
                self._complete.set()
                self._growth.grow(self._descriptor.size)
                self._growth.complete()
                self._tree = await trees.find(await content.stored(self._descriptor.digest))
            else:
                self._growth = self._sink.growth
            task_status.started()
            try:
                if self._tree is None:
                    self._staging.trees.builder.prepare()
                    await self._build()
            except Exception as error:
                self._error = error
                self._failed.set()
                # Until then the lock is for those who write.
                await self._complete.wait()
        self._ended.set()

    async def _build(self) -> None:
        """Make the tree of all that comes, as often as that is started over."""
        staging, digest = self._staging, self._descriptor.digest
        since = staging.commits.failures
        past = Past()
        if self._sink.committed:
            path = staging.content.path(digest)
        else:
            path = staging.scratch.partial(digest)
            # Until there is something to do, others may have the worker.
            await self._sink.arriving.wait()
        while True:
            self._unpacked = 0
            async with staging.scratch.name("tree") as target:
                alone = staging.limiter.borrowed_tokens == 1
                arrival = Arrival(
                    *(path, self._growth, self._descriptor, target, self._see),
                    alone=alone,
                    past=past,
                )
                try:
                    with staging.commits.expecting():
                        unpacked = await staging.trees.builder.follow(arrival)
                except (StartedOver, Recalled, WorkerLost):
                    continue
                except (DecompressionError, UnpackError, VerificationError) as error:
                    if self._sink.committed:
                        await staging.content.expect_whole(digest, error)
                    raise
                if not unpacked.needs_lower:
                    self._tree = stored_tree(unpacked, unpacked.diff_id)
                job = partial(self._place, target=target, unpacked=unpacked)
                await self._sink.commit_with(job, since=since)
                return

    def _see(self, position: int) -> None:
        self._unpacked = position

    def _place(self, connection: sqlite3.Connection, *, target: Path, unpacked: Unpacked) -> None:
        staging, digest = self._staging, self._descriptor.digest
        if not self._sink.committed:
            path = staging.scratch.partial(digest)
            staging.content.place(connection, path=path, descriptor=self._descriptor)
        if self._tree is None:
            set_diff_id(connection, digest, unpacked.diff_id)
        else:
            staging.trees.add_tree(connection, target=target, tree=self._tree, blob=digest)
