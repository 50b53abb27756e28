"""Ctrl-C in a program that uses the library.

`trio.run` raises a plain `KeyboardInterrupt`, and all blocks are left.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from trio_layers import open_store
from trio_layers.testing import File, build_image, open_registry

PROGRAM = """
import sys, trio, trio_layers

async def sink(event):
    print(event.action, flush=True)

async def main():
    async with trio_layers.open_puller(sys.argv[1]) as puller:
        print("open", flush=True)
        async with puller.pull(sys.argv[2], progress=sink):
            print("there", flush=True)
            await trio.sleep_forever()

trio.run(main)
"""

IMAGE = build_image([[File(f"{n}-{i}", bytes(100_000)) for i in range(5)] for n in range(4)])


@pytest.mark.parametrize("lines", [1, 6, None])
async def test_ctrl_c_while_an_image_is_pulled(lines: int | None, tmp_path: Path) -> None:
    """Send Ctrl-C after this number of lines of output; ``None``: in the block of the pull."""
    async with open_registry() as registry:
        reference = registry.add(IMAGE, "library/sample:1")
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "store"), reference]
        with trio.fail_after(30):
            process = await trio.lowlevel.open_process(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            errors = bytearray()

            async def read_errors() -> None:
                async for data in process.stderr:
                    errors.extend(data)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_errors)
                seen = bytearray()
                while b"there" not in seen if lines is None else seen.count(b"\n") < lines:
                    data = await process.stdout.receive_some()
                    assert data, errors.decode()
                    seen += data
                process.send_signal(signal.SIGINT)
                async for _ in process.stdout:
                    pass
                await process.wait()
    text = errors.decode()
    assert process.returncode == -signal.SIGINT, text
    assert text.rstrip().endswith("KeyboardInterrupt"), text
    assert "Group" not in text
    async with open_store(tmp_path / "store") as store:
        assert not (await store.check()).problems
