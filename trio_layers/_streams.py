"""Text output to a stream's descriptor, past the stream's own buffer.

Python needs the buffer's lock when the interpreter exits, and writes the rest of the buffer then. A
write that blocks, in an unread pipe or a stopped terminal, must hold neither.
"""

from __future__ import annotations

import errno
import io
import os
import select
from typing import TextIO

__all__ = ["TextFile", "write_all"]


class TextFile:
    """A text stream to write to. If it is a file, its descriptor is used.

    Args:
        stream: The stream, which is never closed.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._file = _own_file(stream)
        self._flushed = False

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
            self._stream.flush()  # text in the stream's own buffer comes first
            self._flushed = True
        if self._stream.closed:
            raise ValueError("write to closed file")
        write_all(self._file, text.encode(self._stream.encoding, self._stream.errors or "strict"))
        return len(text)

    def flush(self) -> None:
        if self._file is None:
            self._stream.flush()

    def release(self) -> None:
        """Close our copy of the descriptor."""
        if self._file is not None:
            self._file.close()


def write_all(file: io.FileIO, data: bytes | bytearray | memoryview) -> None:
    """Write all bytes, even if another process made the file non-blocking."""
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
    """Return a copy of a text stream's file descriptor, or ``None`` without one."""
    # A subclass may change the text on its way to the file, so a subclass is not bypassed.
    if type(stream) is not io.TextIOWrapper:
        return None
    try:
        return io.FileIO(os.dup(stream.fileno()), "wb")
    except (ValueError, OSError) as error:  # the stream is closed, or has no file
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return None
