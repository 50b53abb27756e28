"""How much a layer may hold."""

from __future__ import annotations

from typing import TypeVar

import attrs

from .._compression import MAX_MEMBERS, MAX_WINDOW
from .._errors import LimitExceeded
from .._printable import printable_path

__all__ = ["Limits"]

_T = TypeVar("_T", bound=int)


def _not_negative(_: object, attribute: attrs.Attribute[_T], value: _T) -> None:
    if value < 0:
        raise ValueError(f"{attribute.name} must not be negative, but is {value}")


@attrs.frozen(kw_only=True)
class Limits:
    """How much a layer may hold. More is a `LimitExceeded`, before it is on the disk.

    The defaults are far above what images have, and low enough that a layer that was made to
    harm ends soon. Numbers are whole and not negative, else it is a `ValueError`. All are looked
    at while a layer streams by: none takes memory, and none waits for the layer's end.

    Attributes:
        max_unpacked_bytes: Of the layer's tar, decompressed, and of the holes in its sparse
            files, together. 1 TiB.
        max_ratio: How many bytes of tar and holes may come of one byte of the blob, at any
            point of it, once there are more than ``max_ratio_from``. 10,000: deflate cannot do
            more than 1,032, but zstd makes a block of one byte of 131,072 zeros, and a hole
            costs nothing.
        max_ratio_from: The bytes of tar and holes that are never too many for their blob.
            16 GiB, so that an image may have a disk that is still empty.
        max_entries: Entries in the tar, directories without an entry, and, for each link to a
            file in the layers below, the other names of this file. 10
            million.
        max_members: Compressed members (gzip), frames (zstd) or streams (bzip2, xz) in the blob,
            beyond one for each 512 bytes of tar. The default is 10,000: formats with one member
            for each file stay below it, and an empty member takes as long as hundreds of
            kilobytes of content.
        max_path: Bytes in a path, links on the way resolved or not. 4,095, which is all that a
            Linux system call takes (``PATH_MAX`` without the NUL).
        max_depth: Components in such a path. 512: several times what build tools make, and few
            enough for programs that walk a tree by recursion (Python's ``shutil.rmtree`` gives
            up below a thousand).
        max_header: Bytes in one extended header, or in the map of one sparse file. 1 MiB, as
            in Go's reader. All xattrs of an entry are in one header.
        max_xattr: Bytes in the value of one extended attribute. 64 KiB, as in Linux
            (``XATTR_SIZE_MAX``).
        max_window: Bytes of memory that zstd and xz may ask for to look back on what they gave.
            128 MiB, which is what ``zstd --ultra -22`` and, twice over, ``xz -9`` need. moby and
            containerd give zstd up to 512 MiB (klauspost/compress, ``MaxWindowSize``).
    """

    max_unpacked_bytes: int = attrs.field(default=1 << 40, validator=_not_negative)
    max_ratio: int = attrs.field(default=10_000, validator=_not_negative)
    max_ratio_from: int = attrs.field(default=1 << 34, validator=_not_negative)
    max_entries: int = attrs.field(default=10_000_000, validator=_not_negative)
    max_members: int = attrs.field(default=MAX_MEMBERS, validator=_not_negative)
    max_path: int = attrs.field(default=4095, validator=_not_negative)
    max_depth: int = attrs.field(default=512, validator=_not_negative)
    max_header: int = attrs.field(default=1 << 20, validator=_not_negative)
    max_xattr: int = attrs.field(default=1 << 16, validator=_not_negative)
    max_window: int = attrs.field(default=MAX_WINDOW, validator=_not_negative)

    def check_path(self, path: bytes) -> None:
        """Raise `LimitExceeded` if a path, relative to the root, is too long or too deep."""
        if len(path) > self.max_path:
            raise LimitExceeded(
                f"{printable_path(path)}: a path of {len(path)} bytes; the limit max_path is {self.max_path}"
            )
        if path.count(b"/") >= self.max_depth:
            raise LimitExceeded(
                f"{printable_path(path)}: a path of {path.count(b'/') + 1} components; "
                f"the limit max_depth is {self.max_depth}"
            )
