"""The client waits if a registry asks it to, within limits."""

from __future__ import annotations

import httpx
import pytest
import trio
from trio.testing import MockClock

from trio_layers import RateLimit, RateLimited
from trio_layers._errors import is_final
from trio_layers._reference import parse_reference
from trio_layers._registry.client import RegistryClient, open_registry_client
from trio_layers.testing import Registry, Reply, sample_image

REFERENCE = parse_reference("registry.example/library/demo:latest")


async def resolved(registry: Registry) -> tuple[float, RegistryClient]:
    """Return the time that a call takes, by the mock clock."""
    registry.add(sample_image(), "library/demo:latest")
    async with (
        httpx.AsyncClient(transport=registry.transport()) as http,
        open_registry_client(client=http, max_connections=1) as client,
    ):
        began = trio.current_time()
        try:
            await client.resolve_image(REFERENCE)
        finally:
            assert client.statistics().active == 0
        return trio.current_time() - began, client


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("seconds", [0, 30, 60])
async def test_it_is_waited_for(status: int, seconds: int, autojump_clock: MockClock) -> None:
    registry = Registry("registry.example", scheme="https")
    registry.inject("*/manifests/*", Reply(status, headers={"Retry-After": str(seconds)}))
    assert (await resolved(registry))[0] == seconds


@pytest.mark.parametrize("status", [429, 503])
async def test_not_for_long(status: int, autojump_clock: MockClock) -> None:
    registry = Registry("registry.example", scheme="https")
    registry.inject("*/manifests/*", Reply(status, headers={"Retry-After": "61"}), times=None)
    with pytest.raises(RateLimited, match="wait for 61 seconds") as caught:
        await resolved(registry)
    assert trio.current_time() < 1
    assert caught.value.retry_after == 61
    assert caught.value.status == status
    assert is_final(caught.value)


async def test_not_for_ever(autojump_clock: MockClock) -> None:
    registry = Registry("registry.example", scheme="https")
    registry.inject("*/manifests/*", Reply(429, headers={"Retry-After": "25"}), times=None)
    with pytest.raises(RateLimited) as caught:
        await resolved(registry)
    assert trio.current_time() == pytest.approx(50, abs=1)
    assert not is_final(caught.value)


async def test_waiting_is_cancelled(autojump_clock: MockClock) -> None:
    registry = Registry("registry.example", scheme="https")
    registry.inject("*/manifests/*", Reply(429, headers={"Retry-After": "30"}))
    with trio.move_on_after(10) as scope:
        await resolved(registry)
    assert scope.cancelled_caught


async def test_what_is_left_is_told(autojump_clock: MockClock) -> None:
    registry = Registry("registry.example", scheme="https")
    fields = {
        "ratelimit-limit": "100;w=21600",
        "ratelimit-remaining": "7;w=21600",
        "docker-ratelimit-source": "192.0.2.1",
        "Retry-After": "1",
    }
    registry.inject("*/manifests/*", Reply(429, headers=fields))
    _, client = await resolved(registry)
    assert client.rate_limits == {"registry.example": RateLimit(100, 7, 21600, "192.0.2.1")}


@pytest.mark.parametrize("field", ["", "many", "-1", "1;w=x", "1;w=2;w=3", "9" * 30])
async def test_what_makes_no_sense_is_nothing(field: str, autojump_clock: MockClock) -> None:
    registry = Registry("registry.example", scheme="https")
    fields = {"ratelimit-limit": field, "ratelimit-remaining": "7", "Retry-After": "1"}
    registry.inject("*/manifests/*", Reply(429, headers=fields))
    _, client = await resolved(registry)
    assert client.rate_limits == {}
