"""Stacks of trees as one: what a container on top of them would see, without a mount.

`MergedTree` is the synchronous core, for worker threads; `RootfsView` is its face for trio.
What is seen comes from the trees' lists of entries; only contents are read from their ``fs``.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, final

import attrs
import trio

from .._entries import Entry, lines_about, parse_entries
from .._errors import StoreError

__all__ = ["MergedTree", "RootfsView"]

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_CHUNK: Final = 1 << 20

# As many as Linux follows for one path (path_resolution(7)).
_MAX_LINKS: Final = 40


class _Node:
    """One path of the merged view: what is there, from which tree, what is in it."""

    __slots__ = ("children", "entry", "tree")

    def __init__(self, entry: Entry, tree: int) -> None:
        self.entry = entry
        self.tree = tree
        self.children: dict[bytes, _Node] = {}


@final
class MergedTree:
    """The merged view of unpacked layers, by overlayfs' rules.

    It blocks, so it is for worker threads, several at once if need be. The lists of entries are
    read when something is first asked for.

    Args:
        trees: The layers' tree directories (with ``fs`` and ``entries``), the top one last.

    Raises:
        StoreError: (all methods) if a list of entries is damaged or cannot be read.
    """

    def __init__(self, trees: Sequence[Path]) -> None:
        self._trees = tuple(trees)
        self._lock = threading.Lock()
        self._root: _Node | None = None
        self._loaded = False
        self._only: frozenset[bytes] | None = None
        self._names: dict[tuple[int, bytes], tuple[bytes, ...]] = {}

    @property
    def loaded(self) -> bool:
        """Whether the lists are in memory, so that `lookup` does not touch the disk."""
        return self._loaded

    def load(self) -> None:
        """Read the lists of entries, unless that was done."""
        with self._lock:
            if self._loaded:
                return
            for number, tree in enumerate(self._trees):
                for entry in _listed(tree, self._only):
                    self._put(entry, number)
            self._number_links()
            self._loaded = True

    def lookup(self, path: bytes) -> Entry | None:
        """What is there; ``None`` for nothing. Links on the way are not followed."""
        node = self._find(path)
        return None if node is None else node.entry

    def resolve(self, path: bytes, *, follow: bool) -> Entry:
        """What a process inside finds at ``path``; ``follow``: also if the last part is a link.

        Raises:
            OSError: as `RootfsView.stat`.
        """
        self.load()
        if self._root is None:
            raise _error(errno.ENOENT, path)
        # All from the root to here: a step takes no longer where it is deep.
        trail = [self._root]
        todo = path.split(b"/")[::-1]
        links = 0
        while todo:
            part = todo.pop()
            if trail[-1].entry.type != "dir":
                raise _error(errno.ENOTDIR, path)
            if part in (b"", b"."):
                continue
            if part == b"..":
                del trail[max(1, len(trail) - 1) :]
                continue
            node = trail[-1].children.get(part)
            if node is None:
                raise _error(errno.ENOENT, path)
            target = node.entry.linkname
            if target is None or not (todo or follow):
                trail.append(node)
                continue
            links += 1
            if links > _MAX_LINKS:
                raise _error(errno.ELOOP, path)
            todo.extend(reversed(target.split(b"/")))
            if target.startswith(b"/"):
                del trail[1:]
        return trail[-1].entry

    def survey(self, paths: Iterable[bytes]) -> dict[bytes, Entry | None]:
        """What is at each of ``paths``; of what is no directory, nothing but the type is sure.

        Unless the lists are in memory, only what tells of these paths is parsed: of most layers
        little is asked when another is put on them.
        """
        paths = tuple(paths)
        view = self
        if not self._loaded:
            wanted = {b""}
            for path in paths:
                while path not in wanted:
                    wanted.add(path)
                    path = path.rpartition(b"/")[0]
            view = MergedTree(self._trees)
            view._only = frozenset(wanted)
        return {path: view.lookup(path) for path in paths}

    def links(self, path: bytes) -> tuple[bytes, ...]:
        """All names, sorted, of the file that is there."""
        node = self._find(path)
        if node is None:
            raise _error(errno.ENOENT, path)
        return self._names.get((node.tree, node.entry.links or b""), (path,))

    def open(self, path: bytes) -> int:
        """A descriptor to read the file that is there; its taker closes it.

        Raises:
            OSError: if there is no regular file, with the path in it.
        """
        node = self._find(path)
        if node is None:
            raise _error(errno.ENOENT, path)
        if node.entry.type != "file":
            raise _error(errno.EISDIR if node.entry.type == "dir" else errno.EINVAL, path)
        parts = path.split(b"/")
        here = os.open(self._trees[node.tree] / "fs", _DIRECTORY)
        for part in parts[:-1]:
            try:
                inner = os.open(part, _DIRECTORY, dir_fd=here)
            finally:
                os.close(here)
            here = inner
        try:
            return os.open(parts[-1], _FILE, dir_fd=here)
        finally:
            os.close(here)

    def walk(self) -> Iterator[Entry]:
        """All there is, sorted by path (bytes); the root is first."""
        self.load()
        found: list[Entry] = []
        todo = [] if self._root is None else [self._root]
        while todo:
            node = todo.pop()
            found.append(node.entry)
            todo.extend(node.children.values())
        found.sort(key=lambda entry: entry.path)
        return iter(found)

    def _find(self, path: bytes) -> _Node | None:
        self.load()
        node = self._root
        if path:
            for name in path.split(b"/"):
                if node is None:
                    return None
                node = node.children.get(name)
        return node

    def _put(self, entry: Entry, tree: int) -> None:
        """Lay an entry over what is there; a list has parents before what is in them."""
        above, _, name = entry.path.rpartition(b"/")
        node = _Node(entry, tree)
        parent: _Node | None = None
        if entry.path:
            parent = self._root
            for part in above.split(b"/") if above else ():
                parent = parent and parent.children.get(part)
            if parent is None:
                raise StoreError(
                    f"{self._trees[tree]}: its list of entries is damaged (one is in a directory "
                    "that is not listed); remove the layer and pull it again"
                )
            known = parent.children.get(name)
        else:
            known = self._root
        if entry.type == "dir" and known and known.entry.type == "dir":
            if not entry.opaque:
                node.children = known.children
            if entry.implied:
                entry = attrs.evolve(entry, mtime_ns=known.entry.mtime_ns)
        if entry.opaque or entry.implied:
            entry = attrs.evolve(entry, opaque=False, implied=False)
        node.entry = entry
        if parent is None:
            self._root = node
        elif entry.type == "whiteout":
            parent.children.pop(name, None)
        else:
            parent.children[name] = node

    def _number_links(self) -> None:
        """Of a file's names, those count that are still to be seen."""
        groups: dict[tuple[int, bytes], list[_Node]] = {}
        todo = [] if self._root is None else [self._root]
        while todo:
            node = todo.pop()
            todo.extend(node.children.values())
            if node.entry.links is not None:
                groups.setdefault((node.tree, node.entry.links), []).append(node)
        for (tree, _), nodes in groups.items():
            names = tuple(sorted(node.entry.path for node in nodes))
            first = names[0] if len(names) > 1 else None
            for node in nodes:
                node.entry = attrs.evolve(node.entry, links=first)
            if first is not None:
                self._names[tree, first] = names


def _listed(tree: Path, only: frozenset[bytes] | None) -> list[Entry]:
    """A tree's entries; with ``only``, at least those of the paths in it."""
    try:
        with open(tree / "entries", "rb") as lines:
            chosen = None if only is None else lines_about(only, lines)
            if chosen is None:
                lines.seek(0)
                return parse_entries(lines)[0]
            return parse_entries(chosen)[0]
    except OSError as error:
        raise StoreError(
            f"{tree}: its list of entries cannot be read ({error.strerror}); "
            "remove the layer and pull it again"
        ) from error


def _error(number: int, path: bytes) -> OSError:
    return OSError(number, os.strerror(number), path.decode("utf-8", "surrogateescape"))


@final
class RootfsView:
    """An image's root file system, to look at and read from.

    Paths are ``str`` (UTF-8, with surrogate escapes for other bytes) or ``bytes``, with or
    without a leading slash. Links are followed inside the root, as in a container: an absolute
    target starts there, and ``..`` does not lead out of it. What fails raises the builtin
    `OSError` that the same call on a real directory would, with the path in it.

    Work on the disk is done in worker threads. Cancelled, a call gives up between chunks.
    """

    def __init__(self, tree: MergedTree) -> None:
        self._tree = tree

    async def stat(self, path: str | bytes, *, follow_symlinks: bool = True) -> Entry:
        """What is there; its ``path`` is the real one.

        Raises:
            FileNotFoundError: if nothing is there.
            NotADirectoryError: if something on the way is no directory.
            OSError: ``ELOOP`` if too many links are on the way.
        """
        await self._load()
        return self._resolve(path, follow=follow_symlinks)

    async def exists(self, path: str | bytes) -> bool:
        """Whether something is there; ``False`` for a link that leads nowhere."""
        await self._load()
        try:
            self._resolve(path, follow=True)
        except OSError:
            return False
        return True

    async def readlink(self, path: str | bytes) -> bytes:
        """Where a symbolic link leads, byte for byte.

        Raises:
            OSError: as for `stat`, and ``EINVAL`` if it is no link.
        """
        await self._load()
        entry = self._resolve(path, follow=False)
        if entry.linkname is None:
            raise _error(errno.EINVAL, _encoded(path))
        return entry.linkname

    async def read_bytes(self, path: str | bytes) -> bytes:
        """A file's content.

        Raises:
            OSError: as for `stat`, ``EISDIR`` for a directory, ``EINVAL`` for what is no file.
        """
        return await trio.to_thread.run_sync(self._read, path)

    async def walk(self) -> list[Entry]:
        """All there is, sorted by path (bytes), links not followed; the root is first.

        A list, since all of it is in memory anyway.
        """
        return await trio.to_thread.run_sync(lambda: list(self._tree.walk()))

    async def _load(self) -> None:
        if self._tree.loaded:
            await trio.lowlevel.checkpoint()
        else:
            await trio.to_thread.run_sync(self._tree.load)

    def _read(self, path: str | bytes) -> bytes:
        entry = self._resolve(path, follow=True)
        descriptor = self._tree.open(entry.path)
        chunks: list[bytes] = []
        try:
            while chunk := os.read(descriptor, _CHUNK):
                chunks.append(chunk)
                trio.from_thread.check_cancelled()
        finally:
            os.close(descriptor)
        return b"".join(chunks)

    def _resolve(self, path: str | bytes, *, follow: bool) -> Entry:
        return self._tree.resolve(_encoded(path), follow=follow)


def _encoded(path: str | bytes) -> bytes:
    return path if isinstance(path, bytes) else path.encode("utf-8", "surrogateescape")
