"""Text output to streams that may block: threads write, and a cancelled writer abandons them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TextIO, final

import trio

from ._streams import TextFile

__all__ = ["Output", "write_text"]


@final
class Output(TextFile):
    """A text stream that threads write to, one call at a time.

    The methods of `TextFile` are for code in those threads, such as rich's.

    Args:
        stream: The stream to write to. `Output` never closes it.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        # Other work may hold all tokens of trio's default limiter, so this object has its own.
        self._limiter = trio.CapacityLimiter(1)
        self._lock = threading.Lock()
        self._busy = False
        self._left = False

    async def in_thread(self, call: Callable[[], object]) -> None:
        """Run a writing function in a thread. Cancellation abandons the thread."""
        await trio.to_thread.run_sync(
            self._call, call, abandon_on_cancel=True, limiter=self._limiter
        )

    def leave(self) -> None:
        """Close our descriptor; a blocked thread closes it on its return."""
        with self._lock:
            self._left = True
            if not self._busy:
                self.release()

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
                self.release()


async def write_text(stream: TextIO | None, text: str) -> None:
    """Write text to standard output or standard error, in a thread.

    Cancellation: part of the text may be written, and an abandoned thread may write the rest later.
    """
    if stream is None:  # Python sets sys.stdout and sys.stderr to None for closed descriptors
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
