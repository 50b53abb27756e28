"""Opens paths for writing without following links of other users.

The functions walk a path from descriptor to descriptor, one component at a time, so that no
component can be exchanged between its check and its use. They follow a link only if root or the
caller owns the link and its directory, and no other user can replace the link. Below a directory
of another user, they follow no link at all. Links in the root directory are always followed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
from collections.abc import Callable
from typing import Final

__all__ = ["open_directory", "open_empty_directory", "open_parent", "real_path"]

_COMPONENT: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_START: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

# The number of links that Linux follows for one path (path_resolution(7)).
_MAX_LINKS: Final = 40


def real_path(path: str | os.PathLike[str], *, make: int | None) -> str:
    """Return the path of a directory with all links resolved.

    Args:
        path: The directory.
        make: The mode for missing directories, including parents.

    Raises:
        OSError: as for `open_directory`.
    """
    here = _walk(os.fspath(path), make)
    try:
        return os.readlink(f"/proc/self/fd/{here}")
    finally:
        os.close(here)


def open_directory(path: str | os.PathLike[str]) -> int:
    """Open a directory for reading.

    Raises:
        OSError: as open(2) does; ``ELOOP`` for a link of another user.
    """
    here = _walk(os.fspath(path), None)
    try:
        return os.open(".", _DIRECTORY, dir_fd=here)
    finally:
        os.close(here)


def open_parent(path: str | os.PathLike[str]) -> tuple[int, str]:
    """Open a path's parent directory (``O_PATH``), and return the name in it.

    Raises:
        OSError: as for `open_directory`; ``EISDIR`` if the path does not end in a name.
    """
    parent, slash, name = os.fspath(path).rstrip("/").rpartition("/")
    if name in ("", ".", ".."):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    return _walk(parent + slash, None), name


def open_empty_directory(
    stack: contextlib.ExitStack, path: str | os.PathLike[str], *, mode: int
) -> tuple[int, Callable[[], None] | None]:
    """Open an empty directory, or make one with ``mode``.

    Returns:
        The descriptor, which ``stack`` closes, and a function that removes the new directory;
        ``None`` in place of the function if the directory existed.

    Raises:
        OSError: as for `open_directory`; ``ENOTEMPTY`` for a directory with entries.
    """
    remove = opens = None
    with contextlib.suppress(IsADirectoryError):  # a path such as "." has no name
        parent, name = open_parent(path)
        stack.callback(os.close, parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, mode, dir_fd=parent)
            remove = functools.partial(os.rmdir, name, dir_fd=parent)
            opens = functools.partial(os.open, name, _DIRECTORY, dir_fd=parent)
    try:
        root = open_directory(path) if opens is None else opens()
        stack.callback(os.close, root)
        if os.listdir(root):
            raise OSError(errno.ENOTEMPTY, "directory is not empty; name an empty or a new one")
    except OSError:
        if remove is not None:
            with contextlib.suppress(OSError):
                remove()
        raise
    return root, remove


def _walk(path: str, make: int | None) -> int:
    """Open the directory at ``path`` with ``O_PATH``; "" is the current directory."""
    here = os.open("/" if path.startswith("/") else ".", _START)
    links = 0
    ours = True
    todo = path.split("/")[::-1]
    try:
        while todo:
            name = todo.pop()
            if name in ("", "."):
                continue
            there = _step(here, name, make)
            found = os.fstat(there)
            if stat.S_ISDIR(found.st_mode):
                os.close(here)
                here = there
                ours = ours and found.st_uid in _trusted_users()
                continue
            try:
                if not stat.S_ISLNK(found.st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                if not _may_follow(os.fstat(here), found, ours):
                    raise OSError(
                        errno.ELOOP,
                        f"{name!r} in the path is a link that another user may have planted; "
                        "name its target instead",
                    )
                if _is_magic(found):
                    new = os.open(name, _START, dir_fd=here)
                    os.close(here)
                    here = new
                    continue
                target = os.readlink("", dir_fd=there)
            finally:
                os.close(there)
            todo.extend(reversed(target.split("/")))
            if target.startswith("/"):
                new = os.open("/", _START)
                os.close(here)
                here = new
    except BaseException:
        os.close(here)
        raise
    return here


def _step(here: int, name: str, make: int | None) -> int:
    try:
        return os.open(name, _COMPONENT, dir_fd=here)
    except FileNotFoundError:
        if make is None or name == "..":
            raise
    try:
        os.mkdir(name, make, dir_fd=here)
    except FileExistsError:
        pass  # another process made the directory meanwhile
    return os.open(name, _COMPONENT, dir_fd=here)


def _trusted_users() -> tuple[int, int]:
    return 0, os.geteuid()


def _may_follow(directory: os.stat_result, link: os.stat_result, ours: bool) -> bool:
    root = os.stat("/")
    if (directory.st_dev, directory.st_ino) == (root.st_dev, root.st_ino):
        # In a user namespace without the machine's root, root's links have no known owner.
        return True
    if not ours or directory.st_uid not in _trusted_users() or link.st_uid not in _trusted_users():
        return False
    mode = directory.st_mode
    if mode & stat.S_ISVTX:
        return True  # others can neither rename nor replace a link that is not theirs
    shared = mode & stat.S_IWGRP and directory.st_gid not in (0, os.getegid())
    return not (shared or mode & stat.S_IWOTH)


def _is_magic(link: os.stat_result) -> bool:
    """Return whether a link belongs to /proc, and so leads to an open file."""
    try:
        return link.st_dev == os.lstat("/proc/self").st_dev
    except OSError:
        return False
