"""Runs an asynchronous command under trio: signals, the log, and errors."""

from __future__ import annotations

import argparse
import logging
import queue
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, TypeAlias, final

import trio

from .._errors import LayersError
from .._nursery import leaves_of, open_hidden_nursery
from .._output import Output
from .logs import LogFormatter
from .messages import EXIT_FAILED, EXIT_INTERRUPTED, close_stdout
from .stdio import print_error

__all__ = ["PATIENCE", "run"]

PATIENCE: Final = 1.0
"""Seconds for writing the rest of the log of a cancelled command."""

_Run: TypeAlias = Callable[[argparse.Namespace], Awaitable[int]]


def run(command: _Run, arguments: argparse.Namespace) -> int:
    """Run a command, and return its exit code; see `_cli.main`."""
    signals = _Signals()
    try:
        with signals.restored():
            return trio.run(_until_signal, command, arguments, signals)
    except KeyboardInterrupt:
        return signals.code or EXIT_INTERRUPTED
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt) is None:
            raise
        return signals.code or EXIT_INTERRUPTED  # the second signal, in a group with other errors


@final
class _Signals:
    """Signal handlers: the first signal cancels, the second interrupts the clean-up.

    Attributes:
        code: The exit code for the first signal; ``None`` before any signal.
    """

    def __init__(self) -> None:
        self.code: int | None = None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the previous SIGTERM handler at the end of the block."""
        before = signal.getsignal(signal.SIGTERM)
        try:
            yield
        finally:
            if self.code is not None:
                signal.signal(signal.SIGTERM, before)

    async def wait(self, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                self.code = 128 + number
                break
        interrupt = signal.getsignal(signal.SIGINT)
        if callable(interrupt):  # trio's handler, unless SIGINT is ignored
            signal.signal(signal.SIGTERM, lambda number, frame: interrupt(signal.SIGINT, frame))


async def _until_signal(command: _Run, arguments: argparse.Namespace, signals: _Signals) -> int:
    """Run the command until its end or the first signal.

    The signal cancels the command, and the command's clean-up still runs.
    """
    code = EXIT_FAILED

    async def watch(task_status: trio.TaskStatus[None]) -> None:
        await signals.wait(task_status)
        nursery.cancel_scope.cancel()

    async with open_hidden_nursery() as nursery:
        await nursery.start(watch)
        async with _logging(arguments.verbose):
            code = await _run_command(command, arguments)
        nursery.cancel_scope.cancel()
    return code if signals.code is None else signals.code


async def _run_command(command: _Run, arguments: argparse.Namespace) -> int:
    """Run the command, and print its errors on stderr."""
    try:
        return await command(arguments)
    except BrokenPipeError:  # the reader of our output is gone
        return close_stdout()
    except (LayersError, OSError) as error:
        errors: list[BaseException] = [error]
    except BaseExceptionGroup as group:
        if group.split((LayersError, OSError))[1] is not None:
            raise
        errors = list(leaves_of(group))
    for each in errors:
        await print_error(each)
    return EXIT_FAILED


@final
class _LogWriter(logging.Handler):
    """A log handler that writes in a thread, as terminals can block."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self.setFormatter(LogFormatter())
        self._output = output
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put(self.format(record) + "\n")

    def finish(self) -> None:
        """Tell the writing thread that no more records will come."""
        self._lines.put(None)

    def write(self) -> None:
        """Write records until `finish`. For a worker thread."""
        while (line := self._lines.get()) is not None:
            try:
                self._output.write(line)
                self._output.flush()
            except (OSError, ValueError):
                pass  # the log's reader is gone


@asynccontextmanager
async def _logging(verbose: bool) -> AsyncIterator[None]:
    """Write the library's log to stderr. Leaving waits until all is written."""
    stderr = sys.stderr
    if not verbose or stderr is None:
        yield
        return
    output = Output(stderr)
    handler = _LogWriter(output)
    logger = logging.getLogger("trio_layers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    # A terminal may accept no more text, so a cancelled command waits at most `PATIENCE` seconds
    # for the log.
    shield = trio.CancelScope(shield=True)
    written = trio.Event()

    async def write() -> None:
        with shield:
            await output.in_thread(handler.write)
        written.set()

    try:
        async with open_hidden_nursery() as nursery:
            nursery.start_soon(write)
            try:
                yield
                handler.finish()
                await written.wait()
            except BaseException:
                shield.deadline = trio.current_time() + PATIENCE
                raise
            finally:
                handler.finish()
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        output.leave()
