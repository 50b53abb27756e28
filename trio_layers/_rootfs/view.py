"""The face that a root file system shows to trio."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, AsyncExitStack, closing
from pathlib import Path
from typing import Final, TypeAlias, final

import trio

from .._blocks import opens_block
from .._digest import Digest
from .._entries import Entry, ExportReport
from .._lifetime import Lifetime, while_open
from ..abc import BinaryFile
from .archive import archive
from .export import export
from .merged import MergedTree, path_error
from .mount import OpenScratch, open_mount

__all__ = ["RootfsView"]

_CHUNK: Final = 1 << 20

HoldTrees: TypeAlias = Callable[[Collection[Digest]], AbstractAsyncContextManager[None]]
"""Protects trees from deletion during a block; see `LeaseCounts.holding_trees`."""


@final
class RootfsView:
    """An image's root file system, to look at, read from and take out. It comes from
    `DirectoryStore.rootfs`, or with an `Image`.

    Paths are ``str`` (UTF-8, with surrogate escapes for other bytes) or ``bytes``, with or
    without a leading slash. Links are followed inside the root, as in a container: an absolute
    target starts there, and ``..`` does not lead out of it. What fails raises the builtin
    `OSError` that the same call on a real directory would, with the path in it; a store that is
    damaged is a `StoreError`.

    Owners, modes and attributes are those that the layers say, also where the store was filled
    without the privilege to set them.

    Work on the disk is done in worker threads. Cancelled, a call gives up between chunks, and
    the view stays as good as it was. What is read must stay in the store meanwhile: see
    `DirectoryStore.lease`; the block of a pull holds one. After the end of the store's block, each
    call raises `StoreClosed`. An open file stays open until its own block ends.
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
        """What is there; its ``path`` is the real one.

        Raises:
            FileNotFoundError: if nothing is there.
            NotADirectoryError: if something on the way is no directory.
            OSError: ``ELOOP`` if too many links are on the way.
        """
        await self._load()
        return self._resolve(path, follow=follow_symlinks)

    @while_open
    async def exists(self, path: str | bytes) -> bool:
        """Whether something is there; ``False`` for a link that leads nowhere."""
        await self._load()
        try:
            self._resolve(path, follow=True)
        except OSError:
            return False
        return True

    @while_open
    async def readlink(self, path: str | bytes) -> bytes:
        """Where a symbolic link leads, byte for byte.

        Raises:
            OSError: as for `stat`, and ``EINVAL`` if it is no link.
        """
        await self._load()
        entry = self._resolve(path, follow=False)
        if entry.linkname is None:
            raise path_error(errno.EINVAL, _to_bytes(path))
        return entry.linkname

    @while_open
    async def read_bytes(self, path: str | bytes) -> bytes:
        """A file's content, all of it in memory; `open` is for large ones.

        Raises:
            OSError: as for `stat`, ``EISDIR`` for a directory, ``EINVAL`` for what is no file.
        """
        return await trio.to_thread.run_sync(self._read, path)

    @opens_block
    async def open(self, path: str | bytes) -> AsyncIterator[BinaryFile]:
        """Open a file for the block, to be read from anywhere in it.

        It is one of trio's asynchronous files (`trio.wrap_file`), binary and buffered. Leaving
        the block closes it.

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
        """All there is, sorted by path (bytes), links not followed; the root is first.

        A list, since all of it is in memory anyway. No file is touched.
        """
        return await trio.to_thread.run_sync(self._tree.walk)

    @while_open
    async def export(
        self, directory: str | os.PathLike[str], *, root_metadata: bool = False
    ) -> ExportReport:
        """Write all of it into a plain directory: contents, owners, modes, times in nanoseconds,
        extended attributes, links, devices. Holes stay holes, and where the file system can
        share blocks (btrfs, XFS) they are shared with the store. Nothing is synced to disk.

        Without privilege owners stay ours, as with ``umoci unpack --rootless``: permissions are
        set as they are, though set-id bits only where the owner is right; of a device an empty
        file is made. The report says how much was lost that way. `export_tar` loses nothing.

        Nothing in the directory is followed or replaced: whatever appears in it meanwhile is
        an error. Cancelled, or failed, what was written is removed again, and the directory, too,
        if it was made; that may take as long as writing it did, and is not cancelled.

        An existing directory keeps its owner, mode, attributes and times. A new directory is
        closed to other users (0700), because an image can contain set-id files and devices, which
        work on a file system that is mounted without ``nosuid`` and ``nodev``. Each user that can
        reach an exported set-user-ID file of root can run the image's code as root.

        The path to the directory may contain symbolic links of root and of the calling user, in
        directories where no other user can replace them. The export follows no other links.

        Args:
            directory: Where to. It is made if it is not there (its parent must be), else it must
                be empty.
            root_metadata: Give the directory the owner, mode, time and attributes of the image's
                root. A root file system for users other than its owner needs them.

        Raises:
            ExportError: if the directory is not empty, or cannot take what is to be written.
            StoreError: if the store is damaged.
        """
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
        """Write all of it to a stream, as one tar in PAX format, at whose end it is whole.

        Equal root file systems give equal bytes. Owners, modes, times in nanoseconds, extended
        attributes (``SCHILY.xattr``), devices and hard links are those of the layers, whatever
        the privilege. Names are kept byte for byte; in extended headers those that are not UTF-8
        stand as they are, as Go and GNU tar write them. Holes are written as zeros.

        Args:
            stream: Takes the bytes, at its own pace. Closing it is the caller's. What it raises
                comes out as it is; cancelled or failed, part of the tar has been sent.

        Raises:
            StoreError: if the store is damaged.
            OSError: if a file cannot be opened since too many are.
        """
        pieces = archive(self._tree, check_cancelled=trio.from_thread.check_cancelled)
        with closing(pieces):
            # Not one thread for all of it: none is kept while the stream does not take more.
            while piece := await trio.to_thread.run_sync(next, pieces, b""):
                await stream.send_all(piece)

    @opens_block
    async def mount(
        self, target: str | os.PathLike[str] | None = None, *, writable: bool = False
    ) -> AsyncIterator[Path]:
        """Mount all of it for the block, with overlayfs, and get the path where that is.

        Entering and leaving take the same short time for images of any size. What is seen is what
        the trees have on the disk: where the store was filled without privilege, owners are ours
        and devices are empty files. A directory that no layer lists has the time 0.

        The mount is where all mounts of this process are (mount_namespaces(7)); any number of
        them may be had of the same layers. Set-user-ID bits work in it, as in a container, and
        devices do not. So give no target that users can reach whom you do not trust with the
        image's programs; without one, it is in the store's directory, which is closed to others.

        Leaving unmounts it, whatever happens in the block, and is not cancelled. It goes with all
        that was mounted in it, though it be in use: whoever has a file of it open keeps that.
        Entering is cancelled before the mount is made, or not at all. A process that is killed
        leaves its mount. The next process that opens the store unmounts it, unless a target was
        given. `DirectoryStore.collect` keeps the trees of such a mount while it, or a copy in
        another mount namespace, is visible. A lazily detached mount is invisible.

        Args:
            target: Where to: an empty directory, which stays. ``None``: a new one, which does not.
            writable: What is written is kept in the store's directory until the block is left,
                and then thrown away. Files with several names are copied by the first write, and
                their other names stay as they were (overlayfs.rst of the kernel, "Non-standard
                behavior").

        Raises:
            MountError: if the process may not mount: it takes root, or the root of a user and a
                mount namespace (``unshare --user --map-root-user --mount``) in which the store
                was made, and Linux 5.11; if the target is no empty directory; if there are more
                layers than the kernel mounts (500; before Linux 6.8, as many as fit into a page of
                options, about 220); or if it does not mount them for another reason.
            StoreError: for what the disk does.
        """
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
            # About what was asked for: the root's own path says nothing.
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
