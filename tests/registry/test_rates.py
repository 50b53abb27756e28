"""The client gives up a registry that is slow on purpose, after a predictable time, but not one
that is merely slow.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import repeat

import httpcore
import httpx
import pytest
import trio
from registry.fakes import FakeRegistry, MemorySink, Network, Report, describe, is_final
from trio.testing import MockClock

from trio_layers._errors import RegistryError
from trio_layers._reference import parse_reference
from trio_layers._registry.client import RegistryClient, open_registry_client
from trio_layers._registry.credentials import Credentials
from trio_layers._registry.retries import MAX_ATTEMPTS

HOST = "https://registry.example"
TOKENS = "https://tokens.example"
APP = parse_reference("registry.example/team/app")
KIB = 1024
CONTENT = bytes(range(256)) * 4 * 200
BLOB = describe(CONTENT)
STALL_LIMIT = 60

Steps = Iterable[tuple[float, int]]


class Paced(httpx.AsyncByteStream):
    """Sends the blob in steps: a pause in seconds, then a number of bytes. It starts at the
    requested place. It ignores timeouts, like a connection on which bytes arrive that form no
    chunk.
    """

    def __init__(self, steps: Steps, start: int = 0) -> None:
        self.steps = steps
        self.position = start
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for seconds, size in self.steps:
            await trio.sleep(seconds)
            chunk = CONTENT[self.position : self.position + size]
            self.position += size
            yield chunk
            if self.position >= len(CONTENT):
                return

    async def aclose(self) -> None:
        self.closed = True


def paced(*steps: Steps) -> tuple[Network, list[Paced]]:
    """Return a registry that sends its responses at these paces, one after the other."""
    bodies: list[Paced] = []

    def answer(request: httpx.Request) -> httpx.Response:
        start = int(request.headers.get("Range", "bytes=0-")[len("bytes=") :].partition("-")[0])
        bodies.append(Paced(steps[len(bodies)], start))
        headers = {"Content-Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"}
        return httpx.Response(206 if start else 200, headers=headers, stream=bodies[-1])

    return Network(**{HOST: answer}), bodies


@asynccontextmanager
async def opened(
    network: httpx.AsyncBaseTransport, credentials: Credentials | None = None
) -> AsyncIterator[RegistryClient]:
    """Open a client that must have nothing under way at the end of the block."""
    async with (
        httpx.AsyncClient(transport=network) as http,
        open_registry_client(client=http, credentials=credentials) as client,
    ):
        yield client
        assert client.statistics().active == 0


async def given_up(client: RegistryClient, sink: MemorySink) -> float:
    """Return the time at which the client gives up, with a transient error."""
    began = trio.current_time()
    with pytest.raises(RegistryError, match=r"^registry\.example broke off .*bytes per sec") as it:
        await client.fetch_blob(APP, BLOB, sink, progress=Report())
    assert it.value.host == "registry.example"
    assert it.value.status is None
    assert not is_final(it.value)
    return trio.current_time() - began


@pytest.mark.parametrize(
    ("steps", "seconds", "bytes_there"),
    [
        # Each byte gives the server 1/1024 of a second more.
        (repeat((STALL_LIMIT - 1, 1)), STALL_LIMIT + 1 / KIB, 1),
        (repeat((10, 1)), STALL_LIMIT + 6 / KIB, 6),
        (repeat((1, 100)), STALL_LIMIT + 6600 / KIB, 6600),
        # A fast beginning gives no credit for later.
        ([(0, 100 * KIB), *[(59, 1)] * 5], STALL_LIMIT + 1 / KIB, 100 * KIB + 1),
        ([*[(1, 2 * KIB)] * 50, *[(10, 1)] * 10], 50 + STALL_LIMIT + 6 / KIB, 100 * KIB + 6),
        ([(30, 1), (0, 50 * KIB), *[(30, 1)] * 5], 30 + STALL_LIMIT + 2 / KIB, 50 * KIB + 3),
    ],
)
async def test_a_slow_loris(
    steps: Steps, seconds: float, bytes_there: int, autojump_clock: MockClock
) -> None:
    """The client gives up exactly when the server is one stall limit behind, and
    keeps the bytes.
    """
    network, bodies = paced(steps)
    sink = MemorySink()
    async with opened(network) as client:
        assert await given_up(client, sink) == pytest.approx(seconds, abs=1e-6)
    assert len(sink.data) == bytes_there
    assert sink.data == CONTENT[:bytes_there]
    assert bodies[0].closed


async def test_it_goes_on_from_there(autojump_clock: MockClock) -> None:
    """The next attempt requests the remaining bytes."""
    network, _ = paced(repeat((59, 1)), repeat((1, 2 * KIB)))
    sink = MemorySink()
    async with opened(network) as client:
        await given_up(client, sink)
        await client.fetch_blob(APP, BLOB, sink, progress=Report())
    assert sink.data == CONTENT
    assert sink.restarts == 0
    assert [request.headers.get("Range") for request in network.requests] == [
        None,
        f"bytes=1-{len(CONTENT) - 1}",
    ]


@pytest.mark.parametrize(
    ("steps", "seconds"),
    [
        (repeat((1, 2 * KIB)), 100),
        (repeat((0.5, KIB)), 100),
        # Exactly the least rate, in pieces of any size.
        (repeat((1, KIB)), 200),
        (repeat((59, 59 * KIB)), 59 * 4),
        # Pauses, after which the server is fast again, at once or slowly.
        ([(59, 1), *repeat((0.125, 2 * KIB), 100)], 59 + 100 / 8),
        ([(59, 1), (1, 50 * KIB), (49, 1), (1, 50 * KIB), (49, 1), (1, 100 * KIB)], 160),
    ],
)
async def test_a_slow_registry(steps: Steps, seconds: float, autojump_clock: MockClock) -> None:
    """The client waits, even through pauses."""
    network, _ = paced(steps)
    sink = MemorySink()
    began = trio.current_time()
    async with opened(network) as client:
        await client.fetch_blob(APP, BLOB, sink, progress=Report())
    assert sink.data == CONTENT
    assert trio.current_time() - began == pytest.approx(seconds)


async def test_a_slow_consumer(autojump_clock: MockClock) -> None:
    """The consumer's time does not count as the server's."""

    class SlowSink(MemorySink):
        async def write(self, data: bytes) -> None:
            await trio.sleep(1000)
            await super().write(data)

    network, _ = paced([*[(0.0, 1)] * 100, (0.0, len(CONTENT))])
    sink = SlowSink()
    async with opened(network) as client:
        await client.fetch_blob(APP, BLOB, sink, progress=Report())
    assert sink.data == CONTENT
    assert len(network.requests) == 1


async def test_silence(autojump_clock: MockClock) -> None:
    """Bytes that form no chunk count as silence."""
    network, _ = paced([(0, 10), (1e6, 1)])
    sink = MemorySink()
    began = trio.current_time()
    async with opened(network) as client:
        with pytest.raises(RegistryError, match=r"broke off .*: nothing for 60 seconds"):
            await client.fetch_blob(APP, BLOB, sink, progress=Report())
    assert trio.current_time() - began == STALL_LIMIT
    assert len(sink.data) == 10


def slowly(status: int, **headers: str) -> Callable[[httpx.Request], httpx.Response]:
    """Return a response with a very slow body."""
    return lambda request: httpx.Response(
        status, headers=headers, stream=Paced(repeat((STALL_LIMIT - 1, 1)))
    )


@pytest.mark.parametrize("which", ["manifest", "error", "redirect", "token", "refresh"])
async def test_small_bodies(which: str, autojump_clock: MockClock) -> None:
    """Documents, tokens and errors have the same limits."""
    registry, credentials, slow = FakeRegistry(), None, "registry.example"
    registry.add_image(tag="latest")
    network = Network(**{HOST: registry, TOKENS: slowly(200)})
    if which == "manifest":
        network.hosts[HOST] = slowly(200)
    elif which == "error":
        network.hosts[HOST] = slowly(500)
    elif which == "redirect":
        network.hosts[HOST] = slowly(307, Location=f"{HOST}/elsewhere")
    else:
        challenge = f'Bearer realm="{TOKENS}/token"'
        network.hosts[HOST] = lambda request: httpx.Response(
            401, headers={"WWW-Authenticate": challenge}
        )
        slow = "tokens.example"
        if which == "refresh":
            credentials = Credentials("", "", identity_token="identity")
    began = trio.current_time()
    async with opened(network, credentials) as client:
        with pytest.raises(RegistryError, match=r"broke off .*bytes per second") as caught:
            await client.resolve_image(APP)
    pauses = sum(0.5 * 2**n for n in range(MAX_ATTEMPTS - 1))
    given_up = MAX_ATTEMPTS * (STALL_LIMIT + 1 / KIB)
    assert given_up <= trio.current_time() - began <= given_up + pauses
    assert caught.value.host == slow
    assert not is_final(caught.value)
    assert network.requests[-1].method == ("POST" if which == "refresh" else "GET")


class Dripping(httpcore.AsyncNetworkStream):
    """A server that accepts at once and then sends single bytes, each within every timeout of one
    step.
    """

    def __init__(self, beginning: bytes) -> None:
        self.beginning = beginning

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        assert timeout == STALL_LIMIT
        if self.beginning:
            data, self.beginning = self.beginning, b""
            return data
        await trio.sleep(STALL_LIMIT - 1)
        return b"a"

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    async def start_tls(self, *args: object, **options: object) -> Dripping:
        return self

    def get_extra_info(self, info: str) -> object:
        return None


class Backend(httpcore.AsyncMockBackend):
    def __init__(self, beginning: bytes) -> None:
        super().__init__([])
        self.beginning = beginning

    async def connect_tcp(self, *args: object, **options: object) -> Dripping:
        return Dripping(self.beginning)


@pytest.mark.parametrize(
    ("beginning", "seconds", "said"),
    [
        (b"", 180, "had not answered 180 seconds after it was asked for blob"),
        (b"HTTP/1.1 200 OK\r\nX-Long: ", 180, "had not answered 180 seconds after"),
        # A chunk extension (RFC 9112, 7.1.1), and the trailer behind the last chunk.
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;",
            60,
            "broke off while it sent blob .*: nothing for 60 seconds",
        ),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n\0\r\n0\r\n",
            60 + 1 / KIB,
            "broke off while it sent blob .*: nothing for 60 seconds",
        ),
    ],
)
async def test_bytes_that_lead_nowhere(
    beginning: bytes, seconds: float, said: str, autojump_clock: MockClock
) -> None:
    """A header, or the frame of a chunk, comes byte by byte without end.

    Each byte comes within httpx's limit.
    """
    transport = httpx.AsyncHTTPTransport(trust_env=False)
    transport._pool._network_backend = Backend(beginning)
    began = trio.current_time()
    async with opened(transport) as client:
        with pytest.raises(RegistryError, match=said) as caught:
            await client.fetch_blob(APP, BLOB, MemorySink(), progress=Report())
    assert trio.current_time() - began == pytest.approx(seconds, abs=0.01)
    assert caught.value.status is None
    assert not is_final(caught.value)
    assert transport._pool.connections == []


async def never(request: httpx.Request) -> httpx.Response:
    await trio.sleep_forever()
    raise AssertionError("it is cancelled")


@pytest.mark.parametrize(("stall_limit", "seconds"), [(60, 180), (5, 20), (300, 660)])
async def test_an_answer_that_never_begins(
    stall_limit: float, seconds: float, autojump_clock: MockClock
) -> None:
    """The client waits for twice the limits for connecting and for the stall together. The limit
    for connecting is at most the stall limit.
    """
    network = Network(**{HOST: never})
    began = trio.current_time()
    async with (
        network.client() as http,
        open_registry_client(client=http, stall_limit=stall_limit) as client,
    ):
        with pytest.raises(RegistryError, match=f"{seconds} seconds after it was asked for blob"):
            await client.fetch_blob(APP, BLOB, MemorySink())
        assert client.statistics().active == 0
    assert trio.current_time() - began == seconds


@pytest.mark.parametrize("patience", [10, 180])
async def test_a_cancellation_is_none_of_it(patience: float, autojump_clock: MockClock) -> None:
    """A cancellation from outside is not taken for a timeout, even at the same instant."""
    began = trio.current_time()
    with trio.CancelScope(deadline=began + patience) as scope:
        async with opened(Network(**{HOST: never})) as client:
            await client.resolve_image(APP)
    assert scope.cancelled_caught
    assert trio.current_time() - began == patience


async def test_a_body_is_cancelled(autojump_clock: MockClock) -> None:
    """A cancellation comes at the same instant as the end of the stall limit."""
    network, bodies = paced(repeat((1e6, 1)))
    began = trio.current_time()
    with trio.CancelScope(deadline=began + STALL_LIMIT) as scope:
        async with opened(network) as client:
            await client.fetch_blob(APP, BLOB, MemorySink(), progress=Report())
    assert scope.cancelled_caught
    assert bodies[0].closed
