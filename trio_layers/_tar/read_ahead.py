"""Runs an iterator ahead in its own thread, so that one large layer uses two cores."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Generic, TypeVar, final

if TYPE_CHECKING:
    from queue import SimpleQueue

__all__ = ["ReadAhead"]

_T = TypeVar("_T")

# The most items that wait for the consumer.
_MAX_QUEUED: Final = 8


@final
class ReadAhead(Generic[_T]):
    """Iterates over ``items`` in its own thread and yields them in the caller's.

    An exception of the iteration is raised to the caller after the items. The caller must call
    `close`, which waits for the thread.
    """

    def __init__(self, items: Iterator[_T]) -> None:
        self._items = items
        self._results: SimpleQueue[tuple[_T] | BaseException] = queue.SimpleQueue()
        self._free_places = threading.Semaphore(_MAX_QUEUED)
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[_T]:
        while True:
            result = self._results.get()
            if isinstance(result, BaseException):
                if isinstance(result, StopIteration):
                    return
                raise result
            self._free_places.release()
            yield result[0]

    def close(self) -> None:
        """End the iteration at its next item, and wait for the thread."""
        self._closed = True
        self._free_places.release()
        self._thread.join()

    def _run(self) -> None:
        end: BaseException = StopIteration()
        try:
            for item in self._items:
                self._results.put((item,))
                self._free_places.acquire()
                if self._closed:
                    break
        except BaseException as error:  # __iter__ raises it to the consumer
            end = error
        self._results.put(end)
