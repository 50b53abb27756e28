"""The command line: arguments, signals, exit codes. What is done is in `_commands`."""

from __future__ import annotations

import argparse
import logging
import os
import queue
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import trio

from ._commands import COMMANDS, EXIT_FAILED, PROGRAM, complain, shown
from ._errors import LayersError
from ._nursery import open_hidden_nursery
from ._version import __version__

__all__ = ["main"]

EXIT_INTERRUPTED: Final = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done; for ``mount``, which nothing else ends, also at Ctrl-C and SIGTERM. 1: failed, and
    stderr says why, one line for each thing that failed. 130: interrupted, by Ctrl-C; 143 by
    SIGTERM. A usage error leaves by ``SystemExit(2)``, as argparse does.

    Args:
        argv: The arguments; ``None``: the process's own.
    """
    try:
        arguments = _parser().parse_args(argv)
        with _logging(arguments.verbose):
            code = trio.run(_until_signal, arguments)
        stdout = sys.stdout
        if stdout is not None:  # it may be closed from the start
            stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our result has left
        try:
            sys.stdout.close()  # otherwise the interpreter complains at its exit
        except BrokenPipeError:
            pass
        return EXIT_FAILED
    except (LayersError, OSError) as error:
        complain(error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt) is not None:
            return EXIT_INTERRUPTED  # the second Ctrl-C, with what it broke
        if group.split((LayersError, OSError))[1] is not None:
            raise
        for leaf in _leaves(group):
            complain(leaf)
        return EXIT_FAILED


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error


async def _until_signal(arguments: argparse.Namespace) -> int:
    """Run the command; the first signal cancels it, so that everything is left in order."""
    run: Callable[[argparse.Namespace], Awaitable[int]] = arguments.run
    code = EXIT_FAILED

    async def watch(task_status: trio.TaskStatus[None]) -> None:
        nonlocal code
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                code = 128 + number
                break
        nursery.cancel_scope.cancel()

    async with open_hidden_nursery() as nursery:
        await nursery.start(watch)
        code = await run(arguments)
        nursery.cancel_scope.cancel()
    return code


class _LogFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(shown, super().format(record).split("\n")))


@contextmanager
def _logging(verbose: bool) -> Iterator[None]:
    """Show the library's log on stderr, by a thread: a slow terminal must not hold trio up."""
    if not verbose:
        yield
        return
    # Those who want no log need not wait for what this imports.
    from logging.handlers import QueueHandler, QueueListener

    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    stderr = logging.StreamHandler()
    stderr.setFormatter(_LogFormatter("%(asctime)s %(name)s: %(message)s"))
    listener = QueueListener(lines, stderr)
    handler = QueueHandler(lines)
    logger = logging.getLogger("trio_layers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    listener.start()
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        listener.stop()


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
