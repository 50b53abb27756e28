"""Calls to code that is not the engine's: sources, stores, sinks, handlers of the log.

Such code may fail in any way, `KeyboardInterrupt` included. A change of state therefore calls none
of it: the change notes the calls, and makes them when it is complete.
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
    """The calls that changes of state have left to make, in order."""

    def __init__(self) -> None:
        self._calls: deque[tuple[Callable[[], object], str]] = deque()

    def later(self, call: Callable[[], object], failed: str) -> None:
        """Note a call, and the words to log if it raises an `Exception`."""
        self._calls.append((call, failed))

    @trio.lowlevel.enable_ki_protection
    def run(self) -> None:
        """Make all calls, although some fail.

        Raises:
            BaseException: the first one that is no `Exception`, such as `KeyboardInterrupt`.
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
    """Make all calls, although some fail, and raise the first error then."""
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
    """Log, and go on if a handler fails: it must not decide what becomes of a layer."""
    try:
        logger.log(level, message, *args, exc_info=error)
    except Exception:
        pass  # the handlers of `logging` itself print such errors


async def tell(sink: ProgressSink, event: Progress) -> None:
    """Hand an event to a sink, which Ctrl-C may interrupt.

    Raises:
        TypeError: if the sink is no asynchronous function.
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
            answer.close()  # it may not have begun


@trio.lowlevel.disable_ki_protection
async def _interruptible(answer: Awaitable[object]) -> None:
    await answer


def _name_of(sink: object) -> str:
    name = getattr(sink, "__qualname__", None)
    return name if isinstance(name, str) else type(sink).__qualname__
