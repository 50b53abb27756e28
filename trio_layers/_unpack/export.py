"""A merged tree written into a plain directory.

What there is comes from the list of entries, only contents from the disk. Every path is reached
by descriptors from the directory down (see `Directories`), nothing is followed or replaced.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, final

from .._entries import Entry, ExportReport
from .._errors import ExportError
from .contents import Source, damaged, reading
from .directories import Directories, split
from .members import is_settable

__all__ = ["export"]

logger = logging.getLogger(__name__)

_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_HANDLE: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_NODES: Final = {
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
}
_SET_IDS: Final = stat.S_ISUID | stat.S_ISGID

# An empty root, for a stack of no trees.
_NOTHING: Final = [Entry(path=b"", type="dir", mode=0o755)]

# What says that the kernel or the file system does not do it, or not for us. EINVAL is for an
# owner that has no number in our user namespace.
_DENIED: Final = frozenset({errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EINVAL})

# What says that the kernel does not copy from this file system to that one by itself.
_NO_COPY: Final = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.ETXTBSY}
)

# How much is copied between two looks whether to go on.
_STEP: Final = 8 << 20


def export(source: Source, target: Path, *, check_cancelled: Callable[[], None]) -> ExportReport:
    """Write all of ``source`` into a directory that is empty or not there.

    Args:
        source: What to write.
        target: Where to.
        check_cancelled: Called for each entry and chunk; what it raises goes through, when what
            was written has been removed.

    Raises:
        ExportError: if ``target`` is not empty, or cannot take what is to be written.
        StoreError: if the store is damaged.
    """
    entries = source.walk() or _NOTHING
    made = False
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(target, 0o700)
            made = True
        # The way to it is the caller's, links and all.
        root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(target)
        raise ExportError(os.fspath(target), error.strerror) from error
    try:
        if not made and os.listdir(root):
            raise ExportError(
                os.fspath(target), "it is not empty: name a directory that is, or a new one"
            )
        before = os.fstat(root)
        writer = _Writer(source, target, root, check_cancelled)
        try:
            return writer.write(entries)
        except BaseException:
            writer.remove(entries)
            with contextlib.suppress(OSError):
                if made:
                    os.rmdir(target)
                else:
                    os.chown(root, before.st_uid, before.st_gid)
                    os.chmod(root, stat.S_IMODE(before.st_mode))
                    os.utime(root, ns=(before.st_atime_ns, before.st_mtime_ns))
            raise
        finally:
            writer.close()
    finally:
        os.close(root)


@final
class _Writer:
    """Writes entries below an open, empty directory."""

    def __init__(self, source: Source, target: Path, root: int, check: Callable[[], None]) -> None:
        self._source = source
        self._target = target
        self._directories = Directories(root)
        self._check = check
        self._kernel_copies = True
        self._written = 0
        self._missing: Counter[str] = Counter()

    def write(self, entries: Sequence[Entry]) -> ExportReport:
        """Write them: parents before what is in them.

        Directories get their metadata in the end, the deepest first: their times, which each
        change in them moves, default ACLs, which what is made in them would inherit, and modes
        that may shut us out.
        """
        here = b""
        try:
            for entry in entries:
                self._check()
                here = entry.path
                self._written += 1
                try:
                    self._put(entry)
                except FileExistsError:
                    # Not what we wrote, so not ours to remove.
                    self._written -= 1
                    raise
            for entry in reversed(entries):
                if entry.type == "dir":
                    self._check()
                    here = entry.path
                    descriptor = self._directories.open(here)
                    self._describe(descriptor, entry)
                    os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))
        except OSError as error:
            path = os.path.join(os.fsencode(self._target), here) if here else self._target
            raise ExportError(os.fsdecode(path), error.strerror) from error
        return ExportReport(entries=len(entries), **self._missing)

    def remove(self, entries: Sequence[Entry]) -> None:
        """Remove what was written of them, as far as that goes."""
        failure: OSError | None = None
        written = entries[1 : self._written]
        for entry in written:
            if entry.type == "dir":
                # It may have a mode already that shuts us out.
                with contextlib.suppress(OSError):
                    parent, name = split(entry.path)
                    handle = os.open(name, _HANDLE, dir_fd=self._directories.open(parent))
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
            logger.warning("cannot remove what was written to %s: %s", self._target, failure)

    def close(self) -> None:
        self._directories.close()

    def _put(self, entry: Entry) -> None:
        parent, name = split(entry.path)
        into = self._directories.open(parent)
        if not name:
            # Nobody else's until all in it has its owner and its mode.
            os.chmod(into, 0o700)
            for acl in ("system.posix_acl_access", "system.posix_acl_default"):
                with contextlib.suppress(OSError):
                    os.removexattr(into, acl)
        elif entry.links is not None and entry.links != entry.path:
            self._link(entry.links, into, name)
        elif entry.type == "file":
            self._file(into, name, entry)
        elif entry.type == "dir":
            os.mkdir(name, 0o700, dir_fd=into)
        else:
            self._special(into, name, entry)

    def _link(self, target: bytes, into: int, name: bytes) -> None:
        parent, old = split(target)
        # Opening another directory may close this one.
        into = os.dup(into)
        try:
            source = self._directories.open(parent)
            os.link(old, name, src_dir_fd=source, dst_dir_fd=into, follow_symlinks=False)
        finally:
            os.close(into)

    def _file(self, into: int, name: bytes, entry: Entry) -> None:
        descriptor = os.open(name, _NEW_FILE, 0o600, dir_fd=into)
        try:
            if entry.size:
                with reading(self._source, entry) as content:
                    self._copy(content, descriptor, entry)
            self._describe(descriptor, entry)
            os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(descriptor)

    def _special(self, into: int, name: bytes, entry: Entry) -> None:
        """A symlink, fifo, device or socket."""
        if entry.type == "symlink":
            os.symlink(entry.linkname or b"", name, dir_fd=into)
        else:
            device = os.makedev(*entry.dev) if entry.dev else 0
            try:
                os.mknod(name, _NODES[entry.type] | 0o600, device, dir_fd=into)
            except OSError as error:
                if error.errno not in _DENIED:
                    raise
                self._missing["devices"] += 1
                os.mknod(name, stat.S_IFREG | 0o600, dir_fd=into)
        handle = os.open(name, _HANDLE, dir_fd=into)
        try:
            self._describe(f"/proc/self/fd/{handle}", entry)
        finally:
            os.close(handle)
        times = (entry.mtime_ns, entry.mtime_ns)
        os.utime(name, ns=times, dir_fd=into, follow_symlinks=False)

    def _describe(self, subject: int | str, entry: Entry) -> None:
        """Set owner, xattrs, mode, in this order: a change of owner drops set-id bits and
        capabilities, an ACL changes the mode."""
        mode = entry.mode
        try:
            os.chown(subject, entry.uid, entry.gid)
        except OSError as error:
            if error.errno not in _DENIED:
                raise
            self._missing["owners"] += 1
            if mode & _SET_IDS and entry.type != "dir":
                self._missing["set_ids"] += 1
                mode &= ~_SET_IDS
        for attribute, value in entry.xattrs.items():
            if not is_settable(attribute):
                self._missing["xattrs"] += 1
                continue
            try:
                # As bytes: the locale's encoding is not the layer's.
                os.setxattr(subject, attribute.encode("utf-8", "surrogateescape"), value)
            except OSError as error:
                if error.errno not in _DENIED:
                    raise
                self._missing["xattrs"] += 1
        if entry.type != "symlink":
            os.chmod(subject, mode)

    def _copy(self, content: int, into: int, entry: Entry) -> None:
        """Copy a file's data; what is a hole in it stays one."""
        position = 0
        while position < entry.size:
            try:
                start = os.lseek(content, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                # Nothing but a hole is left.
                os.ftruncate(into, entry.size)
                return
            position = os.lseek(content, start, os.SEEK_HOLE)
            self._copy_data(content, into, start, position, entry.path)

    def _copy_data(self, content: int, into: int, position: int, end: int, path: bytes) -> None:
        while position < end:
            self._check()
            size = min(end - position, _STEP)
            if self._kernel_copies:
                try:
                    copied = os.copy_file_range(content, into, size, position, position)
                except OSError as error:
                    if error.errno not in _NO_COPY:
                        raise
                    self._kernel_copies = False
                    continue
            else:
                os.lseek(into, position, os.SEEK_SET)
                copied = os.sendfile(into, content, position, size)
            if not copied:
                raise damaged(path, "it ends early")
            position += copied
