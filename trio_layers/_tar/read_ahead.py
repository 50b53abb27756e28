"""Work done ahead, in another thread, so that one large layer keeps two cores busy."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Generic, TypeVar, final

if TYPE_CHECKING:
    from queue import SimpleQueue

__all__ = ["ReadAhead"]

_T = TypeVar("_T")

# How many items there may be that nobody has taken.
_MAX_QUEUED: Final = 8


@final
class ReadAhead(Generic[_T]):
    """Iterates over ``items`` in a thread of its own, and gives what comes of it in this one: the
    items, then what the iteration raises, if it does. To be closed, which waits for the thread.
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
        """End the iteration, at its next item, and wait for that."""
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
        except BaseException as error:  # goes to who takes the items
            end = error
        self._results.put(end)
