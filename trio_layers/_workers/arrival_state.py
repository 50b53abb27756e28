"""Reads a blob's file while the blob arrives.

The download only sets the number of bytes in the file, and never waits. The worker that reads the
file waits for more bytes. If the worker is another process, that process has a copy of the state.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, final

from .._digest import Digest
from .._manifest import Descriptor

__all__ = [
    "Abandoned",
    "ArrivalState",
    "Follower",
    "Recalled",
    "Snapshot",
    "StartedOver",
    "WorkerLost",
]


class StartedOver(Exception):
    """The download has started over, so the file must be read again from the start."""


class Abandoned(Exception):
    """The tree is not needed any more."""


class Recalled(Exception):
    """Another stage needs the worker.

    The stage starts over later, from the bytes on the disk.
    """


class WorkerLost(Exception):
    """The worker died or does not answer.

    Another worker starts over, from the bytes on the disk.
    """


class Snapshot(NamedTuple):
    """The value of an `ArrivalState` at one moment.

    Attributes:
        size: The number of bytes in the file.
        attempt: The number of times that the download has started over.
        complete: Whether all bytes are in the file and verified.
        abandoned: Whether the tree is not needed any more.
    """

    size: int = 0
    attempt: int = 0
    complete: bool = False
    abandoned: bool = False


@final
class ArrivalState:
    """The number of bytes in a blob's file, and whether that is all. Safe for threads.

    Only the methods `wait` and `wait_complete` block.

    Attributes:
        checks: Number of checks for cancellation by a reader. While this number grows, the reader
            is alive.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._snapshot = Snapshot()
        self._listener: Callable[[Snapshot], None] | None = None
        self._waiting = 0
        self.checks: int = 0

    @property
    def snapshot(self) -> Snapshot:
        """The present value."""
        return self._snapshot

    def is_waiting(self) -> bool:
        """Return whether a reader waits for bytes that have not arrived."""
        return self._waiting > 0

    @property
    def attempt(self) -> int:
        """The number of times that the download has started over."""
        return self._snapshot.attempt

    def grow(self, size: int) -> None:
        """Record that the file has ``size`` bytes."""
        with self._changed:
            self._set(self._snapshot._replace(size=size))

    def mark_complete(self) -> None:
        """Record that all bytes are in the file and verified."""
        with self._changed:
            self._set(self._snapshot._replace(complete=True))

    def start_over(self) -> None:
        """Record that the download starts over. Call this before changing the file."""
        with self._changed:
            old = self._snapshot
            self._set(Snapshot(attempt=old.attempt + 1, abandoned=old.abandoned))

    def abandon(self) -> None:
        """Record that the tree is not needed any more."""
        with self._changed:
            self._set(self._snapshot._replace(abandoned=True))

    def copy(self, snapshot: Snapshot) -> None:
        """Take over the value of another state."""
        with self._changed:
            self._set(snapshot)

    def copy_unless_abandoned(self, snapshot: Snapshot) -> None:
        """Take over the value of another state, but stay abandoned."""
        with self._changed:
            abandoned = snapshot.abandoned or self._snapshot.abandoned
            self._set(snapshot._replace(abandoned=abandoned))

    def set_listener(self, listener: Callable[[Snapshot], None] | None) -> None:
        """Call ``listener`` with the present value, and at each change.

        The thread that makes the change calls it, so it must not wait.
        """
        with self._changed:
            self._listener = listener
            self._set(self._snapshot)

    def _set(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._changed.notify_all()
        if self._listener is not None:
            self._listener(snapshot)

    def check(self, attempt: int) -> None:
        """Raise if the bytes that were read in this attempt are useless by now."""
        self.checks += 1
        if self._snapshot.abandoned:
            raise Abandoned
        if self._snapshot.attempt != attempt:
            raise StartedOver

    def wait_complete(self, attempt: int) -> None:
        """Wait until all bytes are in the file and verified.

        Raises:
            StartedOver, Abandoned: if the wait has become useless.
        """
        with self._changed:
            while True:
                self.check(attempt)
                if self._snapshot.complete:
                    return
                self._wait()

    def wait(self, position: int, attempt: int) -> int:
        """Wait for more than ``position`` bytes, or for the end; return the number of bytes.

        Raises:
            StartedOver, Abandoned: if the wait has become useless.
        """
        with self._changed:
            while True:
                self.check(attempt)
                if self._snapshot.size > position or self._snapshot.complete:
                    return self._snapshot.size
                self._wait()

    def _wait(self) -> None:
        self._waiting += 1
        try:
            self._changed.wait()
        finally:
            self._waiting -= 1


@final
class Follower:
    """Reads a blob's file as it grows. Its methods block, for one worker.

    Args:
        path: The file.
        state: The state of the arrival.
        descriptor: The descriptor of the complete blob.
        report: Called with the number of bytes read, after each read.

    Attributes:
        failure: The error of the source; always ``None``, since this source only has errors that
            end the work.
    """

    def __init__(
        self,
        path: Path,
        state: ArrivalState,
        descriptor: Descriptor,
        report: Callable[[int], object],
    ) -> None:
        self.failure: Exception | None = None
        self._position = 0
        self._report = report
        self._descriptor = descriptor
        self._state = state
        self._attempt = state.attempt
        self._file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def read(self, size: int) -> bytes:
        """Return at most ``size`` bytes; ``b""`` at the end."""
        there = self._state.wait(self._position, self._attempt) - self._position
        data = os.pread(self._file, min(size, there), self._position) if there else b""
        # The download may have truncated the file and started over before this read. A worker
        # process may not have received this news yet, but it receives it before the news that the
        # new attempt is complete.
        self._state.check(self._attempt)
        if there and not data:
            raise StartedOver
        self._position += len(data)
        self._report(self._position)
        return data

    def check(self) -> None:
        """Raise if the tree is not needed any more."""
        self._state.check(self._attempt)

    def finish(self) -> tuple[Digest, int]:
        """Wait until the blob is complete and verified; return its digest and size."""
        self._state.wait_complete(self._attempt)
        return self._descriptor.digest, self._descriptor.size
