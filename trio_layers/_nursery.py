"""A nursery that does not show: what goes wrong inside comes out as itself, not in a group."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

__all__ = ["open_hidden_nursery"]


@asynccontextmanager
async def open_hidden_nursery() -> AsyncIterator[trio.Nursery]:
    """Like `trio.open_nursery`, for a nursery that callers need not know of.

    What the body raises comes out as it is, and so does a single `Exception` of a task. Where
    several things went wrong, and for a task's `BaseException` that is no `Exception`, the
    group stays. Cancelled tasks do not count; if there is nothing else, one `trio.Cancelled`
    comes out.
    """
    raised: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as error:
                raised = error
                raise
    except BaseExceptionGroup as group:
        alone = _what_matters(group, raised)
        if alone is None:
            raise
    else:
        return
    # Raised out here: inside the handler the group would become the error's context.
    try:
        raise alone
    finally:
        del alone, raised  # they hold this frame


def _what_matters(
    group: BaseExceptionGroup[BaseException], raised: BaseException | None
) -> BaseException | None:
    """The one exception of a nursery's group that its caller should see, if there is one."""
    errors = [error for error in group.exceptions if not _is_cancelled(error)]
    if not errors:
        return _any_leaf(group)
    if len(errors) == 1 and (errors[0] is raised or isinstance(errors[0], Exception)):
        return errors[0]
    return None


def _is_cancelled(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)


def _any_leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
