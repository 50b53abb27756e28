"""A process with an open store that has pulled before, like a service that pulls.

It first pulls another image with a few small layers from a registry in the process itself, and
prints ``ready``. Then it reads references, one per line, pulls each, and prints the seconds. The
clock runs inside the process, so the figure contains no start of a process and no pipe.
"""

from __future__ import annotations

import sys
import time

import trio

from trio_layers import open_puller
from trio_layers.testing import open_registry, sample_image


async def main(store: str) -> None:
    async with open_puller(store) as puller:
        async with open_registry() as registry:
            reference = registry.add(sample_image(), "library/another:latest")
            async with puller.pull(reference):
                pass
        print("ready", flush=True)
        while reference := (await trio.to_thread.run_sync(sys.stdin.readline)).strip():
            start = time.monotonic()
            async with puller.pull(reference):
                seconds = time.monotonic() - start
            print(seconds, flush=True)


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
