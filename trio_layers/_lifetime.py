"""The lifetime of an object with a block: open, closing or closed.

Every public async method of such an object runs inside `Lifetime.use`. Leaving the block calls
`Lifetime.close`, which cancels each running call, in any task, and waits for its end. The block
closes its resources only afterwards, so no call ever meets a closed connection.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from types import CoroutineType, TracebackType
from typing import Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar, TypeVarTuple, final

import trio

from ._blocks import check_under_trio
from ._errors import LayersError
from ._nursery import interruption_in, raise_alone

__all__ = ["Lifetime", "clean_up_in_thread", "while_open"]

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

Close: TypeAlias = Callable[[], Awaitable[object]]


async def clean_up_in_thread(step: Callable[[*Ts], T], *args: *Ts) -> T:
    """Run a blocking clean-up step in a worker thread, shielded from cancellation.

    The step has a limiter of its own. Abandoned threads may hold all tokens of trio's default
    limiter, and a shielded clean-up would then wait for these threads.
    """
    with trio.CancelScope(shield=True):
        return await trio.to_thread.run_sync(step, *args, limiter=trio.CapacityLimiter(1))
    raise AssertionError("nothing cancels the scope")


@final
class Lifetime:
    """Tracks the running calls on one object, and cancels them on closing.

    Args:
        error: Returns a new error for each call on the closed object, and for each call that was
            running when the block was left.
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
        """Raise the object's error for closed objects, unless the object is open."""
        if not self._open:
            raise self._error()

    def use(self) -> AbstractAsyncContextManager[None]:
        """Run one call on the object inside this block.

        `close` cancels the call, which then raises the error for closed objects. A call may make
        other calls on the same object.

        A public context manager puts only its entry inside this block, never its body: the body
        is the caller's code.

        Cancellation: a caller that is itself cancelled gets `trio.Cancelled`, not the error.
        """
        return _Call(self)

    def _begin(self, scope: trio.CancelScope) -> None:
        self.check()
        scope.__enter__()
        self._calls[scope] = None

    def _end(self, scope: trio.CancelScope) -> None:
        del self._calls[scope]
        if not self._open and not self._calls:
            self._quiet.set()

    @contextmanager
    def own(self, close: Close) -> Iterator[None]:
        """Let `Lifetime.close` free a resource that this block still holds.

        A caller's block may hold a resource, such as a lock, longer than the object is open.
        Leaving the object's block frees the resource although the caller's block continues.

        Args:
            close: Frees the resource. `Lifetime.close` calls this function once no other call is
                running. The function must not raise, and must allow a second call.
        """
        key = object()
        self._owned[key] = close
        try:
            yield
        finally:
            self._owned.pop(key, None)

    async def close(self) -> None:
        """Refuse new calls, cancel the running ones, and free owned resources.

        The wait for the end of the running calls is shielded and has no deadline, because these
        calls use the resources that the block closes next. Every step of a call is cancellable or
        short.
        """
        self._open = False
        for scope in tuple(self._calls):
            scope.cancel()
        if self._calls:
            with trio.CancelScope(shield=True):
                await self._quiet.wait()
        with trio.CancelScope(shield=True):
            # The oldest resource goes first: it may own younger ones and free them itself.
            while self._owned:
                key = next(iter(self._owned))
                close = self._owned.pop(key)
                await close()


@final
class _Call(AbstractAsyncContextManager[None]):
    # A class, not a generator: a pull makes hundreds of calls.

    __slots__ = ("_lifetime", "_scope")

    def __init__(self, lifetime: Lifetime) -> None:
        self._lifetime = lifetime
        self._scope = trio.CancelScope()

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> None:
        check_under_trio()
        self._lifetime._begin(self._scope)

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._lifetime._end(self._scope)
        interruption: BaseException | None = None
        if isinstance(raised, BaseExceptionGroup):
            # Libraries, and trio's own connection attempts, wrap Ctrl-C in the groups of nurseries
            # that callers do not know of.
            interruption = interruption_in(raised)
        if interruption is not None:
            self._scope.__exit__(None, None, None)
            raise_alone(interruption)
        caught = self._scope.__exit__(kind, raised, traceback)
        if self._scope.cancelled_caught:
            await trio.lowlevel.checkpoint_if_cancelled()
            raise self._lifetime._error() from None
        return caught


class _HasLifetime(Protocol):
    @property
    def _lifetime(self) -> Lifetime: ...


S = TypeVar("S", bound=_HasLifetime)


def while_open(
    method: Callable[Concatenate[S, P], Awaitable[T]],
) -> Callable[Concatenate[S, P], CoroutineType[object, object, T]]:
    """Run each call of an async method inside its object's `Lifetime.use`."""

    @functools.wraps(method)
    async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        async with self._lifetime.use():
            return await method(self, *args, **kwargs)

    return call  # type: ignore[return-value]  # mypy infers a Coroutine
