"""Cancellation at exact moments: where the scheduler begins or ends a step of a task.

A cancellation at the end of a step ends the wait that the task has just begun. A cancellation at
the beginning of a step comes after the wait, and the task gets it at its next checkpoint. Code that
is right for one of the two may be wrong for the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import attrs
import trio

__all__ = ["NEVER", "Countdown", "moments"]

NEVER: Final = -1


@attrs.define(eq=False)
class Countdown:
    """A count of the moments before a cancellation.

    Attributes:
        scope: The scope to cancel then.
        left: Number of moments before it; 0 or less once it has come.
        frames: The functions that the task was in at that moment, the innermost first; none if
            it had just ended.
    """

    scope: trio.CancelScope
    left: int
    frames: tuple[str, ...] = ()


class _Moments(trio.abc.Instrument):
    def __init__(self, top: trio.lowlevel.Task, countdown: Countdown, *, below: bool) -> None:
        self._top = top
        self._below = below
        self._countdown = countdown

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._pass(task)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._pass(task)

    def _pass(self, task: trio.lowlevel.Task) -> None:
        if not (task is self._top or (self._below and _is_below(task, self._top))):
            return
        countdown = self._countdown
        countdown.left -= 1
        if countdown.left == 0:
            names = [frame.f_code.co_name for frame, _ in task.iter_await_frames()]
            countdown.frames = tuple(reversed(names))
            countdown.scope.cancel()


def _is_below(task: trio.lowlevel.Task, top: trio.lowlevel.Task) -> bool:
    while task.parent_nursery is not None:
        task = task.parent_nursery.parent_task
        if task is top:
            return True
    return False


@contextmanager
def moments(
    scope: trio.CancelScope, at: int, *, of: trio.lowlevel.Task | None = None, below: bool = False
) -> Iterator[Countdown]:
    """Cancel the scope at a moment that comes in the block, if it comes.

    Args:
        scope: The scope to cancel.
        at: The number of the moment, counted from 1; or `NEVER`.
        of: The task whose moments count; ``None``: the calling task.
        below: Whether the moments of the tasks in its nurseries, and in theirs, count too.
    """
    countdown = Countdown(scope, at)
    instrument = _Moments(of or trio.lowlevel.current_task(), countdown, below=below)
    trio.lowlevel.add_instrument(instrument)
    try:
        yield countdown
    finally:
        trio.lowlevel.remove_instrument(instrument)
