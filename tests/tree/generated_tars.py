"""Random archives, damaged and undamaged: strategies for hypothesis."""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys

import attrs
from cases.layers import maketar
from hypothesis import note, strategies as st
from tree.damaged_tars import BLOB_DAMAGE, TAR_DAMAGE, damaged

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# Directories and other entries have different names, so that an archive can be unpacked.
DIRECTORIES = ["a", "b", "a/b", "a/b/c", "c" * 120, "é", "a/" + "d" * 90]
LEAVES = [
    *("x", "y", "z", "name with space", "ü" * 20, "n" * 101, "l" * 200, "%C3"),
    *("\udcff\udcfe", "q."),
]
WILD = [
    *("../outside/file", "../../outside/file", "/x", "./x", "a/../x", "a//x", "x/", "x/y"),
    *("..", ".", "", "/", "a", ".wh.", ".wh..", ".wh...", ".wh..wh.plnk/1", "a/.wh..wh..opq"),
    *(".wh.a/x", "{OUTSIDE}/file", "{OUTSIDE}/dir", "s/file", "s/dir/keep", "s/../x"),
    *("n" * 256, "d/" * 300),
]
LINKS = [
    *("x", "a", "/a/b", "../a", "../../outside/dir", "../outside", "{OUTSIDE}", "/", "."),
    *("..", "s", "a/x", "y", "/proc/self/root", "l" * 150, "\udcff"),
]
TYPES = ["file", "file", "file", "dir", "dir", "symlink", "fifo", "char", "block", "cont"]
FORMATS = ["pax", "pax", "gnu", "ustar", "v7"]
XATTRS = ["user.a", "user.b", "trusted.c", "security.capability", "user.overlay.opaque"]


@attrs.frozen
class Archive:
    """A random layer.

    Attributes:
        blob: The layer's bytes.
        tar: The layer's tar, before it was damaged.
        whole: Whether the layer is undamaged and can be unpacked.
    """

    blob: bytes = attrs.field(repr=lambda blob: f"<{len(blob)} bytes>")
    tar: bytes = attrs.field(repr=False)
    whole: bool

    def _repr_pretty_(self, printer: object, cycle: bool) -> None:
        # Hypothesis would show all bytes; the notes say how they were made.
        printer.text(repr(self))


# Undamaged archives.


@st.composite
def entries(draw: st.DrawFn, outside: str, *, wild: bool) -> list[dict]:
    """Draw entries as in the cases (``FORMAT.md``); unless ``wild``, they can be unpacked."""
    found: list[dict] = []
    files: list[str] = []
    for _ in range(draw(st.integers(0, 8))):
        entry = draw(one_entry(files, wild=wild))
        if entry.get("type", "file") == "file" and not entry["name"].rpartition("/")[2].startswith(
            ".wh."
        ):
            files.append(entry["name"])
        elif entry["name"] in files:
            files.remove(entry["name"])
        found.append(in_suitable_format(entry, outside))
    return found


@st.composite
def one_entry(draw: st.DrawFn, files: list[str], *, wild: bool) -> dict:
    kind = draw(st.sampled_from([*TYPES, "hardlink", "whiteout", "opaque"]))
    above = draw(st.sampled_from(["", *DIRECTORIES]))
    leaf = draw(st.sampled_from(LEAVES))
    if kind == "dir":
        name = draw(st.sampled_from([*DIRECTORIES, "."]))
    else:
        name = f"{above}/{leaf}" if above else leaf
    if wild and draw(st.booleans()):
        name = draw(st.sampled_from([*WILD, "s"]))
    entry: dict = {"name": name, "format": draw(st.sampled_from(FORMATS))}
    if kind in ("whiteout", "opaque"):
        last = ".wh..wh..opq" if kind == "opaque" else ".wh." + leaf
        return entry | {"name": f"{above}/{last}" if above else last}
    if kind == "hardlink":
        others = [file for file in files if file != name]
        if wild:
            others += LINKS
        if not others:
            return entry
        entry["linkname"] = draw(st.sampled_from(others))
    elif kind == "symlink":
        entry["linkname"] = draw(st.sampled_from(LINKS))
    elif kind in ("char", "block"):
        entry |= {"devmajor": draw(st.integers(1, 511)), "devminor": draw(st.integers(0, 2**18))}
    elif kind in ("file", "cont"):
        entry |= draw(contents())
    if kind != "file":
        entry["type"] = kind
    entry["mode"] = draw(st.sampled_from(["0644", "0755", "4755", "1777", "0000", "2711"]))
    entry["uid"] = draw(st.sampled_from([0, 1000, 2**21, 2**31, 2**32 - 2]))
    entry["gid"] = draw(st.sampled_from([0, 7, 2**21 - 1]))
    entry["mtime"] = draw(
        st.sampled_from([0, 1_500_000_000, 2**33, -5, "1.5", "-1.25", "1600000000.123456789"])
    )
    if kind in ("file", "dir") and entry["format"] == "pax" and draw(st.booleans()):
        names = draw(st.lists(st.sampled_from(XATTRS), max_size=3, unique=True))
        records = [["SCHILY.xattr." + each, draw(value_of(each))] for each in names]
        entry["pax"] = [["comment", "c"], *records]
    return entry


def value_of(attribute: str) -> st.SearchStrategy[object]:
    if attribute == "security.capability":
        return st.just({"hex": "0100000200200000000000000000000000000000"})
    return st.sampled_from(["", "value", {"hex": "00ff0a3d"}, {"cat": [["v", 600]]}])


@st.composite
def contents(draw: st.DrawFn) -> dict:
    size = draw(st.sampled_from([0, 1, 5, 511, 512, 513, 3000, 300_000]))
    entry: dict = {"fill": {"byte": draw(st.sampled_from([0, 120])), "count": size}}
    if size > 3000 or not draw(st.booleans()):
        return entry
    form = draw(st.sampled_from(["gnu", "pax-1.0", "pax-0.1"]))
    position, left = draw(st.sampled_from([0, 0, 512, 70_000])), size
    # GNU tar writes this for a file that is one hole.
    parts = [] if size else [[position, 0]]
    while left:
        length = min(left, draw(st.sampled_from([1, 40, 512, 3000])))
        parts.append([position, length])
        position += length + draw(st.sampled_from([0, 1, 512, 4096]))
        left -= length
    real = position + draw(st.sampled_from([0, 1, 100_000]))
    # The builder needs sparse content as text.
    return {"text": "s" * size, "sparse": {"format": form, "realsize": real, "map": parts}}


def in_suitable_format(entry: dict, outside: str) -> dict:
    """Return the entry in a format that can hold it."""
    form = entry.get("sparse", {}).get("format", "gnu")
    if form != "gnu":
        entry = entry | {"format": "pax"}
        if not entry["name"].isascii() or len(entry["name"]) > 80:
            # The entry would have two records of its name, and Python would use the other one.
            entry = {key: value for key, value in entry.items() if key != "sparse"}
    for form in (entry["format"], "pax", "gnu"):
        changed = entry | {"format": form}
        if form == "gnu" and isinstance(entry.get("mtime"), str):
            changed["mtime"] = 0
        try:
            b"".join(maketar.iter_entry(changed, outside))
        except ValueError:
            continue
        return changed
    return {"name": "x", "format": "pax"}


def compressed(tar: bytes, form: str, cut: int) -> bytes:
    cut = cut % (len(tar) + 1)
    match form:
        case "gzip":
            return gzip.compress(tar, 1, mtime=0)
        case "gzip-members":
            return gzip.compress(tar[:cut], 1, mtime=0) + gzip.compress(tar[cut:], 1, mtime=0)
        case "zstd":
            return zstd.compress(tar)
        case "zstd-frames":
            skip = b"\x50\x2a\x4d\x18\x02\0\0\0ab"
            return skip + zstd.compress(tar[:cut]) + skip + zstd.compress(tar[cut:])
        case "bzip2":
            return bz2.compress(tar, 1)
        case "xz":
            return (
                lzma.compress(tar[:cut], preset=0) + bytes(4) + lzma.compress(tar[cut:], preset=0)
            )
    return tar


COMPRESSIONS = [
    *("none", "none", "none", "gzip", "gzip-members", "zstd", "zstd-frames", "bzip2", "xz"),
]


@st.composite
def archives(draw: st.DrawFn, outside: str) -> Archive:
    """Draw a layer, damaged or not."""
    how = draw(st.sampled_from(["whole", "whole", "wild", "damaged", "damaged", "blob"]))
    wild = how != "whole" and draw(st.booleans())
    layer: dict = {
        "entries": draw(entries(outside, wild=wild)),
        "end_blocks": draw(st.sampled_from([2, 2, 0, 1, 20])),
    }
    if layer["end_blocks"] >= 2:
        layer["trailing"] = draw(st.sampled_from(["", "garbage", {"cat": [["\0", 10240]]}]))
    tar = b"".join(maketar.iter_tar(layer, outside))
    note(f"entries: {layer}")
    blob = tar
    if how == "damaged":
        for damage in draw(st.lists(TAR_DAMAGE, min_size=1, max_size=3)):
            note(f"damage: {damage}")
            blob = damaged(blob, damage)
    form = draw(st.sampled_from(COMPRESSIONS))
    blob = compressed(blob, form, draw(st.integers(0, 2**16)))
    if how == "blob":
        damage = draw(BLOB_DAMAGE)
        note(f"damage to {form}: {damage}")
        blob = damaged(blob, damage)
    return Archive(blob, tar, how == "whole")
