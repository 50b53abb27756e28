"""Loans of workers to stages, with recalls from slow downloads.

A growing blob has a worker only while no other stage needs it. If stages wait and no worker is
idle, `Lending` recalls a worker that mostly waits for bytes, first the one with the least work to
lose. Its stage starts over later, from the bytes on the disk:

- once its blob is complete, ahead of all blobs that still grow, or
- once a worker is idle, its blob has grown since, and the work thrown away so far is less than
  the blob itself. A blob is therefore read at most three times, even if its download stops often.

`Lending._assign_workers` takes all decisions, and has no checkpoint. The waiting stages call it ten
times a second, because no event reports how far a worker is behind its blob.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, final

import attrs
import trio

from .._nursery import open_hidden_nursery
from .._tar.limits import Limits
from .._tree.unpacked import Unpacked
from .arrival_state import Abandoned, ArrivalState, Recalled
from .build import Arrival, follow

__all__ = ["Lending", "Loan", "follow_in_thread"]

# Seconds between two assignments while stages wait.
_INTERVAL: Final = 0.1

# A worker that is fewer bytes than this behind its blob keeps pace with the download. A blob
# grows by 1 MiB at a time (`partial.CHUNK`).
_PACE_MARGIN: Final = 2 * 1024 * 1024

# Seconds for which a worker must have kept pace with its download before a stage whose blob is
# complete takes it. A worker with more work to lose is kept for longer.
_PATIENCE: Final = 0.25
_MOST_PATIENCE: Final = 2.0
_BYTES_A_SECOND: Final = 64 * 1024 * 1024

# Seconds without growth after which a growing blob may take the worker of another.
_STALLED: Final = 2.0

# A download that ends within this number of seconds, at its pace, keeps its worker.
_NEARLY_DONE: Final = 1.0


@final
@attrs.define(eq=False)
class Loan:
    """The use of one worker for one blob, or the wait for it.

    Attributes:
        arrival: The blob.
        position: Number of bytes of the blob that the worker has read.
        is_waiting: Whether the worker waits for bytes that have not arrived.
        recalled: Whether the worker must stop its work for another stage.
    """

    arrival: Arrival
    position: int = 0
    is_waiting: Callable[[], bool] = attrs.field(default=lambda: False, repr=False)
    recalled: bool = False
    _stop: Callable[[], object] | None = None
    _granted: trio.Event = attrs.field(factory=trio.Event, repr=False)
    # The size of the blob at the last assignment, and the time of its last growth.
    _size: int = 0
    _grew_at: float = 0.0
    # The time at which the worker caught up with the download, and the blob's size then.
    _paced_since: float | None = None
    _paced_from: int = 0

    def set_stop(self, stop: Callable[[], object] | None) -> None:
        """Record the function that stops the worker; ``None`` once it has stopped."""
        self._stop = stop

    def note_position(self, position: int) -> None:
        """Record the number of bytes that the worker has read, from any thread."""
        self.position = position
        self.arrival.report(position)

    @property
    def _complete(self) -> bool:
        return self.arrival.state.snapshot.complete

    def _measure(self, now: float) -> None:
        size = self.arrival.state.snapshot.size
        if size != self._size or not self._grew_at:
            self._size, self._grew_at = size, now
        if not self.is_waiting() and size - self.position >= _PACE_MARGIN:
            self._paced_since = None
        elif self._paced_since is None:
            self._paced_since, self._paced_from = now, size

    def _reset_pace(self) -> None:
        self._paced_since = None
        self._grew_at = 0.0

    def _should_yield_to(self, other: Loan, now: float) -> bool:
        """Return whether the worker should go to another stage."""
        if self._complete or self.recalled or self._stop is None or self._paced_since is None:
            return False
        paced = now - self._paced_since
        if paced < min(max(_PATIENCE, self.position / _BYTES_A_SECOND), _MOST_PATIENCE):
            return False
        if not other._complete:
            return paced >= _STALLED and now - self._grew_at >= _STALLED
        left = self.arrival.blob.size - self._size
        return left * paced > (self._size - self._paced_from) * _NEARLY_DONE

    def _may_start(self) -> bool:
        """Return whether an idle worker may follow the incomplete blob."""
        restarts = self.arrival.restarts
        if not restarts.recalls:
            return True
        grown = self.arrival.state.snapshot.size > restarts.recalled_at
        return grown and restarts.thrown_away < self.arrival.blob.size


@final
class Lending:
    """Lends workers, at most one per token of the limiter at once.

    Args:
        limiter: One token for each worker. No other code may take tokens from this limiter.
    """

    def __init__(self, limiter: trio.CapacityLimiter) -> None:
        self._limiter = limiter
        self._queue: list[Loan] = []
        self._lent: list[Loan] = []
        self._assigned_at = 0.0

    def __repr__(self) -> str:
        return f"<Lending: {len(self._lent)} lent, {self.waiting} waiting>"

    @property
    def waiting(self) -> int:
        """Number of stages that wait for a worker, including stages that gave one back."""
        return len(self._queue)

    @asynccontextmanager
    async def lend(self, arrival: Arrival) -> AsyncIterator[Loan]:
        """Wait for a worker, and lend it for the block.

        The block raises `Recalled` if another stage needs the worker.

        Cancellation: a stage that still waits leaves the queue.
        """
        await trio.lowlevel.checkpoint()
        loan = Loan(arrival)
        self._queue.append(loan)
        try:
            self._assign_workers()
            while not loan._granted.is_set():
                with trio.move_on_after(_INTERVAL):
                    await loan._granted.wait()
                if not loan._granted.is_set() and self._is_due():
                    self._assign_workers()
            yield loan
        except Recalled:
            arrival.restarts.note_recall(loan.position, arrival.state.snapshot.size)
            raise
        finally:
            if loan._granted.is_set():
                self._lent.remove(loan)
                self._limiter.release_on_behalf_of(loan)
            else:
                self._queue.remove(loan)
            self._assign_workers()

    def _is_due(self) -> bool:
        return trio.current_time() - self._assigned_at >= _INTERVAL / 2

    def _assign_workers(self) -> None:
        """Lend the idle workers, and recall others if too few are idle."""
        now = self._assigned_at = trio.current_time()
        while (loan := self._next_loan()) is not None and self._take_token(loan):
            self._queue.remove(loan)
            self._lent.append(loan)
            loan._granted.set()
        if not self._queue:
            # Without waiting stages nothing is measured, and a measurement with a gap is useless.
            for loan in self._lent:
                loan._reset_pace()
            return
        for loan in (*self._lent, *self._queue):
            loan._measure(now)
        coming = sum(loan.recalled for loan in self._lent)
        for wanting in self._loans_worth_a_recall(now)[coming:]:
            self._recall_for(wanting, now)

    def _take_token(self, loan: Loan) -> bool:
        try:
            self._limiter.acquire_on_behalf_of_nowait(loan)
        except trio.WouldBlock:
            return False
        return True

    def _next_loan(self) -> Loan | None:
        """Return the stage that gets the next idle worker."""
        return (
            _first(loan for loan in self._queue if loan._complete)
            or _first(loan for loan in self._queue if not loan.arrival.restarts.recalls)
            or _first(loan for loan in self._queue if loan._may_start())
        )

    def _loans_worth_a_recall(self, now: float) -> list[Loan]:
        """Return the stages for which a worker may be recalled, complete blobs first."""
        complete = [loan for loan in self._queue if loan._complete]
        growing = [
            loan
            for loan in self._queue
            if not loan._complete and loan._may_start() and now - loan._grew_at < _STALLED
        ]
        return complete + growing

    def _recall_for(self, wanting: Loan, now: float) -> None:
        able = [loan for loan in self._lent if loan._should_yield_to(wanting, now)]
        if not able:
            return
        loan = min(able, key=lambda loan: loan.position)
        loan.recalled = True
        assert loan._stop is not None
        loan._stop()


def _first(loans: Iterable[Loan]) -> Loan | None:
    return next(iter(loans), None)


async def follow_in_thread(loan: Loan, limits: Limits, limiter: trio.CapacityLimiter) -> Unpacked:
    """Run `follow` in a thread for a loan.

    Cancellation: the thread stops at the next chunk or entry, as after a recall. The function
    waits for this stop, so that no thread writes after its return.

    Raises:
        Recalled: if another stage needs the worker.
        StartedOver, Abandoned, UnpackError, StoreError: as `follow` does.
    """
    # Only this copy is abandoned. Other workers follow the blob's own state later.
    state = ArrivalState()
    arrival = attrs.evolve(loan.arrival, state=state, report=loan.note_position)

    async def abandon_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            state.abandon()

    loan.arrival.state.set_listener(state.copy_unless_abandoned)
    loan.is_waiting = state.is_waiting
    loan.set_stop(state.abandon)
    try:
        async with open_hidden_nursery() as nursery:
            nursery.start_soon(abandon_when_cancelled)
            work = partial(follow, arrival, limits)
            unpacked = await trio.to_thread.run_sync(work, limiter=limiter)
            nursery.cancel_scope.cancel()
        return unpacked
    except Abandoned:
        if loan.recalled and not loan.arrival.state.snapshot.abandoned:
            raise Recalled from None
        await trio.lowlevel.checkpoint_if_cancelled()
        raise
    finally:
        loan.set_stop(None)
        loan.arrival.state.set_listener(None)
