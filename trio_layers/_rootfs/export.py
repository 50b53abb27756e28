"""Writes a merged tree into a plain directory.

Entries come from the trees' lists, only file contents are read from the disk. Each path is opened
by descriptors from the target directory down (see `Directories`), so no link is followed and no
entry is replaced.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Self, final

import attrs

from .._entries import Entry, ExportReport
from .._errors import ExportError
from .._paths import open_empty_directory
from .._tree.directories import Directories, split
from .._tree.member_entries import is_linux_xattr
from .contents import open_content
from .merged import MergedTree

__all__ = ["export"]

logger = logging.getLogger(__name__)

_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_REFERENCE: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_NODES: Final = {
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
}
_SET_IDS: Final = stat.S_ISUID | stat.S_ISGID
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH
_ACLS: Final = ("system.posix_acl_access", "system.posix_acl_default")

# The root of a stack without trees.
_EMPTY_ROOT: Final = [Entry(path=b"", type="dir", mode=0o755)]

# Errors when the kernel or the file system does not support a call, or forbids it. EINVAL means an
# owner without a number in our user namespace.
_DENIED: Final = frozenset({errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EINVAL})

# Errors when copy_file_range(2) does not work between the two file systems.
_NO_KERNEL_COPY: Final = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.ETXTBSY}
)

# Bytes copied between two checks for cancellation.
_CHUNK: Final = 8 << 20


def export(
    tree: MergedTree,
    target: Path,
    *,
    root_metadata: bool = False,
    check_cancelled: Callable[[], None],
) -> ExportReport:
    """Write a merged tree into an empty or new directory.

    Args:
        tree: The merged tree.
        target: The target directory. A new directory is made with mode 0700.
        root_metadata: Give ``target`` the owner, mode, time and attributes of the root.
        check_cancelled: Called for each entry and chunk. Its errors are raised unchanged, after
            the written files have been removed.

    Raises:
        ExportError: if ``target`` is not empty, or an entry cannot be written there.
        StoreError: if the store is damaged.
    """
    entries = tree.walk() or _EMPTY_ROOT
    with contextlib.ExitStack() as stack:
        try:
            root, remove = open_empty_directory(stack, target, mode=0o700)
        except OSError as error:
            raise ExportError(os.fspath(target), error.strerror) from error
        writer = _Writer(tree, target, root, check_cancelled)
        before = _RootMetadata.of(root)
        try:
            before.close_to_others(root)
            report = writer.write(entries, root_metadata=root_metadata)
            if not root_metadata:
                before.restore(root, times=remove is None)
            return report
        except BaseException:
            writer.remove(entries)
            with contextlib.suppress(OSError):
                if remove is not None:
                    remove()
                else:
                    before.restore(root, times=True)
            raise
        finally:
            writer.close()


@final
@attrs.frozen
class _RootMetadata:
    """Metadata of the target directory before the export.

    Attributes:
        status: Owner, mode and times.
        xattrs: The extended attributes, ACLs included.
    """

    status: os.stat_result
    xattrs: Mapping[str, bytes]

    @classmethod
    def of(cls, root: int) -> Self:
        xattrs = {}
        with contextlib.suppress(OSError):
            for name in (*os.listxattr(root), *_ACLS):
                with contextlib.suppress(OSError):
                    xattrs[name] = os.getxattr(root, name)
        return cls(os.fstat(root), xattrs)

    def close_to_others(self, root: int) -> None:
        """Close the directory to other users during the export.

        Entries get their owners and modes step by step, so other users must wait for the end. ACLs
        are removed, too, because new entries would inherit the default ACL.
        """
        has_acls = not self.xattrs.keys().isdisjoint(_ACLS)
        if not (has_acls or self.status.st_mode & _WRITABLE_BY_OTHERS):
            return
        # Only the owner can change the mode. Another user's directory stays open to that user.
        with contextlib.suppress(PermissionError):
            os.chmod(root, 0o700)
        for acl in _ACLS:
            with contextlib.suppress(OSError):
                os.removexattr(root, acl)

    def restore(self, root: int, *, times: bool) -> None:
        now = os.fstat(root)
        if (now.st_uid, now.st_gid) != (self.status.st_uid, self.status.st_gid):
            os.chown(root, self.status.st_uid, self.status.st_gid)
        found = type(self).of(root).xattrs
        for name in found.keys() - self.xattrs.keys():
            with contextlib.suppress(OSError):
                os.removexattr(root, name)
        for name, value in self.xattrs.items():
            if found.get(name) != value:
                os.setxattr(root, name, value)
        if os.fstat(root).st_mode != self.status.st_mode:
            os.chmod(root, stat.S_IMODE(self.status.st_mode))
        if times:
            # Another user's directory keeps the time of the last written entry.
            with contextlib.suppress(PermissionError):
                os.utime(root, ns=(self.status.st_atime_ns, self.status.st_mtime_ns))


@final
class _Writer:
    """Writes entries below an open, empty directory."""

    def __init__(
        self, tree: MergedTree, target: Path, root: int, check: Callable[[], None]
    ) -> None:
        self._tree = tree
        self._target = target
        self._directories = Directories(root)
        self._check = check
        self._kernel_copies = True
        self._written = 0
        self._lost: Counter[str] = Counter()

    def write(self, entries: Sequence[Entry], *, root_metadata: bool) -> ExportReport:
        """Write entries, each parent before its children.

        Directories get their metadata in the end, the deepest first. Until then, each new entry
        would change their times and inherit their default ACLs, and their modes may deny us
        access.
        """
        here = b""
        try:
            for entry in entries:
                self._check()
                here = entry.path
                self._written += 1
                try:
                    self._write_entry(entry)
                except FileExistsError:
                    # Another process made this file, so remove() must not delete it.
                    self._written -= 1
                    raise
            for entry in reversed(entries):
                if entry.type == "dir" and (entry.path or root_metadata):
                    self._check()
                    here = entry.path
                    descriptor = self._directories.open(here)
                    self._set_metadata(descriptor, entry)
                    os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))
        except OSError as error:
            path = os.path.join(os.fsencode(self._target), here) if here else self._target
            raise ExportError(os.fsdecode(path), error.strerror) from error
        return ExportReport(entries=len(entries), **self._lost)

    def remove(self, entries: Sequence[Entry]) -> None:
        """Remove the written entries as far as possible."""
        failure: OSError | None = None
        written = entries[1 : self._written]
        for entry in written:
            if entry.type == "dir":
                # Its mode may deny us access already.
                with contextlib.suppress(OSError):
                    parent, name = split(entry.path)
                    handle = os.open(name, _REFERENCE, dir_fd=self._directories.open(parent))
                    try:
                        os.chmod(f"/proc/self/fd/{handle}", 0o700)
                    finally:
                        os.close(handle)
        for entry in reversed(written):
            parent, name = split(entry.path)
            remove = os.rmdir if entry.type == "dir" else os.unlink
            try:
                remove(name, dir_fd=self._directories.open(parent))
            except FileNotFoundError:
                pass
            except OSError as error:
                failure = error
        if failure is not None:
            logger.warning("cannot remove the partial export in %s: %s", self._target, failure)

    def close(self) -> None:
        self._directories.close()

    def _write_entry(self, entry: Entry) -> None:
        parent, name = split(entry.path)
        into = self._directories.open(parent)
        if not name:
            pass  # the directory exists
        elif entry.links is not None and entry.links != entry.path:
            self._write_hard_link(entry.links, into, name)
        elif entry.type == "file":
            self._write_file(into, name, entry)
        elif entry.type == "dir":
            os.mkdir(name, 0o700, dir_fd=into)
        else:
            self._write_special(into, name, entry)

    def _write_hard_link(self, target: bytes, into: int, name: bytes) -> None:
        parent, old = split(target)
        # Opening another directory may close this one.
        into = os.dup(into)
        try:
            source = self._directories.open(parent)
            os.link(old, name, src_dir_fd=source, dst_dir_fd=into, follow_symlinks=False)
        finally:
            os.close(into)

    def _write_file(self, into: int, name: bytes, entry: Entry) -> None:
        descriptor = os.open(name, _NEW_FILE, 0o600, dir_fd=into)
        try:
            if entry.size:
                with open_content(self._tree, entry.path) as content:
                    self._copy(content, descriptor, entry)
            self._set_metadata(descriptor, entry)
            os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(descriptor)

    def _write_special(self, into: int, name: bytes, entry: Entry) -> None:
        """Make a symlink, fifo, device or socket."""
        if entry.type == "symlink":
            os.symlink(entry.linkname or b"", name, dir_fd=into)
        else:
            device = os.makedev(*entry.dev) if entry.dev else 0
            try:
                os.mknod(name, _NODES[entry.type] | 0o600, device, dir_fd=into)
            except OSError as error:
                if error.errno not in _DENIED:
                    raise
                self._lost["devices"] += 1
                os.mknod(name, stat.S_IFREG | 0o600, dir_fd=into)
        handle = os.open(name, _REFERENCE, dir_fd=into)
        try:
            self._check_new(os.fstat(handle), entry)
            self._set_metadata(f"/proc/self/fd/{handle}", entry)
        finally:
            os.close(handle)
        times = (entry.mtime_ns, entry.mtime_ns)
        os.utime(name, ns=times, dir_fd=into, follow_symlinks=False)

    def _check_new(self, found: os.stat_result, entry: Entry) -> None:
        """Refuse to change a file that another process put in the new file's place."""
        expected = stat.S_IFLNK if entry.type == "symlink" else _NODES[entry.type]
        kind = stat.S_IFMT(found.st_mode)
        placeholder = kind == stat.S_IFREG and entry.type != "symlink" and not found.st_size
        if not (kind == expected or placeholder) or found.st_nlink != 1:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if found.st_uid != os.geteuid():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def _set_metadata(self, subject: int | str, entry: Entry) -> None:
        """Set owner, xattrs and mode, in this order.

        A change of owner drops set-id bits and capabilities, and an ACL changes the mode.
        """
        mode = entry.mode
        try:
            os.chown(subject, entry.uid, entry.gid)
        except OSError as error:
            if error.errno not in _DENIED:
                raise
            self._lost["owners"] += 1
            if mode & _SET_IDS and entry.type != "dir":
                self._lost["set_ids"] += 1
                mode &= ~_SET_IDS
        for attribute, value in entry.xattrs.items():
            if not is_linux_xattr(attribute):
                self._lost["xattrs"] += 1
                continue
            try:
                # The name is bytes, because the locale's encoding can differ from the layer's.
                os.setxattr(subject, attribute.encode("utf-8", "surrogateescape"), value)
            except OSError as error:
                if error.errno not in _DENIED:
                    raise
                self._lost["xattrs"] += 1
        if entry.type != "symlink":
            os.chmod(subject, mode)

    def _copy(self, content: int, into: int, entry: Entry) -> None:
        """Copy a file's data and keep its holes."""
        position = 0
        while position < entry.size:
            try:
                start = os.lseek(content, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                # The rest is a hole.
                os.ftruncate(into, entry.size)
                return
            position = os.lseek(content, start, os.SEEK_HOLE)
            self._copy_data(content, into, start, position, entry.path)

    def _copy_data(self, content: int, into: int, position: int, end: int, path: bytes) -> None:
        while position < end:
            self._check()
            size = min(end - position, _CHUNK)
            if self._kernel_copies:
                try:
                    copied = os.copy_file_range(content, into, size, position, position)
                except OSError as error:
                    if error.errno not in _NO_KERNEL_COPY:
                        raise
                    self._kernel_copies = False
                    continue
            else:
                os.lseek(into, position, os.SEEK_SET)
                copied = os.sendfile(into, content, position, size)
            if not copied:
                raise self._tree.damaged_file(path, "it ends early")
            position += copied
