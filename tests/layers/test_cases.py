"""Layers against what moby, containerd and umoci were recorded making of them.

`tests/cases/layers/FORMAT.md` says what is in a case; more come from the directory that
``TRIO_LAYERS_CASES`` names. Each layer is unpacked alone, and on top of its parent where that is
called for, so that both ways are used.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import attrs
import pytest
from cases.layers import maketar
from layers.stack import (
    Pieces,
    described,
    listed,
    mounted,
    on_disk,
    plant,
    surroundings,
    unpack_blob,
    unpack_stack,
)

from trio_layers import _errors
from trio_layers._entries import Entry
from trio_layers._store.rootfs import MergedTree
from trio_layers._unpack.worker import Limits

HERE = Path(__file__).parents[1] / "cases" / "layers"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices need root")


def case_files() -> list[Path]:
    files = sorted(HERE.glob("*.json"))
    more = os.environ.get("TRIO_LAYERS_CASES")
    if more:
        files += sorted((Path(more) / "layers").glob("*.json"))
    return files


def load() -> list[tuple[str, dict]]:
    return [
        (f"{number}-{path.stem}-{case['id']}", case)
        for number, path in enumerate(case_files())
        for case in json.loads(path.read_text(encoding="utf-8"))["cases"]
    ]


CASES = load()


@pytest.mark.parametrize("case", [case for _, case in CASES], ids=[name for name, _ in CASES])
def test_case(case: dict, tmp_path: Path) -> None:
    """A stack of layers gives the recorded tree or an error, and touches nothing else."""
    outside = tmp_path / "outside"
    plant(outside)
    before = surroundings(tmp_path)
    limits = Limits(**case.get("limits", {}))
    blobs = [Pieces(partial(maketar.iter_layer, layer, str(outside))) for layer in case["layers"]]
    try:
        trees = unpack_stack(blobs, tmp_path, limits)
    except (_errors.UnpackError, _errors.DecompressionError):
        if not may_fail(case):
            raise
    else:
        tree = described(list(MergedTree(trees).walk()))
        problems = wrong(case, tree, str(outside))
        assert not problems, problems
        for path in trees:
            entries, summary = listed(path)
            entries = [attrs.evolve(entry, implied=False) for entry in entries]
            assert summary.incomplete or on_disk(path / "fs") == entries
    after = surroundings(tmp_path)
    canary = str(outside)
    assert {k: v for k, v in after.items() if k.startswith(canary)} == before
    for name in os.listdir(tmp_path):
        assert name == "outside" or set(os.listdir(tmp_path / name)) <= {"outside", "fs", "entries"}
        for path in (tmp_path / name).glob("outside/file"):
            assert path.read_bytes() == b"canary\n"
            assert path.lstat().st_nlink == 1


def may_fail(case: dict) -> bool:
    expected = case["expected"]["outcome"]
    return (
        expected == "error" or case.get("also_error") or "error" in case.get("also_acceptable", ())
    )


def wrong(case: dict, tree: dict, outside: str) -> object:
    """How a result differs from all that are accepted; nothing if it is one of them."""
    expected = case["expected"]
    if expected["outcome"] == "error":
        if "also_tree" in case:
            return differences(case["also_tree"], tree, outside)
        return None if "contained" in case.get("also_acceptable", ()) else "no error"
    if "tree" not in expected:
        count = expected.get("tree_count")
        return None if count is None or count == len(tree) else f"{len(tree)} paths, not {count}"
    accepted = [expected["tree"]]
    for name in case.get("also_ok", ()):
        other = case.get("observed", {}).get(name, {}).get("tree")
        if isinstance(other, dict):
            accepted.append(other)
    found = [differences(each, tree, outside) for each in accepted]
    return None if not all(found) else found[0]


def differences(expected: dict, tree: dict, outside: str) -> dict:
    inner = outside.strip("/")
    wanted: dict[str, dict] = {}
    for path, attributes in expected.items():
        there = {
            k: v
            for k, v in attributes.items()
            if k != "mtime_ns" or attributes["mtime"] is not None
        }
        if "linkname" in there:
            there["linkname"] = there["linkname"].replace("{OUTSIDE}", outside)
        if "links" in there:
            there["links"] = there["links"].replace("{OUTSIDE}", inner)
        wanted[path.replace("{OUTSIDE}", inner)] = there
    ways = {inner[:end] for end, char in enumerate(inner) if char == "/"}
    got = {path: there for path, there in tree.items() if path in wanted or path not in ways}
    found: dict[str, object] = {}
    for path in wanted.keys() | got.keys():
        want, have = dict(wanted.get(path, {})), dict(got.get(path, {}))
        if want and have and want.get("mtime") is None:
            for there in (want, have):
                there.pop("mtime", None)
                there.pop("mtime_ns", None)
        if want != have:
            found[path] = (want, have)
    return found


def test_every_case_is_an_item(request: pytest.FixtureRequest) -> None:
    """Not fewer cases are run than there are."""
    items = [item for item in request.session.items if item.name.startswith("test_case[")]
    selected = request.config.getoption("keyword") or any(
        "::" in arg for arg in request.config.args
    )
    assert CASES
    assert selected or len(items) >= len(CASES)


UNLIMITED = [(name, case) for name, case in CASES if "limits" not in case]


@pytest.mark.parametrize("case", [c for _, c in UNLIMITED], ids=[name for name, _ in UNLIMITED])
def test_both_ways_and_mounted(case: dict, tmp_path: Path) -> None:
    """What a layer becomes alone is what it becomes on top of its parent, and what overlayfs
    makes of the trees is what the merged view shows."""
    outside = tmp_path / "outside"
    plant(outside)
    blobs = [Pieces(partial(maketar.iter_layer, layer, str(outside))) for layer in case["layers"]]
    trees: list[Path] = []
    try:
        shared = unpack_stack(blobs, tmp_path)
    except (_errors.UnpackError, _errors.DecompressionError):
        shared = []
    try:
        for number, blob in enumerate(blobs):
            target = tmp_path / f"{number}-always-on-parent"
            unpack_blob(blob, target, MergedTree(trees))
            trees.append(target)
    except (_errors.UnpackError, _errors.DecompressionError):
        assert not shared
        return
    # Below an opaque directory, one that no entry describes has no time of its own.
    timeless = {
        entry.path
        for tree in shared
        if any(entry.opaque for entry in listed(tree)[0])
        for entry in listed(tree)[0]
        if entry.implied
    }
    merged = without_times(list(MergedTree(shared).walk()), timeless)
    assert without_times(list(MergedTree(trees).walk()), timeless) == merged
    if any(listed(tree)[1].incomplete for tree in trees):
        return
    with mounted(trees, tmp_path) as root:
        seen = on_disk(root)
    assert without_times(seen, timeless) == without_times(list(MergedTree(trees).walk()), timeless)


def without_times(entries: list[Entry], paths: set[bytes]) -> list[Entry]:
    return [attrs.evolve(e, mtime_ns=0) if e.path in paths else e for e in entries]
