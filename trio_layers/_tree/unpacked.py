"""The result of unpacking a layer, and the parents on which it is valid."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs

from .._digest import DiffID
from .._entries import Entry
from .unfinished import implied_directory

if TYPE_CHECKING:
    from ..abc import LowerTree

__all__ = ["Unpacked", "assumptions_hold"]


@attrs.frozen(kw_only=True)
class Unpacked:
    """A layer that was unpacked.

    Attributes:
        diff_id: The digest of the layer's tar.
        size: The tar's length in bytes, including all bytes after its end.
        entries: The number of entries in the tar.
        assumed: Assumptions about the parent (see `assumptions_hold`). Empty if the layer was
            unpacked on top of its parent.
        needs_lower: The tree is not complete: the layer must be unpacked on top of its parent.
        incomplete: The tree lacks metadata from the list of entries, because the process had no
            privilege to set it or because Linux has no such attribute.
        foreign_only: Attributes that Linux does not have are the only cause of ``incomplete``.
    """

    diff_id: DiffID
    size: int
    entries: int
    assumed: tuple[bytes, ...]
    needs_lower: bool
    incomplete: bool
    foreign_only: bool = False


def assumptions_hold(assumed: Iterable[bytes], lower: LowerTree) -> bool:
    """Return whether a tree that was unpacked without its parent is valid on a parent.

    Args:
        assumed: The assumptions. A path stands for a directory that was made without an entry: the
            parent must have no such path, or a directory with the same metadata. A path with a
            slash at its end stands for a directory with whiteouts in it: it must be a directory of
            the parent.
        lower: The parent, merged with all trees below it.
    """
    assumed = tuple(assumed)
    there = lower.survey(path.removesuffix(b"/") for path in assumed)
    for path in assumed:
        below = there[path.removesuffix(b"/")]
        if path.endswith(b"/"):
            if below is None or below.type != "dir":
                return False
        elif below is not None and _differs_from_implied(below):
            return False
    return True


def _differs_from_implied(below: Entry) -> bool:
    made = implied_directory(below.path)
    return (below.type, below.mode, below.uid, below.gid, below.xattrs) != (
        made.type,
        made.mode,
        made.uid,
        made.gid,
        made.xattrs,
    )
