"""Reads the maps of sparse files, which list the parts that are in the archive.

GNU tar's manual, "Storing Sparse Files", has the four formats: GNU's own, and PAX 0.0, 0.1, 1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from .._errors import LimitExceeded, UnpackError
from .._printable import printable_path
from .fields import BLOCK, damaged_entry, parse_decimal, parse_number

__all__ = ["SparseMap", "has_sparse_keys", "read_gnu_map", "read_pax_map"]

SparseMap = tuple[list[int], int]
"""The offset and length of each part, in turn, and the size of the file."""

_SPARSE_PREFIX: Final = b"GNU.sparse."
_MAP_FIELD: Final = "sparse map"


def has_sparse_keys(keys: Iterable[bytes]) -> bool:
    """Return whether records with these keys describe a sparse file."""
    return any(key.startswith(_SPARSE_PREFIX) for key in keys)


def read_gnu_map(
    header: bytes, name: bytes, read: Callable[[int], bytes], max_bytes: int
) -> SparseMap:
    """Read the map of an entry of type ``S`` from its header and the blocks after it."""
    if header[257:265] != b"ustar  \0":
        # In star's archives this type has another layout.
        raise damaged_entry(name, "its sparse map is not in GNU's format")
    numbers: list[int] = []
    area, more = header[386:482], header[482]
    while True:
        for start in range(0, len(area), 24):
            # GNU and BSD tar end the map here.
            if not area[start]:
                break
            numbers.append(parse_number(area[start : start + 12], name, _MAP_FIELD))
            numbers.append(parse_number(area[start + 12 : start + 24], name, _MAP_FIELD))
        if not more:
            return numbers, parse_number(header[483:495], name, "size")
        if len(numbers) * 12 > max_bytes:
            raise _map_too_long(name, max_bytes)
        block = read(BLOCK)
        if len(block) < BLOCK:
            raise damaged_entry(name, "its sparse map ends early")
        area, more = block[:504], block[504]


def read_pax_map(
    pax: Mapping[bytes, bytes], name: bytes, read: Callable[[int], bytes], max_bytes: int
) -> SparseMap:
    """Read the map from PAX records or, in format 1.0, from the beginning of the data.

    ``read`` returns exactly as many bytes of the data as requested, or raises.
    """
    keys = (b"GNU.sparse.size", b"GNU.sparse.realsize")
    sizes = {parse_decimal(pax[key], name, "size") for key in keys if key in pax}
    if len(sizes) != 1:
        raise damaged_entry(name, "its sparse map has no file size, or two different ones")
    size = sizes.pop()
    version = (pax.get(b"GNU.sparse.major"), pax.get(b"GNU.sparse.minor"))
    if version == (b"1", b"0"):
        return _read_map_from_data(name, read, max_bytes), size
    if version not in ((None, None), (b"0", b"0"), (b"0", b"1")):
        raise damaged_entry(name, "its sparse map has an unknown version")
    # A file without data may have an empty map, whose record is removed as one without a value.
    text = pax.get(b"GNU.sparse.map")
    numbers = [parse_decimal(each, name, _MAP_FIELD) for each in text.split(b",")] if text else []
    blocks = pax.get(b"GNU.sparse.numblocks")
    if blocks is None or 2 * parse_decimal(blocks, name, _MAP_FIELD) != len(numbers):
        raise damaged_entry(name, "its sparse map does not have as many parts as it states")
    return numbers, size


def _read_map_from_data(name: bytes, read: Callable[[int], bytes], max_bytes: int) -> list[int]:
    """Read a map of decimal numbers, one a line: the number of pairs, then the pairs.

    The map is padded to a whole number of blocks.
    """
    text = bytearray()
    lines = 0
    wanted = 1
    while lines < wanted:
        if len(text) >= max_bytes:
            raise _map_too_long(name, max_bytes)
        block = read(BLOCK)
        text += block
        lines += block.count(b"\n")
        if wanted == 1 and lines:
            count = parse_decimal(bytes(text[: text.index(b"\n")]), name, _MAP_FIELD)
            # The shortest pair has four bytes.
            if count > max_bytes // 4:
                raise _map_too_long(name, max_bytes)
            if count < 0:
                raise damaged_entry(name, "its sparse map has a negative number of parts")
            wanted += 2 * count
    return [
        parse_decimal(line, name, _MAP_FIELD) for line in bytes(text).split(b"\n", wanted)[1:wanted]
    ]


def _map_too_long(name: bytes, max_bytes: int) -> UnpackError:
    return LimitExceeded(
        f"{printable_path(name)}: its sparse map is longer than the limit max_header, {max_bytes}"
    )
