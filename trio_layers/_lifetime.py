"""The lifetime of an object with a block: open, closing, closed, and nothing else.

Every public async method of such an object runs inside `Lifetime.use`. Leaving the block calls
`Lifetime.close`, which cancels each call under way, in whichever task it runs, and waits for its
end. Only then does the block close its resources, so no call ever meets a closed connection.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import final

import trio

from ._blocks import opens_block
from ._errors import LayersError
from ._nursery import interruption_in, raise_alone

__all__ = ["Lifetime"]


@final
class Lifetime:
    """Counts the calls under way on one object, and ends them when its block is left.

    Args:
        error: Makes the error that a call on the closed object raises, and that a call under way
            raises when the block is left. A new object for each call.
    """

    def __init__(self, error: Callable[[], LayersError]) -> None:
        self._error = error
        self._open = True
        self._calls: dict[trio.CancelScope, None] = {}
        self._quiet = trio.Event()

    def __repr__(self) -> str:
        state = "open" if self._open else "closing" if self._calls else "closed"
        return f"<Lifetime: {state}, {len(self._calls)} calls>"

    @property
    def is_open(self) -> bool:
        return self._open

    def check(self) -> None:
        """Raise the error of a closed object, unless this one is open."""
        if not self._open:
            raise self._error()

    @opens_block
    async def use(self) -> AsyncIterator[None]:
        """Run one call in the block. `close` cancels it, and it raises the error of a closed
        object then. A call may contain others on the same object.

        The body of a public context manager, which is the caller's code, does not belong in
        here: only its entry does.

        Cancellation: a caller that is itself cancelled gets `trio.Cancelled`, not the error.
        """
        self.check()
        interruption: BaseException | None = None
        with trio.CancelScope() as scope:
            self._calls[scope] = None
            try:
                yield
            except BaseExceptionGroup as group:
                # Libraries, and trio's own connecting, have nurseries that callers do not know of.
                interruption = interruption_in(group)
                if interruption is None:
                    raise
            finally:
                del self._calls[scope]
                if not self._open and not self._calls:
                    self._quiet.set()
        if interruption is not None:
            raise_alone(interruption)
        if scope.cancelled_caught:
            await trio.lowlevel.checkpoint_if_cancelled()
            raise self._error() from None

    async def close(self) -> None:
        """Take no more calls, cancel those under way, and wait until they have ended.

        The wait is shielded, and has no deadline: the calls use the resources that the block
        closes next. Every step of a call is cancellable or short.
        """
        self._open = False
        for scope in tuple(self._calls):
            scope.cancel()
        if self._calls:
            with trio.CancelScope(shield=True):
                await self._quiet.wait()
