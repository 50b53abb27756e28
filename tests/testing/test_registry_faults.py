"""Faults of the embedded registry, over a socket and in memory."""

from __future__ import annotations

import math

import httpx
import pytest
import trio
import trio.testing
from testing.registry_clients import DATA, NAME, memory_client

from trio_layers.testing import (
    Challenge,
    Corrupt,
    Cut,
    Delay,
    Drop,
    IgnoreRange,
    NoLength,
    Redirect,
    Registry,
    Reply,
    Shorter,
    Slow,
    SlowHead,
    Stall,
    TokenAuth,
    WrongRange,
    open_registry,
)
from trio_layers.testing._serve import _Connection


async def test_reply_hits_as_many_requests_as_it_is_told_to(connect) -> None:
    """Rules respect `skip`, `times`, the method and their order."""
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        busy = Reply(429, headers={"Retry-After": "7"}, body=b"later")
        registry.inject("/v2/*/blobs/*", busy, skip=1, times=2, method="GET")
        registry.inject("*", Reply(503), times=None)
        registry.inject("*", Reply(500))
        await client.head(url)
        statuses = [(await client.get(url)).status_code for _ in range(4)]
        assert statuses == [503, 429, 429, 503]
        assert [exchange.status for exchange in registry.requests[1:]] == statuses
        registry.clear_faults()
        got = await client.get(url)
        assert (got.status_code, got.content) == (200, DATA)
        registry.inject("*", busy, times=None)
        got = await client.get(url)
        assert (got.headers["Retry-After"], got.content) == ("7", b"later")
        head = await client.head(url)
        assert (head.headers["Content-Length"], head.content) == ("5", b"")


@pytest.mark.parametrize("after", [0, 1, 100_000])
async def test_cut_closes_after_so_many_bytes(connect, after: int) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, Cut(after))
        got = bytearray()
        with pytest.raises(httpx.RemoteProtocolError, match="without sending complete"):
            async with client.stream("GET", url) as response:
                async for chunk in response.aiter_raw():
                    got += chunk
        assert got == DATA[:after]
        assert registry.requests[-1].bytes_sent == after
        assert (await client.get(url)).content == DATA


async def test_a_cut_beyond_the_body_is_none(connect) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, Cut(len(DATA)))
        assert (await client.get(url)).content == DATA


async def test_a_reset_is_a_read_error(connect) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, Cut(1000, reset=True))
        with pytest.raises(httpx.ReadError):
            async with client.stream("GET", url) as response:
                async for _ in response.aiter_raw():
                    pass
        assert registry.requests[-1].bytes_sent == 1000
        assert (await client.get(url)).content == DATA


async def test_drop_closes_without_an_answer(connect) -> None:
    async with connect() as (registry, client):
        registry.inject("/v2/", Drop())
        with pytest.raises(httpx.RemoteProtocolError, match="Server disconnected"):
            await client.get("/v2/")
        assert registry.requests[0].status == 0
        assert (await client.get("/v2/")).status_code == 200


async def test_corrupt_changes_one_byte_also_in_a_range(connect) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, Corrupt(70_000), Corrupt(3), times=None)
        got = (await client.get(url)).content
        assert [at for at in range(len(DATA)) if got[at] != DATA[at]] == [3, 70_000]
        part = (await client.get(url, headers={"Range": "bytes=69999-"})).content
        assert part[:1] == DATA[69_999:70_000]
        assert part[1] == got[70_000]
        assert part[2:] == DATA[70_001:]


async def test_ignore_range_sends_the_whole(connect) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, IgnoreRange())
        got = await client.get(url, headers={"Range": "bytes=5-"})
        assert (got.status_code, got.content) == (200, DATA)
        assert "Accept-Ranges" not in got.headers
        assert registry.requests[-1].headers["range"] == "bytes=5-"


async def test_no_length(connect) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, NoLength(), times=None)
        for asked, expected in (({}, DATA), ({"Range": "bytes=9-"}, DATA[9:])):
            got = await client.get(url, headers=asked)
            assert "Content-Length" not in got.headers
            assert got.content == expected
        assert (await client.head(url)).content == b""


async def test_faults_of_bodies_do_not_change_head(connect) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, Cut(0), Stall(0), times=None)
        for _ in range(2):
            assert (await client.head(url)).headers["Content-Length"] == str(len(DATA))


@pytest.mark.parametrize(("shift", "start"), [(5, 105), (-100, 0), (-200, 0), (10**9, 262_143)])
async def test_wrong_range_starts_elsewhere_and_says_so(connect, shift: int, start: int) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, WrongRange(shift), times=None)
        got = await client.get(url, headers={"Range": "bytes=100-"})
        assert got.headers["Content-Range"] == f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"
        assert got.content == DATA[start:]
        assert (await client.get(url)).status_code == 200


async def test_redirect_leads_to_another_registry(connect) -> None:
    """Over a socket the other registry gets the request; in memory, the same transport does."""
    async with connect() as (registry, client), open_registry() as other:
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        other.add_blob(NAME, DATA)
        registry.inject(url, Redirect(other.url))
        got = await client.get(f"{url}?a=b")
        assert got.status_code == 307
        assert got.headers["Location"] == f"{other.url}{url}?a=b"
        got = await client.get(got.headers["Location"])
        assert got.content == DATA


async def test_slow_delay_and_stall_take_trio_time(autojump_clock) -> None:
    async with memory_client() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA[:1000])}"
        registry.inject(url, Slow(100), Delay(3), Stall(500, seconds=4))
        start = trio.current_time()
        async with client.stream("GET", url, timeout=None) as response:
            assert trio.current_time() - start == pytest.approx(3)
            async for _ in response.aiter_raw():
                pass
        # 3 + 10: the delayed bytes come at once, as from a congested network.
        assert trio.current_time() - start == pytest.approx(13)


async def test_slow_after_so_many_bytes(autojump_clock) -> None:
    async with memory_client() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA[:1000])}"
        registry.inject(url, Slow(2, after=990), Delay(3))
        start = trio.current_time()
        arrived: list[tuple[float, int]] = []
        async with client.stream("GET", url, timeout=None) as response:
            async for chunk in response.aiter_raw():
                arrived.append((round(trio.current_time() - start, 6), len(chunk)))
        assert arrived == [(3, 990), *[(3 + n / 2, 1) for n in range(1, 11)]]


async def test_a_slow_head_comes_byte_by_byte(autojump_clock) -> None:
    """The head comes byte by byte, and the body at full speed."""
    registry = Registry()
    registry.inject("/v2/", SlowHead(2))
    client, server = trio.testing.memory_stream_pair()
    arrived: list[tuple[float, bytes]] = []
    start = trio.current_time()
    async with trio.open_nursery() as nursery, client:
        nursery.start_soon(_Connection(server, registry.respond, "http").run)
        await client.send_all(b"GET /v2/ HTTP/1.1\r\nHost: registry.test\r\n\r\n")
        while not arrived or arrived[-1][1] != b"{}":
            data = await client.receive_some()
            arrived.append((trio.current_time() - start, bytes(data)))
    head = b"".join(data for _, data in arrived[:-1])
    assert head.startswith(b"HTTP/1.1 200 \r\n")
    assert head.endswith(b"\r\n\r\n")
    assert [time for time, _ in arrived[:-1]] == [n / 2 for n in range(1, len(head) + 1)]


async def test_a_slow_head_takes_the_same_time_in_memory(autojump_clock) -> None:
    """In memory, a slow head takes the same time; a read timeout depends on each byte."""
    async with memory_client() as (registry, client):
        registry.inject("/v2/", SlowHead(2), SlowHead(0.1))
        registry.inject("/v2/", SlowHead(1))
        start = trio.current_time()
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/v2/", timeout=5)
        assert trio.current_time() - start == pytest.approx(5)
        assert registry.requests[0].ended
        got = await client.get("/v2/", timeout=5)
        head = len(b"HTTP/1.1 200 \r\n\r\n") + sum(
            len(name) + len(value) + 4 for name, value in got.headers.raw
        )
        assert trio.current_time() - start == pytest.approx(5 + head)


async def test_shorter_sends_the_right_length(connect) -> None:
    """`Shorter` shortens a whole blob and a range, but no body that is too short."""
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, Shorter(100), times=None)
        got = await client.get(url)
        assert (got.status_code, got.content) == (200, DATA[:-100])
        got = await client.get(url, headers={"Range": "bytes=1000-1999"})
        assert got.headers["Content-Range"] == f"bytes 1000-1899/{len(DATA)}"
        assert (got.status_code, got.content) == (206, DATA[1000:1900])
        got = await client.get(url, headers={"Range": "bytes=0-99"})
        assert got.content == DATA[:100]


async def test_challenges_alternate_between_two_schemes(connect) -> None:
    async with connect(TokenAuth()) as (registry, client):
        registry.inject("/v2/", Challenge("Basic"), times=2)
        registry.inject("/v2/", Challenge("Basic", "Bearer"), times=None)
        realm = f'Bearer realm="{registry.url}/token"'
        basic = 'Basic realm="here"'
        for sent, wanted in [
            ({}, basic),
            ({"Authorization": "Basic x"}, basic),
            ({}, basic),
            ({"Authorization": "Basic x"}, realm),
            ({"Authorization": "Bearer x"}, basic),
        ]:
            got = await client.get("/v2/", headers=sent)
            assert (got.status_code, got.headers["WWW-Authenticate"]) == (401, wanted)
        assert (await client.get("/token")).json()["token"]


async def test_a_stall_is_a_read_timeout(connect) -> None:
    """A stall is a read timeout in memory and over a socket, after the bytes before it."""
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, Stall(1000))
        got = b""
        with pytest.raises(httpx.ReadTimeout):
            async with client.stream("GET", url, timeout=0.2) as response:
                async for chunk in response.aiter_raw():
                    got += chunk
        assert got == DATA[:1000]
        assert (await client.get(url)).content == DATA


async def test_a_late_answer_is_a_read_timeout(autojump_clock) -> None:
    async with memory_client() as (registry, client):
        registry.inject("*", Delay(math.inf))
        start = trio.current_time()
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/v2/", timeout=5)
        assert trio.current_time() - start == pytest.approx(5)
        assert registry.requests[0].ended
