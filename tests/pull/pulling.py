"""A process that pulls: ``pulling.py STORE LIMIT REFERENCE…``.

It prints ``{"ready": true}``, waits for a line, and then pulls all references at once. It prints
each event and each pulled image as a line. It holds each image until all are pulled.
"""

from __future__ import annotations

import json
import signal
import sys

import trio

from trio_layers import Progress, open_puller


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


async def report(event: Progress) -> None:
    say(id=event.id, action=event.action, current=event.current, total=event.total)


async def main(store: str, limit: int, references: list[str]) -> None:
    async with open_puller(store, max_concurrent_downloads=limit, retry_tick=0.01) as puller:

        async def pull(reference: str) -> None:
            nonlocal missing
            async with puller.pull(reference, progress=report) as image:
                entries = await image.rootfs.walk()
                say(image=image.digest, entries=len(entries))
                missing -= 1
                if not missing:
                    all_came.set()
                await all_came.wait()

        missing, all_came = len(references), trio.Event()
        say(ready=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        async with trio.open_nursery() as nursery:
            for reference in references:
                nursery.start_soon(pull, reference)


if __name__ == "__main__":
    # A shell ignores SIGINT for background jobs, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    trio.run(main, sys.argv[1], int(sys.argv[2]), sys.argv[3:])
