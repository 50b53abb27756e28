"""Tests what this process may do in a directory, such as change owners or make devices."""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

import attrs

__all__ = ["OVERRIDE", "Capabilities", "probe"]

OVERRIDE: Final = "user.containers.override_stat"

_PROBE_NAME: Final = b".probe"
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@attrs.frozen(kw_only=True)
class Capabilities:
    """The abilities of this process in a directory.

    Attributes:
        new_file_owner: Owner and group of a new file; ``None`` if its directory decides them.
        exact_modes: Whether a new file gets exactly the requested mode, because there is no umask.
        can_chown: Whether the process can change owners, at least to IDs in its user namespace.
        ignores_modes: Whether the process can open files against their mode, as root can.
        can_make_devices: Whether the process can make device nodes.
        can_make_whiteouts: Whether it can make the character device 0/0, overlayfs' whiteout.
        overlay_prefix: The prefix of overlayfs' own xattrs, ``trusted.overlay.`` or
            ``user.overlay.``; ``None`` if the process can set neither.
        can_set_override: Whether it can set ``user.containers.override_stat``.
    """

    new_file_owner: tuple[int, int] | None
    exact_modes: bool
    can_chown: bool
    ignores_modes: bool
    can_make_devices: bool
    can_make_whiteouts: bool
    overlay_prefix: str | None
    can_set_override: bool

    @property
    def limited(self) -> bool:
        """Whether the process may be unable to set some owner or mode or to make a device."""
        return not (self.can_chown and self.ignores_modes and self.can_make_devices)


def probe(directory: int) -> Capabilities:
    """Test the abilities in an open directory, with files that are removed again."""
    os.mkdir(_PROBE_NAME, 0o700, dir_fd=directory)
    try:
        descriptor = os.open(_PROBE_NAME, _DIRECTORY_FLAGS, dir_fd=directory)
        try:
            overlay_prefix = None
            for prefix in ("trusted.overlay.", "user.overlay."):
                if _can_set_xattr(descriptor, prefix + "opaque"):
                    overlay_prefix = prefix
                    break
            can_set_override = _can_set_xattr(descriptor, OVERRIDE)
            can_chown, new_file_owner, exact_modes = _probe_owners(descriptor)
            os.fchmod(descriptor, 0)
            try:
                os.close(os.open(b".", _DIRECTORY_FLAGS, dir_fd=descriptor))
                ignores_modes = True
            except PermissionError:
                ignores_modes = False
            os.fchmod(descriptor, 0o700)
        finally:
            os.close(descriptor)
    finally:
        os.rmdir(_PROBE_NAME, dir_fd=directory)
    return Capabilities(
        new_file_owner=new_file_owner,
        exact_modes=exact_modes,
        can_chown=can_chown,
        ignores_modes=ignores_modes,
        can_make_devices=_can_make_device(directory, os.makedev(1, 3)),
        can_make_whiteouts=_can_make_device(directory, os.makedev(0, 0)),
        overlay_prefix=overlay_prefix,
        can_set_override=can_set_override,
    )


def _probe_owners(directory: int) -> tuple[bool, tuple[int, int] | None, bool]:
    """Return ``can_chown``, ``new_file_owner`` and ``exact_modes``, tested in a directory.

    The directory is only for this test: its owner and mode change.
    """
    # The directory may have inherited its group from the store's directory.
    os.fchmod(directory, 0o700)
    now = os.fstat(directory)
    other = (now.st_uid + 1, now.st_gid + 1)
    try:
        os.chown(directory, *other)
    except OSError as error:
        # EINVAL: we are root in a user namespace without these IDs, but maybe with others.
        if error.errno == errno.EINVAL:
            return True, None, False
        return False, *_probe_new_file(directory)
    new_file_owner, exact_modes = _probe_new_file(directory)
    if new_file_owner is not None and new_file_owner[1] == other[1]:
        # On a mount with "grpid", each file inherits its directory's group.
        new_file_owner = None
    os.chown(directory, now.st_uid, now.st_gid)
    return True, new_file_owner, exact_modes


def _can_set_xattr(descriptor: int, attribute: str) -> bool:
    try:
        os.setxattr(descriptor, attribute, b"y")
    except OSError:
        return False
    return True


def _can_make_device(directory: int, device: int) -> bool:
    try:
        os.mknod(_PROBE_NAME, stat.S_IFCHR | 0o600, device, dir_fd=directory)
    except OSError:
        return False
    os.unlink(_PROBE_NAME, dir_fd=directory)
    return True


def _probe_new_file(directory: int) -> tuple[tuple[int, int] | None, bool]:
    """Return a new file's owner and group, and whether it has the requested mode."""
    try:
        os.mknod(_PROBE_NAME, stat.S_IFREG | 0o777, dir_fd=directory)
    except OSError:
        return None, False
    now = os.stat(_PROBE_NAME, dir_fd=directory, follow_symlinks=False)
    os.unlink(_PROBE_NAME, dir_fd=directory)
    return (now.st_uid, now.st_gid), stat.S_IMODE(now.st_mode) == 0o777
