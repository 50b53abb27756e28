"""What a tree in the making holds, and what of the layers below shows through it.

So that the result is what unpacking the layers in order gives, all that depends on what is below
is either looked up there (`LowerTree`) or noted as assumed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Final, final

from .._entries import Entry, removal_line
from .._errors import LimitExceeded, UnpackError
from .._printable import printable_path
from .._tar.limits import Limits
from .directories import Directories, join, split

if TYPE_CHECKING:
    from ..abc import LowerTree

__all__ = ["DependsOnParent", "UnfinishedTree", "implied_directory"]

# As many links as Linux follows for one path (path_resolution(7)).
_MAX_LINKS: Final = 40


def implied_directory(path: bytes) -> Entry:
    """What a directory is made as that no entry describes."""
    return Entry(path=path, type="dir", mode=0o755)


class DependsOnParent(Exception):
    """What would be an error of the layer may be none on its parent, where its paths may lead
    elsewhere. The parent is not known.
    """


@final
class UnfinishedTree:
    """A tree on the disk, with what is known of it, and how things in it are found and removed.

    Paths are real ones (see `Directories`), unless it says otherwise.

    Attributes:
        directories: All that are in the tree, opened when needed.
        lower: What is below; ``None`` if that is not known.
        times: All directories, with the time each is given in the end.
        default_acls: Of those that have one; it is set in the end, since what is made in a
            directory inherits it.
        implied: Directories that no entry describes.
        opaque: Directories that hide what is below.
        whiteouts: Paths that are not there, whatever is below.
        borrowed: Files brought from below for a hard link.
        assumed: What was taken for granted where ``lower`` is not known: see ``holds``.
        guessed: Whether a path may lead elsewhere, or nowhere, with another ``lower``.
    """

    def __init__(
        self,
        root: int,
        *,
        lower: LowerTree | None,
        limits: Limits,
        log: Callable[[bytes], object],
        check_cancelled: Callable[[], None],
    ) -> None:
        self.directories = Directories(root)
        self.lower = lower
        self.times: dict[bytes, int] = {}
        self.default_acls: dict[bytes, bytes] = {}
        self.implied: set[bytes] = {b""}
        self.opaque: set[bytes] = set()
        self.whiteouts: set[bytes] = set()
        self.copied_up: set[bytes] = set()
        self.assumed: dict[bytes, None] = {}
        self.guessed = False
        self.check_path = limits.check_path
        self._log = log
        self._check_cancelled = check_cancelled

    # What is there.

    def stat(self, path: bytes) -> os.stat_result | None:
        """What the tree has there; ``None`` for nothing."""
        parent, name = split(path)
        if parent not in self.times:
            return None
        try:
            return os.stat(name, dir_fd=self.directories.open(parent), follow_symlinks=False)
        except FileNotFoundError:
            return None

    def lookup_below(self, path: bytes) -> Entry | None:
        """What shows through from below, were it not for ``path`` itself being in the tree."""
        if self.lower is None or path in self.whiteouts or self.is_hidden(path):
            return None
        return self.lower.lookup(path)

    def is_hidden(self, path: bytes) -> bool:
        """Whether something on the way to ``path`` hides what is below."""
        if not (self.opaque or self.whiteouts):
            return False
        while path:
            path = split(path)[0]
            if path in self.opaque or path in self.whiteouts:
                return True
        return False

    def shows_through(self, path: bytes) -> bool:
        """Whether what is below at ``path`` is not covered by this layer."""
        if self.is_hidden(path) or self.stat(path) is not None:
            return False
        while path := split(path)[0]:
            if self.stat(path) is not None:
                return path in self.times
        return True

    def assume_directory(self, path: bytes) -> bool:
        """A directory is made that no entry describes, where something may or may not be below:
        whether that had to be assumed.
        """
        if self.lower is not None:
            return False
        self.assumed[path] = None
        # The root is a directory on any parent.
        self.guessed |= path != b""
        return True

    def path_error(self, text: str) -> UnpackError | DependsOnParent:
        """The error for what cannot be, paths being as they are."""
        return DependsOnParent() if self.guessed else UnpackError(text)

    # Where an entry goes.

    def resolve(self, parts: Sequence[bytes]) -> bytes:
        """Where the parts of a path, none of them a dot, lead.

        Links are resolved as a process in the container has it: inside the root, where ``..``
        above it is the root itself. What is not there is taken as the directory it will be.

        Raises:
            UnpackError: if something on the way is no directory, or there are too many links.
            DependsOnParent: the same, or if that depends on what is below.
        """
        # What is a directory already, no link leads away from.
        here, known = b"/".join(parts), len(parts)
        while here not in self.times:
            here, known = split(here)[0], known - 1
        todo = list(parts[known:])[::-1]
        links = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                self._require_known_directory(here)
                here = split(here)[0]
                continue
            path = join(here, part)
            self.check_resolved_path(path)
            target = self._read_link(path)
            if target is None:
                here = path
                continue
            links += 1
            if links > _MAX_LINKS:
                raise self.path_error(f"{printable_path(path)}: too many symbolic links on the way")
            if target.startswith(b"/"):
                here = b""
            todo.extend(reversed(target.split(b"/")))
        return here

    def check_resolved_path(self, path: bytes) -> None:
        """Raise unless a path that links led to is within the limits."""
        try:
            self.check_path(path)
        except LimitExceeded:
            if self.guessed:
                raise DependsOnParent from None
            raise

    def _require_known_directory(self, path: bytes) -> None:
        """A link leads through ``path`` and out of it again: where to, depends on what it is."""
        if (
            self.lower is None
            and path
            and path not in self.times
            and path not in self.whiteouts
            and not self.is_hidden(path)
        ):
            raise DependsOnParent

    def _read_link(self, path: bytes) -> bytes | None:
        """The target of a link; ``None`` where there is a directory or nothing."""
        if path in self.times or path in self.whiteouts:
            return None
        found = self.stat(path)
        if found is not None:
            if stat.S_ISLNK(found.st_mode):
                parent, name = split(path)
                return os.readlink(name, dir_fd=self.directories.open(parent))
        else:
            entry = self.lookup_below(path)
            if entry is None or entry.type == "dir":
                return None
            if entry.type == "symlink":
                return entry.linkname
        raise self.path_error(
            f"{printable_path(path)}: not a directory, but entries below it follow"
        )

    # What is taken away.

    def remove(self, path: bytes) -> None:
        """Remove what the tree has at ``path``, if anything."""
        if path in self.times:
            self._remove_tree(path)
            return
        parent, name = split(path)
        try:
            os.unlink(name, dir_fd=self.directories.open(parent))
        except FileNotFoundError:
            return
        self._forget(path)

    def prune(self, path: bytes) -> None:
        """Remove what is in the tree below ``path`` only because of what was below the tree."""
        if self.is_hidden(path) or not (self.whiteouts or self.copied_up or len(self.implied) > 1):
            return
        # Those that are opaque already have been through this: each is walked but once.
        for directory, others in self._walk(path, self.opaque):
            descriptor = self.directories.open(directory)
            for name in others:
                child = join(directory, name)
                if child in self.whiteouts or child in self.copied_up:
                    os.unlink(name, dir_fd=descriptor)
                    self._forget(child)
            if directory != path:
                self.remove_if_implied(directory)

    def remove_if_implied(self, path: bytes) -> bool:
        """Remove a directory that no entry describes and that has nothing in it."""
        if path not in self.implied or os.listdir(self.directories.open(path)):
            return False
        self._remove_directory(path)
        return True

    def _remove_tree(self, path: bytes) -> None:
        for directory, others in self._walk(path):
            descriptor = self.directories.open(directory)
            for name in others:
                os.unlink(name, dir_fd=descriptor)
                self._forget(join(directory, name))
            self._remove_directory(directory)

    def _remove_directory(self, path: bytes) -> None:
        self.directories.forget(path)
        parent, name = split(path)
        os.rmdir(name, dir_fd=self.directories.open(parent))
        self._forget(path)

    def _forget(self, path: bytes) -> None:
        self._check_cancelled()
        self.times.pop(path, None)
        self.default_acls.pop(path, None)
        for paths in (self.implied, self.opaque, self.whiteouts, self.copied_up):
            paths.discard(path)
        self._log(removal_line(path))

    def _walk(
        self, path: bytes, avoid: AbstractSet[bytes] = frozenset()
    ) -> Iterator[tuple[bytes, list[bytes]]]:
        """The directories from ``path`` down, deepest first, each with what else is in it;
        those of ``avoid`` as if they were empty.
        """
        found: list[tuple[bytes, list[bytes]]] = []
        todo = [path]
        while todo:
            self._check_cancelled()
            directory = todo.pop()
            others: list[bytes] = []
            if directory in avoid:
                found.append((directory, others))
                continue
            with os.scandir(self.directories.open(directory)) as children:
                for child in children:
                    name = os.fsencode(child.name)
                    if child.is_dir(follow_symlinks=False):
                        todo.append(join(directory, name))
                    else:
                        others.append(name)
            found.append((directory, others))
        return reversed(found)
