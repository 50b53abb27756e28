"""Standard input and output of the command line, and its messages."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Sequence
from typing import Final, final

import trio

from ._errors import LayersError, text_of
from ._output import write_all, write_text
from ._printable import printable

__all__ = [
    "CHUNK",
    "PROGRAM",
    "Stdin",
    "Stdout",
    "archive_on_stdin",
    "complain",
    "join_line",
    "say",
    "say_lines",
    "tar_on_stdout",
    "warn",
]

CHUNK: Final = 1 << 20

PROGRAM: Final = "trio-layers"


def tar_on_stdout() -> Stdout:
    stdout = Stdout()
    if sys.stdout.isatty():
        raise LayersError("a terminal is no place for a tar: redirect stdout")
    return stdout


def archive_on_stdin() -> Stdin:
    stdin = Stdin()
    if sys.stdin.isatty():
        raise LayersError("a terminal has no archive: redirect stdin")
    return stdin


@final
class Stdin(trio.abc.ReceiveStream):
    """Bytes from stdin, whatever that is."""

    def __init__(self) -> None:
        if sys.stdin is None:  # its number may be some other file's by now
            raise OSError(errno.EBADF, "it is closed", "stdin")
        self._file = io.FileIO(sys.stdin.fileno(), "rb", closefd=False)
        self._limiter = trio.CapacityLimiter(1)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        # Whoever writes it may never go on: then the thread is left behind.
        data = await trio.to_thread.run_sync(
            self._file.read, max_bytes or CHUNK, abandon_on_cancel=True, limiter=self._limiter
        )
        if data is None:
            raise BlockingIOError(errno.EAGAIN, "it does not wait", "stdin")
        return data

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@final
class Stdout(trio.abc.SendStream):
    """Bytes to stdout, which may be anything: not every file can be waited for."""

    def __init__(self) -> None:
        if sys.stdout is None:  # its number may be some other file's by now
            raise OSError(errno.EBADF, "it is closed", "stdout")
        self._file = io.FileIO(sys.stdout.fileno(), "wb", closefd=False)
        self._limiter = trio.CapacityLimiter(1)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        # Whoever reads it may never go on: then the thread is left behind.
        await trio.to_thread.run_sync(
            write_all, self._file, data, abandon_on_cancel=True, limiter=self._limiter
        )

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def say(*values: object) -> None:
    """Write a line to stdout."""
    await say_lines([join_line(*values)])


async def say_lines(lines: Sequence[str]) -> None:
    """Write lines to stdout in a thread, as the reader may stop."""
    if lines:
        await write_text(sys.stdout, "\n".join(lines) + "\n")


def join_line(*values: object) -> str:
    return " ".join(map(str, values))


async def complain(error: BaseException, about: str | None = None) -> None:
    """One line on stderr, whatever the error's text holds: parts of it come from registries."""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    else:
        text = text_of(error)
    await warn(text, about)


async def warn(text: str, about: str | None = None) -> None:
    line = ": ".join(filter(None, (PROGRAM, about, " ".join(text.split()))))
    try:
        await write_text(sys.stderr, printable(line) + "\n")
    except (OSError, ValueError):
        pass  # stderr is broken, so there is no place for a message
