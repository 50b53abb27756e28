"""Cancellation at exact moments: where the scheduler begins or ends a step of a task.

Cancelled at the end of a step, a task is cancelled in what it has just begun to wait for. Cancelled
at the beginning of one, it has got what it waited for, and hears of the cancellation at its next
checkpoint. What is right for the one may be wrong for the other.
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
    """To the moment of a cancellation.

    Attributes:
        scope: What is cancelled then.
        left: How many moments are left; it has come if that is 0 or less.
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
        scope: What to cancel.
        at: The how manieth moment it is, counted from 1; or `NEVER`.
        of: Whose moments count; ``None``: those of the task that is here.
        below: Whether the moments of the tasks in its nurseries, and in theirs, count too.
    """
    countdown = Countdown(scope, at)
    instrument = _Moments(of or trio.lowlevel.current_task(), countdown, below=below)
    trio.lowlevel.add_instrument(instrument)
    try:
        yield countdown
    finally:
        trio.lowlevel.remove_instrument(instrument)
