"""Mounts of this machine, and the trees of a store below them.

All functions block, so call them in worker threads.

A killed process leaves its mount, and a copy of a mount in another mount namespace outlives the
unmounting of the original. The trees of both must stay in the store. Therefore a *mark* file is
written before the mount is made, and names the trees and the mount's source. The kernel shows this
source in each namespace with a copy of the mount. For the lower directories, the kernel shows
names of descriptors only, which do not identify the trees.

Trees in mounts of other programs are found by their paths. No process can see a mount
that was detached lazily and is still in use, or a namespace without a process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Self, final

import attrs

from .._processes import FIRST_PID_NAMESPACE, boot_id, pid_namespace

__all__ = [
    "Mark",
    "Mount",
    "find_mounts",
    "find_own_mounts",
    "find_used_trees",
    "is_mounted",
    "mount_id",
]

_MARK: Final = "mark"
_TREE: Final = re.compile(rb"([^:,=]*)/trees/sha256/([0-9a-f]{64})(?![0-9a-f])")
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")

# Seconds for which a mount counts as live if this process cannot search for it.
_UNSEEN_SECONDS: Final = 24 * 3600


@final
@attrs.frozen
class Mount:
    """A line of ``mountinfo`` (proc_pid_mountinfo(5)).

    Attributes:
        id: The mount's ID in its namespace.
        device: The file system, as ``major:minor``.
        root: The mounted directory of the file system.
        point: The mount point.
        kind: The type of file system.
        source: The source that the caller of mount(2) named.
        options: The options of the file system.
    """

    id: int
    device: bytes
    root: bytes
    point: bytes
    kind: bytes
    source: bytes
    options: bytes

    @classmethod
    def parse(cls, line: bytes) -> Self | None:
        fields, dash, rest = line.partition(b" - ")
        first, last = fields.split(b" "), rest.split(b" ")
        if not dash or len(first) < 6 or len(last) < 3:
            return None
        return cls(
            int(first[0]),
            first[2],
            _unescape(first[3]),
            _unescape(first[4]),
            last[0],
            _unescape(last[1]),
            _unescape(b" ".join(last[2:])),
        )


@final
@attrs.frozen
class Mark:
    """The record of a mount and its trees in its scratch directory.

    Attributes:
        source: The mount's source, unique to this mount.
        trees: The names of the trees' directories.
        boot: The ID of the machine's present boot; no mount outlives it.
        processes: The inode of the PID namespace.
        made: The time of mounting, in seconds since 1970.
    """

    source: str
    trees: tuple[str, ...]
    boot: str
    processes: int
    made: float

    @classmethod
    def new(cls, trees: Sequence[Path]) -> Self:
        return cls(
            source=f"trio-layers-{secrets.token_hex(8)}",
            trees=tuple(tree.name for tree in trees),
            boot=boot_id(),
            processes=pid_namespace(),
            made=time.time(),
        )

    @classmethod
    def read(cls, place: Path) -> Self | None:
        """Read the mark in a mount's scratch directory; ``None`` if it has none."""
        try:
            fields = json.loads((place / _MARK).read_bytes())
            return cls(**{**fields, "trees": tuple(fields["trees"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, place: Path) -> None:
        with open(place / _MARK, "x") as file:
            json.dump(attrs.asdict(self), file)

    def is_live(self, mounts: Sequence[Mount]) -> bool:
        """Return whether the mount may still exist, given all visible mounts."""
        if self.boot != boot_id():
            return False
        if any(mount.source == self.source.encode() for mount in mounts):
            return True
        if self.processes == pid_namespace() or pid_namespace() == FIRST_PID_NAMESPACE:
            return False
        return time.time() - self.made < _UNSEEN_SECONDS


def find_mounts() -> list[Mount]:
    """Return the mounts in the namespaces of all visible processes."""
    found: list[Mount] = []
    seen: set[str] = set()
    for task in ("/proc/thread-self", *_list_tasks()):
        try:
            namespace = os.readlink(f"{task}/ns/mnt")
            if namespace in seen:
                continue
            mounts = _read_mountinfo(f"{task}/mountinfo")
        except OSError:
            continue  # the task has ended, or belongs to another user
        if mounts:  # a task that is about to end has no mounts any more
            seen.add(namespace)
            found += mounts
    return found


def is_mounted(place: Path) -> bool:
    """Return whether the mount of a scratch directory still exists in a namespace."""
    mark = Mark.read(place)
    return mark is not None and mark.is_live(find_mounts())


def find_used_trees(root: Path) -> Mapping[str, tuple[str, ...]]:
    """Return the names of mounted trees of a store, with their mount points.

    An unfinished mount, and a mount that this process cannot search for, count as mounts, too,
    but have no mount point.
    """
    mounts = find_mounts()
    used: dict[str, set[bytes]] = {}
    for mark in _read_marks(root / "ingest"):
        for tree in mark.trees:
            used.setdefault(tree, set()).update(
                mount.point for mount in mounts if mount.source == mark.source.encode()
            )
    for tree, point in _find_foreign_uses(root, mounts):
        used.setdefault(tree, set()).add(point)
    return {tree: tuple(sorted(map(os.fsdecode, points))) for tree, points in used.items()}


def mount_id(descriptor: int) -> int | None:
    """Return the ``mountinfo`` ID of the mount of an open file."""
    with contextlib.suppress(OSError), open(f"/proc/thread-self/fdinfo/{descriptor}") as file:
        for line in file:
            if line.startswith("mnt_id:"):
                return int(line.split(":")[1])
    return None


def find_own_mounts() -> list[Mount]:
    """Return the mounts in the namespace of this thread."""
    return _read_mountinfo("/proc/thread-self/mountinfo")


def _read_marks(ingest: Path) -> Iterator[Mark]:
    for place in ingest.glob("*.mount"):
        mark = Mark.read(place)
        if mark is not None:
            yield mark


def _find_foreign_uses(root: Path, mounts: Sequence[Mount]) -> Iterator[tuple[str, bytes]]:
    """Find trees that are bind-mounted, or used as layers of an overlay."""
    inside = _path_in_file_system(root / "trees" / "sha256")
    for mount in mounts:
        if inside is not None and mount.device == inside[0]:
            device_path = inside[1] + b"/"
            if mount.root.startswith(device_path):
                name = mount.root.removeprefix(device_path).partition(b"/")[0]
                yield os.fsdecode(name), mount.point
        if mount.kind == b"overlay":
            for prefix, name in _TREE.findall(mount.options):
                if _may_lead_to(prefix, root):
                    yield os.fsdecode(name), mount.point


def _may_lead_to(prefix: bytes, root: Path) -> bool:
    """Return whether a path in a mount's options may lead to the store."""
    if os.path.exists(prefix + b"/trees"):
        return os.path.realpath(prefix) == os.fsencode(root)
    return True  # the path may be valid in another namespace only


def _path_in_file_system(path: Path) -> tuple[bytes, bytes] | None:
    """Return a directory's ``mountinfo`` device and its path in the file system."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        id = mount_id(descriptor)
    finally:
        os.close(descriptor)
    for mount in find_own_mounts():
        if mount.id == id:
            below = os.path.relpath(os.fsencode(path), mount.point)
            return mount.device, os.path.normpath(os.path.join(mount.root, below))
    return None


def _read_mountinfo(path: str) -> list[Mount]:
    with open(path, "rb") as file:
        parsed = map(Mount.parse, file.read().splitlines())
    return [mount for mount in parsed if mount is not None]


def _list_tasks() -> Iterator[str]:
    for process in os.listdir("/proc"):
        if not process.isdecimal():
            continue
        try:
            # Each thread can have its own mount namespace, so all threads are read.
            tasks = os.listdir(f"/proc/{process}/task")
        except OSError:
            continue
        yield from (f"/proc/{process}/task/{task}" for task in tasks)


def _unescape(field: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field)
