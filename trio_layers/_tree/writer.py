"""Writes a layer's entries as a tree that overlayfs can use directly.

The tree contains only the layer's changes. OCI whiteouts (image specification, ``layer.md``)
become overlayfs' whiteouts. Missing parent directories are made.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar, final

import attrs

from .._acl import DEFAULT_ACL
from .._entries import Entry, Metadata, entry_line, file_line, link_line, opaque_line
from .._errors import LimitExceeded, StoreError, UnpackError
from .._printable import printable_path
from .._tar.limits import Limits
from .._tar.reader import ContentPiece, Member
from .capabilities import Capabilities
from .directories import join, split
from .inodes import InodeWriter, translate_os_errors, unpack_error
from .member_entries import entry_from_member, path_components, xattrs_from_member
from .unfinished import DependsOnParent, UnfinishedTree, implied_directory

if TYPE_CHECKING:
    from ..abc import LowerTree

__all__ = ["TreeWriter"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_WHITEOUT: Final = b".wh."
_AUFS_PREFIX: Final = b".wh..wh."
_OPAQUE: Final = b".wh..wh..opq"

_COPY_CHUNK: Final = 1 << 18


def _on_lower_file(path: bytes, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call a function that opens or reads a file of a lower tree.

    Raises:
        StoreError: If the call fails, which is not the fault of this layer.
    """
    try:
        return call(*args, **kwargs)
    except OSError as error:
        raise StoreError(
            f"{printable_path(path)} cannot be read from the layers below ({error.strerror}). "
            "Check the store with repair and pull again"
        ) from error


@final
class TreeWriter:
    """Writes one layer's members below a directory, and lists them at the same time.

    Attributes:
        needs_lower: The tree is not complete, because its content depends on lower trees, which
            are not known.
    """

    def __init__(
        self,
        root: int,
        *,
        capabilities: Capabilities,
        lower: LowerTree | None,
        limits: Limits,
        log: Callable[[bytes], object],
        check_cancelled: Callable[[], None],
    ) -> None:
        self.needs_lower = False
        self._tree = UnfinishedTree(
            root, lower=lower, limits=limits, log=log, check_cancelled=check_cancelled
        )
        self._directories = self._tree.directories
        self._inodes = InodeWriter(capabilities)
        self._check_path = limits.check_path
        self._copy_up_budget = limits.max_unpacked_bytes
        self._max_entries = limits.max_entries
        self._counted = 0
        self._log = log
        self._check_cancelled = check_cancelled
        below = None if lower is None else lower.lookup(b"")
        with translate_os_errors(b"."):
            self._set_directory_metadata(below or self._assumed_directory(b""), is_new=False)

    @property
    def assumed(self) -> tuple[bytes, ...]:
        """Assumptions about an unknown parent, see `assumptions_hold`."""
        return tuple(self._tree.assumed)

    @property
    def foreign_only(self) -> bool:
        """Whether unsupported attributes of other systems are the only missing metadata."""
        return self._inodes.foreign_only

    @property
    def incomplete(self) -> bool:
        """Whether the tree lacks an inode or metadata from the list."""
        return self._inodes.incomplete

    def count(self, path: bytes) -> None:
        """Count an entry, or a directory or name that an entry implies.

        Raises:
            LimitExceeded: If the count exceeds the limit.
        """
        self._counted += 1
        if self._counted > self._max_entries:
            raise LimitExceeded(
                f"{printable_path(path)}: more entries and implied directories than the limit "
                f"max_entries, {self._max_entries}, allows"
            )

    def add(self, member: Member, data: Iterator[ContentPiece]) -> None:
        """Write one member; ``data`` is its content, used for files only.

        Raises:
            UnpackError: If the member cannot be unpacked.
            StoreError: If the file system cannot store it.
        """
        if self.needs_lower:
            # The tree is not used, and in it a valid entry may look invalid.
            return
        try:
            file = self._write_member(member)
        except OSError as error:
            raise unpack_error(error, member.name) from error
        except UnpackError as error:
            # If links are involved, the error may name only another path.
            name = printable_path(member.name.removeprefix(b"./").rstrip(b"/"))
            if name in str(error) or printable_path(member.name) in str(error):
                raise
            raise type(error)(f"{name}: {error}") from error
        except DependsOnParent:
            self.needs_lower = True
            return
        if file is not None:
            self._fill_file(
                *file, member, xattrs_from_member(member) if member.xattrs else member.xattrs, data
            )

    def finish(self) -> None:
        """Set the default ACLs and the times of all directories.

        The times are set last, because each change in a directory changes the directory's time.
        """
        with translate_os_errors(b"."):
            for path, acl in self._tree.default_acls.items():
                self._check_cancelled()
                self._inodes.set_xattr(self._directories.open(path), DEFAULT_ACL, acl, path)
            times = self._tree.times
            for path in sorted(times):
                self._check_cancelled()
                if path:
                    parent, name = split(path)
                    descriptor = self._directories.open(parent)
                    both = (times[path], times[path])
                    os.utime(name, ns=both, dir_fd=descriptor, follow_symlinks=False)
            os.utime(self._directories.open(b""), ns=(times[b""], times[b""]))

    def close(self) -> None:
        self._directories.close()

    def _write_member(self, member: Member) -> tuple[int, bytes] | None:
        """Write a member, except a file's content.

        Returns the descriptor and path of a new, empty file; ``None`` for other members.
        """
        name = member.name
        if name.startswith(b"./"):
            name = name[2:]
        parent, _, last = name.rpartition(b"/")
        if parent not in self._tree.times or last in (b"", b".", b"..") or _WHITEOUT in name:
            # The parent is not a directory of this tree yet, or the name needs normalising.
            parts = path_components(name)
            self._check_path(b"/".join(parts))
            if _WHITEOUT in name and self._is_aufs_metadata(parts):
                return None
            if not parts:
                self._set_root(member)
                return None
            parent, last = self._ensure_parent(parts[:-1]), parts[-1]
            path = join(parent, last)
            self._tree.check_resolved_path(path)
        else:
            self._check_path(name)
            path = name if parent else last
        if last.startswith(_WHITEOUT):
            self._apply_whiteout(parent, last[len(_WHITEOUT) :])
        elif member.type == "file":
            return self._create_file(parent, last, path, member.mode), path
        elif member.type == "hardlink":
            self._make_hard_link(member, path)
        elif member.type == "dir":
            self._make_directory(entry_from_member(member, path, "dir"))
            self._tree.implied.discard(path)
        else:
            self._make_special(entry_from_member(member, path, member.type))
        return None

    def _is_aufs_metadata(self, parts: list[bytes]) -> bool:
        """Return whether a name is one of aufs' own names for its bookkeeping.

        Such entries are ignored, as in moby, except the mark of an opaque directory, which makes
        its directory opaque.

        Raises:
            UnpackError: If a whiteout is the parent of another entry.
        """
        above, last = parts[:-1], b"".join(parts[-1:])
        if any(part.startswith(_AUFS_PREFIX) for part in above):
            return True
        if any(part.startswith(_WHITEOUT) for part in above):
            raise UnpackError(
                f"{printable_path(b'/'.join(parts))}: a whiteout cannot contain other entries"
            )
        if last == _OPAQUE:
            self._make_opaque(self._ensure_parent(above))
        return last.startswith(_AUFS_PREFIX)

    def _set_root(self, member: Member) -> None:
        if member.type != "dir":
            raise UnpackError(f"{printable_path(member.name)}: the root must be a directory")
        self._set_directory_metadata(entry_from_member(member, b"", "dir"), is_new=False)
        # Unlike other directories, the root is a directory on any parent, so nothing is assumed.
        self._tree.implied.discard(b"")
        self._tree.assumed.pop(b"", None)

    # Directories.

    def _ensure_parent(self, parts: list[bytes]) -> bytes:
        """Return the real path of an entry's parent, after making missing directories."""
        path = self._tree.resolve(parts)
        self._ensure_directory(path)
        return path

    def _ensure_directory(self, path: bytes) -> None:
        """Make the directory ``path`` and its ancestors, unless they exist."""
        missing: list[bytes] = []
        while path not in self._tree.times:
            missing.append(path)
            path = split(path)[0]
        for path in reversed(missing):
            self.count(path)
            below = self._tree.lookup_below(path)
            if below is not None and below.type == "dir":
                self._make_directory(below)
            elif path in self._tree.whiteouts or self._tree.is_hidden(path):
                self._make_directory(implied_directory(path))
            else:
                self._make_directory(self._assumed_directory(path))
            self._tree.implied.add(path)

    def _assumed_directory(self, path: bytes) -> Entry:
        """Return the entry for a directory without one, and note the assumption if necessary."""
        entry = implied_directory(path)
        return attrs.evolve(entry, implied=True) if self._tree.assume_directory(path) else entry

    def _make_directory(self, entry: Entry) -> None:
        path = entry.path
        if path in self._tree.times:
            self._set_directory_metadata(entry, is_new=False)
            return
        parent, name = split(path)
        replaces = False
        try:
            os.mkdir(name, 0o700, dir_fd=self._directories.open(parent))
        except FileExistsError:
            self._tree.remove(path)
            os.mkdir(name, 0o700, dir_fd=self._directories.open(parent))
            replaces = True
        self._set_directory_metadata(entry, is_new=True)
        if replaces:
            # This layer had another entry here, which hides the lower directory for good.
            self._make_opaque(path)

    def _set_directory_metadata(self, entry: Entry, *, is_new: bool) -> None:
        """Set an existing directory's metadata and list it."""
        path, xattrs = entry.path, entry.xattrs
        self._tree.default_acls.pop(path, None)
        if DEFAULT_ACL in xattrs:
            self._tree.default_acls[path] = xattrs[DEFAULT_ACL]
            xattrs = {k: v for k, v in xattrs.items() if k != DEFAULT_ACL}
        self._inodes.set_directory_metadata(
            self._directories.open(path), entry, xattrs, is_new=is_new
        )
        self._tree.times[path] = entry.mtime_ns
        self._log(entry_line(entry))

    # Other types.

    def _create_file(self, parent: bytes, name: bytes, path: bytes, mode: int) -> int:
        try:
            return self._inodes.create(self._directories.open(parent), name, mode)
        except FileExistsError:
            self._tree.remove(path)
            return self._inodes.create(self._directories.open(parent), name, mode)

    def _fill_file(
        self,
        descriptor: int,
        path: bytes,
        metadata: Metadata,
        xattrs: Mapping[str, bytes],
        data: Iterator[ContentPiece],
    ) -> None:
        size, crc = self._inodes.write_file(
            descriptor, path, metadata, xattrs, data, self._check_cancelled
        )
        self._log(file_line(path, metadata, size, crc, xattrs))

    def _make_special(self, entry: Entry) -> None:
        if entry.type == "char" and entry.dev == (0, 0):
            # overlayfs takes every such device for a whiteout.
            self._tree.remove(entry.path)
            self._write_whiteout(entry.path)
            return
        parent, name = split(entry.path)
        try:
            self._inodes.make_special(self._directories.open(parent), name, entry)
        except FileExistsError:
            self._tree.remove(entry.path)
            self._inodes.make_special(self._directories.open(parent), name, entry)
        self._log(entry_line(entry))

    def _make_hard_link(self, member: Member, path: bytes) -> None:
        tree = self._tree
        parts = path_components(member.linkname)
        link = f"{printable_path(path)}: cannot link to {printable_path(member.linkname)}"
        if not parts or any(part.startswith(_WHITEOUT) for part in parts):
            raise UnpackError(f"{link}: the target is not a file")
        try:
            self._check_path(b"/".join(parts))
        except LimitExceeded as error:
            raise LimitExceeded(f"{link}: {error}") from None
        target = join(tree.resolve(parts[:-1]), parts[-1])
        tree.check_resolved_path(target)
        found = tree.stat(target)
        # Without lower trees, a path that is missing here may be a link there that leads elsewhere.
        known = found is not None or tree.lower is not None or tree.is_hidden(target)
        if target == path or (known and target.startswith(path + b"/")):
            raise tree.path_error(f"{link}: the link replaces the target")
        if target in tree.whiteouts or (found is None and tree.is_hidden(target)):
            raise tree.path_error(f"{link}: this layer removes the target")
        if found is None:
            if tree.lower is None:
                raise DependsOnParent
            self._copy_up(target, tree.lower, link)
        elif stat.S_ISDIR(found.st_mode):
            raise tree.path_error(f"{link}: the target is a directory")
        entry = entry_from_member(member, path, "file")
        tree.remove(path)
        self._link_file(target, path)
        parent, name = split(path)
        self._inodes.set_link_metadata(self._directories.open(parent), name, entry)
        self._log(link_line(entry, target))

    def _link_file(self, target: bytes, path: bytes) -> None:
        """Make ``path`` another name of the inode at ``target``."""
        (source, old), (parent, new) = split(target), split(path)
        directory, into = self._directories.open(source), self._directories.open(parent)
        os.link(old, new, src_dir_fd=directory, dst_dir_fd=into, follow_symlinks=False)

    def _copy_up(self, target: bytes, lower: LowerTree, link: str) -> None:
        """Copy a file from the lower trees, with all its names, so that they stay one file.

        Args:
            target: The file's path.
            lower: The lower trees.
            link: The beginning of an error message about the hard link that needs the file.

        Raises:
            UnpackError: If there is no such file.
            LimitExceeded: If the layer needs more bytes from lower trees than a limit allows.
        """
        entry = lower.lookup(target)
        if entry is None or entry.type == "dir":
            fault = "does not exist" if entry is None else "is a directory"
            raise UnpackError(f"{link}: the target {fault}")
        self._copy_up_budget -= entry.size
        if self._copy_up_budget < 0:
            raise LimitExceeded(
                f"{link}: the layer's hard links need more bytes from the layers below than the "
                "limit max_unpacked_bytes allows"
            )
        parent, name = split(target)
        self._ensure_directory(parent)
        if entry.type == "file":
            source = _on_lower_file(target, lower.open, target)
            try:
                descriptor = self._create_file(parent, name, target, entry.mode)
                data = self._read_lower_content(target, source)
                self._fill_file(descriptor, target, entry, entry.xattrs, data)
            finally:
                os.close(source)
        else:
            self._make_special(attrs.evolve(entry, links=None))
        self._tree.copied_up.add(target)
        for other in lower.links(target):
            self._check_cancelled()
            if other == target or not self._tree.shows_through(other):
                continue
            self.count(other)
            self._ensure_directory(split(other)[0])
            self._link_file(target, other)
            self._log(link_line(attrs.evolve(entry, path=other), target))
            self._tree.copied_up.add(other)

    def _read_lower_content(self, path: bytes, source: int) -> Iterator[bytes | int]:
        """Iterate over a lower file's content; a piece of zeros becomes a hole again."""
        while piece := _on_lower_file(path, os.read, source, _COPY_CHUNK):
            self._check_cancelled()
            yield len(piece) if piece == bytes(len(piece)) else piece

    # Removal.

    def _apply_whiteout(self, parent: bytes, name: bytes) -> None:
        """Apply a whiteout: remove ``name`` of the lower trees, but not of this layer.

        Raises:
            UnpackError: If the whiteout names a dot or nothing.
        """
        tree = self._tree
        path = join(parent, name)
        if name in (b"", b".", b".."):
            raise UnpackError(
                f"{printable_path(join(parent, _WHITEOUT + name))}: the whiteout names nothing "
                "that can be removed"
            )
        if path in tree.whiteouts or path in tree.opaque:
            return
        if path in tree.times:
            tree.prune(path)
            if not tree.remove_if_implied(path):
                self._make_opaque(path)
                return
        elif path in tree.copied_up:
            tree.remove(path)
        if tree.stat(path) is None:
            self._write_whiteout(path)

    def _write_whiteout(self, path: bytes) -> None:
        """Write a whiteout at ``path`` if the lower trees may have an entry there.

        A needless whiteout could become visible: overlayfs shows the names of whiteouts in a
        directory that it does not merge with another.
        """
        tree = self._tree
        if tree.is_hidden(path) or (tree.lower is not None and tree.lookup_below(path) is None):
            return
        parent, name = split(path)
        if tree.lower is None:
            tree.assumed[parent + b"/"] = None
        entry = Entry(path=path, type="whiteout", mode=0)
        self._inodes.make_special(self._directories.open(parent), name, entry)
        tree.whiteouts.add(path)
        self._log(entry_line(entry))

    def _make_opaque(self, path: bytes) -> None:
        """Make a directory opaque, so that it shows only this layer's own entries."""
        if path in self._tree.opaque:
            return
        self._tree.prune(path)
        self._tree.opaque.add(path)
        self._inodes.mark_opaque(self._directories.open(path))
        self._log(opaque_line(path))
