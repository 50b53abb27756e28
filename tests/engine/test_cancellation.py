"""Cancellations at each point in the engine, and the state that they leave."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import trio
from engine.fakes import FakeSource, after, diff_id_of, failing
from engine.recorded_world import World
from engine.seeds import run

from trio_layers._digest import RootFS
from trio_layers._engine.download import open_download_manager
from trio_layers._errors import DoNotRetry, ManagerClosed
from trio_layers._memory import MemoryStore

BOTH_WAYS = True
CASES = Path(__file__).parents[1] / "cases" / "engine"


class SlowStream(trio.abc.ReceiveStream):
    """A stream that returns its first piece at once, and then blocks."""

    def __init__(self) -> None:
        self.closed = 0
        self._first = True

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        assert not self.closed
        if self._first:
            self._first = False
            await trio.lowlevel.checkpoint()
            return b"a piece of some length"
        await trio.sleep_forever()
        raise AssertionError

    async def aclose(self) -> None:
        self.closed += 1


class DeafStore(MemoryStore):
    """A store that needs a second for each layer, and ignores cancellation."""

    async def register(self, stream, parent, descriptor=None):
        layer = await super().register(stream, parent, descriptor)
        with trio.CancelScope(shield=True):
            await trio.sleep(1)
        return layer


def outcomes(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage().split(": ", 1)[1]
        for record in caplog.records
        if record.getMessage().startswith("transfer ")
    ]


def cancelled_at(
    seconds: float, sources: list[FakeSource], *, store: MemoryStore | None = None, limit: int = 3
) -> float:
    """Start a pull, cancel it at a given time, and return the time of its end."""
    store = MemoryStore() if store is None else store

    async def main() -> float:
        async with open_download_manager(store, max_concurrent_downloads=limit) as manager:
            with trio.move_on_at(seconds) as scope:
                async with manager.download(sources):
                    raise AssertionError("the pull was to be cancelled")
            assert scope.cancelled_caught
            ended = trio.current_time()
            assert manager.statistics().transfers == 0
        assert not store.layers
        assert [source.closed for source in sources] == [1] * len(sources)
        return ended

    return run(main)


@pytest.fixture(autouse=True)
def _debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "trio_layers.engine")


def test_waiting_for_a_slot(caplog: pytest.LogCaptureFixture) -> None:
    """The pull leaves the queue at once, and ``download`` is never called."""
    sources = [FakeSource("a", after(10)), FakeSource("b")]
    cancelled_at(5, sources, limit=1)
    assert outcomes(caplog) == ["context canceled"] * 2
    assert sources[1].calls == 0


@pytest.mark.parametrize("seed", range(10))
def test_slot_that_comes_in_the_tick_of_a_cancellation(seed: int) -> None:
    """The source's ``download`` is not called, and the next waiter gets the slot."""

    async def main() -> None:
        sources = [FakeSource("a", after(5)), FakeSource("b"), FakeSource("c", after(1))]
        async with (
            open_download_manager(MemoryStore(), max_concurrent_downloads=1) as manager,
            trio.open_nursery() as nursery,
        ):

            async def pull(source: FakeSource, until: float) -> None:
                with trio.move_on_at(until):
                    async with manager.download([source]):
                        pass

            for source, until in zip(sources, (100, 5, 100), strict=True):
                nursery.start_soon(pull, source, until)
                await trio.testing.wait_all_tasks_blocked()
        assert trio.current_time() == 6
        assert [source.calls for source in sources] == [1, 0, 1]
        assert [source.closed for source in sources] == [1, 1, 1]

    run(main, seed)


def test_downloading(caplog: pytest.LogCaptureFixture) -> None:
    cancelled_at(5, [FakeSource("a", after(10))])
    assert outcomes(caplog) == ["context canceled"]


def test_error_of_a_download_that_was_cancelled_is_not_retried(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A source may turn the cancellation into an error of its own."""

    async def download(progress) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise OSError("interrupted")

    source = FakeSource("a", download)
    assert cancelled_at(5, [source]) == 5
    assert outcomes(caplog) == ["interrupted"]
    assert source.calls == 1


def test_retry_delay(caplog: pytest.LogCaptureFixture) -> None:
    cancelled_at(3.5, [FakeSource("a", failing(OSError("no route")))])
    assert outcomes(caplog) == ["download cancelled during retry delay"]


def test_second_attempt(caplog: pytest.LogCaptureFixture) -> None:
    """During a second attempt, a cancellation has the same error as in the first, not that of the
    delay.
    """
    attempts = iter([failing(OSError("no route")), after(100)])

    async def download(progress) -> None:
        await next(attempts)(progress)

    cancelled_at(50, [FakeSource("a", download)])
    assert outcomes(caplog) == ["context canceled"]


@pytest.mark.streamed
def test_waiting_for_the_parent(caplog: pytest.LogCaptureFixture) -> None:
    stream = SlowStream()

    async def download(progress):
        return stream, 0

    cancelled_at(5, [FakeSource("a", after(10)), FakeSource("b", download)])
    assert sorted(outcomes(caplog)) == ["context canceled", "layer registration cancelled"]
    assert stream.closed == 1


@pytest.mark.streamed
def test_reading_the_layer(caplog: pytest.LogCaptureFixture) -> None:
    stream = SlowStream()

    async def download(progress):
        return stream, 0

    cancelled_at(5, [FakeSource("a", download)])
    assert outcomes(caplog) == ["layer registration cancelled"]
    assert stream.closed == 1


@pytest.mark.streamed
def test_store_that_finishes_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """The store ignores the cancellation, so the source learns the diff ID.

    The engine releases the layer, and the pull waits for the registration.
    """
    source = FakeSource("a")
    assert cancelled_at(0.5, [source], store=DeafStore()) == 1
    assert outcomes(caplog) == []
    assert source.told == [diff_id_of(b"a")]


@pytest.mark.streamed
def test_store_that_fails_when_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    class Store(MemoryStore):
        async def register(self, stream, parent, descriptor=None):
            try:
                await trio.sleep_forever()
            finally:
                raise OSError("the disk is gone")

    cancelled_at(5, [FakeSource("a")], store=Store())
    assert outcomes(caplog) == ["layer registration cancelled"]


def test_repeated_layer_waiting_for_its_parent(caplog: pytest.LogCaptureFixture) -> None:
    cancelled_at(5, [FakeSource("a"), FakeSource("b", after(10)), FakeSource("a")])
    assert sorted(outcomes(caplog)) == ["context canceled", "layer registration cancelled"]


@pytest.mark.streamed
def test_repeated_layer_being_read(caplog: pytest.LogCaptureFixture) -> None:
    sources = [FakeSource("a"), FakeSource("a")]
    assert cancelled_at(1.5, sources, store=DeafStore()) == 2
    assert outcomes(caplog) == []
    assert [source.told for source in sources] == [[diff_id_of(b"a")]] * 2


@pytest.mark.streamed
def test_download_deaf_to_it_holds_its_pull_and_is_not_registered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream = SlowStream()

    async def download(progress):
        with trio.CancelScope(shield=True):
            await trio.sleep(7)
        return stream, 0

    class Store(MemoryStore):
        async def register(self, stream, parent, descriptor=None):
            raise AssertionError("nobody wants the layer")

    source = FakeSource("a", download)
    assert cancelled_at(5, [source], store=Store()) == 7
    assert outcomes(caplog) == ["layer registration cancelled"]
    assert stream.closed == 1


def test_pull_that_meets_a_stopping_transfer_waits_cancellably() -> None:
    async def deaf(progress) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(10)

    async def main() -> None:
        first, second, third = FakeSource("a", deaf), FakeSource("a"), FakeSource("a")
        async with (
            open_download_manager(MemoryStore()) as manager,
            trio.open_nursery() as nursery,
        ):

            async def pull(source: FakeSource, at: float, until: float) -> None:
                await trio.sleep_until(at)
                with trio.move_on_at(until) as scope:
                    async with manager.download([source]):
                        pass
                assert scope.cancelled_caught or source is third

            nursery.start_soon(pull, first, 0, 1)
            nursery.start_soon(pull, second, 2, 3)
            nursery.start_soon(pull, third, 2, 100)
            await trio.sleep_until(4)
            assert (second.closed, second.calls, third.calls) == (1, 0, 0)
        assert (first.calls, third.calls, third.told) == (1, 1, [diff_id_of(b"a")])

    run(main)


class CancelAt(trio.abc.Instrument):
    """An instrument that cancels a scope before a given step of any task."""

    def __init__(self, scope: trio.CancelScope, step: int) -> None:
        self._scope, self._left = scope, step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if self._left == 0:
            self._scope.cancel()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
def test_at_every_step(seed: int, shared: bool) -> None:
    """After a cancellation at any step of the scheduler, sources are closed once, layers are
    released and tasks have ended. A pull that shares the layers completes.
    """
    base = b"the base"

    def sources() -> list[FakeSource]:
        attempts = iter([failing(OSError("once")), after(1)])

        async def download(progress) -> None:
            progress("Downloading", 1, 2)
            await next(attempts, after(0))(progress)

        return [
            FakeSource("known", known=True),
            FakeSource("a", after(1)),
            FakeSource("b", download),
            FakeSource("a"),
            FakeSource("c"),
        ]

    async def scenario(step: int) -> bool:
        store = MemoryStore()
        bottom = store.add(base, None)
        known = store.add(b"known", bottom.chain_id)
        mine, theirs = sources(), sources()
        root = RootFS([bottom.diff_id])
        send, receive = trio.open_memory_channel(1)

        async def other(manager) -> None:
            async with manager.download(theirs, base=root) as rootfs:
                assert len(rootfs.diff_ids) == 6

        async def read() -> None:
            async for _ in receive:
                await trio.lowlevel.checkpoint()

        scope = trio.CancelScope()
        cancel = CancelAt(scope, step)
        trio.lowlevel.add_instrument(cancel)
        try:
            async with trio.open_nursery() as nursery, receive, send:
                nursery.start_soon(read)
                async with (
                    open_download_manager(store, max_concurrent_downloads=2) as manager,
                    trio.open_nursery() as pulls,
                ):
                    if shared:
                        pulls.start_soon(other, manager)
                    with scope:
                        async with manager.download(mine, base=root, progress=send.send) as rootfs:
                            assert len(rootfs.diff_ids) == 6
                    if not shared:
                        assert manager.statistics().transfers == 0
                nursery.cancel_scope.cancel()
        finally:
            trio.lowlevel.remove_instrument(cancel)
        assert [source.closed for source in mine] == [1] * 5
        assert [source.closed for source in theirs] == [1 if shared else 0] * 5
        assert sum(source.calls for source in theirs) <= 4 if shared else True
        assert store.layers.keys() == {bottom.chain_id, known.chain_id}
        assert (bottom.references, known.references) == (2, 1)
        return not scope.cancelled_caught

    step = completed = 0
    while completed < 2:
        step += 1
        completed += run(lambda: scenario(step), seed)  # noqa: B023
    assert step > 60


@pytest.mark.parametrize("path", sorted(CASES.glob("*.json")), ids=lambda path: path.stem)
def test_manager_cancelled_at_every_second_step_of_a_trace(path: Path) -> None:
    """Everything stops, sources are closed once, and no other error comes out."""
    scenario = json.loads(path.read_text())["scenario"]
    step, complete = -1, False
    while not complete and step < 400:
        step += 2
        world = World(scenario, staged=FakeSource.staged)

        async def main(step: int = step, world: World = world) -> bool:
            with trio.CancelScope() as scope:
                cancel = CancelAt(scope, step)
                trio.lowlevel.add_instrument(cancel)
                try:
                    await world.play()
                finally:
                    trio.lowlevel.remove_instrument(cancel)
            return not scope.cancelled_caught

        complete = run(main, seed=step)
        for source, times in world.descriptor_close.items():
            assert len(times) == 1, source
        for body in world.bodies:
            assert body.closes == 1, body.name
        assert world.open_stages == 0


def test_manager_left_while_a_pull_waits() -> None:
    """Leaving the manager cancels transfers; each pull gets a ManagerClosed of its own."""
    errors: list[ManagerClosed] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            async with open_download_manager(MemoryStore(), max_concurrent_downloads=1) as manager:

                async def pull(*keys: str) -> None:
                    sources = [FakeSource(key, after(100)) for key in keys]
                    with pytest.raises(ManagerClosed) as caught:
                        async with manager.download(sources):
                            pass
                    errors.append(caught.value)
                    assert [source.closed for source in sources] == [1] * len(sources)

                nursery.start_soon(pull, "a", "b")
                nursery.start_soon(pull, "a", "b")
                nursery.start_soon(pull, "c")
                await trio.sleep(5)
            assert trio.current_time() == 5
        late = FakeSource("d")
        with pytest.raises(ManagerClosed):
            async with manager.download([late]):
                pass
        assert (late.calls, late.closed) == (0, 1)

    run(main)
    assert len(errors) == 3
    assert len({id(error) for error in errors}) == 3


def test_what_fails_while_the_manager_is_left_does_not_come_out_of_it() -> None:
    """This holds even for a source with its own nursery, whose group contains the error and a
    Cancelled.
    """

    async def stops_badly(progress) -> None:
        async def child() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise OSError("cannot stop")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
            await trio.sleep_forever()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            async with open_download_manager(MemoryStore()) as manager:

                async def pull() -> None:
                    with pytest.raises(ManagerClosed):
                        async with manager.download([FakeSource("a", stops_badly)]):
                            pass

                nursery.start_soon(pull)
                await trio.sleep(1)

    run(main)


def test_pull_cancelled_together_with_the_manager_gets_cancelled() -> None:
    """The caller's own scope catches a single Cancelled."""
    seen: list[BaseException] = []

    async def main() -> None:
        with trio.move_on_after(5) as scope:
            async with open_download_manager(MemoryStore()) as manager:
                try:
                    async with manager.download([FakeSource("a", after(100))]):
                        pass
                except BaseException as error:
                    seen.append(error)
                    raise
        assert scope.cancelled_caught

    run(main)
    assert [type(error) for error in seen] == [trio.Cancelled]


def test_result_outlives_the_manager() -> None:
    store = MemoryStore()

    async def main() -> None:
        async with open_download_manager(store) as manager:
            context = manager.download([FakeSource("a")])
            rootfs = await context.__aenter__()
        assert rootfs.chain_id in store.layers
        await context.__aexit__(None, None, None)
        assert not store.layers

    run(main)


class Fatal(BaseException):
    pass


def test_base_exception_in_a_download_goes_up_through_the_manager() -> None:
    """A BaseException is no outcome of a layer. It leaves the manager's block in a group, and pulls
    get ManagerClosed.
    """
    fatal = Fatal("stop everything")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            closed = trio.Event()

            async def manage() -> None:
                with pytest.raises(BaseExceptionGroup) as caught:
                    async with open_download_manager(MemoryStore()) as manager:
                        nursery.start_soon(pull, manager)
                        await trio.sleep_forever()
                assert caught.value.split(Fatal)[0].exceptions == (fatal,)
                assert caught.value.split((Fatal, trio.Cancelled))[1] is None

            async def pull(manager) -> None:
                with pytest.raises(ManagerClosed):
                    async with manager.download(
                        [FakeSource("a", after(100)), FakeSource("b", failing(fatal, 3))]
                    ):
                        pass
                closed.set()

            nursery.start_soon(manage)
            await closed.wait()

    run(main)


def test_the_bodies_raise_as_they_are() -> None:
    """Errors of the block are not put in a group by the nurseries of manager or pull, even while
    transfers run.
    """

    async def main() -> None:
        started = trio.Event()

        async def endless(progress) -> None:
            started.set()
            await trio.sleep_forever()

        async def other(manager) -> None:
            with pytest.raises(ManagerClosed):
                async with manager.download([FakeSource("b", endless)]):
                    pass

        async with trio.open_nursery() as nursery:
            with pytest.raises(KeyError, match="mine"):
                async with open_download_manager(MemoryStore()) as manager:
                    nursery.start_soon(other, manager)
                    await started.wait()
                    async with manager.download([FakeSource("a")]):
                        raise KeyError("mine")

    run(main)


def test_do_not_retry_after_cancellation_is_no_outcome_for_a_new_pull() -> None:
    """A later pull downloads the layer again."""

    async def main() -> None:
        store = MemoryStore()
        async with open_download_manager(store) as manager:
            with pytest.raises(DoNotRetry):
                async with manager.download([FakeSource("a", failing(DoNotRetry("no")))]):
                    pass
            async with manager.download([FakeSource("a")]) as rootfs:
                assert rootfs.diff_ids == (diff_id_of(b"a"),)

    run(main)
