"""The catalog's SQLite file: its schema, and opening, copying and migrating it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final, final

from .._digest import Digest
from .._errors import StoreError
from .._manifest import Descriptor
from .rows import add_image_blobs

__all__ = [
    "APPLICATION_ID",
    "VERSION",
    "complete_tables",
    "connect",
    "copy_to_memory",
    "create_schema",
    "is_open_here",
    "migrate",
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

_SCHEMA: Final = """
CREATE TABLE flavour (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE blobs (
    digest TEXT PRIMARY KEY,
    size INTEGER NOT NULL,
    diff_id TEXT                -- of the tar inside, once it is known
) WITHOUT ROWID;

CREATE TABLE trees (
    id TEXT PRIMARY KEY,        -- a diff ID; for one parent only, see tree_upon
    diff_id TEXT NOT NULL,
    size INTEGER NOT NULL,      -- of the tar, in bytes
    entries INTEGER NOT NULL,
    assumed BLOB NOT NULL       -- paths, each ended by a zero byte
) WITHOUT ROWID;

CREATE TABLE layers (
    chain_id TEXT PRIMARY KEY,
    diff_id TEXT NOT NULL,
    parent TEXT REFERENCES layers,
    tree TEXT NOT NULL REFERENCES trees,
    blob TEXT NOT NULL REFERENCES blobs
) WITHOUT ROWID;
CREATE INDEX layers_by_parent ON layers (parent);
CREATE INDEX layers_by_tree ON layers (tree);
CREATE INDEX layers_by_blob ON layers (blob);

CREATE TABLE images (
    manifest TEXT PRIMARY KEY REFERENCES blobs,
    media_type TEXT NOT NULL,
    config TEXT NOT NULL REFERENCES blobs,
    config_media_type TEXT NOT NULL,
    chain_id TEXT REFERENCES layers
) WITHOUT ROWID;
CREATE INDEX images_by_config ON images (config);
CREATE INDEX images_by_chain_id ON images (chain_id);

CREATE TABLE image_references (
    serial INTEGER PRIMARY KEY AUTOINCREMENT,
    reference TEXT NOT NULL,
    platform TEXT NOT NULL,     -- '' where none was given
    manifest TEXT NOT NULL REFERENCES images,
    index_digest TEXT REFERENCES blobs,
    index_media_type TEXT,
    UNIQUE (reference, platform)
);
CREATE INDEX references_by_manifest ON image_references (manifest);
CREATE INDEX references_by_index ON image_references (index_digest);

"""

# Apart from the others, since the migration of a store of version 1 adds these tables.
_SCHEMA_2: Final = """
CREATE TABLE layout (           -- no row while index.json may be out of date
    index_digest TEXT NOT NULL
);

CREATE TABLE image_blobs (      -- the layers' blobs, which may be missing
    manifest TEXT NOT NULL REFERENCES images ON DELETE CASCADE,
    digest TEXT NOT NULL,
    PRIMARY KEY (manifest, digest)
) WITHOUT ROWID;
CREATE INDEX image_blobs_by_digest ON image_blobs (digest);

CREATE TABLE lacking (          -- the missing ones among image_blobs
    digest TEXT NOT NULL,
    manifest TEXT NOT NULL REFERENCES images ON DELETE CASCADE,
    PRIMARY KEY (digest, manifest)
) WITHOUT ROWID;
CREATE INDEX lacking_by_manifest ON lacking (manifest);
CREATE TRIGGER image_lacks AFTER INSERT ON image_blobs
    WHEN NOT EXISTS (SELECT 1 FROM blobs WHERE digest = NEW.digest)
    BEGIN INSERT INTO lacking VALUES (NEW.digest, NEW.manifest); END;
CREATE TRIGGER blob_comes AFTER INSERT ON blobs
    BEGIN
        DELETE FROM layout WHERE EXISTS (SELECT 1 FROM lacking WHERE digest = NEW.digest);
        DELETE FROM lacking WHERE digest = NEW.digest;
    END;
CREATE TRIGGER blob_goes AFTER DELETE ON blobs
    BEGIN
        DELETE FROM layout WHERE EXISTS (SELECT 1 FROM image_blobs WHERE digest = OLD.digest);
        INSERT INTO lacking SELECT digest, manifest FROM image_blobs WHERE digest = OLD.digest;
    END;

CREATE TABLE leases (
    holder TEXT NOT NULL,       -- the locked file in leases/
    digest TEXT NOT NULL,       -- of a blob, a chain ID or the ID of a tree
    process TEXT,               -- the holder's; NULL in rows of older software
    PRIMARY KEY (holder, digest)
) WITHOUT ROWID;
CREATE INDEX leases_by_digest ON leases (digest);
"""

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


def create_schema(connection: sqlite3.Connection) -> None:
    """Create the tables, inside the caller's transaction."""
    _run_all(connection, _SCHEMA + _SCHEMA_2)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _run_all(connection: sqlite3.Connection, statements: str) -> None:
    """Run several statements, without `executescript`, which would end the transaction."""
    statement = ""
    for part in statements.split(";"):
        statement += f"{part};"
        if sqlite3.complete_statement(statement):
            connection.execute(statement)
            statement = ""


def migrate(
    connection: sqlite3.Connection, blobs_of: Callable[[Descriptor], Iterable[Digest]]
) -> None:
    """Migrate the tables of an older version, inside the caller's transaction.

    Args:
        connection: The open catalog.
        blobs_of: Returns the digests of an image's layer blobs, given its manifest.
    """
    connection.execute("DROP TABLE leases")  # the processes that held them have ended
    _run_all(connection, _SCHEMA_2)
    query = "SELECT media_type, digest, size FROM images JOIN blobs ON manifest = digest"
    for row in connection.execute(query).fetchall():
        manifest = Descriptor(*row)
        add_image_blobs(connection, manifest.digest, blobs_of(manifest))
    connection.execute(f"PRAGMA user_version = {VERSION}")


def complete_tables(connection: sqlite3.Connection) -> None:
    """Add the columns that older software of the same schema version lacks and ignores."""
    columns = [row[1] for row in connection.execute("PRAGMA table_info(leases)")]
    if "process" not in columns:
        connection.execute("ALTER TABLE leases ADD COLUMN process TEXT")
