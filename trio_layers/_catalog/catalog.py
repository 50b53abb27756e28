"""The catalog: rows in SQLite that make the contents of a store visible.

One thread at a time uses the connection, each time for a short job, and no transaction spans an
await. A job that renames files renames them inside its transaction, which is the lock between
processes, and writes their rows last. A file with a row is therefore whole and durable. A file
without a row may be replaced by any process, inside a transaction.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Final, TypeVar, TypeVarTuple, final

import trio

from .._disk_errors import disk_errors
from .._errors import StoreBusy, StoreClosed
from .connection import transaction

__all__ = ["Catalog", "closed_error", "while_busy"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# Seconds for which a job is retried while another process holds the catalog's lock.
_PATIENCE: Final = 10

# Seconds for which the end of a lease waits for other writers of this process.
_LAST: Final = 0.5

# Seconds between two tries. A cancellation ends this wait.
_PAUSE: Final = 0.02


async def while_busy(attempt: Callable[[], Awaitable[T]]) -> T:
    """Retry for some seconds while another process holds the catalog.

    Cancellation: between two attempts, each of which waits in its thread for milliseconds only.

    Raises:
        StoreBusy: if another process held the catalog until the last attempt.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return await attempt()
        except StoreBusy:
            if time.monotonic() > end:
                raise
        await trio.sleep(_PAUSE)


@final
class Catalog:
    """Runs jobs on the connection, in one thread at a time."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._thread = trio.CapacityLimiter(1)
        # One writer at a time asks for SQLite's lock, so that reading jobs can run meanwhile.
        self._writing = trio.Lock()
        # Whether a lock made SQLite refuse the last job. The next one is likely to fail, too.
        self._refused = False
        self._closed = False

    async def read(self, job: Callable[[sqlite3.Connection, *Ts], T], *args: *Ts) -> T:
        """Run a short job in a worker thread.

        While another process holds the catalog, SQLite refuses a job at its beginning. A retry
        therefore repeats no work.

        Cancellation: before the job begins, or between two attempts.

        Raises:
            StoreBusy: if another process held the catalog for too long.
            StoreClosed: if the store's block was left.
            StoreError: for errors of SQLite or the operating system in the job.
        """
        return await while_busy(partial(self._try, job, *args))

    async def _try(self, job: Callable[[sqlite3.Connection, *Ts], T], *args: *Ts) -> T:
        def run() -> T:
            if self._closed:
                raise closed_error(self._path)
            with disk_errors(self._path):
                return job(self._connection, *args)

        try:
            result = await trio.to_thread.run_sync(run, limiter=self._thread)
        except StoreBusy:
            self._refused = True
            raise
        self._refused = False
        return result

    async def write(self, job: Callable[[sqlite3.Connection, *Ts], T], *args: *Ts) -> T:
        """Run a job in the only write transaction of all processes.

        The transaction is durable when the call returns. An error rolls it back. Cancellation and
        errors are those of `read`.
        """

        def run(connection: sqlite3.Connection) -> T:
            with transaction(connection):
                return job(connection, *args)

        async with self._writing:
            return await self.read(run)

    async def note(self, job: Callable[[sqlite3.Connection, *Ts], T], *args: *Ts) -> T:
        """Run a job like `write`, but make it durable only with the next `write`.

        This saves a sync, for rows that are useless after a power cut or cheap to make again.
        """
        async with self._writing:
            return await self.read(_noted(job), *args)

    async def note_now(self, job: Callable[[sqlite3.Connection, *Ts], T], *args: *Ts) -> T:
        """Run a job like `note`, without retries or cancellation, to end a lease.

        Raises:
            StoreBusy: if another process holds the catalog.
        """
        if not self._refused:
            # A writer ahead of this one may have to wait for another process, so limit the wait.
            with trio.move_on_after(_LAST, shield=True):
                async with self._writing:
                    return await self._try(_noted(job), *args)
        raise StoreBusy(f"{self._path} is held by another process")

    async def close(self) -> None:
        """Close the connection after the running jobs; shielded from cancellation."""

        def close() -> None:
            self._closed = True
            self._connection.close()

        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(close, limiter=self._thread)


def closed_error(path: Path) -> StoreClosed:
    """Return the error for a call on a closed store."""
    return StoreClosed(f"the store {path} was closed: call it inside its block")


def _noted(
    job: Callable[[sqlite3.Connection, *Ts], T],
) -> Callable[[sqlite3.Connection, *Ts], T]:
    """Wrap a job in a transaction that becomes durable with a later one."""

    def run(connection: sqlite3.Connection, *args: *Ts) -> T:
        connection.execute("PRAGMA synchronous = NORMAL")
        try:
            with transaction(connection):
                return job(connection, *args)
        finally:
            connection.execute("PRAGMA synchronous = FULL")

    return run
