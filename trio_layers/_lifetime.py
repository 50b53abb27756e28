"""The lifetime of an object with a block: open, closing, closed, and nothing else.

Every public async method of such an object runs inside `Lifetime.use`. Leaving the block calls
`Lifetime.close`, which cancels each call under way, in whichever task it runs, and waits for its
end. Only then does the block close its resources, so no call ever meets a closed connection.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import CoroutineType
from typing import Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar, TypeVarTuple, final

import trio

from ._blocks import opens_block
from ._errors import LayersError
from ._nursery import interruption_in, raise_alone

__all__ = ["Lifetime", "clean_up_in_thread", "while_open"]

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

Close: TypeAlias = Callable[[], Awaitable[object]]


async def clean_up_in_thread(step: Callable[[*Ts], T], *args: *Ts) -> T:
    """Run a blocking step of a clean-up in a worker thread. It is not cancelled.

    No limiter holds it back: abandoned threads may have all tokens of trio's default one, and
    a cancelled task would wait for them.
    """
    with trio.CancelScope(shield=True):
        return await trio.to_thread.run_sync(step, *args, limiter=trio.CapacityLimiter(1))
    raise AssertionError("nothing cancels the scope")


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
        self._owned: dict[object, Close] = {}
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

    @contextmanager
    def own(self, close: Close) -> Iterator[None]:
        """Have `close` call this one, too, unless the block in here ends before.

        For a resource of a caller's block, such as a lock: leaving the object's block frees it
        although the caller's block goes on.

        Args:
            close: Frees the resource. It runs when no call is under way any more, must not
                raise, and must bear to be called twice.
        """
        key = object()
        self._owned[key] = close
        try:
            yield
        finally:
            self._owned.pop(key, None)

    async def close(self) -> None:
        """Take no more calls, cancel those under way, wait until they have ended, and free what
        the object owns.

        The wait is shielded, and has no deadline: the calls use the resources that the block
        closes next. Every step of a call is cancellable or short.
        """
        self._open = False
        for scope in tuple(self._calls):
            scope.cancel()
        if self._calls:
            with trio.CancelScope(shield=True):
                await self._quiet.wait()
        with trio.CancelScope(shield=True):
            # The oldest first: it may hold others, and frees them in its own way.
            while self._owned:
                key = next(iter(self._owned))
                close = self._owned.pop(key)
                await close()


class _HasLifetime(Protocol):
    @property
    def _lifetime(self) -> Lifetime: ...


S = TypeVar("S", bound=_HasLifetime)


def while_open(
    method: Callable[Concatenate[S, P], Awaitable[T]],
) -> Callable[Concatenate[S, P], CoroutineType[object, object, T]]:
    """Run each call of an async method inside `Lifetime.use` of its object's ``_lifetime``."""

    @functools.wraps(method)
    async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        async with self._lifetime.use():
            return await method(self, *args, **kwargs)

    return call  # type: ignore[return-value]  # mypy takes it for a Coroutine
