"""Merges a stack of trees by overlayfs' rules.

Entries come from the trees' lists, only file contents are read from the trees' ``fs``.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, final

import attrs

from .._damage import damaged, note_damage
from .._entries import Entry, lines_about, lines_of_directories, parse_entries, path_in_list
from .._errors import StoreError

__all__ = ["MergedTree", "SurveyCache", "TreeStack", "path_error"]

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

# The number of links that Linux follows for one path (path_resolution(7)).
_MAX_LINKS: Final = 40

# Errors for a process or system at its limits. They do not mean that the store is damaged.
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})

# Errors on opening a listed file after the removal of its tree or a change in it.
_GONE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})

# Number of entries between two checks for cancellation: a few milliseconds.
_CHECK_INTERVAL: Final = 1024

# Seconds between two checks for cancellation while another thread reads the lists.
_POLL: Final = 0.05

# Largest number of cached stacks, and of directories in each: some megabytes.
_CACHED_STACKS: Final = 4
_CACHED_DIRECTORIES: Final = 16 * 1024

# Slots for hashes of the paths of entries that are not directories.
_HASH_SLOTS: Final = 1 << 22


class _Node:
    """A path of the merged tree: its entry, the number of its tree, its children."""

    __slots__ = ("children", "entry", "tree")

    def __init__(self, entry: Entry, tree: int) -> None:
        self.entry = entry
        self.tree = tree
        self.children: dict[bytes, _Node] = {} if entry.type == "dir" else _NO_CHILDREN


# Shared by all entries that are not directories. It stays empty.
_NO_CHILDREN: Final[dict[bytes, _Node]] = {}


def _never_cancelled() -> None:
    pass


@final
@attrs.frozen(eq=False)
class TreeStack:
    """A tree on top of another stack, made in constant time.

    Attributes:
        tree: The directory of the top tree.
        below: The rest of the stack.
        height: The number of trees.
        key: A hash of the directories' names. Equal stacks have equal keys.
    """

    tree: Path
    below: TreeStack | None = attrs.field(repr=False)
    height: int = attrs.field(init=False)
    key: bytes = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        height, key = (0, b"") if self.below is None else (self.below.height, self.below.key)
        object.__setattr__(self, "height", height + 1)
        key = hashlib.sha256(key + os.fsencode(self.tree)).digest()
        object.__setattr__(self, "key", key)

    def above(self, height: int) -> list[TreeStack]:
        """The stacks that are higher than this, the lowest first."""
        found: list[TreeStack] = []
        stack: TreeStack | None = self
        while stack is not None and stack.height > height:
            found.append(stack)
            stack = stack.below
        return found[::-1]


def _stack_of(trees: Iterable[Path]) -> TreeStack | None:
    stack: TreeStack | None = None
    for tree in trees:
        stack = TreeStack(tree, stack)
    return stack


@final
class MergedTree:
    """The merged tree of a stack of layers.

    Its methods block, so they are called in worker threads; several threads may use it at once.
    The first call reads the lists of entries. If that call is cancelled, the next one starts anew.

    Args:
        trees: The layers' tree directories (with ``fs`` and ``entries``), the top one last; or
            a stack of trees, which makes the object in constant time.
        check_cancelled: Called regularly while lists are read. Its errors are raised unchanged.
        surveys: A cache for `survey`, shared by merged trees.

    Raises:
        StoreError: (all methods) if a list of entries is damaged or cannot be read.
    """

    def __init__(
        self,
        trees: Sequence[Path] | TreeStack | None,
        *,
        check_cancelled: Callable[[], None] = _never_cancelled,
        surveys: SurveyCache | None = None,
    ) -> None:
        if isinstance(trees, Sequence):
            trees = _stack_of(trees)
        self._top = trees
        self._check = check_cancelled
        self._surveys = SurveyCache() if surveys is None else surveys
        self._lock = threading.Lock()
        self._entries: _MergedEntries | None = None

    @functools.cached_property
    def trees(self) -> tuple[Path, ...]:
        """The trees, the top one last."""
        return () if self._top is None else tuple(each.tree for each in self._top.above(0))

    @property
    def loaded(self) -> bool:
        """Whether the lists are in memory, so that `lookup` does not read the disk."""
        return self._entries is not None

    def load(self) -> None:
        """Read the lists of entries, unless they are in memory."""
        self._load_entries()

    def lookup(self, path: bytes) -> Entry | None:
        """Return the entry at a path without following links; ``None`` if there is none."""
        node = self._load_entries().find(path)
        return None if node is None else node.entry

    def resolve(self, path: bytes, *, follow: bool) -> Entry:
        """Return the entry at ``path`` as a process inside the root finds it.

        Args:
            path: The path.
            follow: Follow a link in the last part of the path, too.

        Raises:
            OSError: as for `RootfsView.stat`.
        """
        root = self._load_entries().root
        if root is None:
            raise path_error(errno.ENOENT, path)
        # The nodes from the root to here, so that each step takes constant time at any depth.
        trail = [root]
        todo = path.split(b"/")[::-1]
        links = 0
        while todo:
            part = todo.pop()
            if trail[-1].entry.type != "dir":
                raise path_error(errno.ENOTDIR, path)
            if part in (b"", b"."):
                continue
            if part == b"..":
                del trail[max(1, len(trail) - 1) :]
                continue
            node = trail[-1].children.get(part)
            if node is None:
                raise path_error(errno.ENOENT, path)
            target = node.entry.linkname
            if target is None or not (todo or follow):
                trail.append(node)
                continue
            links += 1
            if links > _MAX_LINKS:
                raise path_error(errno.ELOOP, path)
            todo.extend(reversed(target.split(b"/")))
            if target.startswith(b"/"):
                del trail[1:]
        return trail[-1].entry

    def survey(self, paths: Iterable[bytes]) -> dict[bytes, Entry | None]:
        """Return the entry at each path; only directories' entries are complete.

        For other entries, only the type is certain. If the lists are not in memory, only their
        lines about directories or about these paths are parsed, because unpacking a layer needs
        little else about the layers below.
        """
        paths = tuple(paths)
        entries = self._entries
        if entries is None:
            known = self._surveys.survey(self._top, paths, self._check)
            if known is not None:
                return known
            wanted = {b""}
            for path in paths:
                while path not in wanted:
                    wanted.add(path)
                    path = path.rpartition(b"/")[0]
            entries = _MergedEntries(self.trees, self._check, only=frozenset(wanted))
        found = {path: entries.find(path) for path in paths}
        return {path: None if node is None else node.entry for path, node in found.items()}

    def open_listed(self, path: bytes) -> int:
        """Open a file that is in the list; see `open`.

        Raises:
            StoreError: if the file cannot be opened.
            OSError: if too many files are open.
        """
        try:
            return self.open(path)
        except OSError as error:
            if error.errno in _EXHAUSTED:
                raise
            raise self.damaged_file(path, error.strerror) from error

    def damaged_file(self, path: bytes, reason: str | None) -> StoreError:
        """Note that a file in the list cannot be read, and return an error with its name."""
        node = self._load_entries().find(path)
        assert node is not None
        return _damaged_file(self.trees[node.tree], path, reason)

    def links(self, path: bytes) -> tuple[bytes, ...]:
        """Return all names of the file at a path, sorted."""
        entries = self._load_entries()
        node = entries.find(path)
        if node is None:
            raise path_error(errno.ENOENT, path)
        return entries.names.get((node.tree, node.entry.links or b""), (path,))

    def open(self, path: bytes) -> int:
        """Open the file at a path for reading; the caller closes the descriptor.

        Raises:
            OSError: if the image has no regular file at the path, or the file cannot be opened.
                The error contains the path.
            StoreError: if the file is missing, or its size differs from the list.
        """
        node = self._load_entries().find(path)
        if node is None:
            raise path_error(errno.ENOENT, path)
        if node.entry.type != "file":
            raise path_error(errno.EISDIR if node.entry.type == "dir" else errno.EINVAL, path)
        tree = self.trees[node.tree]
        try:
            descriptor = _open_in_tree(tree, path)
        except OSError as error:
            if error.errno in _GONE:
                raise _damaged_file(tree, path, error.strerror) from error
            if error.errno not in _EXHAUSTED:
                note_damage(tree)
            raise path_error(error.errno or errno.EIO, path) from error
        if os.fstat(descriptor).st_size != node.entry.size:
            os.close(descriptor)
            raise _damaged_file(tree, path, "its size is wrong")
        return descriptor

    def walk(self) -> list[Entry]:
        """Return all entries, sorted by path (bytes); the root is first."""
        found = [node.entry for node in self._load_entries().nodes()]
        found.sort(key=lambda entry: entry.path)
        return found

    def _load_entries(self) -> _MergedEntries:
        if self._entries is None:
            # A thread that waits for the lock can be cancelled, too.
            while not self._lock.acquire(timeout=_POLL):
                self._check()
            try:
                if self._entries is None:
                    self._entries = _MergedEntries(self.trees, self._check)
            finally:
                self._lock.release()
        return self._entries


@final
class _MergedEntries:
    """The merged entries of a stack of trees.

    Attributes:
        root: The root; ``None`` for a stack without trees.
        names: All names of each file with several names, by its tree and its first name.
    """

    def __init__(
        self,
        trees: Sequence[Path],
        check: Callable[[], None],
        *,
        only: frozenset[bytes] | None = None,
    ) -> None:
        self.root: _Node | None = None
        self.names: dict[tuple[int, bytes], tuple[bytes, ...]] = {}
        for number, tree in enumerate(trees):
            for count, entry in enumerate(_read_list(tree, only, check)):
                if not count % _CHECK_INTERVAL:
                    check()
                self.add(entry, number, tree)
        self._update_links(check)

    def find(self, path: bytes) -> _Node | None:
        node = self.root
        if path:
            for name in path.split(b"/"):
                if node is None:
                    return None
                node = node.children.get(name)
        return node

    def nodes(self) -> Iterator[_Node]:
        """Yield all nodes in arbitrary order."""
        todo = [] if self.root is None else [self.root]
        while todo:
            node = todo.pop()
            todo.extend(node.children.values())
            yield node

    def add(self, entry: Entry, number: int, tree: Path) -> None:
        """Add an entry on top of the entries below; its parent must be there already."""
        parent: _Node | None = None
        name = b""
        known = self.root
        if entry.path:
            above, _, name = entry.path.rpartition(b"/")
            parent = self.find(above)
            if parent is None or parent.entry.type != "dir":
                raise damaged(tree, "its list of entries lacks a parent directory")
            known = parent.children.get(name)
        children = None
        if entry.type == "dir" and known is not None and known.entry.type == "dir":
            if not entry.opaque:
                children = known.children
            if entry.implied:
                entry = attrs.evolve(entry, mtime_ns=known.entry.mtime_ns)
        if entry.opaque or entry.implied:
            entry = attrs.evolve(entry, opaque=False, implied=False)
        if entry.type == "whiteout":
            if parent is not None:
                parent.children.pop(name, None)
            return
        node = _Node(entry, number)
        if children is not None:
            node.children = children
        if parent is None:
            self.root = node
        else:
            parent.children[name] = node

    def _update_links(self, check: Callable[[], None]) -> None:
        """Correct the first names of hard links, because upper trees can hide some names."""
        groups: dict[tuple[int, bytes], list[_Node]] = {}
        for count, node in enumerate(self.nodes()):
            if not count % _CHECK_INTERVAL:
                check()
            if node.entry.links is not None:
                groups.setdefault((node.tree, node.entry.links), []).append(node)
        for (tree, _), nodes in groups.items():
            names = tuple(sorted(node.entry.path for node in nodes))
            first = names[0] if len(names) > 1 else None
            for node in nodes:
                if node.entry.links != first:
                    node.entry = attrs.evolve(node.entry, links=first)
            if first is not None:
                self.names[tree, first] = names


@final
class SurveyCache:
    """A cache of the directories of some stacks, safe for threads.

    With it, each list is read once while the layers of an image are unpacked one after another.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, _KnownDirectories] = {}

    def survey(
        self, stack: TreeStack | None, paths: Iterable[bytes], check: Callable[[], None]
    ) -> dict[bytes, Entry | None] | None:
        """Return `MergedTree.survey` for a stack; ``None`` if that needs the lists themselves."""
        directories = self._take_highest(stack)
        if not directories.extend(stack, check):
            return None
        found = directories.survey(paths)
        if stack is not None and directories.count <= _CACHED_DIRECTORIES:
            self._known[stack.key] = directories
            for oldest in tuple(self._known)[:-_CACHED_STACKS]:
                self._known.pop(oldest, None)
        return found

    def _take_highest(self, stack: TreeStack | None) -> _KnownDirectories:
        """Remove and return the cached directories of the highest known part of a stack."""
        while stack is not None and self._known:
            directories = self._known.pop(stack.key, None)
            if directories is not None:
                return directories
            stack = stack.below
        return _KnownDirectories()


@final
class _KnownDirectories:
    """The directories of a growing stack, and hashes of the paths of other entries."""

    def __init__(self) -> None:
        self._entries = _MergedEntries((), _never_cancelled)
        self._height = 0
        self._paths: set[bytes] = set()
        self._maybe_others = bytearray(_HASH_SLOTS)

    @property
    def count(self) -> int:
        """The number of paths at which the stack has or had a directory.

        Thousands of layers may list the same few directories.
        """
        return len(self._paths)

    def extend(self, stack: TreeStack | None, check: Callable[[], None]) -> bool:
        """Add the missing upper trees of ``stack``; return whether this was possible."""
        for higher in () if stack is None else stack.above(self._height):
            tree = higher.tree
            with _open_list(tree) as file:
                lines = lines_of_directories(
                    _check_between(file, check), self._paths, self._maybe_others
                )
                if lines is None:
                    return False
                entries = parse_entries(_check_between(lines, check))[0]
            for entry in entries:
                self._entries.add(entry, higher.height - 1, tree)
            self._height = higher.height
        return True

    def survey(self, paths: Iterable[bytes]) -> dict[bytes, Entry | None] | None:
        """Return the entries at paths; ``None`` if one may not be a directory."""
        found: dict[bytes, Entry | None] = {}
        for path in paths:
            if self._maybe_others[hash(path_in_list(path)) % _HASH_SLOTS]:
                return None
            node = self._entries.find(path)
            found[path] = None if node is None else node.entry
        return found


def _open_in_tree(tree: Path, path: bytes) -> int:
    """Open a file of a tree for reading, without following links."""
    *parents, name = path.split(b"/")
    here = os.open(tree, _DIRECTORY)
    for part in (b"fs", *parents):
        try:
            inner = os.open(part, _DIRECTORY, dir_fd=here)
        finally:
            os.close(here)
        here = inner
    try:
        return os.open(name, _FILE, dir_fd=here)
    finally:
        os.close(here)


def _damaged_file(tree: Path, path: bytes, reason: str | None) -> StoreError:
    """Note that a tree is damaged, and return an error with the file's name."""
    name = path.decode("utf-8", "backslashreplace")[:256]
    return damaged(tree, f"{name!r} cannot be read from the store: {reason}")


@contextmanager
def _open_list(tree: Path) -> Iterator[BinaryIO]:
    try:
        with open(tree / "entries", "rb") as file:
            yield file
    except OSError as error:
        reason = f"its list of entries cannot be read ({error.strerror})"
        if error.errno not in _EXHAUSTED:
            raise damaged(tree, reason) from error
        raise StoreError(f"{tree}: {reason}; try again") from error
    except StoreError as error:
        # The list's own error also gives advice after ": pull", which damaged() adds again.
        raise damaged(tree, str(error).partition(": pull")[0]) from error


def _read_list(tree: Path, only: frozenset[bytes] | None, check: Callable[[], None]) -> list[Entry]:
    """Return a tree's entries; with ``only``, at least the entries at these paths."""
    with _open_list(tree) as file:
        chosen = None if only is None else lines_about(only, _check_between(file, check))
        if chosen is None:
            file.seek(0)
            return parse_entries(_check_between(file, check))[0]
        return parse_entries(chosen)[0]


def _check_between(lines: Iterable[bytes], check: Callable[[], None]) -> Iterator[bytes]:
    for number, line in enumerate(lines):
        if not number % _CHECK_INTERVAL:
            check()
        yield line


def path_error(number: int, path: bytes) -> OSError:
    """Return the `OSError` for a path that the operating system raises with this number."""
    return OSError(number, os.strerror(number), path.decode("utf-8", "surrogateescape"))
