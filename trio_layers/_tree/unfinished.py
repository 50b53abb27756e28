"""The tree that is being unpacked, and the entries of lower layers that show through it.

The result must be the same as if all layers were unpacked in order. So each decision that depends
on the lower layers is either looked up there (`LowerTree`) or noted as an assumption.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence, Set as AbstractSet
from typing import TYPE_CHECKING, Final, final

from .._entries import Entry, removal_line
from .._errors import LimitExceeded, UnpackError
from .._printable import printable_path
from .._tar.limits import Limits
from .directories import Directories, join, split

if TYPE_CHECKING:
    from ..abc import LowerTree

__all__ = ["DependsOnParent", "UnfinishedTree", "implied_directory"]

# Linux follows this many links in one path (path_resolution(7)).
_MAX_LINKS: Final = 40


def implied_directory(path: bytes) -> Entry:
    """Return the metadata for a directory without an entry."""
    return Entry(path=path, type="dir", mode=0o755)


class DependsOnParent(Exception):
    """The layer cannot be unpacked without its parent, which is not known.

    On its parent the layer may be valid, because its paths may lead elsewhere there.
    """


@final
class UnfinishedTree:
    """A tree on the disk that is being unpacked: finds and removes the things in it.

    Paths are real paths (see `Directories`), unless a docstring says otherwise.

    Attributes:
        directories: The tree's directories, opened when needed.
        lower: The merged trees of the lower layers; ``None`` if they are not known.
        times: All directories of the tree, with the time to set on each at the end.
        default_acls: Default ACLs of directories. They are set at the end, since new files
            inherit their directory's default ACL.
        implied: Directories without an entry.
        opaque: Directories that hide lower trees' entries.
        whiteouts: Paths with a whiteout, which hides the lower trees' entry.
        copied_up: Files copied from the lower trees for a hard link.
        assumed: Assumptions about the lower trees if ``lower`` is ``None``; see `Summary`.
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

    # Lookups.

    def stat(self, path: bytes) -> os.stat_result | None:
        """Return the status of a path in this tree, or ``None`` if the tree lacks the path."""
        parent, name = split(path)
        if parent not in self.times:
            return None
        try:
            return os.stat(name, dir_fd=self.directories.open(parent), follow_symlinks=False)
        except FileNotFoundError:
            return None

    def lookup_below(self, path: bytes) -> Entry | None:
        """Return the lower entry at ``path`` unless a whiteout or an opaque directory hides it.

        An entry of this tree at ``path`` itself does not matter.
        """
        if self.lower is None or path in self.whiteouts or self.is_hidden(path):
            return None
        return self.lower.lookup(path)

    def is_hidden(self, path: bytes) -> bool:
        """Return whether an ancestor of ``path`` is opaque or has a whiteout."""
        if not (self.opaque or self.whiteouts):
            return False
        while path:
            path = split(path)[0]
            if path in self.opaque or path in self.whiteouts:
                return True
        return False

    def shows_through(self, path: bytes) -> bool:
        """Return whether the lower entry at ``path`` is visible through this tree."""
        if self.is_hidden(path) or self.stat(path) is not None:
            return False
        while path := split(path)[0]:
            if self.stat(path) is not None:
                return path in self.times
        return True

    def assume_directory(self, path: bytes) -> bool:
        """Note the assumption behind a directory that is made without an entry.

        Without ``lower``, the assumption is that the lower trees have the same directory or nothing
        at ``path``. Returns whether this assumption was necessary.
        """
        if self.lower is not None:
            return False
        self.assumed[path] = None
        # The root is a directory on any parent.
        self.guessed |= path != b""
        return True

    def path_error(self, text: str) -> UnpackError | DependsOnParent:
        """Return the error for an impossible path.

        If the path was guessed without the parent, the error is `DependsOnParent`.
        """
        return DependsOnParent() if self.guessed else UnpackError(text)

    # Resolution of paths.

    def resolve(self, parts: Sequence[bytes]) -> bytes:
        """Return the real path for the components of a path, none of which is a dot.

        Links are resolved as for a process in the container: inside the root, where ``..`` of the
        root is the root itself. A component that does not exist counts as a directory, because
        it will be made as one.

        Raises:
            UnpackError: If a component is not a directory, or there are too many links.
            DependsOnParent: If this error, or the path, depends on the lower trees.
        """
        # The longest ancestor that is a directory of this tree contains no links.
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
                raise self.path_error(
                    f"{printable_path(path)}: more than {_MAX_LINKS} symbolic links in one path"
                )
            if target.startswith(b"/"):
                here = b""
            todo.extend(reversed(target.split(b"/")))
        return here

    def check_resolved_path(self, path: bytes) -> None:
        """Check that a path after its links were resolved is within the limits.

        Raises:
            LimitExceeded: If the path is too long or too deep.
            DependsOnParent: If it is so only by a guess about the lower trees.
        """
        try:
            self.check_path(path)
        except LimitExceeded:
            if self.guessed:
                raise DependsOnParent from None
            raise

    def _require_known_directory(self, path: bytes) -> None:
        """Check that the ``..`` of ``path`` in a link's target does not depend on lower trees.

        Raises:
            DependsOnParent: If ``path`` may be a link in a lower tree, which is not known.
        """
        if (
            self.lower is None
            and path
            and path not in self.times
            and path not in self.whiteouts
            and not self.is_hidden(path)
        ):
            raise DependsOnParent

    def _read_link(self, path: bytes) -> bytes | None:
        """Return a link's target, or ``None`` if a directory or nothing is at ``path``."""
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
            f"{printable_path(path)}: not a directory, but the layer has an entry below it"
        )

    # Removal.

    def remove(self, path: bytes) -> None:
        """Remove ``path`` and everything below it from the tree, if it exists."""
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
        """Remove entries below ``path`` that exist only because of the lower trees.

        These are whiteouts, copied-up files and empty implied directories.
        """
        if self.is_hidden(path) or not (self.whiteouts or self.copied_up or len(self.implied) > 1):
            return
        # An opaque directory was pruned when it became opaque, so it is not walked again.
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
        """Remove a directory if it has no entry and is empty; return whether it was removed."""
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
        """Iterate over ``path`` and the directories below it, deepest first.

        Each directory comes with the names of its other children. A directory in ``avoid`` counts
        as empty.
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
