"""The tar reader: what Go's reader reads, and what must be refused."""

from __future__ import annotations

import io
import tarfile

import pytest
from cases.layers import maketar
from layers.plain import Plain, archive

from trio_layers._errors import LimitExceeded, UnpackError
from trio_layers._unpack.tar import Limits, Member, TarReader


def members(data: bytes, limits: Limits | None = None) -> list[tuple[Member, bytes]]:
    """All members, each with its content, holes filled."""
    reader = TarReader(Plain(data), limits or Limits())
    return [
        (m, b"".join(bytes(p) if isinstance(p, int) else p for p in reader.data())) for m in reader
    ]


def only(*entries: dict) -> Member:
    ((member, _),) = members(archive(*entries))
    return member


def test_what_tarfile_writes() -> None:
    """An archive of Python's tarfile, in its three formats, is read as it was meant."""
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            info = tarfile.TarInfo("d/" + "n" * 90 + "/file")
            info.size, info.mode, info.uid, info.gid, info.mtime = 5, 0o4755, 7, 8, 1_500_000_000
            tar.addfile(info, io.BytesIO(b"hello"))
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, "d/e"
            tar.addfile(link)
        (file, content), (symlink, _) = members(buffer.getvalue())
        assert content == b"hello"
        assert file.name == b"d/" + b"n" * 90 + b"/file"
        assert (file.type, file.mode, file.uid, file.gid) == ("file", 0o4755, 7, 8)
        assert file.mtime_ns == 1_500_000_000 * 10**9
        assert (symlink.type, symlink.linkname) == ("symlink", b"d/e")


def test_pax_overrides_the_header() -> None:
    """Records replace the header's fields; empty ones leave them, the last of several counts."""
    member = only(
        {
            "name": "short",
            "type": "symlink",
            "linkname": "target",
            "pax": [["path", "first"], ["path", "long"], ["linkpath", ""], ["uid", "3000000000"]],
        }
    )
    assert (member.name, member.linkname, member.uid) == (b"long", b"target", 3_000_000_000)


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("0", 0),
        ("1.5", 1_500_000_000),
        ("-1.5", -1_500_000_000),
        ("-0.000000001", -1),
        ("1.0000000019", 1_000_000_001),
        ("99999999999", 0),
    ],
)
def test_times(text: str, nanoseconds: int) -> None:
    """Fractions, times before 1970, and those that no file system holds (as moby has them)."""
    assert only({"name": "a", "pax": {"mtime": text}}).mtime_ns == nanoseconds


def test_base_256() -> None:
    """GNU's way of writing numbers, negative ones too."""
    member = only({"name": "a", "format": "gnu", "uid": 2**31, "mtime": -5})
    assert (member.uid, member.mtime_ns) == (2**31, -5 * 10**9)


def test_xattrs_may_be_binary_and_empty() -> None:
    """Values of attributes are bytes, and may be none at all."""
    raw = maketar.pax_record(b"SCHILY.xattr.user.a", b"\0\n=\xff")
    raw += maketar.pax_record(b"SCHILY.xattr.user.b", b"")
    member = only({"name": "a", "pax_raw": {"hex": raw.hex()}})
    assert member.xattrs == {"user.a": b"\0\n=\xff", "user.b": b""}


@pytest.mark.parametrize("form", ["gnu", "pax-1.0", "pax-0.1"])
@pytest.mark.parametrize("segments", [1, 5, 60])
def test_sparse(form: str, segments: int) -> None:
    """Sparse files are as long as they were, with zeros in their holes."""
    layout = [[n * 4096, 7] for n in range(segments)]
    real = segments * 4096 + 100
    sparse = {"format": form, "realsize": real, "map": layout}
    entry = {"name": "dir/s", "text": "content" * segments, "sparse": sparse}
    (member, content), (after, _) = members(archive(entry, {"name": "after"}))
    expected = bytearray(real)
    for offset, length in layout:
        expected[offset : offset + length] = b"content"
    assert (member.name, member.size) == (b"dir/s", real)
    assert content == bytes(expected)
    assert after.name == b"after"


def test_sparse_0_0() -> None:
    """The oldest of PAX's sparse formats has a pair of records for each segment."""
    pairs = [["GNU.sparse.offset", "10"], ["GNU.sparse.numbytes", "2"]]
    records = [["GNU.sparse.size", "20"], ["GNU.sparse.numblocks", "1"], *pairs]
    ((_, content),) = members(archive({"name": "s", "text": "ab", "pax": records}))
    assert content == bytes(10) + b"ab" + bytes(8)


@pytest.mark.parametrize(
    "layout",
    [[[0, 5]], [[0, 1], [0, 1]], [[90, 2], [10, 0]], [[99, 2]], [[-1, 2]], [[0, -2], [0, 4]]],
    ids=str,
)
def test_sparse_map_must_fit(layout: list[list[int]]) -> None:
    """Segments are in order, apart, within the file, and make up the data."""
    sparse = {"format": "pax-0.1", "realsize": 100, "map": layout}
    with pytest.raises(UnpackError, match="sparse map"):
        members(archive({"name": "s", "text": "ab", "sparse": sparse}))


@pytest.mark.parametrize(
    "fields",
    [
        {"size": "2d31"},
        {"size": "38"},
        {"size": "315f30"},
        {"uid": "ffffffffffffffff"},
        {"uid": "80000000ffffffff"},
        {"mtime": "787878"},
        {"chksum": "303030303030"},
    ],
    ids=str,
)
def test_bad_numbers(fields: dict[str, str]) -> None:
    """A number is octal digits or base-256, in its range, or the entry is refused by its name."""
    with pytest.raises(UnpackError, match="broken-entry"):
        members(archive({"name": "broken-entry", "fields": fields}))


@pytest.mark.parametrize(
    "raw",
    ["11 path=abc\n", "12 path=abcd", "0 a=b\n", "x", "5 =b\n", "6 abc\n", "-1 a=b\n", "99 a=b\n"],
)
def test_bad_records(raw: str) -> None:
    """An extended header whose records do not add up is damaged."""
    with pytest.raises(UnpackError, match="extended header"):
        members(archive({"name": "a", "pax_raw": raw}))


@pytest.mark.parametrize("kept", [100, 512 + 3, 700])
def test_truncated(kept: int) -> None:
    """An archive that stops in a header or in data is damaged."""
    data = archive({"name": "a", "text": "x" * 600})[:kept]
    with pytest.raises(UnpackError, match="ends"):
        members(data)


def test_end() -> None:
    """Two blocks of zeros, one, none: all are seen. Data behind one block is an error."""
    whole = archive({"name": "a", "text": "x"})
    bare = whole[:1024]
    for data in (whole, bare + bytes(512), bare, whole + b"garbage"):
        assert len(members(data)) == 1
    with pytest.raises(UnpackError, match="single block"):
        members(bare + bytes(512) + b"x" * 512)


def test_limits() -> None:
    """Headers and attributes have their limits, and the error names them."""
    long = {"name": "a", "pax": {"comment": "c" * 5000}}
    assert len(members(archive(long))) == 1
    with pytest.raises(LimitExceeded, match="max_header"):
        members(archive(long), Limits(max_header=4096))
    with pytest.raises(LimitExceeded, match="max_header"):
        members(archive({"name": "n" * 5000, "format": "gnu"}), Limits(max_header=4096))
    with pytest.raises(LimitExceeded, match="max_xattr"):
        members(archive({"name": "a", "pax": {"SCHILY.xattr.user.x": "vv"}}), Limits(max_xattr=1))


def test_unread_content_is_passed_over() -> None:
    """The next member is found whether or not the content was taken, and after a part of it."""
    data = archive({"name": "a", "text": "x" * 3000}, {"name": "b", "text": "y" * 10})
    reader = TarReader(Plain(data), Limits())
    names = []
    for member in reader:
        names.append(member.name)
        if member.name == b"a":
            assert next(reader.data())
    assert names == [b"a", b"b"]
