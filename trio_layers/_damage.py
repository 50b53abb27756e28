"""Notes of damaged blobs and trees, which the next pull replaces.

A note is an attribute of a blob's file or an empty file in a tree's directory, so that the note
disappears with the blob or tree. On a file system without attributes, only this process remembers
the damage. A pull downloads or unpacks a blob or tree again if it has a note or if a quick check
shows a difference from its row, and the new copy replaces the old one.

Most functions block, so call them in worker threads.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Final

from ._errors import StoreError

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
"""Damaged paths that this process has found, kept to avoid searches for notes."""


def note_damage(path: Path) -> None:
    """Note that a blob's file or a tree's directory is damaged.

    If the store cannot be written, only this process knows of the damage.
    """
    _NOTED.add(path)
    with contextlib.suppress(OSError):
        if not _is_ours(path):
            return
        if path.parent.parent.name == "blobs":
            os.setxattr(path, _ATTRIBUTE, b"", follow_symlinks=False)
        else:
            os.close(os.open(path / _FILE, _NEW, 0o600))


def forget_damage(path: Path) -> None:
    """Drop the note of damage for a new or verified blob or tree."""
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
    """Return whether this process has found the damage, without blocking."""
    return path in _NOTED


def damaged(path: Path, reason: str) -> StoreError:
    """Note that a blob or tree is damaged, and return the error."""
    note_damage(path)
    return StoreError(
        f"{path} is damaged ({reason}): pull its image again, and what is damaged comes anew"
    )


def is_whole_blob(path: Path, size: int) -> bool:
    """Return whether a blob exists in full size without a note of damage."""
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
    """Return whether a tree has its files and list without a note of damage."""
    name = os.fspath(path)
    try:
        files, entries = os.lstat(f"{name}/fs"), os.lstat(f"{name}/entries")
    except OSError:
        return False
    if not stat.S_ISDIR(files.st_mode) or not stat.S_ISREG(entries.st_mode):
        return False
    return entries.st_size > 0 and path not in _NOTED and not os.path.lexists(f"{name}/{_FILE}")


def _is_ours(path: Path) -> bool:
    """Return whether we own the store; root only reads stores of other users."""
    return os.lstat(path.parent).st_uid == os.geteuid()
