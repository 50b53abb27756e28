"""The disk fails, fills up or turns read-only.

The error is typed, nothing stored is lost, and after the fault the pull completes, with the same
open store and with another.

Faults are injected at each step, since a kernel may fail anywhere. Real faults come from a tmpfs
that is small or has few inodes, from an ext4 that finds an error in itself, from an ext4 that is
shut down, and from an ext4 whose disk loses written bytes.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess

import pytest
import trio
from crashes.checker import look_at
from crashes.disks import (
    fill,
    make_ext4,
    make_thin_ext4,
    mounted_ext4,
    mounted_tmpfs,
    remount,
)
from crashes.harness import Run, lost, open_world, remove, scratch_directory, untyped, verdict
from crashes.sampling import ALL, points
from crashes.scenarios import SCENARIOS, Scenario

SEED = 30
NUMBERS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT)
COLD, SHARING, NEEDY, RETAGGED, RESUMED, COLLECTED = SCENARIOS

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root to mount")


def is_full(run: Run) -> bool:
    return all("StoreFull" in failure["kinds"] for failure in run.failures)


@pytest.mark.parametrize("mode", ["once", "always"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda each: each.name)
async def test_each_step_fails(scenario: Scenario, mode: str) -> None:
    """The step fails once, and the same open store pulls again; or it fails each time."""
    chance = random.Random(SEED)
    wrong = []
    failed = 0
    async with open_world() as world:
        whole = await world.run(await world.store_for(scenario), scenario.pulls)
        for name, nth in steps(whole.counts, mode):
            for number in NUMBERS if ALL else [chance.choice(NUMBERS)]:
                path = await world.store_for(scenario)
                request = {"mode": mode, "name": name, "nth": nth, "errno": number}
                run = await world.run(path, scenario.pulls, again=mode == "once", **request)
                failed += bool(run.failures)
                found = untyped(run) + await verdict(world, path, scenario, run.keys(), kept=False)
                wrong += [f"{errno.errorcode[number]} for {name} ({nth}): {each}" for each in found]
                remove(path)
    assert wrong == []
    assert failed >= 3


def steps(counts: dict[str, int], mode: str) -> list[tuple[str, int]]:
    """Return the steps that fail. The suite takes one of two modes for each."""
    every = dict.fromkeys((point.name, point.nth) for point in points(counts, each=False))
    # SQLite hides errors there, and a step that only reads changes nothing.
    names = [each for each in every if each[0] not in ("close catalog", "look for syncfs")]
    return names if ALL else [each for each in names if each[1] == 1][mode == "once" :: 2]


@needs_root
@pytest.mark.parametrize("scenario", [COLD, RESUMED], ids=lambda each: each.name)
@pytest.mark.parametrize("limit", ["size", "nr_inodes"])
async def test_a_disk_that_is_full(scenario: Scenario, limit: str) -> None:
    """A small tmpfs, with few bytes or few inodes, in many sizes."""
    sizes = SIZES[limit, scenario.name]
    if not ALL:
        sizes = [sizes[number * (len(sizes) - 1) // 4] for number in range(5)]
    wrong = []
    ended = set()
    with scratch_directory() as place:
        async with open_world() as world:
            for number, size in enumerate(sizes):
                disk = place / str(number)
                with mounted_tmpfs(disk, "size=64m"):
                    store = disk / "store"
                    await world.prepare(scenario, store)
                    had = look_at(store).keys
                    now = os.statvfs(disk)
                    if limit == "size":
                        used = (now.f_blocks - now.f_bfree) * now.f_frsize // 1024
                        remount(disk, f"size={used + size}k")
                    else:
                        remount(disk, f"nr_inodes={now.f_files - now.f_ffree + size}")
                    workers = number % 2 == 1
                    run = await world.run(store, scenario.pulls, workers=workers)
                    ended.add(bool(run.failures))
                    remount(disk, "size=64m,nr_inodes=10000")
                    found = untyped(run) + await verdict(
                        world, store, scenario, run.keys() or had, kept=False
                    )
                    if not is_full(run):
                        found.append(f"failed with {run.failures}")
                    wrong += [f"{limit}={size}: {each}" for each in found]
    assert wrong == []
    assert ended == {True, False}


# The free space, in KiB and in inodes: the first is too small for a store, the last is enough.
SIZES = {
    ("size", "cold"): range(60, 1800, 30),
    ("size", "resumed"): range(60, 5000, 100),
    ("nr_inodes", "cold"): range(4, 124, 2),
    ("nr_inodes", "resumed"): range(0, 48, 1),
}


async def test_each_attribute_fails() -> None:
    """An error of the disk is not reported as one of the layer."""
    wrong = []
    async with open_world() as world:
        whole = await world.run(world.new_path(), COLD.pulls)
        name, failed = "setxattr in tree", 0
        # The number of the first real write differs from run to run, since layers are unpacked at
        # once.
        for nth in 20 * [*range(1, whole.counts[name] + 1)]:
            if failed and nth == 1:
                break
            path = world.new_path()
            request = {"mode": "once", "name": name, "nth": nth, "errno": errno.EIO}
            run = await world.run(path, COLD.pulls, again=True, **request)
            failed += bool(run.failures)
            wrong += untyped(run)
    assert wrong == []
    assert failed


@needs_root
@pytest.mark.parametrize("end", ["break_down", "shut_down"])
@pytest.mark.parametrize("scenario", [COLD, RESUMED], ids=lambda each: each.name)
async def test_a_disk_that_breaks_in_the_middle(scenario: Scenario, end: str) -> None:
    """ext4 finds an error in itself and becomes read-only; or it is shut down."""
    chance = random.Random(SEED)
    wrong = []
    failed = 0
    with scratch_directory() as place:
        async with open_world() as world:
            whole = await world.run(await world.store_for(scenario), scenario.pulls)
            where = [each for each in points(whole.counts, each=False) if each.when == "before"]
            for number, point in enumerate(where if ALL else chance.sample(where, 5)):
                image, disk = place / f"{number}.img", place / str(number)
                make_ext4(image)
                with mounted_ext4(image, disk, "commit=600,errors=remount-ro") as mounted:
                    await world.prepare(scenario, disk / "store")
                    os.sync()
                    had = look_at(disk / "store").keys

                    async def at(step: dict, said: list[dict]) -> None:
                        here = (step["at"], step["nth"], step["when"])
                        if here == (point.name, point.nth, point.when):  # noqa: B023
                            await trio.to_thread.run_sync(getattr(mounted, end))

                    run = await world.run(disk / "store", scenario.pulls, mode="pause", at=at)
                failed += bool(run.failures)
                with mounted_ext4(image, disk):
                    keys = run.keys(durable=True) or had
                    found = untyped(run)
                    found += await verdict(world, disk / "store", scenario, keys, kept=False)
                wrong += [f"{end} {point}: {each}" for each in found]
                image.unlink()
    assert wrong == []
    assert failed > 2


@needs_root
@pytest.mark.parametrize("asked", [False, True], ids=["not asked", "asked"])
async def test_a_disk_that_loses_what_it_has_taken(asked: bool) -> None:
    """The file system has space and its disk has none, so that the write-back fails.

    The kernel reports the failure once, perhaps to another program that synced a moment before the
    store.
    """
    with scratch_directory() as place:
        memory, image = place / "memory", place / "memory" / "disk.img"
        with mounted_tmpfs(memory, "size=24m"):
            make_thin_ext4(image, size=16 << 20)
            with mounted_ext4(image, place / "disk") as disk:
                async with open_world() as world:
                    store = disk.path / "store"
                    await world.prepare(RESUMED, store)
                    os.sync()
                    had = look_at(store).keys

                    async def at(step: dict, said: list[dict]) -> None:
                        if (step["at"], step["nth"]) != ("look for syncfs", 1):
                            return
                        if step["when"] == "before":
                            fill(memory / "filler")
                            if asked:
                                sync = ["sync", "--file-system", disk.path]
                                done = await trio.run_process(
                                    sync, check=False, stderr=subprocess.DEVNULL
                                )
                                assert done.returncode != 0
                                (memory / "filler").unlink()

                    run = await world.run(store, RESUMED.pulls, mode="pause", at=at)
                    (memory / "filler").unlink(missing_ok=True)
                    assert [failure["failed"] for failure in run.failures] == ["pull"]
                    assert untyped(run) == []
            # The bytes on the disk now, without those still in memory.
            with mounted_ext4(image, place / "disk") as disk:
                found = look_at(disk.path / "store")
                assert (found.wrong, lost(had, found.keys)) == ([], [])
