"""Makes files, directories, links and devices on the disk and sets their metadata.

Metadata that needs more privilege is not set. `InodeWriter.incomplete` notes this, and the list of
entries has the full metadata. The attribute ``user.containers.override_stat`` of a file or
directory has it, too, if the attribute can be set: podman and fuse-overlayfs read it
(containers/storage ``pkg/idtools``, ``Stat``). Every entry gets an inode of its name; without the
privilege to make a device, it is an empty file.
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
from .._tar.reader import ContentPiece
from .capabilities import OVERRIDE, Capabilities
from .member_entries import is_linux_xattr

__all__ = ["InodeWriter", "list_xattrs", "translate_os_errors", "unpack_error"]

_ZEROS: Final = bytes(1 << 18)
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_TYPES: Final = {"char": stat.S_IFCHR, "block": stat.S_IFBLK, "fifo": stat.S_IFIFO}
# None is for an inode of its true type that cannot have a ``user.`` attribute.
_REAL_TYPES: Final = ("file", "dir", None)
_CAPABILITY: Final = "security.capability"
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
# Errors that a layer causes on every file system. All others are the fault of this disk.
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
    """Context manager that turns an `OSError` into an error of this package about ``path``."""

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
    """Return the package's error for an error of the disk while ``path`` is unpacked."""
    text = f"{printable_path(path)}: cannot unpack: {error.strerror}"
    if error.errno in _NO_SPACE:
        return StoreFull(f"{text}. Free some space and pull again")
    if error.errno == errno.EROFS:
        return StoreReadOnly(text)
    if error.errno in _LAYER_FAULTS:
        return UnpackError(text)
    return StoreError(text)


def _is_disk_full(subject: int | str) -> bool:
    """Return whether the disk is full, and not only one file's space for attributes."""
    space = os.statvfs(subject)
    # 64 free blocks are more than the largest attribute takes. A file system without a number of
    # blocks has no limit. In a tmpfs, attributes take space from that for inodes.
    return (space.f_blocks > 0 and space.f_bavail < 64) or (
        space.f_files > 0 and space.f_favail < 64
    )


def list_xattrs(subject: int | str) -> list[str]:
    """Return the names of an inode's extended attributes."""
    try:
        return os.listxattr(subject)
    except OSError as error:
        # A FUSE file system without any attributes raises this.
        if error.errno != errno.ENOTSUP:
            raise
        return []


@final
class InodeWriter:
    """Makes inodes in open directories and sets their metadata.

    Attributes:
        incomplete: Whether some inode or metadata could not be made or set.
        foreign_only: Whether attributes that Linux does not have are the only cause.
    """

    def __init__(self, capabilities: Capabilities) -> None:
        self._capabilities = capabilities
        # None if unknown, because some directory passes on its group.
        self._new_file_owner = capabilities.new_file_owner
        # With limited capabilities, the mode is changed later anyway, and we cannot set attributes
        # of a file that we may not write to.
        self._exact_modes = capabilities.exact_modes and not capabilities.limited
        self._limited = capabilities.limited
        self.incomplete = False
        self.foreign_only = False

    def create(self, parent: int, name: bytes, mode: int) -> int:
        """Create an empty file for `write_file` and return its descriptor.

        ``mode`` is the mode that `write_file` will set.

        Raises:
            FileExistsError: If the name exists.
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
        data: Iterable[ContentPiece],
        check_cancelled: Callable[[], None],
    ) -> tuple[int, int]:
        """Write a new file and close it; return its size and the CRC-32 of its content.

        Exceptions of ``data`` are not translated.
        """
        try:
            crc = size = 0
            for piece in data:
                if isinstance(piece, int):
                    # A hole is skipped on the disk, but its zeros count for the CRC-32.
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
                # Most files need only this.
                os.utime(descriptor, ns=(metadata.mtime_ns, metadata.mtime_ns))
            except OSError as error:
                raise unpack_error(error, path) from error
        finally:
            os.close(descriptor)
        return size, crc

    def set_directory_metadata(
        self, descriptor: int, entry: Entry, xattrs: Mapping[str, bytes], *, is_new: bool
    ) -> None:
        """Set an open directory's metadata, except its times."""
        if not is_new:
            ours = self._capabilities.overlay_prefix
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
            FileExistsError: If the name exists.
        """
        if entry.type == "symlink":
            assert entry.linkname is not None
            os.symlink(entry.linkname, name, dir_fd=parent)
            if not entry.xattrs and self._new_file_owner == (entry.uid, entry.gid):
                # Most symlinks need only this.
                times = (entry.mtime_ns, entry.mtime_ns)
                os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)
                return
            self._set_metadata_by_name(parent, name, entry)
            return
        if entry.type == "whiteout":
            able, kind, device = self._capabilities.can_make_whiteouts, stat.S_IFCHR, 0
        else:
            able = entry.type == "fifo" or self._capabilities.can_make_devices
            kind = _FILE_TYPES[entry.type]
            device = os.makedev(*entry.dev) if entry.dev else 0
        if not able:
            self._mark_incomplete()
            kind, device = stat.S_IFREG, 0
        os.mknod(name, kind | 0o600, device, dir_fd=parent)
        if entry.type != "whiteout":
            self._set_metadata_by_name(parent, name, entry, is_real_type=able)

    def set_link_metadata(self, parent: int, name: bytes, entry: Entry) -> None:
        """Set the metadata of an inode that has got another name."""
        self._set_metadata_by_name(parent, name, entry, is_new=False)

    def mark_opaque(self, descriptor: int) -> None:
        """Mark an open directory as opaque, so that it hides lower trees' entries."""
        if self._capabilities.overlay_prefix is None:
            self._mark_incomplete()
        else:
            os.setxattr(descriptor, self._capabilities.overlay_prefix + "opaque", b"y")

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
            # An ACL may name IDs that do not exist in the user namespace.
            unmapped = (
                error.errno == errno.EINVAL and attribute in _ACLS and self._capabilities.limited
            )
            if unmapped or error.errno in (errno.EPERM, errno.EACCES, errno.ENOTSUP):
                self._mark_incomplete()
                return
            text = f"{printable_path(path)}: cannot set the attribute {attribute[:256]!r}"
            if error.errno in _NO_SPACE:
                if error.errno == errno.EDQUOT or _is_disk_full(subject):
                    raise StoreFull(
                        f"{text}: {error.strerror}. Free some space and pull again"
                    ) from error
                raise UnpackError(
                    f"{text}: the file has more attributes than the file system can store. Put the "
                    "store on a file system that can, such as XFS or Btrfs"
                ) from error
            if error.errno in (errno.EIO, errno.EROFS):
                raise unpack_error(error, path) from error
            raise UnpackError(f"{text}: {error.strerror}") from error

    def _mark_incomplete(self) -> None:
        """Note that the tree lacks an inode or metadata."""
        self.incomplete, self.foreign_only = True, False

    def _set_owner(
        self, descriptor: int, subject: int | str, metadata: Metadata, *, is_new: bool
    ) -> bool:
        """Set the owner and group; return whether the inode has them now."""
        wanted = (metadata.uid, metadata.gid)
        if is_new and self._new_file_owner is not None:
            if self._new_file_owner == wanted:
                return True
        else:
            now = os.fstat(descriptor)
            if (now.st_uid, now.st_gid) == wanted:
                return True
        if self._capabilities.can_chown:
            try:
                os.chown(subject, *wanted)
                return True
            except OSError as error:
                # EINVAL: the user namespace does not have the ID.
                if error.errno != errno.EINVAL:
                    raise
        if not is_new:
            # A change of owner would drop the capabilities.
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
        """Set the metadata of an inode by its name, without opening or following it."""
        descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        # Calls that refuse an O_PATH descriptor accept this path.
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
        """Set the owner, xattrs and mode of an inode, in this order.

        The order matters: a change of owner drops set-id bits and capabilities, and an ACL changes
        the mode.

        Args:
            descriptor: A descriptor of the inode, possibly ``O_PATH``.
            subject: The inode for calls that change it: a descriptor or a path in ``/proc``.
            path: The entry's path, for errors.
            metadata: The metadata to set.
            file_type: The inode's type on the disk, as in ``st_mode``.
            xattrs: The extended attributes to set.
            kind: The entry's type as ``user.containers.override_stat`` spells it; ``None`` if
                the inode cannot have this attribute.
            is_new: Whether the inode was just made.
        """
        mode = metadata.mode
        owned = self._set_owner(descriptor, subject, metadata, is_new=is_new)
        limited = self._capabilities.limited
        for attribute, value in xattrs.items():
            if limited and attribute == OVERRIDE:
                # Only we may write this attribute, not a layer.
                self._mark_incomplete()
                continue
            self.set_xattr(subject, attribute, value, path)
        if file_type != stat.S_IFLNK:
            if not owned:
                # A file with the wrong owner must not run as that owner.
                mode &= 0o1777
            if not self._capabilities.ignores_modes:
                # Our own files must stay accessible to us and must not run as us.
                mode = mode & 0o1777 | (0o700 if file_type == stat.S_IFDIR else 0o600)
            os.chmod(subject, mode)
            if mode & stat.S_ISGID:
                if file_type == stat.S_IFDIR:
                    # New files in this directory get its group.
                    self._new_file_owner = None
                if not os.fstat(descriptor).st_mode & stat.S_ISGID:
                    # The kernel drops the bit silently: a foreign group needs CAP_FSETID.
                    mode &= ~stat.S_ISGID
                    self._mark_incomplete()
        if not limited:
            return
        right = (
            owned and (file_type == stat.S_IFLNK or mode == metadata.mode) and kind in _REAL_TYPES
        )
        if not right:
            self._mark_incomplete()
        if kind is not None and self._capabilities.can_set_override:
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
            # The file system may lack space, or there is no attribute to remove. The list of
            # entries has the metadata anyway.
            pass

    def _read_override_type(self, subject: str) -> str:
        """Return the type that a file stands for, from an attribute that only we write."""
        if self._capabilities.limited and self._capabilities.can_set_override:
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
