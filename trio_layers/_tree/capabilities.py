"""What this process can do in a directory: found out, not guessed."""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

import attrs

__all__ = ["OVERRIDE", "Capabilities", "probe"]

OVERRIDE: Final = "user.containers.override_stat"

_PROBE: Final = b".probe"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@attrs.frozen(kw_only=True)
class Capabilities:
    """What this process can do in a directory.

    Attributes:
        ids: Whom a new file belongs to, as owner and group; ``None`` if that depends on the
            directory it is made in.
        modes: Make a file with the very mode that it is made with: there is no umask.
        owners: Give files to others, to those at least that its user namespace knows.
        root: Reach what a mode would keep from it, as root does.
        devices: Make device nodes.
        whiteouts: Make the character device 0/0, overlayfs' whiteout.
        overlay: The prefix of overlayfs' own xattrs, ``trusted.overlay.`` or ``user.overlay.``;
            ``None`` if neither can be set.
        override: Set ``user.containers.override_stat``.
    """

    ids: tuple[int, int] | None
    modes: bool
    owners: bool
    root: bool
    devices: bool
    whiteouts: bool
    overlay: str | None
    override: bool

    @property
    def limited(self) -> bool:
        """Whether some owner, mode or device may be out of reach."""
        return not (self.owners and self.root and self.devices)


def probe(directory: int) -> Capabilities:
    """Try what can be done in an open directory; what is made for it is removed again."""
    os.mkdir(_PROBE, 0o700, dir_fd=directory)
    try:
        descriptor = os.open(_PROBE, _DIRECTORY, dir_fd=directory)
        try:
            overlay = None
            for prefix in ("trusted.overlay.", "user.overlay."):
                if _can_set_xattr(descriptor, prefix + "opaque"):
                    overlay = prefix
                    break
            override = _can_set_xattr(descriptor, OVERRIDE)
            owners, ids, modes = _probe_owners(descriptor)
            os.fchmod(descriptor, 0)
            try:
                os.close(os.open(b".", _DIRECTORY, dir_fd=descriptor))
                root = True
            except PermissionError:
                root = False
            os.fchmod(descriptor, 0o700)
        finally:
            os.close(descriptor)
    finally:
        os.rmdir(_PROBE, dir_fd=directory)
    return Capabilities(
        ids=ids,
        modes=modes,
        owners=owners,
        root=root,
        devices=_can_make_device(directory, os.makedev(1, 3)),
        whiteouts=_can_make_device(directory, os.makedev(0, 0)),
        overlay=overlay,
        override=override,
    )


def _probe_owners(directory: int) -> tuple[bool, tuple[int, int] | None, bool]:
    """`Capabilities.owners`, `Capabilities.ids` and `Capabilities.modes`, tried in a directory that is of no further
    use.
    """
    # The group of the directory that the store is in may have been passed on to it.
    os.fchmod(directory, 0o700)
    now = os.fstat(directory)
    other = (now.st_uid + 1, now.st_gid + 1)
    try:
        os.chown(directory, *other)
    except OSError as error:
        # EINVAL: root of a user namespace that does not have these, and may have more.
        if error.errno == errno.EINVAL:
            return True, None, False
        return False, *_probe_new_file(directory)
    ids, modes = _probe_new_file(directory)
    if ids is not None and ids[1] == other[1]:
        # A mount with "grpid": each directory passes on its group.
        ids = None
    os.chown(directory, now.st_uid, now.st_gid)
    return True, ids, modes


def _can_set_xattr(descriptor: int, attribute: str) -> bool:
    try:
        os.setxattr(descriptor, attribute, b"y")
    except OSError:
        return False
    return True


def _can_make_device(directory: int, device: int) -> bool:
    try:
        os.mknod(_PROBE, stat.S_IFCHR | 0o600, device, dir_fd=directory)
    except OSError:
        return False
    os.unlink(_PROBE, dir_fd=directory)
    return True


def _probe_new_file(directory: int) -> tuple[tuple[int, int] | None, bool]:
    """Whom a new file belongs to, and whether it has the mode it was made with."""
    try:
        os.mknod(_PROBE, stat.S_IFREG | 0o777, dir_fd=directory)
    except OSError:
        return None, False
    now = os.stat(_PROBE, dir_fd=directory, follow_symlinks=False)
    os.unlink(_PROBE, dir_fd=directory)
    return (now.st_uid, now.st_gid), stat.S_IMODE(now.st_mode) == 0o777
