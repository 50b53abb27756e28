"""A strict, streaming reader for the tar archives that layers are.

It reads what Go's ``archive/tar`` reads, since that is what writes and reads most layers: ustar,
PAX (POSIX.1-2001, ``pax`` interchange format), star, GNU names, numbers and sparse files, v7.
What two readers might understand differently is an error rather than a guess; but where layers
have it, it is what Go makes of it.
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

__all__ = ["BLOCK", "Content", "Member", "MemberType", "PlainSource", "TarReader"]

_ZEROS: Final = bytes(BLOCK)

# Content up to this size is handed over whole: to copy it costs less than to take it in pieces.
_SMALL_FILE: Final = 8 * 1024

# What a size field has that is too small for the size, in the archives of some writers.
_ALL_SEVENS: Final = 0o77777777777

Content = bytes | memoryview | int
"""Of a file: bytes, or how many zeros a hole stands for."""

MemberType = Literal["file", "hardlink", "symlink", "char", "block", "dir", "fifo"]

# Of these, only files are followed by data, whatever their size field says (as in Go).
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


# Not frozen, since that makes each one cost three times as much. Nobody changes them.
@attrs.define
class Member:
    """One entry of an archive, with all its headers applied.

    Attributes:
        name: As it stands there.
        type: What it is.
        mode: Permissions with the set-id and sticky bits.
        uid: The owner.
        gid: The group.
        mtime_ns: In nanoseconds since 1970.
        size: Of a file's content in bytes, holes included.
        linkname: Where a symlink leads, or which path a hard link is one more name of.
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
        """``size`` bytes, fewer only at the end."""
        ...

    def pieces(self, size: int) -> Iterator[bytes | memoryview]:
        """``size`` bytes in convenient pieces, fewer only at the end."""
        ...


@final
class TarReader:
    """Iterates over the members of an archive; `data` gives the content of the present one.

    The archive ends at two blocks of zeros, or where the bytes end between two members: both are
    seen in layers that everyone accepts. What follows is not looked at.

    Attributes:
        holes: How many bytes of the present member are in no archive: the zeros of its holes.
        left: How many bytes of the present member's data are still to come.
        name: The name of the present member, for messages.
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

    def data(self) -> Iterator[Content]:
        """The content of a file: bytes, and for each hole how many zeros it stands for.

        Raises:
            UnpackError: if the archive ends before the content does.
        """
        if self._sparse_parts is not None:
            return self._parts_and_holes(self._sparse_parts)
        if self.remaining > _SMALL_FILE:
            return self._stream(self.remaining)
        return iter((self._read_exactly(self.remaining),) if self.remaining else ())

    def _parts_and_holes(self, parts: list[int]) -> Iterator[Content]:
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
        """The next bytes of the present member's data."""
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
        """The next member; ``None`` at the end.

        Raises:
            UnpackError: if the archive is damaged.
            LimitExceeded: if a header is too long.
        """
        if self.remaining:
            for _ in self._stream(self.remaining):
                pass
        header = self._next_header()
        if header is None:
            return None
        # Most members are files that a single header tells all about.
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
                    f"{printable_path(name)}: an entry of the unknown type {chr(flag)!r}"
                )
            body = self._extension_body(header, name)
            if flag in b"LK" and not text_until_nul(body):
                raise damaged_entry(name, "a long name that is empty")
            # One that comes twice, some readers replace and others add to.
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
                    # Who does apply it looks for the next header elsewhere.
                    raise damaged_entry(name, "a size in a global header")
            else:
                raise damaged_entry(
                    name, "an extended header where the entry should be that it extends"
                )
            header = self._next_header()
        return None

    def _next_header(self) -> bytes | None:
        header = self._source.read(self._padding + BLOCK)
        if self._padding:
            # At the very end it may be missing (Go reads such archives, too).
            header = header[self._padding :]
            self._padding = 0
        if len(header) < BLOCK:
            if header:
                raise self._archive_error("it ends in a header")
            return None
        if header == _ZEROS:
            if self._source.read(BLOCK).strip(b"\0"):
                raise self._archive_error("a single block of zeros")
            return None
        if not has_valid_checksum(header):
            raise damaged_entry(text_until_nul(header[:100]), "the checksum of its header is wrong")
        return header

    def _archive_error(self, text: str) -> UnpackError:
        where = (
            f" after the entry {printable_path(self.name)}" if self.name else " at its beginning"
        )
        return UnpackError(f"damaged tar archive: {text}{where}")

    def _extension_body(self, header: bytes, name: bytes) -> bytes:
        """The body of a header that extends the next."""
        size = parse_number(header[124:136], name, "size")
        if size < 0:
            raise damaged_entry(name, "its size is negative")
        if size > self._limits.max_header:
            raise LimitExceeded(
                f"{printable_path(name)}: an extended header of {size} bytes; the limit max_header is "
                f"{self._limits.max_header}"
            )
        body = self._source.read(size)
        if len(body) < size:
            raise damaged_entry(name, "an extended header ends early")
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
        """Set the size of the present member's content and where its parts are."""
        sparse = header[156] == ord("S") or (bool(pax) and has_sparse_keys(pax))
        if sparse and kind != "file":
            raise damaged_entry(self.name, "a sparse file that is no plain file")
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
        """How many bytes of data are in the archive.

        A record overrides the header (POSIX), which then has a zero, what fits, or the same. With
        anything else a reader that does not know the record takes data for entries, or entries
        for data: CVE-2025-62518.
        """
        size = parse_number(field, self.name, "size")
        if given is not None:
            if size in (0, _ALL_SEVENS):
                size = parse_decimal(given, self.name, "size")
            elif size != parse_decimal(given, self.name, "size"):
                text = given[:64].decode()
                raise damaged_entry(self.name, f"its size is {size}, and {text} in a record")
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
        # moby's rule for what no file system can hold.
        return value if -MAX_INT64 <= value <= MAX_INT64 else 0

    def _device(self, header: bytes) -> tuple[int, int]:
        major = parse_number(header[329:337], self.name, "device number")
        minor = parse_number(header[337:345], self.name, "device number")
        # The kernel has 12 and 20 bits for them; cut off, the number would be another device's.
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
                    f"{printable_path(self.name)}: the attribute {attribute[:64]!r} of {len(value)} "
                    f"bytes; the limit max_xattr is {self._limits.max_xattr}"
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
            raise damaged_entry(name, "its sparse map is not one of pairs")
        position = 0
        for at in range(0, len(parts), 2):
            if parts[at] < position or parts[at + 1] < 0:
                raise damaged_entry(name, "its sparse map is not in order")
            position = parts[at] + parts[at + 1]
        if position > size or sum(parts[1::2]) != self.remaining:
            raise damaged_entry(name, "its sparse map does not fit its size")
        self._sparse_parts = parts
        self._size = size
        self.holes = size - self.remaining


def _is_v7_directory(header: bytes, name: bytes) -> bool:
    """Return whether a slash at the end of an entry's name makes the entry a directory.

    The v7 format has no type for directories.

    Raises:
        UnpackError: if only one of the entry's two names ends with a slash.
    """
    is_directory = name.endswith(b"/")
    if is_directory != text_until_nul(header[:100]).endswith(b"/"):
        raise damaged_entry(name, "a directory by one of its names, and not by the other")
    return is_directory


def _names(
    header: bytes, pax: Mapping[bytes, bytes], longname: bytes, longlink: bytes
) -> tuple[bytes, bytes]:
    """Return an entry's name and the target of its link.

    Raises:
        UnpackError: if two headers give different names.
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
                raise damaged_entry(name, "a sparse file by its type and by its records")
            name = pax.get(b"GNU.sparse.name", name)
    if longname:
        if pax.get(b"path", longname) != longname or b"GNU.sparse.name" in pax:
            raise damaged_entry(longname, f"an entry that is named {printable_path(name)}, too")
        name = longname
    if longlink:
        if pax.get(b"linkpath", longlink) != longlink:
            raise damaged_entry(
                name, f"a link to {printable_path(longlink)} and {printable_path(linkname)}"
            )
        linkname = longlink
    return name, linkname


def _join_prefix(header: bytes, name: bytes) -> bytes:
    """The name of an entry whose header has more than a name where ustar has the rest of it."""
    if header[257:263] == b"ustar\0":
        # star has times behind a shorter prefix.
        end = 476 if header[508:512] == b"tar\0" else 500
        return text_until_nul(header[345:end]) + b"/" + name
    if header[257:265] == b"ustar  \0":
        # GNU has times there. But Go before 1.8 wrote prefixes in such headers, and so did docker.
        prefix = text_until_nul(header[345:500])
        if prefix.isascii() and not (
            _is_time_field(header[345:357]) and _is_time_field(header[357:369])
        ):
            return prefix + b"/" + name
        return name
    raise damaged_entry(name, "a prefix of its name, but in no known format")


def _is_time_field(field: bytes) -> bool:
    """Whether it is one, or nothing, for Go."""
    try:
        if field[0]:
            parse_number(field, b"", "time")
    except UnpackError:
        return False
    return True
