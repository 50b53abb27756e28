"""A tree with all types of entries, and its exports."""

from __future__ import annotations

from pathlib import Path

from trio_layers import ExportReport
from trio_layers._rootfs.archive import archive
from trio_layers._rootfs.export import export
from trio_layers._rootfs.merged import MergedTree

NOBODY = 65534
CAPABILITY = {"hex": "0100000200040000000000000000000000000000"}

# All types of entries, with values that do not fit into a ustar header.
LAYER: list[dict] = [
    {"name": "./", "type": "dir", "mode": "0751", "uid": 3, "mtime": "77.000000001"},
    {"name": "d/", "type": "dir", "mode": "1770", "gid": 4, "mtime": "-1.5"},
    {"name": "d/file", "text": "content", "mode": "0604", "uid": 2**32 - 2, "gid": 2**31},
    {"name": "d/more", "type": "hardlink", "linkname": "d/file", "mode": "0604", "gid": 2**31}
    | {"uid": 2**32 - 2, "mtime": "1234567890.123456789"},
    {"name": "early", "text": "x", "mtime": "-2000000000.25"},
    {"name": "su", "text": "#!", "mode": "4755", "uid": 5},
    {"name": "cap", "text": "!", "pax": {"SCHILY.xattr.security.capability": CAPABILITY}},
    {"name": "attributes", "pax": {"SCHILY.xattr.user.x": {"hex": "00ff3d0a"}}},
    {"name": "disk", "type": "block", "devmajor": 4095, "devminor": 1048575, "mode": "0660"},
    {"name": "null", "type": "char", "devmajor": 1, "devminor": 3, "mode": "0666"},
    {"name": "pipe", "type": "fifo", "mode": "0622", "uid": 6},
    {"name": "away", "type": "symlink", "linkname": "/etc/passwd", "uid": 9, "mtime": 5},
    {"name": "up", "type": "symlink", "linkname": "../../../../etc"},
    {"name": {"hex": "ff0a5c20"}, "text": "bytes"},
    {"name": "line\nfeed", "type": "symlink", "linkname": {"hex": "fe0a2f00"[:6]}},
    {"name": "w" * 255, "text": "long name"},
    {"name": "/".join(["deep" * 20] * 20), "text": "long path"},
    {"name": "bare", "type": "dir", "mode": "0000", "uid": 8, "mtime": 3},
    {"name": "bare/in", "text": "in", "mode": "0000", "mtime": 3},
    {"name": "empty", "mtime": 0},
]


def never() -> None:
    pass


def exported(view: MergedTree, target: Path) -> ExportReport:
    return export(view, target, root_metadata=True, check_cancelled=never)


def packed(view: MergedTree) -> bytes:
    return b"".join(archive(view, check_cancelled=never))
