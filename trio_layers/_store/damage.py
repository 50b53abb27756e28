"""Blobs and trees that were found damaged: noted by their finder, mended by the next pull.

A note is with what it is about, and goes with it: an attribute of a blob's file, an empty file in a
tree's directory. Where the file system keeps no attributes, this process remembers. A blob or tree
that has one, or that is not as its row says at a glance, is treated as if it had to come anew, and
what comes is put in its place. Blocking: for worker threads.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Final

from .._errors import StoreError

__all__ = [
    "any_noted",
    "damaged",
    "forget_damage",
    "is_noted",
    "is_whole_blob",
    "is_whole_tree",
    "note_damage",
]

_ATTRIBUTE: Final = "user.trio-layers.damaged"
_FILE: Final = "damaged"
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC

_NOTED: Final[set[Path]] = set()
"""The damage that this process has found, so that it need not look for notes."""


def note_damage(path: Path) -> None:
    """Note that a blob's file or a tree's directory is damaged, as far as the store can be
    written."""
    _NOTED.add(path)
    with contextlib.suppress(OSError):
        if not _is_ours(path):
            return
        if path.parent.parent.name == "blobs":
            os.setxattr(path, _ATTRIBUTE, b"", follow_symlinks=False)
        else:
            os.close(os.open(path / _FILE, _NEW, 0o600))


def forget_damage(path: Path) -> None:
    """Drop the note: what is there is new, or was verified."""
    _NOTED.discard(path)
    with contextlib.suppress(OSError):
        if not _is_ours(path):
            return
        if path.parent.parent.name == "blobs":
            os.removexattr(path, _ATTRIBUTE, follow_symlinks=False)
        else:
            os.unlink(path / _FILE)


def any_noted() -> bool:
    """Whether this process has found any damage."""
    return bool(_NOTED)


def is_noted(path: Path) -> bool:
    """Whether this process has found the damage; does not block."""
    return path in _NOTED


def damaged(path: Path, reason: str) -> StoreError:
    """Note that a blob or a tree is damaged, and return an error that says so."""
    note_damage(path)
    return StoreError(
        f"{path} is damaged ({reason}): pull its image again, and what is damaged comes anew"
    )


def is_whole_blob(path: Path, size: int) -> bool:
    """Whether a blob's file is there, of the right size, and not noted as damaged."""
    name = os.fspath(path)
    try:
        found = os.lstat(name)
    except OSError:
        return False
    if not stat.S_ISREG(found.st_mode) or found.st_size != size or path in _NOTED:
        return False
    try:
        return _ATTRIBUTE not in os.listxattr(name, follow_symlinks=False)
    except OSError:
        return True


def is_whole_tree(path: Path) -> bool:
    """Whether a tree's files and the list of them are there, and not noted as damaged."""
    name = os.fspath(path)
    try:
        files, entries = os.lstat(f"{name}/fs"), os.lstat(f"{name}/entries")
    except OSError:
        return False
    if not stat.S_ISDIR(files.st_mode) or not stat.S_ISREG(entries.st_mode):
        return False
    return entries.st_size > 0 and path not in _NOTED and not os.path.lexists(f"{name}/{_FILE}")


def _is_ours(path: Path) -> bool:
    """Whether the store is not another user's, which root only reads."""
    return os.lstat(path.parent).st_uid == os.geteuid()
