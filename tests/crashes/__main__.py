"""Breaks pulls at random for a given time.

    PYTHONPATH=tests python -m crashes --minutes 30

It needs root, and the right to mount. Each round takes a random scenario and a random break: a kill
or a fault at any step, a kill at any time, a power cut at any step or at any time, a disk of any
size. The last line has the counts. Each error is printed with its random choices, and makes the
exit status 1.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
from crashes.checker import look_at
from crashes.disks import Disk, make_ext4, mounted_ext4, mounted_tmpfs, remount
from crashes.harness import (
    World,
    last_keys,
    open_world,
    remove,
    scratch_directory,
    untyped,
    verdict,
)
from crashes.scenarios import SCENARIOS, Scenario

NUMBERS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT)

Break = Callable[["Chance"], Awaitable[list[str]]]


class Chance:
    """The random choices of one run."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.steps: dict[str, list[tuple[str, int]]] = {}
        self.scenario: Scenario = SCENARIOS[0]
        self.drawn: dict[str, object] = {}

    def draw(self) -> None:
        self.scenario = self.random.choice(SCENARIOS)
        self.drawn = {"scenario": self.scenario.name}

    def note(self, **what: object) -> dict[str, object]:
        self.drawn |= what
        return what

    async def step(self) -> dict[str, object]:
        """Choose a random step of the scenario."""
        name = self.scenario.name
        if name not in self.steps:
            path = await self.world.store_for(self.scenario)
            counts = (await self.world.run(path, self.scenario.pulls)).counts
            self.steps[name] = [(step, n + 1) for step in counts for n in range(counts[step])]
            remove(path)
        step, nth = self.random.choice(self.steps[name])
        return self.note(name=step, nth=nth, when=self.random.choice(["before", "after"]))


async def kill_at_a_step(chance: Chance) -> list[str]:
    world, scenario = chance.world, chance.scenario
    step = await chance.step()
    path = await world.store_for(scenario)
    run = await world.run(path, scenario.pulls, mode="kill", **step)
    wrong = await verdict(world, path, scenario, run.keys())
    remove(path)
    return wrong


async def kill_at_a_time(chance: Chance) -> list[str]:
    world, scenario, draw = chance.world, chance.scenario, chance.random
    workers = draw.random() < 0.7
    how = chance.note(
        workers=workers,
        kill_after=draw.uniform(0, 0.4 if workers else 0.2),
        kill_workers=draw.random() < 0.5,
    )
    path = await world.store_for(scenario)
    run = await world.run(path, scenario.pulls, **how)
    wrong = await verdict(world, path, scenario, run.keys(), workers=draw.random() < 0.3)
    remove(path)
    return wrong


async def fail_at_a_step(chance: Chance) -> list[str]:
    world, scenario, draw = chance.world, chance.scenario, chance.random
    step = await chance.step()
    mode = draw.choice(["once", "always"])
    how = chance.note(mode=mode, errno=draw.choice(NUMBERS), again=mode == "once")
    if step["name"] in ("close catalog", "look for syncfs"):
        return []
    path = await world.store_for(scenario)
    run = await world.run(path, scenario.pulls, **step, **how)
    wrong = untyped(run) + await verdict(world, path, scenario, run.keys(), kept=False)
    remove(path)
    return wrong


async def cut_at_a_step(chance: Chance) -> list[str]:
    step = await chance.step()

    async def run(disk: Disk, image: Path, said: list[dict]) -> dict[str, list[str]] | None:
        keys: dict[str, list[str]] | None = None

        async def at(here: dict, said: list[dict]) -> None:
            nonlocal keys
            if (here["at"], here["nth"], here["when"]) == tuple(step.values()):
                keys = last_keys(said, durable=True)
                disk.copy(image)

        pulls = chance.scenario.pulls
        await chance.world.run(disk.path / "store", pulls, mode="pause", at=at)
        return keys

    return await _cut(chance, run)


async def cut_at_a_time(chance: Chance) -> list[str]:
    delay = chance.random.uniform(0, 0.5)
    chance.note(delay=delay)

    async def run(disk: Disk, image: Path, said: list[dict]) -> dict[str, list[str]] | None:
        keys: dict[str, list[str]] = {}

        async def cut() -> None:
            nonlocal keys
            await trio.sleep(delay)
            keys = last_keys(said, durable=True)
            await trio.to_thread.run_sync(disk.copy, image)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            pulls = chance.scenario.pulls
            await chance.world.run(disk.path / "store", pulls, workers=True, said=said)
        return keys

    return await _cut(chance, run)


async def _cut(chance: Chance, run: Callable) -> list[str]:
    world, scenario = chance.world, chance.scenario
    with scratch_directory() as place:
        make_ext4(place / "disk.img")
        options = chance.random.choice(["commit=600", "defaults", "commit=1"])
        chance.note(options=options)
        with mounted_ext4(place / "disk.img", place / "disk", options) as disk:
            await world.prepare(scenario, disk.path / "store")
            os.sync()
            had = look_at(disk.path / "store").keys
            keys = await run(disk, place / "cut.img", [])
        if keys is None:
            return []
        with mounted_ext4(place / "cut.img", place / "cut") as cut:
            return await verdict(world, cut.path / "store", scenario, keys or had, kept=False)


async def fill_the_disk(chance: Chance) -> list[str]:
    world, scenario, draw = chance.world, chance.scenario, chance.random
    with scratch_directory() as place, mounted_tmpfs(place / "disk", "size=64m"):
        store = place / "disk" / "store"
        await world.prepare(scenario, store)
        had = look_at(store).keys
        there = os.statvfs(place / "disk")
        used = (there.f_blocks - there.f_bfree) * there.f_frsize // 1024
        size, nodes = used + draw.randrange(4, 3000), there.f_files
        if draw.random() < 0.5:
            size, nodes = 1 << 16, there.f_files - there.f_ffree + draw.randrange(60)
        workers = draw.random() < 0.5
        chance.note(size=size, nodes=nodes, workers=workers)
        remount(place / "disk", f"size={size}k,nr_inodes={nodes}")
        run = await world.run(store, scenario.pulls, workers=workers)
        remount(place / "disk", "size=64m,nr_inodes=10000")
        wrong = [] if all("StoreFull" in each["kinds"] for each in run.failures) else ["not full"]
        wrong += untyped(run)
        return wrong + await verdict(world, store, scenario, run.keys() or had, kept=False)


BREAKS: tuple[Break, ...] = (
    kill_at_a_step,
    kill_at_a_time,
    fail_at_a_step,
    cut_at_a_step,
    cut_at_a_time,
    fill_the_disk,
)


async def main(minutes: float, seed: int) -> int:
    done, found = Counter[str](), 0
    end = time.monotonic() + 60 * minutes
    async with open_world() as world:
        chance = Chance(world, seed)
        while time.monotonic() < end:
            chance.draw()
            how = chance.random.choice(BREAKS)
            done[how.__name__] += 1
            wrong = await how(chance)
            if wrong:
                found += 1
                print(f"seed {seed}, {how.__name__}, {chance.drawn}:", *wrong, sep="\n  ")
    counts = ", ".join(f"{name} {count}" for name, count in sorted(done.items()))
    print(f"{done.total()} pulls broken, {found} with something wrong: {counts}; seed {seed}")
    return 1 if found else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m crashes")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    arguments = parser.parse_args()
    sys.exit(trio.run(main, arguments.minutes, arguments.seed))
