"""A store with layers to mount, and its mounts; also a program for other processes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import trio
from _tools.plain_tars import archive

from trio_layers import ChainID, DirectoryStore

OPAQUE = {"name": ".wh..wh..opq"}

LAYERS: list[list[dict[str, object]]] = [
    [
        {"name": "./", "type": "dir", "mode": "0700", "mtime": 1},
        {"name": "hidden-by-an-opaque-root", "text": "x"},
    ],
    [
        {"name": "./", "type": "dir", "mode": "0751", "mtime": 5},
        OPAQUE,
        {"name": "keep/", "type": "dir", "mode": "2750", "mtime": 10**9},
        {"name": "keep/a", "text": "a", "mtime": "7.000000001"},
        {"name": "keep/b", "text": "b", "mode": "4711"},
        {"name": "keep/c", "type": "hardlink", "linkname": "keep/b", "mode": "4711"},
        {"name": "gone/", "type": "dir"},
        {"name": "gone/x", "text": "x"},
        {"name": "emptied/", "type": "dir", "mode": "0700"},
        {"name": "emptied/old", "text": "old"},
        {"name": "link", "type": "symlink", "linkname": "keep"},
        {"name": "file", "text": "f", "pax": {"SCHILY.xattr.user.colour": "red"}},
        {"name": "pipe", "type": "fifo"},
    ],
    [
        {"name": "./", "type": "dir", "mtime": 6, "mode": "0755"},
        {"name": ".wh.gone"},
        {"name": "emptied/", "type": "dir", "mode": "0711", "mtime": 8},
        {"name": "emptied/.wh..wh..opq"},
        {"name": "emptied/new", "text": "new"},
        {"name": "file/", "type": "dir"},
        {"name": "file/inside", "text": "a directory now"},
    ],
    [
        {"name": "./", "type": "dir", "mtime": 9, "mode": "0755"},
        {"name": "gone/", "type": "dir", "mtime": 3},
        {"name": "gone/y", "text": "y"},
        {"name": "keep/", "type": "dir", "mode": "0755", "mtime": 4},
        {"name": "keep/.wh.a"},
        {"name": ".wh.link"},
    ],
]


class Bytes(trio.abc.ReceiveStream):
    """A source with all its bytes at once."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        data, self._data = self._data[:max_bytes], self._data[len(self._data[:max_bytes]) :]
        return data

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def fill(
    store: DirectoryStore, layers: Iterable[Sequence[dict[str, object]]] = LAYERS
) -> ChainID | None:
    """Register layers on each other. Each is given by the entries of its tar."""
    chain: ChainID | None = None
    for entries in layers:
        chain = (await store.register(Bytes(archive(*entries)), chain)).chain_id
    return chain


def mounts_below(directory: Path) -> list[str]:
    """Return the mount points below a path, in the order of their mounts."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    # Characters that would end a field are written as three octal digits: proc_pid_mountinfo(5).
    points = [line.split()[4].decode("unicode_escape").encode("latin-1") for line in lines]
    inside = str(directory).encode() + b"/"
    return [point.decode() for point in points if point.startswith(inside)]


def unmount_below(directory: Path) -> list[str]:
    """Unmount everything below a path; return the mount points."""
    left = mounts_below(directory)
    for path in reversed(left):
        subprocess.run(["umount", "--lazy", path], check=True)
    return left


def unmount(path: Path) -> None:
    """Detach a mount. Fail if a file in it is still open."""
    try:
        subprocess.run(["umount", path], check=True)
    except subprocess.CalledProcessError:
        subprocess.run(["umount", "--recursive", "--lazy", path], check=True)
        raise
