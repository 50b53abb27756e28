"""Limits on the size of a layer and of the things in it."""

from __future__ import annotations

from typing import TypeVar

import attrs

from .._compression import DEFAULT_MAX_MEMBERS, DEFAULT_MAX_WINDOW
from .._errors import LimitExceeded
from .._printable import printable_path

__all__ = ["Limits"]

_T = TypeVar("_T", bound=int)


def _not_negative(_: object, attribute: attrs.Attribute[_T], value: _T) -> None:
    if value < 0:
        raise ValueError(f"{attribute.name} must not be negative, but is {value}")


@attrs.frozen(kw_only=True)
class Limits:
    """Limits on the size of a layer and of the things in it.

    A layer that exceeds a limit fails with `LimitExceeded` before the excess is on the disk. The
    defaults are far above the needs of real images, and low enough to stop a hostile layer soon.
    All limits are checked while the layer streams: no check needs memory or the layer's end.

    Attributes:
        max_unpacked_bytes: Bytes in the layer's decompressed tar and in the holes of its sparse
            files, together. The default is 1 TiB.
        max_ratio: Bytes of tar and holes for each byte of the blob, at any point of the blob, once
            there are more than ``max_ratio_from`` bytes. The default is 10,000: deflate reaches
            at most 1,032, but zstd compresses a block of 131,072 zeros to one byte, and a hole
            costs nothing.
        max_ratio_from: Bytes of tar and holes that are allowed at any ratio. The default is
            16 GiB, so that an image may contain an empty virtual disk.
        max_entries: Entries in the tar, directories without an entry, and, for each link to a
            file in the layers below, the other names of this file. The default is 10 million.
        max_members: Compressed members (gzip), frames (zstd) or streams (bzip2, xz) in the blob,
            beyond one for each 512 bytes of tar. The default is 10,000: formats with one member
            for each file stay below it, and an empty member takes as long as hundreds of
            kilobytes of content.
        max_path: Bytes in a path, both before and after links in it are resolved. The default
            is 4,095, the longest path that a Linux system call takes (``PATH_MAX`` without the
            NUL).
        max_depth: Components in such a path. The default is 512: several times the depth that
            build tools make, and low enough for programs that walk a tree by recursion (Python's
            ``shutil.rmtree`` gives up below a thousand).
        max_header: Bytes in one extended header, or in the map of one sparse file. The default
            is 1 MiB, as in Go's reader. One header contains all xattrs of an entry.
        max_xattr: Bytes in the value of one extended attribute. The default is 64 KiB, as in
            Linux (``XATTR_SIZE_MAX``).
        max_window: Bytes of earlier output that zstd and xz may keep in memory. The default is
            128 MiB, which is enough for ``zstd --ultra -22`` and twice the need of ``xz -9``.
            moby and containerd allow zstd up to 512 MiB (klauspost/compress, ``MaxWindowSize``).

    Raises:
        ValueError: If a limit is negative.
    """

    max_unpacked_bytes: int = attrs.field(default=1 << 40, validator=_not_negative)
    max_ratio: int = attrs.field(default=10_000, validator=_not_negative)
    max_ratio_from: int = attrs.field(default=1 << 34, validator=_not_negative)
    max_entries: int = attrs.field(default=10_000_000, validator=_not_negative)
    max_members: int = attrs.field(default=DEFAULT_MAX_MEMBERS, validator=_not_negative)
    max_path: int = attrs.field(default=4095, validator=_not_negative)
    max_depth: int = attrs.field(default=512, validator=_not_negative)
    max_header: int = attrs.field(default=1 << 20, validator=_not_negative)
    max_xattr: int = attrs.field(default=1 << 16, validator=_not_negative)
    max_window: int = attrs.field(default=DEFAULT_MAX_WINDOW, validator=_not_negative)

    def check_path(self, path: bytes) -> None:
        """Check the length and depth of a path relative to the root.

        Raises:
            LimitExceeded: If the path is too long or too deep.
        """
        if len(path) > self.max_path:
            raise LimitExceeded(
                f"{printable_path(path)}: the path has {len(path)} bytes; "
                f"the limit max_path is {self.max_path}"
            )
        if path.count(b"/") >= self.max_depth:
            raise LimitExceeded(
                f"{printable_path(path)}: the path has {path.count(b'/') + 1} components; "
                f"the limit max_depth is {self.max_depth}"
            )
