"""Leases: what must stay in the store, while somebody uses it.

A lease is a row with a holder's name (see ``scratch.py``) and a digest; those of a process that
is dead count for nothing. The holder's file is locked before its first row is written. Within a
process the uses of a digest are counted, so that it has one row however many there are.
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
    """Hold things in the store for the block, at the longest.

    Args:
        catalog: The catalog for the rows.
        holder: The holder's name.
        process: The holder's process; see `Process.encode`.
        read_only: Write no rows. Other processes can then delete the things in use.
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
    """What a holder keeps in the store."""

    def __init__(
        self, catalog: Catalog, holder: str, process: str, *, read_only: bool = False
    ) -> None:
        self.read_only: bool = read_only
        self._catalog = catalog
        self._holder = holder
        self._process = process
        # How often each is in use; a row is there, or on its way.
        self._uses = Counter[Digest]()
        # Those that have a row. Some are not in use any more, and wait for the next to be written.
        self._written: set[Digest] = set()
        self._idle: set[Digest] = set()
        self._sure: set[ChainID] = set()
        self._waste = trio.Event()

    async def hold(self, digests: Collection[Digest]) -> None:
        """Hold these until they are let go of as often. They need not be there.

        It is a checkpoint only if a row must be written. Cancelled or failed, nothing is held.
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
        """Hold one for the block."""
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
        """Hold one more, and run a job in the same transaction (see `Catalog.note`): what it
        makes or finds is never there without being held.
        """
        self._uses[digest] += 1
        try:
            return await self._write(self._catalog.note, [digest], job, *args)
        except BaseException:
            self.let_go([digest])
            raise

    def let_go(self, digests: Collection[Digest]) -> None:
        """Take back one `hold`; does not wait. The rows go soon."""
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

    # What is there stays while it is held: it need not be looked up again.

    def is_sure(self, chain_id: ChainID) -> bool:
        """Whether the layer has been in the store since it is held."""
        return chain_id in self._sure and chain_id in self._written

    def note_found(self, chain_id: ChainID) -> None:
        """A layer is in the store; to be called by a job that has just read its row."""
        if chain_id in self._written:
            self._sure.add(chain_id)

    def forget(self) -> None:
        """What was found may be gone, though it is held: it was damaged."""
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
        # From now on whoever wants one of these writes a row of its own, after this.
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
        # What was found while there was no row may have gone since.
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
    lease = Lease(holds, lifetime)
    try:
        yield lease
    finally:
        await holds.let_go_of_many(lease.digests)
        if lifetime.is_open:  # else all rows of the holder go
            async with lifetime.use():
                await holds.drop_idle_now()


@final
class Lease:
    """Keeps what it names in the store while it is open. It comes from `DirectoryStore.lease`."""

    def __init__(self, holds: LeaseCounts, lifetime: Lifetime) -> None:
        self._lifetime = lifetime
        self._holds = holds
        self._digests: set[Digest] = set()

    def __repr__(self) -> str:
        return f"<Lease: {len(self._digests)} held>"

    @property
    def digests(self) -> frozenset[Digest]:
        """What is held."""
        return frozenset(self._digests)

    @while_open
    async def hold(self, *digests: Digest | None) -> None:
        """Hold more: blobs by their digest, with the trees that were made of them; layers with
        all that is below them by their chain ID; images by their manifest's digest. They need
        not be there yet.

        Args:
            digests: What to hold; ``None`` is left out.

        Raises:
            StoreError: for what the disk does.
        """
        new = {digest for digest in digests if digest is not None} - self._digests
        await trio.lowlevel.checkpoint()
        await self._holds.hold(new)
        self._digests |= new
