"""Writes the headers of tar members.

Python's ``tarfile`` does not fit. It marks names that are not UTF-8 by ``hdrcharset=BINARY``,
which no other program does (Go and GNU tar write the bytes as they are), and it stores times as
floats.
"""

from __future__ import annotations

from typing import Final

from .fields import BLOCK
from .reader import Member, MemberType

__all__ = ["END_OF_ARCHIVE", "header", "padding"]

END_OF_ARCHIVE: Final = bytes(2 * BLOCK)

_FLAGS_BY_TYPE: Final[dict[MemberType, bytes]] = {
    "file": b"0",
    "hardlink": b"1",
    "symlink": b"2",
    "char": b"3",
    "block": b"4",
    "dir": b"5",
    "fifo": b"6",
}

# The largest numbers in ustar's fields of eight and twelve bytes, the last of which is a NUL.
_MAX_7_DIGITS: Final = 0o7777777
_MAX_11_DIGITS: Final = 0o77777777777


def header(member: Member) -> bytes:
    """Return a member's ustar header, after a PAX header for values that do not fit.

    See POSIX.1-2001, ``pax`` interchange format.
    """
    records = {
        b"SCHILY.xattr." + _xattr_bytes(key): member.xattrs[key] for key in sorted(member.xattrs)
    }
    seconds, fraction = divmod(member.mtime_ns, 10**9)
    if fraction:
        records[b"mtime"] = _pax_decimal(member.mtime_ns)
        seconds = min(max(seconds, 0), _MAX_11_DIGITS)
    block = _ustar_block(
        _FLAGS_BY_TYPE[member.type],
        name=_name_or_record(member.name, b"path", records),
        mode=member.mode,
        uid=_number_or_record(member.uid, _MAX_7_DIGITS, b"uid", records),
        gid=_number_or_record(member.gid, _MAX_7_DIGITS, b"gid", records),
        size=_number_or_record(member.size, _MAX_11_DIGITS, b"size", records),
        mtime=_number_or_record(seconds, _MAX_11_DIGITS, b"mtime", records),
        linkname=_name_or_record(member.linkname, b"linkpath", records),
        dev=b"%07o\0%07o\0" % member.dev if member.type in ("char", "block") else bytes(16),
    )
    if not records:
        return block
    body = b"".join(_pax_record(keyword, value) for keyword, value in records.items())
    return _ustar_block(b"x", name=b"PaxHeader", size=len(body)) + body + padding(len(body)) + block


def padding(size: int) -> bytes:
    """Return the zeros between ``size`` bytes of content and the next block."""
    return bytes(-size % BLOCK)


def _ustar_block(
    flag: bytes,
    *,
    name: bytes,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    mtime: int = 0,
    linkname: bytes = b"",
    dev: bytes = bytes(16),
) -> bytes:
    before = b"%b%07o\0%07o\0%07o\0%011o\0%011o\0" % (
        *(name.ljust(100, b"\0"), mode, uid, gid, size, mtime),
    )
    after = b"%b%bustar\x0000%b%b%b" % (
        *(flag, linkname.ljust(100, b"\0"), bytes(64), dev, bytes(167)),
    )
    # The checksum counts its own field as spaces.
    checksum = sum(before) + sum(after) + 8 * 0x20
    return b"%b%06o\0 %b" % (before, checksum, after)


def _name_or_record(path: bytes, keyword: bytes, records: dict[bytes, bytes]) -> bytes:
    if len(path) <= 100 and path.isascii():
        return path
    records[keyword] = path
    return path[:90].decode("ascii", "ignore").encode()


def _number_or_record(
    number: int, largest: int, keyword: bytes, records: dict[bytes, bytes]
) -> int:
    if 0 <= number <= largest:
        return number
    records[keyword] = b"%d" % number
    return 0


def _pax_decimal(nanoseconds: int) -> bytes:
    """Format nanoseconds as seconds, without zeros at the end of the fraction."""
    seconds, fraction = divmod(abs(nanoseconds), 10**9)
    sign = b"-" if nanoseconds < 0 else b""
    return b"%b%d.%b" % (sign, seconds, (b"%09d" % fraction).rstrip(b"0"))


def _pax_record(keyword: bytes, value: bytes) -> bytes:
    """Format a record as ``LENGTH KEYWORD=VALUE``, where the length counts its own digits."""
    rest = len(keyword) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length += 1
    return b"%d %b=%b\n" % (length, keyword, value)


def _xattr_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
