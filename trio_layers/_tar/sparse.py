"""The maps of sparse files: which parts of one are in the archive.

GNU tar's manual, "Storing Sparse Files", has the four formats: GNU's own, and PAX 0.0, 0.1, 1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from .._errors import LimitExceeded, UnpackError
from .._printable import printable_path
from .fields import BLOCK, damaged, decimal, number

__all__ = ["SparseMap", "gnu_map", "is_sparse", "pax_map"]

SparseMap = tuple[list[int], int]
"""Offset and length of each part, in turn; the size of the file."""

_PREFIX: Final = b"GNU.sparse."
_WHAT: Final = "sparse map"


def is_sparse(keys: Iterable[bytes]) -> bool:
    """Whether records with these keys speak of a sparse file."""
    return any(key.startswith(_PREFIX) for key in keys)


def gnu_map(header: bytes, name: bytes, read: Callable[[int], bytes], max_bytes: int) -> SparseMap:
    """The map of an entry of type ``S``, which goes on in blocks that ``read`` gives."""
    if header[257:265] != b"ustar  \0":
        # In star's archives this type has another layout.
        raise damaged(name, "a sparse file, but not in GNU's format")
    numbers: list[int] = []
    area, more = header[386:482], header[482]
    while True:
        for start in range(0, len(area), 24):
            # The end as GNU and BSD tar see it.
            if not area[start]:
                break
            numbers.append(number(area[start : start + 12], name, _WHAT))
            numbers.append(number(area[start + 12 : start + 24], name, _WHAT))
        if not more:
            return numbers, number(header[483:495], name, "size")
        if len(numbers) * 12 > max_bytes:
            raise _too_long(name, max_bytes)
        block = read(BLOCK)
        if len(block) < BLOCK:
            raise damaged(name, "its sparse map ends early")
        area, more = block[:504], block[504]


def pax_map(
    pax: Mapping[bytes, bytes], name: bytes, read: Callable[[int], bytes], max_bytes: int
) -> SparseMap:
    """The map that is in records or, in format 1.0, at the beginning of the data, which ``read``
    gives or raises.
    """
    keys = (b"GNU.sparse.size", b"GNU.sparse.realsize")
    sizes = {decimal(pax[key], name, "size") for key in keys if key in pax}
    if len(sizes) != 1:
        raise damaged(name, "a sparse file of no size, or of two")
    size = sizes.pop()
    version = (pax.get(b"GNU.sparse.major"), pax.get(b"GNU.sparse.minor"))
    if version == (b"1", b"0"):
        return _map_in_data(name, read, max_bytes), size
    if version not in ((None, None), (b"0", b"0"), (b"0", b"1")):
        raise damaged(name, "a sparse file of an unknown version")
    # One that has no data at all may have an empty map, of which no record is left.
    text = pax.get(b"GNU.sparse.map")
    numbers = [decimal(each, name, _WHAT) for each in text.split(b",")] if text else []
    blocks = pax.get(b"GNU.sparse.numblocks")
    if blocks is None or 2 * decimal(blocks, name, _WHAT) != len(numbers):
        raise damaged(name, "its sparse map is not as long as it says")
    return numbers, size


def _map_in_data(name: bytes, read: Callable[[int], bytes], max_bytes: int) -> list[int]:
    """Decimal numbers, a line each, the first the number of pairs, padded to a block."""
    text = bytearray()
    lines = 0
    wanted = 1
    while lines < wanted:
        if len(text) >= max_bytes:
            raise _too_long(name, max_bytes)
        block = read(BLOCK)
        text += block
        lines += block.count(b"\n")
        if wanted == 1 and lines:
            count = decimal(bytes(text[: text.index(b"\n")]), name, _WHAT)
            # No pair is shorter than four bytes.
            if count > max_bytes // 4:
                raise _too_long(name, max_bytes)
            if count < 0:
                raise damaged(name, "its sparse map has a negative length")
            wanted += 2 * count
    return [decimal(line, name, _WHAT) for line in bytes(text).split(b"\n", wanted)[1:wanted]]


def _too_long(name: bytes, max_bytes: int) -> UnpackError:
    return LimitExceeded(
        f"{printable_path(name)}: the map of a sparse file is longer than the limit max_header, "
        f"{max_bytes}, allows"
    )
