"""Processes that contend for a store: ``contending.py WORK STORE SEED DISTURBED REFERENCE…``.

``pull``: four tasks pull random images in random order. If it is disturbed, they cancel some pulls.
Each event is a line, and the last line has the numbers of pulled and cancelled images.

The works in `BESIDES` repeat until a line comes in.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Awaitable, Callable

import trio

from trio_layers import DirectoryStore, Image, Progress, open_puller, open_store

TASKS = 4
NAME = re.compile(rb"noise-[0-9]+-([0-9]+)")


def noise(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


async def check_contents(image: Image) -> None:
    """Check that each file matches its name, and that each layer has a file."""
    found = 0
    for entry in await image.rootfs.walk():
        if match := NAME.fullmatch(entry.path):
            name = entry.path.decode()
            assert await image.rootfs.read_bytes(name) == noise(name, int(match[1]))
            found += 1
    assert found == len(image.layers), f"{image.reference} has {found} of {len(image.layers)} files"


async def pull(store: str, seed: str, disturbed: bool, references: list[str]) -> None:
    counts: Counter[str] = Counter()

    async def pull_some(task: int) -> None:
        chance = random.Random(f"{seed} {task}")
        reference = chance.choice(references)
        if disturbed and chance.random() < 0.5:
            await pull_until(reference, chance.randrange(1, 30))
        async with puller.pull(reference, progress=show) as image:
            await check_contents(image)
            counts["pulled"] += 1

    async def pull_until(reference: str, events: int) -> None:
        async def show_and_count(event: Progress) -> None:
            nonlocal events
            await show(event)
            events -= 1
            if not events:
                scope.cancel()

        with trio.CancelScope() as scope:
            async with puller.pull(reference, progress=show_and_count) as image:
                await check_contents(image)
                counts["pulled"] += 1
        counts["cancelled"] += scope.cancelled_caught

    async def show(event: Progress) -> None:
        print(json.dumps({"action": event.action}), flush=True)

    async with open_puller(store, retry_tick=0.01) as puller:
        print(json.dumps({"ready": True}), flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        async with trio.open_nursery() as nursery:
            for task in range(TASKS):
                nursery.start_soon(pull_some, task)
    print(json.dumps(counts), flush=True)


async def collect(store: DirectoryStore, chance: random.Random, references: list[str]) -> int:
    """Collect garbage, and return the number of removed items."""
    garbage = await store.collect()
    return garbage.blobs + garbage.trees


async def remove(store: DirectoryStore, chance: random.Random, references: list[str]) -> int:
    """Remove images, so that there is something to collect."""
    await store.remove(chance.choice(references))
    return await collect(store, chance, references)


Beside = Callable[[DirectoryStore, random.Random, list[str]], Awaitable[int]]
BESIDES: dict[str, Beside] = {"collect": collect, "remove": remove}


async def go_on_beside(do: Beside, path: str, seed: str, references: list[str]) -> None:
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    async with open_store(path) as store, trio.open_nursery() as nursery:
        print(json.dumps({"ready": True}), flush=True)

        async def wait_for_the_end() -> None:
            for _ in range(2):  # one line to begin, one to end
                await trio.to_thread.run_sync(sys.stdin.readline)
            ended.set()

        ended = trio.Event()
        nursery.start_soon(wait_for_the_end)
        while not ended.is_set():
            counts["done"] += 1
            counts["removed"] += await do(store, chance, references)
    print(json.dumps(counts), flush=True)


def main(what: str, store: str, seed: str, disturbed: str, *references: str) -> None:
    if what == "pull":
        trio.run(pull, store, seed, disturbed == "disturbed", list(references))
    else:
        trio.run(go_on_beside, BESIDES[what], store, seed, list(references))


if __name__ == "__main__":
    main(*sys.argv[1:])
