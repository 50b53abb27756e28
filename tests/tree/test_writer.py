"""Unpacking one layer to one tree: the result on the disk, and errors."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from _tools.layer_stacks import diff_id, listed, on_disk, unpack_blob
from _tools.plain_tars import archive
from tree.test_parents import DEBIAN, merged

from trio_layers._errors import LimitExceeded, StoreFull, StoreReadOnly, UnpackError
from trio_layers._tar.limits import Limits
from trio_layers._tree.unpack import unpack

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices need root")


def test_unpacked(tmp_path: Path) -> None:
    """The result has the diff ID and size of the tar, including bytes after its end."""
    blob = archive({"name": "./", "type": "dir"}, {"name": "a", "text": "x"}) + b"trailing" * 100
    unpacked = unpack_blob(blob, tmp_path / "t")
    assert unpacked.diff_id == diff_id(blob)
    assert (unpacked.size, unpacked.entries, unpacked.assumed) == (len(blob), 2, ())
    assert not unpacked.needs_lower
    assert listed(tmp_path / "t")[1].diff_id == unpacked.diff_id


def test_default_acl_is_not_inherited(tmp_path: Path) -> None:
    """Entries in a directory with a default ACL have only their own attributes."""
    acl = "02000000" + "01000600ffffffff" + "02000700e8030000" + "04000500ffffffff"
    acl += "10000700ffffffff" + "20000500ffffffff"
    pax = {"SCHILY.xattr.system.posix_acl_default": {"hex": acl}}
    blob = archive({"name": "d/", "type": "dir", "pax": pax}, {"name": "d/f"}, {"name": "d/s/g"})
    unpack_blob(blob, tmp_path / "t")
    assert os.listxattr(tmp_path / "t/fs/d") == ["system.posix_acl_default"]
    assert os.listxattr(tmp_path / "t/fs/d/f") == []
    assert os.listxattr(tmp_path / "t/fs/d/s") == []


def test_replaced_within_a_layer(tmp_path: Path) -> None:
    """The last entry of a path wins and also hides the lower trees' entries below it."""
    upper = [
        {"name": "usr", "type": "symlink", "linkname": "elsewhere"},
        {"name": "usr/", "type": "dir", "mode": "0700"},
        {"name": "usr/only", "text": "1"},
    ]
    there = merged(DEBIAN, upper, base=tmp_path)
    assert {path for path in there if path.startswith(b"usr/")} == {b"usr/only"}


def test_a_directory_replaced_between_its_files(tmp_path: Path) -> None:
    """A directory's descriptor is closed when a link replaces the directory."""
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
    """A layer cannot set overlayfs' private attributes."""
    pax = {"SCHILY.xattr.trusted.overlay.redirect": "/etc", "SCHILY.xattr.user.overlay.opaque": "y"}
    unpack_blob(archive({"name": "d/", "type": "dir", "pax": pax}), tmp_path / "t")
    assert os.listxattr(tmp_path / "t/fs/d") == []
    assert not listed(tmp_path / "t")[0][1].xattrs


def test_attributes_in_another_locale(tmp_path: Path) -> None:
    """Attribute names are the layer's bytes in every locale."""
    pax = {"SCHILY.xattr.user.\u20ac": "1"}
    program = "import io, pathlib, sys; from trio_layers._tree.unpack import unpack; "
    program += "unpack(io.BytesIO(sys.stdin.buffer.read()).read, pathlib.Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        input=archive({"name": "f", "pax": pax}),
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        check=True,
    )
    assert os.listxattr(tmp_path / "fs/f") == ["user.\u20ac"]


def test_null_device_of_a_layer_is_a_whiteout(tmp_path: Path) -> None:
    """A character device 0/0 is a whiteout, also in the list."""
    there = merged(DEBIAN, [{"name": "usr/bin/old", "type": "char"}], base=tmp_path)
    assert b"usr/bin/old" not in there
    assert there[b"usr/bin/same"].links is None


def test_whiteouts_are_overlayfs_own(tmp_path: Path) -> None:
    """Whiteouts become devices 0/0, opaque directories get overlayfs' attribute."""
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
    """The error names the exceeded limit; holes count as their zeros."""
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
    "name",
    ["../a", "a/../../b", "/..", ".wh.", "d/.wh...", ".wh.d/x", ".wh.d/.wh..wh..opq", "d/.wh.."],
)
def test_names_that_are_refused(tmp_path: Path, name: str) -> None:
    """Names that lead out and whiteouts without a name are errors."""
    with pytest.raises(UnpackError):
        unpack_blob(archive({"name": name}), tmp_path / "t")
    assert os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        ({"name": "./l/f/x"}, "'dd/f': not a directory, but the layer has an entry below it"),
        ({"name": "l/.wh.."}, "'dd/.wh..': the whiteout names nothing that can be removed"),
        (
            {"name": "l/y", "type": "hardlink", "linkname": "dd"},
            "'dd/y': .*: the target is a directory",
        ),
        ({"name": "l/longer"}, "'dd/longer': .*; the limit max_path is 8"),
    ],
    ids=range(4),
)
def test_errors_name_the_entry(tmp_path: Path, entry: dict, rule: str) -> None:
    """An error has the entry's name in the layer, also if a link leads elsewhere."""
    before = [{"name": "dd/", "type": "dir"}, {"name": "dd/f"}]
    before.append({"name": "l", "type": "symlink", "linkname": "dd"})
    name = entry["name"].removeprefix("./")
    with pytest.raises(UnpackError, match=f"^'{name}': {rule}"):
        unpack_blob(archive(*before, entry), tmp_path / "t", limits=Limits(max_path=8))


def test_an_acl_does_not_change_the_mode(tmp_path: Path) -> None:
    """The entry's mode is the mode on the disk, as in moby and containerd."""
    acl = "02000000" + "01000700ffffffff" + "02000700e8030000" + "04000700ffffffff"
    acl += "10000700ffffffff" + "20000700ffffffff"
    pax = {"SCHILY.xattr.system.posix_acl_access": {"hex": acl}}
    unpack_blob(archive({"name": "f", "mode": "2640", "pax": pax}), tmp_path / "t")
    assert stat.S_IMODE((tmp_path / "t/fs/f").stat().st_mode) == 0o2640


@pytest.mark.parametrize(
    ("acl", "mode", "kept"),
    [
        # Owner, a user, group, mask, others: three of them come from the mode.
        ("0100070000000000 02000700e8030000 0400070000000000 1000070000000000 2000070000000000",
         0o640, {0: 6, 1: 7, 2: 7, 3: 4, 4: 0}),
        # The kernel drops an ACL that says no more than the mode.
        ("01000700ffffffff 04000700ffffffff 20000700ffffffff", 0o640, None),
    ],
)  # fmt: skip
def test_the_list_has_the_acl_that_a_mode_leaves(
    tmp_path: Path, acl: str, mode: int, kept: dict[int, int] | None
) -> None:
    """The mode is set after the ACL, as in moby and containerd, and the list has the result.

    The same holds after a hard link's entry with another mode.
    """
    pax = {"SCHILY.xattr.system.posix_acl_access": {"hex": "02000000" + acl.replace(" ", "")}}
    file = {"name": "f", "mode": f"{mode:04o}", "pax": pax}
    link = {"name": "g", "type": "hardlink", "linkname": "f", "mode": "0604"}
    for number, entries in enumerate([[file], [file, link]]):
        tree = tmp_path / str(number)
        unpack_blob(archive(*entries), tree)
        [found] = [entry for entry in listed(tree)[0] if entry.path == b"f"]
        assert on_disk(tree / "fs")[1] == found
        left = found.xattrs.get("system.posix_acl_access")
        if kept is None:
            assert left is None
        elif number == 0:
            assert left is not None
            assert {n: left[4 + 8 * n + 2] for n in range(5)} == kept


def test_an_acl_that_is_not_valid(tmp_path: Path) -> None:
    """The kernel refuses an invalid ACL, so it is an error."""
    pax = {"SCHILY.xattr.system.posix_acl_access": {"hex": "0200000001"}}
    with pytest.raises(
        UnpackError, match=r"^'f': cannot set the attribute 'system.posix_acl_access'"
    ):
        unpack_blob(archive({"name": "f", "pax": pax}), tmp_path / "t")


def test_more_attributes_than_the_file_system_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error tells a full disk from too many attributes of one file."""
    pax = {"SCHILY.xattr.user.big": "x"}

    def refuse(subject: object, attribute: object, value: bytes) -> None:
        if value == b"x":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "setxattr", refuse)
    with pytest.raises(
        UnpackError, match=r"^'f': cannot set the attribute 'user\.big': .* than the file system"
    ):
        unpack_blob(archive({"name": "f", "pax": pax}), tmp_path / "t")
    full = os.statvfs_result((4096, 4096, 100, 0, 0, 100, 50, 50, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda subject: full)
    with pytest.raises(
        StoreFull, match=r"^'f': cannot set the attribute 'user\.big': No space.*pull again"
    ):
        unpack_blob(archive({"name": "f", "pax": pax}), tmp_path / "u")


class Stop(BaseException):
    """Like trio.Cancelled, not an `Exception`."""


def test_cancelled_anywhere(tmp_path: Path) -> None:
    """The check's exception is raised as it is, and no descriptor stays open."""
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


def test_removal_can_be_cancelled(tmp_path: Path) -> None:
    """The check is called for each file that is removed with its directory.

    One entry that replaces a directory may remove many files.
    """
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1

    files = [{"name": f"d/{number}"} for number in range(300)]
    unpack(io.BytesIO(archive(*files)).read, make(tmp_path / "before"), check_cancelled=check)
    without, calls = calls, 0
    blob = archive(*files, {"name": "d", "text": "file"})
    unpack(io.BytesIO(blob).read, make(tmp_path / "after"), check_cancelled=check)
    assert calls - without >= 300


def make(path: Path) -> Path:
    path.mkdir()
    return path


def test_checked_without_output(tmp_path: Path) -> None:
    """The check is called while input gives no output: here, a skippable zstd frame."""
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
    """The list's writer reports a full disk, but never hides an earlier error."""

    class Full(io.FileIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("trio_layers._tree.unpack.io.FileIO", Full)
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
    """Even an OSError of the source is not taken for an error of the disk."""
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
    """An error of the disk is a store's error, which names the path."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(StoreReadOnly, match="some/link"):
        unpack_blob(
            archive({"name": "some/link", "type": "symlink", "linkname": "x"}), tmp_path / "t"
        )
