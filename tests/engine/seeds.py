"""Runs trio with an order of scheduling that a seed decides."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio
import trio._core._run as trio_run
from trio.testing import MockClock

T = TypeVar("T")


@contextmanager
def scheduling(seed: int) -> Iterator[None]:
    """Shuffle runnable tasks. The same seed gives the same order."""
    before, state = trio_run._ALLOW_DETERMINISTIC_SCHEDULING, trio_run._r.getstate()
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True
    trio_run._r.seed(seed)
    try:
        yield
    finally:
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = before
        trio_run._r.setstate(state)


def run(main: Callable[[], Awaitable[T]], seed: int | None = None) -> T:
    """Call `trio.run` with a virtual clock that starts at 0."""
    clock = MockClock(autojump_threshold=0)
    if seed is None:
        seed = random.randrange(2**32)
    with scheduling(seed):
        return trio.run(main, clock=clock)
