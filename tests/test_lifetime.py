"""Lifetimes are open, closing or closed, and tasks may leave in any order."""

import pytest
import trio
from trio.testing import Sequencer, wait_all_tasks_blocked

from trio_layers import ManagerClosed
from trio_layers._lifetime import Lifetime


def _lifetime() -> Lifetime:
    return Lifetime(lambda: ManagerClosed("closed"))


async def test_leaving_ends_a_call_under_way_and_waits_for_its_clean_up() -> None:
    lifetime = _lifetime()
    order = []

    async def call() -> None:
        with pytest.raises(ManagerClosed):
            async with lifetime.use():
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await wait_all_tasks_blocked()
                    order.append("cleaned up")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await wait_all_tasks_blocked()
        await lifetime.close()
        order.append("closed")
    assert order == ["cleaned up", "closed"]
    assert repr(lifetime) == "<Lifetime: closed, 0 calls>"


async def test_a_call_after_that_raises_a_new_error_at_once() -> None:
    lifetime = _lifetime()
    await lifetime.close()
    raised = []
    for _ in range(2):
        with pytest.raises(ManagerClosed) as caught:
            async with lifetime.use():
                pytest.fail("a call began on a closed object")
        raised.append(caught.value)
    assert raised[0] is not raised[1]


async def test_a_caller_that_is_cancelled_too_gets_its_cancellation() -> None:
    lifetime = _lifetime()
    sequencer = Sequencer()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def close() -> None:
                async with sequencer(1):
                    scope.cancel()
                    await lifetime.close()

            nursery.start_soon(close)
            async with lifetime.use():
                async with sequencer(0):
                    pass
                await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_an_error_of_the_call_comes_out_as_it_is() -> None:
    lifetime = _lifetime()
    with pytest.raises(ZeroDivisionError):
        async with lifetime.use():
            raise ZeroDivisionError
    async with lifetime.use(), lifetime.use():
        assert repr(lifetime) == "<Lifetime: open, 2 calls>"
    await lifetime.close()
