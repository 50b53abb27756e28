"""A hidden nursery: an error inside is raised alone, not in a group."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import NoReturn, final

import trio

from ._errors import text_of

__all__ = ["interruption_in", "open_hidden_nursery", "raise_alone"]


def open_hidden_nursery() -> AbstractAsyncContextManager[trio.Nursery]:
    """Open a nursery like `trio.open_nursery` that callers need not know of.

    An exception of the body is raised unchanged, and so is a single `Exception` of a task. The
    group stays if there are several errors, or for a task's `BaseException` that is no `Exception`.
    Cancelled tasks do not count; if there is nothing else, one `trio.Cancelled` comes out. The
    nursery raises `KeyboardInterrupt` and `SystemExit` alone, from the body and from tasks (see
    `interruption_in`). Only a group that the body itself raised stays as it is, if no task failed.
    """
    return _HiddenNursery()


@final
class _HiddenNursery(AbstractAsyncContextManager[trio.Nursery]):
    # This is a class, because Ctrl-C in the code of `asynccontextmanager` would leave the nursery
    # of a generator open.

    def __init__(self) -> None:
        self._manager = trio.open_nursery()

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> trio.Nursery:
        self._nursery = await self._manager.__aenter__()
        return self._nursery

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            if raised is None or _has_cancelled(raised):
                return await self._manager.__aexit__(kind, raised, traceback)
            # trio's nursery gets cancellations only. It would format any other error, and stay
            # open if the formatting failed; it would also break up groups.
            self._nursery.cancel_scope.cancel()
            await self._manager.__aexit__(None, None, None)
            return False
        except BaseExceptionGroup as group:
            error = _what_matters(group, raised)
        if error is raised:
            del error
            return False
        try:
            raise_alone(error)
        finally:
            del error, raised  # break the reference cycle with this frame


def _what_matters(
    group: BaseExceptionGroup[BaseException], raised: BaseException | None
) -> BaseException:
    """The exception that the nursery's caller should see.

    This is a single exception of the body or a task, or a group of several.
    """
    errors = [error for error in group.exceptions if not _is_cancelled(error)]
    if raised is not None and not _has_cancelled(raised):
        if not errors:
            return raised
        group = BaseExceptionGroup(group.message, [raised, *group.exceptions])
    elif not errors:
        return _any_leaf(group)
    elif len(errors) == 1 and (errors[0] is raised or isinstance(errors[0], Exception)):
        return errors[0]
    return interruption_in(group) or group


def raise_alone(error: BaseException) -> NoReturn:
    """Raise an error out of a group, with the error's own context.

    Python would replace the context by the error that is being handled: the group, or the error of
    a body. trio's nursery restores the context in the same way.
    """
    context = error.__context__
    try:
        raise error
    finally:
        value = sys.exc_info()[1]
        assert value is not None
        value.__context__ = context
        del error, value, context  # break the reference cycle with this frame


def interruption_in(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """The first `KeyboardInterrupt` or `SystemExit` of a group, for raising alone.

    The other errors of the group become the interruption's context. If the interruption already
    has a context, the other errors become notes.
    """
    for leaf in leaves_of(group):
        if isinstance(leaf, KeyboardInterrupt | SystemExit):
            break
    else:
        return None
    others = group.split(lambda error: error is leaf)[1]
    if others is not None and others is not group:
        others = others.split(trio.Cancelled)[1]
    if others is not None:
        if leaf.__context__ is None or _is_cancelled(leaf.__context__):
            each = tuple(leaves_of(others))
            leaf.__context__ = each[0] if len(each) == 1 else others
        else:
            for error in leaves_of(others):
                leaf.add_note(f"At the same time: {type(error).__name__}: {text_of(error)}")
    return leaf


def leaves_of(error: BaseException) -> Iterator[BaseException]:
    """The errors in a group and the groups in it; of another error, itself."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from leaves_of(part)
    else:
        yield error


def _has_cancelled(error: BaseException) -> bool:
    return any(isinstance(leaf, trio.Cancelled) for leaf in leaves_of(error))


def _is_cancelled(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)


def _any_leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
