"""A blob that is read while it arrives.

Its writer only says how far it is, and never waits; the worker that reads waits for more. Where
that is another process, all that is said here is said there again.
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
    "StartedOver",
    "State",
    "WorkerLost",
]


class StartedOver(Exception):
    """What was read is of an attempt that was given up: read again, from the start."""


class Abandoned(Exception):
    """Nobody wants what is being made of the bytes any more."""


class Recalled(Exception):
    """Another stage needs the worker.

    The stage starts over later, from the bytes on the disk.
    """


class WorkerLost(Exception):
    """The worker died or does not answer.

    Another worker starts over, from the bytes on the disk.
    """


class State(NamedTuple):
    """What there is to say of a `ArrivalState`.

    Attributes:
        size: How many bytes are there.
        attempt: How often it was started over.
        complete: Whether all are there, and are what they should be.
        abandoned: Whether nobody wants it any more.
    """

    size: int = 0
    attempt: int = 0
    complete: bool = False
    abandoned: bool = False


@final
class ArrivalState:
    """How much of a file is there, and whether that is all. For any thread; only those of its
    methods wait that are called so.

    Attributes:
        checks: Number of checks for cancellation by a reader, which is alive while this grows.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._state = State()
        self._tell: Callable[[State], None] | None = None
        self._waiting = 0
        self.checks: int = 0

    @property
    def state(self) -> State:
        """How it stands."""
        return self._state

    def is_waiting(self) -> bool:
        """Whether a reader waits for bytes that have not arrived."""
        return self._waiting > 0

    @property
    def attempt(self) -> int:
        """How often it was started over."""
        return self._state.attempt

    def grow(self, size: int) -> None:
        """The first ``size`` bytes are there."""
        with self._changed:
            self._become(self._state._replace(size=size))

    def complete(self) -> None:
        """All is there, and is what it should be."""
        with self._changed:
            self._become(self._state._replace(complete=True))

    def start_over(self) -> None:
        """Nothing is there any more. To be called before the file is touched."""
        with self._changed:
            self._become(State(attempt=self._state.attempt + 1, abandoned=self._state.abandoned))

    def abandon(self) -> None:
        """Nobody wants it any more."""
        with self._changed:
            self._become(self._state._replace(abandoned=True))

    def become(self, state: State) -> None:
        """Be what another one is."""
        with self._changed:
            self._become(state)

    def become_unless_abandoned(self, state: State) -> None:
        """Copy the state of another growth, but stay abandoned."""
        with self._changed:
            self._become(state._replace(abandoned=state.abandoned or self._state.abandoned))

    def listen(self, tell: Callable[[State], None] | None) -> None:
        """Have ``tell`` called with how it stands, now and whenever that changes, in the thread
        that changes it; it must not wait.
        """
        with self._changed:
            self._tell = tell
            self._become(self._state)

    def _become(self, state: State) -> None:
        self._state = state
        self._changed.notify_all()
        if self._tell is not None:
            self._tell(state)

    def check(self, attempt: int) -> None:
        """Raise if what was read in this attempt is of no use any more."""
        self.checks += 1
        if self._state.abandoned:
            raise Abandoned
        if self._state.attempt != attempt:
            raise StartedOver

    def wait_complete(self, attempt: int) -> None:
        """Wait until all is there.

        Raises:
            StartedOver, Abandoned: if there is nothing to wait for any more.
        """
        with self._changed:
            while True:
                self.check(attempt)
                if self._state.complete:
                    return
                self._wait()

    def wait(self, position: int, attempt: int) -> int:
        """Wait until more than ``position`` bytes are there, or all are; return how many.

        Raises:
            StartedOver, Abandoned: if there is nothing to wait for any more.
        """
        with self._changed:
            while True:
                self.check(attempt)
                if self._state.size > position or self._state.complete:
                    return self._state.size
                self._wait()

    def _wait(self) -> None:
        self._waiting += 1
        try:
            self._changed.wait()
        finally:
            self._waiting -= 1


@final
class Follower:
    """Reads a file as it grows. Blocking: for one worker.

    Args:
        path: The file.
        growth: How much of it there is.
        descriptor: What it is when it is complete.
        report: Told how many bytes were read, after each time.

    Attributes:
        failure: What reading has failed with: nothing, but what ends all this.
    """

    def __init__(
        self,
        path: Path,
        growth: ArrivalState,
        descriptor: Descriptor,
        report: Callable[[int], object],
    ) -> None:
        self.failure: Exception | None = None
        self._position = 0
        self._report = report
        self._descriptor = descriptor
        self._growth = growth
        self._attempt = growth.attempt
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
        """At most so many bytes; none at the end."""
        there = self._growth.wait(self._position, self._attempt) - self._position
        data = os.pread(self._file, min(size, there), self._position) if there else b""
        # The file may have been cut off, and begun anew, before it was read. In another process
        # that may not be known yet; but it is before all of the new attempt is said to be there.
        self._growth.check(self._attempt)
        if there and not data:
            raise StartedOver
        self._position += len(data)
        self._report(self._position)
        return data

    def check(self) -> None:
        """Raise if nobody wants what is made of the bytes any more."""
        self._growth.check(self._attempt)

    def finish(self) -> tuple[Digest, int]:
        """Wait until all is there; it has been verified then."""
        self._growth.wait_complete(self._attempt)
        return self._descriptor.digest, self._descriptor.size
