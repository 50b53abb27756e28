"""Calls to foreign code: layer sources, stores, progress sinks and log handlers.

Foreign code may raise anything, even `KeyboardInterrupt`. A state change therefore only queues its
calls to foreign code, and runs the queue once the change is complete.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import final

import trio

from .._progress import Progress
from ..abc import ProgressSink

__all__ = ["ForeignCalls", "log", "run_all", "tell"]

logger = logging.getLogger("trio_layers.engine")


@final
class ForeignCalls:
    """A queue of calls to foreign code that state changes have deferred."""

    def __init__(self) -> None:
        self._calls: deque[tuple[Callable[[], object], str]] = deque()

    def later(self, call: Callable[[], object], failed: str) -> None:
        """Queue a call, with the log message for an `Exception` from it."""
        self._calls.append((call, failed))

    @trio.lowlevel.enable_ki_protection
    def run(self) -> None:
        """Run all queued calls, even if some of them fail.

        Raises:
            BaseException: the first exception that is no `Exception`, such as `KeyboardInterrupt`.
        """
        run_all(self._each())

    def _each(self) -> Iterable[Callable[[], object]]:
        while self._calls:
            call, failed = self._calls.popleft()

            def logged(call: Callable[[], object] = call, failed: str = failed) -> None:
                try:
                    call()
                except Exception as error:
                    log(logging.ERROR, "%s", failed, error=error)

            yield logged


def run_all(calls: Iterable[Callable[[], object]]) -> None:
    """Run all calls, even if some fail, then raise the first error."""
    first: BaseException | None = None
    for call in calls:
        try:
            call()
        except BaseException as error:
            if first is None:
                first = error
            else:
                first.add_note(f"and then: {type(error).__name__}")
    if first is not None:
        try:
            raise first
        finally:
            del first


def log(level: int, message: str, *args: object, error: BaseException | None = None) -> None:
    """Log a message. A failing log handler must not fail a layer."""
    try:
        logger.log(level, message, *args, exc_info=error)
    except Exception:
        pass  # the standard handlers of `logging` print their own errors


async def tell(sink: ProgressSink, event: Progress) -> None:
    """Pass an event to a progress sink, which Ctrl-C may interrupt.

    Raises:
        TypeError: if the sink is not an asynchronous function.
    """
    answer = sink(event)
    if not inspect.isawaitable(answer):
        raise TypeError(
            f"progress={_name_of(sink)} is not asynchronous: pass an async function that takes "
            "a Progress, such as send_channel.send"
        )
    try:
        await _interruptible(answer)
    finally:
        if inspect.iscoroutine(answer):
            answer.close()  # a coroutine that never began would cause a RuntimeWarning


@trio.lowlevel.disable_ki_protection
async def _interruptible(answer: Awaitable[object]) -> None:
    await answer


def _name_of(sink: object) -> str:
    name = getattr(sink, "__qualname__", None)
    return name if isinstance(name, str) else type(sink).__qualname__
