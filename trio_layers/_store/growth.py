"""A blob that is read while it arrives.

Its writer only says how far it is, and never waits; the worker thread that reads waits for more.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self, final

from .._digest import Digest
from .._manifest import Descriptor

__all__ = ["Abandoned", "Follower", "Growth", "StartedOver"]


class StartedOver(Exception):
    """What was read is of an attempt that was given up: read again, from the start."""


class Abandoned(Exception):
    """Nobody wants what is being made of the bytes any more."""


@final
class Growth:
    """How much of a file is there, and whether that is all. For any thread; nothing here waits
    but `wait`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._size = 0
        self._complete = False
        self._abandoned = False
        self._attempt = 0

    @property
    def attempt(self) -> int:
        """How often it was started over."""
        return self._attempt

    def grow(self, size: int) -> None:
        """The first ``size`` bytes are there."""
        with self._changed:
            self._size = size
            self._changed.notify_all()

    def complete(self) -> None:
        """All is there, and is what it should be."""
        with self._changed:
            self._complete = True
            self._changed.notify_all()

    def start_over(self) -> None:
        """Nothing is there any more. To be called before the file is touched."""
        with self._changed:
            self._size = 0
            self._complete = False
            self._attempt += 1
            self._changed.notify_all()

    def abandon(self) -> None:
        """Nobody wants it any more."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def check(self, attempt: int) -> None:
        """Raise if what was read in this attempt is of no use any more."""
        if self._abandoned:
            raise Abandoned
        if self._attempt != attempt:
            raise StartedOver

    def wait_complete(self, attempt: int) -> None:
        """Wait until all is there.

        Raises:
            StartedOver, Abandoned: if there is nothing to wait for any more.
        """
        with self._changed:
            while not self._complete:
                self.check(attempt)
                self._changed.wait()

    def wait(self, position: int, attempt: int) -> int:
        """Wait until more than ``position`` bytes are there, or all are; return how many.

        Raises:
            StartedOver, Abandoned: if there is nothing to wait for any more.
        """
        with self._changed:
            while True:
                self.check(attempt)
                if self._size > position or self._complete:
                    return self._size
                self._changed.wait()


@final
class Follower:
    """Reads a file as it grows. Blocking: for one worker thread.

    Attributes:
        position: How many bytes were read.
        failure: What reading has failed with: nothing, but what ends all this.
    """

    def __init__(self, path: Path, growth: Growth, descriptor: Descriptor) -> None:
        self.position = 0
        self.failure: Exception | None = None
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
        there = self._growth.wait(self.position, self._attempt) - self.position
        data = os.pread(self._file, min(size, there), self.position) if there else b""
        # The file may have been cut off, and begun anew, before it was read.
        self._growth.check(self._attempt)
        self.position += len(data)
        return data

    def check(self) -> None:
        """Raise if nobody wants what is made of the bytes any more."""
        self._growth.check(self._attempt)

    def finish(self) -> tuple[Digest, int]:
        """Wait until all is there; it has been verified then."""
        self._growth.wait_complete(self._attempt)
        return self._descriptor.digest, self._descriptor.size
