"""Random damage to archives and to compressed archives."""

from __future__ import annotations

import attrs
from cases.layers import maketar
from hypothesis import strategies as st

from trio_layers._tar.fields import has_valid_checksum


@attrs.frozen
class Damage:
    """One change of an archive; places are modulo its length."""

    kind: str
    place: int
    other: int
    value: bytes


NAMES = ["../outside/file", "a/b", "", "x", "/", "..", ".wh.x", "n" * 256, "s/file", "d/" * 300]
FIELD_VALUES = [
    *(b"", b"\0" * 12, b" " * 12, b"7" * 12, b"0" * 11 + b"\0", b"00000001000\0"),
    *(b"99999999999\0", b"\x80" + b"\0" * 10 + b"\x01", b"\xff" * 12, b"\x80" + b"\xff" * 11),
    *(b"\x80" + b"\0" * 11, b"-0000000001\0", b"0x10\0", b"1_0\0", b"+5\0", b"./../x\0"),
    *(b"S", b"1", b"2", b"5", b"x", b"g", b"L", b"K", b"\0", b"7", b"M", b"ustar  \0"),
    *(b"ustar\0", b"ustar\x0000", b"\x01"),
]
RECORDS = [
    *(b"path=../x", b"path=", b"path=x", b"linkpath=../../outside/file", b"linkpath="),
    *(b"size=0", b"size=512", b"size=99999999999", b"size=-1", b"size=9223372036854775808"),
    *(b"mtime=x", b"mtime=-1.5", b"mtime=99999999999999999999", b"uid=-1", b"uid=4294967295"),
    *(b"gid=1e3", b"GNU.sparse.major=1", b"GNU.sparse.minor=0"),
    *(b"GNU.sparse.realsize=100000", b"GNU.sparse.size=4194304", b"GNU.sparse.map=0,1,5,6"),
    *(b"GNU.sparse.numblocks=1", b"GNU.sparse.offset=3", b"GNU.sparse.numbytes=9"),
    *(b"GNU.sparse.name=../outside/exec", b"SCHILY.xattr.user.k=v"),
    *(b"SCHILY.xattr.trusted.overlay.opaque=y", b"SCHILY.xattr.=v"),
    b"SCHILY.xattr.system.posix_acl_access=\x02\0\0\0",
    *(b"SCHILY.xattr.security.capability=\0", b"SCHILY.xattr.user.big=" + b"v" * 5000),
    *(b"comment=\0", b"=", b"path=a\0b", b"path=\xff\xfe"),
]
KINDS = [
    *("flip", "flip-mended", "flip-mended", "byte", "cut", "drop", "double", "swap"),
    *("insert", "zero", "field", "field", "field", "records", "records", "raw-records"),
    *("long", "truncate", "append"),
]
TAR_DAMAGE = st.builds(
    Damage,
    kind=st.sampled_from(KINDS),
    place=st.integers(0, 2**16),
    other=st.integers(0, 2**16),
    value=st.one_of(st.sampled_from(FIELD_VALUES), st.binary(max_size=40)),
)
BLOB_DAMAGE = st.builds(
    Damage,
    kind=st.sampled_from(["flip", "byte", "cut", "insert", "truncate", "append", "double-all"]),
    place=st.integers(0, 2**20),
    other=st.integers(0, 2**16),
    value=st.binary(min_size=1, max_size=40),
)


def headers_of(tar: bytes) -> list[int]:
    """Return the positions of headers, also of apparent ones in content."""
    return [
        place
        for place in range(0, len(tar) - 511, 512)
        if tar[place : place + 512].count(0) < 512 and has_valid_checksum(tar[place : place + 512])
    ]


def damaged(data: bytes, damage: Damage) -> bytes:
    """Return a damaged archive, plain or compressed."""
    if not data:
        return damage.value
    place = damage.place % len(data)
    block, other = place // 512 * 512, damage.other % len(data) // 512 * 512
    headers = headers_of(data) or [0]
    header = headers[damage.place % len(headers)]
    match damage.kind:
        case "flip":
            # Most damage is in a header.
            place = header + damage.other % 512 if damage.other % 3 else place
            place = min(place, len(data) - 1)
            return overwrite(data, place, bytes([data[place] ^ 1 << damage.other % 8]))
        case "flip-mended":
            place = min(header + damage.other % 512, len(data) - 1)
            return update_checksum(
                overwrite(data, place, bytes([data[place] ^ 1 << place % 8])), header
            )
        case "byte":
            return overwrite(data, place, damage.value[:1] or b"\0")
        case "cut":
            return data[:place] + data[place + 1 + damage.other % 100 :]
        case "drop":
            return data[:block] + data[block + 512 :]
        case "double":
            return data[: block + 512] + data[block:]
        case "swap":
            low, high = sorted((block, other))
            moved = overwrite(data, low, data[high : high + 512])
            return overwrite(moved, high, data[low : low + 512])
        case "insert":
            return data[:block] + damage.value + data[block:]
        case "zero":
            return overwrite(data, block, bytes(512))
        case "truncate":
            return data[:place]
        case "append":
            return data + damage.value
        case "double-all":
            return data + data
        case "field":
            start, length = list(maketar.FIELDS.values())[damage.other % len(maketar.FIELDS)]
            return update_checksum(overwrite(data, header + start, damage.value[:length]), header)
        case "records":
            chosen = [
                RECORDS[(damage.other + 7 * n) % len(RECORDS)] for n in range(damage.other % 4)
            ]
            body = b"".join(maketar.pax_record(*each.split(b"=", 1)) for each in chosen)
            extension = maketar.meta(b"x", b"PaxHeaders/x", body, "pax")
            return data[:header] + extension + data[header:]
        case "raw-records":
            extension = maketar.meta([b"x", b"g"][damage.other % 2], b"x", damage.value, "pax")
            return data[:header] + extension + data[header:]
        case "long":
            name = maketar.to_bytes(NAMES[damage.other % len(NAMES)])
            flag = b"LK"[damage.other % 2 :][:1]
            return data[:header] + maketar.meta(flag, b"././@LongLink", name, "gnu") + data[header:]
    raise AssertionError(damage.kind)


def overwrite(data: bytes, place: int, value: bytes) -> bytes:
    return (data[:place] + value + data[place + len(value) :])[: len(data)]


def update_checksum(data: bytes, header: int) -> bytes:
    """Return the archive with a new checksum in one header."""
    block = data[header : header + 512]
    if len(block) < 512:
        return data
    total = sum(block) - sum(block[148:156]) + 8 * 32
    return overwrite(data, header + 148, b"%06o\0 " % total)
