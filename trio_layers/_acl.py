"""POSIX access control lists, as the extended attributes hold them."""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["ACCESS_ACL", "DEFAULT_ACL", "fit_acl"]

ACCESS_ACL: Final = "system.posix_acl_access"
DEFAULT_ACL: Final = "system.posix_acl_default"

# The tags of an ACL's entries (Linux, ``include/uapi/linux/posix_acl.h``).
_USER_OBJ, _GROUP_OBJ, _MASK, _OTHER = 1, 4, 16, 32
_NAMED: Final = (2, 8)


def fit_acl(xattrs: dict[str, bytes], mode: int) -> None:
    """Make the access ACL among ``xattrs`` what it is on a file that is given ``mode`` after it:
    its entries for the owner, for others, and its mask are those of the mode (acl(5)). The kernel
    keeps none that says no more than the mode. One that is not valid stays as it is.
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
        struct.pack("<HHI", tag, bits.get(tag, rights), id if tag in _NAMED else 0xFFFFFFFF)
        for tag, rights, id in entries
    )
    xattrs[ACCESS_ACL] = acl[:4] + b"".join(fitted)
