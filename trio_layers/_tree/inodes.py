"""How one entry gets on the disk, with its metadata, as far as privilege goes.

Whatever cannot be set is left, and noted in `Nodes.incomplete`: the list of entries has it. Of a
file or directory, the attribute ``user.containers.override_stat`` has it as well where one can be
set: podman and fuse-overlayfs read that (containers/storage ``pkg/idtools``, ``Stat``). Every
entry has something of its name on the disk, an empty file where nothing better can be made.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Final, final

from .._acl import ACCESS_ACL, DEFAULT_ACL
from .._compression import crc32
from .._entries import Entry, Metadata
from .._errors import StoreError, StoreFull, StoreReadOnly, UnpackError
from .._printable import printable_path
from .._tar.reader import Content
from .capabilities import OVERRIDE, Capabilities
from .member_entries import is_linux_xattr

__all__ = ["InodeWriter", "list_xattrs", "translate_os_errors", "unpack_error"]

_ZEROS: Final = bytes(1 << 18)
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_TYPES: Final = {"char": stat.S_IFCHR, "block": stat.S_IFBLK, "fifo": stat.S_IFIFO}
# None: a node of its own type, which takes no attribute of ours.
_REAL_TYPES: Final = ("file", "dir", None)
_CAPABILITY: Final = "security.capability"
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
# What a layer can ask for and no file system has, as against what this disk lacks.
_LAYER_FAULTS: Final = frozenset(
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
_ACLS: Final = (ACCESS_ACL, DEFAULT_ACL)


@final
class translate_os_errors:
    """Turn an `OSError` of the block into an error of ours that names ``path``."""

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
            raise unpack_error(error, self._path) from error


def unpack_error(error: OSError, path: bytes) -> UnpackError | StoreError:
    """What an error of the disk means to whoever unpacks ``path``."""
    text = f"{printable_path(path)}: {error.strerror}"
    if error.errno in _NO_SPACE:
        return StoreFull(f"unpacking {text}. Free some space and pull again")
    if error.errno == errno.EROFS:
        return StoreReadOnly(f"unpacking {text}")
    if error.errno in _LAYER_FAULTS:
        return UnpackError(f"cannot unpack {text}")
    return StoreError(f"unpacking {text}")


def _is_full(subject: int | str) -> bool:
    """Whether it is the disk that has no space left, and not what one file may have of it."""
    space = os.statvfs(subject)
    # More than the largest attribute takes; no number of blocks: no limit. In a tmpfs attributes
    # take of what there is for inodes.
    return (space.f_blocks > 0 and space.f_bavail < 64) or (
        space.f_files > 0 and space.f_favail < 64
    )


def list_xattrs(subject: int | str) -> list[str]:
    """The names of its extended attributes."""
    try:
        return os.listxattr(subject)
    except OSError as error:
        # FUSE has it so where there are none at all.
        if error.errno != errno.ENOTSUP:
            raise
        return []


@final
class InodeWriter:
    """Makes files, directories, links and nodes, each by its name in an open directory.

    Attributes:
        incomplete: Whether something could not be made or set as it should be.
        foreign_only: Whether attributes that Linux does not have are the only cause.
    """

    def __init__(self, capabilities: Capabilities) -> None:
        self._capabilities = capabilities
        # Whom a new node belongs to; not known where a directory passes on its group.
        self._new_file_owner = capabilities.ids
        # To be limited takes a change of mode anyway, and a file of ours that we may not write to
        # takes no attributes.
        self._exact_modes = capabilities.modes and not capabilities.limited
        self._limited = capabilities.limited
        self.incomplete = False
        self.foreign_only = False

    def create(self, parent: int, name: bytes, mode: int) -> int:
        """A descriptor of a new, empty file, for `write_file`, which is to have ``mode``.

        Raises:
            FileExistsError: if something of that name is there.
        """
        if not self._exact_modes or mode > 0o777:
            mode = 0o600
        return os.open(name, _NEW_FILE, mode, dir_fd=parent)

    def write_file(
        self,
        descriptor: int,
        path: bytes,
        metadata: Metadata,
        xattrs: Mapping[str, bytes],
        data: Iterable[Content],
        check_cancelled: Callable[[], None],
    ) -> tuple[int, int]:
        """Write a new file, and close it; returns its size and the CRC-32 of its content.

        What ``data`` raises comes out as it is.
        """
        try:
            crc = size = 0
            for piece in data:
                if isinstance(piece, int):
                    # A hole: skipped on the disk, hashed as the zeros it stands for.
                    size += piece
                    for start in range(0, piece, len(_ZEROS)):
                        crc = crc32(_ZEROS[: piece - start], crc)
                        check_cancelled()
                    with translate_os_errors(path):
                        os.lseek(descriptor, size, os.SEEK_SET)
                        os.ftruncate(descriptor, size)
                    continue
                size += len(piece)
                crc = crc32(piece, crc)
                try:
                    written = os.write(descriptor, piece)
                    while written < len(piece):
                        written += os.write(descriptor, memoryview(piece)[written:])
                except OSError as error:
                    raise unpack_error(error, path) from error
            try:
                if xattrs or self._limited or self._new_file_owner != (metadata.uid, metadata.gid):
                    self._set_metadata(
                        *(descriptor, descriptor, path, metadata, stat.S_IFREG, xattrs, "file"),
                        is_new=True,
                    )
                elif not self._exact_modes or metadata.mode > 0o777:
                    os.chmod(descriptor, metadata.mode)
                # The most frequent ones need no more.
                os.utime(descriptor, ns=(metadata.mtime_ns, metadata.mtime_ns))
            except OSError as error:
                raise unpack_error(error, path) from error
        finally:
            os.close(descriptor)
        return size, crc

    def set_directory_metadata(
        self, descriptor: int, entry: Entry, xattrs: Mapping[str, bytes], *, is_new: bool
    ) -> None:
        """Give an open directory its metadata, its times apart. ``fresh``: it has none yet."""
        if not is_new:
            ours = self._capabilities.overlay
            for attribute in list_xattrs(descriptor):
                if attribute not in xattrs and not (ours and attribute.startswith(ours)):
                    try:
                        os.removexattr(descriptor, attribute)
                    except PermissionError:
                        pass
        self._set_metadata(
            descriptor, descriptor, entry.path, entry, stat.S_IFDIR, xattrs, "dir", is_new=is_new
        )

    def make_special(self, parent: int, name: bytes, entry: Entry) -> None:
        """Make a symlink, fifo, device or whiteout.

        Raises:
            FileExistsError: if something of that name is there.
        """
        if entry.type == "symlink":
            assert entry.linkname is not None
            os.symlink(entry.linkname, name, dir_fd=parent)
            if not entry.xattrs and self._new_file_owner == (entry.uid, entry.gid):
                # The most frequent ones need no more.
                times = (entry.mtime_ns, entry.mtime_ns)
                os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)
                return
            self._set_metadata_by_name(parent, name, entry)
            return
        if entry.type == "whiteout":
            able, kind, device = self._capabilities.whiteouts, stat.S_IFCHR, 0
        else:
            able = entry.type == "fifo" or self._capabilities.devices
            kind = _FILE_TYPES[entry.type]
            device = os.makedev(*entry.dev) if entry.dev else 0
        if not able:
            self._mark_incomplete()
            kind, device = stat.S_IFREG, 0
        os.mknod(name, kind | 0o600, device, dir_fd=parent)
        if entry.type != "whiteout":
            self._set_metadata_by_name(parent, name, entry, is_real_type=able)

    def set_link_metadata(self, parent: int, name: bytes, entry: Entry) -> None:
        """Give what is there the metadata of one more name of it."""
        self._set_metadata_by_name(parent, name, entry, is_new=False)

    def mark_opaque(self, descriptor: int) -> None:
        """Mark an open directory as one that hides what is below it."""
        if self._capabilities.overlay is None:
            self._mark_incomplete()
        else:
            os.setxattr(descriptor, self._capabilities.overlay + "opaque", b"y")

    def set_xattr(self, subject: int | str, attribute: str, value: bytes, path: bytes) -> None:
        """Set an extended attribute of an open file or a handle.

        An attribute that Linux does not have stays in the list of entries only.
        """
        if not is_linux_xattr(attribute):
            if not self.incomplete:
                self.incomplete = self.foreign_only = True
            return
        try:
            # As bytes: the locale's encoding is not the layer's.
            os.setxattr(subject, attribute.encode("utf-8", "surrogateescape"), value)
        except OSError as error:
            # An ACL may name IDs that a user namespace does not have.
            unmapped = (
                error.errno == errno.EINVAL and attribute in _ACLS and self._capabilities.limited
            )
            if unmapped or error.errno in (errno.EPERM, errno.EACCES, errno.ENOTSUP):
                self._mark_incomplete()
                return
            what = f"the attribute {attribute[:256]!r} of {printable_path(path)}"
            if error.errno in _NO_SPACE:
                if error.errno == errno.EDQUOT or _is_full(subject):
                    raise StoreFull(
                        f"cannot set {what}: {error.strerror}. Free some space and pull again"
                    ) from error
                raise UnpackError(
                    f"cannot set {what}: all attributes of the file together are more than the "
                    "file system takes. Others may take them, such as XFS or Btrfs"
                ) from error
            if error.errno in (errno.EIO, errno.EROFS):
                raise unpack_error(error, path) from error
            raise UnpackError(f"cannot set {what}: {error.strerror}") from error

    def _mark_incomplete(self) -> None:
        """Note that the tree lacks a node or metadata."""
        self.incomplete, self.foreign_only = True, False

    def _set_owner(
        self, descriptor: int, subject: int | str, metadata: Metadata, *, is_new: bool
    ) -> bool:
        """Give it to whom the entry says; whether it is theirs now."""
        wanted = (metadata.uid, metadata.gid)
        if is_new and self._new_file_owner is not None:
            if self._new_file_owner == wanted:
                return True
        else:
            now = os.fstat(descriptor)
            if (now.st_uid, now.st_gid) == wanted:
                return True
        if self._capabilities.owners:
            try:
                os.chown(subject, *wanted)
                return True
            except OSError as error:
                # An ID that the user namespace does not have.
                if error.errno != errno.EINVAL:
                    raise
        if not is_new:
            # As a change of owner does it.
            try:
                os.removexattr(subject, _CAPABILITY)
            except OSError:
                pass
        return False

    def _set_metadata_by_name(
        self,
        parent: int,
        name: bytes,
        entry: Entry,
        *,
        is_real_type: bool = True,
        is_new: bool = True,
    ) -> None:
        """Describe what is there without opening or following it."""
        descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        # Reaches what a descriptor opened as a mere path stands for.
        handle = f"/proc/self/fd/{descriptor}"
        try:
            file_type = stat.S_IFMT(os.fstat(descriptor).st_mode)
            kind = None
            if not is_real_type:
                kind = _override_type(entry)
            elif file_type == stat.S_IFREG:
                kind = "file" if is_new else self._read_override_type(handle)
            self._set_metadata(
                descriptor, handle, entry.path, entry, file_type, entry.xattrs, kind, is_new=is_new
            )
        finally:
            os.close(descriptor)
        times = (entry.mtime_ns, entry.mtime_ns)
        os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)

    def _set_metadata(
        self,
        descriptor: int,
        subject: int | str,
        path: bytes,
        metadata: Metadata,
        file_type: int,
        xattrs: Mapping[str, bytes],
        kind: str | None,
        *,
        is_new: bool,
    ) -> None:
        """Owner, xattrs, mode, in this order: a change of owner drops set-id bits and
        capabilities, an ACL changes the mode.

        Args:
            descriptor: Of what is described.
            subject: The same for calls that change it: that or a handle.
            path: For errors.
            about: What is to be set.
            there: The type that is on the disk, as in a ``st_mode``.
            xattrs: To be set, besides.
            kind: The true type, in the words of ``user.containers.override_stat``; ``None``
                where there can be no such attribute.
            fresh: Whether it has just been made.
        """
        mode = metadata.mode
        owned = self._set_owner(descriptor, subject, metadata, is_new=is_new)
        limited = self._capabilities.limited
        for attribute, value in xattrs.items():
            if limited and attribute == OVERRIDE:
                # A layer must not speak in our place.
                self._mark_incomplete()
                continue
            self.set_xattr(subject, attribute, value, path)
        if file_type != stat.S_IFLNK:
            if not owned:
                # What is not theirs must not run as whose it is.
                mode &= 0o1777
            if not self._capabilities.root:
                # What is ours must stay in our reach, and must not run as us.
                mode = mode & 0o1777 | (0o700 if file_type == stat.S_IFDIR else 0o600)
            os.chmod(subject, mode)
            if mode & stat.S_ISGID:
                if file_type == stat.S_IFDIR:
                    # What is made in it gets its group.
                    self._new_file_owner = None
                if not os.fstat(descriptor).st_mode & stat.S_ISGID:
                    # Dropped without an error: with a strange group it takes CAP_FSETID.
                    mode &= ~stat.S_ISGID
                    self._mark_incomplete()
        if not limited:
            return
        right = (
            owned and (file_type == stat.S_IFLNK or mode == metadata.mode) and kind in _REAL_TYPES
        )
        if not right:
            self._mark_incomplete()
        if kind is not None and self._capabilities.override:
            self._set_override(
                subject, None if right else _override_value(metadata, kind), is_new=is_new
            )

    def _set_override(self, subject: int | str, value: bytes | None, *, is_new: bool) -> None:
        try:
            if value is not None:
                os.setxattr(subject, OVERRIDE, value)
            elif not is_new:
                os.removexattr(subject, OVERRIDE)
        except OSError:
            # There may be no room for it, or none to be removed; the list has all of it.
            pass

    def _read_override_type(self, subject: str) -> str:
        """What a file stands for, by an attribute that can only be our own."""
        if self._capabilities.limited and self._capabilities.override:
            try:
                return os.getxattr(subject, OVERRIDE).rpartition(b":")[2].decode()
            except OSError:
                pass
        return "file"


def _override_type(entry: Entry) -> str:
    if entry.dev is None:
        return "pipe"
    return f"{entry.type}-{entry.dev[0]}-{entry.dev[1]}"


def _override_value(metadata: Metadata, kind: str) -> bytes:
    return f"{metadata.uid}:{metadata.gid}:{metadata.mode:04o}:{kind}".encode()
