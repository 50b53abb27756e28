"""A layer's assumptions if it is unpacked alone, and its result on its parent."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from _tools.layer_stacks import listed, unpack_blob, unpack_stack
from _tools.plain_tars import archive

from trio_layers._entries import Entry
from trio_layers._errors import LimitExceeded, StoreError, UnpackError
from trio_layers._rootfs.view import MergedTree
from trio_layers._tar.limits import Limits
from trio_layers._tree.unpack import unpack
from trio_layers._tree.unpacked import assumptions_hold

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices need root")

DEBIAN = [
    {"name": "./", "type": "dir"},
    {"name": "usr/", "type": "dir", "mtime": 5},
    {"name": "usr/bin/", "type": "dir", "mode": "0711", "uid": 3, "mtime": 6},
    {"name": "usr/bin/old", "text": "old", "mode": "4755", "uid": 9},
    {
        "name": "usr/bin/same",
        "type": "hardlink",
        "linkname": "usr/bin/old",
        "mode": "4755",
        "uid": 9,
    },
    {"name": "bin", "type": "symlink", "linkname": "usr/bin"},
]


def merged(*layers: list[dict], base: Path) -> dict[bytes, Entry]:
    trees = unpack_stack([archive(*layer) for layer in layers], base)
    return {entry.path: entry for entry in MergedTree(trees).walk()}


def test_listed_directories_assume_nothing(tmp_path: Path) -> None:
    """A layer with entries for all directories is valid on any parent."""
    assert unpack_blob(archive(*DEBIAN), tmp_path / "t").assumed == ()


def test_assumptions(tmp_path: Path) -> None:
    """Directories without an entry are assumptions, and whiteouts need a lower directory."""
    blob = archive({"name": "a/b/c"}, {"name": "d/.wh.e"}, {"name": "f/", "type": "dir"})
    unpacked = unpack_blob(blob, tmp_path / "t")
    assert set(unpacked.assumed) == {b"", b"a", b"a/b", b"d", b"d/"}


def test_no_assumption_below_opaque_directories_and_whiteouts(tmp_path: Path) -> None:
    """Nothing shows through below an opaque directory or in place of a whiteout."""
    blob = archive(
        {"name": "./", "type": "dir"},
        {"name": "o/", "type": "dir"},
        {"name": "o/.wh..wh..opq"},
        {"name": "o/in/file"},
        {"name": ".wh.w"},
        {"name": "w/file"},
    )
    unpacked = unpack_blob(blob, tmp_path / "t")
    assert unpacked.assumed == (b"/",)
    there = {entry.path: entry for entry in listed(tmp_path / "t")[0]}
    assert there[b"w"].opaque


@pytest.mark.parametrize(
    ("below", "expected"),
    [
        (None, True),
        ({"type": "dir", "mtime": 77}, True),
        ({"type": "dir", "mode": "0750"}, False),
        ({"type": "dir", "gid": 4}, False),
        ({"type": "dir", "pax": {"SCHILY.xattr.user.x": "1"}}, False),
        ({"type": "symlink", "linkname": "elsewhere"}, False),
        ({"type": "file"}, False),
    ],
    ids=str,
)
def test_a_tree_fits_if_its_assumptions_hold(
    tmp_path: Path, below: dict | None, expected: bool
) -> None:
    """The parent must lack an assumed directory or have it with the same metadata."""
    entries = [{"name": "./", "type": "dir"}]
    if below is not None:
        entries.append({"name": "a", **below})
    unpack_blob(archive(*entries), tmp_path / "below")
    unpacked = unpack_blob(archive({"name": "./", "type": "dir"}, {"name": "a/b"}), tmp_path / "t")
    assert assumptions_hold(unpacked.assumed, MergedTree([tmp_path / "below"])) is expected


def test_usr_merge(tmp_path: Path) -> None:
    """A file in ``bin``, a link in the parent, is written to the link's target.

    The target directory keeps its metadata.
    """
    there = merged(DEBIAN, [{"name": "bin/new", "text": "n"}], base=tmp_path)
    assert there[b"bin"].type == "symlink"
    assert there[b"usr/bin/new"].type == "file"
    assert (there[b"usr/bin"].mode, there[b"usr/bin"].uid) == (0o711, 3)
    assert b"usr/bin/old" in there


def test_hard_link_to_a_file_below(tmp_path: Path) -> None:
    """The file is copied up with all its names, content and metadata, as one file."""
    link = {"name": "new", "type": "hardlink", "linkname": "bin/old", "mode": "0700", "uid": 1}
    trees = unpack_stack([archive(*DEBIAN), archive(link)], tmp_path)
    there = {entry.path: entry for entry in MergedTree(trees).walk()}
    names = (b"new", b"usr/bin/old", b"usr/bin/same")
    assert {there[name].links for name in names} == {b"new"}
    assert {(there[name].mode, there[name].uid) for name in names} == {(0o700, 1)}
    assert (trees[1] / "fs/usr/bin/same").stat().st_nlink == 3
    assert (trees[0] / "fs/usr/bin/old").stat().st_mode & 0o7777 == 0o4755
    assert (there[b"usr/bin"].mode, there[b"usr/bin"].uid) == (0o711, 3)


@pytest.mark.parametrize("kind", ["dir", "file", "symlink"])
def test_hard_link_to_a_file_whose_other_name_is_replaced(tmp_path: Path, kind: str) -> None:
    """A lower file is copied up with those of its names that this layer has not replaced."""
    mine = {"name": "usr/bin/same", "type": kind, "linkname": "x" if kind == "symlink" else ""}
    link = {"name": "new", "type": "hardlink", "linkname": "usr/bin/old"}
    there = merged(DEBIAN, [mine, link], base=tmp_path)
    assert there[b"usr/bin/same"].type == kind
    assert {there[name].links for name in (b"new", b"usr/bin/old")} == {b"new"}


def test_copied_up_files_can_be_removed(tmp_path: Path) -> None:
    """A whiteout removes a file that was copied up only for a hard link."""
    link = {"name": "new", "type": "hardlink", "linkname": "usr/bin/old"}
    for number, removal in enumerate([["usr/bin/.wh.old", "usr/bin/.wh.same"], ["usr/.wh.bin"]]):
        base = tmp_path / str(number)
        base.mkdir()
        there = merged(DEBIAN, [link, *({"name": name} for name in removal)], base=base)
        assert there[b"new"].type == "file"
        assert there[b"new"].links is None
        assert not {b"usr/bin/old", b"usr/bin/same"} & there.keys()


def test_hard_link_below_what_the_layer_removes(tmp_path: Path) -> None:
    """A link's target is missing if the same layer has removed its directory."""
    link = {"name": "new", "type": "hardlink", "linkname": "usr/bin/old"}
    with pytest.raises(UnpackError, match="removes"):
        merged(DEBIAN, [{"name": ".wh.usr"}, link], base=tmp_path)


def test_whiteout_of_an_implied_directory(tmp_path: Path) -> None:
    """A whiteout removes a directory that was made only for another whiteout.

    A directory with a file of the layer stays and hides the lower entries.
    """
    gone = [{"name": "usr/bin/.wh.old"}, {"name": "usr/.wh.bin"}]
    there = merged(DEBIAN, gone, base=tmp_path)
    assert b"usr/bin" not in there
    base = tmp_path / "2"
    base.mkdir()
    there = merged(DEBIAN, [{"name": "usr/bin/mine"}, {"name": "usr/.wh.bin"}], base=base)
    assert {p for p in there if p.startswith(b"usr/bin/")} == {b"usr/bin/mine"}


@pytest.mark.parametrize(
    "upper",
    [
        # A link to a hard link whose own target is missing here, …
        [
            {"name": "h/", "type": "dir"},
            {"name": "h", "type": "hardlink", "linkname": "usr/bin/old"},
            {"name": "more", "type": "hardlink", "linkname": "h"},
        ],
        # … and a link to a path that is a directory only without a parent.
        [{"name": "bin/new"}, {"name": "more", "type": "hardlink", "linkname": "bin"}],
    ],
)
def test_alone_is_not_stricter(tmp_path: Path, upper: list[dict]) -> None:
    """A layer that is valid on its parent is not refused if it looks invalid without it."""
    there = merged(DEBIAN, upper, base=tmp_path)
    assert there[b"more"].links in (b"h", b"bin")
    assert not (tmp_path / "1-alone/fs/more").exists()


def test_hard_link_through_the_replaced_path(tmp_path: Path) -> None:
    """Alone it is unknown whether the target lies in the replaced path."""
    below = [
        {"name": "./", "type": "dir"},
        {"name": "a/", "type": "dir"},
        {"name": "a/f"},
        {"name": "b/", "type": "dir"},
        {"name": "b/l", "type": "symlink", "linkname": "/a"},
    ]
    link = {"name": "b", "type": "hardlink", "linkname": "b/l/f"}
    there = merged(below, [link], base=tmp_path)
    assert there[b"b"].links == there[b"a/f"].links == b"a/f"


def test_copied_up_files_keep_their_holes(tmp_path: Path) -> None:
    """A sparse file that is copied up for a hard link stays sparse."""
    sparse = {"format": "pax-1.0", "realsize": 1 << 26, "map": [[1 << 25, 4]]}
    below = archive({"name": "./", "type": "dir"}, {"name": "s", "text": "data", "sparse": sparse})
    link = archive({"name": "new", "type": "hardlink", "linkname": "s"})
    trees = unpack_stack([below, link], tmp_path)
    now = (trees[1] / "fs/new").stat()
    assert (now.st_size, now.st_nlink) == (1 << 26, 2)
    assert now.st_blocks * 512 < 1 << 20
    there = {entry.path: entry for entry in listed(trees[1])[0]}
    assert there[b"s"].crc32 == listed(trees[0])[0][1].crc32


def test_copying_up_can_be_cancelled(tmp_path: Path) -> None:
    """The check is called for each chunk of a file that is copied up."""
    big = {"name": "big", "fill": {"byte": 1, "count": 1 << 22}}
    unpack_blob(archive({"name": "./", "type": "dir"}, big), tmp_path / "below")
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1

    (tmp_path / "t").mkdir()
    link = archive({"name": "new", "type": "hardlink", "linkname": "big"})
    lower = MergedTree([tmp_path / "below"])
    unpack(io.BytesIO(link).read, tmp_path / "t", lower=lower, check_cancelled=check)
    assert calls >= 16


def test_a_lower_file_cannot_be_read(tmp_path: Path) -> None:
    """A damaged lower tree is an error of the store, not of the layer."""
    unpack_blob(archive({"name": "./", "type": "dir"}, {"name": "old"}), tmp_path / "below")
    (tmp_path / "below/fs/old").unlink()
    link = archive({"name": "new", "type": "hardlink", "linkname": "old"})
    with pytest.raises(StoreError, match="'old' cannot be read") as caught:
        unpack_blob(link, tmp_path / "t", MergedTree([tmp_path / "below"]))
    assert isinstance(caught.value.__cause__, FileNotFoundError)


GUESSED = [{"name": "d/x"}]


"""A layer without an entry for ``d``, which may be a link in the parent."""


@pytest.mark.parametrize(
    "upper",
    [
        # Alone, d/x is a file with an entry below it; on the parent it is e/x, a directory by then.
        [*GUESSED, {"name": "e/x/", "type": "dir"}, {"name": "d/x/y"}],
        # A link leads through a path that may be a link.
        [{"name": "l", "type": "symlink", "linkname": "d/../x"}, {"name": "l/y"}],
        # … so that ``..`` leads elsewhere.
        [
            {"name": "l", "type": "symlink", "linkname": "d/.."},
            {"name": "h", "text": "h"},
            {"name": "e2", "type": "hardlink", "linkname": "l/h"},
        ],
        # A hard link to a file that the layer has at another path.
        [*GUESSED, {"name": "e/y"}, {"name": "z", "type": "hardlink", "linkname": "d/y"}],
        # A hard link to a path that is a directory alone, but a file on the parent.
        [*GUESSED, {"name": "d/x/", "type": "dir"}, {"name": "e/x", "text": "e"},
         {"name": "f", "type": "hardlink", "linkname": "d/x"}],
    ],
    ids=range(5),
)  # fmt: skip
def test_alone_leaves_decisions_to_the_parent(tmp_path: Path, upper: list[dict]) -> None:
    """A layer that is invalid alone, but not if a parent's link replaces a directory, is no error.

    On the parent, the result is that of unpacking in order.
    """
    below = archive(
        {"name": "./", "type": "dir"},
        {"name": "e/", "type": "dir"},
        {"name": "e/sub/", "type": "dir"},
        {"name": "d", "type": "symlink", "linkname": "e"},
    )
    unpack_blob(below, tmp_path / "below")
    lower = MergedTree([tmp_path / "below"])
    alone = unpack_blob(archive(*upper), tmp_path / "alone")
    assert alone.needs_lower or not assumptions_hold(alone.assumed, lower)
    unpack_blob(archive(*upper), tmp_path / "upon", lower)
    there = {entry.path for entry in MergedTree([tmp_path / "below", tmp_path / "upon"]).walk()}
    assert not {path for path in there if path.startswith(b"d/")}


@pytest.mark.parametrize(
    "upper",
    [
        [{"name": "f"}, {"name": "f/x"}],
        [{"name": "l", "type": "symlink", "linkname": "l"}, {"name": "l/x"}],
        [{"name": "f/", "type": "dir"}, {"name": "f", "type": "hardlink", "linkname": "f"}],
        [*GUESSED, {"name": "../x"}],
        [*GUESSED, {"name": "d/.wh.."}],
    ],
    ids=range(5),
)
def test_alone_refuses_layers_invalid_on_every_parent(tmp_path: Path, upper: list[dict]) -> None:
    """A layer that is invalid on every parent is an error at once."""
    with pytest.raises(UnpackError):
        unpack_blob(archive(*upper), tmp_path / "t")


def test_copied_up_files_count(tmp_path: Path) -> None:
    """Files that are copied up count as output, so small layers cannot multiply them."""
    fill = {"byte": 1, "count": 4000}
    files = [{"name": f"f{number}", "fill": fill} for number in range(3)]
    unpack_blob(archive({"name": "./", "type": "dir"}, *files), tmp_path / "below")
    links = [
        {"name": f"g{number}", "type": "hardlink", "linkname": f"f{number}"} for number in range(3)
    ]
    lower, limits = MergedTree([tmp_path / "below"]), Limits(max_unpacked_bytes=10_000)
    unpack_blob(archive(*links[:2]), tmp_path / "two", lower, limits)
    with pytest.raises(LimitExceeded, match="max_unpacked_bytes"):
        unpack_blob(archive(*links), tmp_path / "three", lower, limits)
