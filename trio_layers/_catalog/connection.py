"""Connections to the catalog's SQLite file, and copies of it.

This module imports no other module of the catalog, so that a command can list images at once.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final, final

from .._errors import StoreError

__all__ = [
    "APPLICATION_ID",
    "VERSION",
    "connect",
    "copy_to_memory",
    "is_open_here",
    "transaction",
]

APPLICATION_ID: Final = 0x746C7972
"""Marks the file as a store's catalog, at byte 68 (SQLite file format, 1.3)."""

VERSION: Final = 2
"""The version of the schema and of the store's layout: SQLite's ``user_version``, at byte 60.

1: the first. 2: images list their blobs, and a holder has one lease on a digest.
"""

# Number of attempts to copy the file while other processes write it.
_COPIES: Final = 10

# Seconds for which SQLite waits for the lock in the worker thread. A cancellation cannot end
# this wait.
_WAIT_IN_THREAD: Final = 0.05


@final
class _Connection(sqlite3.Connection):
    """A connection that `is_open_here` finds until it is closed."""

    file: tuple[int, int]

    def close(self) -> None:
        super().close()
        _OPEN_HERE.discard(self)


_OPEN_HERE: Final[set[_Connection]] = set()


def is_open_here(path: Path) -> bool:
    """Return whether this process has the catalog file open.

    If it has, only SQLite may open the file. A process that closes any descriptor of a file loses
    all its POSIX locks on it ("How To Corrupt An SQLite Database File", 2.2). Another process
    would then take itself for the last user and delete the log that this process still writes.
    """
    try:
        file = _identity(path)
    except FileNotFoundError:
        return False
    return any(connection.file == file for connection in tuple(_OPEN_HERE))


def _identity(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def connect(path: Path) -> sqlite3.Connection:
    """Open the catalog file, or create it."""
    # Usable from any thread, since Catalog lets one thread at a time use it.
    connection = sqlite3.connect(
        path,
        timeout=_WAIT_IN_THREAD,
        isolation_level=None,
        check_same_thread=False,
        factory=_Connection,
    )
    try:
        connection.file = _identity(path)
        _OPEN_HERE.add(connection)
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")
    except BaseException:
        connection.close()
        raise
    return connection


def copy_to_memory(path: Path) -> sqlite3.Connection:
    """Copy the catalog and its log for reading, without writing to its directory.

    Raises:
        StoreError: if other processes wrote the catalog during each attempt.
    """
    import tempfile  # rarely needed

    memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    try:
        if not _back_up(path, memory):
            with tempfile.TemporaryDirectory() as directory:
                _copy_files(path, Path(directory))
                with closing(sqlite3.connect(Path(directory) / path.name)) as copy:
                    copy.backup(memory)
        memory.execute("PRAGMA query_only = ON")
        memory.execute("PRAGMA trusted_schema = OFF")
    except BaseException:
        memory.close()
        raise
    return memory


def _back_up(path: Path, memory: sqlite3.Connection) -> bool:
    """Copy an open catalog under SQLite's locks; return whether this was possible."""
    open_here = is_open_here(path)
    log = path.with_name(path.name + "-wal")
    if not open_here and not (log.exists() and path.with_name(path.name + "-shm").exists()):
        return False
    try:
        uri = f"{path.as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=10)) as source:
            source.backup(memory)
    except sqlite3.OperationalError:
        if open_here:
            raise
        return False  # a crash left the log files, and SQLite's recovery would write
    return True


def _copy_files(path: Path, directory: Path) -> None:
    import shutil  # rarely needed

    files = (path, path.with_name(path.name + "-wal"))
    for _ in range(_COPIES):
        before = [_version_of(file) for file in files]
        for file in files:
            with suppress(FileNotFoundError):
                shutil.copyfile(file, directory / file.name, follow_symlinks=False)
        if before == [_version_of(file) for file in files]:
            return
        for file in files:
            (directory / file.name).unlink(missing_ok=True)
    raise StoreError(f"{path} is being written by other processes: try again")


def _version_of(path: Path) -> tuple[int, ...]:
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # SQLite has rolled back by itself after some errors, a full disk among them.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
