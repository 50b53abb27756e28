"""Pulls that are killed at every step that changes the disk.

Nothing committed is lost, the remains do not disturb the next pull, and no received byte is
downloaded again.
"""

from __future__ import annotations

import random
import signal

import pytest
from crashes.harness import last_keys, open_world, remove, verdict
from crashes.sampling import ALL, points
from crashes.scenarios import SCENARIOS, Scenario

SEED = 20

# Every pull takes these steps. If the harness does not see one, it cannot break it.
ALWAYS = {
    "BEGIN IMMEDIATE",
    "open new index",
    "write new index",
    "fsync new index",
    "replace new index -> index.json",
    "fsync .",
    "open lease file",
    "unlink lease file",
    "close catalog",
}
WITH_DOCUMENTS = {
    "COMMIT leases (noted)",
    "open document",
    "write document",
    "syncfs",
    "fsync blobs/sha256",
    "fsync trees/sha256",
}
WITH_LAYERS = {
    "open lock",
    "open partial",
    "write partial",
    "mkdir tree",
    "open in tree",
    "write in tree",
    "rename partial -> blobs/X",
    "rename tree -> trees/X",
    "COMMIT blobs,trees",
    "COMMIT layers,leases (noted)",
    "rename document -> blobs/X",
    "COMMIT blobs,image_blobs,image_references,images,layout",
    "unlink lock",
}
OF_ITS_OWN = {
    "cold": {
        "mkdir .",
        "mkdir blobs/sha256",
        "mkdir trees/sha256",
        "open catalog",
        "replace oci-layout -> oci-layout",
        "replace index.json -> index.json",
        "fsync parent",
        "COMMIT schema",
        "PRAGMA journal_mode = WAL",
    },
    "needy": {"link in tree -> in tree", "rename tree -> trash", "rmdir trash"},
    "collected": {
        "COMMIT image_references,layout",
        "COMMIT blobs,images,layers,trees",
        "rename trees/X -> garbage",
        "rename blobs/X -> garbage",
        "unlink garbage",
        "rmdir garbage",
    },
    "retagged": {"COMMIT image_blobs,image_references,images,layout"},
}

each_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda each: each.name)


@each_scenario
async def test_killed_at_each_step(scenario: Scenario) -> None:
    wrong = []
    async with open_world() as world:
        whole = await world.run(await world.store_for(scenario), scenario.pulls)
        assert (whole.ended, whole.failures) == (0, [])
        known = ALWAYS | OF_ITS_OWN.get(scenario.name, set())
        assert known <= set(whole.counts)
        assert (set(whole.counts) >= WITH_DOCUMENTS) == (scenario.name != "collected")
        assert (set(whole.counts) >= WITH_LAYERS) == (
            scenario.name not in ("retagged", "collected")
        )
        killed = 0
        for point in points(whole.counts, each=scenario.name == "cold"):
            path = await world.store_for(scenario)
            run = await world.run(path, scenario.pulls, mode="kill", **point.request)
            killed += run.ended == -signal.SIGKILL
            # A failing step has no "after". The number of some steps is random, as are the removal
            # of trash and the sharing of commits.
            by_chance = (
                point.when == "after"
                or point.nth > 1
                or "trash" in point.name
                or point.name.startswith("COMMIT ")
            )
            assert run.ended == -signal.SIGKILL or (by_chance and not run.failures), point
            found = await verdict(world, path, scenario, run.keys())
            wrong += [f"killed {point}: {each}" for each in found]
            remove(path)
    assert wrong == []
    assert killed > 10


async def test_killed_at_random_times() -> None:
    """With workers and without. The workers are killed, too, or end by themselves a
    moment later.
    """
    chance = random.Random(SEED)
    wrong = []
    killed = 0
    async with open_world() as world:
        for number in range(200 if ALL else 16):
            scenario = chance.choice(SCENARIOS)
            workers = chance.random() < 0.7
            how = {
                "kill_after": chance.uniform(0, 0.4 if workers else 0.2),
                "kill_workers": chance.random() < 0.5,
                "workers": workers,
            }
            path = await world.store_for(scenario)
            run = await world.run(path, scenario.pulls, **how)
            killed += run.ended == -signal.SIGKILL
            recover_with = chance.random() < 0.3
            found = await verdict(world, path, scenario, run.keys(), workers=recover_with)
            wrong += [f"seed {SEED}, {number}: {scenario.name}, {how}: {each}" for each in found]
            remove(path)
    assert wrong == []
    assert killed > 3


async def test_killed_again_and_again() -> None:
    """Each pull goes on from the bytes of the killed ones before it."""
    chance = random.Random(SEED)
    had: dict[str, list[str]] = {}
    async with open_world() as world:
        scenario = Scenario("all", ("first:1", "needy:1", "sharing:1", "large:1"))
        path = world.new_path()
        for _ in range(40 if ALL else 8):
            delay = chance.uniform(0.05, 0.15)
            run = await world.run(path, scenario.pulls, kill_after=delay, kill_workers=True)
            had = last_keys(run.said) or had
        assert await verdict(world, path, scenario, had) == []
