"""Text for a stream that may take no more: a pipe that nobody reads, a stopped terminal.

Threads write, and a thread that is stuck is left behind. It holds no lock of the stream's buffer,
which Python needs at its exit: where the stream is a file, the buffer is passed by.
"""

from __future__ import annotations

import errno
import io
import os
import select
import threading
from collections.abc import Callable
from typing import TextIO, final

import trio

__all__ = ["Output", "write_all", "write_text"]


@final
class Output:
    """A text stream that threads write to, one call at a time.

    `write`, `flush` and the properties are for code in those threads, such as rich's.

    Args:
        stream: It is not closed.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._file = _own_file(stream)
        self._flushed = False
        # A limiter of its own: other work may hold all the usual threads.
        self._limiter = trio.CapacityLimiter(1)
        self._lock = threading.Lock()
        self._busy = False
        self._left = False

    async def in_thread(self, call: Callable[[], object]) -> None:
        """Make a call that writes. Cancelled, it goes on in its thread, which nobody waits for."""
        await trio.to_thread.run_sync(
            self._call, call, abandon_on_cancel=True, limiter=self._limiter
        )

    def leave(self) -> None:
        """Let go of the stream; a thread that is still stuck does so when it comes back."""
        with self._lock:
            self._left = True
            if not self._busy:
                self._release()

    def _call(self, call: Callable[[], object]) -> None:
        with self._lock:
            if self._left:
                return
            self._busy = True
        try:
            call()
        finally:
            self._come_back()

    def _come_back(self) -> None:
        with self._lock:
            self._busy = False
            if self._left:
                self._release()

    def _release(self) -> None:
        if self._file is not None:
            self._file.close()

    # For code in the threads.

    @property
    def encoding(self) -> str:
        return self._stream.encoding

    @property
    def closed(self) -> bool:
        return self._stream.closed

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        if self._file is None:
            return self._stream.write(text)
        if not self._flushed:
            self._stream.flush()  # what others have written comes first
            self._flushed = True
        if self._stream.closed:
            raise ValueError("write to closed file")
        write_all(self._file, text.encode(self._stream.encoding, self._stream.errors or "strict"))
        return len(text)

    def flush(self) -> None:
        if self._file is None:
            self._stream.flush()


async def write_text(stream: TextIO | None, text: str) -> None:
    """Write text to standard output or error, wherever these go.

    Cancellation: part of the text may be written, or may be written later.
    """
    if stream is None:  # Python has none where the descriptor is closed
        await trio.lowlevel.checkpoint()
        return
    output = Output(stream)

    def write() -> None:
        output.write(text)
        output.flush()

    try:
        await output.in_thread(write)
    finally:
        output.leave()


def write_all(file: io.FileIO, data: bytes | bytearray | memoryview) -> None:
    """Write all bytes, also to a file that others have made non-blocking."""
    rest = memoryview(data)
    while rest:
        written = file.write(rest)
        if written is None:
            poll = select.poll()
            poll.register(file, select.POLLOUT)
            poll.poll()
        else:
            rest = rest[written:]


def _own_file(stream: TextIO) -> io.FileIO | None:
    """A descriptor of our own for the file under a text stream of Python's; ``None`` for others."""
    # What derives from it may do something else with the text.
    if type(stream) is not io.TextIOWrapper:
        return None
    try:
        return io.FileIO(os.dup(stream.fileno()), "wb")
    except (ValueError, OSError) as error:  # closed, or no file
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return None
