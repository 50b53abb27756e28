"""Commands with a slow, blocked or closed output, in real processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from trio_layers.testing import File, Registry, build_image, open_registry

IMAGE = build_image([[File("big", random.Random(1).randbytes(4_000_000))]])
TAGS = sorted(f"tag-{number:05}-{'x' * 100}" for number in range(2000))
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    async with open_registry() as registry:
        yield registry


@asynccontextmanager
async def command(*arguments: str, **options: object) -> AsyncIterator[trio.Process]:
    """Run the command in a process that the block's end kills."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-P", "-m", "trio_layers", *arguments],
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options},
    )
    try:
        with trio.fail_after(20):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
        if process.stdout is not None:
            await process.stdout.aclose()
        if process.stderr is not None:
            await process.stderr.aclose()


@pytest.fixture
def full_pipe() -> Iterator[int]:
    """The writing end of a pipe with a full buffer."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    yield writer
    os.close(reader)
    os.close(writer)


def add_tags(registry: Registry) -> str:
    for tag in TAGS:
        registry.add(IMAGE, f"sample:{tag}")
    return f"{registry.host}/sample"


@SIGNALS
async def test_reader_that_stops(number: signal.Signals, registry: Registry) -> None:
    """The output is larger than a pipe's buffer, so the command blocks."""
    async with command("tags", add_tags(registry), stderr=subprocess.PIPE) as process:
        assert await process.stdout.receive_some(1)
        process.send_signal(number)
        assert await process.wait() == 128 + number
        assert await process.stderr.receive_some() == b""


async def test_slow_reader_gets_all(registry: Registry) -> None:
    async with command("tags", add_tags(registry)) as process:
        seen = bytearray()
        async for data in process.stdout:
            seen += data
            await trio.testing.wait_all_tasks_blocked(0.001)
        assert await process.wait() == 0
    assert seen.decode().splitlines() == TAGS


async def test_reader_that_leaves(registry: Registry) -> None:
    async with command("tags", add_tags(registry), stderr=subprocess.PIPE) as process:
        assert await process.stdout.receive_some(1)
        await process.stdout.aclose()
        assert await process.wait() == 1
        assert await process.stderr.receive_some() == b""


@pytest.mark.parametrize("line", ["cat REF /big", "export REF -"])
async def test_reader_of_bytes_that_stops(line: str, registry: Registry, tmp_path: Path) -> None:
    reference = registry.add(IMAGE, "sample:1")
    name, *rest = line.replace("REF", reference).split()
    store = ["--store", str(tmp_path)]
    if name == "export":
        async with command("pull", "-q", *store, reference) as process:
            assert await process.wait() == 0
    async with command(name, *store, *rest) as process:
        assert await process.stdout.receive_some(1)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 143


@pytest.mark.parametrize("options", [["--progress", "plain"], ["-v"]], ids=["progress", "log"])
async def test_stuck_stderr(
    options: list[str], full_pipe: int, registry: Registry, tmp_path: Path
) -> None:
    """Blocked progress or log output delays neither the pull nor its cancellation."""
    reference = registry.add(IMAGE, "sample:1")
    arguments = ["pull", "--store", str(tmp_path), *options, reference]
    async with command(*arguments, stderr=full_pipe) as process:
        while not await trio.to_thread.run_sync(lambda: any(tmp_path.glob("trees/sha256/*"))):
            await trio.testing.wait_all_tasks_blocked(0.01)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130


async def test_complaint_that_nobody_takes(full_pipe: int, registry: Registry) -> None:
    async with command("digest", f"{registry.host}/none:1", stderr=full_pipe) as process:
        while not registry.requests:
            await trio.testing.wait_all_tasks_blocked(0.01)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 143
