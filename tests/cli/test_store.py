"""The commands ``rm``, ``gc`` and ``check``, as processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import trio
from cli.test_pull import SAMPLE, run
from pull.mounting import fill
from store.test_check import cut

from trio_layers import open_store
from trio_layers.testing import open_registry


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
async def test_gc_says_which_trees_are_mounted(tmp_path: Path) -> None:
    store, target = tmp_path / "store", tmp_path / "target"
    target.mkdir()
    async with open_store(store) as opened:
        await fill(opened)
    tree = sorted((store / "trees" / "sha256").iterdir())[0]
    await trio.run_process(["mount", "--bind", tree / "fs", target])
    try:
        report = json.loads((await run("gc", "--dry-run", "--json", store=store)).stdout)
        assert report["mounted"] == [{"id": f"sha256:{tree.name}", "targets": [str(target)]}]
        done = await run("gc", store=store)
        line = f"kept: tree sha256:{tree.name} is mounted: {target}"
        assert done.stdout.decode().splitlines()[1:] == [line]
    finally:
        await trio.run_process(["umount", target])
    assert [path.name for path in (store / "trees" / "sha256").iterdir()] == [tree.name]


async def test_what_is_removed_is_freed_by_gc(tmp_path: Path) -> None:
    async with open_registry() as registry:
        reference = registry.add(SAMPLE, "library/demo:latest")
        await run("pull", "-q", reference, store=tmp_path)
    name = reference.removesuffix(":latest")
    nothing = await run("gc", store=tmp_path)
    assert nothing.stdout == b"removed: 0 images, 0 layers, 0 trees, 0 blobs; 0 bytes\n"
    missing = await run("rm", name, "demo:2", "--platform", "linux/s390x", store=tmp_path)
    assert missing.returncode == 1
    assert [line.split(": ", 2)[1:] for line in missing.stderr.decode().splitlines()] == [
        [name, "no such image for linux/s390x in the store"],
        ["demo:2", "no such image for linux/s390x in the store"],
    ]
    done = await run("rm", name, store=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (await run("images", store=tmp_path)).stdout == b""
    would = await run("gc", "--dry-run", "--json", store=tmp_path)
    did = await run("gc", "--json", store=tmp_path)
    assert json.loads(would.stdout) == json.loads(did.stdout)
    layers = len(SAMPLE.layers)
    counts = json.loads(did.stdout)
    assert counts.pop("size") > 0
    assert counts == {"images": 1, "layers": layers, "trees": layers, "blobs": layers + 2}
    assert os.listdir(tmp_path / "blobs" / "sha256") == []


async def test_an_image_is_removed_by_its_digest(tmp_path: Path) -> None:
    async with open_registry() as registry:
        await run("pull", "-q", registry.add(SAMPLE, "demo:1"), store=tmp_path)
    done = await run("rm", SAMPLE.digest, store=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (await run("images", store=tmp_path)).stdout == b""


async def test_a_check_says_what_is_damaged_and_repairs_it(tmp_path: Path) -> None:
    layer = SAMPLE.layers[0].descriptor.digest
    async with open_registry() as registry:
        await run("pull", "-q", registry.add(SAMPLE, "demo:1"), store=tmp_path)
    sound = await run("check", store=tmp_path)
    assert sound.returncode == 0
    assert sound.stdout.decode().endswith("1 images; 0 problems\n")
    cut(tmp_path / "blobs" / "sha256" / layer.removeprefix("sha256:"))
    found = await run("check", store=tmp_path)
    assert found.returncode == 1
    problem, _ = found.stdout.decode().splitlines()
    assert problem.startswith(f"blob {layer}: it is ")
    repaired = await run("check", "--repair", "--json", store=tmp_path)
    assert repaired.returncode == 0
    report = json.loads(repaired.stdout)
    assert report["repaired"]
    assert [each["id"] for each in report["problems"]] == [layer]
    assert (await run("check", store=tmp_path)).returncode == 0
