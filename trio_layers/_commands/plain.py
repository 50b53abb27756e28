"""Runs a command that does not need trio, and prints its lines."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, TextIO

from .._errors import LayersError
from .._streams import TextFile
from .messages import EXIT_FAILED, EXIT_INTERRUPTED, close_stdout, error_line

__all__ = ["print_failure", "print_lines", "run"]


class _Terminated(BaseException):
    """The process was asked to end by SIGTERM."""


def run(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command, and return its exit code; see `_cli.main`."""
    try:
        with _sigterm_raises(), _logging(arguments.verbose):
            return command(arguments)
    except BrokenPipeError:  # the reader of our output is gone
        return close_stdout()
    except (LayersError, OSError) as error:
        print_failure(error)
        return EXIT_FAILED
    except _Terminated:
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def print_lines(lines: Iterable[str]) -> None:
    """Write lines to stdout."""
    text = "".join(f"{line}\n" for line in lines)
    if text:
        _write(sys.stdout, text)


def print_failure(error: BaseException, about: str | None = None) -> None:
    """Write an error as one line to stderr."""
    with suppress(OSError, ValueError):  # stderr is broken, so there is no place for a message
        _write(sys.stderr, error_line(error, about))


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # Python sets sys.stdout and sys.stderr to None for closed descriptors
        return
    output = TextFile(stream)
    try:
        output.write(text)
        output.flush()
    finally:
        output.release()


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _logging(verbose: bool) -> Iterator[None]:
    """Write the library's log to stderr."""
    if not verbose or sys.stderr is None:
        yield
        return
    import logging  # rarely needed, so not imported at the start

    from .logs import LogFormatter

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter())
    logger = logging.getLogger("trio_layers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
