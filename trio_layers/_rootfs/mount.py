"""Mounts a stack of trees with overlayfs.

Linux 6.8 and later take one lower directory at a time (``lowerdir+``, with fsconfig(2)), up to 500.
Before, all options together have to fit into one page. In both cases the kernel gets names in
``/proc/self/fd``: they are short, and contain none of the special characters of mount options.

The options are described in the kernel's ``Documentation/filesystems/overlayfs.rst``.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Final, final

import attrs
import trio

from .._blocks import opens_block
from .._disk_errors import disk_errors
from .._errors import MountError
from .._lifetime import Lifetime, clean_up_in_thread
from .._paths import open_directory
from .mount_table import Mark, find_own_mounts, mount_id

__all__ = ["OpenScratch", "detach_stale", "open_mount"]

OpenScratch = Callable[[str], AbstractAsyncContextManager[Path]]
"""Reserves the name of a scratch directory of a kind, for a block; see `Scratch.name`."""

# The largest number of lower directories: OVL_MAX_STACK of fs/overlayfs.
_MAX_LAYERS: Final = 500

# Number of searches for a mount's root while another process renames directories on its path.
_ATTEMPTS: Final = 10_000

# The mount point in a scratch directory if no target was given.
_MOUNT_POINT: Final = "root"

_PATH_ONLY: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC

# Numbers of system calls since Linux 5.2, the same on all of Python's machines except Alpha.
# The C library has functions for them only since glibc 2.36.
_MOVE_MOUNT: Final = 429
_FSOPEN: Final = 430
_FSCONFIG: Final = 431
_FSMOUNT: Final = 432
_AT_FDCWD: Final = -100

# linux/mount.h
_FSOPEN_CLOEXEC: Final = 1
_FSMOUNT_CLOEXEC: Final = 1
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_MOVE_MOUNT_BOTH_EMPTY_PATH: Final = 0x04 | 0x40
_MOUNT_ATTR_RDONLY: Final = 0x1
_MOUNT_ATTR_NODEV: Final = 0x4
# sys/mount.h
_MS_RDONLY: Final = 0x1
_MS_NODEV: Final = 0x4
_MNT_DETACH: Final = 0x2


@opens_block
async def open_mount(
    trees: Sequence[Path],
    target: str | os.PathLike[str] | None,
    *,
    scratch: OpenScratch,
    lifetime: Lifetime,
    writable: bool,
) -> AsyncIterator[Path]:
    """Mount a stack of trees for the block; see `RootfsView.mount`.

    Args:
        trees: The layers' tree directories (with ``fs``), the top one last.
        target: The mount point; ``None`` for a new one in a scratch directory.
        scratch: Reserves the name of a scratch directory on the file system of the trees.
        lifetime: The lifetime of the store. Its end unmounts the layers, too.
        writable: Whether the mount can be written.
    """
    async with scratch("mount") as place:
        # absolute() reads the working directory only. The kernel resolves the path, because ".."
        # after a link is not the previous part of the path.
        path = place / _MOUNT_POINT if target is None else Path(target).absolute()  # noqa: ASYNC240
        mount = await trio.to_thread.run_sync(
            partial(_mount, trees, path, place=place, writable=writable)
        )
        unmount = partial(clean_up_in_thread, _RunOnce(partial(_unmount, mount)))
        try:
            # Another process may remove the trees once the store's block is left, so the end of
            # the store's lifetime unmounts.
            with lifetime.own(unmount):
                yield path
        finally:
            await unmount()


@final
class _RunOnce:
    """A step that runs on the first call only."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step: Callable[[], None] | None = step

    def __call__(self) -> None:
        step, self._step = self._step, None
        if step is not None:
            step()


def detach_stale(place: Path) -> None:
    """Unmount the mount that a dead process left in its scratch directory, if any.

    Processes with open files of the mount keep them, but can open no others.
    """
    with ExitStack() as stack:
        try:
            below = os.open(place, _PATH_ONLY | os.O_NOFOLLOW)
            stack.callback(os.close, below)
            while True:
                root = os.open(_MOUNT_POINT, _PATH_ONLY | os.O_NOFOLLOW, dir_fd=below)
                stack.callback(os.close, root)
                if mount_id(root) == mount_id(below):
                    return  # no mount is left on the directory
                _check_result(_libc().umount2(_descriptor_path(root).encode(), _MNT_DETACH))
        except OSError as error:
            # ENOENT: there is no mount. EPERM: we may not unmount. If a mount is there, removing
            # the directory fails and reports it.
            if error.errno not in (errno.ENOENT, errno.EPERM):
                raise


@attrs.frozen
class _Overlay:
    """The parameters of an overlay mount.

    Attributes:
        lower: The lower directories, the top one first.
        upper: The directory for changes; ``None`` for a read-only mount.
        work: A directory for overlayfs itself, on the same file system.
        xattrs: The namespace of overlayfs' own attributes: ``trusted`` or ``user``.
        source: The source of the mount as the kernel shows it.
    """

    lower: Sequence[Path]
    upper: Path | None
    work: Path | None
    xattrs: str
    source: str

    def settings(self) -> list[tuple[str, str | None]]:
        # A hostile layer's attributes must not lead to a file of another name or layer, whatever
        # the kernel's defaults. (The unpacker drops such attributes, too.)
        found: list[tuple[str, str | None]] = [
            ("redirect_dir", "nofollow"),
            ("metacopy", "off"),
            ("index", "off"),
        ]
        if self.xattrs == "user":
            found.append(("userxattr", None))
        if self.upper is not None:
            # The changes are deleted, so unmounting must not wait for the disk.
            found.append(("volatile", None))
        return found


def _mount(trees: Sequence[Path], path: Path, *, place: Path, writable: bool) -> int:
    """Mount on the directory ``path``, and return a descriptor of the mount's root."""
    with disk_errors(place):
        place.mkdir(0o700)
        if path.parent == place:
            path.mkdir()
        mark = Mark.new(trees)
        mark.write(place)
        overlay = _prepare(trees, place, source=mark.source, writable=writable)
    with ExitStack() as stack:
        try:
            target = open_directory(path)
            stack.callback(os.close, target)
            if os.listdir(target):
                # The mount would hide its entries; and it may be another mount already.
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        except OSError as error:
            raise MountError(
                f"cannot mount on {path}: {error.strerror}; name an empty directory, or no target"
            ) from error
        try:
            try:
                return _mount_by_layer(overlay, target)
            except OSError as error:
                # This kernel lacks the calls, or a filter of system calls allows mount(2) only.
                if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
                    raise
                try:
                    _mount_by_page(overlay, target)
                except MountError:
                    # There are too many layers, but without privilege fewer would fail, too.
                    if error.errno == errno.EPERM:
                        raise error from None
                    raise
                return _find_root(overlay.source.encode(), path)
        except OSError as error:
            raise _mount_error(error, len(overlay.lower)) from error


def _unmount(mount: int) -> None:
    """Unmount a mount and all mounts inside it, and close its descriptor.

    The descriptor identifies the mount even if directories were renamed. The mount disappears at
    once. Its open files can be used until they are closed.
    """
    try:
        _unmount_all(mount)
    finally:
        os.close(mount)


def _prepare(trees: Sequence[Path], place: Path, *, source: str, writable: bool) -> _Overlay:
    """Choose the lower directories, and make the other directories in ``place``."""
    xattrs = _overlay_xattrs(place)
    lower: dict[Path, None] = {}
    for tree in reversed(trees):
        # The kernel takes a tree only once. The upper one of two equal trees hides the lower.
        lower[tree / "fs"] = None
        # overlayfs ignores the opaque attribute of a layer's root.
        if _is_opaque(tree / "fs", xattrs):
            break
    # Without an upper directory, overlayfs requires two lower ones.
    while len(lower) < (1 if writable else 2):
        empty = place / f"empty{len(lower)}"
        empty.mkdir(0o755)
        lower[empty] = None
    if len(lower) > _MAX_LAYERS:
        raise MountError(
            f"cannot mount {len(lower)} layers: Linux mounts at most {_MAX_LAYERS}; "
            "use export() instead"
        )
    if not writable:
        return _Overlay(tuple(lower), None, None, xattrs, source)
    upper, work = place / "upper", place / "work"
    work.mkdir()
    upper.mkdir()
    # overlayfs shows the upper directory's metadata at the root.
    root = next(iter(lower))
    status = root.stat()
    os.chown(upper, status.st_uid, status.st_gid)
    shutil.copystat(root, upper)
    return _Overlay(tuple(lower), upper, work, xattrs, source)


def _overlay_xattrs(place: Path) -> str:
    """Return the namespace of overlayfs' attributes, the same as when the trees were made."""
    for namespace in ("trusted", "user"):
        try:
            os.setxattr(place, f"{namespace}.overlay.opaque", b"y")
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EINVAL, errno.ENOTSUP):
                raise
        else:
            return namespace
    raise MountError(
        f"cannot mount layers in {place.parent}: its file system has no extended attributes, which "
        "mark opaque directories; use export() instead, or a store on another file system"
    )


def _is_opaque(root: Path, xattrs: str) -> bool:
    try:
        return os.getxattr(root, f"{xattrs}.overlay.opaque") == b"y"
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return False


def _mount_by_layer(overlay: _Overlay, target: int) -> int:
    """Mount with fsconfig(2) (Linux 6.8), and return a descriptor of the mount's root."""
    with ExitStack() as stack:
        context = _syscall(_FSOPEN, b"overlay", _FSOPEN_CLOEXEC)
        stack.callback(os.close, context)

        def set_string(key: str, value: str) -> None:
            _syscall(_FSCONFIG, context, _FSCONFIG_SET_STRING, key.encode(), value.encode(), 0)

        def set_directory(key: str, path: Path) -> None:
            # The kernel opens the path at once, so one descriptor at a time is enough.
            with ExitStack() as while_set:
                set_string(key, _descriptor_path(_open_path(while_set, path)))

        set_string("source", overlay.source)
        for path in overlay.lower:
            set_directory("lowerdir+", path)
        if overlay.upper is not None and overlay.work is not None:
            set_directory("upperdir", overlay.upper)
            set_directory("workdir", overlay.work)
        for key, value in overlay.settings():
            if value is None:
                _syscall(_FSCONFIG, context, _FSCONFIG_SET_FLAG, key.encode(), None, 0)
            else:
                set_string(key, value)
        _syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        flags = _MOUNT_ATTR_NODEV | (_MOUNT_ATTR_RDONLY if overlay.upper is None else 0)
        mount = _syscall(_FSMOUNT, context, _FSMOUNT_CLOEXEC, flags)
    try:
        _syscall(_MOVE_MOUNT, mount, b"", target, b"", _MOVE_MOUNT_BOTH_EMPTY_PATH)
    except BaseException:
        os.close(mount)
        raise
    return mount


def _mount_by_page(overlay: _Overlay, target: int) -> None:
    """Mount with mount(2), which takes at most one page of options."""
    with ExitStack() as stack:
        names = [_descriptor_path(_open_path(stack, path)) for path in overlay.lower]
        options = [f"lowerdir={':'.join(names)}"]
        if overlay.upper is not None and overlay.work is not None:
            options.append(f"upperdir={_descriptor_path(_open_path(stack, overlay.upper))}")
            options.append(f"workdir={_descriptor_path(_open_path(stack, overlay.work))}")
        options += [k if v is None else f"{k}={v}" for k, v in overlay.settings()]
        data = ",".join(options).encode()
        page = os.sysconf("SC_PAGESIZE")
        if len(data) >= page:
            raise MountError(
                f"cannot mount {len(names)} layers: their names exceed the {page} bytes of options "
                "that this kernel takes; use Linux 6.8 or later, or export() instead"
            )
        flags = _MS_NODEV | (_MS_RDONLY if overlay.upper is None else 0)
        source, point = overlay.source.encode(), _descriptor_path(target).encode()
        _check_result(_libc().mount(source, point, b"overlay", _long(flags), data))


def _find_root(source: bytes, path: Path) -> int:
    """Open the root of the mount with this source at ``path``.

    The path may lead to another mount by now, if other users can rename directories on it. The
    function therefore accepts a descriptor only if it belongs to the mount.

    Raises:
        MountError: if the root is not found in `_ATTEMPTS` searches.
    """
    for _ in range(_ATTEMPTS):
        mounts = [mount for mount in find_own_mounts() if mount.source == source]
        if not mounts:
            break  # another process has unmounted it
        for point in (os.fsencode(path), *(mount.point for mount in mounts)):
            try:
                root = os.open(point, _PATH_ONLY)
            except OSError:
                continue
            if mount_id(root) in [mount.id for mount in mounts]:
                return root
            os.close(root)
    raise MountError(
        f"cannot find the mount on {path}: the path has changed since the layers were mounted; "
        f"unmount the mounts that 'findmnt --source {source.decode()}' shows, and give a target "
        "that other users cannot rename"
    )


def _mount_error(error: OSError, layers: int) -> MountError:
    if error.errno in (errno.EPERM, errno.EACCES):
        return MountError(
            "cannot mount layers: the process must be root on the machine or in a user and mount "
            "namespace; run it in 'unshare --user --map-root-user --mount' with a store of its "
            "own, or use export() instead"
        )
    if error.errno == errno.ENODEV:
        return MountError(
            "cannot mount layers: this kernel has no overlayfs; load it, or use export() instead"
        )
    return MountError(
        f"cannot mount {layers} layers: {error.strerror} (dmesg may show the reason); keep the "
        "store on a local file system that is not an overlay, or use export() instead"
    )


def _open_path(stack: ExitStack, path: Path) -> int:
    """Open a directory as a reference (``O_PATH``); ``stack`` closes the descriptor."""
    descriptor = os.open(path, _PATH_ONLY)
    stack.callback(os.close, descriptor)
    return descriptor


def _descriptor_path(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _unmount_all(mount: int) -> None:
    """Unmount the mount of a descriptor, after all mounts on top of it.

    A path may lead to another mount by now, so the function uses the descriptor.
    """
    try:
        while True:
            _check_result(_libc().umount2(_descriptor_path(mount).encode(), _MNT_DETACH))
    except OSError as error:
        if error.errno != errno.EINVAL:  # no mount is left
            raise


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _long(value: int) -> ctypes.c_long:
    return ctypes.c_long(value)


def _syscall(number: int, *args: int | bytes | None) -> int:
    # syscall(2) is variadic, so each argument needs the width of a register.
    whole = (_long(arg) if isinstance(arg, int) else ctypes.c_char_p(arg) for arg in args)
    result: int = _libc().syscall(_long(number), *whole)
    _check_result(result)
    return result


def _check_result(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
