"""One task gets something for all who want it at the same time."""

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
    """A value, once there is one: whoever holds the lock fetches it, the others wait and look.

    Attributes:
        value: What was fetched last; whoever knows better may set it to ``None``.
    """

    value: T | None = attrs.field(default=None, repr=False)
    _lock: trio.Lock = attrs.field(factory=trio.Lock, init=False)
    _rounds: int = attrs.field(default=0, init=False)
    _error: LayersError | None = attrs.field(default=None, init=False)

    @property
    def busy(self) -> bool:
        """Whether somebody fetches it, or waits for that."""
        return self._lock.locked()

    async def get(self, good: Callable[[T], bool], fetch: Callable[[], Awaitable[T]]) -> T:
        """The value, if it is there and good; otherwise a new one.

        One call of ``fetch`` serves all who wait meanwhile, also if it fails with a
        `LayersError`. If the task that makes it is cancelled, another one of them makes it.
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
