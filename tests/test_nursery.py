"""The exceptions that a hidden nursery raises."""

from __future__ import annotations

import signal

import pytest
import trio
from engine.seeds import run

from trio_layers._errors import ManagerClosed
from trio_layers._lifetime import Lifetime
from trio_layers._nursery import open_hidden_nursery


async def fail(error: BaseException) -> None:
    raise error


async def fail_when_stopped(error: BaseException) -> None:
    try:
        await trio.sleep_forever()
    finally:
        raise error


async def nested(error: BaseException, *more: BaseException) -> None:
    """Fail in an inner nursery, as a library's task may."""
    async with trio.open_nursery() as nursery:
        for each in more:
            nursery.start_soon(fail_when_stopped, each)
        await trio.testing.wait_all_tasks_blocked()
        raise error


INTERRUPTIONS = [KeyboardInterrupt(), SystemExit(3)]


def outcome(*tasks: tuple, body: BaseException | None = None) -> BaseException:
    async def main() -> None:
        async with open_hidden_nursery() as nursery:
            for task, *args in tasks:
                nursery.start_soon(task, *args)
            if body is not None:
                await trio.testing.wait_all_tasks_blocked()
                raise body
            await trio.sleep_forever()

    with pytest.raises((Exception, BaseExceptionGroup, *map(type, INTERRUPTIONS))) as caught:
        run(main)
    return caught.value


AS_THEY_ARE = pytest.mark.parametrize("error", INTERRUPTIONS, ids=["Ctrl-C", "exit"])


@AS_THEY_ARE
def test_interruption_of_a_task_comes_alone(error: BaseException) -> None:
    assert outcome((fail, error)) is error
    assert outcome((nested, error)) is error
    assert outcome(body=error) is error


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_failed_beside_an_interruption_is_its_context(kind: type[BaseException]) -> None:
    error, other = kind(), OSError("beside")
    assert outcome((fail, error), (fail_when_stopped, other)) is error
    assert error.__context__ is other
    error = kind()
    assert outcome((nested, error, other), body=None) is error
    assert error.__context__ is other
    error, another = kind(), ValueError("too")
    assert outcome((fail_when_stopped, error), (fail_when_stopped, another), body=other) is error
    assert isinstance(error.__context__, ExceptionGroup)
    assert set(error.__context__.exceptions) == {other, another}


def test_what_failed_beside_an_interruption_with_a_context_is_a_note() -> None:
    error = KeyboardInterrupt()
    error.__context__ = reason = KeyError("reason")
    assert outcome((fail, error), (fail_when_stopped, OSError("beside"))) is error
    assert error.__context__ is reason
    assert error.__notes__ == ["At the same time: OSError: beside"]


def test_two_interruptions() -> None:
    error, other = KeyboardInterrupt(), SystemExit(1)
    raised = outcome((fail_when_stopped, other), body=error)
    assert {raised, raised.__context__} == {error, other}


def test_two_errors_stay_a_group() -> None:
    error, other = OSError("one"), ValueError("two")
    raised = outcome((fail_when_stopped, other), body=error)
    assert isinstance(raised, ExceptionGroup)
    assert set(raised.exceptions) == {error, other}
    raised = outcome((fail, error), (fail_when_stopped, other))
    assert isinstance(raised, ExceptionGroup)


def test_one_error_comes_as_it_is() -> None:
    error = OSError("one")
    assert outcome((fail, error)) is error
    assert outcome((trio.sleep_forever,), body=error) is error
    assert error.__context__ is None


def test_group_that_the_body_raised_comes_as_it_is() -> None:
    """The nursery keeps the body's group, even with an interruption inside."""
    group = BaseExceptionGroup("mine", [KeyboardInterrupt()])
    assert outcome((trio.sleep_forever,), body=group) is group


def test_error_that_has_no_text() -> None:
    """Trio's own nursery would format the body's error, and fail."""

    class Speechless(Exception):
        def __repr__(self) -> str:
            raise RuntimeError("no words")

    error = Speechless()
    assert outcome((trio.sleep_forever,), body=error) is error


def test_cancellation_is_caught_by_its_scope() -> None:
    async def main() -> None:
        with trio.move_on_after(1) as scope:
            async with open_hidden_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                await trio.sleep_forever()
        assert scope.cancelled_caught
        async with open_hidden_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.cancel_scope.cancel()
        with trio.move_on_after(1) as scope:
            with pytest.raises(OSError, match="mine"):
                async with open_hidden_nursery() as nursery:
                    nursery.start_soon(trio.sleep_forever)
                    await fail_when_stopped(OSError("mine"))
            await trio.sleep_forever()
        assert scope.cancelled_caught

    run(main)


def test_signal_while_the_nursery_waits() -> None:
    async def main() -> None:
        async with open_hidden_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(main)


@AS_THEY_ARE
def test_interruption_in_a_call(error: BaseException) -> None:
    """`Lifetime.use` raises an interruption alone, too."""
    lifetime = Lifetime(lambda: ManagerClosed("closed"))
    kind = type(error)
    beside = OSError("beside")

    async def main() -> None:
        try:
            async with lifetime.use():
                await nested(kind(), beside)
        finally:
            await lifetime.close()

    with pytest.raises(kind) as caught:
        run(main)
    assert type(caught.value) is kind
    assert caught.value.__context__ is beside
