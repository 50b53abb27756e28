"""Threads of this process as workers."""

from __future__ import annotations

import math
import os
from typing import final

import trio

from .._tar.limits import Limits
from .._tree.unpacked import Unpacked
from .build import Arrival
from .lending import Lending, follow_in_thread

__all__ = ["THREADS", "Threads"]

THREADS = max(4, 2 * (os.cpu_count() or 1))
"""The number of threads that unpack at once; some of them wait for bytes."""


@final
class Threads:
    """A `Builder` that uses threads of this process.

    Args:
        limits: The limits on each layer.
    """

    def __init__(self, limits: Limits) -> None:
        self.limiter: trio.CapacityLimiter = trio.CapacityLimiter(THREADS)
        self._lending = Lending(self.limiter)
        self._threads = trio.CapacityLimiter(math.inf)
        self._limits = limits

    @property
    def waiting(self) -> int:
        """Number of blobs that wait for a thread."""
        return self._lending.waiting

    def prepare(self) -> None:
        """Do nothing: threads start at once."""

    async def follow(self, arrival: Arrival) -> Unpacked:
        """See `Builder.follow`."""
        async with self._lending.lend(arrival) as loan:
            return await follow_in_thread(loan, self._limits, self._threads)
