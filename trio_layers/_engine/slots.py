"""The slots: permissions to download."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Protocol, final

import trio

from .._arguments import check_whole

__all__ = ["SlotHolder", "Slots"]


class SlotHolder(Protocol):
    @property
    def slot(self) -> trio.Event:
        """Set once the slot is granted."""
        ...


@final
class Slots:
    """A `trio.CapacityLimiter` that serves in the order of asking.

    trio's limiter serves tasks in the order in which they began to wait, and trio shuffles the
    tasks that begin in one step. Here a slot is requested synchronously, on behalf of its future
    holder, so the order is that of the decisions. The holder gives its slot back, or leaves the
    queue, in a synchronous call.
    """

    def __init__(self, limit: int) -> None:
        self._limiter = trio.CapacityLimiter(_tokens(limit))
        # A dict whose first item is cheap to remove.
        self._queue: OrderedDict[SlotHolder, None] = OrderedDict()

    @property
    def limit(self) -> int:
        """The largest number of slots at once; 0 means no limit.

        A new limit takes effect at once. A higher one serves waiting holders, and a lower one takes
        no slot away.
        """
        tokens = self._limiter.total_tokens
        return 0 if math.isinf(tokens) else int(tokens)

    @limit.setter
    @trio.lowlevel.enable_ki_protection
    def limit(self, limit: int) -> None:
        self._limiter.total_tokens = _tokens(limit)
        self._serve()

    @property
    def borrowed(self) -> int:
        return self._limiter.borrowed_tokens

    @property
    def queued(self) -> int:
        return len(self._queue)

    @trio.lowlevel.enable_ki_protection
    def ask(self, holder: SlotHolder) -> bool:
        """Grant ``holder`` a slot now or later; return whether it was now."""
        self._queue[holder] = None
        self._serve()
        return holder.slot.is_set()

    @trio.lowlevel.enable_ki_protection
    def give_back(self, holder: SlotHolder) -> None:
        """Take back the slot of ``holder``, or its place in the queue."""
        if holder.slot.is_set():
            self._limiter.release_on_behalf_of(holder)
            self._serve()
        else:
            self._queue.pop(holder, None)

    def _serve(self) -> None:
        while self._queue:
            holder = next(iter(self._queue))
            try:
                self._limiter.acquire_on_behalf_of_nowait(holder)
            except trio.WouldBlock:
                return
            del self._queue[holder]
            holder.slot.set()


def _tokens(limit: int) -> int | float:
    check_whole("max_concurrent_downloads", limit, least=0)
    # trio allows zero tokens, which would never serve a holder.
    return limit or math.inf
