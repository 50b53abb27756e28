"""Lists, measures and removes images without trio, for commands that end in milliseconds.

Such a command needs neither worker processes nor leases, and would wait longer for the import of
trio than for its own work. All functions block.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar, final

from .._catalog.connection import transaction
from .._catalog.names import list_names
from .._catalog.rows import drop_image, drop_references
from .._digest import Digest, parse_digest
from .._disk_errors import disk_errors
from .._errors import LayersError, StoreNotFound, StoreReadOnly, UnsupportedStore
from .._files import try_lock, unlock
from .._processes import Process
from .layout import open_directory, write_index
from .names import while_busy
from .recognition import locate, open_to_read
from .usage import StoreUsage, find_parts, measure

__all__ = ["PlainStore", "open_plain"]

T = TypeVar("T")


@contextmanager
def open_plain(path: str, *, read_only: bool) -> Iterator[PlainStore]:
    """Open an existing store for the block.

    Args:
        path: The store's directory.
        read_only: Whether the store need not be writable. The block may not call `remove` then.

    Raises:
        StoreNotFound: if there is no store.
        UnsupportedStore: if the directory has other contents, or a store of another version.
        StoreReadOnly: if the store cannot be written, and ``read_only`` is false.
        StoreError: for other errors of the disk.
    """
    root = locate(Path(path), create=False)

    def connect() -> sqlite3.Connection:
        try:
            return open_directory(root, create=False, check_cancelled=_do_nothing)
        except (StoreReadOnly, UnsupportedStore) as error:
            if not read_only:
                raise
            try:
                return open_to_read(root)
            except StoreNotFound:
                raise
            except LayersError:
                raise error from None

    with closing(while_busy(connect)) as connection:
        yield PlainStore(root, connection)


@final
class PlainStore:
    """The images of a store; see `DirectoryStore`."""

    def __init__(self, root: Path, connection: sqlite3.Connection) -> None:
        self._root = root
        self._connection = connection

    def images(self) -> list[tuple[str, str, Digest]]:
        """Return the names of all images; see `list_images`."""
        return self._run(lambda: list_names(self._connection))

    def usage(self) -> StoreUsage:
        """Measure the disk space of the store and its images.

        Raises:
            StoreBusy: if another process held the catalog for too long.
            StoreError: for errors of the disk.
        """
        parts = self._run(lambda: find_parts(self._connection))
        return measure(self._root, parts, check_cancelled=_do_nothing)

    def remove(self, reference: str, platform: str | None) -> bool:
        """Delete a reference, and return whether it existed.

        Args:
            reference: The image's full name; or the digest of its manifest (``sha256:…``), to
                delete the image with all its references.
            platform: The platform it was stored for; ``None``: all platforms.

        Raises:
            InvalidDigest: if ``reference`` begins like a digest and is none.
            StoreBusy: if another process held the catalog for too long.
            StoreError: for errors of the disk.
        """

        def remove() -> bool:
            with self._name() as name, transaction(self._connection):
                if reference.startswith("sha256:"):
                    found = drop_image(self._connection, parse_digest(reference))
                else:
                    found = drop_references(self._connection, reference, platform) > 0
                write_index(self._connection, self._root, lambda: name)
            return found

        return self._run(remove)

    def _run(self, job: Callable[[], T]) -> T:
        def attempt() -> T:
            with disk_errors(self._root):
                return job()

        return while_busy(attempt)

    @contextmanager
    def _name(self) -> Iterator[Path]:
        """Yield an unused path in ``ingest/``, held like those of an open store (see `scratch`)."""
        holder = os.urandom(8).hex()
        lease = self._root / "leases" / holder
        descriptor = try_lock(lease)
        assert descriptor is not None, "no other process has this name"
        try:
            os.write(descriptor, Process.current().encode().encode())
            yield self._root / "ingest" / f"{holder}-0.index"
        finally:
            unlock(lease, descriptor)


def _do_nothing() -> None:
    pass
