"""Helpers for tests with several pullers on one store."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from trio_layers.testing import BuiltImage, BuiltLayer, File, Registry, build_layer

SCRIPT = Path(__file__).with_name("pulling.py")
MIB = 1024 * 1024


def layer_of(name: str, size: int) -> BuiltLayer:
    """Make a layer whose blob is slightly larger than ``size``, of incompressible bytes."""
    return build_layer([File(name, random.Random(name).randbytes(size))])


def asked(registry: Registry, image: BuiltImage) -> dict[str, list[tuple[str, int]]]:
    """Return the requests for each of an image's layers: the range, and the number
    of sent bytes.
    """
    layers = {layer.descriptor.digest for layer in image.layers}
    requests = defaultdict(list)
    for exchange in registry.requests:
        digest = exchange.path.rpartition("/")[2]
        if digest in layers and exchange.method == "GET":
            requests[digest].append((exchange.headers.get("range", ""), exchange.bytes_sent))
    return requests


@attrs.define
class Pulling:
    """A running process that pulls. Its output is read line by line."""

    process: trio.Process
    _read: bytes = b""

    async def go(self) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(b"go\n")

    async def next_line(self) -> dict | None:
        """Return the next line of its output; ``None`` after its end."""
        assert self.process.stdout is not None
        while b"\n" not in self._read:
            data = await self.process.stdout.receive_some()
            if not data:
                return None
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)

    async def wait_until(self, **what: object) -> dict:
        """Wait until the process reports such an event; numbers are minimums."""
        while line := await self.next_line():
            if all(_is(line.get(key), value) for key, value in what.items()):
                return line
        raise AssertionError(f"it has ended, and never said {what}")

    async def wait_ended(self) -> list[dict]:
        """Return the remaining output at the end of the process."""
        said = []
        while line := await self.next_line():
            said.append(line)
        assert await self.process.wait() == 0
        return said


def _is(found: object, value: object) -> bool:
    if isinstance(value, int) and isinstance(found, int):
        return found >= value
    return found == value


@asynccontextmanager
async def pulling(
    store: Path, *references: str, limit: int = 3, go: bool = True
) -> AsyncIterator[Pulling]:
    """Run a process that pulls, and kill it at the end of the block if it still runs."""
    async with running(SCRIPT, str(store), str(limit), *references, go=go) as this:
        yield this


@asynccontextmanager
async def running(script: Path, *arguments: str, go: bool = True) -> AsyncIterator[Pulling]:
    """Run another script that prints when it is ready, and waits for a line."""
    command = [sys.executable, script, *arguments]
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    )
    try:
        this = Pulling(process)
        await this.wait_until(ready=True)
        if go:
            await this.go()
        yield this
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                await stream.aclose()


def environment() -> dict[str, str]:
    places = [str(SCRIPT.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
