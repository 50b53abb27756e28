"""Runs CPU-bound work in a thread, outside the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import trio

__all__ = ["run_large"]

T = TypeVar("T")

_lane: Final[trio.lowlevel.RunVar[trio.CapacityLimiter]] = trio.lowlevel.RunVar("_lane")


async def run_large(work: Callable[[], T]) -> T:
    """Run a large CPU-bound function in a thread, one at a time.

    A computing thread keeps the GIL for 5 ms at a time. With ten such threads the event loop would
    run every 50 ms, and no thread would finish sooner. So one thread computes, and other calls
    queue. Functions that take a few milliseconds should use trio's usual threads instead of this
    queue.

    Cancellation: a queued call is cancelled; a function that has started runs to its end.
    """
    try:
        lane = _lane.get()
    except LookupError:
        lane = trio.CapacityLimiter(1)
        _lane.set(lane)
    return await trio.to_thread.run_sync(work, limiter=lane)
