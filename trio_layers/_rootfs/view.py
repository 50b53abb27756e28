"""The root file system view: asynchronous access to a merged tree.

A method that few programs call imports its module itself, because each module takes milliseconds.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, AsyncExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias, final

import trio

from .._blocks import opens_block
from .._digest import Digest
from .._entries import Entry, ExportReport
from .._lifetime import Lifetime, while_open
from .._util import made_by
from ..abc import BinaryFile
from .merged import MergedTree, path_error

if TYPE_CHECKING:
    from .mount import OpenScratch

__all__ = ["RootfsView"]

_CHUNK: Final = 1 << 20

HoldTrees: TypeAlias = Callable[[Collection[Digest]], AbstractAsyncContextManager[None]]
"""Protects trees from deletion during a block; see `LeaseCounts.holding_trees`."""


@made_by("DirectoryStore.rootfs or Image.rootfs")
@final
class RootfsView:
    """A view of an image's root file system: read it, export it, mount it.

    `DirectoryStore.rootfs` returns one, and an `Image` has one.

    Paths are ``str`` (UTF-8, with surrogate escapes for other bytes) or ``bytes``, with or without
    a leading slash. Links are followed inside the root, as in a container: an absolute target
    starts at the root, and ``..`` does not lead out of it. A call that fails raises the builtin
    `OSError` that the same call raises on a real directory, with the path in it. A damaged store
    raises `StoreError`.

    Owners, modes and extended attributes are those of the layers, even if the store was filled
    without the privilege to set them.

    Worker threads do the work on the disk. The layers must stay in the store while the view is
    used: the block of a pull holds a lease, and so does `DirectoryStore.lease`. After the end of
    the store's block, each call raises `StoreClosed`. An open file stays open until its own block
    ends.
    """

    def __init__(
        self,
        tree: MergedTree,
        scratch: OpenScratch,
        lifetime: Lifetime,
        hold: HoldTrees | None = None,
    ) -> None:
        self._lifetime = lifetime
        self._tree = tree
        self._scratch = scratch
        self._hold = hold

    @while_open
    async def stat(self, path: str | bytes, *, follow_symlinks: bool = True) -> Entry:
        """Return the entry at a path.

        The ``path`` of the entry is the real one, with all links resolved.

        Cancellation: the call stops soon, and changes nothing.

        Args:
            path: The path.
            follow_symlinks: Follow a link in the last part of the path, too.

        Raises:
            FileNotFoundError: if nothing exists at the path.
            NotADirectoryError: if a part before the last one is not a directory.
            OSError: ``ELOOP`` if the path leads through too many links.
        """
        await self._load()
        return self._resolve(path, follow=follow_symlinks)

    @while_open
    async def exists(self, path: str | bytes) -> bool:
        """Return whether a path exists; ``False`` for a dangling link.

        Cancellation: as for `stat`.
        """
        await self._load()
        try:
            self._resolve(path, follow=True)
        except OSError:
            return False
        return True

    @while_open
    async def readlink(self, path: str | bytes) -> bytes:
        """Return the target of a symbolic link, byte for byte.

        Cancellation: as for `stat`.

        Raises:
            OSError: as for `stat`, and ``EINVAL`` if the path is not a link.
        """
        await self._load()
        entry = self._resolve(path, follow=False)
        if entry.linkname is None:
            raise path_error(errno.EINVAL, _to_bytes(path))
        return entry.linkname

    @while_open
    async def read_bytes(self, path: str | bytes) -> bytes:
        """Return the content of a file; use `open` for large files.

        Cancellation: as for `stat`; reading stops between two chunks.

        Raises:
            OSError: as for `stat`; ``EISDIR`` for a directory, ``EINVAL`` for other entries that
                are not regular files.
        """
        return await trio.to_thread.run_sync(self._read, path)

    @opens_block
    async def open(self, path: str | bytes) -> AsyncIterator[BinaryFile]:
        """Open a file for the block, for reading and seeking.

        The file is one of trio's asynchronous files (`trio.wrap_file`), binary and buffered.
        Leaving the block closes it.

        Cancellation: entering leaves no file open, and leaving closes the file all the same.

        Raises:
            OSError: as for `read_bytes`.
        """
        async with self._lifetime.use():
            opened = await trio.to_thread.run_sync(self._open, path)
        file = trio.wrap_file(opened)
        try:
            yield file
        finally:
            await file.aclose()

    @while_open
    async def walk(self) -> list[Entry]:
        """Return all entries, sorted by path (bytes); the root is first.

        Links are not followed, and only the layers' lists of entries are read. The result is a
        list because all entries are in memory anyway.

        Cancellation: as for `stat`.
        """
        return await trio.to_thread.run_sync(self._tree.walk)

    @while_open
    async def export(
        self, directory: str | os.PathLike[str], *, root_metadata: bool = False
    ) -> ExportReport:
        """Write the root file system into a plain directory.

        The export writes contents, owners, modes, times in nanoseconds, extended attributes,
        links and devices. Holes stay holes. Where the file system can share blocks (btrfs, XFS),
        files share them with the store. Nothing is synced to disk.

        Without privilege, files belong to the caller, as with ``umoci unpack --rootless``.
        Permissions are set, but set-id bits only where the owner is right. An empty file replaces
        a device. The report counts these losses. `export_tar` has none.

        The export follows and replaces nothing in the directory. An entry that another process
        makes there meanwhile is an error.

        An existing directory keeps its owner, mode, attributes and times. A new directory is
        closed to other users (0700), because an image can contain set-id files and devices, which
        work on a file system that is mounted without ``nosuid`` and ``nodev``. Each user that can
        reach an exported set-user-ID file of root can run the image's code as root.

        The path to the directory may contain symbolic links of root and of the calling user, in
        directories where no other user can replace them. The export follows no other links.

        Cancellation: the export removes the files that it has written, and the directory if it
        was new, as after a failure. The removal cannot be cancelled, and may take as long as the
        writing did.

        Args:
            directory: The target directory: an empty one, or a new one in an existing directory.
            root_metadata: Give the directory the owner, mode, time and attributes of the image's
                root. A root file system for users other than its owner needs them.

        Raises:
            ExportError: if the directory is not empty, or an entry cannot be written there.
            StoreError: if the store is damaged.
        """
        from .export import export

        target = Path(directory)
        return await trio.to_thread.run_sync(
            lambda: export(
                self._tree,
                target,
                root_metadata=root_metadata,
                check_cancelled=trio.from_thread.check_cancelled,
            )
        )

    @while_open
    async def export_tar(self, stream: trio.abc.SendStream) -> None:
        """Write the root file system to a stream, as a tar in PAX format.

        Equal root file systems give equal bytes. Owners, modes, times in nanoseconds, extended
        attributes (``SCHILY.xattr``), devices and hard links are those of the layers, without any
        privilege. Names are kept byte for byte; in extended headers, names that are not UTF-8
        are written unchanged, as Go and GNU tar do. Holes are written as zeros.

        Cancellation: the stream has received a part of the tar, as after a failure.

        Args:
            stream: Receives the bytes at its own pace. The caller closes it. Its errors are raised
                unchanged.

        Raises:
            StoreError: if the store is damaged.
            OSError: if too many files are open.
        """
        from .archive import archive

        pieces = archive(self._tree, check_cancelled=trio.from_thread.check_cancelled)
        with closing(pieces):
            # A call per piece: a slow stream does not occupy a worker thread.
            while piece := await trio.to_thread.run_sync(next, pieces, b""):
                await stream.send_all(piece)

    @opens_block
    async def mount(
        self, target: str | os.PathLike[str] | None = None, *, writable: bool = False
    ) -> AsyncIterator[Path]:
        """Mount the root file system for the block, with overlayfs; yield the path.

        Entering and leaving are fast, and take the same time for images of any size. The mount
        shows the trees on the disk: if the store was filled without privilege, the owner is the
        user who filled it, and devices are empty files. A directory that no layer lists has the
        time 0.

        The mount is made in the mount namespace of this process (mount_namespaces(7)), and one
        image can be mounted any number of times. Set-user-ID bits work in it, as in a container;
        devices do not. So do not name a target that is reachable for users whom you do not trust
        to run the image's programs. Without a target, the mount is in the store's directory,
        which is closed to others.

        Leaving the block always unmounts, together with all mounts inside it, even if they are in
        use. Files that are open then stay open. If the process is killed, its mount stays. The
        next process that opens the store unmounts it, unless a target was given.
        `DirectoryStore.collect` keeps the trees of such a mount while it, or a copy in another
        mount namespace, is visible. A lazily detached mount is invisible.

        Cancellation: entering can be cancelled only before the mount is made. Leaving cannot be
        cancelled.

        Args:
            target: The mount point: an empty directory, which stays. ``None``: a new directory,
                which is removed in the end.
            writable: Allow writing. The store's directory holds the changes until the block ends;
                then they are deleted. The first write to a file with several names copies the
                file, and its other names keep the old content (overlayfs.rst of the kernel,
                "Non-standard behavior").

        Raises:
            MountError: if the process lacks the privilege: mounting takes Linux 5.11 and root, or
                the root of a user and a mount namespace
                (``unshare --user --map-root-user --mount``) in which the store was made; if the
                target is not an empty directory; if there are more layers than the kernel mounts
                (500; before Linux 6.8, as many as fit into a page of options, about 220); or if
                the kernel refuses the mount for another reason.
            StoreError: if the disk fails.
        """
        from .mount import open_mount

        trees = self._tree.trees
        async with self._lifetime.use(), AsyncExitStack() as entering:
            if self._hold is not None:
                digests = [Digest(f"sha256:{tree.name}") for tree in dict.fromkeys(trees)]
                await entering.enter_async_context(self._hold(digests))
            mount = open_mount(
                trees,
                target,
                scratch=self._scratch,
                lifetime=self._lifetime,
                writable=writable,
            )
            path = await entering.enter_async_context(mount)
            stack = entering.pop_all()
        async with stack:
            yield path

    async def _load(self) -> None:
        if self._tree.loaded:
            await trio.lowlevel.checkpoint()
        else:
            await trio.to_thread.run_sync(self._tree.load)

    def _open(self, path: str | bytes) -> io.BufferedReader:
        entry = self._resolve(path, follow=True)
        if entry.type != "file":
            # The error names the requested path, because the root's own path is empty.
            number = errno.EISDIR if entry.type == "dir" else errno.EINVAL
            raise path_error(number, _to_bytes(path))
        return open(self._tree.open_listed(entry.path), "rb")

    def _read(self, path: str | bytes) -> bytes:
        chunks: list[bytes] = []
        with self._open(path) as file:
            while chunk := file.read(_CHUNK):
                chunks.append(chunk)
                trio.from_thread.check_cancelled()
        return b"".join(chunks)

    def _resolve(self, path: str | bytes, *, follow: bool) -> Entry:
        return self._tree.resolve(_to_bytes(path), follow=follow)


def _to_bytes(path: str | bytes) -> bytes:
    return path if isinstance(path, bytes) else path.encode("utf-8", "surrogateescape")
