"""One layer to one tree: what it records of what is below, and what it makes of it."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from layers.plain import archive
from layers.stack import diff_id, listed, unpack_blob, unpack_stack

from trio_layers._entries import Entry
from trio_layers._errors import LimitExceeded, StoreError, StoreFull, StoreReadOnly, UnpackError
from trio_layers._store.rootfs import MergedTree
from trio_layers._unpack.directories import Directories
from trio_layers._unpack.worker import Limits, holds, unpack

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


def test_unpacked(tmp_path: Path) -> None:
    """The result has the diff ID and size of the whole tar, what follows its end included."""
    blob = archive({"name": "./", "type": "dir"}, {"name": "a", "text": "x"}) + b"trailing" * 100
    unpacked = unpack_blob(blob, tmp_path / "t")
    assert unpacked.diff_id == diff_id(blob)
    assert (unpacked.size, unpacked.entries, unpacked.assumed) == (len(blob), 2, ())
    assert not unpacked.needs_lower
    assert listed(tmp_path / "t")[1].diff_id == unpacked.diff_id


def test_listed_directories_assume_nothing(tmp_path: Path) -> None:
    """A layer that describes each directory fits on any parent."""
    assert unpack_blob(archive(*DEBIAN), tmp_path / "t").assumed == ()


def test_assumptions(tmp_path: Path) -> None:
    """Directories without an entry are assumed, and whiteouts need something below."""
    blob = archive({"name": "a/b/c"}, {"name": "d/.wh.e"}, {"name": "f/", "type": "dir"})
    unpacked = unpack_blob(blob, tmp_path / "t")
    assert set(unpacked.assumed) == {b"", b"a", b"a/b", b"d", b"d/"}


def test_no_assumption_where_the_layer_hides_what_is_below(tmp_path: Path) -> None:
    """Below an opaque directory, or in the place of a whiteout, nothing shows through."""
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
    ("below", "fits"),
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
def test_holds(tmp_path: Path, below: dict | None, fits: bool) -> None:
    """An assumed directory is absent below, or one with the metadata it was made with."""
    entries = [{"name": "./", "type": "dir"}]
    if below is not None:
        entries.append({"name": "a", **below})
    unpack_blob(archive(*entries), tmp_path / "below")
    unpacked = unpack_blob(archive({"name": "./", "type": "dir"}, {"name": "a/b"}), tmp_path / "t")
    assert holds(unpacked.assumed, MergedTree([tmp_path / "below"])) is fits


def test_usr_merge(tmp_path: Path) -> None:
    """A file in ``bin``, which is a link below, comes to be where the link leads, and the
    directory there stays what it was."""
    there = merged(DEBIAN, [{"name": "bin/new", "text": "n"}], base=tmp_path)
    assert there[b"bin"].type == "symlink"
    assert there[b"usr/bin/new"].type == "file"
    assert (there[b"usr/bin"].mode, there[b"usr/bin"].uid) == (0o711, 3)
    assert b"usr/bin/old" in there


def test_hard_link_to_a_file_below(tmp_path: Path) -> None:
    """The file is brought up with all its names, content and metadata, and stays one file."""
    link = {"name": "new", "type": "hardlink", "linkname": "bin/old", "mode": "0700", "uid": 1}
    trees = unpack_stack([archive(*DEBIAN), archive(link)], tmp_path)
    there = {entry.path: entry for entry in MergedTree(trees).walk()}
    names = (b"new", b"usr/bin/old", b"usr/bin/same")
    assert {there[name].links for name in names} == {b"new"}
    assert {(there[name].mode, there[name].uid) for name in names} == {(0o700, 1)}
    assert (trees[1] / "fs/usr/bin/same").stat().st_nlink == 3
    assert (trees[0] / "fs/usr/bin/old").stat().st_mode & 0o7777 == 0o4755
    assert (there[b"usr/bin"].mode, there[b"usr/bin"].uid) == (0o711, 3)


def test_what_was_brought_up_can_be_removed(tmp_path: Path) -> None:
    """A file that is there only for a hard link is still one of below to a whiteout."""
    link = {"name": "new", "type": "hardlink", "linkname": "usr/bin/old"}
    for number, removal in enumerate([["usr/bin/.wh.old", "usr/bin/.wh.same"], ["usr/.wh.bin"]]):
        base = tmp_path / str(number)
        base.mkdir()
        there = merged(DEBIAN, [link, *({"name": name} for name in removal)], base=base)
        assert there[b"new"].type == "file"
        assert there[b"new"].links is None
        assert not {b"usr/bin/old", b"usr/bin/same"} & there.keys()


def test_hard_link_below_what_the_layer_removes(tmp_path: Path) -> None:
    """A target whose directory has gone in the same layer is not there any more."""
    link = {"name": "new", "type": "hardlink", "linkname": "usr/bin/old"}
    with pytest.raises(UnpackError, match="removes"):
        merged(DEBIAN, [{"name": ".wh.usr"}, link], base=tmp_path)


def test_default_acl_is_not_inherited(tmp_path: Path) -> None:
    """What is unpacked into a directory with a default ACL has the attributes of its own entry."""
    acl = "02000000" + "01000600ffffffff" + "02000700e8030000" + "04000500ffffffff"
    acl += "10000700ffffffff" + "20000500ffffffff"
    pax = {"SCHILY.xattr.system.posix_acl_default": {"hex": acl}}
    blob = archive({"name": "d/", "type": "dir", "pax": pax}, {"name": "d/f"}, {"name": "d/s/g"})
    unpack_blob(blob, tmp_path / "t")
    assert os.listxattr(tmp_path / "t/fs/d") == ["system.posix_acl_default"]
    assert os.listxattr(tmp_path / "t/fs/d/f") == []
    assert os.listxattr(tmp_path / "t/fs/d/s") == []


def test_whiteout_of_an_implied_directory(tmp_path: Path) -> None:
    """A directory made for a whiteout alone goes when it is removed itself; one that holds a
    file of the layer stays, and hides the rest."""
    gone = [{"name": "usr/bin/.wh.old"}, {"name": "usr/.wh.bin"}]
    there = merged(DEBIAN, gone, base=tmp_path)
    assert b"usr/bin" not in there
    base = tmp_path / "2"
    base.mkdir()
    there = merged(DEBIAN, [{"name": "usr/bin/mine"}, {"name": "usr/.wh.bin"}], base=base)
    assert {p for p in there if p.startswith(b"usr/bin/")} == {b"usr/bin/mine"}


def test_replaced_within_a_layer(tmp_path: Path) -> None:
    """The last entry of a path counts; what was below an earlier one is gone, from below too."""
    upper = [
        {"name": "usr", "type": "symlink", "linkname": "elsewhere"},
        {"name": "usr/", "type": "dir", "mode": "0700"},
        {"name": "usr/only", "text": "1"},
    ]
    there = merged(DEBIAN, upper, base=tmp_path)
    assert {path for path in there if path.startswith(b"usr/")} == {b"usr/only"}


def test_a_directory_replaced_between_its_files(tmp_path: Path) -> None:
    """No descriptor of a directory is kept past its replacement by a link."""
    (tmp_path / "outside").mkdir()
    there = merged(
        [
            {"name": "d/e/one"},
            {"name": "d", "type": "symlink", "linkname": str(tmp_path / "outside")},
            {"name": "d/e/two"},
        ],
        base=tmp_path,
    )
    inside = os.fsencode(tmp_path).lstrip(b"/") + b"/outside/e/two"
    assert there[inside].type == "file"
    assert b"d/e/one" not in there
    assert os.listdir(tmp_path / "outside") == []


def test_overlay_attributes_are_not_taken(tmp_path: Path) -> None:
    """A layer cannot speak to overlayfs: its private attributes are dropped."""
    pax = {"SCHILY.xattr.trusted.overlay.redirect": "/etc", "SCHILY.xattr.user.overlay.opaque": "y"}
    unpack_blob(archive({"name": "d/", "type": "dir", "pax": pax}), tmp_path / "t")
    assert os.listxattr(tmp_path / "t/fs/d") == []
    assert not listed(tmp_path / "t")[0][1].xattrs


def test_attributes_in_another_locale(tmp_path: Path) -> None:
    """Names of attributes are the layer's bytes, whatever the locale's encoding is."""
    pax = {"SCHILY.xattr.user.\u20ac": "1"}
    program = "import io, pathlib, sys; from trio_layers._unpack.worker import unpack; "
    program += "unpack(io.BytesIO(sys.stdin.buffer.read()).read, pathlib.Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        input=archive({"name": "f", "pax": pax}),
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        check=True,
    )
    assert os.listxattr(tmp_path / "fs/f") == ["user.\u20ac"]


def test_null_device_of_a_layer_is_a_whiteout(tmp_path: Path) -> None:
    """Character device 0/0 means the same wherever it comes from, and the list says so."""
    there = merged(DEBIAN, [{"name": "usr/bin/old", "type": "char"}], base=tmp_path)
    assert b"usr/bin/old" not in there
    assert there[b"usr/bin/same"].links is None


def test_whiteouts_are_overlayfs_own(tmp_path: Path) -> None:
    """Whiteouts are devices 0/0, opaque directories have overlayfs' attribute."""
    unpack_blob(archive({"name": ".wh.a"}, {"name": "b/.wh..wh..opq"}), tmp_path / "t")
    now = (tmp_path / "t/fs/a").lstat()
    assert stat.S_ISCHR(now.st_mode)
    assert now.st_rdev == 0
    assert os.getxattr(tmp_path / "t/fs/b", "trusted.overlay.opaque") == b"y"


def test_holes_stay_holes(tmp_path: Path) -> None:
    """A sparse file takes no more space than its data."""
    sparse = {"format": "pax-1.0", "realsize": 1 << 26, "map": [[1 << 25, 4]]}
    unpack_blob(archive({"name": "s", "text": "data", "sparse": sparse}), tmp_path / "t")
    now = (tmp_path / "t/fs/s").stat()
    assert now.st_size == 1 << 26
    assert now.st_blocks * 512 < 1 << 20


def test_limits(tmp_path: Path) -> None:
    """Each limit is named when it is passed; holes count as what they stand for."""
    sparse = {"format": "pax-1.0", "realsize": 1 << 50, "map": [[0, 1]]}
    for number, (blob, limits, name) in enumerate(
        [
            (archive({"name": "a"}, {"name": "b"}), Limits(max_entries=1), "max_entries"),
            (archive({"name": "a", "text": "12345"}), Limits(max_unpacked_bytes=4), "max_unpacked"),
            (archive({"name": "s", "text": "1", "sparse": sparse}), Limits(), "max_unpacked"),
            (archive({"name": "a/b/c"}), Limits(max_path=4), "max_path"),
        ]
    ):
        with pytest.raises(LimitExceeded, match=name):
            unpack_blob(blob, tmp_path / str(number), limits=limits)


@pytest.mark.parametrize(
    "name", ["../a", "a/../../b", "/..", ".wh.", "d/.wh...", ".wh.d/x", "d/.wh.."]
)
def test_names_that_are_refused(tmp_path: Path, name: str) -> None:
    """Names that lead out, and whiteouts that name nothing, are errors."""
    with pytest.raises(UnpackError):
        unpack_blob(archive({"name": name}), tmp_path / "t")
    assert os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize(
    "upper",
    [
        # What follows a link that is not there yet, …
        [
            {"name": "h/", "type": "dir"},
            {"name": "h", "type": "hardlink", "linkname": "usr/bin/old"},
            {"name": "more", "type": "hardlink", "linkname": "h"},
        ],
        # … and one to what is a directory only as long as nothing is below.
        [{"name": "bin/new"}, {"name": "more", "type": "hardlink", "linkname": "bin"}],
    ],
)
def test_alone_is_not_stricter(tmp_path: Path, upper: list[dict]) -> None:
    """A layer that fits on its parent is not refused for what it looks like without."""
    there = merged(DEBIAN, upper, base=tmp_path)
    assert there[b"more"].links in (b"h", b"bin")
    assert not (tmp_path / "1-alone/fs/more").exists()


def test_borrowed_files_keep_their_holes(tmp_path: Path) -> None:
    """A file brought up for a hard link takes no more space than it did below."""
    sparse = {"format": "pax-1.0", "realsize": 1 << 26, "map": [[1 << 25, 4]]}
    below = archive({"name": "./", "type": "dir"}, {"name": "s", "text": "data", "sparse": sparse})
    link = archive({"name": "new", "type": "hardlink", "linkname": "s"})
    trees = unpack_stack([below, link], tmp_path)
    now = (trees[1] / "fs/new").stat()
    assert (now.st_size, now.st_nlink) == (1 << 26, 2)
    assert now.st_blocks * 512 < 1 << 20
    there = {entry.path: entry for entry in listed(trees[1])[0]}
    assert there[b"s"].sha256 == listed(trees[0])[0][1].sha256


def test_borrowing_can_be_cancelled(tmp_path: Path) -> None:
    """The check is called for each chunk of a file that is brought up."""
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


def test_what_is_below_cannot_be_read(tmp_path: Path) -> None:
    """A damaged tree below is an error of the store, not of the layer."""
    unpack_blob(archive({"name": "./", "type": "dir"}, {"name": "old"}), tmp_path / "below")
    (tmp_path / "below/fs/old").unlink()
    link = archive({"name": "new", "type": "hardlink", "linkname": "old"})
    with pytest.raises(StoreError, match=r"'old'.*layers below") as caught:
        unpack_blob(link, tmp_path / "t", MergedTree([tmp_path / "below"]))
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_an_acl_does_not_change_the_mode(tmp_path: Path) -> None:
    """The entry's mode is the one on the disk, as moby and containerd have it."""
    acl = "02000000" + "01000700ffffffff" + "02000700e8030000" + "04000700ffffffff"
    acl += "10000700ffffffff" + "20000700ffffffff"
    pax = {"SCHILY.xattr.system.posix_acl_access": {"hex": acl}}
    unpack_blob(archive({"name": "f", "mode": "2640", "pax": pax}), tmp_path / "t")
    assert stat.S_IMODE((tmp_path / "t/fs/f").stat().st_mode) == 0o2640


class Stop(BaseException):
    """As trio.Cancelled is: no Exception."""


def test_cancelled_anywhere(tmp_path: Path) -> None:
    """What the check raises comes out as it is, wherever it is raised, and leaves no descriptor."""
    blob = archive(*DEBIAN, {"name": "big", "fill": {"byte": 1, "count": 1 << 20}})
    before = len(os.listdir("/proc/self/fd"))
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Stop

    for stop_at in range(1, 1000):
        calls = 0
        target = tmp_path / str(stop_at)
        target.mkdir()
        try:
            unpack(io.BytesIO(blob).read, target, check_cancelled=check)
        except Stop:
            assert len(os.listdir("/proc/self/fd")) == before
            assert not (target / "entries").read_bytes().endswith(b'"incomplete":false}}\n')
        else:
            break
    assert stop_at > 10


def test_checked_without_output(tmp_path: Path) -> None:
    """The check is called while input gives nothing: here, a frame of zstd to be skipped."""
    blob = bytes.fromhex("502a4d18") + (1 << 22).to_bytes(4, "little") + bytes(1 << 22)
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1

    unpack(io.BytesIO(blob).read, tmp_path, check_cancelled=check)
    assert calls >= 16


@pytest.mark.parametrize("stop_at", [None, 3])
def test_list_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int | None
) -> None:
    """A full disk is named when the list meets it, and hides no error that came first."""

    class Full(io.FileIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("trio_layers._unpack.worker.io.FileIO", Full)
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Stop

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Stop if stop_at else StoreFull):
        unpack(io.BytesIO(archive(*DEBIAN)).read, tmp_path, check_cancelled=check)
    assert len(os.listdir("/proc/self/fd")) == before


def test_errors_of_the_source_come_out(tmp_path: Path) -> None:
    """Not even an OSError is taken for one of the disk."""
    pieces = [archive({"name": "a", "fill": {"byte": 1, "count": 4096}})[:1024]]
    error = OSError(28, "not the disk's")

    def read(size: int) -> bytes:
        if pieces:
            return pieces.pop()
        raise error

    with pytest.raises(OSError, match="not the disk's") as caught:
        unpack(read, tmp_path)
    assert caught.value is error


def test_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that cannot take it is a store's error, which names the path."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(StoreReadOnly, match="some/link"):
        unpack_blob(
            archive({"name": "some/link", "type": "symlink", "linkname": "x"}), tmp_path / "t"
        )


def test_directory_cache_is_bounded(tmp_path: Path) -> None:
    """However many directories are visited, few stay open, and each is the right one."""
    root = os.open(tmp_path, os.O_RDONLY)
    directories = Directories(root)
    before = len(os.listdir("/proc/self/fd"))
    deep = b"/".join([b"d"] * 300)
    os.makedirs(os.fsencode(tmp_path) + b"/" + deep)
    for number in range(300):
        (tmp_path / str(number)).mkdir()
        there = os.fstat(directories.open(b"%d" % number))
        assert there.st_ino == (tmp_path / str(number)).stat().st_ino
    there = os.fstat(directories.open(deep))
    assert there.st_ino == os.stat(os.fsencode(tmp_path) + b"/" + deep).st_ino
    assert len(os.listdir("/proc/self/fd")) <= before + 128
    directories.close()
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(root)
