"""Standard input and output of commands under trio."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Sequence
from typing import Final, final

import trio

from .._errors import LayersError
from .._output import write_text
from .._streams import write_all
from .messages import error_line, join_line, warning_line

__all__ = [
    "CHUNK",
    "Stdin",
    "Stdout",
    "archive_on_stdin",
    "print_error",
    "print_line",
    "print_lines",
    "print_warning",
    "tar_on_stdout",
]

CHUNK: Final = 1 << 20


def tar_on_stdout() -> Stdout:
    stdout = Stdout()
    if sys.stdout.isatty():
        raise LayersError(
            "stdout is a terminal: redirect it to a file or a pipe, since a tar is binary"
        )
    return stdout


def archive_on_stdin() -> Stdin:
    stdin = Stdin()
    if sys.stdin.isatty():
        raise LayersError(
            "stdin is a terminal: redirect it from the file or pipe that has the archive"
        )
    return stdin


@final
class Stdin(trio.abc.ReceiveStream):
    """Bytes from stdin, which may be a file, a pipe or a device."""

    def __init__(self) -> None:
        if sys.stdin is None:  # another file may have its descriptor by now
            raise OSError(errno.EBADF, "the stream is closed", "stdin")
        self._file = io.FileIO(sys.stdin.fileno(), "rb", closefd=False)
        self._limiter = trio.CapacityLimiter(1)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        # The writer may stop for ever. Then the thread is abandoned.
        data = await trio.to_thread.run_sync(
            self._file.read, max_bytes or CHUNK, abandon_on_cancel=True, limiter=self._limiter
        )
        if data is None:
            raise BlockingIOError(
                errno.EAGAIN, "no data is ready, and it is in non-blocking mode", "stdin"
            )
        return data

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@final
class Stdout(trio.abc.SendStream):
    """Bytes to stdout, written in a thread: trio cannot wait for every kind of file."""

    def __init__(self) -> None:
        if sys.stdout is None:  # another file may have its descriptor by now
            raise OSError(errno.EBADF, "the stream is closed", "stdout")
        self._file = io.FileIO(sys.stdout.fileno(), "wb", closefd=False)
        self._limiter = trio.CapacityLimiter(1)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        # The reader may stop for ever. Then the thread is abandoned.
        await trio.to_thread.run_sync(
            write_all, self._file, data, abandon_on_cancel=True, limiter=self._limiter
        )

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def print_line(*values: object) -> None:
    """Write a line to stdout."""
    await print_lines([join_line(*values)])


async def print_lines(lines: Sequence[str]) -> None:
    """Write lines to stdout in a thread, as the reader may stop."""
    if lines:
        await write_text(sys.stdout, "\n".join(lines) + "\n")


async def print_error(error: BaseException, about: str | None = None) -> None:
    """Write an error as one line to stderr."""
    await _complain(error_line(error, about))


async def print_warning(text: str, about: str | None = None) -> None:
    """Write a warning as one line to stderr."""
    await _complain(warning_line(text, about))


async def _complain(line: str) -> None:
    try:
        await write_text(sys.stderr, line)
    except (OSError, ValueError):
        pass  # stderr is broken, so there is no place for a message
