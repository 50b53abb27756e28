"""The power is cut: unsynced bytes are gone, and no committed item is.

The store is on an ext4 whose disk is a file. At a step of the pull that file is copied as it is,
without bytes that the file system has not written yet. The copy is mounted, which replays its
journal, and checked. SQLite's log is part of it.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
from crashes.checker import look_at
from crashes.disks import LAZY, Disk, make_ext4, mounted_ext4
from crashes.harness import World, last_keys, lost, open_world, scratch_directory, verdict
from crashes.sampling import ALL, is_decisive
from crashes.scenarios import SCENARIOS, Scenario

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="takes root to mount")


@attrs.frozen
class Cut:
    """A disk in the state that a power cut left.

    Attributes:
        where: The step.
        image: The disk.
        had: The keys in the catalog that the child reported as durable.
        pulled: The pulled names.
    """

    where: str
    image: Path
    had: dict[str, list[str]]
    pulled: list[str]


@asynccontextmanager
async def open_disk(options: str = LAZY) -> AsyncIterator[tuple[World, Disk]]:
    """Open a world, and a disk for its stores."""
    with scratch_directory() as place:
        make_ext4(place / "disk.img")
        with mounted_ext4(place / "disk.img", place / "disk", options) as disk:
            async with open_world() as world:
                yield world, disk


async def cuts_in(
    world: World, disk: Disk, scenario: Scenario, had: dict[str, list[str]], **request: object
) -> list[Cut]:
    """Run a scenario on the disk, and cut the power at some steps."""
    cuts: list[Cut] = []

    async def at(step: dict, said: list[dict]) -> None:
        # The state before a step is the state after the previous one.
        decisive = is_decisive(step["at"]) or step["at"] == "unlink lease file"
        if step["when"] != "after" or not (decisive or (ALL and step["nth"] == 1)):
            return
        if step["nth"] > 1 and not ALL:
            return
        image = world.new_path().with_suffix(".img")
        disk.copy(image)
        pulled = [each["pulled"] for each in said if "pulled" in each]
        where = f"{step['when']} {step['at']} ({step['nth']})"
        cuts.append(Cut(where, image, last_keys(said, durable=True) or had, pulled))

    store = disk.path / "store"
    run = await world.run(store, scenario.pulls, mode="pause", at=at, **request)
    assert (run.ended, run.failures) == (0, [])
    return cuts


Judge = Callable[[World, Scenario, Cut], Awaitable[list[str]]]


async def judge(world: World, scenario: Scenario, cut: Cut) -> list[str]:
    path = world.new_path()
    with mounted_ext4(cut.image, path):
        wrong = await verdict(world, path / "store", scenario, cut.had, kept=False)
    cut.image.unlink()
    return [f"power cut {cut.where}: {each}" for each in wrong]


async def look(world: World, scenario: Scenario, cut: Cut) -> list[str]:
    """Check the store like `judge`, without pulling again."""
    path = world.new_path()
    with mounted_ext4(cut.image, path):
        found = look_at(path / "store")
    return found.wrong + lost(cut.had, found.keys)


async def power_cuts(
    scenario: Scenario, options: str = LAZY, judge: Judge = judge, **request: object
) -> tuple[list[Cut], list[str]]:
    async with open_disk(options) as (world, disk):
        store = disk.path / "store"
        await world.prepare(scenario, store)
        os.sync()
        had = look_at(store).keys
        cuts = await cuts_in(world, disk, scenario, had, **request)
        wrong = [each for cut in cuts for each in await judge(world, scenario, cut)]
    return cuts, wrong


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda each: each.name)
async def test_power_cut_at_each_step(scenario: Scenario) -> None:
    cuts, wrong = await power_cuts(scenario)
    assert wrong == []
    assert len(cuts) >= 8
    assert cuts[-1].pulled or scenario.removes


@pytest.mark.parametrize("without", ["syncfs", "fsync"])
async def test_what_is_not_synced_is_lost_and_seen_to_be(without: str) -> None:
    """Without syncs of files or of the catalog, the checks must find losses."""
    cuts, wrong = await power_cuts(SCENARIOS[0], judge=look, without=[without])
    assert cuts
    assert wrong


async def test_only_what_is_synced_is_on_the_disk() -> None:
    with scratch_directory() as place:
        make_ext4(place / "disk.img")
        with mounted_ext4(place / "disk.img", place / "disk") as disk:
            (disk.path / "synced").write_bytes(b"x" * 100_000)
            (disk.path / "renamed").write_bytes(b"x" * 100_000)
            descriptor = os.open(disk.path / "synced", os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            (disk.path / "renamed").rename(disk.path / "late")
            (disk.path / "new").write_bytes(b"x" * 100_000)
            disk.copy(place / "copy.img")
        with mounted_ext4(place / "copy.img", place / "copy") as copy:
            assert (copy.path / "synced").read_bytes() == b"x" * 100_000
            names = set(os.listdir(copy.path)) - {"lost+found"}
            assert names == {"synced", "renamed"}
            assert (copy.path / "renamed").stat().st_size == 0


async def test_power_cut_with_a_journal_that_is_written_by_itself() -> None:
    cuts, wrong = await power_cuts(SCENARIOS[1], "defaults")
    assert wrong == []
    assert cuts
