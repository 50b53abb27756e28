"""Finds a store's directory and recognises a store in it, and opens one for reading.

Blocking, for worker threads. Nothing is written here, except missing directories on request.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from pathlib import Path
from typing import Final

from .._catalog.connection import APPLICATION_ID, VERSION, copy_to_memory, is_open_here
from .._disk_errors import disk_errors
from .._errors import StoreNotFound, UnsupportedStore
from .._paths import real_path

__all__ = [
    "CATALOG",
    "DIRECTORIES",
    "INDEX",
    "NO_STORE",
    "check_version",
    "has_store",
    "locate",
    "open_to_read",
]

CATALOG: Final = "catalog.sqlite"
INDEX: Final = "index.json"
DIRECTORIES: Final = ("blobs", "blobs/sha256", "trees", "trees/sha256", "ingest", "leases")
NO_STORE: Final = (
    "there is no store in {}: pull or import an image into it, or name another directory"
)
_NAMES: Final = {
    "blobs",
    "ingest",
    "leases",
    "trees",
    INDEX,
    "oci-layout",
    *(CATALOG + suffix for suffix in ("", "-journal", "-shm", "-wal")),
}


def locate(path: Path, *, create: bool) -> Path:
    """Return the real path of a store's directory.

    With ``create``, missing directories are made, including parents. Links that another user could
    have planted are not followed.

    Raises:
        StoreNotFound: if the directory does not exist and ``create`` is false.
        UnsupportedStore: if ``path`` is not a directory.
        StoreError: if the disk fails.
    """
    with disk_errors(path):
        try:
            return Path(real_path(path, make=0o700 if create else None))
        except FileNotFoundError:
            if create:
                raise
            raise StoreNotFound(NO_STORE.format(path)) from None
        except NotADirectoryError:
            raise UnsupportedStore(
                f"{path} is not a directory: choose another path for the store"
            ) from None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise UnsupportedStore(f"{path} is not a directory: {error.strerror}") from None


def open_to_read(root: Path) -> sqlite3.Connection:
    """Open the store in ``root`` for reading, with its catalog in memory.

    The store may be on a read-only file system or belong to another user, if it is readable.

    Raises:
        StoreNotFound: if there is no store.
        UnsupportedStore: if the directory has other contents, or a store of another version.
        StoreError: if the disk fails.
    """
    with disk_errors(root):
        if not has_store(root):
            raise StoreNotFound(NO_STORE.format(root))
        for name in DIRECTORIES:
            if stat.S_ISLNK(os.lstat(root / name).st_mode):
                raise UnsupportedStore(f"{root} is not a store: {name} in it is a link")
        connection = copy_to_memory(root / CATALOG)
        try:
            version: int = connection.execute("PRAGMA user_version").fetchone()[0]
            check_version(root, version)
            if not version:
                raise StoreNotFound(NO_STORE.format(root))
            if version < VERSION:
                raise UnsupportedStore(
                    f"the store {root} has the older version {version}, and a read-only store "
                    "cannot be migrated: open it once without read_only"
                )
        except BaseException:
            connection.close()
            raise
        return connection


def has_store(root: Path) -> bool:
    """Return whether the directory has a store whose creation was finished.

    Raises:
        UnsupportedStore: if the directory has other contents, or a store of a newer version.
    """
    names = set(os.listdir(root))
    if not names:
        return False
    if is_open_here(root / CATALOG):
        return True  # checked when it was opened
    # SQLite would write files of its own into a directory that may be another program's.
    try:
        with open(root / CATALOG, "rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        header = None
    if header == b"" and names <= _NAMES:
        return False
    if (
        header is None
        or not header.startswith(b"SQLite format 3\0")
        or int.from_bytes(header[68:72]) != APPLICATION_ID
    ):
        raise UnsupportedStore(
            f"{root} is neither empty nor a store: choose a new or empty directory"
        )
    check_version(root, int.from_bytes(header[60:64]))
    return True


def check_version(root: Path, version: int) -> None:
    if version > VERSION:
        raise UnsupportedStore(
            f"the store {root} has version {version}, and this trio_layers supports stores up to "
            f"version {VERSION}: use a newer trio_layers"
        )
