"""Random stacks of layers: both ways of unpacking, the merged view and overlayfs agree."""

from __future__ import annotations

import os
import random
from pathlib import Path

import attrs
import pytest
from layers.plain import archive
from layers.stack import listed, mounted, on_disk, unpack_blob, unpack_stack

from trio_layers._entries import Entry
from trio_layers._errors import UnpackError
from trio_layers._store.rootfs import MergedTree

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and mounts need root")

NAMES = "abc"


def path(chance: random.Random) -> str:
    return "/".join(chance.choices(NAMES, k=chance.choice([1, 1, 2, 2, 3])))


def layer(chance: random.Random) -> list[dict]:
    entries: list[dict] = []
    if chance.random() < 0.5:
        entries.append({"name": "./", "type": "dir", "mode": chance.choice(["0755", "0700"])})
    for number in range(chance.randrange(1, 9)):
        name = path(chance)
        above, _, last = name.rpartition("/")
        entry: dict = {"name": name, "mtime": chance.randrange(1000), "uid": chance.randrange(2)}
        kind = chance.choice(["file", "file", "dir", "dir", "symlink", "hardlink", "wh", "opq"])
        if kind == "file":
            entry["text"] = f"{number}"
        elif kind == "symlink":
            entry |= {"type": kind, "linkname": chance.choice(["", "/", "../"]) + path(chance)}
        elif kind == "hardlink":
            entry |= {"type": kind, "linkname": path(chance)}
        elif kind == "dir":
            entry |= {"type": kind, "mode": chance.choice(["0755", "0711"])}
        else:
            entry["name"] = f"{above}/.wh." + (last if kind == "wh" else ".wh..opq")
        entries.append(entry)
    return entries


def plain(entries: list[Entry]) -> list[Entry]:
    """Without what the two ways and overlayfs may tell differently: times of directories, and
    links between a file's names, which overlayfs breaks when it copies."""
    return [
        attrs.evolve(entry, mtime_ns=0 if entry.type == "dir" else entry.mtime_ns)
        for entry in entries
    ]


@pytest.mark.parametrize("seed", range(80))
def test_agreement(seed: int, tmp_path: Path) -> None:
    """Alone where that does, or always on the parent: the same view, and the one of a mount."""
    chance = random.Random(seed)
    below: list[bytes] = []
    trees: list[Path] = []
    for number in range(5):
        # A layer that does not fit on those before it is left out by both.
        blob = archive(*layer(chance))
        target = tmp_path / f"{number}-always-on-parent"
        base = tmp_path / str(number)
        base.mkdir()
        try:
            unpack_blob(blob, target, MergedTree(trees))
        except UnpackError:
            with pytest.raises(UnpackError):
                unpack_stack([*below, blob], base)
            continue
        trees.append(target)
        below.append(blob)
        shared = unpack_stack(below, base)
        merged = plain(list(MergedTree(trees).walk()))
        assert plain(list(MergedTree(shared).walk())) == merged
        for tree in (*shared, target):
            entries, summary = listed(tree)
            assert not summary.incomplete
            assert on_disk(tree / "fs") == [attrs.evolve(e, implied=False) for e in entries]
        with mounted(shared, base) as root:
            assert plain(on_disk(root)) == merged
