"""Tests of lending: slow or stopped downloads do not delay other layers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio
from store.stores import Blob, Watched, chain_of, layer_of, open_with_threads, opened
from store.test_staging import MIB, NOISE, ignore, stage
from store.test_unpack_errors import blob_of, tar

from trio_layers import Limits, open_store
from trio_layers._errors import StoreClosed
from trio_layers._manifest import Descriptor
from trio_layers._store import directory
from trio_layers._workers.arrival_state import ArrivalState, Recalled
from trio_layers._workers.build import Arrival, Restarts
from trio_layers._workers.lending import Lending, Loan
from trio_layers._workers.pool import open_workers

Store = directory.DirectoryStore
OpenStore = Callable[[Path], AbstractAsyncContextManager[Store]]


OPEN = pytest.mark.parametrize("open_it", [open_store, open_with_threads])


def slow_layer(number: int) -> Blob:
    return layer_of(**{f"slow{number}": NOISE[number:] + bytes(number)})


async def all_lent(store: Store, waiting: int) -> None:
    """Wait until no worker is idle and ``waiting`` stages wait."""
    limiter = store._parts.builder.limiter
    with trio.fail_after(30):
        while store.statistics().waiting != waiting or limiter.available_tokens:  # noqa: ASYNC110
            await trio.sleep(0.01)


@OPEN
@pytest.mark.parametrize("extra", [0, 3])
async def test_slow_layers_do_not_delay_others(
    open_it: OpenStore, extra: int, tmp_path: Path
) -> None:
    """Any number of slow layers is possible. They are unpacked after their arrival."""
    async with open_it(tmp_path) as store:
        count = int(store._parts.builder.limiter.total_tokens) + extra
        slow = [slow_layer(number) for number in range(count)]
        go_on = trio.Event()
        told: list[list[int]] = [[] for _ in slow]

        async def trickle(blob: Blob, told: list[int]) -> None:
            async with store.stage(blob.descriptor) as staged:
                await staged.write(blob.data[: MIB + 7])
                await go_on.wait()
                await staged.write(blob.data[staged.offset :])
                await staged.finish(told.append)
                await staged.commit(None)

        async with trio.open_nursery() as nursery:
            for blob, each in zip(slow, told, strict=True):
                nursery.start_soon(trickle, blob, each)
            await all_lent(store, extra)
            for name in "abc":
                with trio.fail_after(20):
                    await stage(store, layer_of(**{name: name}))
            # The statistics count each slow layer as unpacking or as waiting.
            now = store.statistics()
            assert now.unpacking + now.waiting == count
            assert now.waiting >= max(extra, 1)
            go_on.set()
        for blob in slow:
            assert await store.get(chain_of(blob)) is not None
        assert all(each == sorted(each) for each in told)
        now = store.statistics()
        assert (now.unpacking, now.waiting) == (0, 0)


@OPEN
async def test_one_worker_is_enough(open_it: OpenStore, tmp_path: Path) -> None:
    """Damage in the slow layer's first bytes changes nothing: its worker only waits."""
    damaged = blob_of(tar({"name": "a", "text": "a" * 2 * MIB})[: MIB + 1000] + bytes(9 * MIB))
    async with open_it(tmp_path) as store:
        store._parts.builder.limiter.total_tokens = 1
        for blob in (slow_layer(0), damaged):
            async with store.stage(blob.descriptor) as staged:
                await staged.write(blob.data[:-MIB])
                await all_lent(store, 0)
                with trio.fail_after(20):
                    await stage(store, layer_of(**{f"x{blob.data[20]}": "x"}))


async def test_a_stage_can_be_left_while_it_waits_for_a_worker(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        store._parts.builder.limiter.total_tokens = 1
        async with store.stage(slow_layer(0).descriptor) as first:
            await first.write(slow_layer(0).data[:MIB])
            async with store.stage(slow_layer(1).descriptor) as second:
                await second.write(slow_layer(1).data[:MIB])
                await all_lent(store, 1)
            assert store.statistics().waiting == 0
        assert store.statistics().unpacking == 0


def arrival_of(size: int, number: int = 0) -> Arrival:
    descriptor = Descriptor("", layer_of(x=f"{number}").digest, size)
    return Arrival(Path("blob"), ArrivalState(), descriptor, Path("target"), ignore)


class World:
    """Stages of one `Lending` without workers; the tests set the progress."""

    def __init__(self, workers: int) -> None:
        self.lending = Lending(trio.CapacityLimiter(workers))
        self.loans: dict[Arrival, Loan] = {}

    async def follow(self, arrival: Arrival) -> None:
        """Borrow a worker until the blob is complete, again after each recall."""
        while True:
            try:
                async with self.lending.lend(arrival) as loan:
                    self.loans[arrival] = loan
                    recalled = trio.Event()
                    loan.set_stop(recalled.set)
                    while not arrival.state.snapshot.complete:
                        with trio.move_on_after(0.05):
                            await recalled.wait()
                            raise Recalled
                    return
            except Recalled:
                continue
            finally:
                self.loans.pop(arrival, None)

    def read_all(self, arrival: Arrival) -> None:
        self.loans[arrival].position = arrival.state.snapshot.size


@asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


async def test_the_worker_with_the_least_work_is_recalled(autojump_clock: object) -> None:
    world = World(2)
    large, small, quick = (arrival_of(1 << 40, number) for number in range(3))
    large.state.grow(200 * MIB)
    small.state.grow(10 * MIB)
    quick.state.grow(1)
    async with background() as nursery:
        nursery.start_soon(world.follow, large)
        nursery.start_soon(world.follow, small)
        await trio.sleep(1)
        world.read_all(large)
        world.read_all(small)
        quick.state.mark_complete()
        await world.follow(quick)
        assert (small.restarts.recalls, large.restarts.recalls) == (1, 0)


async def test_a_worker_that_is_busy_is_not_recalled(autojump_clock: object) -> None:
    """A worker is busy if it lags behind its blob, or the blob is nearly complete."""
    world = World(1)
    first, quick = arrival_of(1000 * MIB), arrival_of(1, 1)
    first.state.grow(500 * MIB)
    quick.state.grow(1)
    quick.state.mark_complete()
    async with background() as nursery:
        nursery.start_soon(world.follow, first)
        await trio.sleep(1)
        nursery.start_soon(world.follow, quick)
        await trio.sleep(10)
        assert first.restarts.recalls == 0
        first.state.grow(1000 * MIB)
        for position in range(500, 1000, 50):
            world.loans[first].position = position * MIB
            await trio.sleep(0.1)
        first.state.mark_complete()
        await trio.sleep(1)
        assert first.restarts.recalls == 0
        assert world.lending.waiting == 0


async def test_no_work_is_thrown_away_without_end(autojump_clock: object) -> None:
    """A blob arrives slowly for hours, and small blobs arrive all the time.

    Each small blob gets a worker soon, and the repeated work is less than twice the slow blob.
    """
    world = World(1)
    slow = arrival_of(150 * MIB)
    async with background() as nursery:
        slow.state.grow(MIB)
        nursery.start_soon(world.follow, slow)
        for number in range(150):
            await trio.sleep(1)
            slow.state.grow((number + 1) * MIB)
            await trio.sleep(0.5)
            if slow in world.loans:
                world.read_all(slow)
            quick = arrival_of(1, number)
            quick.state.grow(1)
            quick.state.mark_complete()
            with trio.fail_after(4):
                await world.follow(quick)
        assert slow.restarts.recalls > 10
        assert slow.restarts.thrown_away <= 2 * slow.blob.size
        slow.state.mark_complete()
        await trio.sleep(1)
        assert world.lending.waiting == 0


async def test_a_stalled_blob_gives_its_worker_to_a_growing_one(autojump_clock: object) -> None:
    """A growing blob does not give way to one that stands still."""
    world = World(1)
    still, grows = arrival_of(100 * MIB), arrival_of(100 * MIB, 1)
    still.state.grow(MIB)
    grows.state.grow(MIB)
    async with background() as nursery:
        nursery.start_soon(world.follow, still)
        await trio.sleep(1)
        world.read_all(still)
        nursery.start_soon(world.follow, grows)
        for size in range(2, 60):
            grows.state.grow(size * MIB)
            await trio.sleep(0.2)
            if grows in world.loans:
                world.read_all(grows)
        assert (still.restarts.recalls, grows.restarts.recalls) == (1, 0)
        assert grows in world.loans
        assert world.lending.waiting == 1


async def test_closing_the_workers_ends_calls_and_refuses_new_ones(tmp_path: Path) -> None:
    """The calls end in all tasks, both while waiting for a worker and with one."""
    ended: list[str] = []

    async def follow(number: int) -> None:
        (tmp_path / f"{number}").write_bytes(slow_layer(0).data[:MIB])
        state = ArrivalState()
        state.grow(MIB)
        blob = slow_layer(0).descriptor
        arrival = Arrival(
            tmp_path / f"{number}",
            state,
            blob,
            tmp_path / f"{number}.tree",
            ignore,
            restarts=Restarts(),
        )
        with pytest.raises(StoreClosed):
            await workers.follow(arrival)
        ended.append(f"{number}")

    async with trio.open_nursery() as nursery:
        async with open_workers(Limits()) as workers:
            count = int(workers.limiter.total_tokens) + 2
            for number in range(count):
                nursery.start_soon(follow, number)
            with trio.fail_after(20):
                while not list(tmp_path.glob("*.tree")):  # noqa: ASYNC110, ASYNC240
                    await trio.sleep(0.01)
            assert workers.waiting == 2
        assert workers.limiter.borrowed_tokens == 0
    assert len(ended) == count
    with trio.fail_after(5):
        await follow(count)
    # Closed workers start no more processes.
    workers.prepare()


async def test_a_slow_layer_that_is_unpacked_twice_is_right(tmp_path: Path) -> None:
    """The second unpacking reads the kept bytes, and the first tree is removed."""
    unpacker = Watched()
    blob = slow_layer(0)
    async with opened(tmp_path, unpacker) as store:
        store._parts.builder.limiter.total_tokens = 1
        async with store.stage(blob.descriptor) as staged:
            unpacker.reached = 2 * MIB, trio.Event()
            await staged.write(blob.data[: 2 * MIB])
            await unpacker.reached[1].wait()
            with trio.fail_after(20):
                await stage(store, layer_of(quick="quick"))
            await staged.write(blob.data[2 * MIB :])
            await staged.finish(ignore)
            layer = await staged.commit(None)
        assert unpacker.began == 3
        assert (layer.tree / "fs" / "slow0").read_bytes() == NOISE
    assert not list((tmp_path / "ingest").iterdir())
