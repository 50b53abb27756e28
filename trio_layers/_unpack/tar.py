"""A strict, streaming reader for the tar archives that layers are.

It reads what Go's ``archive/tar`` reads, since that is what writes and reads most layers: ustar,
PAX (POSIX.1-2001, ``pax`` interchange format), GNU names, numbers and sparse files, v7. What two
readers might understand differently is an error rather than a guess.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from typing import Final, Literal, Protocol, final

import attrs

from .._errors import LimitExceeded, UnpackError

__all__ = ["Limits", "Member", "PlainSource", "TarReader"]

BLOCK: Final = 512
_MAX: Final = 2**63 - 1

MemberType = Literal["file", "hardlink", "symlink", "char", "block", "dir", "fifo"]

# Of these, only files are followed by data, whatever their size field says (as in Go).
_TYPES: Final[dict[bytes, MemberType]] = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "hardlink",
    b"2": "symlink",
    b"3": "char",
    b"4": "block",
    b"5": "dir",
    b"6": "fifo",
    b"S": "file",
}

_PAX_TIME: Final = re.compile(rb"(-?)([0-9]{1,19})(?:\.([0-9]*))?\Z")
_XATTR: Final = b"SCHILY.xattr."


@attrs.frozen(kw_only=True)
class Limits:
    """How much a layer may hold. More is a `LimitExceeded`, before it is on the disk.

    Attributes:
        max_unpacked_bytes: Of the layer's tar, decompressed, and of its files together, holes
            included. 1 TiB.
        max_entries: Entries in the tar. 10 million.
        max_path: Bytes in a path, links on the way resolved. 4095, which is all that a Linux
            system call takes (``PATH_MAX`` without the NUL).
        max_header: Bytes in one extended header. 1 MiB, as in Go's reader.
        max_xattr: Bytes in one extended attribute. 64 KiB, as in Linux (``XATTR_SIZE_MAX``).
    """

    max_unpacked_bytes: int = 1 << 40
    max_entries: int = 10_000_000
    max_path: int = 4095
    max_header: int = 1 << 20
    max_xattr: int = 1 << 16


@attrs.frozen(kw_only=True)
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

    def pieces(self, size: int) -> Iterator[bytes]:
        """``size`` bytes in convenient pieces, fewer only at the end."""
        ...


def _damaged(name: bytes, text: str) -> UnpackError:
    return UnpackError(
        f"damaged tar archive: {_shown(name)}: {text}" if name else f"damaged tar archive: {text}"
    )


def _shown(name: bytes) -> str:
    text = repr(name.decode("utf-8", "backslashreplace"))
    return text if len(text) <= 256 else f"{text[:120]}…{text[-120:]}"


def _until_nul(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _number(field: bytes, name: bytes, what: str) -> int:
    """A numeric field: octal, or base-256 as GNU tar has it for what does not fit."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big")
        bits = 8 * len(field)
        # The top bit marks the encoding, the one below it is the sign (two's complement).
        value -= 1 << (bits - 1)
        if field[0] & 0x40:
            value -= 1 << (bits - 1)
        if not -_MAX <= value <= _MAX:
            raise _damaged(name, f"its {what} is out of range")
        return value
    text = field.strip(b" \0")
    if b"\0" in text:
        text = _until_nul(text).strip(b" ")
    if not text:
        return 0
    if text.isdigit():
        try:
            return int(text, 8)
        except ValueError:
            pass
    raise _damaged(name, f"its {what} is not a number: {field!r}")


def _decimal(value: bytes, name: bytes, what: str) -> int:
    digits = value[1:] if value[:1] == b"-" else value
    if digits.isdigit() and len(digits) <= 19:
        number = int(value)
        if -_MAX <= number <= _MAX:
            return number
    raise _damaged(name, f"its {what} is not a number, or out of range: {value[:64]!r}")


def _time(value: bytes, name: bytes) -> int:
    match = _PAX_TIME.match(value)
    if match is None:
        raise _damaged(name, f"its mtime is not a time: {value[:64]!r}")
    sign, seconds, fraction = match.groups()
    nanoseconds = int(seconds) * 10**9 + int((fraction or b"")[:9].ljust(9, b"0"))
    return -nanoseconds if sign else nanoseconds


def _records(body: bytes, name: bytes) -> list[tuple[bytes, bytes]]:
    """The records of an extended header: ``length key=value`` and a newline, repeated."""
    records: list[tuple[bytes, bytes]] = []
    position = 0
    while position < len(body):
        space = body.find(b" ", position, position + 20)
        digits = body[position:space] if space > 0 else b""
        end = position + int(digits) if digits.isdigit() else 0
        # The shortest record is `5 k=\n` with its length counted in.
        if end < space + 3 or end > len(body) or body[end - 1 : end] != b"\n":
            raise _damaged(name, "a record of its extended header has a wrong length")
        key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if not key or not equals:
            raise _damaged(name, "a record of its extended header has no key")
        if b"\0" in key or (b"\0" in value and not key.startswith(_XATTR)):
            raise _damaged(name, f"a NUL in the record {key[:64]!r} of its extended header")
        records.append((key, value))
        position = end
    return records


@final
class TarReader:
    """Iterates over the members of an archive; `data` gives the content of the present one.

    The archive ends at two blocks of zeros, or where the bytes end between two members: both are
    seen in layers that everyone accepts. What follows is not looked at.
    """

    def __init__(self, source: PlainSource, limits: Limits) -> None:
        self._source = source
        self._limits = limits
        self._name = b""
        self._left = 0
        self._padding = 0
        self._segments: list[tuple[int, int]] | None = None
        self._size = 0

    def __iter__(self) -> Iterator[Member]:
        while (member := self._next()) is not None:
            yield member

    def data(self) -> Iterator[bytes | int]:
        """The content of a file: bytes, and for each hole how many zeros it stands for.

        Raises:
            UnpackError: if the archive ends before the content does.
        """
        if self._segments is None:
            yield from self._take(self._left)
            return
        position = 0
        for offset, length in self._segments:
            if offset > position:
                yield offset - position
            yield from self._take(length)
            position = offset + length
        if self._size > position:
            yield self._size - position

    def _take(self, size: int) -> Iterator[bytes]:
        wanted = self._left - size
        for piece in self._source.pieces(size):
            self._left -= len(piece)
            yield piece
        if self._left != wanted:
            raise _damaged(self._name, f"its data ends {self._left - wanted} bytes early")

    def _next(self) -> Member | None:
        for _ in self._take(self._left):
            pass
        # At the very end the padding may be missing (Go reads such archives, too).
        self._source.read(self._padding)
        self._padding = 0
        pax: list[tuple[bytes, bytes]] = []
        longname = longlink = b""
        while True:
            header = self._header()
            if header is None:
                return None
            flag = header[156:157]
            if flag not in b"xgLK":
                return self._member(header, pax, longname, longlink)
            body = self._extension(header)
            if flag == b"x":
                pax = _records(body, _until_nul(header[:100]))
            elif flag == b"L":
                longname = _until_nul(body)
            elif flag == b"K":
                longlink = _until_nul(body)
            else:
                # Global records are read and not applied, as moby and containerd do it.
                _records(body, _until_nul(header[:100]))

    def _header(self) -> bytes | None:
        header = self._source.read(BLOCK)
        if not header:
            return None
        if len(header) < BLOCK:
            raise _damaged(b"", f"it ends in a header, after {_shown(self._name)}")
        if not header.strip(b"\0"):
            second = self._source.read(BLOCK)
            if second.strip(b"\0"):
                raise _damaged(b"", f"a single block of zeros after {_shown(self._name)}")
            return None
        name = _until_nul(header[:100])
        expected = _number(header[148:156], name, "checksum")
        blank = header[:148] + b" " * 8 + header[156:]
        # Some old writers took the bytes as signed.
        if expected != sum(blank) and expected != sum(struct.unpack("512b", blank)):
            raise _damaged(name, "the checksum of its header is wrong")
        return header

    def _extension(self, header: bytes) -> bytes:
        """The body of a header that extends the next."""
        name = _until_nul(header[:100])
        size = _number(header[124:136], name, "size")
        if size < 0:
            raise _damaged(name, "its size is negative")
        if size > self._limits.max_header:
            raise LimitExceeded(
                f"an extended header of {size} bytes; the limit max_header is "
                f"{self._limits.max_header}"
            )
        body = self._source.read(size)
        if len(body) < size:
            raise _damaged(name, "an extended header ends early")
        self._source.read(-size % BLOCK)
        return body

    def _member(
        self, header: bytes, records: list[tuple[bytes, bytes]], longname: bytes, longlink: bytes
    ) -> Member:
        name = _until_nul(header[:100])
        if header[257:263] == b"ustar\0" and header[345] != 0:
            name = _until_nul(header[345:500]) + b"/" + name
        flag = header[156:157]
        # Empty values leave the header's as they are (Go does it so).
        pax = {key: value for key, value in records if value or key.startswith(_XATTR)}
        name = pax.get(b"path", name)
        name = longname or pax.get(b"GNU.sparse.name", name)
        self._name = name
        kind = _TYPES.get(flag)
        if kind is None:
            raise UnpackError(f"{_shown(name)}: an entry of the unknown type {flag!r}")
        if flag == b"\0" and name.endswith(b"/"):
            kind = "dir"
        size = _number(header[124:136], name, "size")
        if b"size" in pax:
            size = _decimal(pax[b"size"], name, "size")
        if size < 0:
            raise _damaged(name, "its size is negative")
        self._left = size if kind == "file" else 0
        self._padding = -self._left % BLOCK
        self._segments = None
        self._size = self._left
        if flag == b"S" or (kind == "file" and any(k.startswith(b"GNU.sparse.") for k in pax)):
            self._sparse(header, flag, pax, records)
        return Member(
            name=name,
            type=kind,
            mode=_number(header[100:108], name, "mode") & 0o7777,
            uid=self._id(header[108:116], pax.get(b"uid"), "uid"),
            gid=self._id(header[116:124], pax.get(b"gid"), "gid"),
            mtime_ns=self._mtime(header[136:148], pax.get(b"mtime")),
            size=self._size,
            linkname=longlink or pax.get(b"linkpath", _until_nul(header[157:257])),
            dev=self._device(header) if kind in ("char", "block") else (0, 0),
            xattrs=self._xattrs(pax),
        )

    def _id(self, field: bytes, given: bytes | None, what: str) -> int:
        if given is None:
            value = _number(field, self._name, what)
        else:
            value = _decimal(given, self._name, what)
        # 2**32 - 1 means "no change" to chown.
        if not 0 <= value < 2**32 - 1:
            raise _damaged(self._name, f"its {what} {value} is out of range")
        return value

    def _mtime(self, field: bytes, given: bytes | None) -> int:
        if given is None:
            value = _number(field, self._name, "mtime") * 10**9
        else:
            value = _time(given, self._name)
        # moby's rule for what no file system can hold.
        return value if -_MAX <= value <= _MAX else 0

    def _device(self, header: bytes) -> tuple[int, int]:
        major = _number(header[329:337], self._name, "device number")
        minor = _number(header[337:345], self._name, "device number")
        # The kernel has 12 and 20 bits for them; cut off, the number would be another device's.
        if not (0 <= major < 2**12 and 0 <= minor < 2**20):
            raise _damaged(self._name, f"its device number {major}:{minor} is out of range")
        return major, minor

    def _xattrs(self, pax: dict[bytes, bytes]) -> dict[str, bytes]:
        xattrs: dict[str, bytes] = {}
        for key, value in pax.items():
            if not key.startswith(_XATTR):
                continue
            attribute = key[len(_XATTR) :].decode("utf-8", "surrogateescape")
            if len(value) > self._limits.max_xattr:
                raise LimitExceeded(
                    f"{_shown(self._name)}: the attribute {attribute[:64]!r} of {len(value)} "
                    f"bytes; the limit max_xattr is {self._limits.max_xattr}"
                )
            xattrs[attribute] = value
        return xattrs

    # Sparse files: GNU tar's manual, "Storing Sparse Files", has the four formats.

    def _sparse(
        self,
        header: bytes,
        flag: bytes,
        pax: dict[bytes, bytes],
        records: list[tuple[bytes, bytes]],
    ) -> None:
        name = self._name
        if flag == b"S":
            numbers, size = self._sparse_gnu(header), _number(header[483:495], name, "size")
        else:
            size = _decimal(
                pax.get(b"GNU.sparse.realsize", pax.get(b"GNU.sparse.size", b"")), name, "size"
            )
            if pax.get(b"GNU.sparse.major") == b"1" and pax.get(b"GNU.sparse.minor") == b"0":
                numbers = self._sparse_1_0()
            elif b"GNU.sparse.major" in pax:
                raise _damaged(name, "a sparse file of an unknown version")
            elif b"GNU.sparse.map" in pax:
                texts = pax[b"GNU.sparse.map"].split(b",")
                numbers = [_decimal(text, name, "sparse map") for text in texts]
            else:
                numbers = [
                    _decimal(value, name, "sparse map")
                    for key, value in records
                    if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
                ]
        if len(numbers) % 2:
            raise _damaged(name, "its sparse map is not one of pairs")
        segments = list(zip(numbers[::2], numbers[1::2], strict=True))
        position = 0
        for offset, length in segments:
            if offset < position or length < 0:
                raise _damaged(name, "its sparse map is not in order")
            position = offset + length
        if position > size or sum(numbers[1::2]) != self._left:
            raise _damaged(name, "its sparse map does not fit its size")
        self._segments = segments
        self._size = size

    def _sparse_gnu(self, header: bytes) -> list[int]:
        numbers: list[int] = []
        area, more = header[386:482], header[482]
        while True:
            for start in range(0, len(area) - 23, 24):
                if not area[start : start + 24].strip(b"\0"):
                    break
                for field in (area[start : start + 12], area[start + 12 : start + 24]):
                    numbers.append(_number(field, self._name, "sparse map"))
            if not more:
                return numbers
            if len(numbers) > self._limits.max_header // 12:
                raise LimitExceeded(f"{_shown(self._name)}: a sparse map longer than max_header")
            block = self._source.read(BLOCK)
            if len(block) < BLOCK:
                raise _damaged(self._name, "its sparse map ends early")
            area, more = block[:504], block[504]

    def _sparse_1_0(self) -> list[int]:
        """The map stands before the data: decimal numbers, a line each, padded to a block."""
        text = bytearray()
        lines = 0
        wanted = 1
        numbers: list[int] = []
        while True:
            if len(text) > self._limits.max_header:
                raise LimitExceeded(f"{_shown(self._name)}: a sparse map longer than max_header")
            block = b"".join(self._take(min(BLOCK, self._left)))
            if len(block) < BLOCK:
                raise _damaged(self._name, "its sparse map ends early")
            text += block
            lines += block.count(b"\n")
            if wanted == 1 and lines:
                count = _decimal(bytes(text[: text.index(b"\n")]), self._name, "sparse map")
                if not 0 <= count <= self._limits.max_header:
                    raise _damaged(self._name, "its sparse map is too long")
                wanted = 1 + 2 * count
            if lines >= wanted:
                break
        for line in bytes(text).split(b"\n")[1:wanted]:
            numbers.append(_decimal(line, self._name, "sparse map"))
        return numbers
