"""The tar reader: formats that Go's reader reads, and archives that are refused."""

from __future__ import annotations

import io
import tarfile

import pytest
from _tools.plain_tars import Plain, archive
from cases.layers import maketar

from trio_layers._errors import LimitExceeded, UnpackError
from trio_layers._tar.reader import Limits, Member, TarReader


def members(data: bytes, limits: Limits | None = None) -> list[tuple[Member, bytes]]:
    """Return all members, each with its content, where holes are zeros."""
    reader = TarReader(Plain(data), limits or Limits())
    return [
        (m, b"".join(bytes(p) if isinstance(p, int) else p for p in reader.data())) for m in reader
    ]


def only(*entries: dict) -> Member:
    ((member, _),) = members(archive(*entries))
    return member


def test_archives_of_tarfile() -> None:
    """Archives of Python's tarfile, in its three formats, are read correctly."""
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
    """Records override the header; empty ones do not, and the last of several wins."""
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
    """Fractions, times before 1970, and times that no file system holds, as in moby."""
    assert only({"name": "a", "pax": {"mtime": text}}).mtime_ns == nanoseconds


ZEROS = "0" * 30


def test_zeros_and_a_plus_before_a_number() -> None:
    """Leading zeros and a plus sign do not change a number in a record, as in Go."""
    for before in (ZEROS, "+", "+" + ZEROS):
        pax = {"uid": before + "1000", "gid": before + "7", "mtime": before + "15.5"}
        member = only({"name": "a", "text": "abc", "pax": {**pax, "size": before + "3"}})
        assert (member.uid, member.gid, member.mtime_ns) == (1000, 7, 15_500_000_000)
        assert member.size == 3
    assert only({"name": "a", "pax": {"mtime": f"-{ZEROS}1.5"}}).mtime_ns == -1_500_000_000
    assert only({"name": "a", "pax": {"uid": "-0"}}).uid == 0


def test_zeros_in_the_numbers_of_a_sparse_map() -> None:
    records = [
        ["GNU.sparse.size", f"{ZEROS}9"],
        ["GNU.sparse.realsize", "+9"],
        ["GNU.sparse.numblocks", f"+{ZEROS}1"],
        ["GNU.sparse.map", f"{ZEROS}3,+2"],
    ]
    ((_, content),) = members(archive({"name": "s", "text": "ab", "pax": records}))
    assert content == b"\0\0\0ab\0\0\0\0"


@pytest.mark.parametrize(
    "value", ["++1", "+-1", "+", "-", " 1", "1 ", "1_0", "0x1", f"{ZEROS}9223372036854775808"]
)
@pytest.mark.parametrize("key", ["uid", "size", "mtime"])
def test_invalid_numbers(key: str, value: str) -> None:
    """Invalid numbers stay invalid, and numbers that are too large stay out of range."""
    if key == "mtime" and value.endswith("808"):
        # No file system can store such a time. moby replaces it with the epoch.
        assert only({"name": "a", "pax": {key: value}}).mtime_ns == 0
        return
    with pytest.raises(UnpackError, match=r"not a (number|time)"):
        members(archive({"name": "a", "pax": {key: value}}))


def test_base_256() -> None:
    """GNU's base-256 numbers are read, including negative ones."""
    member = only({"name": "a", "format": "gnu", "uid": 2**31, "mtime": -5})
    assert (member.uid, member.mtime_ns) == (2**31, -5 * 10**9)


def test_xattrs_may_be_binary_and_empty() -> None:
    """Attribute values are bytes and may be empty."""
    raw = maketar.pax_record(b"SCHILY.xattr.user.a", b"\0\n=\xff")
    raw += maketar.pax_record(b"SCHILY.xattr.user.b", b"")
    member = only({"name": "a", "pax_raw": {"hex": raw.hex()}})
    assert member.xattrs == {"user.a": b"\0\n=\xff", "user.b": b""}


@pytest.mark.parametrize("form", ["gnu", "pax-1.0", "pax-0.1"])
@pytest.mark.parametrize("segments", [1, 5, 60])
def test_sparse(form: str, segments: int) -> None:
    """Sparse files have their full size, with zeros in their holes."""
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
    """The oldest PAX sparse format has a pair of records for each segment."""
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
    """Segments must be in order, disjoint and within the file, and make up the data."""
    sparse = {"format": "pax-0.1", "realsize": 100, "map": layout}
    with pytest.raises(UnpackError, match="sparse map"):
        members(archive({"name": "s", "text": "ab", "sparse": sparse}))


@pytest.mark.parametrize(
    "fields",
    [
        {"size": "2d31"},
        {"size": "38"},
        {"size": "315f30"},
        # Go reads the digits after a NUL, Python does not.
        {"size": "0030303030303030303134"},
        {"uid": "ffffffffffffffff"},
        {"uid": "80000000ffffffff"},
        {"mtime": "787878"},
        {"chksum": "303030303030"},
    ],
    ids=str,
)
def test_bad_numbers(fields: dict[str, str]) -> None:
    """A number must be octal or base-256 and in range; the error names the entry."""
    with pytest.raises(UnpackError, match="broken-entry"):
        members(archive({"name": "broken-entry", "fields": fields}))


@pytest.mark.parametrize(
    "raw",
    ["11 path=abc\n", "12 path=abcd", "0 a=b\n", "x", "5 =b\n", "6 abc\n", "-1 a=b\n", "99 a=b\n"],
)
def test_bad_records(raw: str) -> None:
    """An extended header whose record lengths do not add up is damaged."""
    with pytest.raises(UnpackError, match="extended header"):
        members(archive({"name": "a", "pax_raw": raw}))


@pytest.mark.parametrize("kept", [100, 512 + 3, 700])
def test_truncated(kept: int) -> None:
    """An archive that ends within a header or data is damaged."""
    data = archive({"name": "a", "text": "x" * 600})[:kept]
    with pytest.raises(UnpackError, match="ends"):
        members(data)


def test_end() -> None:
    """An archive may end with two zero blocks, one or none, but no data after one block."""
    whole = archive({"name": "a", "text": "x"})
    bare = whole[:1024]
    for data in (whole, bare + bytes(512), bare, whole + b"garbage"):
        assert len(members(data)) == 1
    with pytest.raises(UnpackError, match="single block"):
        members(bare + bytes(512) + b"x" * 512)


def test_limits() -> None:
    """Headers and attributes have limits, and the error names the limit."""
    long = {"name": "a", "pax": {"comment": "c" * 5000}}
    assert len(members(archive(long))) == 1
    with pytest.raises(LimitExceeded, match="max_header"):
        members(archive(long), Limits(max_header=4096))
    with pytest.raises(LimitExceeded, match="max_header"):
        members(archive({"name": "n" * 5000, "format": "gnu"}), Limits(max_header=4096))
    with pytest.raises(LimitExceeded, match="max_xattr"):
        members(archive({"name": "a", "pax": {"SCHILY.xattr.user.x": "vv"}}), Limits(max_xattr=1))


def test_unread_content_is_passed_over() -> None:
    """The next member is found whether all, part or none of the content was read."""
    data = archive({"name": "a", "text": "x" * 3000}, {"name": "b", "text": "y" * 10})
    reader = TarReader(Plain(data), Limits())
    names = []
    for member in reader:
        names.append(member.name)
        if member.name == b"a":
            assert next(reader.data())
    assert names == [b"a", b"b"]


def extension(flag: str, body: bytes) -> dict:
    """Return an extended header without the entry that it extends."""
    return {"raw": maketar.meta(flag.encode(), b"extension", body, "pax").hex()}


def long(flag: str, name: str) -> dict:
    return extension(flag, name.encode() + b"\0")


PAX = extension(
    "x", maketar.pax_record(b"path", b"by-pax") + maketar.pax_record(b"linkpath", b"to-pax")
)
GLOBAL = extension("g", maketar.pax_record(b"comment", b"c"))
FILE = {"name": "file", "text": "text"}


@pytest.mark.parametrize(
    "before",
    [
        [PAX, PAX],
        [long("L", "a"), long("L", "a")],
        [long("K", "a"), PAX, long("K", "b")],
        [PAX, GLOBAL],
        [long("L", "a"), GLOBAL],
        [long("K", "a"), GLOBAL],
    ],
)
def test_repeated_extended_headers(before: list[dict]) -> None:
    """Readers disagree on repeated extended headers, and on a global header after one."""
    with pytest.raises(UnpackError, match="an extended header follows another one instead"):
        members(archive(*before, FILE))


def test_extended_headers_may_be_mixed() -> None:
    """One entry may have GNU and PAX headers that agree, in any order after global ones."""
    for entries in ([PAX, long("K", "to-pax")], [long("L", "by-pax"), PAX, long("K", "to-pax")]):
        member = only(GLOBAL, *entries, {"name": "short", "type": "symlink", "linkname": "l"})
        assert (member.name, member.linkname) == (b"by-pax", b"to-pax")
    with pytest.raises(UnpackError, match="another header names it 'by-pax'"):
        members(archive(PAX, long("L", "other"), FILE))
    with pytest.raises(UnpackError, match="two link targets, 'other' and 'to-pax'"):
        members(archive(PAX, long("K", "other"), FILE))


@pytest.mark.parametrize("header", [0, 4, 0o77777777777])
def test_the_size_in_a_record_counts(header: int) -> None:
    """A record's size overrides a header with zero, the same size or the largest number."""
    field = (b"%011o\0" % header).hex()
    entry = FILE | {"pax": {"size": "4"}, "fields": {"size": field}}
    (first, content), (second, _) = members(archive(entry, {"name": "second"}))
    assert (first.size, content, second.name) == (4, b"text", b"second")


@pytest.mark.parametrize(("header", "record"), [(4, 0), (4, 3), (512, 4), (4, 1024)])
def test_two_sizes_are_an_error(header: int, record: int) -> None:
    """Two different sizes make one reader take data for entries (CVE-2025-62518)."""
    fields = {"size": (b"%011o\0" % header).hex()}
    with pytest.raises(
        UnpackError, match=f"'file': .* its size is {header} in the header, but {record} in a"
    ):
        members(archive(FILE | {"pax": {"size": str(record)}, "fields": fields}))


def header_with(area: bytes, *, magic: bytes, end: bytes = b"") -> bytes:
    """Return the header of an empty file with ``area`` in place of ustar's prefix."""
    fields = {"name": b"name", "mode": b"0000644\0", "typeflag": b"0", "magic": magic}
    block = bytearray(maketar.header(fields | {"prefix": area[:155]}))
    block[508 : 508 + len(end)] = end
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
    return bytes(block)


@pytest.mark.parametrize(
    ("block", "name"),
    [
        (header_with(b"p" * 155, magic=b"ustar\x0000"), b"p" * 155 + b"/name"),
        (header_with(b"", magic=b"ustar\x0000"), b"name"),
        # star has a prefix of 131 bytes, then times.
        (
            header_with(b"p" * 131 + b"00000000001 " * 2, magic=b"ustar\x0000", end=b"tar\0"),
            b"p" * 131 + b"/name",
        ),
        # GNU has times here, but Go before 1.8 wrote prefixes.
        (header_with(b"14371573000\0" * 2, magic=b"ustar  \0"), b"name"),
        (header_with(b"\x80" + bytes(11), magic=b"ustar  \0"), b"name"),
        (header_with(b"usr/share/doc", magic=b"ustar  \0"), b"usr/share/doc/name"),
        (header_with(b"1999", magic=b"ustar  \0"), b"1999/name"),
        (header_with(b"14371573000\0" + b"\0zzz", magic=b"ustar  \0"), b"name"),
    ],
    ids=[
        "ustar",
        "none",
        "star",
        "gnu",
        "gnu-base-256",
        "old-go",
        "old-go-digits",
        "gnu-no-ctime",
    ],
)
def test_name_prefixes(block: bytes, name: bytes) -> None:
    """A header ends with a prefix in ustar, a shorter one in star, times in GNU's."""
    ((member, _),) = members(block)
    assert member.name == name


@pytest.mark.parametrize("magic", [bytes(8), b"ustar 00"])
def test_a_prefix_in_no_known_format(magic: bytes) -> None:
    """Python uses a prefix in every format, Go does not."""
    assert members(header_with(b"", magic=magic))[0][0].name == b"name"
    with pytest.raises(UnpackError, match=r"'name': .* a name prefix"):
        members(header_with(b"usr", magic=magic))


def test_an_empty_record_takes_back_the_one_before() -> None:
    """An empty record leaves the header's field, as in POSIX."""
    assert only({"name": "a", "pax": [["path", "b"], ["path", ""]]}).name == b"a"


@pytest.mark.parametrize("key", [" path", "\tpath"])
def test_blanks_before_a_key(key: str) -> None:
    """GNU tar skips blanks before a key; for Go and Python they are part of it."""
    with pytest.raises(UnpackError, match="blank before"):
        only({"name": "a", "pax": [[key, "b"]]})


@pytest.mark.parametrize("key", ["size", "GNU.sparse.size"])
def test_sizes_for_all_are_an_error(key: str) -> None:
    """Python and GNU tar apply a global size to each entry, Go does not."""
    body = maketar.pax_record(key.encode(), b"512")
    with pytest.raises(UnpackError, match="a global header sets a size"):
        members(archive(extension("g", body), FILE))


@pytest.mark.parametrize("flag", "LK")
def test_an_empty_long_name_is_an_error(flag: str) -> None:
    """Go uses the header's own name, Python and GNU tar the empty one."""
    with pytest.raises(UnpackError, match="its long name is empty"):
        members(archive(long(flag, ""), FILE))


@pytest.mark.parametrize(("header", "record"), [("a/", "b"), ("a", "b/")])
def test_a_slash_in_one_of_two_names(header: str, record: str) -> None:
    """An entry without a type may end with a slash in both of its names or in none.

    Such a slash makes a directory, for Python in the header, for Go in the record. No data
    follows a directory, so readers look for the next header at different places.
    """
    with pytest.raises(UnpackError, match="only one of its two names ends with a slash"):
        only({"name": header, "type": "\0", "text": "text", "pax": {"path": record}})
    member = only({"name": "a/", "type": "\0", "pax": {"path": "b/"}})
    assert (member.name, member.type) == (b"b/", "dir")


def test_nuls_in_records() -> None:
    """A NUL would end a name early; values of other keys may contain one."""
    assert only({"name": "a", "pax": {"comment": {"hex": "00"}}}).name == b"a"
    for key in ("path", "linkpath", "uname", "GNU.sparse.name"):
        with pytest.raises(UnpackError, match="NUL"):
            only({"name": "a", "pax": {key: {"hex": "6100"}}})
    with pytest.raises(UnpackError, match="NUL"):
        only({"name": "a", "pax": [[{"hex": "6100"}, "v"]]})


PAIRS = [["GNU.sparse.offset", "0"], ["GNU.sparse.numbytes", "4"]]


@pytest.mark.parametrize(
    "records",
    [
        [["GNU.sparse.size", "4"], ["GNU.sparse.numblocks", "1"], *reversed(PAIRS)],
        [["GNU.sparse.size", "4"], ["GNU.sparse.numblocks", "1"], *PAIRS, PAIRS[0]],
        [["GNU.sparse.size", "4"], ["GNU.sparse.numblocks", "2"], *PAIRS],
        [["GNU.sparse.size", "4"], *PAIRS],
        [["GNU.sparse.numblocks", "1"], *PAIRS],
        [
            *(["GNU.sparse.size", "4"], ["GNU.sparse.realsize", "5"]),
            *(["GNU.sparse.numblocks", "1"], *PAIRS),
        ],
        [["GNU.sparse.map", "0,4"], ["GNU.sparse.numblocks", "1"], *PAIRS],
        [["GNU.sparse.major", "1"], ["GNU.sparse.minor", "1"], ["GNU.sparse.size", "4"]],
        [["GNU.sparse.major", "1"], ["GNU.sparse.size", "4"]],
        [["GNU.sparse.name", "other"]],
    ],
)
def test_a_sparse_file_is_described_once_and_in_full(records: list[list[str]]) -> None:
    """Incomplete or contradictory records are an error."""
    with pytest.raises(UnpackError, match="sparse"):
        only(FILE | {"pax": records}, {"name": "x"})


def test_explicit_versions_of_sparse_files() -> None:
    """Formats 0.0 and 0.1 may state their version."""
    records = [["GNU.sparse.size", "6"], ["GNU.sparse.numblocks", "1"], *PAIRS]
    for minor in "01":
        version = [["GNU.sparse.major", "0"], ["GNU.sparse.minor", minor]]
        ((_, content),) = members(archive(FILE | {"pax": [*version, *records]}))
        assert content == b"text\0\0"


def test_only_files_are_sparse() -> None:
    """Only some readers use a name from sparse records, so a directory cannot have one."""
    with pytest.raises(UnpackError, match="not a regular file"):
        only({"name": "a", "type": "dir", "pax": {"GNU.sparse.name": "b"}})
    hole = {"GNU.sparse.size": "9", "GNU.sparse.numblocks": "0"}
    with pytest.raises(UnpackError, match="not a regular file"):
        only({"name": "a/", "type": "\0", "pax": hole})
    with pytest.raises(UnpackError, match="a GNU sparse map and PAX records of another"):
        only({"name": "a", "type": "S", "pax": hole})
    with pytest.raises(UnpackError, match="not in GNU's format"):
        only({"name": "a", "type": "S"})


class Counting(Plain):
    """Counts the requested bytes."""

    asked = 0

    def read(self, size: int) -> bytes:
        self.asked += size
        return super().read(size)


@pytest.mark.parametrize("form", ["gnu", "pax-1.0", "pax-0.1"])
def test_many_tiny_segments_are_linear(form: str) -> None:
    """The map is read once."""
    count = 20_000
    sparse = {"format": form, "realsize": 2 * count, "map": [[2 * n, 1] for n in range(count)]}
    data = archive({"name": "s", "text": "s" * count, "sparse": sparse})
    source = Counting(data)
    reader = TarReader(source, Limits())
    (pieces,) = [list(reader.data()) for _ in reader]
    assert pieces == [b"s", 1] * count
    assert source.asked <= len(data) + 512


def test_a_sparse_map_has_a_limit() -> None:
    """The limit for headers holds for a sparse map in each format."""
    for form in ("gnu", "pax-1.0", "pax-0.1"):
        sparse = {"format": form, "realsize": 2000, "map": [[2 * n, 1] for n in range(1000)]}
        data = archive({"name": "s", "text": "s" * 1000, "sparse": sparse})
        assert len(members(data)) == 1
        with pytest.raises(LimitExceeded, match="max_header"):
            members(data, Limits(max_header=4096))


def test_errors_name_the_entry() -> None:
    """An error names the damaged entry, or the one before if there is no name."""
    data = archive({"name": "first", "text": "x"}, {"name": "second", "text": "x" * 600})
    for damage, text in (
        (data[:1600], "'second': .* its data ends 536 bytes early"),
        (data[:1100], "^'first': .* within a header after this entry"),
        (data[:100], "^damaged .* within a header at its beginning"),
        (
            data[:1024] + bytes(512) + data[1024:],
            "^'first': .* a single block of zeros, not two, after this entry",
        ),
    ):
        with pytest.raises(UnpackError, match=text):
            members(damage)
