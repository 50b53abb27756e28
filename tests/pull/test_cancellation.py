"""A pull that is cancelled at any moment leaves nothing behind except bytes for the next one.

The scheduler's steps of all its tasks are counted. The pull is cancelled at the first moment, at
the second, and so on, until one run ends. The network is in memory, and its time passes only on
request: threads that work on the store take no time.

Of a whole pull's five hundred moments the suite takes every fifth; with
``TRIO_LAYERS_CANCELLATIONS=all`` it takes all. They alternate between the beginning and the end of
a step, so that an odd stride meets both.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
from functools import partial
from pathlib import Path

import attrs
import httpx
import trio
from _tools.moments import NEVER, Countdown, moments
from registry.fakes import MemorySink, Report
from store.stores import open_with_threads
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_layers import Progress, Puller, open_puller
from trio_layers._reference import parse_reference
from trio_layers._registry.client import RegistryClient, open_registry_client
from trio_layers._store.directory import DirectoryStore
from trio_layers.testing import (
    Answer,
    Delay,
    Exchange,
    Fault,
    File,
    Redirect,
    Registry,
    Reply,
    Request,
    TokenAuth,
    build_image,
)

BUILT = build_image(
    [[File(f"file-{n}", random.Random(n).randbytes(100_000))] for n in range(3)],
)
RIGHT = {
    digest.removeprefix("sha256:"): bytes(content)
    for digest, content in [
        (BUILT.digest, BUILT.manifest),
        (BUILT.config_descriptor.digest, BUILT.config),
        *((layer.descriptor.digest, layer.content) for layer in BUILT.layers),
    ]
}
STRIDE = 1 if os.environ.get("TRIO_LAYERS_CANCELLATIONS") == "all" else 5
PATIENCE = 30


@attrs.frozen
class AskToWait(Fault):
    """A fault that answers 429, and sets an event."""

    answered: trio.Event = attrs.field(factory=trio.Event)

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        self.answered.set()
        reply = Reply(429, headers={"Retry-After": str(PATIENCE)})
        return reply.change_answer(request, answer)


class Internet:
    """A registry that requires tokens and asks to wait. It redirects requests for blobs to a
    storage host, which asks to wait, too.
    """

    def __init__(self) -> None:
        self.registry = Registry("registry.example", auth=TokenAuth())
        self.storage = Registry("storage.example")
        self.name = self.registry.add(BUILT, "library/demo:latest")
        self.storage.add(BUILT, "library/demo:latest")
        self.registry.inject("*/blobs/*", Redirect(self.storage.url), times=None)
        # The first request has no token.
        self.waits = [AskToWait(), AskToWait()]
        self.registry.inject("*/manifests/*", self.waits[0], skip=1)
        self.storage.inject(f"*/{BUILT.layers[1].descriptor.digest}", self.waits[1])

    def client(self) -> httpx.AsyncClient:
        mounts = {self.storage.url: self.storage.transport()}
        return httpx.AsyncClient(transport=self.registry.transport(), mounts=mounts)

    @property
    def exchanges(self) -> list[Exchange]:
        return [*self.registry.requests, *self.storage.requests]

    async def pass_time(self, clock: MockClock) -> None:
        """Advance the clock only where a task waits for time."""

        async def pass_for(wait: AskToWait) -> None:
            await wait.answered.wait()
            await wait_all_tasks_blocked()
            clock.jump(PATIENCE)

        async with trio.open_nursery() as nursery:
            for wait in self.waits:
                nursery.start_soon(pass_for, wait)


def check_network(internet: Internet, client: RegistryClient) -> None:
    """Check that no response is open, and that no slot is held."""
    assert all(exchange.ended for exchange in internet.exchanges)
    now = client.statistics()
    assert (now.active, now.waiting) == (0, 0)


def visible(store: DirectoryStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (store.path / "blobs" / "sha256").iterdir()}


def contents(store: DirectoryStore) -> list[str]:
    """Return all names in the directories that layers pass through."""
    places = ("blobs/sha256", "trees/sha256", "ingest")
    return sorted(name for place in places for name in os.listdir(store.path / place))


async def watch(event: Progress) -> None:
    await trio.lowlevel.checkpoint()


async def pull(puller: Puller, reference: str) -> None:
    async with puller.pull(reference, progress=watch) as image:
        assert image.digest == BUILT.digest
        for n in range(3):
            content = await image.rootfs.read_bytes(f"file-{n}")
            assert content == random.Random(n).randbytes(100_000)


async def pull_at(store: DirectoryStore, internet: Internet, at: int, met: set[str]) -> bool:
    """Pull, cancel the pull at a moment, and pull again. Return whether the moment came."""
    async with internet.client() as http, open_puller(store, client=http) as puller:
        with trio.CancelScope() as scope, moments(scope, at, below=True) as countdown:
            await pull(puller, internet.name)
        met.update(countdown.frames)
        check_network(internet, puller._registry)
        assert puller._manager.statistics().transfers == 0
        assert store.statistics().references == 0
        assert visible(store).items() <= RIGHT.items()
        assert (await store.check()).problems == ()
        # The next pull uses earlier bytes, or ignores them.
        await pull(puller, internet.name)
        check_network(internet, puller._registry)
        assert visible(store) == RIGHT
        assert (await store.check()).problems == ()
    return countdown.left <= 0


async def test_a_pull(tmp_path: Path, mock_clock: MockClock) -> None:
    """After a cancellation no response is open, no slot, layer or lease is held, and only whole
    blobs are visible. The next pull returns the image.
    """
    met: set[str] = set()
    more = True

    async def attempt(at: int) -> None:
        nonlocal more
        async with open_with_threads(tmp_path) as store:
            empty = contents(store)
            more = await pull_at(store, internet, at, met)
            # No process holds a lease any more, so a collection removes everything.
            await store.remove(internet.name)
            await store.collect()
            assert contents(store) == empty
        nursery.cancel_scope.cancel()

    for at in itertools.count(1, STRIDE):
        internet = Internet()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(internet.pass_time, mock_clock)
            nursery.start_soon(attempt, at)
        if not more:
            break
    # Each of these functions has more moments than the stride.
    assert {"_resolve", "sleep", "hold_lock", "open_ingest", "fetch_blob", "write"} <= met
    # This function has fewer moments than the stride.
    assert STRIDE > 1 or "finish" in met
    assert {"_build", "commit", "put_image"} <= met
    gc.collect()


async def fetch_all(client: RegistryClient, name: str, sinks: list[MemorySink]) -> None:
    reference = parse_reference(name)
    image = await client.resolve_image(reference)
    assert image.descriptor.digest == BUILT.digest
    async with trio.open_nursery() as nursery:
        for layer, sink in zip(image.layers, sinks, strict=True):
            nursery.start_soon(
                partial(client.fetch_blob, reference, layer, sink, progress=Report())
            )


async def test_the_registry_alone(autojump_clock: MockClock) -> None:
    """Documents, and then all layers at once, are cancelled at each moment.

    The received bytes are right, and the same client fetches the rest.
    """
    met: set[str] = set()
    for at in itertools.count(1):
        internet = Internet()
        sinks = [MemorySink() for _ in BUILT.layers]
        async with (
            internet.client() as http,
            # The third layer waits for a slot, since the client has fewer connections than there
            # are layers.
            open_registry_client(client=http, max_connections=2) as client,
        ):
            with trio.CancelScope() as scope, moments(scope, at, below=True) as countdown:
                await fetch_all(client, internet.name, sinks)
            met.update(countdown.frames)
            check_network(internet, client)
            for layer, sink in zip(BUILT.layers, sinks, strict=True):
                assert bytes(layer.content).startswith(sink.data)
            await fetch_all(client, internet.name, sinks)
            check_network(internet, client)
            assert [sink.data for sink in sinks] == [layer.content for layer in BUILT.layers]
            assert not any(sink.restarts for sink in sinks)
        if countdown.left > 0:
            break
    assert {"_ask", "refused", "skip", "sleep", "park", "_get_document", "write", "aclose"} <= met
    gc.collect()


async def test_a_token_that_others_wait_for(autojump_clock: MockClock) -> None:
    """The task that fetches the token is cancelled at each moment.

    Then another waiting task fetches it, and all others get it.
    """
    asked: set[int] = set()
    for at in itertools.count(1):
        registry = Registry("registry.example", auth=TokenAuth())
        name = registry.add(BUILT, "library/demo:latest")
        registry.inject("/token", Delay(1), times=None)
        sinks = [MemorySink() for _ in BUILT.layers]
        countdowns: dict[int, Countdown] = {}
        async with (
            httpx.AsyncClient(transport=registry.transport()) as http,
            open_registry_client(client=http) as client,
        ):
            async with trio.open_nursery() as nursery:
                fetch = partial(fetch_at, client, name, sinks, countdowns)
                nursery.start_soon(fetch, 0, at)
                await wait_all_tasks_blocked()
                nursery.start_soon(fetch, 1, NEVER)
                nursery.start_soon(fetch, 2, NEVER)
            assert all(exchange.ended for exchange in registry.requests)
            now = client.statistics()
            assert (now.active, now.waiting) == (0, 0)
        first = countdowns[0]
        right = [sinks[n].data == layer.content for n, layer in enumerate(BUILT.layers)]
        assert right[1:] == [True, True]
        assert right[0] or first.scope.cancelled_caught
        requests = [exchange.path for exchange in registry.requests].count("/token")
        assert requests <= 2
        asked.add(requests)
        if first.left > 0:
            break
    assert asked == {1, 2}


async def fetch_at(
    client: RegistryClient,
    name: str,
    sinks: list[MemorySink],
    countdowns: dict[int, Countdown],
    n: int,
    at: int,
) -> None:
    with trio.CancelScope() as scope, moments(scope, at) as countdowns[n]:
        layer = BUILT.layers[n].descriptor
        await client.fetch_blob(parse_reference(name), layer, sinks[n], progress=Report())
