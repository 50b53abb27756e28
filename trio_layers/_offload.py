"""Work of the processor that would hold up the event loop, done in a thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import trio

__all__ = ["run_large"]

T = TypeVar("T")

_lane: Final[trio.lowlevel.RunVar[trio.CapacityLimiter]] = trio.lowlevel.RunVar("_lane")


async def run_large(work: Callable[[], T]) -> T:
    """Run a large piece of work in a thread, after those that came before.

    Each thread that computes keeps the GIL for 5 ms at a time. With ten of them the event loop gets
    its turn every 50 ms, and none is faster for it. So there is one. Work of a few milliseconds
    shall not wait here: it is for the usual threads.

    Waiting can be cancelled; the work itself is finished.
    """
    try:
        lane = _lane.get()
    except LookupError:
        lane = trio.CapacityLimiter(1)
        _lane.set(lane)
    return await trio.to_thread.run_sync(work, limiter=lane)
