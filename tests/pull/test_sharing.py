"""Pulls of the same layers in different order, on one store.

No pull waits for ever, no byte is downloaded twice, and a survivor continues from the other pull's
bytes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from pull.sharing import MIB, asked, layer_of, pulling

from trio_layers import Progress, Puller, open_puller, open_store
from trio_layers.testing import (
    BuiltImage,
    BuiltLayer,
    Registry,
    Slow,
    Stall,
    build_image,
    open_registry,
)

A, B = layer_of("a", 3 * MIB), layer_of("b", MIB // 2)
AB, BA = build_image([A, B]), build_image([B, A])
LIMITS = pytest.mark.parametrize("limit", [1, 2])


def add_both(registry: Registry) -> tuple[str, str]:
    return registry.add(AB, "o/ab:1"), registry.add(BA, "o/ba:1")


async def pull(puller: Puller, reference: str, image: BuiltImage) -> None:
    async with puller.pull(reference) as pulled:
        assert pulled.digest == image.digest
        for name in ("a", "b"):
            assert await pulled.rootfs.exists(name)


def each_came_once(registry: Registry) -> None:
    sizes = {layer.descriptor.digest: layer.descriptor.size for layer in (A, B)}
    assert asked(registry, AB) == {digest: [("", size)] for digest, size in sizes.items()}


@LIMITS
@pytest.mark.parametrize("stores", [1, 2])
async def test_two_tasks_that_cross(tmp_path: Path, limit: int, stores: int) -> None:
    """Two pullers share one open store, or have a directory open twice."""
    with trio.fail_after(60):
        async with open_registry() as registry, open_store(tmp_path) as one:
            ab, ba = add_both(registry)
            registry.inject("*/blobs/*", Slow(8 * MIB), times=None)
            async with (
                open_puller(one, max_concurrent_downloads=limit) as first,
                open_puller(
                    one if stores == 1 else tmp_path, max_concurrent_downloads=limit
                ) as second,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(pull, first, ab, AB)
                nursery.start_soon(pull, second, ba, BA)
            each_came_once(registry)


@LIMITS
async def test_two_processes_that_cross(tmp_path: Path, limit: int) -> None:
    with trio.fail_after(60):
        async with open_registry() as registry:
            ab, ba = add_both(registry)
            registry.inject("*/blobs/*", Slow(8 * MIB), times=None)
            async with (
                pulling(tmp_path, ab, limit=limit, go=False) as one,
                pulling(tmp_path, ba, limit=limit, go=False) as two,
            ):
                for process in (one, two):
                    await process.go()
                for process, image in ((one, AB), (two, BA)):
                    said = await process.wait_ended()
                    assert said[-1] == {"image": image.digest, "entries": 3}
            each_came_once(registry)


class Events:
    """A sink that can wait for an event of a layer."""

    def __init__(self) -> None:
        self.all: list[Progress] = []
        self._news = trio.lowlevel.ParkingLot()

    async def __call__(self, event: Progress) -> None:
        self.all.append(event)
        self._news.unpark_all()

    async def wait_until(self, layer_id: str, action: str, current: int = 0) -> None:
        while not any(
            (event.id, event.action) == (layer_id, action) and event.current >= current
            for event in self.all
        ):
            await self._news.park()


def id_of(layer: BuiltLayer) -> str:
    return layer.descriptor.digest.removeprefix("sha256:")[:12]


STALL = 2 * MIB + MIB // 2
WORDS = [
    "Pulling fs layer",
    "Waiting",
    "Downloading",
    "Verifying Checksum",
    "Download complete",
    "Extracting",
    "Pull complete",
]


def each_word_in_its_order(events: Events, layer: BuiltLayer) -> None:
    """Check that the events are those of a pull without others, and that counts never fall."""
    mine = [event for event in events.all if event.id == id_of(layer)]
    order = [WORDS.index(event.action) for event in mine]
    assert order == sorted(order)
    assert (mine[0].action, mine[-1].action) == (WORDS[0], WORDS[-1])
    for action in ("Downloading", "Extracting"):
        counts = [event.current for event in mine if event.action == action]
        assert counts == sorted(counts)
        assert all(0 < count <= layer.descriptor.size for count in counts)
    assert {event.total for event in mine} <= {0, layer.descriptor.size}


async def test_who_waits_shows_how_far_the_other_is(tmp_path: Path) -> None:
    """… and sends no request after the other has downloaded everything."""
    events = Events()
    data = A.content
    with trio.fail_after(60):
        async with open_registry() as registry, open_store(tmp_path) as other:
            ab, _ = add_both(registry)
            async with (
                open_puller(tmp_path, max_concurrent_downloads=2) as puller,
                trio.open_nursery() as nursery,
            ):

                async def pull() -> None:
                    async with puller.pull(ab, progress=events):
                        pass

                async with other.stage(A.descriptor) as stage:
                    nursery.start_soon(pull)
                    for start in range(0, len(data), MIB):
                        end = min(start + MIB, len(data))
                        await stage.write(data[start:end])
                        if end - start == MIB:  # fewer may stay in memory
                            await events.wait_until(id_of(A), "Downloading", end)
                    await stage.finish(lambda count: None)
                    other.release(await stage.commit(None))
            assert asked(registry, AB).keys() == {B.descriptor.digest}
    each_word_in_its_order(events, A)
    shown = [event.current for event in events.all if event.id == id_of(A)]
    assert {MIB, 2 * MIB, 3 * MIB} <= set(shown)


@LIMITS
async def test_one_process_is_killed_and_the_other_takes_over(tmp_path: Path, limit: int) -> None:
    """The survivor pulls the layers in the opposite order, and waits for the layer that the killed
    process has begun.
    """
    events = Events()
    with trio.fail_after(60):
        async with open_registry() as registry:
            ab, ba = add_both(registry)
            registry.inject(f"*/blobs/{A.descriptor.digest}", Stall(STALL))
            async with (
                pulling(tmp_path, ab, limit=limit) as other,
                open_puller(tmp_path, max_concurrent_downloads=limit) as puller,
                trio.open_nursery() as nursery,
            ):
                await other.wait_until(id=id_of(A), action="Downloading", current=STALL)

                async def pull_other_way_round() -> None:
                    async with puller.pull(ba, progress=events) as image:
                        assert image.digest == BA.digest

                nursery.start_soon(pull_other_way_round)
                # The survivor waits, and shows the other's progress.
                await events.wait_until(id_of(A), "Downloading", STALL - MIB)
                other.process.kill()
            requests = asked(registry, AB)[A.descriptor.digest]
            # Bytes on the disk are not requested again. The store writes them in megabytes.
            start = A.descriptor.size - requests[1][1]
            assert STALL - MIB < start <= STALL
            assert requests == [
                ("", STALL),
                (f"bytes={start}-{A.descriptor.size - 1}", A.descriptor.size - start),
            ]
            each_word_in_its_order(events, A)


@LIMITS
async def test_one_is_cancelled_and_the_other_takes_over(tmp_path: Path, limit: int) -> None:
    """No byte is downloaded twice."""
    first_events, events = Events(), Events()
    with trio.fail_after(60):
        async with open_registry() as registry:
            ab, ba = add_both(registry)
            registry.inject(f"*/blobs/{A.descriptor.digest}", Stall(STALL))
            async with (
                open_puller(tmp_path, max_concurrent_downloads=limit) as first,
                open_puller(tmp_path, max_concurrent_downloads=limit) as second,
                trio.open_nursery() as nursery,
            ):
                scope = trio.CancelScope()

                async def be_cancelled() -> None:
                    with scope:
                        async with first.pull(ab, progress=first_events):
                            raise AssertionError("it was never to get there")

                async def pull_other_way_round() -> None:
                    async with second.pull(ba, progress=events) as image:
                        assert image.digest == BA.digest

                nursery.start_soon(be_cancelled)
                await first_events.wait_until(id_of(A), "Downloading", STALL)
                nursery.start_soon(pull_other_way_round)
                await events.wait_until(id_of(B), "Download complete")
                await events.wait_until(id_of(A), "Downloading", STALL - MIB)
                scope.cancel()
            assert scope.cancelled_caught
            requests = asked(registry, AB)
            rest = A.descriptor.size - STALL
            assert requests[A.descriptor.digest] == [
                ("", STALL),
                (f"bytes={STALL}-{A.descriptor.size - 1}", rest),
            ]
            assert requests[B.descriptor.digest] == [("", B.descriptor.size)]
    each_word_in_its_order(events, A)
