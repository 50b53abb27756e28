"""Eight processes make four pulls each, on one store that another process collects.

Images, cancellations and kills are random, but the same in every run, as far as the machine allows.
``TRIO_LAYERS_CONTENTION=600`` goes on for so many seconds, with other seeds, and prints the events.
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from pull.consistent import problems
from pull.contending import check_contents, noise
from pull.sharing import MIB, Pulling, asked, running

from trio_layers import open_puller
from trio_layers.testing import (
    BuiltImage,
    BuiltLayer,
    Directory,
    File,
    HardLink,
    LayerEntry,
    Registry,
    build_image,
    build_layer,
    open_registry,
)

SCRIPT = Path(__file__).with_name("contending.py")
PROCESSES = 8
SECONDS = float(os.environ.get("TRIO_LAYERS_CONTENTION", "0"))


def layer(number: int, size: int, *more: LayerEntry) -> BuiltLayer:
    name = f"noise-{number}-{size}"
    return build_layer([Directory(""), File(name, noise(name, size)), *more])


BASE = layer(0, MIB // 2, File("base", b"base"))
# Layers with files in unlisted directories, and with links to files below. They are unpacked again
# if their parent differs from the assumption.
OTHERS = [
    layer(1, MIB // 4, File("implied/one", b"1")),
    layer(2, 5 * MIB // 2),
    layer(3, 100_000, HardLink("link", "base")),
    layer(4, MIB // 4, Directory("implied", mode=0o700), File("implied/four", b"4")),
    layer(5, 3 * MIB // 2),
    layer(6, 1000),
    layer(7, MIB // 4),
]


def images(seed: str) -> list[BuiltImage]:
    """Make overlapping images of some of the layers, in any order."""
    chance = random.Random(seed)
    return [
        build_image([BASE, *chance.sample(OTHERS, chance.randrange(2, len(OTHERS)))])
        for _ in range(12)
    ]


@pytest.fixture
def counts(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Iterator[Counter]:
    """The counts of a test, which ``-s`` prints."""
    counts: Counter[str] = Counter()
    yield counts
    if SECONDS:
        with capsys.disabled():
            print(f"\n{request.node.name}: {dict(counts)}", file=sys.stderr)


async def contend(path: Path, seed: str, *, disturbed: bool, beside: str) -> Counter[str]:
    """Let the processes contend, then check the store, and return the counts."""
    built = images(seed)
    counts: Counter[str] = Counter()
    async with open_registry() as registry:
        references = [registry.add(image, f"o/{number}:1") for number, image in enumerate(built)]
        arguments = (str(path), seed, "disturbed" if disturbed else "not", *references)

        async def pull_and_die(number: int) -> None:
            chance = random.Random(f"{seed} {number}")
            mine = (arguments[0], f"{seed} {number}", *arguments[2:])
            async with running(SCRIPT, "pull", *mine) as process:
                lines = chance.randrange(150) if disturbed and chance.random() < 0.5 else -1
                said = await read_lines(process, lines)
                if said is None:
                    process.process.kill()
                    counts["killed"] += 1
                else:
                    assert await process.process.wait() == 0
                    counts.update(said)

        async with running(SCRIPT, beside, *arguments) as collector:
            async with trio.open_nursery() as nursery:
                for number in range(PROCESSES):
                    nursery.start_soon(pull_and_die, number)
            await collector.go()
            [said] = await collector.wait_ended()
            counts.update({f"{beside} {what}": count for what, count in said.items()})
        if not disturbed:
            each_came_at_most_once(registry, built)
        await all_is_there(path, references)
        counts["requests"] += len(registry.requests)
    counts["rounds"] += 1
    return counts


async def read_lines(process: Pulling, count: int) -> dict | None:
    """Return the last line of a process's output; ``None`` if there was only the first."""
    last: dict = {}
    while count and (line := await process.next_line()):
        last = line
        count -= 1
    return last if count else None


def each_came_at_most_once(registry: Registry, built: list[BuiltImage]) -> None:
    for image in built:
        requests = asked(registry, image)
        for layer in image.layers:
            expected = [("", layer.descriptor.size)]
            assert requests[layer.descriptor.digest] in ([], expected)


async def all_is_there(path: Path, references: list[str]) -> None:
    """Check that there is no damage, and that collected images can be pulled again."""
    assert list(problems(path, closed=False)) == []
    async with open_puller(path) as puller:
        for reference in references:
            async with puller.pull(reference) as image:
                await check_contents(image)
        report = await puller.store.check()
        assert report.problems == ()
        await puller.store.collect()
        assert len(await puller.store.images()) == len(references)
    assert list(problems(path)) == []


async def contend_for_long(
    path: Path, counts: Counter[str], *, disturbed: bool, beside: str
) -> None:
    began, round = trio.current_time(), 0
    while not round or trio.current_time() - began < SECONDS:
        with trio.fail_after(300):
            seed = f"{beside} {round}"
            counts.update(
                await contend(path / str(round), seed, disturbed=disturbed, beside=beside)
            )
        round += 1


async def test_nothing_is_downloaded_twice(tmp_path: Path, counts: Counter) -> None:
    """No pull is cancelled here. A process's leases keep its items from being collected."""
    await contend_for_long(tmp_path, counts, disturbed=False, beside="collect")
    assert counts["pulled"] == 4 * PROCESSES * counts["rounds"]
    assert counts["collect done"] > counts["rounds"]


async def test_nothing_is_lost_whoever_dies(tmp_path: Path, counts: Counter) -> None:
    """This holds even while images are removed."""
    await contend_for_long(tmp_path, counts, disturbed=True, beside="remove")
    for what in ("pulled", "killed", "cancelled", "remove removed"):
        assert counts[what] > 0


async def test_the_checker_finds_what_is_wrong(tmp_path: Path) -> None:
    """The check finds damage; in the tests above it finds none."""
    async with open_registry() as registry, open_puller(tmp_path) as puller:
        image = build_image([BASE])
        async with puller.pull(registry.add(image, "o/one:1")):
            pass
    assert list(problems(tmp_path)) == []
    blobs, trees = tmp_path / "blobs" / "sha256", tmp_path / "trees" / "sha256"
    [tree] = trees.iterdir()
    blob = blobs / BASE.descriptor.digest.removeprefix("sha256:")
    config = blobs / image.config_descriptor.digest.removeprefix("sha256:")
    blob.write_bytes(bytes(BASE.descriptor.size))
    config.rename(blobs / ("0" * 64))
    (tree / "entries").unlink()
    (trees / ("0" * 64)).mkdir()
    (tmp_path / "ingest" / "something").touch()
    (tmp_path / "leases" / "something").touch()
    (tmp_path / "index.json").write_text('{"manifests": []}')
    assert sorted(problems(tmp_path)) == sorted(
        [
            f"blob {BASE.descriptor.digest} is damaged",
            f"blob {image.config_descriptor.digest} has no file",
            f"blob sha256:{'0' * 64} has no row",
            f"tree sha256:{tree.name} is not whole",
            f"tree sha256:{'0' * 64} has no row",
            f"image {image.digest} is not in index.json",
            "left in ingest/: something",
            "left in leases/: something",
        ]
    )
