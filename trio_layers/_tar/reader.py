"""A strict, streaming reader for the tar archives of layers.

It reads the formats of Go's ``archive/tar``, which writes and reads most layers: ustar, PAX
(POSIX.1-2001, ``pax`` interchange format), star, GNU names, numbers and sparse files, v7.
An archive that two readers might understand differently is an error. Only if real layers have
such a construct, the reader understands it as Go does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, Literal, Protocol, final

import attrs

from .._errors import LimitExceeded, UnpackError
from .._printable import printable_path
from .fields import (
    BLOCK,
    MAX_INT64,
    PAX_XATTR,
    damaged_entry,
    has_valid_checksum,
    parse_decimal,
    parse_mode_and_owner,
    parse_number,
    parse_octal,
    parse_pax_records,
    parse_pax_time,
    text_until_nul,
)
from .limits import Limits
from .sparse import has_sparse_keys, read_gnu_map, read_pax_map

__all__ = ["BLOCK", "ContentPiece", "Member", "MemberType", "PlainSource", "TarReader"]

_ZEROS: Final = bytes(BLOCK)

# Content up to this size comes in one piece: a copy costs less than an iteration over pieces.
_SMALL_FILE: Final = 8 * 1024

# Some writers put this number into a size field that is too small for the size.
_ALL_SEVENS: Final = 0o77777777777

ContentPiece = bytes | memoryview | int
"""A piece of a file's content: bytes, or the number of zeros in a hole."""

MemberType = Literal["file", "hardlink", "symlink", "char", "block", "dir", "fifo"]

# Data follows only files. For other types, the size field is ignored (as in Go).
_TYPES_BY_FLAG: Final[dict[int, MemberType]] = {
    ord("0"): "file",
    0: "file",
    ord("7"): "file",
    ord("1"): "hardlink",
    ord("2"): "symlink",
    ord("3"): "char",
    ord("4"): "block",
    ord("5"): "dir",
    ord("6"): "fifo",
    ord("S"): "file",
}

_NO_RECORDS: Final[Mapping[bytes, bytes]] = {}
_NO_XATTRS: Final[Mapping[str, bytes]] = {}
_NO_DEVICE: Final = (0, 0)
_FILE_FLAG: Final = ord("0")


# Not frozen, since a frozen object takes three times as long to make. No code changes members.
@attrs.define
class Member:
    """One entry of an archive, with all its headers applied.

    Attributes:
        name: The name as it is in the archive.
        type: The entry's type.
        mode: Permissions with the set-id and sticky bits.
        uid: The owner.
        gid: The group.
        mtime_ns: Modification time in nanoseconds since 1970.
        size: Size of a file's content in bytes, holes included.
        linkname: The target of a symlink or hard link.
        dev: A device's major and minor number.
        xattrs: Extended attributes.
    """

    name: bytes
    type: MemberType
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    linkname: bytes
    dev: tuple[int, int]
    xattrs: Mapping[str, bytes]


class PlainSource(Protocol):
    """The bytes of an archive, decompressed."""

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes, fewer only at the end."""
        ...

    def pieces(self, size: int) -> Iterator[bytes | memoryview]:
        """Iterate over ``size`` bytes in pieces of any size, fewer bytes only at the end."""
        ...


@final
class TarReader:
    """Iterates over the members of an archive; `data` returns the current member's content.

    The archive ends at two blocks of zeros, or where the bytes end between two members. Layers
    with either end are common, and all tools accept them. Bytes after the end are not read.

    Attributes:
        holes: The number of zeros in the current member's holes, which are not in the archive.
        remaining: The number of unread bytes of the current member's data.
        name: The name of the current member, for messages.
    """

    def __init__(self, source: PlainSource, limits: Limits) -> None:
        self.name = b""
        self.holes = 0
        self._source = source
        self._limits = limits
        self.remaining = 0
        self._padding = 0
        self._sparse_parts: list[int] | None = None
        self._size = 0

    def __iter__(self) -> Iterator[Member]:
        return iter(self.next, None)

    def data(self) -> Iterator[ContentPiece]:
        """Iterate over a file's content: bytes, and for each hole its number of zeros.

        Raises:
            UnpackError: If the archive ends before the content does.
        """
        if self._sparse_parts is not None:
            return self._parts_and_holes(self._sparse_parts)
        if self.remaining > _SMALL_FILE:
            return self._stream(self.remaining)
        return iter((self._read_exactly(self.remaining),) if self.remaining else ())

    def _parts_and_holes(self, parts: list[int]) -> Iterator[ContentPiece]:
        position = 0
        for at in range(0, len(parts), 2):
            offset, length = parts[at], parts[at + 1]
            if offset > position:
                yield offset - position
            if length > _SMALL_FILE:
                yield from self._stream(length)
            elif length:
                yield self._read_exactly(length)
            position = offset + length
        if self._size > position:
            yield self._size - position

    def _read_exactly(self, size: int) -> bytes:
        """Read ``size`` bytes of the current member's data."""
        data = self._source.read(min(size, self.remaining))
        self.remaining -= len(data)
        if len(data) < size:
            raise damaged_entry(self.name, f"its data ends {size - len(data)} bytes early")
        return data

    def _stream(self, size: int) -> Iterator[bytes | memoryview]:
        for piece in self._source.pieces(size):
            size -= len(piece)
            self.remaining -= len(piece)
            yield piece
        if size:
            raise damaged_entry(self.name, f"its data ends {size} bytes early")

    def next(self) -> Member | None:
        """Return the next member, or ``None`` at the end.

        Raises:
            UnpackError: If the archive is damaged.
            LimitExceeded: If a header is too long.
        """
        if self.remaining:
            for _ in self._stream(self.remaining):
                pass
        header = self._next_header()
        if header is None:
            return None
        # Most members are files with a single header.
        if header[156] == _FILE_FLAG and not header[345] and not header[157]:
            known = parse_mode_and_owner(header[100:124])
            size = parse_octal(header[124:136])
            mtime = parse_octal(header[136:148])
            if known is not None and size is not None and mtime is not None:
                mode, uid, gid = known
                self.name = name = text_until_nul(header[:100])
                self.remaining = self._size = size
                self._padding = -size % BLOCK
                self._sparse_parts = None
                self.holes = 0
                mtime *= 10**9
                if mtime > MAX_INT64:
                    mtime = 0
                # fmt: off
                return Member(
                    name, "file", mode, uid, gid, mtime, size, b"", _NO_DEVICE, _NO_XATTRS
                )
                # fmt: on
        return self._read_extended(header)

    def _read_extended(self, first: bytes) -> Member | None:
        """Read a member whose first header is ``first``, with all headers that extend it."""
        pax: Mapping[bytes, bytes] | None = None
        longname = longlink = b""
        header: bytes | None = first
        while header is not None:
            flag = header[156]
            kind = _TYPES_BY_FLAG.get(flag)
            if kind is not None:
                return self._member(header, kind, pax or _NO_RECORDS, longname, longlink)
            name = text_until_nul(header[:100])
            if flag not in b"xgLK":
                raise UnpackError(
                    f"{printable_path(name)}: the entry has the unknown type {chr(flag)!r}"
                )
            body = self._extension_body(header, name)
            if flag in b"LK" and not text_until_nul(body):
                raise damaged_entry(name, "its long name is empty")
            # If a header comes twice, some readers replace the first, others add to it.
            if flag == ord("x") and pax is None:
                pax = parse_pax_records(body, name)
            elif flag == ord("L") and not longname:
                longname = text_until_nul(body)
            elif flag == ord("K") and not longlink:
                longlink = text_until_nul(body)
            elif flag == ord("g") and pax is None and not longname and not longlink:
                # Global records are read and not applied, as moby and containerd do it.
                found = parse_pax_records(body, name)
                if b"size" in found or has_sparse_keys(found):
                    # A reader that applies the size looks for the next header elsewhere.
                    raise damaged_entry(name, "a global header sets a size")
            else:
                raise damaged_entry(
                    name, "an extended header follows another one instead of the entry"
                )
            header = self._next_header()
        return None

    def _next_header(self) -> bytes | None:
        header = self._source.read(self._padding + BLOCK)
        if self._padding:
            # The padding may be missing at the archive's end (Go reads such archives, too).
            header = header[self._padding :]
            self._padding = 0
        if len(header) < BLOCK:
            if header:
                raise self._archive_error("the archive ends within a header")
            return None
        if header == _ZEROS:
            if self._source.read(BLOCK).strip(b"\0"):
                raise self._archive_error("there is a single block of zeros, not two,")
            return None
        if not has_valid_checksum(header):
            raise damaged_entry(text_until_nul(header[:100]), "the checksum of its header is wrong")
        return header

    def _archive_error(self, text: str) -> UnpackError:
        """Return the error for damage between two entries; ``text`` describes it."""
        if self.name:
            return damaged_entry(self.name, f"{text} after this entry")
        return UnpackError(f"damaged tar archive: {text} at its beginning")

    def _extension_body(self, header: bytes, name: bytes) -> bytes:
        """Read the body of a header that extends the next one."""
        size = parse_number(header[124:136], name, "size")
        if size < 0:
            raise damaged_entry(name, "its size is negative")
        if size > self._limits.max_header:
            raise LimitExceeded(
                f"{printable_path(name)}: its extended header has {size} bytes; "
                f"the limit max_header is {self._limits.max_header}"
            )
        body = self._source.read(size)
        if len(body) < size:
            raise damaged_entry(name, "its extended header ends early")
        self._source.read(-size % BLOCK)
        return body

    def _member(
        self,
        header: bytes,
        kind: MemberType,
        pax: Mapping[bytes, bytes],
        longname: bytes,
        longlink: bytes,
    ) -> Member:
        """Combine a header with the records and long names before it."""
        name, linkname = _names(header, pax, longname, longlink)
        self.name = name
        if not header[156] and _is_v7_directory(header, name):
            kind = "dir"
        self._find_data(header, kind, pax)
        known = None if pax else parse_mode_and_owner(header[100:124])
        mode, uid, gid = known or self._mode_and_owner(header, pax)
        return Member(
            name,
            kind,
            mode,
            uid,
            gid,
            self._mtime(header[136:148], pax.get(b"mtime")),
            self._size,
            linkname,
            self._device(header) if kind in ("char", "block") else _NO_DEVICE,
            self._xattrs(pax) if pax else _NO_XATTRS,
        )

    def _find_data(self, header: bytes, kind: MemberType, pax: Mapping[bytes, bytes]) -> None:
        """Set the size of the current member's content and the places of its parts."""
        sparse = header[156] == ord("S") or (bool(pax) and has_sparse_keys(pax))
        if sparse and kind != "file":
            raise damaged_entry(self.name, "it has a sparse map, but is not a regular file")
        size = self._stored_size(header[124:136], pax.get(b"size"))
        if kind != "file":
            size = 0
        self.remaining = self._size = size
        self._padding = -size % BLOCK
        self._sparse_parts = None
        self.holes = 0
        if sparse:
            self._read_sparse_map(header, pax)

    def _stored_size(self, field: bytes, given: bytes | None) -> int:
        """Return the number of bytes of data in the archive.

        A PAX record overrides the header's size (POSIX). The header then has a zero, the largest
        number that fits, or the same size. With any other size, a reader that ignores the record
        takes data for entries, or entries for data: CVE-2025-62518.
        """
        size = parse_number(field, self.name, "size")
        if given is not None:
            if size in (0, _ALL_SEVENS):
                size = parse_decimal(given, self.name, "size")
            elif size != parse_decimal(given, self.name, "size"):
                text = given[:64].decode()
                raise damaged_entry(
                    self.name, f"its size is {size} in the header, but {text} in a PAX record"
                )
        if size < 0:
            raise damaged_entry(self.name, "its size is negative")
        return size

    def _mode_and_owner(self, header: bytes, pax: Mapping[bytes, bytes]) -> tuple[int, int, int]:
        return (
            parse_number(header[100:108], self.name, "mode") & 0o7777,
            self._owner_id(header[108:116], pax.get(b"uid"), "uid"),
            self._owner_id(header[116:124], pax.get(b"gid"), "gid"),
        )

    def _owner_id(self, field: bytes, given: bytes | None, field_name: str) -> int:
        read, text = (parse_number, field) if given is None else (parse_decimal, given)
        value = read(text, self.name, field_name)
        # 2**32 - 1 means "no change" to chown.
        if not 0 <= value < 2**32 - 1:
            raise damaged_entry(self.name, f"its {field_name} {value} is out of range")
        return value

    def _mtime(self, field: bytes, given: bytes | None) -> int:
        if given is None:
            value = parse_number(field, self.name, "mtime") * 10**9
        else:
            value = parse_pax_time(given, self.name)
        # A time that no file system can hold becomes 0, as in moby.
        return value if -MAX_INT64 <= value <= MAX_INT64 else 0

    def _device(self, header: bytes) -> tuple[int, int]:
        major = parse_number(header[329:337], self.name, "device number")
        minor = parse_number(header[337:345], self.name, "device number")
        # The kernel has 12 and 20 bits for them. A truncated number would be another device's.
        if not (0 <= major < 2**12 and 0 <= minor < 2**20):
            raise damaged_entry(self.name, f"its device number {major}:{minor} is out of range")
        return major, minor

    def _xattrs(self, pax: Mapping[bytes, bytes]) -> Mapping[str, bytes]:
        xattrs: dict[str, bytes] = {}
        for key, value in pax.items():
            if not key.startswith(PAX_XATTR):
                continue
            attribute = key[len(PAX_XATTR) :].decode("utf-8", "surrogateescape")
            if len(value) > self._limits.max_xattr:
                raise LimitExceeded(
                    f"{printable_path(self.name)}: its attribute {attribute[:64]!r} has "
                    f"{len(value)} bytes; the limit max_xattr is {self._limits.max_xattr}"
                )
            xattrs[attribute] = value
        return xattrs or _NO_XATTRS

    def _read_sparse_map(self, header: bytes, pax: Mapping[bytes, bytes]) -> None:
        name, longest = self.name, self._limits.max_header
        if has_sparse_keys(pax):
            parts, size = read_pax_map(pax, name, self._read_exactly, longest)
        else:
            parts, size = read_gnu_map(header, name, self._source.read, longest)
        if len(parts) % 2:
            raise damaged_entry(name, "its sparse map is not a list of offset and length pairs")
        position = 0
        for at in range(0, len(parts), 2):
            if parts[at] < position or parts[at + 1] < 0:
                raise damaged_entry(name, "the parts in its sparse map overlap or are not in order")
            position = parts[at] + parts[at + 1]
        if position > size or sum(parts[1::2]) != self.remaining:
            raise damaged_entry(name, "its sparse map does not match its size")
        self._sparse_parts = parts
        self._size = size
        self.holes = size - self.remaining


def _is_v7_directory(header: bytes, name: bytes) -> bool:
    """Return whether a slash at the end of an entry's name makes the entry a directory.

    The v7 format has no type for directories.

    Raises:
        UnpackError: If only one of the entry's two names ends with a slash.
    """
    is_directory = name.endswith(b"/")
    if is_directory != text_until_nul(header[:100]).endswith(b"/"):
        raise damaged_entry(name, "only one of its two names ends with a slash")
    return is_directory


def _names(
    header: bytes, pax: Mapping[bytes, bytes], longname: bytes, longlink: bytes
) -> tuple[bytes, bytes]:
    """Return an entry's name and the target of its link.

    Raises:
        UnpackError: If two headers give different names.
    """
    name = text_until_nul(header[:100])
    if header[345]:
        name = _join_prefix(header, name)
    linkname = text_until_nul(header[157:257]) if header[157] else b""
    if pax:
        name = pax.get(b"path", name)
        linkname = pax.get(b"linkpath", linkname)
        if has_sparse_keys(pax):
            if header[156] == ord("S"):
                raise damaged_entry(name, "it has a GNU sparse map and PAX records of another")
            name = pax.get(b"GNU.sparse.name", name)
    if longname:
        if pax.get(b"path", longname) != longname or b"GNU.sparse.name" in pax:
            raise damaged_entry(longname, f"another header names it {printable_path(name)}")
        name = longname
    if longlink:
        if pax.get(b"linkpath", longlink) != longlink:
            raise damaged_entry(
                name,
                "its headers give two link targets, "
                f"{printable_path(longlink)} and {printable_path(linkname)}",
            )
        linkname = longlink
    return name, linkname


def _join_prefix(header: bytes, name: bytes) -> bytes:
    """Return the name of an entry whose header is not empty where ustar has a name's prefix."""
    if header[257:263] == b"ustar\0":
        # star has a shorter prefix and then times.
        end = 476 if header[508:512] == b"tar\0" else 500
        return text_until_nul(header[345:end]) + b"/" + name
    if header[257:265] == b"ustar  \0":
        # GNU has times there. But Go before 1.8, and so docker, wrote prefixes in GNU headers.
        prefix = text_until_nul(header[345:500])
        if prefix.isascii() and not (
            _is_time_field(header[345:357]) and _is_time_field(header[357:369])
        ):
            return prefix + b"/" + name
        return name
    raise damaged_entry(name, "its header has a name prefix, but no known format")


def _is_time_field(field: bytes) -> bool:
    """Return whether Go takes a field for a time or for an empty one."""
    try:
        if field[0]:
            parse_number(field, b"", "time")
    except UnpackError:
        return False
    return True
