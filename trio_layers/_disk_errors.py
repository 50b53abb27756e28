"""Converts errors of the disk to errors of the store."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ._errors import StoreBusy, StoreError, StoreFull, StoreReadOnly

if TYPE_CHECKING:
    import sqlite3

__all__ = ["disk_errors", "removed_meanwhile", "store_error"]

_FULL: Final = {errno.ENOSPC, errno.EDQUOT}
_READ_ONLY: Final = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system and SQLite in the block into a `StoreError`."""
    import sqlite3  # worker processes do without it

    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise store_error(error, path) from error


def store_error(error: OSError | sqlite3.Error, path: Path) -> StoreError:
    """Return the store's error for an error of the disk at ``path``."""
    if isinstance(error, FileNotFoundError) and "/ingest/" in os.fsdecode(error.filename or ""):
        return removed_meanwhile(Path(os.fsdecode(error.filename)))
    if isinstance(error, OSError):
        full, read_only = error.errno in _FULL, error.errno in _READ_ONLY
        busy = False
        reason = error.strerror or str(error)
    else:
        # The type is compared by name, so that a program without a database need not load sqlite3.
        name = getattr(error, "sqlite_errorname", "SQLITE_ERROR")
        # SQLite reports a full disk itself, except when its shared memory cannot grow.
        full = name in ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")
        # SQLite has several codes of this kind, with different suffixes.
        read_only = name.startswith(("SQLITE_READONLY", "SQLITE_PERM"))
        if name.startswith("SQLITE_CANTOPEN"):
            # SQLite does not give the reason, which may also be too many open files.
            full = _is_full(path)
            read_only = not os.access(path if path.is_dir() else path.parent, os.W_OK)
        busy = name.startswith("SQLITE_BUSY")
        reason = str(error)
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return StoreError(
                f"the catalog of the store {path} is damaged ({reason}): move the directory away, "
                "and pull again; other tools may still read its images, as an OCI layout"
            )
    if full:
        return StoreFull(
            f"no space is left for {path} ({reason}): free some and try again; "
            "what is stored is intact"
        )
    if read_only:
        return StoreReadOnly(
            f"{path} cannot be written ({reason}): use a directory that is yours, "
            "on a file system that is not read-only"
        )
    if busy:
        return StoreBusy(f"{path} was held by another process for too long: try again")
    return StoreError(f"{path} failed: {reason}")


def removed_meanwhile(path: Path) -> StoreError:
    """Return the error for a file that was removed during its write."""
    return StoreError(
        f"{path} was removed while it was written: by a program that cleans up, or by a process "
        "that did not see that its lock is held. Keep the store where no program removes old "
        "files, and on a disk that one machine uses, and try again"
    )


def _is_full(path: Path) -> bool:
    """Whether lack of space prevents a new file there. Missing numbers mean no limit."""
    try:
        there = os.statvfs(path)
    except OSError:
        return False
    return there.f_bavail == 0 < there.f_blocks or there.f_favail == 0 < there.f_files
