"""Parses the fields of tar headers: numbers, times and PAX records.

The accepted syntax is that of Go's ``archive/tar`` (``strconv.go``), where that is sound.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final
from zlib import adler32

from .._errors import UnpackError
from .._printable import printable_path

__all__ = [
    "BLOCK",
    "MAX_INT64",
    "PAX_XATTR",
    "damaged_entry",
    "has_valid_checksum",
    "parse_decimal",
    "parse_mode_and_owner",
    "parse_number",
    "parse_octal",
    "parse_pax_records",
    "parse_pax_time",
    "text_until_nul",
]

BLOCK: Final = 512
"""The block size of a tar archive in bytes."""

MAX_INT64: Final = 2**63 - 1
"""The largest size, offset or time."""

PAX_XATTR: Final = b"SCHILY.xattr."
"""The prefix of the key of a PAX record that holds an extended attribute (from star)."""

# The syntax of Go's strconv.ParseInt, also for the seconds of a time: leading zeros and a plus sign
# are allowed.
_DECIMAL_SYNTAX: Final = re.compile(rb"([+-]?)0*([0-9]{1,19})\Z")
_TIME_SYNTAX: Final = re.compile(rb"([+-]?)0*([0-9]{1,19})(?:\.([0-9]*))?\Z")
_TEXT_KEYS: Final = frozenset({b"path", b"linkpath", b"uname", b"gname", b"GNU.sparse.name"})
_SPARSE_MAP: Final = b"GNU.sparse.map"
_SPARSE_PAIR: Final = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")


def damaged_entry(name: bytes, text: str) -> UnpackError:
    """Return the error for an entry that breaks a rule of the format; ``text`` names the rule."""
    return UnpackError(f"{printable_path(name)}: damaged tar archive: {text}")


def text_until_nul(field: bytes) -> bytes:
    """Return the text of a field, which ends at the first NUL."""
    end = field.find(b"\0")
    return field if end < 0 else field[:end]


def parse_number(field: bytes, name: bytes, field_name: str) -> int:
    """Parse a numeric field: octal, or GNU tar's base-256 for larger numbers."""
    value = parse_octal(field)
    if value is not None:
        return value
    if field[0] & 0x80:
        return _parse_base_256(field, name, field_name)
    text = field.rstrip(b"\0 ").lstrip(b" ")
    if not text:
        return 0
    # A NUL before the digits ends the number for some readers, but not for others.
    text = text_until_nul(text).rstrip(b" ")
    if text.isdigit() and not text.strip(b"01234567"):
        return int(text, 8)
    raise damaged_entry(name, f"its {field_name} is not a number: {field!r}")


# Most entries of an archive share these three values with other entries.
@lru_cache(maxsize=256)
def parse_mode_and_owner(field: bytes) -> tuple[int, int, int] | None:
    """Parse mode, owner and group; return ``None`` unless all are plain octal numbers."""
    mode, uid, gid = parse_octal(field[:8]), parse_octal(field[8:16]), parse_octal(field[16:])
    return None if mode is None or uid is None or gid is None else (mode & 0o7777, uid, gid)


def parse_octal(field: bytes) -> int | None:
    """Parse an octal number at the start of a field; return ``None`` for other fields."""
    text = field.rstrip(b"\0 ")
    if text.isdigit():
        try:
            return int(text, 8)
        except ValueError:
            pass
    return None


def _parse_base_256(field: bytes, name: bytes, field_name: str) -> int:
    value = int.from_bytes(field, "big")
    bits = 8 * len(field)
    # The top bit marks the encoding, the one below it is the sign (two's complement).
    value -= 1 << (bits - 1)
    if field[0] & 0x40:
        value -= 1 << (bits - 1)
    if not -MAX_INT64 <= value <= MAX_INT64:
        raise damaged_entry(name, f"its {field_name} is out of range")
    return value


def has_valid_checksum(header: bytes) -> bool:
    """Return whether a header's checksum is right.

    The checksum is the sum of the header's bytes, with blanks in the checksum's own field.
    """
    field = header[148:156]
    wanted = parse_octal(field.lstrip(b"\0 "))
    if wanted is None:
        return False
    wanted -= 8 * ord(" ")
    if header.isascii():
        # The lower half of an Adler-32 is the sum plus one, modulo 65521. This sum is smaller.
        return (adler32(header) - adler32(field)) & 0xFFFF == wanted
    if sum(header) - sum(field) == wanted:
        return True
    # Some old writers summed the bytes as signed numbers.
    blank = memoryview(header[:148] + header[156:]).cast("b")
    return sum(blank) == wanted


def parse_decimal(value: bytes, name: bytes, field_name: str) -> int:
    """Parse a number in a PAX record."""
    match = _DECIMAL_SYNTAX.match(value)
    if match is not None:
        result = int(match[2])
        if result <= MAX_INT64:
            return -result if match[1] == b"-" else result
    raise damaged_entry(name, f"its {field_name} is not a number, or out of range: {value[:64]!r}")


def parse_pax_time(value: bytes, name: bytes) -> int:
    """Parse a time in a PAX record as nanoseconds; further digits are cut off."""
    match = _TIME_SYNTAX.match(value)
    if match is None:
        raise damaged_entry(name, f"its mtime is not a time: {value[:64]!r}")
    sign, seconds, fraction = match.groups()
    nanoseconds = int(seconds) * 10**9
    if fraction:
        nanoseconds += int(fraction[:9].ljust(9, b"0"))
    return -nanoseconds if sign == b"-" else nanoseconds


def parse_pax_records(body: bytes, name: bytes) -> dict[bytes, bytes]:
    """Parse the records of an extended header: lines of ``length key=value``.

    The last of several records with the same key wins. A record without a value removes earlier
    records with its key (POSIX), except that an extended attribute may be empty. The pairs of
    GNU's sparse format 0.0 become a map as in format 0.1.
    """
    found: dict[bytes, bytes] = {}
    pairs: list[bytes] = []
    position, length = 0, len(body)
    while position < length:
        space = body.find(b" ", position, position + 20)
        digits = body[position:space] if space > 0 else b""
        end = position + int(digits) if digits.isdigit() else 0
        # The shortest record is `5 k=\n`; its length counts the length field, too.
        if end < space + 3 or end > length or body[end - 1] != 0x0A:
            raise damaged_entry(name, "a record of its extended header has a wrong length")
        key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if not key or not equals:
            raise damaged_entry(name, "a record of its extended header has no key")
        if key[0] in b" \t":
            # GNU tar skips the blank, so it reads another key than other readers do.
            raise damaged_entry(
                name, f"its extended header has a blank before the key {key[:64]!r}"
            )
        if b"\0" in key or (key in _TEXT_KEYS and b"\0" in value):
            raise damaged_entry(name, f"its extended header has a NUL in the record {key[:64]!r}")
        if key in _SPARSE_PAIR:
            if key != _SPARSE_PAIR[len(pairs) % 2] or b"," in value:
                raise damaged_entry(name, "its sparse map is not a list of offset and length pairs")
            pairs.append(value)
        found[key] = value
        position = end
    if pairs:
        if _SPARSE_MAP in found:
            raise damaged_entry(name, "it has two sparse maps")
        found[_SPARSE_MAP] = b",".join(pairs)
    if b"" in found.values():
        return {k: v for k, v in found.items() if v or k.startswith(PAX_XATTR)}
    return found
