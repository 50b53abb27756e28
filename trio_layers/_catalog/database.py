"""The tables of the catalog: their schema, and the migration of older ones."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from typing import Final

from .._digest import Digest
from .._manifest import Descriptor
from .connection import APPLICATION_ID, VERSION
from .rows import add_image_blobs

__all__ = ["complete_tables", "create_schema", "migrate"]

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
