"""Mounts of this machine, and the trees of a store that they use. Blocking: for worker threads.

A process that is killed leaves its mount, and a mount may live on in other mount namespaces when
its process takes it away. The trees below it must stay. A *mark* in the store tells them: a file
that is written before the mount is made, and names the trees and the mount's source. The kernel
shows the source of a mount in each namespace that has a copy of it; what it shows of the lower
directories are names of descriptors, which say nothing.

Mounts that somebody else has made of trees are found by their paths. No process can see a mount
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

from .processes import FIRST_PID_NAMESPACE, boot_id, pid_namespace

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

# Seconds that a mount is taken for live which cannot be looked for from here.
_UNSEEN: Final = 24 * 3600


@final
@attrs.frozen
class Mount:
    """A line of ``mountinfo`` (proc_pid_mountinfo(5)).

    Attributes:
        id: The mount's ID in its namespace.
        device: The file system, as ``major:minor``.
        root: The directory of the file system that is mounted.
        point: Where it is mounted.
        kind: The type of file system.
        source: What it was said to be mounted from.
        options: Those of the file system.
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
            _unescaped(first[3]),
            _unescaped(first[4]),
            last[0],
            _unescaped(last[1]),
            _unescaped(b" ".join(last[2:])),
        )


@final
@attrs.frozen
class Mark:
    """What a mount uses, as it is written down in its scratch directory.

    Attributes:
        source: The mount's source, which no other mount has.
        trees: The names of the trees' directories.
        boot: The ID of the machine's present boot; no mount outlives it.
        processes: The inode of the PID namespace.
        made: When, in seconds since 1970.
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
        """The mark in a mount's scratch directory; ``None`` if there is none."""
        try:
            fields = json.loads((place / _MARK).read_bytes())
            return cls(**{**fields, "trees": tuple(fields["trees"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, place: Path) -> None:
        with open(place / _MARK, "x") as file:
            json.dump(attrs.asdict(self), file)

    def is_live(self, mounts: Sequence[Mount]) -> bool:
        """Whether the mount may still be there; ``mounts``: all there are to be seen."""
        if self.boot != boot_id():
            return False
        if any(mount.source == self.source.encode() for mount in mounts):
            return True
        if self.processes == pid_namespace() or pid_namespace() == FIRST_PID_NAMESPACE:
            return False
        return time.time() - self.made < _UNSEEN


def find_mounts() -> list[Mount]:
    """The mounts in all namespaces of processes that may be looked at."""
    found: list[Mount] = []
    seen: set[str] = set()
    for task in ("/proc/thread-self", *_tasks()):
        try:
            namespace = os.readlink(f"{task}/ns/mnt")
            if namespace in seen:
                continue
            mounts = _read(f"{task}/mountinfo")
        except OSError:
            continue  # it has ended, or is another user's
        if mounts:  # one that is about to end has none any more
            seen.add(namespace)
            found += mounts
    return found


def is_mounted(place: Path) -> bool:
    """Whether the mount that a scratch directory was made for is still in some namespace."""
    mark = Mark.read(place)
    return mark is not None and mark.is_live(find_mounts())


def find_used_trees(root: Path) -> Mapping[str, tuple[str, ...]]:
    """The names of the trees of a store that mounts use, and where these are mounted.

    A mount that is being made, or cannot be looked for from here, is nowhere and counts all the
    same.
    """
    mounts = find_mounts()
    used: dict[str, set[bytes]] = {}
    for mark in _marks(root / "ingest"):
        for tree in mark.trees:
            used.setdefault(tree, set()).update(
                mount.point for mount in mounts if mount.source == mark.source.encode()
            )
    for tree, point in _others(root, mounts):
        used.setdefault(tree, set()).add(point)
    return {tree: tuple(sorted(map(os.fsdecode, points))) for tree, points in used.items()}


def mount_id(descriptor: int) -> int | None:
    """The ID of the mount that an open file is on, as in ``mountinfo``."""
    with contextlib.suppress(OSError), open(f"/proc/thread-self/fdinfo/{descriptor}") as file:
        for line in file:
            if line.startswith("mnt_id:"):
                return int(line.split(":")[1])
    return None


def find_own_mounts() -> list[Mount]:
    """The mounts in the namespace of this thread."""
    return _read("/proc/thread-self/mountinfo")


def _marks(ingest: Path) -> Iterator[Mark]:
    for place in ingest.glob("*.mount"):
        mark = Mark.read(place)
        if mark is not None:
            yield mark


def _others(root: Path, mounts: Sequence[Mount]) -> Iterator[tuple[str, bytes]]:
    """Trees that are mounted by their paths: bound, or as layers of an overlay."""
    inside = _path_in_file_system(root / "trees" / "sha256")
    for mount in mounts:
        if inside is not None and mount.device == inside[0]:
            device_path = inside[1] + b"/"
            if mount.root.startswith(device_path):
                name = mount.root.removeprefix(device_path).partition(b"/")[0]
                yield os.fsdecode(name), mount.point
        if mount.kind == b"overlay":
            for prefix, name in _TREE.findall(mount.options):
                if _may_be(prefix, root):
                    yield os.fsdecode(name), mount.point


def _may_be(prefix: bytes, root: Path) -> bool:
    """Whether a path in the options of a mount leads to the store, as far as can be told."""
    if os.path.exists(prefix + b"/trees"):
        return os.path.realpath(prefix) == os.fsencode(root)
    return True  # another namespace's path


def _path_in_file_system(path: Path) -> tuple[bytes, bytes] | None:
    """The device of a directory, as in ``mountinfo``, and its path from the file system's root."""
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


def _read(path: str) -> list[Mount]:
    with open(path, "rb") as file:
        parsed = map(Mount.parse, file.read().splitlines())
    return [mount for mount in parsed if mount is not None]


def _tasks() -> Iterator[str]:
    for process in os.listdir("/proc"):
        if not process.isdecimal():
            continue
        try:
            # A thread may have a namespace of its own.
            tasks = os.listdir(f"/proc/{process}/task")
        except OSError:
            continue
        yield from (f"/proc/{process}/task/{task}" for task in tasks)


def _unescaped(field: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field)
