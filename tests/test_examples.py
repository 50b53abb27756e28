"""Every example runs as users run it, and prints the promised result."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import trio

from trio_layers.testing import sample_image

EXAMPLES = Path(__file__).parent.parent / "examples"


async def run(name: str, *arguments: str) -> tuple[str, str]:
    """Run an example, and return its stdout and stderr."""
    done = await trio.run_process(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env={**os.environ, "PYTHONWARNINGS": "error"},
        capture_stdout=True,
        capture_stderr=True,
    )
    return done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
async def test_it_runs(name: str) -> None:
    out, err = await run(name)
    assert out
    assert "Traceback" not in err


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_it_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 80


async def test_ask_registry_says_what_is_there() -> None:
    out, _ = await run("ask_registry.py")
    assert "application/vnd.oci.image.index.v1+json" in out
    assert "4 layers, " in out
    assert "2 tags, the first of them 1.0, latest\n" in out
    assert "'application/spdx+json'\n" in out


async def test_pull_image_lists_layers_and_files(tmp_path: Path) -> None:
    image = sample_image()
    out, err = await run("pull_image.py", "--store", str(tmp_path / "store"))
    for layer in image.layers:
        assert f"layer {layer.descriptor.digest}  {layer.descriptor.size} bytes\n" in out
    for diff_id in image.diff_ids:
        assert diff_id in out
    files = {}
    for line in out.splitlines():
        columns = line.split(maxsplit=5)
        if len(columns) == 6 and ":" in columns[1]:
            files[columns[5].partition(" -> ")[0]] = line
    assert files["/"].startswith("drwxr-xr-x ")
    assert files["/usr/lib/os-release"].startswith("-rw-r--r-- ")
    assert files["/etc/os-release"].endswith(" /etc/os-release -> ../usr/lib/os-release")
    assert files["/etc/os-release"].startswith("lrwxrwxrwx ")
    assert err.splitlines()[-1].endswith(": Pull complete")
