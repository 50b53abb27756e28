"""Compares a tree on the disk with its list of entries."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final, final

from .._acl import ACCESS_ACL, DEFAULT_ACL
from .._compression import crc32
from .._entries import Entry, Summary, parse_entries
from .._errors import StoreError
from .._printable import printable_path
from .capabilities import OVERRIDE
from .directories import Directories, join, split
from .inodes import list_xattrs
from .member_entries import is_linux_xattr

__all__ = ["verify"]

_CHUNK: Final = 1 << 18
_FILE_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HANDLE_FLAGS: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_TYPES: Final = {
    "file": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
    "whiteout": stat.S_IFCHR,
}
_OVERLAY_PREFIXES: Final = ("trusted.overlay.", "user.overlay.")
# The machine sets the other attributes of "security.": SELinux labels, hashes of IMA.
_CHECKED_XATTRS: Final = ("user.", "trusted.", "security.capability", ACCESS_ACL, DEFAULT_ACL)

# Times that every file system stores exactly; ext4 may have 32 bits for the seconds.
_SAFE_SECONDS: Final = range(-(2**31), 2**31)


def verify(target: Path, *, check_cancelled: Callable[[], None]) -> Summary:
    """Compare a tree with its list: names, types, owners, modes, times, attributes, contents.

    If the list says that metadata is missing for lack of privilege, then owners, modes, device
    nodes and attributes may differ. The function blocks; the tree must not change meanwhile.

    Args:
        target: The directory with ``fs`` and ``entries``.
        check_cancelled: Called at each entry and chunk; what it raises comes out as it is.

    Raises:
        StoreError: If there is a difference, or the list or the tree cannot be read. The message
            names the first difference.
    """
    try:
        with open(target / "entries", "rb") as file:
            entries, summary = parse_entries(file)
        root = os.open(target / "fs", _DIRECTORY_FLAGS)
        try:
            _Comparison(root, entries, summary, check_cancelled).run()
        finally:
            os.close(root)
    except OSError as error:
        raise StoreError(f"it cannot be read ({error.strerror})") from error
    return summary


@final
class _Comparison:
    def __init__(
        self, root: int, entries: list[Entry], summary: Summary, check_cancelled: Callable[[], None]
    ) -> None:
        self._entries = entries
        self._limited = summary.incomplete and not summary.foreign_only
        self._check_cancelled = check_cancelled
        self._directories = Directories(root)
        self._children: dict[bytes, set[bytes]] = {}
        self._inodes: dict[bytes, int] = {}
        self._names: dict[bytes, int] = {}
        for entry in entries:
            if entry.path:
                parent, name = split(entry.path)
                self._children.setdefault(parent, set()).add(name)
            if entry.links is not None:
                self._names[entry.links] = self._names.get(entry.links, 0) + 1

    def run(self) -> None:
        try:
            if not self._entries or self._entries[0].path:
                raise StoreError("its list has no root")
            for entry in self._entries:
                self._check_cancelled()
                try:
                    self._compare(entry)
                except OSError as error:
                    raise _difference(entry.path, (error.strerror or "").lower()) from error
        finally:
            self._directories.close()

    def _compare(self, entry: Entry) -> None:
        parent, name = split(entry.path)
        directory = self._directories.open(parent)
        found = os.stat(name or b".", dir_fd=directory, follow_symlinks=False)
        self._compare_type(entry, found)
        if entry.type == "whiteout":
            return
        if entry.type == "dir":
            there = set(map(os.fsencode, os.listdir(self._directories.open(entry.path))))
            more = there - self._children.get(entry.path, set())
            if more:
                raise _difference(join(entry.path, min(more)), "is not in the list")
        elif found.st_nlink != self._names.get(entry.links or b"", 1):
            raise _difference(entry.path, "has more or fewer hard links than in the list")
        if entry.links is not None and (
            self._inodes.setdefault(entry.links, found.st_ino) != found.st_ino
        ):
            raise _difference(
                entry.path, f"is no longer the same file as {printable_path(entry.links)}"
            )
        self._compare_metadata(entry, found)
        if entry.type == "symlink":
            if os.readlink(name, dir_fd=directory) != entry.linkname:
                raise _difference(entry.path, "has a different target")
            return
        if entry.type == "file" and entry.links in (None, entry.path):
            self._compare_content(entry, found, directory, name)
        self._compare_xattrs(entry, directory, name)

    def _compare_type(self, entry: Entry, found: os.stat_result) -> None:
        kind = stat.S_IFMT(found.st_mode)
        empty = kind == stat.S_IFREG and found.st_size == 0
        if self._limited and empty and entry.type in ("char", "block", "whiteout"):
            return  # the empty file stands for a device
        if kind != _TYPES.get(entry.type):
            raise _difference(entry.path, f"is not a {entry.type}")
        device = (0, 0) if entry.type == "whiteout" else entry.dev
        if device and (os.major(found.st_rdev), os.minor(found.st_rdev)) != device:
            raise _difference(entry.path, "is a different device")

    def _compare_metadata(self, entry: Entry, found: os.stat_result) -> None:
        if entry.mtime_ns // 10**9 in _SAFE_SECONDS and found.st_mtime_ns != entry.mtime_ns:
            raise _difference(entry.path, "has a different modification time")
        if self._limited:
            return
        if (found.st_uid, found.st_gid) != (entry.uid, entry.gid):
            raise _difference(entry.path, "has a different owner or group")
        if entry.type != "symlink" and stat.S_IMODE(found.st_mode) != entry.mode:
            raise _difference(entry.path, "has a different mode")

    def _compare_content(
        self, entry: Entry, found: os.stat_result, directory: int, name: bytes
    ) -> None:
        if found.st_size != entry.size:
            raise _difference(entry.path, "has a different size")
        crc = 0
        file = os.open(name, _FILE_FLAGS, dir_fd=directory)
        try:
            while data := os.read(file, _CHUNK):
                self._check_cancelled()
                crc = crc32(data, crc)
        finally:
            os.close(file)
        if entry.crc32 is not None and crc != entry.crc32:
            raise _difference(entry.path, "has different content")

    def _compare_xattrs(self, entry: Entry, directory: int, name: bytes) -> None:
        descriptor = os.open(name or b".", _HANDLE_FLAGS, dir_fd=directory)
        try:
            handle = f"/proc/self/fd/{descriptor}"
            there = list_xattrs(handle)
            for attribute, value in entry.xattrs.items():
                if not is_linux_xattr(attribute):
                    continue
                if attribute not in there:
                    if not self._limited:
                        raise _difference(entry.path, f"lacks the attribute {attribute!r}")
                elif os.getxattr(handle, attribute) != value:
                    raise _difference(entry.path, f"has a different value of {attribute!r}")
            opaque = any(prefix + "opaque" in there for prefix in _OVERLAY_PREFIXES)
            if opaque != entry.opaque and not self._limited:
                where = "on the disk" if opaque else "in the list"
                raise _difference(entry.path, f"is opaque only {where}")
            for attribute in there:
                if (
                    attribute.startswith(_CHECKED_XATTRS)
                    and attribute not in entry.xattrs
                    and attribute != OVERRIDE
                    and not attribute.startswith(_OVERLAY_PREFIXES)
                ):
                    raise _difference(entry.path, f"has the unexpected attribute {attribute!r}")
        finally:
            os.close(descriptor)


def _difference(path: bytes, how: str) -> StoreError:
    return StoreError(f"{printable_path(path or b'.')} {how}")
