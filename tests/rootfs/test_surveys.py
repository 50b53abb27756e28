"""Surveys of directories from parts of the lists equal those from whole lists."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from trio_layers._digest import DiffID, Digest
from trio_layers._entries import (
    Entry,
    Summary,
    entry_line,
    link_line,
    opaque_line,
    removal_line,
    summary_line,
)
from trio_layers._rootfs import merged
from trio_layers._rootfs.merged import MergedTree, SurveyCache

NAMES = (b"a", b"b", b'"t":"dir"', b"\xff\\")
END = summary_line(
    Summary(
        diff_id=DiffID(Digest("sha256:" + 64 * "0")),
        size=0,
        entries=0,
        assumed=(),
        needs_lower=False,
        incomplete=False,
    )
)


def write_list(tree: Path, chance: random.Random) -> None:
    """Write a random list of a layer, with replaced and removed entries."""
    there: dict[bytes, str] = {}
    lines = []

    def remove(path: bytes) -> None:
        below = [other for other in there if other == path or other.startswith(path + b"/")]
        for other in sorted(below, reverse=True):
            del there[other]
            lines.append(removal_line(other))

    def put(path: bytes, kind: str) -> None:
        parent = path.rpartition(b"/")[0]
        if path and there.get(parent) != "dir":
            put(parent, "dir")
        if path in there and not (there[path] == kind == "dir"):
            remove(path)
        there[path] = kind
        entry = Entry(
            path=path,
            type=kind,  # type: ignore[arg-type]
            mode=chance.choice((0o755, 0o700)),
            mtime_ns=0,
            uid=0,
            gid=0,
            linkname=b"b" if kind == "symlink" else None,
            crc32=0 if kind == "file" else None,
            implied=kind == "dir" and chance.random() < 0.3,
        )
        lines.append(entry_line(entry))

    put(b"", "dir")
    for _ in range(chance.randrange(12)):
        path = b"/".join(chance.choices(NAMES, k=chance.randrange(1, 4)))
        match chance.randrange(8):
            case 0 if there.get(path) == "dir":
                lines.append(opaque_line(path))
            case 1 if path in there:
                remove(path)
            case 2 if files := [name for name in there if there[name] == "file"]:
                target = chance.choice(files)
                if there.get(path.rpartition(b"/")[0]) == "dir" and path not in there:
                    there[path] = "file"
                    entry = Entry(path=path, type="file", mode=0o600, mtime_ns=0, uid=0, gid=0)
                    lines.append(link_line(entry, target))
            case 3 | 4:
                put(path, chance.choice(("file", "symlink", "whiteout")))
            case _:
                put(path, "dir")
    tree.mkdir()
    (tree / "entries").write_bytes(b"".join([*lines, END]))


@pytest.mark.parametrize("seed", range(16))
def test_surveys_agree_with_the_whole(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    surveys = SurveyCache()
    trees = [tmp_path / str(number) for number in range(8)]
    for tree in trees:
        write_list(tree, chance)
    # Surveys come in any order, and for stacks that diverge.
    heights = [*range(1, 9), 3, 8, 5]
    stacks = [trees[:height] for height in heights] + [[*trees[:3], trees[6]], trees]
    paths = {b"", *NAMES, b"missing"}
    paths |= {a + b"/" + b for a in NAMES for b in NAMES}
    for stack in stacks:
        whole = MergedTree(stack)
        whole.load()
        for path in paths:
            found = MergedTree(stack, surveys=surveys).survey([path])[path]
            expected = whole.lookup(path)
            if expected is None or expected.type != "dir":
                assert (found and found.type) == (expected and expected.type)
            else:
                assert found == expected


@pytest.mark.parametrize("remembered", [16 * 1024, 85], ids=["default", "fewer-than-entries"])
def test_lists_are_read_once(
    remembered: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated directories in many layers take no more memory."""
    monkeypatch.setattr(merged, "_CACHED_DIRECTORIES", remembered)
    surveys = SurveyCache()
    chance = random.Random(1)
    trees = [tmp_path / str(number) for number in range(20)]
    for tree in trees:
        write_list(tree, chance)
    for height in range(1, 20):
        assert MergedTree(trees[:height], surveys=surveys).survey([b""])[b""] is not None
        (trees[height - 1] / "entries").unlink()
