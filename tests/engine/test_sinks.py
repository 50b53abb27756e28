"""Progress: the events that each sink gets, and the effects of a faulty sink."""

from __future__ import annotations

import pytest
import trio
from engine.fakes import FakeSource, after, failing
from engine.seeds import run
from trio.testing import wait_all_tasks_blocked

from trio_layers._engine.download import open_download_manager
from trio_layers._errors import DoNotRetry
from trio_layers._memory import MemoryStore
from trio_layers._progress import Progress

BOTH_WAYS = True
SEEDS = pytest.mark.parametrize("seed", range(10))


class SinkError(Exception):
    pass


def counting(steps: int, seconds: float = 1.0):
    """Return a download that reports its steps at an even pace."""

    async def download(progress) -> None:
        for step in range(1, steps + 1):
            await trio.sleep(seconds)
            progress("Downloading", step, steps)

    return download


@SEEDS
@pytest.mark.parametrize("action", ["Pulling fs layer", "Downloading", "Pull complete"])
def test_sink_that_raises_ends_its_own_pull_with_that_very_exception(
    seed: int, action: str
) -> None:
    error = SinkError("full")

    async def sink(progress: Progress) -> None:
        if progress.action == action:
            raise error

    async def main() -> None:
        store = MemoryStore()
        mine = [FakeSource("a", counting(3)), FakeSource("b", counting(5))]
        theirs = [FakeSource("a"), FakeSource("b")]
        async with (
            open_download_manager(store) as manager,
            trio.open_nursery() as nursery,
        ):

            async def other() -> None:
                async with manager.download(theirs) as rootfs:
                    assert len(rootfs.diff_ids) == 2

            nursery.start_soon(other)
            with pytest.raises(SinkError) as caught:
                async with manager.download(mine, progress=sink):
                    pass
            assert caught.value is error
        assert [source.closed for source in mine + theirs] == [1] * 4
        assert not store.layers

    run(main, seed)


@SEEDS
def test_sink_that_stalls_holds_up_neither_its_layers_nor_others(seed: int) -> None:
    """A stuck sink keeps its own pull from returning, and nothing else."""

    async def main() -> None:
        async with (
            open_download_manager(MemoryStore()) as manager,
            trio.open_nursery() as nursery,
        ):
            unblock = trio.Event()
            stuck = FakeSource("a", counting(10, 0.1))

            async def sink(progress: Progress) -> None:
                if progress.action == "Downloading":
                    await unblock.wait()

            async def pull() -> None:
                async with manager.download([stuck], progress=sink):
                    assert unblock.is_set()

            nursery.start_soon(pull)
            await trio.sleep(0.5)
            async with manager.download([FakeSource("a")]):
                assert trio.current_time() == pytest.approx(1.0)
            assert stuck.told
            await trio.sleep(5)
            unblock.set()

    run(main, seed)


def test_sink_stuck_before_its_layers_are_asked_for_is_freed_by_a_failure() -> None:
    """The second layer is never requested, because the failure of the first one ends the pull at
    once.
    """

    async def sink(progress: Progress) -> None:
        if progress.id == "b":
            await trio.sleep_forever()

    async def main() -> None:
        sources = [FakeSource("a", failing(DoNotRetry("denied"), 3)), FakeSource("b")]
        async with open_download_manager(MemoryStore()) as manager:
            with pytest.raises(DoNotRetry, match="denied"):
                async with manager.download(sources, progress=sink):
                    pass
        assert trio.current_time() == 3
        assert (sources[1].calls, sources[1].closed) == (0, 1)

    run(main)


@SEEDS
@pytest.mark.parametrize("watched", [False, True], ids=["deaf", "wanted by others"])
def test_result_does_not_wait_for_a_layer_below_that_is_not_needed(
    seed: int, watched: bool
) -> None:
    """A joined layer stands on another pull's layers, so the result does not wait for our own layer
    below it. That layer continues if others need it, or until it has stopped.
    """

    async def deaf(progress) -> None:
        progress("Downloading", 1, 2)
        with trio.CancelScope(shield=not watched):
            await trio.sleep_until(100)

    async def sink(progress: Progress) -> None:
        await trio.lowlevel.checkpoint()

    async def main() -> None:
        store = MemoryStore()
        store.add(b"a", None)
        async with (
            open_download_manager(store) as manager,
            trio.open_nursery() as nursery,
        ):

            async def pull(*sources: FakeSource) -> None:
                async with manager.download(sources, progress=sink):
                    pass

            nursery.start_soon(pull, FakeSource("a", known=True), FakeSource("b", after(10)))
            await trio.sleep(1)
            if watched:
                nursery.start_soon(pull, FakeSource("a", deaf))
                await trio.sleep(1)
            async with manager.download(
                [FakeSource("a", deaf), FakeSource("b")], progress=sink
            ) as rootfs:
                assert len(rootfs.diff_ids) == 2
                assert trio.current_time() == 10

    run(main, seed)


@SEEDS
def test_slow_sink_gets_the_newest_and_the_last(seed: int) -> None:
    """A slow sink skips older states, gets none twice, and gets the last one."""
    seen: list[Progress] = []

    async def sink(progress: Progress) -> None:
        seen.append(progress)
        await trio.sleep(2.3)

    async def main() -> None:
        async with open_download_manager(MemoryStore()) as manager:
            async with manager.download([FakeSource("a", counting(10))], progress=sink):
                assert trio.current_time() == pytest.approx(14.8)

    run(main, seed)
    assert [(event.action, event.current) for event in seen] == [
        ("Pulling fs layer", 0),
        ("Downloading", 1),
        ("Downloading", 3),
        ("Downloading", 5),
        ("Downloading", 7),
        ("Pull complete", 0),
    ]


@SEEDS
def test_failing_pull_hands_over_the_last_event_to_idle_sinks_and_waits_for_none(
    seed: int,
) -> None:
    send, receive = trio.open_memory_channel[Progress](100)
    never = trio.Event()
    cancelled: list[str] = []

    async def sink(progress: Progress) -> None:
        await send.send(progress)
        if progress.id == "a" and progress.action == "Downloading":
            try:
                await never.wait()
            except trio.Cancelled:
                cancelled.append(progress.id)
                raise

    async def reports_and_fails(progress) -> None:
        await trio.sleep(3)
        progress("Downloading", 7, 9)
        raise DoNotRetry("denied")

    async def main() -> None:
        sources = [FakeSource("a", counting(10)), FakeSource("b", reports_and_fails)]
        async with open_download_manager(MemoryStore()) as manager:
            with pytest.raises(DoNotRetry, match="denied"):
                async with manager.download(sources, progress=sink):
                    pass
        assert trio.current_time() == 3

    run(main, seed)
    send.close()
    events = []
    while True:
        try:
            events.append(receive.receive_nowait())
        except trio.EndOfChannel:
            break
    assert cancelled == ["a"]
    assert events[-1] == Progress("b", "Downloading", 7, 9)


@pytest.mark.parametrize("action", ["Pulling fs layer", "Downloading"])
def test_sink_that_fails_when_it_is_cancelled_does_not_hide_why_its_pull_failed(
    action: str,
) -> None:
    """This holds even for a sink with its own nursery, whose group contains the Cancelled, too."""

    async def sink(progress: Progress) -> None:
        async def child() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise SinkError("stopped")

        if progress.action == action and progress.id == "b":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child)
                await trio.sleep_forever()

    async def main() -> None:
        sources = [
            FakeSource("a", failing(DoNotRetry("denied"), 3)),
            FakeSource("b", counting(10)),
        ]
        async with open_download_manager(MemoryStore()) as manager:
            with pytest.raises(DoNotRetry, match="denied"):
                async with manager.download(sources, progress=sink):
                    pass
        assert [source.closed for source in sources] == [1, 1]

    run(main)


def test_equal_publications_are_each_delivered() -> None:
    seen: list[Progress] = []

    async def sink(progress: Progress) -> None:
        seen.append(progress)

    async def download(progress) -> None:
        for _ in range(3):
            progress("Thinking")
            await trio.sleep(1)

    async def main() -> None:
        async with (
            open_download_manager(MemoryStore()) as manager,
            manager.download([FakeSource("a", download)], progress=sink),
        ):
            pass

    run(main)
    assert [event.action for event in seen].count("Thinking") == 3


def test_progress_after_the_end_is_ignored() -> None:
    """A late report of a source cannot show a finished layer again."""
    seen: list[Progress] = []
    keep: list = []

    async def sink(progress: Progress) -> None:
        seen.append(progress)

    async def download(progress) -> None:
        keep.append(progress)

    async def main() -> None:
        async with open_download_manager(MemoryStore()) as manager:
            async with manager.download([FakeSource("a", download)], progress=sink):
                keep[0]("Downloading", 1, 2)
                await wait_all_tasks_blocked()

    run(main)
    assert seen[-1].action == "Pull complete"


@SEEDS
def test_id_is_each_watchers_own(seed: int) -> None:
    """A pull that joins a transfer sees its own source's ID."""
    seen: dict[str, set[str]] = {"first": set(), "second": set()}

    async def main() -> None:
        async with (
            open_download_manager(MemoryStore()) as manager,
            trio.open_nursery() as nursery,
        ):

            async def pull(name: str, at: float) -> None:
                await trio.sleep_until(at)
                source = FakeSource("a", counting(5))
                source.id = f"id of {name}"

                async def sink(progress: Progress) -> None:
                    seen[name].add(progress.id)

                async with manager.download([source], progress=sink):
                    pass

            nursery.start_soon(pull, "first", 0)
            nursery.start_soon(pull, "second", 1.5)

    run(main, seed)
    assert seen == {"first": {"id of first"}, "second": {"id of second"}}


def test_many_events_on_a_slow_sink_take_bounded_memory_and_linear_steps() -> None:
    """100,000 events are not queued: a slow sink sees only a few of them."""
    seen = 0

    async def sink(progress: Progress) -> None:
        nonlocal seen
        seen += 1
        await trio.sleep(1)

    async def download(progress) -> None:
        for step in range(100_000):
            progress("Downloading", step, 100_000)
            if step % 1000 == 0:
                await trio.sleep(0.1)

    async def main() -> None:
        async with (
            open_download_manager(MemoryStore()) as manager,
            manager.download([FakeSource("a", download)], progress=sink),
        ):
            pass

    run(main)
    assert 5 < seen < 20


@pytest.mark.streamed
def test_pull_without_sink_needs_no_tasks_for_it() -> None:
    async def main() -> None:
        async with (
            open_download_manager(MemoryStore()) as manager,
            trio.open_nursery() as nursery,
        ):
            before = trio.lowlevel.current_statistics().tasks_living

            async def pull() -> None:
                async with manager.download([FakeSource(str(i), after(5)) for i in range(50)]):
                    pass

            nursery.start_soon(pull)
            await trio.sleep(1)
            # One task for the pull, and one for each transfer.
            assert trio.lowlevel.current_statistics().tasks_living - before == 51

    run(main)
