"""Public context managers: `contextlib.asynccontextmanager` with checks and Ctrl-C protection.

A wrong use, such as ``with`` or ``await``, raises an error that shows the right one. Ctrl-C never
interrupts the steps of entering or leaving.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, ParamSpec, TypeVar, final

import trio

from ._nursery import interruption_in, raise_alone

__all__ = ["check_under_trio", "opens_block"]

P = ParamSpec("P")
T = TypeVar("T")


def opens_block(
    function: Callable[P, AsyncIterator[T]],
) -> Callable[P, AbstractAsyncContextManager[T]]:
    """Turn an asynchronous generator function into a context manager function.

    Entering and leaving are protected from Ctrl-C: only a checkpoint raises `KeyboardInterrupt`.
    Entering and leaving raise `KeyboardInterrupt` and `SystemExit` alone, not in a group.
    """
    # The generator's frames need the protection, too: Ctrl-C can arrive while the manager throws
    # an exception into the generator.
    open_it = asynccontextmanager(trio.lowlevel.enable_ki_protection(function))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> AbstractAsyncContextManager[T]:
        return _Block(function.__qualname__, open_it(*args, **kwargs))

    return call


def check_under_trio() -> None:
    """Raise a `RuntimeError` unless trio runs the calling task."""
    if not trio.lowlevel.in_trio_task():
        raise RuntimeError(
            "trio_layers needs trio: run the program with trio.run(main), not with asyncio.run"
        )


@final
class _Block(AbstractAsyncContextManager[T]):
    def __init__(self, name: str, manager: AbstractAsyncContextManager[T]) -> None:
        self._name = name
        self._manager = manager

    def __repr__(self) -> str:
        return f"<block of {self._name}>"

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> T:
        check_under_trio()
        try:
            return await self._manager.__aenter__()
        except BaseExceptionGroup as group:
            interruption = interruption_in(group)
            if interruption is None:
                raise
        raise_alone(interruption)

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            return await self._manager.__aexit__(kind, raised, traceback)
        except BaseExceptionGroup as group:
            interruption = interruption_in(group)
            if interruption is None:
                raise
        raise_alone(interruption)

    # Without these methods type checkers report the wrong uses by themselves.
    if not TYPE_CHECKING:

        def __await__(self) -> NoReturn:
            self._refuse("await")

        def __enter__(self) -> NoReturn:
            self._refuse("with")

        def __exit__(self, *args: object) -> NoReturn:
            self._refuse("with")

    def _refuse(self, use: str) -> NoReturn:
        raise TypeError(
            f"{self._name} opens a block: write 'async with {self._name}(...) as ...:', not '{use}'"
        )
