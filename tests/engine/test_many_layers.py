"""Images with thousands of layers: bounded steps and linear work in total."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from engine.fakes import FakeSource, after, failing
from engine.seeds import run

from trio_layers._digest import RootFS
from trio_layers._engine.download import open_download_manager
from trio_layers._engine.pull import WINDOW
from trio_layers._errors import ManagerClosed, TransferError
from trio_layers._memory import MemoryLayer, MemoryStore
from trio_layers._progress import Progress

LAYERS = 3 * WINDOW


class StepLog(trio.abc.Instrument):
    """An instrument that counts the tasks that each step wakes.

    Attributes:
        most_woken: The maximum number of tasks that one step woke, started or cancelled.
        most_tasks: The maximum number of tasks at one time.
    """

    def __init__(self) -> None:
        self.most_woken = self.most_tasks = 0
        self._woken = self._tasks = 0

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self._tasks += 1
        self.most_tasks = max(self.most_tasks, self._tasks)

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        self._tasks -= 1

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        self._woken += 1
        self.most_woken = max(self.most_woken, self._woken)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._woken = 0


def distinct(**options: object) -> list[FakeSource]:
    return [FakeSource(str(index), **options) for index in range(LAYERS)]


def repeated() -> list[FakeSource]:
    return [FakeSource("a") for _ in range(LAYERS)]


def mixed() -> list[FakeSource]:
    """Sources with repeated keys, far apart and adjacent, and unique keys.

    Most keys occur four times. One key occurs 20 times in a row, and 20 keys occur once.
    """
    keys = [str(index % (LAYERS // 4)) for index in range(LAYERS)]
    keys[10:30] = ["a"] * 20
    keys[40:60] = [f"once {index}" for index in range(20)]
    return [FakeSource(key) for key in keys]


CASES = pytest.mark.parametrize(
    ("make", "pulls"), [(distinct, 1), (repeated, 1), (mixed, 1), (mixed, 3)]
)


@CASES
@pytest.mark.parametrize("with_sink", [False, True])
def test_a_pull_of_many_layers_has_few_tasks(
    make: Callable[[], list[FakeSource]], pulls: int, with_sink: bool
) -> None:
    """The window, not the number of layers, bounds tasks and steps."""
    log, store = StepLog(), MemoryStore()

    async def sink(progress: Progress) -> None:
        await trio.lowlevel.checkpoint()

    async def main() -> None:
        trio.lowlevel.add_instrument(log)
        async with open_download_manager(store) as manager, trio.open_nursery() as nursery:

            async def pull() -> None:
                sources = make()
                async with manager.download(sources, progress=sink if with_sink else None) as root:
                    assert len(root.diff_ids) == LAYERS
                assert [source.closed for source in sources] == [1] * LAYERS

            for _ in range(pulls):
                nursery.start_soon(pull)

    run(main)
    assert store.layers == {}  # the pulls released every reference
    assert log.most_tasks < (1 + pulls) * WINDOW + 20
    assert log.most_woken < 2 * WINDOW


@CASES
@pytest.mark.parametrize(
    ("how", "unlimited"), [("fails", False), ("cancelled", True), ("closed", False)]
)
def test_many_layers_are_let_go_of_in_short_steps(
    make: Callable[[], list[FakeSource]], pulls: int, how: str, unlimited: bool
) -> None:
    """The window bounds the tasks that an aborted pull wakes at once."""
    log, store = StepLog(), MemoryStore()
    given: list[FakeSource] = []
    middle = LAYERS // 2 + 1

    async def main() -> None:
        trio.lowlevel.add_instrument(log)
        limit = 0 if unlimited else 3
        async with open_download_manager(
            store, max_concurrent_downloads=limit, max_download_attempts=1
        ) as manager:

            async def pull() -> None:
                sources = make()
                end = failing(OSError("no"), 10) if how == "fails" else after(3600)
                sources[middle] = FakeSource("end", end)
                try:
                    async with manager.download(sources):
                        raise AssertionError
                except TransferError:
                    assert how == "fails"
                except ManagerClosed:
                    assert how == "closed"
                finally:
                    given.extend(sources)

            async with trio.open_nursery() as inner:
                for _ in range(pulls):
                    inner.start_soon(pull)
                await trio.sleep(20)
                if how == "cancelled":
                    inner.cancel_scope.cancel()
                elif how == "closed":
                    manager._transfers.close()
            assert trio.current_time() < 21
            assert manager.statistics().transfers == 0

    run(main)
    assert store.layers == {}
    assert [source.closed for source in given] == [1] * LAYERS * pulls
    assert log.most_woken < 2 * WINDOW


def test_a_failure_far_up_starts_no_layer_any_more() -> None:
    sources = distinct()
    sources[200] = FakeSource("end", failing(OSError("no"), 10))

    async def main() -> None:
        async with open_download_manager(MemoryStore(), max_download_attempts=1) as manager:
            with pytest.raises(TransferError):
                async with manager.download(sources):
                    pass

    run(main)
    asked = [index for index, source in enumerate(sources) if source.calls]
    assert asked == list(range(200 + WINDOW))


def test_the_bottom_layer_is_held_for_the_layers_that_repeat_it() -> None:
    """The bottom layer's transfer ended long before the top layer repeats it."""
    store = MemoryStore()
    keys = ["bottom", *map(str, range(3 * WINDOW)), "bottom"]

    async def main() -> None:
        async with open_download_manager(store) as manager:
            sources = [FakeSource(key) for key in keys]
            async with manager.download(sources) as root:
                assert root.diff_ids[0] == root.diff_ids[-1]
                layer: MemoryLayer | None = store.layers[root.chain_id]
                for source in reversed(sources):
                    assert layer is not None
                    assert layer.data == source.data
                    layer = layer.parent
                assert sources[0].calls == 1
                assert sources[-1].calls == 0

    run(main)
    assert store.layers == {}


def test_hashes_grow_with_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pull hashes each chain ID of existing and base layers once."""
    calls = 0

    class Counted(MemoryStore):
        pass

    from trio_layers._engine import pull as module

    real = module.extend_chain

    def extend_chain(parent, diff_id):
        nonlocal calls
        calls += 1
        return real(parent, diff_id)

    monkeypatch.setattr(module, "extend_chain", extend_chain)

    async def main() -> None:
        store = Counted()
        async with open_download_manager(store) as manager:
            lower, upper = distinct(known=True), [FakeSource("top", known=True)]
            async with manager.download(lower) as base:
                assert isinstance(base, RootFS)
                nonlocal calls
                calls = 0
                async with manager.download(upper, base=base), manager.download([*lower, *upper]):
                    pass

    run(main)
    assert calls <= 2 * LAYERS + 4
