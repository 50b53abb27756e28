"""Files for the store: durable writes, locks, removal. Blocking, for worker threads."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ._digest import Digest, parse_digest
from ._errors import StoreError

__all__ = [
    "DIRECTORY",
    "disk_usage",
    "file_name",
    "file_system_type",
    "lock_directory",
    "lock_written",
    "remove_directory",
    "replace_file",
    "sync_directory",
    "sync_file_system",
    "try_lock",
    "unlock",
    "unlock_written",
]

DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def file_name(digest: Digest) -> str:
    """Return the file name for a digest.

    Raises:
        InvalidDigest: if the digest is invalid. A descriptor may come from anywhere, and the name
            becomes part of a path.
    """
    return parse_digest(digest).removeprefix("sha256:")


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@functools.cache
def _syncfs() -> Callable[[int], int] | None:
    # Python has no os.syncfs before 3.14.
    try:
        function = ctypes.CDLL(None, use_errno=True).syncfs
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int]
    function.restype = ctypes.c_int
    call: Callable[[int], int] = function
    return call


@functools.cache
def _statfs() -> Callable[[bytes, ctypes.Array[ctypes.c_long]], int] | None:
    # Python's os.statvfs does not tell the type.
    try:
        function = ctypes.CDLL(None, use_errno=True).statfs
    except (OSError, AttributeError):
        return None
    function.restype = ctypes.c_int
    call: Callable[[bytes, ctypes.Array[ctypes.c_long]], int] = function
    return call


def file_system_type(path: Path) -> int:
    """Return the type number of a path's file system (statfs(2)).

    The number is 0 if it is unknown.
    """
    statfs = _statfs()
    buffer = (ctypes.c_long * 64)()  # the type comes first
    if statfs is None or statfs(os.fsencode(path), buffer) != 0:
        return 0
    return buffer[0] & 0xFFFFFFFF


def sync_file_system(directory: int) -> None:
    """Make all writes to the file system of an open directory durable.

    One call is enough for a tree of any size: an fsync for each file takes a hundred times as long.
    The kernel reports a lost write once to each descriptor that was open at the failure. A
    descriptor that is opened later gets no report if another one has got it. So ``directory`` must
    be open since before the first byte was written.
    """
    syncfs = _syncfs()
    if syncfs is None:
        os.sync()
    elif syncfs(directory) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def replace_file(path: Path, data: bytes, *, temporary: Path) -> None:
    """Write a small file so that readers see either the old file or the whole new one.

    Args:
        path: The file.
        data: The whole content of the file.
        temporary: A name to write it under first, on the same file system.
    """
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


def try_lock(path: Path, *, make: bool = True) -> int | None:
    """Make and lock a lock file; ``None`` if another task or process holds the lock.

    The lock ends with the process. Give the result to `unlock`.

    Args:
        path: The file.
        make: Create the file if it does not exist.

    Raises:
        FileNotFoundError: if the file does not exist and ``make`` is false.
    """
    while True:
        flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file after this open: then the lock
            # does not affect a process that opens the name now.
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def lock_written(descriptor: int, path: Path) -> None:
    """Lock a file for writing until `unlock_written`.

    Raises:
        StoreError: if another process writes the file.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreError(
            f"{path} is written by another process, and the file of its lock was removed: keep the "
            "store where no program removes old files, and try again when that process is done"
        ) from None


def unlock_written(descriptor: int) -> None:
    """Release the lock of `lock_written`, before the file is closed.

    Closing is not enough: between fork and exec, a child process has a copy of the descriptor, and
    with it the lock.
    """
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def unlock(path: Path, descriptor: int) -> None:
    """Remove a lock file, then release the lock."""
    # A file that stays does no harm, because the lock ends with the descriptor.
    with contextlib.suppress(OSError):
        os.unlink(path)
    os.close(descriptor)


@contextmanager
def lock_directory(path: Path, check_cancelled: Callable[[], None]) -> Iterator[None]:
    """Hold the lock on a directory itself, without writing into it.

    Args:
        path: The directory.
        check_cancelled: Called during the wait for the lock. Its exceptions are raised unchanged.
    """
    descriptor = os.open(path, DIRECTORY)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                check_cancelled()
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def remove_directory(
    path: Path, *, aside: Callable[[], Path], check_cancelled: Callable[[], None]
) -> None:
    """Remove a directory with all its contents; links are not followed.

    A directory found inside is first moved out. So a deeply nested layer of a stranger needs
    neither recursion nor long paths, and the remains after an interruption are easy to find.

    Args:
        path: The directory.
        aside: Returns a new path to move a directory to, on the same file system.
        check_cancelled: Called for each entry. Its exceptions are raised unchanged.
    """
    waiting = [path]
    while waiting:
        directory = waiting.pop()
        descriptor = os.open(directory, DIRECTORY)
        try:
            os.fchmod(descriptor, 0o700)
            with os.scandir(descriptor) as entries:
                names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
            for name, is_directory in names:
                check_cancelled()
                if not is_directory:
                    os.unlink(name, dir_fd=descriptor)
                    continue
                # Moving a directory rewrites its "..", which requires write permission for it.
                os.chmod(name, 0o700, dir_fd=descriptor)
                moved = aside()
                os.rename(name, moved, src_dir_fd=descriptor)
                waiting.append(moved)
        finally:
            os.close(descriptor)
        os.rmdir(directory)


def disk_usage(path: Path, check_cancelled: Callable[[], None]) -> int:
    """Return the disk space of a file, or of a directory with all its contents, in bytes.

    A file with several names counts once, and a missing file counts nothing. Nothing may change in
    the directory meanwhile. The function needs one descriptor for any depth.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return 0
    blocks = found.st_blocks
    if stat.S_ISDIR(found.st_mode):
        counted: set[int] = set()
        # The directories yet to be looked at, in those that we are in.
        waiting: list[list[str]] = [[]]
        here = os.open(path, DIRECTORY)
        try:
            while True:
                directories: list[str] = []
                with os.scandir(here) as entries:
                    for entry in entries:
                        check_cancelled()
                        found = entry.stat(follow_symlinks=False)
                        if stat.S_ISDIR(found.st_mode):
                            directories.append(entry.name)
                        elif found.st_nlink > 1:
                            if found.st_ino in counted:
                                continue
                            counted.add(found.st_ino)
                        blocks += found.st_blocks
                waiting.append(directories)
                while not waiting[-1]:
                    waiting.pop()
                    if len(waiting) == 1:
                        return 512 * blocks
                    here = _go(here, "..")
                here = _go(here, waiting[-1].pop())
        finally:
            os.close(here)
    return 512 * blocks


def _go(here: int, name: str) -> int:
    there = os.open(name, DIRECTORY, dir_fd=here)
    os.close(here)
    return there
