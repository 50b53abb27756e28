"""The command line as a process, against the embedded registry."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from trio_layers.testing import Registry, Reply, Stall, open_registry, sample_image

SAMPLE = sample_image()


async def run(*arguments: str, store: Path) -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(
        [sys.executable, "-P", "-m", "trio_layers", *arguments],
        env={**os.environ, "TRIO_LAYERS_STORE": str(store), "PYTHONWARNINGS": "error"},
        stdin=subprocess.DEVNULL,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )


async def test_pull_then_list(tmp_path: Path) -> None:
    async with open_registry() as registry:
        reference = registry.add(SAMPLE, "library/demo:latest")
        done = await run("pull", "--json", reference.removesuffix(":latest"), store=tmp_path)
        assert done.stderr.decode().splitlines()[-1].endswith(": Pull complete")
        assert done.returncode == 0
        image = json.loads(done.stdout)
        assert image["reference"] == reference
        assert image["digest"] == SAMPLE.digest
        assert [layer["diffId"] for layer in image["layers"]] == list(SAMPLE.diff_ids)

        listed = await run("images", store=tmp_path)
        assert listed.stderr == b""
        assert listed.returncode == 0
        assert listed.stdout.decode() == f"{reference} {image['platform']} {SAMPLE.digest}\n"


async def test_pulling_again_downloads_nothing(tmp_path: Path) -> None:
    async with open_registry() as registry:
        reference = registry.add(SAMPLE, "demo:1")
        await run("pull", reference, store=tmp_path)
        before = blobs_asked_for(registry)
        assert before
        done = await run("pull", reference, store=tmp_path)
        assert done.returncode == 0
        lines = done.stderr.decode().splitlines()
        assert lines
        assert all(line.endswith(": Already exists") for line in lines)
        layers = {layer.descriptor.digest for layer in SAMPLE.layers}
        assert not layers & set(blobs_asked_for(registry)[len(before) :])


def blobs_asked_for(registry: Registry) -> list[str]:
    return [
        exchange.path.rpartition("/")[2]
        for exchange in registry.requests
        if "/blobs/" in exchange.path
    ]


async def test_two_images_of_which_one_is_missing(tmp_path: Path) -> None:
    async with open_registry() as registry:
        reference = registry.add(SAMPLE, "demo:1")
        missing = f"{registry.host}/demo:2"
        done = await run("pull", "-q", missing, reference, store=tmp_path)
    assert done.returncode == 1
    assert done.stdout.decode().startswith(f"{reference} ")
    [line] = done.stderr.decode().splitlines()
    assert line.startswith(f"trio-layers: {missing}: ")


async def test_a_registry_that_fails(tmp_path: Path) -> None:
    async with open_registry() as registry:
        reference = registry.add(SAMPLE, "demo:1")
        registry.inject("/v2/*/manifests/*", Reply(418))
        done = await run("pull", "-q", reference, store=tmp_path)
    assert done.returncode == 1
    assert done.stdout == b""
    [line] = done.stderr.decode().splitlines()
    assert "418" in line
    assert registry.host in line


async def test_usage_error(tmp_path: Path) -> None:
    done = await run("pull", store=tmp_path)
    assert done.returncode == 2
    assert done.stdout == b""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
async def test_interrupted_in_a_download(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """An interrupted pull prints nothing, and the next pull goes on."""
    [*_, largest] = sorted(SAMPLE.layers, key=lambda layer: layer.descriptor.size)
    async with open_registry() as registry, trio.open_nursery() as nursery:
        reference = registry.add(SAMPLE, "demo:1")
        registry.inject(f"/v2/*/blobs/{largest.descriptor.digest}", Stall(after=1))
        pull = [sys.executable, "-P", "-m", "trio_layers", "pull", "--progress", "json"]
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [*pull, reference],
                env={**os.environ, "TRIO_LAYERS_STORE": str(tmp_path)},
                stderr=subprocess.PIPE,
                check=False,
            )
        )
        assert process.stderr is not None
        output, sent = b"", False
        async with process.stderr:
            async for chunk in process.stderr:
                output += chunk
                if not sent and b'"Downloading"' in output:
                    process.send_signal(number)
                    sent = True
        assert await process.wait() == code
    for line in output.splitlines():
        assert json.loads(line)["status"]
