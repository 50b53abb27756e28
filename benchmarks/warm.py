"""A process that has the library imported and a store open: what a service that pulls is.

It says ``ready``, then reads references, one a line, and answers each with the seconds until the
image was there. The clock runs inside: no start of a process and no pipe is in the figure.
"""

from __future__ import annotations

import sys
import time

import trio

from trio_layers import open_puller


async def main(store: str) -> None:
    async with open_puller(store) as puller:
        print("ready", flush=True)
        while reference := (await trio.to_thread.run_sync(sys.stdin.readline)).strip():
            start = time.monotonic()
            async with puller.pull(reference):
                seconds = time.monotonic() - start
            print(seconds, flush=True)


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
