"""Leases protect digests from collection while a process uses them.

A lease is a row with a holder's name (see ``scratch.py``) and a digest. The leases of a dead
process have no effect. The holder's file is locked before its first row is written. A process
counts its uses of each digest, and needs one row for all of them.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final, TypeVar, TypeVarTuple, final

import trio

from .._catalog.catalog import Catalog
from .._catalog.rows import add_leases, drop_leases, find_tree
from .._digest import ChainID, Digest
from .._errors import StoreBusy, StoreError
from .._lifetime import Lifetime, while_open
from .._nursery import open_hidden_nursery
from .._util import construct, made_by

__all__ = ["Lease", "LeaseCounts", "open_lease", "open_lease_counts"]

logger = logging.getLogger(__name__)

# Number of digests to release between two checkpoints: a millisecond of work.
_STRIDE: Final = 1024

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@asynccontextmanager
async def open_lease_counts(
    catalog: Catalog, holder: str, process: str, *, read_only: bool = False
) -> AsyncIterator[LeaseCounts]:
    """Count leases during the block; all of them end with it.

    Args:
        catalog: The catalog for the rows.
        holder: The holder's name.
        process: The holder's process; see `Process.encode`.
        read_only: Write no rows. Other processes can then delete blobs and layers in use.
    """
    holds = LeaseCounts(catalog, holder, process, read_only=read_only)
    try:
        async with open_hidden_nursery() as nursery:
            nursery.start_soon(holds.drop_in_background)
            try:
                yield holds
            finally:
                nursery.cancel_scope.cancel()
    finally:
        # The process may outlive the block, and other processes would count it as the holder. So
        # the rows must go after an error, too.
        await holds.drop_all()


@final
class LeaseCounts:
    """The digests that a holder protects, with the number of uses of each."""

    def __init__(
        self, catalog: Catalog, holder: str, process: str, *, read_only: bool = False
    ) -> None:
        self.read_only: bool = read_only
        self._catalog = catalog
        self._holder = holder
        self._process = process
        # The number of uses of each digest. Each has a row, or its row is being written.
        self._uses = Counter[Digest]()
        # The digests with a row. The rows of unused ones go with the next write.
        self._written: set[Digest] = set()
        self._idle: set[Digest] = set()
        self._sure: set[ChainID] = set()
        self._waste = trio.Event()

    async def hold(self, digests: Collection[Digest]) -> None:
        """Hold digests until `let_go` is called as often. The store may still lack them.

        The call is a checkpoint only if a row must be written.

        Cancellation: nothing is held, as after an error.
        """
        self._uses.update(digests)
        new = [digest for digest in digests if digest not in self._written]
        if not new:
            return
        try:
            await self._write(self._catalog.note, new, _nothing)
        except BaseException:
            self.let_go(digests)
            raise

    @asynccontextmanager
    async def holding(self, digest: Digest) -> AsyncIterator[None]:
        """Hold a digest for the block."""
        await self.hold([digest])
        try:
            yield
        finally:
            self.let_go([digest])

    @asynccontextmanager
    async def holding_trees(self, trees: Collection[Digest]) -> AsyncIterator[None]:
        """Protect trees from deletion during the block.

        Raises:
            StoreError: if one of them was removed before.
        """
        await self.hold(trees)
        try:
            await self._catalog.read(_expect_trees, trees)
            yield
        finally:
            self.let_go(trees)

    async def hold_with(
        self, digest: Digest, job: Callable[[sqlite3.Connection, *Ts], T], *args: *Ts
    ) -> T:
        """Hold a digest, and run a job in the same transaction (see `Catalog.note`).

        The rows that the job writes or finds are therefore held at every moment.
        """
        self._uses[digest] += 1
        try:
            return await self._write(self._catalog.note, [digest], job, *args)
        except BaseException:
            self.let_go([digest])
            raise

    def let_go(self, digests: Collection[Digest]) -> None:
        """Undo one `hold` without waiting. The background task removes the rows."""
        uses = self._uses
        for digest in digests:
            left = uses[digest] - 1
            if left > 0:
                uses[digest] = left
            else:
                uses.pop(digest, None)
                self._idle.add(digest)
        if self._idle:
            self._waste.set()

    async def let_go_of_many(self, digests: Collection[Digest]) -> None:
        """Undo one `hold` in short steps; shielded from cancellation."""
        rest = list(digests)
        with trio.CancelScope(shield=True):
            while rest:
                self.let_go(rest[-_STRIDE:])
                del rest[-_STRIDE:]
                if rest:
                    await trio.lowlevel.checkpoint()

    async def drop_in_background(self) -> None:
        """Remove unused rows until cancelled.

        The call that releases a layer is synchronous, and so cannot wait for the removal.
        """
        while True:
            await self._waste.wait()
            self._waste = trio.Event()
            await self.drop_idle()

    async def drop_idle(self) -> None:
        """Remove the rows of unused digests, and log failures.

        Rows that stay after a failure end with their holder at the latest.

        Cancellation: the rows stay for the next call.
        """
        if self._idle:
            with _logged():
                await self._write(self._catalog.note, (), _nothing)

    async def drop_idle_now(self) -> None:
        """Remove unused rows like `drop_idle`, but without cancellation.

        If another process locks the catalog, the background task removes the rows later.
        """
        if self._idle:
            with _logged(), suppress(StoreBusy):
                await self._write(self._catalog.note_now, (), _nothing)
            if self._idle:
                self._waste.set()

    async def drop_all(self) -> None:
        """Remove all rows of this holder, including rows in use.

        If another process locks the catalog, the rows stay without effect, because the holder's
        file is no longer locked.
        """
        if self._written or self._idle:
            self._written.clear()
            self._idle.clear()
            if self.read_only:
                return
            with _logged(), suppress(StoreBusy):
                await self._catalog.note_now(drop_leases, self._holder)

    # A held layer stays in the store, so that it need not be looked up again.

    def is_sure(self, chain_id: ChainID) -> bool:
        """Return whether the layer was found while it was held, and so is still in the store."""
        return chain_id in self._sure and chain_id in self._written

    def note_found(self, chain_id: ChainID) -> None:
        """Record that a catalog job has just read the row of a layer."""
        if chain_id in self._written:
            self._sure.add(chain_id)

    def forget(self) -> None:
        """Drop all records of found layers, since a repair removes held layers, too."""
        self._sure.clear()

    async def _write(
        self,
        note: Callable[[Callable[[sqlite3.Connection], T]], Awaitable[T]],
        digests: Collection[Digest],
        job: Callable[[sqlite3.Connection, *Ts], T],
        *args: *Ts,
    ) -> T:
        idle = {digest for digest in self._idle if digest not in self._uses}
        self._idle.clear()
        # From here on, a new use of one of these digests writes its row again, after this write.
        self._written -= idle
        self._sure -= idle

        def write(connection: sqlite3.Connection) -> T:
            drop_leases(connection, self._holder, idle)
            add_leases(connection, self._holder, digests, self._process)
            return job(connection, *args)

        try:
            if self.read_only:
                result = await self._catalog.read(job, *args)
            else:
                result = await note(write)
        except BaseException:
            self._idle |= idle
            raise
        # A layer that was found before its row was written may be gone.
        self._sure.difference_update(set(digests) - self._written)
        self._written.update(digests)
        return result


def _expect_trees(connection: sqlite3.Connection, trees: Collection[Digest]) -> None:
    for tree in trees:
        if find_tree(connection, tree) is None:
            raise StoreError(f"tree {tree} was removed from the store: pull an image that has it")


@contextmanager
def _logged() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        logger.warning("cannot end a lease: %s", error)


def _nothing(connection: sqlite3.Connection) -> None:
    pass


@asynccontextmanager
async def open_lease(holds: LeaseCounts, lifetime: Lifetime) -> AsyncIterator[Lease]:
    """Open a lease; see `DirectoryStore.lease`."""
    lease = construct(Lease, holds, lifetime)
    try:
        yield lease
    finally:
        await holds.let_go_of_many(lease.digests)
        if lifetime.is_open:  # else all rows of the holder go
            async with lifetime.use():
                await holds.drop_idle_now()


@made_by("DirectoryStore.lease")
@final
class Lease:
    """Keeps blobs, layers and images in the store. It comes from `DirectoryStore.lease`."""

    def __init__(self, holds: LeaseCounts, lifetime: Lifetime) -> None:
        self._lifetime = lifetime
        self._holds = holds
        self._digests: set[Digest] = set()

    def __repr__(self) -> str:
        return f"<Lease: {len(self._digests)} held>"

    @property
    def digests(self) -> frozenset[Digest]:
        """The held digests."""
        return frozenset(self._digests)

    @while_open
    async def hold(self, *digests: Digest | None) -> None:
        """Hold more digests until the end of the lease. The store may still lack them.

        The digest of a blob also holds the blob's tree. The chain ID of a layer also holds all
        layers below it. The digest of a manifest holds the whole image.

        Cancellation: none of the new digests is held.

        Args:
            digests: The digests to hold; ``None`` is skipped.

        Raises:
            StoreError: for errors of the disk.
            StoreClosed: if the store's block was left.
        """
        new = {digest for digest in digests if digest is not None} - self._digests
        await trio.lowlevel.checkpoint()
        await self._holds.hold(new)
        self._digests |= new
