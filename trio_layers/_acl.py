"""POSIX access control lists, in the form of extended attributes."""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["ACCESS_ACL", "DEFAULT_ACL", "apply_mode_to_acl"]

ACCESS_ACL: Final = "system.posix_acl_access"
DEFAULT_ACL: Final = "system.posix_acl_default"

# The tags of an ACL's entries (Linux, ``include/uapi/linux/posix_acl.h``).
_USER_OBJ, _GROUP_OBJ, _MASK, _OTHER = 1, 4, 16, 32
_NAMED_TAGS: Final = (2, 8)


def apply_mode_to_acl(xattrs: dict[str, bytes], mode: int) -> None:
    """Adjust the access ACL in ``xattrs`` as a later chmod to ``mode`` does on a file.

    The chmod sets the ACL's mask and its entries for the owner and for others (acl(5)). The
    kernel drops an ACL that says no more than the mode. An invalid ACL stays as it is.
    """
    acl = xattrs[ACCESS_ACL]
    if len(acl) < 4 or len(acl) % 8 != 4 or acl[:4] != b"\2\0\0\0":
        return
    entries = list(struct.iter_unpack("<HHI", acl[4:]))
    tags = {tag for tag, _, _ in entries}
    if tags <= {_USER_OBJ, _GROUP_OBJ, _OTHER}:
        if len(entries) in (0, 3):
            del xattrs[ACCESS_ACL]
        return
    bits = {_USER_OBJ: mode >> 6 & 7, _MASK: mode >> 3 & 7, _OTHER: mode & 7}
    fitted = (
        struct.pack("<HHI", tag, bits.get(tag, rights), id if tag in _NAMED_TAGS else 0xFFFFFFFF)
        for tag, rights, id in entries
    )
    xattrs[ACCESS_ACL] = acl[:4] + b"".join(fitted)
