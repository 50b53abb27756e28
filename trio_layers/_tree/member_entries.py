"""Turns members of an archive into entries of a tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .._acl import ACCESS_ACL, apply_mode_to_acl
from .._entries import Entry, EntryType
from .._errors import UnpackError
from .._printable import printable_path
from .._tar.reader import Member

__all__ = ["entry_from_member", "is_linux_xattr", "path_components", "xattrs_from_member"]

_NAMESPACES: Final = frozenset({"user", "trusted", "security", "system"})
# overlayfs obeys these attributes in its layers, so an image's layer must not set them.
_PRIVATE: Final = ("trusted.overlay.", "user.overlay.")


def path_components(name: bytes) -> list[bytes]:
    """Split a member's name into its components, relative to the root.

    Raises:
        UnpackError: If the name leads out of the root or contains a NUL.
    """
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                raise UnpackError(f"{printable_path(name)}: the path leads out of the root")
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    if b"\0" in name:
        raise UnpackError(f"{printable_path(name)}: the path contains a NUL")
    return parts


def is_linux_xattr(attribute: str) -> bool:
    """Return whether Linux supports an extended attribute's namespace.

    See xattr(7), "Extended attribute namespaces". Archives from other systems have other
    attributes, such as ``com.apple.provenance``. The list of entries and exported tars contain
    these, but no file gets them.
    """
    namespace, dot, name = attribute.partition(".")
    return namespace in _NAMESPACES and bool(dot and name)


def xattrs_from_member(member: Member) -> Mapping[str, bytes]:
    """Return the attributes of a member that belong in a tree's list of entries."""
    if not member.xattrs:
        return member.xattrs
    xattrs = {k: v for k, v in member.xattrs.items() if not k.startswith(_PRIVATE)}
    if ACCESS_ACL in xattrs:
        apply_mode_to_acl(xattrs, member.mode)
    return xattrs


def entry_from_member(member: Member, path: bytes, kind: EntryType) -> Entry:
    """Return the entry for a member at the real path ``path``."""
    return Entry(
        path=path,
        type=kind,
        mode=0o777 if kind == "symlink" else member.mode,
        uid=member.uid,
        gid=member.gid,
        mtime_ns=member.mtime_ns,
        linkname=member.linkname if kind == "symlink" else None,
        dev=member.dev if kind in ("char", "block") else None,
        xattrs=xattrs_from_member(member),
    )
