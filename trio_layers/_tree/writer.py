"""A layer's entries become a tree that overlayfs can take as it is.

The tree holds what the layer changes: OCI whiteouts (image specification, ``layer.md``) become
overlayfs' own, a directory that the layer does not list is made where one is needed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar, final

import attrs

from .._acl import DEFAULT_ACL
from .._entries import Entry, Metadata, file_line, link_line, opaque_line, put_line
from .._errors import LimitExceeded, StoreError, UnpackError
from .._printable import printable_path
from .._tar.limits import Limits
from .._tar.reader import Content, Member
from .capabilities import Capabilities
from .directories import join, split
from .inodes import Nodes, named, naming
from .member_entries import entry_of, parts_of, xattrs_of
from .unfinished import DependsOnParent, TreeState, implied_directory

if TYPE_CHECKING:
    from ..abc import LowerTree

__all__ = ["TreeWriter"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_WHITEOUT: Final = b".wh."
_META: Final = b".wh..wh."
_OPAQUE: Final = b".wh..wh..opq"

_CHUNK: Final = 1 << 18


def _readable(path: bytes, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call what opens or reads a file from below: it is no fault of the layer if it fails."""
    try:
        return call(*args, **kwargs)
    except OSError as error:
        raise StoreError(
            f"{printable_path(path)}: cannot be read from the layers below ({error.strerror}): check the "
            "store, with repair, and pull again"
        ) from error


@final
class TreeWriter:
    """Writes one layer's members below a directory, and lists them as it goes.

    Attributes:
        needs_lower: What the layer becomes depends on what is below, which was not given: the
            tree is not whole.
    """

    def __init__(
        self,
        root: int,
        *,
        capabilities: Capabilities,
        lower: LowerTree | None,
        limits: Limits,
        log: Callable[[bytes], object],
        check: Callable[[], None],
    ) -> None:
        self.needs_lower = False
        self._state = TreeState(root, lower=lower, limits=limits, log=log, check=check)
        self._directories = self._state.directories
        self._nodes = Nodes(capabilities)
        self._check_path = limits.check_path
        self._may_borrow = limits.max_unpacked_bytes
        self._max_entries = limits.max_entries
        self._counted = 0
        self._log = log
        self._check = check
        below = None if lower is None else lower.lookup(b"")
        with naming(b"."):
            self._describe(below or self._assumption(b""), fresh=False)

    @property
    def assumed(self) -> tuple[bytes, ...]:
        """What was taken for granted while nothing was known of what is below: see ``holds``."""
        return tuple(self._state.assumed)

    @property
    def foreign_only(self) -> bool:
        """Whether unsupported attributes of other systems are the only missing metadata."""
        return self._nodes.foreign_only

    @property
    def incomplete(self) -> bool:
        """Whether the list has something that the tree does not."""
        return self._nodes.incomplete

    def count(self, path: bytes) -> None:
        """Count an entry, or a directory or name that an entry implies.

        Raises:
            LimitExceeded: if the count exceeds the limit.
        """
        self._counted += 1
        if self._counted > self._max_entries:
            raise LimitExceeded(
                f"{printable_path(path)}: more entries, with the directories that they imply, than the "
                f"limit max_entries, {self._max_entries}, allows"
            )

    def add(self, member: Member, data: Iterator[Content]) -> None:
        """Take one member; ``data`` is its content, taken for files only.

        Raises:
            UnpackError: if it cannot be unpacked.
            StoreError: if the file system cannot take it.
        """
        if self.needs_lower:
            # The tree is worth nothing, and what follows may look wrong in it that is not.
            return
        try:
            file = self._place(member)
        except OSError as error:
            raise named(error, member.name) from error
        except UnpackError as error:
            # Of an entry below a link, or of a link, the error may name another path only.
            name = printable_path(member.name.removeprefix(b"./").rstrip(b"/"))
            if name in str(error) or printable_path(member.name) in str(error):
                raise
            raise type(error)(f"{name}: {error}") from error
        except DependsOnParent:
            self.needs_lower = True
            return
        if file is not None:
            self._fill(*file, member, xattrs_of(member) if member.xattrs else member.xattrs, data)

    def finish(self) -> None:
        """Set the directories' times, which every change in them has moved, and default ACLs."""
        with naming(b"."):
            for path, acl in self._state.default_acls.items():
                self._check()
                self._nodes.attribute(self._directories.open(path), DEFAULT_ACL, acl, path)
            times = self._state.times
            for path in sorted(times):
                self._check()
                if path:
                    parent, name = split(path)
                    descriptor = self._directories.open(parent)
                    both = (times[path], times[path])
                    os.utime(name, ns=both, dir_fd=descriptor, follow_symlinks=False)
            os.utime(self._directories.open(b""), ns=(times[b""], times[b""]))

    def close(self) -> None:
        self._directories.close()

    def _place(self, member: Member) -> tuple[int, bytes] | None:
        """Put a member where it belongs; of a file, which is new and empty then, returns a
        descriptor and the path.
        """
        name = member.name
        if name.startswith(b"./"):
            name = name[2:]
        parent, _, last = name.rpartition(b"/")
        if parent not in self._state.times or last in (b"", b".", b"..") or _WHITEOUT in name:
            # Not simply a name in a directory that is known.
            parts = parts_of(name)
            self._check_path(b"/".join(parts))
            if _WHITEOUT in name and self._is_meta(parts):
                return None
            if not parts:
                self._root(member)
                return None
            parent, last = self._parent(parts[:-1]), parts[-1]
            path = join(parent, last)
            self._state.fits(path)
        else:
            self._check_path(name)
            path = name if parent else last
        if last.startswith(_WHITEOUT):
            self._remove_below(parent, last[len(_WHITEOUT) :])
        elif member.type == "file":
            return self._create(parent, last, path, member.mode), path
        elif member.type == "hardlink":
            self._hardlink(member, path)
        elif member.type == "dir":
            self._directory(entry_of(member, path, "dir"))
            self._state.implied.discard(path)
        else:
            self._special(entry_of(member, path, member.type))
        return None

    def _is_meta(self, parts: list[bytes]) -> bool:
        """Whether it is one of the names under which aufs keeps its books; moby passes over
        them, too, but for the mark of an opaque directory, which is obeyed.
        """
        above, last = parts[:-1], b"".join(parts[-1:])
        if any(part.startswith(_META) for part in above):
            return True
        if any(part.startswith(_WHITEOUT) for part in above):
            raise UnpackError(f"{printable_path(b'/'.join(parts))}: a whiteout is no directory")
        if last == _OPAQUE:
            self._hide(self._parent(above))
        return last.startswith(_META)

    def _root(self, member: Member) -> None:
        if member.type != "dir":
            raise UnpackError(f"{printable_path(member.name)}: the root can only be a directory")
        self._describe(entry_of(member, b"", "dir"), fresh=False)
        # The root is a directory whatever is below, unlike others listed late.
        self._state.implied.discard(b"")
        self._state.assumed.pop(b"", None)

    # Directories.

    def _parent(self, parts: list[bytes]) -> bytes:
        """The real path of an entry's parent, which is made if it is not there."""
        path = self._state.follow(parts)
        self._ensure(path)
        return path

    def _ensure(self, path: bytes) -> None:
        """Make ``path`` a directory, and those on the way to it."""
        missing: list[bytes] = []
        while path not in self._state.times:
            missing.append(path)
            path = split(path)[0]
        for path in reversed(missing):
            self.count(path)
            below = self._state.below(path)
            if below is not None and below.type == "dir":
                self._directory(below)
            elif path in self._state.whiteouts or self._state.hidden(path):
                self._directory(implied_directory(path))
            else:
                self._directory(self._assumption(path))
            self._state.implied.add(path)

    def _assumption(self, path: bytes) -> Entry:
        """A directory that no entry describes, where something may or may not be below."""
        entry = implied_directory(path)
        return attrs.evolve(entry, implied=True) if self._state.assume(path) else entry

    def _directory(self, entry: Entry) -> None:
        path = entry.path
        if path in self._state.times:
            self._describe(entry, fresh=False)
            return
        parent, name = split(path)
        replaces = False
        try:
            os.mkdir(name, 0o700, dir_fd=self._directories.open(parent))
        except FileExistsError:
            self._state.clear(path)
            os.mkdir(name, 0o700, dir_fd=self._directories.open(parent))
            replaces = True
        self._describe(entry, fresh=True)
        if replaces:
            # Something else stood here, in this layer: nothing shows through any more.
            self._hide(path)

    def _describe(self, entry: Entry, *, fresh: bool) -> None:
        """Give a directory that is there its metadata."""
        path, xattrs = entry.path, entry.xattrs
        self._state.default_acls.pop(path, None)
        if DEFAULT_ACL in xattrs:
            self._state.default_acls[path] = xattrs[DEFAULT_ACL]
            xattrs = {k: v for k, v in xattrs.items() if k != DEFAULT_ACL}
        self._nodes.directory(self._directories.open(path), entry, xattrs, fresh=fresh)
        self._state.times[path] = entry.mtime_ns
        self._log(put_line(entry))

    # All else.

    def _create(self, parent: bytes, name: bytes, path: bytes, mode: int) -> int:
        try:
            return self._nodes.create(self._directories.open(parent), name, mode)
        except FileExistsError:
            self._state.clear(path)
            return self._nodes.create(self._directories.open(parent), name, mode)

    def _fill(
        self,
        descriptor: int,
        path: bytes,
        about: Metadata,
        xattrs: Mapping[str, bytes],
        data: Iterator[Content],
    ) -> None:
        size, crc = self._nodes.file(descriptor, path, about, xattrs, data, self._check)
        self._log(file_line(path, about, size, crc, xattrs))

    def _special(self, entry: Entry) -> None:
        if entry.type == "char" and entry.dev == (0, 0):
            # On an overlay, this device is a whiteout, wherever it comes from.
            self._state.clear(entry.path)
            self._whiteout(entry.path)
            return
        parent, name = split(entry.path)
        try:
            self._nodes.special(self._directories.open(parent), name, entry)
        except FileExistsError:
            self._state.clear(entry.path)
            self._nodes.special(self._directories.open(parent), name, entry)
        self._log(put_line(entry))

    def _hardlink(self, member: Member, path: bytes) -> None:
        state = self._state
        parts = parts_of(member.linkname)
        wanted = f"{printable_path(path)}: a hard link to {printable_path(member.linkname)}, "
        if not parts or any(part.startswith(_WHITEOUT) for part in parts):
            raise UnpackError(wanted + "which is no file")
        try:
            self._check_path(b"/".join(parts))
        except LimitExceeded as error:
            raise LimitExceeded(f"{wanted}{error}") from None
        target = join(state.follow(parts[:-1]), parts[-1])
        state.fits(target)
        found = state.stat(target)
        # What is not here may be a link below, and the way lead elsewhere.
        known = found is not None or state.lower is not None or state.hidden(target)
        if target == path or (known and target.startswith(path + b"/")):
            raise state.refusal(wanted + "which it replaces")
        if target in state.whiteouts or (found is None and state.hidden(target)):
            raise state.refusal(wanted + "which this layer removes")
        if found is None:
            if state.lower is None:
                raise DependsOnParent
            self._borrow(target, state.lower, wanted)
        elif stat.S_ISDIR(found.st_mode):
            raise state.refusal(wanted + "which is a directory")
        entry = entry_of(member, path, "file")
        state.clear(path)
        self._join(target, path)
        parent, name = split(path)
        self._nodes.link(self._directories.open(parent), name, entry)
        self._log(link_line(entry, target))

    def _join(self, target: bytes, path: bytes) -> None:
        """Make ``path`` one more name of what is at ``target``."""
        (source, old), (parent, new) = split(target), split(path)
        directory, into = self._directories.open(source), self._directories.open(parent)
        os.link(old, new, src_dir_fd=directory, dst_dir_fd=into, follow_symlinks=False)

    def _borrow(self, target: bytes, lower: LowerTree, wanted: str) -> None:
        """Bring a file from below, with all the names it has there, so that they stay one."""
        entry = lower.lookup(target)
        if entry is None or entry.type == "dir":
            raise UnpackError(wanted + ("which is not there" if entry is None else "a directory"))
        self._may_borrow -= entry.size
        if self._may_borrow < 0:
            raise LimitExceeded(
                wanted + "which is one of more bytes from the layers below than the limit "
                "max_unpacked_bytes allows"
            )
        parent, name = split(target)
        self._ensure(parent)
        if entry.type == "file":
            source = _readable(target, lower.open, target)
            try:
                descriptor = self._create(parent, name, target, entry.mode)
                data = self._content(target, source)
                self._fill(descriptor, target, entry, entry.xattrs, data)
            finally:
                os.close(source)
        else:
            self._special(attrs.evolve(entry, links=None))
        self._state.borrowed.add(target)
        for other in lower.links(target):
            self._check()
            if other == target or not self._state.shows(other):
                continue
            self.count(other)
            self._ensure(split(other)[0])
            self._join(target, other)
            self._log(link_line(attrs.evolve(entry, path=other), target))
            self._state.borrowed.add(other)

    def _content(self, path: bytes, source: int) -> Iterator[bytes | int]:
        """What an open file from below holds; what is all zeros is made a hole again."""
        while piece := _readable(path, os.read, source, _CHUNK):
            self._check()
            yield len(piece) if piece == bytes(len(piece)) else piece

    # What is taken away.

    def _remove_below(self, parent: bytes, name: bytes) -> None:
        """A whiteout: ``name`` is not there any more, unless this layer has it itself."""
        state = self._state
        path = join(parent, name)
        if name in (b"", b".", b".."):
            raise UnpackError(
                f"a whiteout in {printable_path(parent)} names nothing that can be removed"
            )
        if path in state.whiteouts or path in state.opaque:
            return
        if path in state.times:
            state.prune(path)
            if not state.remove_if_implied(path):
                self._hide(path)
                return
        elif path in state.borrowed:
            state.clear(path)
        if state.stat(path) is None:
            self._whiteout(path)

    def _whiteout(self, path: bytes) -> None:
        """Cover what is at ``path`` below, if there may be something: overlayfs shows the name
        of a whiteout in a directory that it does not merge with another.
        """
        state = self._state
        if state.hidden(path) or (state.lower is not None and state.below(path) is None):
            return
        parent, name = split(path)
        if state.lower is None:
            state.assumed[parent + b"/"] = None
        entry = Entry(path=path, type="whiteout", mode=0)
        self._nodes.special(self._directories.open(parent), name, entry)
        state.whiteouts.add(path)
        self._log(put_line(entry))

    def _hide(self, path: bytes) -> None:
        """Make a directory opaque: of what is in it, only what is this layer's own stays."""
        if path in self._state.opaque:
            return
        self._state.prune(path)
        self._state.opaque.add(path)
        self._nodes.opaque(self._directories.open(path))
        self._log(opaque_line(path))
