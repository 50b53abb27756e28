"""The nodes of a directory tree, for comparisons."""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from collections import defaultdict
from pathlib import Path

import attrs


@attrs.frozen
class Node:
    """A path with all the properties that unpacking decides."""

    type: str
    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    device: int
    content: str
    crc32: int
    links: tuple[str, ...]
    xattrs: tuple[tuple[str, bytes], ...]


TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
}


def describe(root: Path) -> dict[str, Node]:
    """Return a node for each path below ``root``, which itself is the path ``.``."""
    found: dict[str, os.stat_result] = {".": root.lstat()}
    for directory, directories, files in os.walk(root):
        for name in directories + files:
            path = os.path.join(directory, name)
            found[os.path.relpath(path, root)] = os.lstat(path)
    groups = defaultdict(list)
    for path, status in found.items():
        if not stat.S_ISDIR(status.st_mode):
            groups[status.st_dev, status.st_ino].append(path)
    return {
        path: _node(root / path, status, sorted(groups[status.st_dev, status.st_ino]))
        for path, status in found.items()
    }


def _node(path: Path, status: os.stat_result, links: list[str]) -> Node:
    kind = TYPES[stat.S_IFMT(status.st_mode)]
    content, crc32 = "", 0
    if kind == "file":
        data = path.read_bytes()
        content, crc32 = hashlib.sha256(data).hexdigest(), zlib.crc32(data)
    elif kind == "symlink":
        content = os.readlink(path)
    xattrs = {name: os.getxattr(path, name, follow_symlinks=False) for name in _names(path)}
    return Node(
        type=kind,
        mode=stat.S_IMODE(status.st_mode),
        owner=(status.st_uid, status.st_gid),
        mtime_ns=status.st_mtime_ns,
        device=status.st_rdev if "device" in kind else 0,
        content=content,
        crc32=crc32,
        links=tuple(links) if len(links) > 1 else (),
        xattrs=tuple(sorted(xattrs.items())),
    )


def _names(path: Path) -> list[str]:
    return [
        name
        for name in os.listxattr(path, follow_symlinks=False)
        if not name.startswith("trusted.overlay.")
    ]


def differences(ours: dict[str, Node], theirs: dict[str, Node]) -> list[str]:
    """Return the differences, one line each."""
    lines = [f"only ours: {path}" for path in sorted(ours.keys() - theirs.keys())]
    lines += [f"only theirs: {path}" for path in sorted(theirs.keys() - ours.keys())]
    for path in sorted(ours.keys() & theirs.keys()):
        for field in attrs.fields(Node):
            mine, other = getattr(ours[path], field.name), getattr(theirs[path], field.name)
            if mine != other:
                lines.append(f"{path}: {field.name}: ours {mine!r}, theirs {other!r}")
    return lines
