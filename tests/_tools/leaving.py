"""Ends an object's block at an exact moment of another task's call."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import TypeVar

import trio

from .moments import Countdown, moments
from .processes import list_children

__all__ = ["Discard", "assert_nothing_left", "leave_at", "no_descriptor_left", "no_process_left"]

T = TypeVar("T")

LIMIT = 20
"""The time limit in seconds. The rule is one second, but a loaded machine may need more."""


async def leave_at(
    block: AbstractAsyncContextManager[T],
    call: Callable[[T], Awaitable[object]],
    at: int,
    expected: type[Exception],
) -> tuple[bool, str | None]:
    """End an object's block at a moment of another task's call.

    Args:
        block: Opens the object.
        call: Makes one or more calls on the object.
        at: The moment, counted from 1, of the call's task and its child tasks.
        expected: The type of the only error that the call may raise.

    Returns:
        Whether the call lasted until that moment, and the name of the error it raised.
    """
    error: str | None = None
    countdown: Countdown | None = None
    with no_process_left(), trio.fail_after(LIMIT):
        async with trio.open_nursery() as outside:
            over, left = trio.Event(), trio.CancelScope()

            async def use(thing: T) -> None:
                nonlocal error, countdown
                task = trio.lowlevel.current_task()
                with moments(left, at, of=task, below=True) as countdown:
                    try:
                        await call(thing)
                    except expected as caught:
                        error = type(caught).__name__
                over.set()

            async with block as thing:
                outside.start_soon(use, thing)
                with left:
                    await over.wait()
    assert countdown is not None
    return countdown.left <= 0, error


class Discard(trio.abc.SendStream):
    """Takes any bytes, with a checkpoint for each call."""

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def no_descriptor_left() -> AsyncIterator[None]:
    """Check that the block closes each descriptor that it opens."""
    before = _descriptors()
    yield
    assert _descriptors() == before


def _descriptors() -> dict[str, str]:
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            pass  # listdir()'s own descriptor is closed by now
    return found


def assert_nothing_left(store: Path) -> None:
    """Check that a store has no leases, and no temporary files but partial downloads."""
    with closing(sqlite3.connect(store / "catalog.sqlite")) as connection:
        assert connection.execute("SELECT * FROM leases").fetchall() == []
    assert os.listdir(store / "leases") == []
    left = [path.name for path in (store / "ingest").iterdir() if path.suffix != ".partial"]
    assert left == []


@contextmanager
def no_process_left() -> Iterator[None]:
    """Check that the block ends each process that it starts."""
    before = list_children(os.getpid())
    yield
    assert list_children(os.getpid()) <= before
