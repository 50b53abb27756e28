"""A layer's entries become a tree that overlayfs can take as it is.

The tree holds what the layer changes: OCI whiteouts (image specification, ``layer.md``) become
overlayfs' own, a directory that the layer does not list is made where one is needed. So that the
result is what unpacking the layers in order gives, all that depends on what is below is either
looked up there (`LowerTree`) or noted as assumed.

Links on an entry's way are followed as a process in the container would: inside the root, where
``..`` above it is the root itself.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Final, ParamSpec, TypeVar, final

import attrs

from .._entries import Entry, EntryType, link_line, opaque_line, put_line, removal_line
from .._errors import LimitExceeded, StoreError, UnpackError
from ..abc import LowerTree
from .directories import Directories, join, split
from .nodes import Nodes, Powers, naming
from .tar import Limits, Member

__all__ = ["TreeWriter", "implied_directory"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_WHITEOUT: Final = b".wh."
_META: Final = b".wh..wh."
_OPAQUE: Final = b".wh..wh..opq"

# As many links as Linux follows for one path (path_resolution(7)).
_MAX_LINKS: Final = 40

_CHUNK: Final = 1 << 18

# What is made in a directory inherits this one, so a directory gets it last.
_DEFAULT_ACL: Final = "system.posix_acl_default"


def implied_directory(path: bytes) -> Entry:
    """What a directory is made as that no entry describes."""
    return Entry(path=path, type="dir", mode=0o755)


def _shown(path: bytes) -> str:
    text = path.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= 256 else f"{text[:120]}…{text[-120:]}")


def _readable(path: bytes, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call what opens or reads a file from below: it is no fault of the layer if it fails."""
    try:
        return call(*args, **kwargs)
    except OSError as error:
        raise StoreError(
            f"{_shown(path)}: cannot be read from the layers below ({error.strerror}); "
            "remove them and pull again"
        ) from error


def _parts(name: bytes) -> list[bytes]:
    """The components of an entry's name, taken as relative to the root."""
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                raise UnpackError(f"the path {_shown(name)} leads out of the root")
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    if b"\0" in name:
        raise UnpackError(f"the path {_shown(name)} holds a NUL")
    return parts


@final
class TreeWriter:
    """Writes one layer's members below a directory, and lists them as it goes.

    Attributes:
        assumed: What was taken for granted while nothing was known of what is below: see `holds`.
        needs_lower: The layer has a hard link to a file that is not its own, and was not given
            what is below: the tree is not whole.
    """

    def __init__(
        self,
        root: int,
        *,
        powers: Powers,
        lower: LowerTree | None,
        limits: Limits,
        log: Callable[[bytes], object],
        check: Callable[[], None],
    ) -> None:
        self.needs_lower = False
        self._directories = Directories(root)
        self._nodes = Nodes(powers)
        self._lower = lower
        self._limits = limits
        self._log = log
        self._check = check
        self._assumed: dict[bytes, None] = {}
        # Of what is in the tree. All directories, with the time each is given in the end:
        self._times: dict[bytes, int] = {}
        self._default_acls: dict[bytes, bytes] = {}
        # … those that no entry describes, …
        self._implied: set[bytes] = {b""}
        # … those that hide what is below, …
        self._opaque: set[bytes] = set()
        self._whiteouts: set[bytes] = set()
        # … and files brought from below for a hard link.
        self._borrowed: set[bytes] = set()
        below = None if lower is None else lower.lookup(b"")
        with naming(b"."):
            self._describe(below or self._assumption(b""), fresh=False)

    @property
    def assumed(self) -> tuple[bytes, ...]:
        return tuple(self._assumed)

    @property
    def incomplete(self) -> bool:
        """Whether the list has something that the tree does not."""
        return self._nodes.incomplete

    def add(self, member: Member, data: Iterator[bytes | int]) -> None:
        """Take one member; ``data`` is its content, taken for files only.

        Raises:
            UnpackError: if it cannot be unpacked.
            StoreError: if the file system cannot take it.
        """
        if self.needs_lower:
            # The tree is worth nothing, and what follows may look wrong in it that is not.
            return
        parts = _parts(member.name)
        if _WHITEOUT in member.name:
            if any(part.startswith(_META) for part in parts):
                # aufs keeps its books under such names; moby passes over them, too.
                if parts[-1] == _OPAQUE and not any(part.startswith(_META) for part in parts[:-1]):
                    with naming(member.name):
                        self._hide(self._parent(parts[:-1]))
                return
            if any(part.startswith(_WHITEOUT) for part in parts[:-1]):
                raise UnpackError(f"{_shown(member.name)}: a whiteout is no directory")
        if not parts:
            if member.type != "dir":
                raise UnpackError(f"{_shown(member.name)}: the root can only be a directory")
            with naming(member.name):
                self._describe(self._entry(member, b"", "dir"), fresh=False)
            # The root is a directory whatever is below, unlike others listed late.
            self._implied.discard(b"")
            self._assumed.pop(b"", None)
            return
        with naming(member.name):
            parent, name = self._parent(parts[:-1]), parts[-1]
        path = join(parent, name)
        self._fits(path)
        if name.startswith(_WHITEOUT):
            with naming(path):
                self._remove_below(parent, name[len(_WHITEOUT) :])
        elif member.type == "file":
            entry = self._entry(member, path, "file")
            self._file(entry, parent, name, data)
        elif member.type == "hardlink":
            self._hardlink(member, path)
        elif member.type == "dir":
            with naming(path):
                self._directory(self._entry(member, path, "dir"))
            self._implied.discard(path)
        else:
            with naming(path):
                self._special(self._entry(member, path, member.type))

    def finish(self) -> None:
        """Set the directories' times, which every change in them has moved, and default ACLs."""
        with naming(b"."):
            for path, acl in self._default_acls.items():
                self._nodes.attribute(self._directories.open(path), _DEFAULT_ACL, acl, path)
            for path in sorted(self._times):
                self._check()
                if path:
                    parent, name = split(path)
                    times = (self._times[path], self._times[path])
                    descriptor = self._directories.open(parent)
                    os.utime(name, ns=times, dir_fd=descriptor, follow_symlinks=False)
            os.utime(self._directories.open(b""), ns=(self._times[b""], self._times[b""]))

    def close(self) -> None:
        self._directories.close()

    # Where an entry goes.

    def _parent(self, parts: list[bytes]) -> bytes:
        """The real path of an entry's parent, which is made if it is not there."""
        plain = b"/".join(parts)
        if plain in self._directories:
            return plain
        path = self._follow(parts)
        self._ensure(path)
        return path

    def _follow(self, parts: Iterable[bytes]) -> bytes:
        """Where ``parts`` lead, links resolved inside the root; what is not there is taken as
        the directory it will be."""
        todo = list(parts)[::-1]
        here = b""
        links = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                here = split(here)[0]
                continue
            path = join(here, part)
            self._fits(path)
            target = self._link(path)
            if target is None:
                here = path
                continue
            links += 1
            if links > _MAX_LINKS:
                raise UnpackError(f"{_shown(path)}: too many symbolic links on the way")
            if target.startswith(b"/"):
                here = b""
            todo.extend(reversed(target.split(b"/")))
        return here

    def _link(self, path: bytes) -> bytes | None:
        """The target of a link; ``None`` where there is a directory or nothing."""
        if path in self._directories or path in self._whiteouts:
            return None
        found = self._stat(path)
        if found is not None:
            if stat.S_ISDIR(found.st_mode):
                return None
            if stat.S_ISLNK(found.st_mode):
                parent, name = split(path)
                return os.readlink(name, dir_fd=self._directories.open(parent))
            raise UnpackError(f"{_shown(path)}: not a directory, but entries below it follow")
        entry = self._below(path)
        if entry is None or entry.type == "dir":
            return None
        if entry.type == "symlink":
            return entry.linkname
        raise UnpackError(f"{_shown(path)}: not a directory, but entries below it follow")

    def _stat(self, path: bytes) -> os.stat_result | None:
        """What the tree has there; ``None`` for nothing."""
        parent, name = split(path)
        descriptor = self._directories.find(parent)
        if descriptor is None:
            return None
        try:
            return os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _below(self, path: bytes) -> Entry | None:
        """What shows through from below, were it not for ``path`` itself being in the tree."""
        if self._lower is None or path in self._whiteouts or self._hidden(path):
            return None
        return self._lower.lookup(path)

    def _hidden(self, path: bytes) -> bool:
        """Whether something on the way to ``path`` hides what is below."""
        if not (self._opaque or self._whiteouts):
            return False
        while path:
            path = split(path)[0]
            if path in self._opaque or path in self._whiteouts:
                return True
        return False

    def _fits(self, path: bytes) -> None:
        if len(path) > self._limits.max_path:
            raise LimitExceeded(
                f"a path of {len(path)} bytes, {_shown(path)}; the limit max_path is "
                f"{self._limits.max_path}"
            )

    # What is put there.

    def _entry(self, member: Member, path: bytes, kind: EntryType) -> Entry:
        # overlayfs reads these from its layers; a layer must not speak to it.
        private = ("trusted.overlay.", "user.overlay.")
        return Entry(
            path=path,
            type=kind,
            mode=0o777 if kind == "symlink" else member.mode,
            uid=member.uid,
            gid=member.gid,
            mtime_ns=member.mtime_ns,
            linkname=member.linkname if kind == "symlink" else None,
            dev=member.dev if kind in ("char", "block") else None,
            xattrs={k: v for k, v in member.xattrs.items() if not k.startswith(private)},
        )

    def _ensure(self, path: bytes) -> None:
        """Make ``path`` a directory, and those on the way to it."""
        missing: list[bytes] = []
        while self._directories.find(path) is None:
            missing.append(path)
            path = split(path)[0]
        for path in reversed(missing):
            below = self._below(path)
            if below is not None and below.type == "dir":
                self._directory(below)
            elif path in self._whiteouts or self._hidden(path):
                self._directory(implied_directory(path))
            else:
                self._directory(self._assumption(path))
            self._implied.add(path)

    def _assumption(self, path: bytes) -> Entry:
        """A directory that no entry describes, where something may or may not be below."""
        entry = implied_directory(path)
        if self._lower is not None:
            return entry
        self._assumed[path] = None
        return attrs.evolve(entry, implied=True)

    def _directory(self, entry: Entry) -> None:
        parent, name = split(entry.path)
        known = entry.path in self._times
        replaces = not known and self._stat(entry.path) is not None
        if replaces:
            self._clear(entry.path)
        if not known:
            os.mkdir(name, 0o700, dir_fd=self._directories.open(parent))
        self._describe(entry, fresh=not known)
        if replaces:
            # Something else stood here, in this layer: nothing shows through any more.
            self._hide(entry.path)

    def _describe(self, entry: Entry, *, fresh: bool) -> None:
        """Give a directory that is there its metadata."""
        now = entry
        self._default_acls.pop(entry.path, None)
        if _DEFAULT_ACL in entry.xattrs:
            self._default_acls[entry.path] = entry.xattrs[_DEFAULT_ACL]
            now = attrs.evolve(
                entry, xattrs={k: v for k, v in entry.xattrs.items() if k != _DEFAULT_ACL}
            )
        self._nodes.directory(self._directories.open(entry.path), now, fresh=fresh)
        self._times[entry.path] = entry.mtime_ns
        self._log(put_line(entry))

    def _file(self, entry: Entry, parent: bytes, name: bytes, data: Iterable[bytes | int]) -> None:
        with naming(entry.path):
            try:
                descriptor = self._nodes.create(self._directories.open(parent), name)
            except FileExistsError:
                self._clear(entry.path)
                descriptor = self._nodes.create(self._directories.open(parent), name)
        self._log(put_line(self._nodes.file(descriptor, entry, data, self._check)))

    def _special(self, entry: Entry) -> None:
        self._clear(entry.path)
        if entry.type == "char" and entry.dev == (0, 0):
            # On an overlay, this device is a whiteout, wherever it comes from.
            self._whiteout(entry.path)
            return
        parent, name = split(entry.path)
        self._nodes.special(self._directories.open(parent), name, entry)
        self._log(put_line(entry))

    def _hardlink(self, member: Member, path: bytes) -> None:
        parts = _parts(member.linkname)
        wanted = f"{_shown(path)}: a hard link to {_shown(member.linkname)}, "
        if not parts or any(part.startswith(_WHITEOUT) for part in parts):
            raise UnpackError(wanted + "which is no file")
        with naming(member.linkname):
            target = join(self._follow(parts[:-1]), parts[-1])
            self._fits(target)
            found = self._stat(target)
        if target == path or target.startswith(path + b"/"):
            raise UnpackError(wanted + "which it replaces")
        if target in self._whiteouts or (found is None and self._hidden(target)):
            raise UnpackError(wanted + "which this layer removes")
        if found is None:
            if self._lower is None:
                self.needs_lower = True
                return
            self._borrow(target, self._lower, wanted)
        elif stat.S_ISDIR(found.st_mode):
            if target in self._assumed and target in self._implied:
                # Below, it may be a link.
                self.needs_lower = True
                return
            raise UnpackError(wanted + "which is a directory")
        entry = self._entry(member, path, "file")
        with naming(path):
            self._clear(path)
            self._join(target, path)
            parent, name = split(path)
            self._nodes.metadata(self._directories.open(parent), name, entry, entry.xattrs)
        self._log(link_line(entry, target))

    def _join(self, target: bytes, path: bytes) -> None:
        """Make ``path`` one more name of what is at ``target``."""
        (source, old), (parent, new) = split(target), split(path)
        # Opening the second may close the first.
        directory = os.dup(self._directories.open(source))
        try:
            into = self._directories.open(parent)
            os.link(old, new, src_dir_fd=directory, dst_dir_fd=into, follow_symlinks=False)
        finally:
            os.close(directory)

    def _borrow(self, target: bytes, lower: LowerTree, wanted: str) -> None:
        """Bring a file from below, with all the names it has there, so that they stay one."""
        entry = lower.lookup(target)
        if entry is None or entry.type == "dir":
            raise UnpackError(wanted + ("which is not there" if entry is None else "a directory"))
        entry = attrs.evolve(entry, links=None)
        parent, name = split(target)
        with naming(target):
            self._ensure(parent)
        if entry.type == "file":
            source = _readable(target, lower.open, target)
            try:
                self._file(entry, parent, name, self._content(target, source))
            finally:
                os.close(source)
        else:
            with naming(target):
                self._nodes.special(self._directories.open(parent), name, entry)
            self._log(put_line(entry))
        self._borrowed.add(target)
        for other in lower.links(target):
            if other == target or not self._shows(other):
                continue
            with naming(other):
                self._ensure(split(other)[0])
                self._join(target, other)
            self._log(link_line(attrs.evolve(entry, path=other), target))
            self._borrowed.add(other)

    def _content(self, path: bytes, source: int) -> Iterator[bytes | int]:
        """What an open file from below holds; what is all zeros is made a hole again."""
        while piece := _readable(path, os.read, source, _CHUNK):
            self._check()
            yield len(piece) if piece == bytes(len(piece)) else piece

    def _shows(self, path: bytes) -> bool:
        """Whether what is below at ``path`` is not covered by this layer."""
        if self._hidden(path):
            return False
        while path:
            found = self._stat(path)
            if found is not None:
                return stat.S_ISDIR(found.st_mode) and path in self._times
            path = split(path)[0]
        return True

    # What is taken away.

    def _clear(self, path: bytes) -> None:
        """Remove what this layer has at ``path``, if anything."""
        parent, name = split(path)
        directory = self._directories.open(parent)
        if path in self._times:
            self._remove_tree(path)
            return
        try:
            os.unlink(name, dir_fd=directory)
        except FileNotFoundError:
            return
        self._gone(path)

    def _remove_tree(self, path: bytes) -> None:
        for directory, others in self._walk(path):
            descriptor = self._directories.open(directory)
            for name in others:
                os.unlink(name, dir_fd=descriptor)
                self._gone(join(directory, name))
            self._remove_directory(directory)

    def _remove_directory(self, path: bytes) -> None:
        self._directories.forget(path)
        parent, name = split(path)
        os.rmdir(name, dir_fd=self._directories.open(parent))
        self._gone(path)

    def _gone(self, path: bytes) -> None:
        self._times.pop(path, None)
        self._default_acls.pop(path, None)
        for paths in (self._implied, self._opaque, self._whiteouts, self._borrowed):
            paths.discard(path)
        self._log(removal_line(path))

    def _walk(
        self, path: bytes, avoid: AbstractSet[bytes] = frozenset()
    ) -> Iterator[tuple[bytes, list[bytes]]]:
        """The directories from ``path`` down, deepest first, each with what else is in it."""
        found: list[tuple[bytes, list[bytes]]] = []
        todo = [path]
        while todo:
            self._check()
            directory = todo.pop()
            others: list[bytes] = []
            with os.scandir(self._directories.open(directory)) as children:
                for child in children:
                    name = os.fsencode(child.name)
                    if child.is_dir(follow_symlinks=False):
                        if join(directory, name) not in avoid:
                            todo.append(join(directory, name))
                    else:
                        others.append(name)
            found.append((directory, others))
        return reversed(found)

    def _remove_below(self, parent: bytes, name: bytes) -> None:
        """A whiteout: ``name`` is not there any more, unless this layer has it itself."""
        path = join(parent, name)
        if name in (b"", b".", b".."):
            raise UnpackError(f"a whiteout in {_shown(parent)} names nothing that can be removed")
        if path in self._whiteouts or path in self._opaque:
            return
        if path in self._times:
            self._prune(path)
            if not self._remove_if_implied(path):
                self._hide(path)
                return
        elif path in self._borrowed:
            self._clear(path)
        if self._stat(path) is None:
            self._whiteout(path)

    def _whiteout(self, path: bytes) -> None:
        """Cover what is at ``path`` below, if there may be something: overlayfs shows the name
        of a whiteout in a directory that it does not merge with another."""
        if self._hidden(path) or (self._lower is not None and self._below(path) is None):
            return
        parent, name = split(path)
        if self._lower is None:
            self._assumed[parent + b"/"] = None
        entry = Entry(path=path, type="whiteout", mode=0)
        self._nodes.special(self._directories.open(parent), name, entry)
        self._whiteouts.add(path)
        self._log(put_line(entry))

    def _hide(self, path: bytes) -> None:
        """Make a directory opaque: of what is in it, only what is this layer's own stays."""
        if path in self._opaque:
            return
        self._prune(path)
        self._opaque.add(path)
        self._nodes.opaque(self._directories.open(path))
        self._log(opaque_line(path))

    def _prune(self, path: bytes) -> None:
        """Remove what is in the tree below ``path`` only because of what was below the tree."""
        if self._hidden(path) or not (self._whiteouts or self._borrowed or len(self._implied) > 1):
            return
        # Those that are opaque already have been through this.
        for directory, others in self._walk(path, self._opaque):
            descriptor = self._directories.open(directory)
            for name in others:
                child = join(directory, name)
                if child in self._whiteouts or child in self._borrowed:
                    os.unlink(name, dir_fd=descriptor)
                    self._gone(child)
            if directory != path:
                self._remove_if_implied(directory)

    def _remove_if_implied(self, path: bytes) -> bool:
        """Remove a directory that no entry describes and that has nothing in it."""
        if path not in self._implied or os.listdir(self._directories.open(path)):
            return False
        self._remove_directory(path)
        return True
