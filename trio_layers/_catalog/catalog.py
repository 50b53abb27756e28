"""What there is: the rows in SQLite that make stored things visible.

One thread at a time uses the connection, each time for a short job, and no transaction spans an
await. A job that renames files does so inside its transaction: that is the lock between
processes, and the rows are written last. So what has a row is whole and durable, and what has
none may be replaced by anyone, in a transaction of his own.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias, TypeVar, TypeVarTuple, final

import attrs
import trio

from .._digest import ChainID, DiffID, Digest
from .._errors import StoreBusy, StoreClosed, StoreError
from .._files import disk_errors
from .._manifest import Descriptor

__all__ = [
    "APPLICATION_ID",
    "VERSION",
    "Catalog",
    "IndexRow",
    "StoredBlob",
    "StoredImage",
    "StoredLayer",
    "StoredTree",
    "add_blob",
    "add_layer",
    "add_leases",
    "add_tree",
    "closed_error",
    "complete_tables",
    "connect",
    "copy_to_memory",
    "create_schema",
    "drop_image",
    "drop_leases",
    "drop_references",
    "find_blob",
    "find_holders",
    "find_image",
    "find_images",
    "find_index_rows",
    "find_layer",
    "find_layout",
    "find_tree",
    "find_whole_images",
    "is_open_here",
    "migrate",
    "put_image",
    "set_diff_id",
    "set_layout",
    "transaction",
    "while_busy",
]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

APPLICATION_ID: Final = 0x746C7972
"""Marks the file as ours, at byte 68 (SQLite file format, 1.3)."""

VERSION: Final = 2
"""Of the schema, and of the store's layout: SQLite's ``user_version``, at byte 60.

1: the first. 2: images list their blobs, and a holder has one lease on a digest."""

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
    diff_id TEXT                -- what it unpacks to, once that is known
) WITHOUT ROWID;

CREATE TABLE trees (
    id TEXT PRIMARY KEY,        -- a diff ID, or what tree_upon gives for one base only
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

# Tables of their own, since they are also made in a store that has the others.
_SCHEMA_2: Final = """
CREATE TABLE layout (           -- nothing where other tools may see what is not so
    index_digest TEXT NOT NULL
);

CREATE TABLE image_blobs (      -- besides config and index: layers that need not be there
    manifest TEXT NOT NULL REFERENCES images ON DELETE CASCADE,
    digest TEXT NOT NULL,
    PRIMARY KEY (manifest, digest)
) WITHOUT ROWID;
CREATE INDEX image_blobs_by_digest ON image_blobs (digest);

CREATE TABLE lacking (          -- those of them that are not there
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
    process TEXT,               -- the holder's; nothing where older software wrote the row
    PRIMARY KEY (holder, digest)
) WITHOUT ROWID;
CREATE INDEX leases_by_digest ON leases (digest);
"""


@attrs.frozen
class StoredBlob:
    """A blob that is there.

    Attributes:
        digest: Its name.
        size: Its length in bytes.
        diff_id: The digest of the tar it unpacks to; ``None`` if it has not been unpacked.
    """

    digest: Digest
    size: int
    diff_id: DiffID | None


@attrs.frozen
class StoredTree:
    """An unpacked layer.

    Attributes:
        id: Its diff ID; for one that depends on what lies below, what `tree_upon` gives.
        diff_id: The digest of its tar.
        size: The length of its tar in bytes.
        entries: How many files, directories and so on it holds.
        assumed: The directories it implies, without saying what they are like.
    """

    id: Digest
    diff_id: DiffID
    size: int
    entries: int
    assumed: tuple[bytes, ...]


@attrs.frozen
class StoredLayer:
    """A layer on what is below it.

    Attributes:
        chain_id: Its name.
        diff_id: The digest of its tar.
        parent: The chain ID of what is below it; ``None`` for the bottom.
        tree: The ID of its tree.
        blob: The digest of a blob that unpacks to it.
    """

    chain_id: ChainID
    diff_id: DiffID
    parent: ChainID | None
    tree: Digest
    blob: Digest


@attrs.frozen
class StoredImage:
    """An image that a reference stands for.

    Attributes:
        reference: The name it was put under.
        platform: The platform it was put under; ``None`` if none was given.
        manifest: Its manifest, which is in the store.
        config: Its config, which is in the store.
        chain_id: Its top layer; ``None`` if it has no layers, or they are not unpacked.
        index: The index it was chosen from, if that is in the store.
    """

    reference: str
    platform: str | None
    manifest: Descriptor
    config: Descriptor
    chain_id: ChainID | None
    index: Descriptor | None = None


# Seconds for which a job is retried while another process holds the catalog's lock.
_PATIENCE: Final = 10

# Seconds for which the end of a lease waits for other writers of this process.
_LAST: Final = 0.5

# Seconds for which SQLite waits for the lock in the worker thread. A cancellation cannot end
# this wait.
_WAIT_IN_THREAD: Final = 0.05

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


IndexRow: TypeAlias = tuple[str, str | None, str, Digest, int, Digest | None]
"""An entry of ``index.json``.

The fields are reference, platform, the manifest's media type, digest and size, and the digest of
the index that listed the manifest.
"""


@final
class Catalog:
    """The connection, and the one thread at a time that uses it."""

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
        """Run a short job in a worker thread. Once begun it is not cancelled.

        While another process holds the catalog, SQLite refuses a job at its beginning. A retry
        therefore repeats no work.

        Raises:
            StoreBusy: if another process held the catalog for too long.
            StoreClosed: if the store's block was left.
            StoreError: for what SQLite or the operating system raise in it.
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
        """Like `read`, in a transaction that nobody else writes beside, in any process.

        It is committed, and durable, when this returns; an error undoes it.
        """

        def run(connection: sqlite3.Connection) -> T:
            with transaction(connection):
                return job(connection, *args)

        async with self._writing:
            return await self.read(run)

    async def note(self, job: Callable[[sqlite3.Connection, *Ts], T], *args: *Ts) -> T:
        """Like `write`, but durable only with the next `write`: for what is of no use after the
        machine has stopped, or can be had again for nothing. It spares the disk a sync.
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


@final
class _Connection(sqlite3.Connection):
    """One that `is_open_here` knows of until it is closed."""

    file: tuple[int, int]

    def close(self) -> None:
        super().close()
        _OPEN_HERE.discard(self)


_OPEN_HERE: Final[set[_Connection]] = set()


def is_open_here(path: Path) -> bool:
    """Whether this process has the catalog file open. Then nobody in it may open the file but
    SQLite: when any descriptor of a file is closed, the process loses all its POSIX locks on it
    ("How To Corrupt An SQLite Database File", 2.2), and another process takes itself for the
    last user and deletes the log that is still written here.
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
    """Open the catalog file; made if it is not there."""
    # Not bound to the thread: Catalog lets one thread at a time use it.
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
    raise StoreError(f"{path} is written all the time: try again")


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
    """Make the tables; to be called in a transaction."""
    _run_all(connection, _SCHEMA + _SCHEMA_2)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _run_all(connection: sqlite3.Connection, statements: str) -> None:
    """Not by `executescript`, which would end the transaction."""
    statement = ""
    for part in statements.split(";"):
        statement += f"{part};"
        if sqlite3.complete_statement(statement):
            connection.execute(statement)
            statement = ""


def migrate(
    connection: sqlite3.Connection, blobs_of: Callable[[Descriptor], Iterable[Digest]]
) -> None:
    """Bring the tables of an older version to this one; to be called in a transaction.

    Args:
        blobs_of: Tells the blobs of an image's layers, given its manifest.
    """
    connection.execute("DROP TABLE leases")  # whoever held them is gone
    _run_all(connection, _SCHEMA_2)
    query = "SELECT media_type, digest, size FROM images JOIN blobs ON manifest = digest"
    for row in connection.execute(query).fetchall():
        manifest = Descriptor(*row)
        _add_image_blobs(connection, manifest.digest, blobs_of(manifest))
    connection.execute(f"PRAGMA user_version = {VERSION}")


# The queries: plain functions over the connection, to be put together in jobs.


def find_blob(connection: sqlite3.Connection, digest: Digest) -> StoredBlob | None:
    query = "SELECT digest, size, diff_id FROM blobs WHERE digest = ?"
    row = connection.execute(query, (digest,)).fetchone()
    return None if row is None else StoredBlob(*row)


def add_blob(connection: sqlite3.Connection, digest: Digest, size: int) -> None:
    connection.execute("INSERT INTO blobs (digest, size) VALUES (?, ?)", (digest, size))


def set_diff_id(connection: sqlite3.Connection, digest: Digest, diff_id: DiffID) -> None:
    connection.execute("UPDATE blobs SET diff_id = ? WHERE digest = ?", (diff_id, digest))


def find_tree(connection: sqlite3.Connection, id: Digest) -> StoredTree | None:
    query = "SELECT id, diff_id, size, entries, assumed FROM trees WHERE id = ?"
    row = connection.execute(query, (id,)).fetchone()
    if row is None:
        return None
    id, diff_id, size, entries, assumed = row
    return StoredTree(id, diff_id, size, entries, tuple(assumed.split(b"\0")[:-1]))


def add_tree(connection: sqlite3.Connection, tree: StoredTree) -> None:
    assumed = b"".join(path + b"\0" for path in tree.assumed)
    connection.execute(
        "INSERT INTO trees (id, diff_id, size, entries, assumed) VALUES (?, ?, ?, ?, ?)",
        (tree.id, tree.diff_id, tree.size, tree.entries, assumed),
    )


def find_layer(connection: sqlite3.Connection, chain_id: ChainID) -> StoredLayer | None:
    query = "SELECT chain_id, diff_id, parent, tree, blob FROM layers WHERE chain_id = ?"
    row = connection.execute(query, (chain_id,)).fetchone()
    return None if row is None else StoredLayer(*row)


def add_layer(connection: sqlite3.Connection, layer: StoredLayer) -> None:
    """A layer that is there already stays as it is."""
    connection.execute(
        "INSERT INTO layers (chain_id, diff_id, parent, tree, blob) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT DO NOTHING",
        attrs.astuple(layer),
    )


def put_image(connection: sqlite3.Connection, image: StoredImage, layers: Iterable[Digest]) -> None:
    """Let a reference stand for an image, whose layers have these blobs. What it stood for
    before, on the same platform, loses it.
    """
    connection.execute(
        "INSERT INTO images (manifest, media_type, config, config_media_type, chain_id) "
        "VALUES (?, ?, ?, ?, ?) ON CONFLICT (manifest) DO UPDATE "
        "SET chain_id = coalesce(excluded.chain_id, chain_id)",
        (
            image.manifest.digest,
            image.manifest.media_type,
            image.config.digest,
            image.config.media_type,
            image.chain_id,
        ),
    )
    _add_image_blobs(connection, image.manifest.digest, layers)
    # Replaced, not updated: the newest of a reference's platforms has the highest serial.
    connection.execute(
        "INSERT OR REPLACE INTO image_references "
        "(reference, platform, manifest, index_digest, index_media_type) VALUES (?, ?, ?, ?, ?)",
        (
            image.reference,
            image.platform or "",
            image.manifest.digest,
            image.index and image.index.digest,
            image.index and image.index.media_type,
        ),
    )


def _add_image_blobs(
    connection: sqlite3.Connection, manifest: Digest, blobs: Iterable[Digest]
) -> None:
    connection.executemany(
        "INSERT OR IGNORE INTO image_blobs (manifest, digest) VALUES (?, ?)",
        [(manifest, blob) for blob in blobs],
    )


_IMAGES: Final = """
SELECT r.reference, r.platform, i.chain_id,
    i.media_type, m.digest, m.size,
    i.config_media_type, c.digest, c.size,
    r.index_media_type, x.digest, x.size
FROM image_references r
    JOIN images i ON i.manifest = r.manifest
    JOIN blobs m ON m.digest = i.manifest
    JOIN blobs c ON c.digest = i.config
    LEFT JOIN blobs x ON x.digest = r.index_digest
"""


def find_image(
    connection: sqlite3.Connection, reference: str, platform: str | None
) -> StoredImage | None:
    """What a reference stands for on a platform; ``None``: on the one put last."""
    rows = connection.execute(
        _IMAGES + "WHERE r.reference = :reference AND (:platform IS NULL OR platform = :platform) "
        "ORDER BY r.serial DESC LIMIT 1",
        {"reference": reference, "platform": platform},
    )
    return next(_images(rows), None)


def find_images(connection: sqlite3.Connection, reference: str | None = None) -> list[StoredImage]:
    """All of them, or those of one reference: by reference, and the one put last first."""
    where, parameters = ("", ()) if reference is None else ("WHERE r.reference = ? ", (reference,))
    rows = connection.execute(_IMAGES + where + "ORDER BY r.reference, r.serial DESC", parameters)
    return list(_images(rows))


def _images(rows: sqlite3.Cursor) -> Iterator[StoredImage]:
    for reference, platform, chain_id, *rest in rows:
        yield StoredImage(
            reference,
            platform or None,
            manifest=Descriptor(*rest[0:3]),
            config=Descriptor(*rest[3:6]),
            chain_id=chain_id,
            index=None if rest[7] is None else Descriptor(*rest[6:9]),
        )


def find_whole_images(connection: sqlite3.Connection) -> list[StoredImage]:
    """Those of `find_images` whose blobs are all there. A layer may have been there before, from
    a blob of another compression; then the image's own was not downloaded.
    """
    where = "WHERE r.manifest NOT IN (SELECT manifest FROM lacking) "
    rows = connection.execute(_IMAGES + where + "ORDER BY r.reference, r.serial DESC")
    return list(_images(rows))


def find_index_rows(connection: sqlite3.Connection) -> Iterator[IndexRow]:
    """Find images like `find_whole_images`, but return plain rows.

    Each write reads all rows, of which there may be thousands.
    """
    return connection.execute(
        "SELECT r.reference, r.platform, i.media_type, m.digest, m.size, x.digest "
        "FROM image_references r "
        "JOIN images i ON i.manifest = r.manifest JOIN blobs m ON m.digest = r.manifest "
        "LEFT JOIN blobs x ON x.digest = r.index_digest "
        "WHERE r.manifest NOT IN (SELECT manifest FROM lacking) "
        "ORDER BY r.reference, r.serial DESC"
    )


def find_layout(connection: sqlite3.Connection) -> Digest | None:
    """The digest of ``index.json`` as it was last written."""
    row = connection.execute("SELECT index_digest FROM layout").fetchone()
    return None if row is None else row[0]


def set_layout(connection: sqlite3.Connection, index_digest: Digest) -> None:
    connection.execute("DELETE FROM layout")
    connection.execute("INSERT INTO layout VALUES (?)", (index_digest,))


def drop_references(connection: sqlite3.Connection, reference: str, platform: str | None) -> int:
    """Take a reference from what it stands for, on one platform or on all; on how many it did."""
    return connection.execute(
        "DELETE FROM image_references "
        "WHERE reference = :reference AND (:platform IS NULL OR platform = :platform)",
        {"reference": reference, "platform": platform},
    ).rowcount


def drop_image(connection: sqlite3.Connection, manifest: Digest) -> bool:
    """Drop an image with all its references. Whether it was there."""
    connection.execute("DELETE FROM image_references WHERE manifest = ?", (manifest,))
    return connection.execute("DELETE FROM images WHERE manifest = ?", (manifest,)).rowcount > 0


def add_leases(
    connection: sqlite3.Connection, holder: str, digests: Iterable[Digest], process: str
) -> None:
    """Add leases of a holder; see `Process.encode` for ``process``."""
    connection.executemany(
        "INSERT OR IGNORE INTO leases (holder, digest, process) VALUES (?, ?, ?)",
        [(holder, digest, process) for digest in digests],
    )


def drop_leases(
    connection: sqlite3.Connection, holder: str, digests: Iterable[Digest] | None = None
) -> None:
    """A holder's leases on these digests; ``None``: all it has."""
    if digests is None:
        connection.execute("DELETE FROM leases WHERE holder = ?", (holder,))
        return
    connection.executemany(
        "DELETE FROM leases WHERE holder = ? AND digest = ?",
        [(holder, digest) for digest in digests],
    )


def find_holders(connection: sqlite3.Connection) -> dict[str, str | None]:
    """Return the holders of leases, alive or dead, with their processes."""
    return dict(connection.execute("SELECT holder, max(process) FROM leases GROUP BY holder"))


def complete_tables(connection: sqlite3.Connection) -> None:
    """Add the columns that older software of the same schema version lacks and ignores."""
    columns = [row[1] for row in connection.execute("PRAGMA table_info(leases)")]
    if "process" not in columns:
        connection.execute("ALTER TABLE leases ADD COLUMN process TEXT")
