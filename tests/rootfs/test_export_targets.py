"""Directories as targets of exports: existing, hostile, and exchanged meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from _tools.layer_stacks import on_disk, plant, unpack_stack
from _tools.plain_tars import archive as tar_of
from _tools.swapping import plant_link, swapped
from rootfs.exports import exported, never

from trio_layers import ExportError
from trio_layers._rootfs.export import export
from trio_layers._rootfs.merged import MergedTree

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices need root")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: (path / "x").mkdir(parents=True), "directory is not empty; name an empty"),
        (lambda path: path.write_bytes(b"x"), "Not a directory"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
    ],
    ids=["not-empty", "file", "dangling"],
)
def test_invalid_targets(
    make: Callable[[Path], None], text: str, view: MergedTree, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    make(target)
    before = (target.lstat(), list(target.glob("*")))
    with pytest.raises(ExportError, match=text) as caught:
        exported(view, target)
    assert caught.value.path == str(target)
    assert (target.lstat(), list(target.glob("*"))) == before


def test_no_parent(view: MergedTree, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="No such file"):
        exported(view, tmp_path / "a/b")


ACL = bytes.fromhex(
    "0200000001000700ffffffff02000700e803000004000700ffffffff10000700ffffffff20000700ffffffff"
)


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o1777, 0o2775])
@pytest.mark.parametrize("fails", [False, True])
def test_the_target_keeps_its_own_metadata(
    mode: int, fails: bool, view: MergedTree, tmp_path: Path
) -> None:
    """The image's root has another owner, mode and time; its entries match the layers."""
    target = tmp_path / "private"
    target.mkdir()
    os.chown(target, 12, 34)
    for name in ("system.posix_acl_access", "system.posix_acl_default"):
        if mode == 0o2775:
            os.setxattr(target, name, ACL)
    os.setxattr(target, "user.mine", b"mine")
    target.chmod(mode)
    os.utime(target, ns=(5, 7))
    before = on_disk(target)
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if fails and calls == len(view.walk()):
            raise Stopped

    if fails:
        with pytest.raises(Stopped):
            export(view, target, check_cancelled=check)
        assert on_disk(target) == before
    else:
        export(view, target, check_cancelled=check)
        root, *rest = on_disk(target)
        assert [root] == before
        assert rest == view.walk()[1:]


def test_a_new_target_is_closed_to_others(view: MergedTree, tmp_path: Path) -> None:
    """The tree may contain set-id files from an untrusted image."""
    umask = os.umask(0)
    try:
        export(view, tmp_path / "new", check_cancelled=never)
    finally:
        os.umask(umask)
    root, *rest = on_disk(tmp_path / "new")
    assert (root.mode, root.uid, root.gid) == (0o700, os.geteuid(), os.getegid())
    assert rest == view.walk()[1:]


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("planted_by", [0, 1234])
@pytest.mark.parametrize("below", ["", "sub"])
def test_another_user_exchanges_the_target_for_a_link(
    planted_by: int, below: str, tmp_path: Path
) -> None:
    """The export writes to that user's directory or fails, but never follows the link."""
    view = MergedTree(unpack_stack([tar_of({"name": "evil", "text": "x"})], tmp_path))
    real, link, victim = plant_link(tmp_path, below=below, owner=planted_by)
    done = refused = 0
    with swapped(real, link):
        for _ in range(10_000):
            if min(done, refused) > 50:
                break
            try:
                export(view, real / below, check_cancelled=never)
            except ExportError:
                refused += 1
            else:
                done += 1
            assert os.listdir(victim / below) == []
            for path in (real, link):
                (path / below / "evil").unlink(missing_ok=True)
    assert done
    assert refused


def test_links_that_are_followed(view: MergedTree, tmp_path: Path) -> None:
    """The export follows the caller's links if no other user can exchange them."""
    there, shared = tmp_path / "there", tmp_path / "shared"
    there.mkdir()
    shared.mkdir()
    shared.chmod(0o1777)
    for link in (tmp_path / "link", shared / "link"):
        link.symlink_to(tmp_path)
        export(view, link / "there", check_cancelled=never)
        shutil.rmtree(there)
        export(view, link / "there", check_cancelled=never)
        shutil.rmtree(there)
        there.mkdir()
    shared.chmod(0o777)
    with pytest.raises(ExportError, match="'link' in the path is a link that another user may"):
        export(view, shared / "link" / "there", check_cancelled=never)
    shared.chmod(0o1777)
    os.chown(shared / "link", 1234, 1234, follow_symlinks=False)
    with pytest.raises(ExportError, match="'link' in the path is a link that another user may"):
        export(view, shared / "link" / "there", check_cancelled=never)
    assert os.listdir(there) == []


def test_stopped_anywhere(view: MergedTree, tmp_path: Path) -> None:
    """An export that is cancelled anywhere leaves nothing."""
    target = tmp_path / "target"
    there = tmp_path / "there"
    there.mkdir(0o711)
    os.utime(there, ns=(12345, 67890))
    before = on_disk(there)
    for stop in range(10_000):
        left = stop

        def check() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Stopped

        try:
            export(view, target, check_cancelled=check)
        except Stopped:
            assert not target.exists()
            left = stop
            with pytest.raises(Stopped):
                export(view, there, check_cancelled=check)
            assert on_disk(there) == before
        else:
            assert stop > len(view.walk())
            return


@pytest.mark.parametrize("name", ["d", "su", "empty", "disk", "away"])
def test_a_link_planted_during_the_export_is_not_followed(
    name: str, view: MergedTree, tmp_path: Path
) -> None:
    """A link planted in the place of an entry is an error, and is neither followed nor removed."""
    outside, target = tmp_path / "outside", tmp_path / "target"
    plant(outside)
    before = on_disk(outside)

    def check() -> None:
        if target.exists() and not os.path.lexists(target / name):
            (target / name).symlink_to(outside)

    with pytest.raises(ExportError, match=f"target/{name}: File exists"):
        export(view, target, check_cancelled=check)
    assert on_disk(outside) == before
    assert os.listdir(target) == [name]


def test_a_directory_replaced_by_a_link(tmp_path: Path) -> None:
    view = MergedTree(
        unpack_stack([tar_of({"name": "d/", "type": "dir"}, {"name": "d/f"})], tmp_path)
    )
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()

    def check() -> None:
        if (target / "d").is_dir() and not (target / "d").is_symlink():
            (target / "d").rmdir()
            (target / "d").symlink_to(outside)

    with pytest.raises(ExportError, match="Not a directory"):
        export(view, target, check_cancelled=check)
    assert not os.listdir(outside)
