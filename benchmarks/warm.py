"""A process that has its store open and has pulled before: what a service that pulls is.

Another image, of a few small layers, has come from a registry in the process itself. Then it says
``ready``, reads references, one a line, and answers each with the seconds until the image was
there. The clock runs inside: no start of a process and no pipe is in the figure.
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
