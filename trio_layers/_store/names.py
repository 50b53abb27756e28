"""Lists the images of a store from its catalog alone.

A command that lists images ends in milliseconds, so this module imports neither trio nor the values
of the other rooms. All functions block.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from .._catalog.connection import VERSION, connect
from .._catalog.names import list_names
from .._disk_errors import disk_errors
from .._errors import StoreBusy, StoreNotFound, StoreReadOnly
from .recognition import CATALOG, NO_STORE, check_version, has_store, locate, open_to_read

if TYPE_CHECKING:
    from .._digest import Digest

__all__ = ["list_images", "while_busy"]

T = TypeVar("T")

# Seconds for which a step is retried while another process holds the catalog's lock.
_PATIENCE: Final = 10

# Seconds between two tries.
_PAUSE: Final = 0.02


def list_images(path: str) -> list[tuple[str, str, Digest]]:
    """Return reference, platform and manifest digest of all images in a store.

    The images are sorted by reference. Of one reference, the platform stored last comes first. The
    platform is empty if none was given.

    Args:
        path: The store's directory. It need not be writable.

    Raises:
        StoreNotFound: if there is no store.
        UnsupportedStore: if the directory has other contents, or a store of another version.
        StoreBusy: if another process held the catalog for too long.
        StoreError: for other errors of the disk.
    """
    root = locate(Path(path), create=False)

    def read(connection: sqlite3.Connection) -> list[tuple[str, str, Digest]]:
        with disk_errors(root):
            return list_names(connection)

    with closing(while_busy(partial(_open, root))) as connection:
        return while_busy(partial(read, connection))


def while_busy(attempt: Callable[[], T]) -> T:
    """Retry for some seconds while another process holds the catalog.

    Raises:
        StoreBusy: if another process held the catalog until the last attempt.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return attempt()
        except StoreBusy:
            if time.monotonic() > end:
                raise
        time.sleep(_PAUSE)


def _open(root: Path) -> sqlite3.Connection:
    with disk_errors(root):
        # SQLite writes a log even for reading. It must not belong to another user than the store.
        if root.stat().st_uid == os.geteuid():
            try:
                with disk_errors(root):
                    return _open_own(root)
            except StoreReadOnly:
                pass
        return open_to_read(root)


def _open_own(root: Path) -> sqlite3.Connection:
    if not has_store(root):
        raise StoreNotFound(NO_STORE.format(root))
    connection = connect(root / CATALOG)
    try:
        # A crash during the creation is rolled back only now.
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        check_version(root, version)
        if not version:
            raise StoreNotFound(NO_STORE.format(root))
    except BaseException:
        connection.close()
        raise
    if version == VERSION:
        return connection
    connection.close()
    from .layout import open_directory  # rarely needed, and slow to import

    return open_directory(root, create=False, check_cancelled=lambda: None)
