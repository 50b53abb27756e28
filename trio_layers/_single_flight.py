"""One task fetches a value for all tasks that need it at the same time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar, final

import attrs
import trio

from ._errors import LayersError

__all__ = ["SingleFlight"]

T = TypeVar("T")


@final
@attrs.define(eq=False)
class SingleFlight(Generic[T]):
    """A shared value: the holder of the lock fetches it, and the other tasks wait for it.

    Attributes:
        value: The value fetched last; a caller with newer knowledge may set it to ``None``.
    """

    value: T | None = attrs.field(default=None, repr=False)
    _lock: trio.Lock = attrs.field(factory=trio.Lock, init=False)
    _rounds: int = attrs.field(default=0, init=False)
    _error: LayersError | None = attrs.field(default=None, init=False)

    @property
    def busy(self) -> bool:
        """Whether a task fetches the value, or waits for it."""
        return self._lock.locked()

    async def get(self, good: Callable[[T], bool], fetch: Callable[[], Awaitable[T]]) -> T:
        """Return the value if it is still good; otherwise fetch a new one.

        One call of ``fetch`` serves all tasks that wait meanwhile, also if it fails with a
        `LayersError`.

        Cancellation: if the fetching task is cancelled, another waiting task fetches the value.
        """
        rounds = self._rounds
        async with self._lock:
            others = self._rounds != rounds
            if self.value is not None and (others or good(self.value)):
                return self.value
            if others and self._error is not None:
                raise self._error.copy_to_raise() from self._error
            self._error = None
            try:
                value = await fetch()
            except LayersError as error:
                self._rounds += 1
                self.value, self._error = None, error
                raise
            self._rounds += 1
            self.value = value
            return value
