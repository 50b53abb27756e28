"""Group commits: written files become durable, then visible, many at once.

A sync takes the disk a few milliseconds, whatever the number of files. Jobs that come during one
commit therefore share the next, and a commit waits a moment for jobs that are about to come.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final, TypeAlias, final

import attrs
import trio

from .._catalog.catalog import Catalog
from .._disk_errors import disk_errors
from .._errors import LayersError, StoreError
from .._files import DIRECTORY, sync_directory, sync_file_system
from .._nursery import open_hidden_nursery

__all__ = ["Commits", "Job", "open_commits"]

Job: TypeAlias = Callable[[sqlite3.Connection], object]
"""Moves durable files to their places and writes their rows, in a transaction."""

# Seconds that a commit waits for other jobs. With forty layers of a hundred files, this reduces
# thirty-four syncs to a dozen.
_LINGER: Final = 0.05

_LOST: Final = "the disk lost a part of the files during a write: try again"


@asynccontextmanager
async def open_commits(catalog: Catalog, root: Path) -> AsyncIterator[Commits]:
    """Run commits during the block.

    Raises:
        StoreError: for errors of the disk.
    """
    descriptor = await trio.to_thread.run_sync(_open, root)
    try:
        commits = Commits(catalog, root, descriptor)
        async with open_hidden_nursery() as nursery:
            nursery.start_soon(commits._run)
            try:
                yield commits
            finally:
                nursery.cancel_scope.cancel()
    finally:
        os.close(descriptor)


def _open(root: Path) -> int:
    with disk_errors(root):
        return os.open(root, DIRECTORY)


@final
@attrs.define(eq=False)
class _Commit:
    job: Job
    failures: int
    under_way: bool = False
    withdrawn: bool = False
    done: trio.Event = attrs.field(factory=trio.Event)
    error: Exception | None = None
    _deciding: threading.Lock = attrs.field(factory=threading.Lock)

    def begin(self) -> bool:
        """Begin the job in the catalog's thread, unless the commit was withdrawn."""
        with self._deciding:
            self.under_way = not self.withdrawn
            return self.under_way

    def withdraw(self) -> bool:
        """Withdraw the commit; return whether the job has begun all the same."""
        with self._deciding:
            self.withdrawn = True
            return self.under_way


@final
class Commits:
    """Runs jobs that make files visible, after all written bytes are on the disk.

    Attributes:
        failures: Number of failed syncs so far. The kernel reports a write-back error once, and
            for any file of the file system. All files begun before a failure are therefore
            suspect (see `commit`).
    """

    def __init__(self, catalog: Catalog, root: Path, descriptor: int) -> None:
        self.failures: int = 0
        self._catalog = catalog
        self._root = root
        self._descriptor = descriptor
        self._places = (root / "blobs" / "sha256", root / "trees" / "sha256")
        self._waiting: list[_Commit] = []
        self._wanted = trio.Event()
        self._expected = 0
        self._all_here = trio.Event()

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Announce that a commit will follow the block, so that others wait for it."""
        self._expected += 1
        try:
            yield
        finally:
            self._expected -= 1
            if not self._expected:
                self._all_here.set()
                self._all_here = trio.Event()

    async def commit(self, job: Job, *, since: int) -> None:
        """Make all files durable that were written before, then run ``job`` in a transaction.

        Cancellation: the job is not run, or was run all the same.

        Args:
            job: Moves the files to their places and writes the rows. An error of the job rolls
                back its own rows only, and comes out of this call.
            since: `failures` before the first byte was written.

        Raises:
            StoreError: for errors of the disk.
        """
        this = _Commit(job, since)
        self._waiting.append(this)
        self._wanted.set()
        try:
            await this.done.wait()
        except trio.Cancelled:
            if this.withdraw():
                # The transaction uses the files. It has begun, so it ends in milliseconds.
                with trio.CancelScope(shield=True):
                    await this.done.wait()
            raise
        if this.error is not None:
            raise this.error

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            if self._expected:
                with trio.move_on_after(_LINGER):
                    await self._all_here.wait()
            group, self._waiting = self._waiting, []
            await self._commit(group)

    async def _commit(self, group: list[_Commit]) -> None:
        group = [each for each in group if not each.withdrawn]
        if not group:
            return
        failed: StoreError | None = StoreError(f"{self._root}: a commit was interrupted: try again")
        try:
            await trio.to_thread.run_sync(self._sync)
            # The sync may have taken long, and the transaction may wait for another process. A
            # commit can be withdrawn until the transaction has begun.
            group = [each for each in group if not each.withdrawn]
            if group:
                await self._catalog.write(self._place, group)
            failed = None
        except StoreError as error:
            failed = error
        finally:
            for each in group:
                if failed is not None:
                    each.error = failed.copy_to_raise()
                    each.error.__cause__ = failed
                each.done.set()

    def _sync(self) -> None:
        try:
            with disk_errors(self._root):
                sync_file_system(self._descriptor)
        except StoreError:
            self.failures += 1
            raise

    def _place(self, connection: sqlite3.Connection, group: list[_Commit]) -> None:
        for each in group:
            if not each.begin():
                continue
            connection.execute("SAVEPOINT one")
            try:
                if each.failures != self.failures:
                    raise StoreError(f"{self._root}: {_LOST}")
                with disk_errors(self._root):
                    each.job(connection)
            except LayersError as error:
                each.error = error
                connection.execute("ROLLBACK TO one")
            connection.execute("RELEASE one")
        # The moved files must be durable before the rows that refer to them.
        for place in self._places:
            sync_directory(place)
