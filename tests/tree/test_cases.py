"""Compares unpacked layers with the recorded results of moby, containerd and umoci.

`tests/cases/layers/FORMAT.md` describes the cases; more come from the directory that
``TRIO_LAYERS_CASES`` names. Each layer is unpacked alone, and also on top of its parent if the
first way leads to that. The cases run as root, and in children with less privilege (`tree.modes`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import attrs
import pytest
from _tools.layer_stacks import Pieces, listed, mounted, on_disk, plant, unpack_blob, unpack_stack
from cases.layers import maketar
from tree.case_runner import ROOT, run_case
from tree.modes import MODES, Children, Refused

from trio_layers import _errors
from trio_layers._entries import Entry
from trio_layers._rootfs.view import MergedTree

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
ITEMS = [
    pytest.param(mode, case, id=f"{mode}-{name}")
    for mode in ("root", *MODES)
    for name, case in CASES
]


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    with ExitStack() as stack:
        yield Children(stack)


@pytest.mark.parametrize(("mode", "case"), ITEMS)
def test_case(mode: str, case: dict, tmp_path: Path, children: Children) -> None:
    """A stack of layers gives the recorded tree or an error, and touches nothing else."""
    if mode == "root":
        run_case(case, tmp_path, ROOT)
    else:
        try:
            wrong = children.run(mode, case)
        except Refused as refused:
            pytest.skip(f"kernel: no process of the kind {mode!r}: {refused}")
        assert not wrong, wrong


def test_every_case_is_an_item(request: pytest.FixtureRequest) -> None:
    """All cases run in each mode."""
    items = [item for item in request.session.items if item.name.startswith("test_case[")]
    selected = request.config.getoption("keyword") or any(
        "::" in arg for arg in request.config.args
    )
    assert CASES
    assert selected or len(items) == len(CASES) * (1 + len(MODES))


UNLIMITED = [(name, case) for name, case in CASES if "limits" not in case]


@pytest.mark.parametrize("case", [c for _, c in UNLIMITED], ids=[name for name, _ in UNLIMITED])
def test_both_ways_and_mounted(case: dict, tmp_path: Path) -> None:
    """A layer gives the same result alone and on top of its parent.

    overlayfs and the merged view show the same.
    """
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
    # Below an opaque directory, a directory without an entry has no defined time.
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
