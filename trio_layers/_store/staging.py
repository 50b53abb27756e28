"""Stages: layers that are unpacked while they arrive, before their parent is known.

Two activities run side by side. The downloading task writes into the stage, and a worker follows
the file and makes the tree. When both have ended well, blob and tree become durable and visible
together. Little is left to do then: to put the layer on its parent.

The stage holds the lock on the blob until then, and no longer, so that a holder of the lock never
waits for another layer.
"""

from __future__ import annotations

import enum
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
from .._tree.unpacked import Unpacked
from .._util import construct, made_by
from .._workers.arrival_state import ArrivalState, Recalled, StartedOver, WorkerLost
from .._workers.build import Arrival, Restarts
from ..abc import Layer, ReportArrived, ReportUnpacked
from .content import Content
from .ingest import Ingest, open_ingest
from .parts import StoreParts
from .trees import Trees, stored_tree

__all__ = ["DirectoryStage", "Staging"]

PutLayer: TypeAlias = Callable[[ChainID | None, StoredTree | None, Digest], Awaitable[Layer]]

# Number of stages at once, each of which has two files open. There are more than downloads and
# workers, so that neither waits for the other.
_AT_ONCE: Final = 64

# Seconds between two looks at the position of a worker.
_LOOK: Final = 0.1


class _State(enum.Enum):
    ARRIVING = "the blob arrives, and the worker follows it"
    VERIFIED = "the blob is verified, and the worker goes on"
    UNPACKED = "the worker has ended well, and the caller has not finished the blob yet"
    FAILED = "the worker has failed, and the blob still arrives"
    LEAVING = "the worker has failed, the blob is verified, and its lock is being released"
    DONE = "blob and worker have both ended"


class _Event(enum.Enum):
    VERIFIED = "all bytes of the blob have arrived and are right"
    FAILED = "the blob cannot be unpacked"
    LEFT = "the worker has ended, and the lock on the blob is released"


_NEXT: Final = {
    (_State.ARRIVING, _Event.VERIFIED): _State.VERIFIED,
    (_State.ARRIVING, _Event.FAILED): _State.FAILED,
    (_State.ARRIVING, _Event.LEFT): _State.UNPACKED,
    (_State.VERIFIED, _Event.VERIFIED): _State.VERIFIED,
    (_State.VERIFIED, _Event.FAILED): _State.LEAVING,
    (_State.VERIFIED, _Event.LEFT): _State.DONE,
    (_State.UNPACKED, _Event.VERIFIED): _State.DONE,
    (_State.FAILED, _Event.VERIFIED): _State.LEAVING,
    (_State.LEAVING, _Event.VERIFIED): _State.LEAVING,
    (_State.LEAVING, _Event.LEFT): _State.DONE,
    (_State.DONE, _Event.VERIFIED): _State.DONE,
}
"""The state of a stage after an event. No other pair occurs."""

_COMPLETE: Final = frozenset({_State.VERIFIED, _State.LEAVING, _State.DONE})
_ENDED: Final = frozenset({_State.UNPACKED, _State.DONE})


@final
class Staging:
    """Opens stages.

    Args:
        parts: The parts of the store.
        content: The store's blobs.
        trees: The store's trees.
        put_layer: Puts a layer on its parent, given the parent's chain ID, the layer's tree, if
            it has one to share, and the digest of its blob.
    """

    def __init__(
        self, parts: StoreParts, content: Content, trees: Trees, put_layer: PutLayer
    ) -> None:
        self.parts = parts
        self.content = content
        self.trees = trees
        self.put_layer = put_layer
        self.limiter: trio.CapacityLimiter = trio.CapacityLimiter(_AT_ONCE)

    @asynccontextmanager
    async def open(
        self, descriptor: Descriptor, waiting: ReportArrived | None
    ) -> AsyncIterator[DirectoryStage]:
        """Open a stage; see `DirectoryStore.stage`."""
        stage = construct(DirectoryStage, self, descriptor)
        lifetime = self.parts.lifetime
        async with AsyncExitStack() as stack:
            async with lifetime.use():
                # The unpacked tree may wait for its parent layer for a long time.
                await stack.enter_async_context(self.parts.leases.holding(descriptor.digest))
            # From here on, the end of the store waits for this layer's work.
            stack.callback(stage._left.set)
            stack.enter_context(lifetime.own(stage._close))
            nursery = await stack.enter_async_context(open_hidden_nursery())
            stage._nursery = nursery
            try:
                async with lifetime.use():
                    await nursery.start(stage._work, waiting)
                # A cancellation from outside must not close the file while the caller writes it.
                stage._scope.shield = True
                yield stage
            finally:
                stage._scope.cancel()
                # A worker thread heeds no other cancellation.
                stage._arrival_state.abandon()
                nursery.cancel_scope.cancel()


@made_by("DirectoryStore.stage")
@final
class DirectoryStage:
    """One layer between its first byte and its registration: a `~trio_layers.abc.Stage`."""

    _sink: Ingest
    _nursery: trio.Nursery

    def __init__(self, staging: Staging, descriptor: Descriptor) -> None:
        self._staging = staging
        self._descriptor = descriptor
        self._arrival_state = ArrivalState()
        self._unpacked = 0
        self._state = _State.ARRIVING
        self._changed = trio.lowlevel.ParkingLot()
        self._tree: StoredTree | None = None
        self._error: Exception | None = None
        self._scope = trio.CancelScope()
        self._lifetime = staging.parts.lifetime
        self._left = trio.Event()

    def __repr__(self) -> str:
        return f"<DirectoryStage {self._descriptor.digest}: {self._state.value}>"

    @property
    def complete(self) -> bool:
        """See `Stage.complete <trio_layers.abc.Stage>`."""
        return self._state in _COMPLETE

    @property
    def offset(self) -> int:
        """Number of bytes received, in this attempt and earlier ones."""
        return self._sink.offset

    @property
    def digest(self) -> Digest:
        """The digest of the bytes received so far."""
        return self._sink.digest

    async def write(self, data: bytes) -> None:
        """Append some bytes; see `Ingest.write`."""
        await self._sink.write(data)

    async def restart(self) -> None:
        """Drop all received bytes; see `Ingest.restart`."""
        await self._sink.restart()

    async def wait_failed(self) -> Exception:
        """Wait until the layer cannot be unpacked, and return the error."""
        await trio.lowlevel.checkpoint()
        while self._error is None:
            await self._changed.park()
        return self._error

    @while_open
    async def finish(self, progress: ReportUnpacked) -> None:
        """Verify that all bytes have arrived; see `~trio_layers.abc.Stage`."""
        await self._sink.finish()
        self._advance(_Event.VERIFIED)
        self._nursery.start_soon(self._report, progress)

    @while_open
    async def commit(self, parent: ChainID | None) -> Layer:
        """Wait for the tree, and put the layer on its parent; see `~trio_layers.abc.Stage`."""
        await self._wait_for(_ENDED)
        if self._error is not None:
            raise self._error
        return await self._staging.put_layer(parent, self._tree, self._descriptor.digest)

    def _advance(self, event: _Event, error: Exception | None = None) -> None:
        self._state = _NEXT[self._state, event]
        if error is not None:
            self._error = error
        self._changed.unpark_all()

    async def _wait_for(self, states: frozenset[_State]) -> None:
        await trio.lowlevel.checkpoint()
        while self._state not in states:
            await self._changed.park()

    async def _close(self) -> None:
        """Close the file before the caller's block ends, as the store closes."""
        if self._error is None:
            self._error = closed_error(self._staging.parts.root)
            self._changed.unpark_all()
        self._scope.cancel()
        self._arrival_state.abandon()
        await self._left.wait()

    async def _report(self, progress: ReportUnpacked) -> None:
        reported = 0
        while self._state not in _ENDED:
            # After a restart, the progress stays at its old position until it passes that again.
            if self._unpacked > reported:
                reported = self._unpacked
                progress(reported)
            with trio.move_on_after(_LOOK):
                await self._wait_for(_ENDED)
        if self._error is None:
            progress(self._descriptor.size)

    async def _work(
        self, waiting: ReportArrived | None, task_status: trio.TaskStatus[None]
    ) -> None:
        """Hold the lock on the blob while it arrives and is unpacked."""
        try:
            with self._scope:
                await self._unpack(waiting, task_status)
        finally:
            self._left.set()

    async def _unpack(
        self, waiting: ReportArrived | None, task_status: trio.TaskStatus[None]
    ) -> None:
        staging = self._staging
        ingest = open_ingest(staging.content, self._descriptor, waiting)
        async with staging.limiter, ingest as self._sink:
            if self._sink.committed:
                self._advance(_Event.VERIFIED)
                self._arrival_state.grow(self._descriptor.size)
                self._arrival_state.mark_complete()
                blob = await staging.content.require(self._descriptor.digest)
                self._tree = await staging.trees.find(blob)
            else:
                self._arrival_state = self._sink._arrival_state
            task_status.started()
            try:
                if self._tree is None:
                    staging.parts.builder.prepare()
                    await self._build()
            except Exception as error:
                self._advance(_Event.FAILED, error)
                # The downloading task still needs the file and its lock.
                await self._wait_for(_COMPLETE)
        self._advance(_Event.LEFT)

    async def _build(self) -> None:
        """Make the tree while the blob arrives, again after each restart, and commit both."""
        staging, digest = self._staging, self._descriptor.digest
        since = staging.parts.commits.failures
        restarts = Restarts()
        if self._sink.committed:
            path = staging.content.path(digest)
        else:
            path = staging.parts.scratch.partial(digest)
            # Other blobs may have the worker until the first bytes arrive.
            await self._sink.arriving.wait()
        while True:
            self._unpacked = 0
            async with staging.parts.scratch.name("tree") as target:
                alone = staging.limiter.borrowed_tokens == 1
                arrival = Arrival(
                    *(path, self._arrival_state, self._descriptor, target, self._note_position),
                    alone=alone,
                    restarts=restarts,
                )
                try:
                    with staging.parts.commits.expecting():
                        unpacked = await staging.parts.builder.follow(arrival)
                except (StartedOver, Recalled, WorkerLost):
                    continue
                except (DecompressionError, UnpackError, VerificationError) as error:
                    if self._sink.committed:
                        await staging.content.expect_whole(digest, error)
                    raise
                if not unpacked.needs_lower:
                    self._tree = stored_tree(unpacked, unpacked.diff_id)
                job = partial(self._place, target=target, unpacked=unpacked)
                await self._sink._commit_with(job, since=since)
                return

    def _note_position(self, position: int) -> None:
        self._unpacked = position

    def _place(self, connection: sqlite3.Connection, *, target: Path, unpacked: Unpacked) -> None:
        """Make blob and tree visible (a job for `Commits`)."""
        staging, digest = self._staging, self._descriptor.digest
        if not self._sink.committed:
            path = staging.parts.scratch.partial(digest)
            staging.content.place(connection, path=path, descriptor=self._descriptor)
        if self._tree is None:
            set_diff_id(connection, digest, unpacked.diff_id)
        else:
            staging.trees.add_tree(connection, target=target, tree=self._tree, blob=digest)
