"""Large CPU-bound functions run in one thread at a time."""

from __future__ import annotations

import threading

import pytest
import trio

from trio_layers._offload import run_large


def test_one_runs_at_a_time_and_a_wait_can_be_cancelled() -> None:
    busy = threading.Lock()
    begun, go_on = threading.Event(), threading.Event()
    done: list[int] = []

    def work(number: int) -> int:
        assert busy.acquire(blocking=False)
        begun.set()
        assert go_on.wait(5)
        busy.release()
        done.append(number)
        return number

    async def main() -> None:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for number in range(3):
                    nursery.start_soon(run_large, lambda number=number: work(number))
                await trio.to_thread.run_sync(begun.wait)
                await trio.testing.wait_all_tasks_blocked()
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await run_large(lambda: work(3))
                assert scope.cancelled_caught
                go_on.set()
            assert sorted(done) == [0, 1, 2]

    for _ in range(2):  # each trio run has its own limiter
        begun.clear()
        go_on.clear()
        done.clear()
        trio.run(main)


def test_what_the_work_raises_comes_out_as_it_is() -> None:
    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            await run_large(lambda: 1 // 0)
        assert await run_large(lambda: 2) == 2

    trio.run(main)
