"""The command line: arguments, signals, exit codes. What is done is in `_commands`."""

from __future__ import annotations

import argparse
import logging
import os
import queue
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Final, final

import trio

from ._commands import COMMANDS, EXIT_FAILED
from ._errors import LayersError
from ._nursery import leaves_of, open_hidden_nursery
from ._output import Output
from ._printable import printable
from ._stdio import PROGRAM, complain
from ._version import __version__

__all__ = ["main"]

EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
PATIENCE: Final = 1.0
"""Seconds for writing the rest of the log of a cancelled command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done; for ``mount``, which nothing else ends, also at Ctrl-C and SIGTERM. 1: failed, and
    stderr says why, one line for each thing that failed. 130: interrupted, by Ctrl-C; 143 by
    SIGTERM. A usage error leaves by ``SystemExit(2)``, as argparse does.

    Args:
        argv: The arguments; ``None``: the process's own.
    """
    signals = _Signals()
    try:
        arguments = _parser().parse_args(argv)
        with signals.restored():
            code = trio.run(_until_signal, arguments, signals)
        stdout = sys.stdout
        if stdout is not None and not stdout.closed:  # None: closed at the program's start
            stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our result has left
        return _nobody_reads()
    except KeyboardInterrupt:
        return signals.code or EXIT_INTERRUPTED
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt) is None:
            raise
        return signals.code or EXIT_INTERRUPTED  # the second signal, in a group with other errors


def _nobody_reads() -> int:
    try:
        sys.stdout.close()  # otherwise the interpreter prints an error at its exit
    except BrokenPipeError:
        pass
    return EXIT_FAILED


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


async def _until_signal(arguments: argparse.Namespace, signals: _Signals) -> int:
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
            code = await _run_command(arguments)
        nursery.cancel_scope.cancel()
    return code if signals.code is None else signals.code


async def _run_command(arguments: argparse.Namespace) -> int:
    """Run the command, and print its errors on stderr."""
    run: Callable[[argparse.Namespace], Awaitable[int]] = arguments.run
    try:
        return await run(arguments)
    except BrokenPipeError:  # the reader of our output is gone
        return _nobody_reads()
    except (LayersError, OSError) as error:
        errors: list[BaseException] = [error]
    except BaseExceptionGroup as group:
        if group.split((LayersError, OSError))[1] is not None:
            raise
        errors = list(leaves_of(group))
    for each in errors:
        await complain(each)
    return EXIT_FAILED


class _LogFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


@final
class _LogWriter(logging.Handler):
    """A log handler that writes in a thread, as terminals can block."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self.setFormatter(_LogFormatter("%(asctime)s %(name)s: %(message)s"))
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


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="show the log")
    with_store = argparse.ArgumentParser(add_help=False)
    with_store.add_argument(
        "--store",
        metavar="DIR",
        default=_default_store(),
        help="where the images are (default: %(default)s; $TRIO_LAYERS_STORE names another)",
    )
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Pull container images, without a daemon.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            parents=[with_store, common] if command.has_store else [common],
            allow_abbrev=False,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run, default_store=_default_store())
    return parser


def _default_store() -> str:
    if store := os.environ.get("TRIO_LAYERS_STORE"):
        return store
    if os.geteuid() == 0:
        return "/var/lib/trio-layers"
    # XDG Base Directory Specification: unset, empty and relative paths count for nothing.
    data = os.environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(data):
        data = os.path.expanduser("~/.local/share")
    return os.path.join(data, "trio-layers")
