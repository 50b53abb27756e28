"""Unpacking without privilege: the list has the truth, the disk what is possible."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from layers.plain import archive
from layers.stack import listed, on_disk

from trio_layers._store.rootfs import MergedTree

NOBODY = 65534

# Privilege is dropped when all is imported: the interpreter may be in a directory of root's own.
CHILD = """
import io, os, sys
from pathlib import Path
from trio_layers._unpack.worker import unpack
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
unpacked = unpack(io.BytesIO(sys.stdin.buffer.read()).read, Path(sys.argv[1]))
assert unpacked.incomplete
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="dropping privilege needs some")

# cap_net_bind_service, in the form of setcap (struct vfs_cap_data, version 2).
CAPABILITY = {"hex": "0100000200040000000000000000000000000000"}

LAYER = [
    {"name": "closed/", "type": "dir", "mode": "0000", "uid": 5, "gid": 6},
    {"name": "closed/file", "text": "x", "mode": "0000", "uid": 7},
    {"name": "closed/.wh.gone"},
    {"name": "closed/.wh..wh..opq"},
    {"name": "su", "mode": "4755", "pax": {"SCHILY.xattr.security.capability": CAPABILITY}},
    {"name": "more", "type": "hardlink", "linkname": "closed/file", "mode": "0400", "uid": 8},
    {"name": "disk", "type": "block", "devmajor": 8, "devminor": 1, "mode": "0660"},
    {"name": "pipe", "type": "fifo"},
    {"name": "link", "type": "symlink", "linkname": "/etc", "uid": 9},
    {"name": ".wh.other"},
]


@pytest.fixture
def target() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    os.chown(path, NOBODY, NOBODY)
    yield path
    shutil.rmtree(path)


def test_unprivileged(target: Path) -> None:
    """Owners, modes, devices and attributes are in the list; the files stay within reach and
    run as nobody else."""
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
    assert b"closed/gone" not in entries
    assert entries[b"other"].type == "whiteout"
    disk = {entry.path: entry for entry in on_disk(target / "fs")}
    assert disk.keys() == entries.keys()
    assert {entry.uid for entry in disk.values()} <= {NOBODY, 0}
    assert disk[b"closed"].mode == 0o700
    assert disk[b"closed/file"].mode == 0o600
    assert disk[b"su"].mode == 0o755
    assert disk[b"disk"].type == "file"
    assert disk[b"pipe"].type == "fifo"
    assert os.getxattr(target / "fs/closed", "user.overlay.opaque") == b"y"
    assert stat.S_ISCHR((target / "fs/other").lstat().st_mode)
    paths = [entry.path for entry in MergedTree([target]).walk()]
    assert b"other" not in paths
    assert b"disk" in paths
