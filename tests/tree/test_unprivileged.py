"""Unpacking without privilege: the list of entries is complete, and the disk nearly so."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from _tools.layer_stacks import listed, on_disk, unpack_blob
from _tools.plain_tars import archive
from tree import modes
from tree.modes import MODES, NOBODY, Children, Died, Refused, start_child

from trio_layers._rootfs.view import MergedTree

# Imports come before privilege is dropped: only root may be able to read the interpreter.
CHILD = """
import io, os, sys
from pathlib import Path
from trio_layers._tree.unpack import unpack
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
unpacked = unpack(io.BytesIO(sys.stdin.buffer.read()).read, Path(sys.argv[1]))
assert unpacked.incomplete
"""

OVERRIDE = "user.containers.override_stat"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="dropping privilege needs some")

# cap_net_bind_service, in the form of setcap (struct vfs_cap_data, version 2).
CAPABILITY = {"hex": "0100000200040000000000000000000000000000"}

LAYER = [
    {"name": "closed/", "type": "dir", "mode": "0000", "uid": 5, "gid": 6},
    {"name": "closed/file", "text": "x", "mode": "0000", "uid": 7},
    {"name": "closed/.wh.gone"},
    {"name": "closed/.wh..wh..opq"},
    {"name": "su", "mode": "4755", "pax": {"SCHILY.xattr.security.capability": CAPABILITY}},
    {"name": "mine", "mode": "6755", "uid": NOBODY, "gid": NOBODY},
    {"name": "more", "type": "hardlink", "linkname": "closed/file", "mode": "0400", "uid": 8},
    {"name": "disk", "type": "block", "devmajor": 8, "devminor": 1, "mode": "0660"},
    {"name": "disk2", "type": "hardlink", "linkname": "disk", "mode": "0600", "uid": 6},
    {"name": "pipe", "type": "fifo"},
    {"name": "link", "type": "symlink", "linkname": "/etc", "uid": 9},
    {"name": "liar", "uid": 7, "pax": {f"SCHILY.xattr.{OVERRIDE}": "0:0:4777:file"}},
    {
        "name": "liar2",
        "uid": NOBODY,
        "gid": NOBODY,
        "pax": {f"SCHILY.xattr.{OVERRIDE}": "0:0:4777:file"},
    },
    {"name": ".wh.other"},
]


@pytest.fixture
def target() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    os.chown(path, NOBODY, NOBODY)
    yield path
    shutil.rmtree(path)


def test_unprivileged(target: Path) -> None:
    """The list has owners, modes, devices and attributes.

    The files stay accessible to us and run as no other user.
    """
    command = [sys.executable, "-c", CHILD, str(target)]
    subprocess.run(command, input=archive(*LAYER), check=True)
    entries = {entry.path: entry for entry in listed(target)[0]}
    assert (entries[b"closed"].mode, entries[b"closed"].uid, entries[b"closed"].gid) == (0, 5, 6)
    assert entries[b"closed"].opaque
    assert (entries[b"closed/file"].mode, entries[b"closed/file"].uid) == (0o400, 8)
    assert entries[b"closed/file"].links == b"closed/file"
    assert entries[b"su"].mode == 0o4755
    assert entries[b"su"].xattrs == {"security.capability": bytes.fromhex(CAPABILITY["hex"])}
    assert (entries[b"disk"].type, entries[b"disk"].dev) == ("block", (8, 1))
    assert entries[b"link"].uid == 9
    assert entries[b"liar"].xattrs == {OVERRIDE: b"0:0:4777:file"}
    assert b"closed/gone" not in entries
    assert entries[b"other"].type == "whiteout"
    disk = {entry.path: entry for entry in on_disk(target / "fs")}
    assert disk.keys() == entries.keys()
    assert {entry.uid for entry in disk.values()} <= {NOBODY, 0}
    assert disk[b"closed"].mode == 0o700
    assert disk[b"closed/file"].mode == 0o600
    assert disk[b"su"].mode == disk[b"mine"].mode == 0o755
    assert disk[b"disk"].type == "file"
    assert disk[b"pipe"].type == "fifo"
    assert os.getxattr(target / "fs/closed", "user.overlay.opaque") == b"y"
    assert stat.S_ISCHR((target / "fs/other").lstat().st_mode)
    paths = [entry.path for entry in MergedTree([target]).walk()]
    assert b"other" not in paths
    assert b"disk" in paths


def test_override_stat(target: Path) -> None:
    """Files and directories have their true metadata in podman's attribute.

    A layer cannot set this attribute.
    """
    command = [sys.executable, "-c", CHILD, str(target)]
    subprocess.run(command, input=archive(*LAYER), check=True)
    found = {entry.path: entry.xattrs.get(OVERRIDE) for entry in on_disk(target / "fs")}
    assert found == {
        b"": b"0:0:0755:dir",
        b"closed": b"5:6:0000:dir",
        b"closed/file": b"8:0:0400:file",
        b"more": b"8:0:0400:file",
        b"su": b"0:0:4755:file",
        b"mine": b"65534:65534:6755:file",
        b"disk": b"6:0:0600:block-8-1",
        b"disk2": b"6:0:0600:block-8-1",
        b"liar": b"7:0:0644:file",
        b"liar2": None,
        b"pipe": None,
        b"link": None,
        b"other": None,
    }


@pytest.mark.parametrize("mode", ["userns", "userns-range"])
def test_roots_of_user_namespaces(mode: str) -> None:
    """IDs of the namespace are set, with set-id bits; other IDs are only in the list."""
    expected: dict[str, object] = {
        "type": "file",
        "uid": 0,
        "gid": 0,
        "mode": "4755",
        "mtime": 0,
        "size": 0,
        "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
    others = {"in": 1000, "out": 10**6}
    root = {"type": "dir", "mode": "0755", "uid": 0, "gid": 0, "mtime": 0}
    case = {
        "layers": [
            {
                "entries": [
                    {"name": "./", "type": "dir"},
                    {"name": "root", "mode": "4755"},
                    *({"name": name, "mode": "4755", "uid": id} for name, id in others.items()),
                ]
            }
        ],
        "expected": {
            "outcome": "ok",
            "tree": {
                ".": root,
                "root": expected,
                **{name: {**expected, "uid": id} for name, id in others.items()},
            },
        },
    }
    try:
        with start_child(mode) as child:
            wrong = child.run(case)
    except Refused as refused:
        pytest.skip(f"kernel: no process of the kind {mode!r}: {refused}")
    # The child has checked the disk from inside (`tree.case_runner.check_disk`).
    assert not wrong, wrong


@pytest.mark.parametrize("mode", MODES)
def test_children_report_wrong_results(mode: str) -> None:
    """A child reports a wrong tree and a case that should fail but does not."""
    layers = [{"entries": [{"name": "x"}]}]
    try:
        with start_child(mode) as child:
            assert child.run({"layers": layers, "expected": {"outcome": "ok"}}) == ""
            for expected in ({"outcome": "error"}, {"outcome": "ok", "tree": {}}):
                assert "AssertionError" in child.run({"layers": layers, "expected": expected})
    except Refused as refused:
        pytest.skip(f"kernel: no process of the kind {mode!r}: {refused}")


def test_a_child_that_dies() -> None:
    """If a child dies, its case fails, and the next case gets a new child."""
    case = {"layers": [{"entries": [{"name": "x"}]}], "expected": {"outcome": "ok"}}
    with ExitStack() as stack:
        children = Children(stack)
        for _ in range(2):
            assert children.run("unprivileged", case) == ""
            children["unprivileged"].process.kill()
            with pytest.raises(Died, match="return code is -9"):
                children.run("unprivileged", case)
        assert children.run("unprivileged", case) == ""


def test_a_child_that_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused mode stays refused, and nothing of it is left."""
    # The range ends after the last possible ID.
    monkeypatch.setattr(modes, "FIRST", 2**32 - 1)
    before = len(os.listdir("/proc/self/fd"))
    with ExitStack() as stack:
        children = Children(stack)
        for _ in range(2):
            with pytest.raises(Refused):
                children.run("userns-range", {})
        assert len(os.listdir("/proc/self/fd")) == before


def test_set_group_id_that_is_not_kept(tmp_path: Path) -> None:
    """Without CAP_FSETID, the kernel silently drops the bit on a foreign group's file."""
    program = "import io, os, pathlib, sys; from trio_layers._tree.unpack import unpack; "
    program += "os.setgroups([]); data = sys.stdin.buffer.read(); "
    program += "print(unpack(io.BytesIO(data).read, pathlib.Path(sys.argv[1])).incomplete)"
    blob = archive({"name": "f", "mode": "2755", "gid": 5})
    for bounds, incomplete in (("-fsetid", True), ("+fsetid", False)):
        target = tmp_path / bounds
        target.mkdir()
        command = ["setpriv", "--bounding-set", bounds, sys.executable, "-c", program, target]
        done = subprocess.run(command, input=blob, check=True, stdout=subprocess.PIPE)
        assert done.stdout.decode() == f"{incomplete}\n"
        assert ((target / "fs/f").stat().st_mode == stat.S_IFREG | 0o2755) is not incomplete
        assert listed(target)[0][1].mode == 0o2755


def test_a_disk_without_user_attributes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a file system without user attributes, only the list has the missing metadata."""
    really: Callable[..., None] = os.setxattr

    def none(subject: object) -> list[str]:
        raise OSError(95, "Operation not supported")

    def refuse(subject: object, name: str | bytes, value: bytes) -> None:
        if os.fsencode(name).startswith((b"user.", b"trusted.")):
            raise OSError(95, "Operation not supported")
        really(subject, name, value)

    def no_device(name: object, mode: int = 0o600, device: int = 0, **kwargs: int) -> None:
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise PermissionError(1, "Operation not permitted")
        make(name, mode, device, **kwargs)

    make: Callable[..., None] = os.mknod
    monkeypatch.setattr(os, "listxattr", none)
    monkeypatch.setattr(os, "setxattr", refuse)
    monkeypatch.setattr(os, "mknod", no_device)
    unpacked = unpack_blob(archive(*LAYER), tmp_path / "t")
    monkeypatch.undo()
    assert unpacked.incomplete
    disk = {entry.path: entry for entry in on_disk(tmp_path / "t/fs")}
    entries = {entry.path: entry for entry in listed(tmp_path / "t")[0]}
    assert disk.keys() == entries.keys()
    assert entries[b"closed"].opaque
    assert not disk[b"closed"].opaque
    assert (entries[b"other"].type, disk[b"other"].type) == ("whiteout", "file")
    assert not any(name.startswith("user.") for e in disk.values() for name in e.xattrs)
