"""How one entry gets on the disk, with its metadata, as far as privilege goes.

Whatever cannot be set is left, and noted in `Nodes.incomplete`: the list of entries has it.
Every entry has something of its name on the disk, an empty file where nothing better can be made.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Final, final

import attrs

from .._entries import Entry
from .._errors import StoreError, StoreFull, StoreReadOnly, UnpackError

__all__ = ["Nodes", "Powers", "naming", "probe"]

_ZEROS: Final = bytes(1 << 18)
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DEVICES: Final = {"char": stat.S_IFCHR, "block": stat.S_IFBLK, "fifo": stat.S_IFIFO}
# What a layer can ask for and no file system has, as against what this disk lacks.
_ITS_FAULT: Final = frozenset(
    {
        errno.EFBIG,
        errno.EINVAL,
        errno.ELOOP,
        errno.EMLINK,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
    }
)
_NAMESPACES: Final = ("user.", "trusted.", "security.", "system.")


@final
class _Naming:
    # A class: of a million files each comes by here several times, and a generator costs more.
    __slots__ = ("_path",)

    def __init__(self, path: bytes) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, OSError):
            raise _named(error, self._path) from error


def naming(path: bytes) -> AbstractContextManager[None]:
    """Turn an `OSError` of the block into an error of ours that names ``path``."""
    return _Naming(path)


def _named(error: OSError, path: bytes) -> UnpackError | StoreError:
    name = path.decode("utf-8", "backslashreplace")
    text = f"{name[:256]!r}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(f"unpacking {text}. Free some space and pull again")
    if error.errno == errno.EROFS:
        return StoreReadOnly(f"unpacking {text}")
    if error.errno in _ITS_FAULT:
        return UnpackError(f"cannot unpack {text}")
    return StoreError(f"unpacking {text}")


@attrs.frozen(kw_only=True)
class Powers:
    """What this process can do in a directory.

    Attributes:
        owners: Give files to others, and set-id bits.
        devices: Make device nodes.
        whiteouts: Make the character device 0/0, overlayfs' whiteout.
        overlay: The prefix of overlayfs' own xattrs, ``trusted.overlay.`` or ``user.overlay.``;
            ``None`` if neither can be set.
    """

    owners: bool
    devices: bool
    whiteouts: bool
    overlay: str | None


def probe(directory: int) -> Powers:
    """Try what can be done in an open directory; what is made for it is removed again."""
    name = b".probe"

    def node(device: int) -> bool:
        try:
            os.mknod(name, stat.S_IFCHR | 0o600, device, dir_fd=directory)
        except OSError:
            return False
        os.unlink(name, dir_fd=directory)
        return True

    os.mkdir(name, 0o700, dir_fd=directory)
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
        try:
            overlay = None
            for prefix in ("trusted.overlay.", "user.overlay."):
                with contextlib.suppress(OSError):
                    os.setxattr(descriptor, prefix + "opaque", b"y")
                    overlay = prefix
                    break
            try:
                os.chown(descriptor, 1, 1)
                owners = True
            except OSError:
                owners = False
        finally:
            os.close(descriptor)
    finally:
        os.rmdir(name, dir_fd=directory)
    return Powers(
        owners=owners,
        devices=node(os.makedev(1, 3)),
        whiteouts=node(os.makedev(0, 0)),
        overlay=overlay,
    )


@final
class Nodes:
    """Makes files, directories, links and nodes, each by its name in an open directory.

    Attributes:
        incomplete: Whether something could not be made or set as it should be.
    """

    def __init__(self, powers: Powers) -> None:
        self._powers = powers
        self.incomplete = False

    def create(self, parent: int, name: bytes) -> int:
        """A descriptor of a new, empty file, for `file`.

        Raises:
            FileExistsError: if something of that name is there.
        """
        return os.open(name, _NEW_FILE, 0o600, dir_fd=parent)

    def file(
        self,
        descriptor: int,
        entry: Entry,
        data: Iterable[bytes | int],
        check: Callable[[], None],
    ) -> Entry:
        """Write a new file, and close it; ``entry`` comes back with the digest of its content."""
        try:
            digest = hashlib.sha256()
            size = 0
            for piece in data:
                if isinstance(piece, int):
                    # A hole: skipped on the disk, hashed as the zeros it stands for.
                    size += piece
                    for start in range(0, piece, len(_ZEROS)):
                        digest.update(_ZEROS[: piece - start])
                        check()
                    with naming(entry.path):
                        os.lseek(descriptor, size, os.SEEK_SET)
                        os.ftruncate(descriptor, size)
                    continue
                size += len(piece)
                digest.update(piece)
                with naming(entry.path):
                    _write(descriptor, piece)
            entry = attrs.evolve(entry, size=size, sha256=digest.hexdigest())
            with naming(entry.path):
                self._finish(descriptor, entry, entry.xattrs)
                os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(descriptor)
        return entry

    def directory(self, descriptor: int, entry: Entry, *, fresh: bool) -> None:
        """Give an open directory its metadata, its times apart. ``fresh``: it has none yet."""
        if not fresh:
            for attribute in os.listxattr(descriptor):
                ours = self._powers.overlay
                if attribute not in entry.xattrs and not (ours and attribute.startswith(ours)):
                    with contextlib.suppress(PermissionError):
                        os.removexattr(descriptor, attribute)
        self._finish(descriptor, entry, entry.xattrs)

    def special(self, parent: int, name: bytes, entry: Entry) -> None:
        """Make a symlink, fifo, device or whiteout."""
        if entry.type == "symlink":
            assert entry.linkname is not None
            os.symlink(entry.linkname, name, dir_fd=parent)
        elif entry.type == "whiteout":
            self._node(parent, name, stat.S_IFCHR, 0, able=self._powers.whiteouts)
            return
        else:
            able = entry.type == "fifo" or self._powers.devices
            device = os.makedev(*entry.dev) if entry.dev else 0
            self._node(parent, name, _DEVICES[entry.type], device, able=able)
        self.metadata(parent, name, entry, entry.xattrs)

    def metadata(self, parent: int, name: bytes, entry: Entry, xattrs: Mapping[str, bytes]) -> None:
        """Give what is there its metadata, without opening or following it."""
        descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            self._finish(descriptor, entry, xattrs, handle=f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
        times = (entry.mtime_ns, entry.mtime_ns)
        os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)

    def opaque(self, descriptor: int) -> None:
        """Mark an open directory as one that hides what is below it."""
        if self._powers.overlay is None:
            self.incomplete = True
        else:
            os.setxattr(descriptor, self._powers.overlay + "opaque", b"y")

    def attribute(self, subject: int | str, attribute: str, value: bytes, path: bytes) -> None:
        """Set one extended attribute of what is open, or of what its handle leads to."""
        try:
            # As bytes: the locale's encoding is not the layer's.
            os.setxattr(subject, attribute.encode("utf-8", "surrogateescape"), value)
        except OSError as error:
            known = attribute.startswith(_NAMESPACES)
            if known and error.errno in (errno.EPERM, errno.EACCES, errno.ENOTSUP):
                self.incomplete = True
                return
            name = path.decode("utf-8", "backslashreplace")
            raise UnpackError(
                f"cannot set the attribute {attribute[:256]!r} of {name[:256]!r}: {error.strerror}"
            ) from error

    def _node(self, parent: int, name: bytes, kind: int, device: int, *, able: bool) -> None:
        if not able:
            self.incomplete = True
            kind, device = stat.S_IFREG, 0
        os.mknod(name, kind | 0o600, device, dir_fd=parent)

    def _finish(
        self,
        descriptor: int,
        entry: Entry,
        xattrs: Mapping[str, bytes],
        *,
        handle: str | None = None,
    ) -> None:
        """Owner, xattrs, mode, in this order: a change of owner drops set-id bits and
        capabilities, an ACL changes the mode. ``handle`` reaches what a descriptor opened as a
        mere path stands for."""
        subject = descriptor if handle is None else handle
        now = os.fstat(descriptor)
        if (now.st_uid, now.st_gid) != (entry.uid, entry.gid):
            if not self._powers.owners:
                self.incomplete = True
            else:
                os.chown(subject, entry.uid, entry.gid)
        for attribute, value in xattrs.items():
            self.attribute(subject, attribute, value, entry.path)
        if not stat.S_ISLNK(now.st_mode):
            mode = entry.mode
            if not self._powers.owners:
                # What is ours must stay in our reach, and must not run as us.
                mode = mode & 0o1777 | (0o700 if stat.S_ISDIR(now.st_mode) else 0o600)
                self.incomplete |= mode != entry.mode
            os.chmod(subject, mode)


def _write(descriptor: int, data: bytes) -> None:
    written = os.write(descriptor, data)
    while written < len(data):
        written += os.write(descriptor, memoryview(data)[written:])
