"""Transfers: keyed, shared, cancellable jobs, and the table of the running ones.

No pull owns a transfer. Its task lives in the manager's nursery, it has a cancel scope of its own,
and it goes on while it has a watcher. The design is that of moby's
``distribution/xfer/transfer.go``, with these terms:

watcher
    A pull, or another transfer that builds on the layer, for which a transfer goes on. It comes by
    `Transfer.watch` and goes by `Transfer.let_go`. The last one that goes cancels the transfer, or,
    if the transfer has ended, releases the layer.
inactive
    The data has arrived, so the slot goes to the next transfer.
done
    The task has ended and the outcome is fixed. A transfer that was only asked to stop is not done.

All decisions (starting, sharing, cancelling, ending) happen in synchronous functions. No task runs
between looking and acting, so there are no locks. Ctrl-C waits until such a function has returned,
and foreign code runs once the state change is complete (see `ForeignCalls`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, Protocol, TypeAlias, final

import trio

from .._errors import LayersError, ManagerClosed, TransferCancelled, TransferError, text_of
from .._progress import Progress, Status
from ..abc import Layer, LayerStore, ProgressSink
from .foreign import ForeignCalls, log, run_all, tell
from .slots import Slots

__all__ = ["Transfer", "Transfers", "Watcher", "Work", "manager_closed"]

CONTEXT_CANCELED: Final = "context canceled"

Work: TypeAlias = Callable[["Transfer"], Awaitable["Exception | None"]]
"""The work of a transfer, inside the transfer's cancel scope.

The work sets `Transfer.layer` as soon as the store has returned the layer. It returns ``None``, or
the error of another transfer. That error is shared, so it is not raised again: the one object would
collect the tracebacks of all its users.
"""


class Watcher(Protocol):
    def transfer_ended(self, transfer: Transfer) -> None:
        """Called once, in the step in which the transfer ends. Must not raise."""
        ...


def manager_closed() -> ManagerClosed:
    """Return a new error for a call on a manager after its block."""
    return ManagerClosed("the download manager was closed")


@final
class Transfer:
    """A job of the table: the download or copy of one layer.

    Attributes:
        scope: Cancels this transfer and nothing else.
        slot: Set once the transfer may move data; never, if it needs no slot.
        inactive: Set once the transfer moves no more data.
        done: Set once the transfer has ended, with a `layer` or an `error`.
        layer: The registered layer. Once the transfer is done, only a success leaves it set.
        error: The error of the transfer, one object for all watchers: see `own_error`.
        if_cancelled: The text of the error if the transfer is cancelled at this point.
    """

    def __init__(
        self,
        table: Transfers,
        key: bytes,
        name: str,
        builds_on: Sequence[Transfer],
        close: Callable[[], None],
    ) -> None:
        self.scope: trio.CancelScope = trio.CancelScope()
        self.slot: trio.Event = trio.Event()
        self.inactive: trio.Event = trio.Event()
        self.done: trio.Event = trio.Event()
        self.layer: Layer | None = None
        self.error: Exception | None = None
        self.if_cancelled: str = CONTEXT_CANCELED
        self._table = table
        self._key = key
        self._name = name
        self._close = close
        self._watchers: dict[Watcher, None] = {}
        self._builds_on = builds_on
        for other in builds_on:
            other.watch(self)
        # The latest report, and its number, which tells equal reports apart.
        self._latest = ("", 0, 0, False)
        self._published = 0
        self._news = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        if self.done.is_set():
            state = "done" if self.error is None else "failed"
        elif self.scope.cancel_called:
            state = "stopping"
        elif self.inactive.is_set():
            state = "inactive"
        else:
            state = "active" if self.slot.is_set() else "queued"
        return f"<Transfer {self._name}: {state}, {len(self._watchers)} watchers>"

    # The watchers.

    def watch(self, watcher: Watcher) -> None:
        self._watchers[watcher] = None

    def let_go(self, watcher: Watcher) -> None:
        """Remove a watcher.

        The last watcher's removal cancels a running transfer, or releases the layer of an ended
        one. The caller must run the queued foreign calls once its own state change is complete.
        """
        # A cancelled transfer lets go of its parent, and so on down. A loop bounds the stack depth.
        todo: list[tuple[Transfer, Watcher]] = [(self, watcher)]
        while todo:
            transfer, leaving = todo.pop()
            transfer._watchers.pop(leaving, None)
            if transfer._watchers:
                continue
            if transfer.done.is_set():
                transfer._release()
            elif not transfer.scope.cancel_called:
                transfer.scope.cancel()
                if not transfer.slot.is_set():
                    transfer._table.slots.give_back(transfer)
                others, transfer._builds_on = transfer._builds_on, ()
                todo.extend((other, transfer) for other in reversed(others))

    def transfer_ended(self, transfer: Transfer) -> None:
        """Do nothing: this transfer's task waits for the other's `done`."""

    def own_error(self) -> LayersError:
        """Return the transfer's error as a new object, for one waiting pull."""
        assert self.error is not None
        if isinstance(self.error, LayersError):
            try:
                mine = self.error.copy_to_raise()
                mine.__cause__ = self.error
                return mine
            except Exception as error:  # a foreign exception class that cannot be copied
                log(logging.DEBUG, "%s cannot be copied", type(self.error).__name__, error=error)
        transfer_error = TransferError(text_of(self.error))
        transfer_error.__cause__ = self.error
        return transfer_error

    # The reports of progress.

    def report(self, action: str, current: int = 0, total: int = 0, last: bool = False) -> None:
        """Publish progress without waiting. A slow watcher sees only the newest report."""
        if self.done.is_set():
            return
        self._latest = (action, current, total, last)
        self._published += 1
        self._news.unpark_all()

    async def deliver(self, watcher: Watcher, id: str, sink: ProgressSink) -> None:
        """Pass the latest report to ``sink``, and later ones as fast as the sink takes them.

        The call ends when the transfer is done or the watcher has gone, and the last report is
        delivered.
        """
        seen = 0
        while True:
            over = self.done.is_set() or watcher not in self._watchers
            if seen < self._published:
                seen = self._published
                await tell(sink, Progress(id, *self._latest))
            elif not over:
                await self._news.park()
            if over:
                return

    def wake(self) -> None:
        """Make `deliver` notice that a watcher has gone."""
        self._news.unpark_all()

    # The work.

    def now_inactive(self) -> None:
        """Give the slot to the next transfer, since the data has arrived."""
        self.inactive.set()
        self._table.slots.give_back(self)

    # Protection sends Ctrl-C to the program's main task. In this task no caller would get the
    # KeyboardInterrupt, and it could arrive between the end of the work and that of the transfer.
    @trio.lowlevel.enable_ki_protection
    async def _run(self, work: Work) -> None:
        # This error stands if the cancellation comes from outside: only the manager's end does
        # that.
        outcome: Exception | None = manager_closed()
        try:
            with self.scope:
                outcome = await work(self)
            if self.scope.cancelled_caught:
                outcome = TransferCancelled(self.if_cancelled)
        except Exception as error:
            outcome = error
        except BaseExceptionGroup as group:
            stopped, failed = group.split(trio.Cancelled)
            if stopped is None or not isinstance(failed, ExceptionGroup):
                raise
            # An error during the end of the manager must not replace the error of the manager's
            # block.
            log(logging.DEBUG, "transfer %s failed while it stopped", self._name, error=failed)
            raise stopped from None
        finally:
            self._end(outcome)

    @trio.lowlevel.enable_ki_protection
    def _end(self, outcome: Exception | None) -> None:
        """End the transfer in one step without a checkpoint.

        The slot goes last: a failing pull lets go of its other layers before one of them could get
        the slot. Calls to the source, the store and the log follow once the step is complete.
        """
        self._table.drop(self._key)
        self.error = outcome
        if outcome is not None:
            self._release()
        self.done.set()
        self._news.unpark_all()
        self._let_go_of_others()
        try:
            run_all(partial(each.transfer_ended, self) for each in tuple(self._watchers))
        finally:
            if not self.inactive.is_set():
                self.now_inactive()
            if not self._watchers:
                self._release()
            foreign = self._table.foreign
            foreign.later(self._close, "closing a source failed")
            if outcome is not None:
                foreign.later(partial(self._log, outcome), "an outcome cannot be logged")
            foreign.run()

    def _log(self, outcome: Exception) -> None:
        log(logging.DEBUG, "transfer %s: %s", self._name, text_of(outcome))

    def _let_go_of_others(self) -> None:
        others, self._builds_on = self._builds_on, ()
        for other in others:
            other.let_go(self)

    def _release(self) -> None:
        layer, self.layer = self.layer, None
        if layer is not None:
            self._table.release_later(layer)


@final
class Transfers:
    """The running transfers by key, and their nursery."""

    def __init__(self, nursery: trio.Nursery, store: LayerStore, slots: Slots) -> None:
        self.store = store
        self.slots = slots
        self.foreign: ForeignCalls = ForeignCalls()
        self._nursery: trio.Nursery | None = nursery
        self._running: dict[bytes, Transfer] = {}

    def __len__(self) -> int:
        return len(self._running)

    def get(self, key: bytes) -> Transfer | None:
        return self._running.get(key)

    def release_later(self, layer: Layer) -> None:
        """Queue the release of a layer to the store in `foreign`."""
        self.foreign.later(partial(self.store.release, layer), "releasing a layer failed")

    @trio.lowlevel.enable_ki_protection
    def start(
        self,
        key: bytes,
        work: Work,
        *,
        name: str,
        builds_on: Sequence[Transfer],
        close: Callable[[], None],
        needs_slot: bool,
    ) -> Transfer:
        """Start a transfer; the caller must `~Transfer.watch` it before the next checkpoint.

        Args:
            key: The key by which others find it, until it has ended.
            work: The work of the transfer.
            name: The ID of its source, for the task's name, the repr and the log.
            builds_on: The transfers that it watches until it has ended or been cancelled.
            close: Called in the step in which it ends.
            needs_slot: Whether it moves data.

        Raises:
            ManagerClosed: if the manager has been left.
        """
        if self._nursery is None:
            raise manager_closed()
        transfer = Transfer(self, key, name, builds_on, close)
        self._running[key] = transfer
        if not needs_slot:
            transfer.inactive.set()
        elif not self.slots.ask(transfer):
            transfer.report(Status.WAITING)
        self._nursery.start_soon(transfer._run, work, name=f"transfer {name}")
        return transfer

    def drop(self, key: bytes) -> None:
        del self._running[key]

    @trio.lowlevel.enable_ki_protection
    def close(self) -> None:
        """Cancel all running transfers, and start no more."""
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
            self._nursery = None
