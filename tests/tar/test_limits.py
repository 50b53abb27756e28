"""Limits: each stops a layer that exceeds it, in constant memory and before it is on the disk."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import os
import random
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from _tools.plain_tars import archive
from cases.layers import maketar

from trio_layers import LimitExceeded, Limits
from trio_layers._rootfs.merged import MergedTree
from trio_layers._tree.unpack import unpack
from trio_layers._tree.unpacked import Unpacked

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MIB = 1 << 20

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd.compress,
}
"""Functions that compress to members, frames or streams, which may be concatenated."""


def unpacked(pieces: Iterable[bytes], path: Path, **limits: int) -> Unpacked:
    """Unpack a blob that arrives in pieces."""
    held = bytearray()
    rest = iter(pieces)

    def read(size: int) -> bytes:
        while not held:
            piece = next(rest, None)
            if piece is None:
                return b""
            held.extend(piece)
        data = bytes(held[:size])
        del held[:size]
        return data

    path.mkdir()
    # On an empty parent, so that nothing depends on an unknown one.
    return unpack(read, path, lower=MergedTree([]), limits=Limits(**limits))


def header_of(size: int, name: str = "zeros") -> bytes:
    """Return the header of a file of this size, without the content."""
    entry = {"name": name, "format": "gnu", "size": size}
    return b"".join(maketar.iter_entry(entry))


def on_disk(path: Path) -> int:
    return sum(found.lstat().st_size for found in (path / "fs").rglob("*"))


@pytest.mark.parametrize("form", COMPRESS)
@pytest.mark.parametrize("where", ["one file", "many files", "behind the end"])
def test_a_bomb_of_two_gigabytes(form: str, where: str, tmp_path: Path) -> None:
    """A bomb stops at the limit in every format and with its zeros at any place."""
    compress = COMPRESS[form]
    zeros = compress(bytes(16 * MIB))
    if where == "one file":
        pieces = itertools.chain([compress(header_of(2 << 30))], itertools.repeat(zeros, 128))
    elif where == "many files":
        whole = compress(header_of(16 * MIB, "another") + bytes(16 * MIB))
        pieces = itertools.repeat(whole, 128)
    else:
        pieces = itertools.chain([compress(archive({"name": "a"}))], itertools.repeat(zeros, 128))
    limit = 40 * MIB if where == "many files" else 10 * MIB
    tracemalloc.start()
    try:
        with pytest.raises(
            LimitExceeded, match=rf"'(zeros|another|a)': .*max_unpacked_bytes, {limit}"
        ):
            unpacked(pieces, tmp_path / "tree", max_unpacked_bytes=limit)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The pieces of 16 MiB are in memory twice, at most; xz has a window of 8 MiB.
    assert peak < {"none": 68, "xz": 14}.get(form, 4) * MIB
    assert on_disk(tmp_path / "tree") <= limit


def test_a_declared_size_is_checked_first(tmp_path: Path) -> None:
    """Nothing of a file that is too large is read or written."""
    asked: list[int] = []

    def pieces() -> Iterable[bytes]:
        yield header_of(2 << 30)
        asked.append(1)
        yield bytes(MIB)

    with pytest.raises(LimitExceeded, match=r"'zeros': .*max_unpacked_bytes"):
        unpacked(pieces(), tmp_path / "tree", max_unpacked_bytes=10 * MIB)
    assert asked == []
    assert os.listdir(tmp_path / "tree" / "fs") == []


def sparse(size: int, name: str = "sparse") -> dict:
    layout = {"format": "pax-1.0", "realsize": size, "map": [[0, 1]]}
    return {"name": name, "text": "s", "sparse": layout}


def test_holes_count(tmp_path: Path) -> None:
    """Holes count as unpacked bytes, together with the tar."""
    data = archive(sparse(MIB), sparse(MIB, "other"))
    holes = 2 * (MIB - 1)
    unpacked([data], tmp_path / "fits", max_unpacked_bytes=len(data) + holes)
    with pytest.raises(LimitExceeded, match="max_unpacked_bytes"):
        unpacked([data], tmp_path / "does not", max_unpacked_bytes=len(data) + holes - 1)


@pytest.mark.parametrize("kind", ["zeros", "holes", "behind the end"])
def test_ratio(kind: str, tmp_path: Path) -> None:
    """A high ratio is an error, except for little data."""
    entry = {"name": "zeros", "fill": {"byte": 0, "count": 8 * MIB}}
    data = {
        "zeros": archive(entry),
        "holes": archive(sparse(8 * MIB)),
        "behind the end": archive({"name": "a"}) + bytes(8 * MIB),
    }[kind]
    blob = gzip.compress(data)
    with pytest.raises(LimitExceeded, match=r"from \d+: more than the limit max_ratio, 100"):
        unpacked([blob], tmp_path / "exceeds", max_ratio=100, max_ratio_from=MIB)
    unpacked([blob], tmp_path / "raised", max_ratio=80_000, max_ratio_from=MIB)
    unpacked([blob], tmp_path / "allowed", max_ratio=100, max_ratio_from=9 * MIB)
    unpacked([blob], tmp_path / "default")


def test_ratio_of_incompressible_content(tmp_path: Path) -> None:
    """Incompressible content never exceeds the ratio."""
    chance = random.Random(1)
    data = archive({"name": "noise", "text": {"hex": chance.randbytes(2 * MIB).hex()}})
    unpacked([gzip.compress(data)], tmp_path / "tree", max_ratio=2, max_ratio_from=0)


def test_a_blob_without_entries(tmp_path: Path) -> None:
    """An error about a blob without entries names no entry."""
    blob = gzip.compress(bytes(MIB))
    with pytest.raises(LimitExceeded, match=r"^more unpacked bytes than"):
        unpacked([blob], tmp_path / "bytes", max_unpacked_bytes=MIB - 1)
    with pytest.raises(LimitExceeded, match=r"^\d+ bytes unpacked from \d+"):
        unpacked([blob], tmp_path / "ratio", max_ratio=1, max_ratio_from=0)


def test_entries(tmp_path: Path) -> None:
    """The error names the first entry beyond the limit."""
    data = archive({"name": "a"}, {"name": "b"})
    assert unpacked([data], tmp_path / "fits", max_entries=2).entries == 2
    with pytest.raises(LimitExceeded, match=r"'b': .*max_entries, 1"):
        unpacked([data], tmp_path / "does not", max_entries=1)


def test_paths(tmp_path: Path) -> None:
    """Paths may be as long and as deep as the limits; the root is always allowed."""
    data = archive({"name": "./", "type": "dir"}, {"name": "a/b/c"})
    unpacked([data], tmp_path / "fits", max_path=5, max_depth=3)
    with pytest.raises(LimitExceeded, match="5 bytes; the limit max_path is 4"):
        unpacked([data], tmp_path / "long", max_path=4)
    with pytest.raises(
        LimitExceeded, match=r"'a/b/c': the path has 3 components; .*max_depth is 2"
    ):
        unpacked([data], tmp_path / "deep", max_depth=2)


def test_depth_by_links(tmp_path: Path) -> None:
    """The depth is that of the path after its links are resolved."""
    link = {"name": "l", "type": "symlink", "linkname": "a/b/c"}
    data = archive(link, {"name": "l/d"})
    unpacked([data], tmp_path / "fits", max_depth=4)
    with pytest.raises(LimitExceeded, match="max_depth"):
        unpacked([data], tmp_path / "deep", max_depth=3)


def test_depth_by_default(tmp_path: Path) -> None:
    """By default, 512 nested directories are allowed, the last one empty."""
    entries = [{"name": "/".join("d" * n), "type": "dir"} for n in range(1, 514)]
    assert unpacked([archive(*entries[:-1])], tmp_path / "fits").entries == 512
    with pytest.raises(LimitExceeded, match="max_depth is 512"):
        unpacked([archive(*entries)], tmp_path / "does not")


@pytest.mark.parametrize("form", ["zstd", "xz"])
def test_window(form: str, tmp_path: Path) -> None:
    """A codec states the size of its window first, and a large one is refused."""
    data = archive({"name": "a"}) + bytes(MIB)
    if form == "zstd":
        # zstd's levels all use the content's size as window, but that is not known here.
        packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 25})
        blob = packer.compress(data) + packer.flush()
    else:
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 32 * MIB}]
        blob = lzma.compress(data, filters=filters)
    unpacked([blob], tmp_path / "fits", max_window=32 * MIB)
    with pytest.raises(LimitExceeded, match=f"{form} data, .*max_window is {8 * MIB}"):
        unpacked([blob], tmp_path / "does not", max_window=8 * MIB)


@pytest.mark.parametrize("name", [field.name for field in Limits.__attrs_attrs__])
def test_a_limit_is_not_negative(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must not be negative"):
        Limits(**{name: -1})


DEEP = "/".join("d" * 100)
DEEP_FILE = {"name": f"{DEEP}/f"}


@pytest.mark.parametrize(
    ("entries", "count"),
    [
        ([{"name": f"{DEEP}/f"}], 101),
        ([{"name": f"{DEEP}/f", "type": "dir"}], 101),
        ([{"name": f"{DEEP}/.wh.f"}], 101),
        ([{"name": f"{DEEP}/.wh..wh..opq"}], 101),
        ([{"name": "a"}, {"name": f"{DEEP}/f", "type": "hardlink", "linkname": "a"}], 102),
        ([{"name": "a/b", "type": "dir"}, {"name": "a/b/c"}, {"name": "a/d"}], 4),
        # Removed entries count, too, because they were made first.
        ([DEEP_FILE, {"name": "d"}, {"name": "d", "type": "dir"}, DEEP_FILE], 203),
    ],
    ids=range(7),
)
def test_implied_directories_are_entries(entries: list[dict], count: int, tmp_path: Path) -> None:
    """Implied directories count even if few entries imply them."""
    data = archive(*entries)
    assert unpacked([data], tmp_path / "fits", max_entries=count).entries == len(entries)
    with pytest.raises(LimitExceeded, match=rf"'(d|a)/.*max_entries, {count - 1}, allows"):
        unpacked([data], tmp_path / "does not", max_entries=count - 1)


def test_names_from_below_are_entries(tmp_path: Path) -> None:
    """One hard link to a file in a lower layer adds all names of this file."""
    names = [{"name": f"n{n}", "type": "hardlink", "linkname": "n"} for n in range(20)]
    unpacked([archive({"name": "n"}, *names)], tmp_path / "below")
    data = archive({"name": "other", "type": "hardlink", "linkname": "n"})
    for limit in (21, 20):
        (tmp_path / f"{limit}").mkdir()
        below = MergedTree([tmp_path / "below"])
        read = io.BytesIO(data).read
        limits = Limits(max_entries=limit)
        if limit == 21:
            unpack(read, tmp_path / f"{limit}", lower=below, limits=limits)
            continue
        with pytest.raises(LimitExceeded, match="max_entries, 20"):
            unpack(read, tmp_path / f"{limit}", lower=below, limits=limits)


SKIPPABLE = bytes.fromhex("532a4d1800000000")
EMPTY: dict[str, bytes] = {
    "gzip": gzip.compress(b"", mtime=0),
    "gzip stored": gzip.compress(b"", 0, mtime=0),
    "gzip tiny": gzip.compress(b"\0", mtime=0),
    "bzip2": bz2.compress(b""),
    "xz": lzma.compress(b""),
    "zstd": zstd.compress(b""),
    "zstd skippable": SKIPPABLE,
}


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("where", ["before", "between", "behind"])
def test_many_empty_members(kind: str, where: str, tmp_path: Path) -> None:
    """Megabytes of empty members stop early, because each member needs its own codec."""
    compress = COMPRESS[kind.split()[0]]
    data = archive({"name": "a", "text": "a" * 100})
    whole = compress(data[:600]), compress(data[600:])
    empty = EMPTY[kind]
    if where == "before":
        pieces = itertools.chain([empty * 10, *whole])
        bomb: Iterable[bytes] = itertools.repeat(empty * 1000)
    elif where == "between":
        pieces = itertools.chain([whole[0], empty * 10 if "tiny" not in kind else b"", whole[1]])
        bomb = itertools.chain([whole[0]], itertools.repeat(empty * 1000))
    else:
        pieces = itertools.chain([*whole, empty * 10])
        bomb = itertools.chain(whole, itertools.repeat(empty * 1000))
    if not (kind == "gzip tiny" and where == "before"):
        unpacked(pieces, tmp_path / "fits", max_members=12)
    with pytest.raises(LimitExceeded, match=r"data, near byte .* max_members, 2000, allows"):
        unpacked(bomb, tmp_path / "does not", max_members=2000)


@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_a_member_for_each_file(form: str, tmp_path: Path) -> None:
    """One member for each file, as in eStargz and zstd:chunked, stays below the limit."""
    data = archive(*({"name": f"{n}"} for n in range(300)))
    blocks = [COMPRESS[form](data[at : at + 512]) for at in range(0, len(data), 512)]
    assert unpacked(blocks, tmp_path / "tree", max_members=1).entries == 300
