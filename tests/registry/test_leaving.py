"""Ends the client's block at each step of another task's calls.

Each call returns or raises `ClientClosed`, and leaves no connection or task behind.
"""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable

import httpx
import pytest
import trio
from _tools.moments import moments
from registry.fakes import FakeRegistry, MemorySink, Network, as_json, describe, is_final
from trio.testing import wait_all_tasks_blocked

from trio_layers import ClientClosed, RegistryClient, open_registry_client
from trio_layers.testing import BuiltImage, File, TokenAuth, build_image, open_registry

LAYER = b"layer" * 1000
BLOB = describe(LAYER)


async def open_blob(client: RegistryClient, repository: str) -> None:
    async with client.open_blob(f"{repository}:1", BLOB) as chunks:
        async for _ in chunks:
            pass


async def open_blob_and_leave_early(client: RegistryClient, repository: str) -> None:
    async with client.open_blob(f"{repository}:1", BLOB) as chunks:
        await anext(chunks)
        await trio.lowlevel.checkpoint()


CALLS: dict[str, Callable[[RegistryClient, str], Awaitable[object]]] = {
    "resolve": lambda client, name: client.resolve(f"{name}:1"),
    "resolve_image": lambda client, name: client.resolve_image(f"{name}:1", platform="linux/amd64"),
    "resolve_image_again": lambda client, name: client.resolve_image(
        f"{name}:1", platform="linux/amd64", head_first=True
    ),
    "get_manifest": lambda client, name: client.get_manifest(f"{name}:1"),
    "get_blob": lambda client, name: client.get_blob(f"{name}:1", BLOB),
    "open_blob": open_blob,
    "open_blob_and_leave_early": open_blob_and_leave_early,
    "fetch_blob": lambda client, name: client.fetch_blob(f"{name}:1", BLOB, MemorySink()),
    "tags": lambda client, name: client.tags(name),
    "referrers": lambda client, name: client.referrers(f"{name}:1"),
}


SHORT = frozenset({"resolve", "get_blob", "open_blob_and_leave_early"})
"""Calls that are left at each of their steps."""


class World:
    """An in-memory registry with tokens, and one that redirects to it."""

    def __init__(self) -> None:
        self.fake = FakeRegistry()
        image = self.fake.add_image(tag="1", layers=[LAYER])
        self.fake.add_index([as_json(image)], tag=image.digest.replace(":", "-"))
        self.network = Network(
            **{
                "https://r.example": self.leads,
                "https://s.example": self.registry,
                "https://t.example": lambda _: httpx.Response(200, json={"token": "token"}),
            }
        )

    def leads(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(307, headers={"Location": f"https://s.example{request.url.path}"})

    def registry(self, request: httpx.Request) -> httpx.Response:
        if request.headers.get("Authorization") != "Bearer token":
            challenge = {"WWW-Authenticate": 'Bearer realm="https://t.example"'}
            return httpx.Response(401, headers=challenge)
        if request.url.path.endswith("/tags/list"):
            return httpx.Response(200, json={"tags": ["1"]})
        return self.fake(request)


async def leave_at(
    step: int,
    call: Callable[[RegistryClient, str], Awaitable[object]],
    name: str,
    **options: object,
) -> tuple[bool, list[str]]:
    """Leave the block after a number of steps of the call's task.

    Returns whether the call lasted that long, and how the call ended.
    """
    ended: list[str] = []
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:

            async def run(task_status=trio.TASK_STATUS_IGNORED) -> None:
                await trio.lowlevel.checkpoint()
                with moments(leave, step) as countdown:
                    task_status.started(countdown)
                    try:
                        await call(client, name)
                        ended.append("done")
                    except ClientClosed:
                        ended.append("closed")
                leave.cancel()

            with trio.CancelScope() as leave:
                async with open_registry_client(**options) as client:
                    countdown = await nursery.start(run)
                    await trio.sleep_forever()
    assert client.statistics().active == client.statistics().waiting == 0
    return countdown.left <= 0, ended


@pytest.mark.parametrize("name", CALLS)
async def test_at_every_step(name: str) -> None:
    world, outcomes, step = World(), set(), 0
    async with world.network.client() as http:
        reached = True
        while reached:
            # Odd and even numbers are the two ends of a step. Long calls are tested at every third
            # number.
            step += 1 if name in SHORT else 3
            reached, [ended] = await leave_at(step, CALLS[name], "r.example/team/app", client=http)
            outcomes.add(ended)
    assert outcomes == {"done", "closed"}
    assert step > 10
    gc.collect()


@pytest.fixture(scope="module")
def built() -> BuiltImage:
    return build_image([[File("f", b"x" * 3000)]])


@pytest.mark.parametrize("name", ["resolve_image", "blob"])
async def test_at_every_step_over_sockets(name: str, built: BuiltImage) -> None:
    """No call raises the error of our own closed httpx client."""
    blob = built.layers[0].descriptor

    async def read(client: RegistryClient, repository: str) -> None:
        async with client.open_blob(f"{repository}:1", blob) as chunks:
            async for _ in chunks:
                await trio.lowlevel.checkpoint()

    call = read if name == "blob" else CALLS[name]
    async with open_registry(auth=TokenAuth()) as registry:
        registry.add(built, "team/app:1")
        step, reached, outcomes = 1, True, set()
        while reached:
            reached, [ended] = await leave_at(step, call, f"{registry.host}/team/app")
            outcomes.add(ended)
            step += 17
    assert outcomes == {"done", "closed"}


async def test_a_call_after_the_block() -> None:
    """A call after the block raises `ClientClosed` and sends no request."""
    world = World()
    async with world.network.client() as http:
        async with open_registry_client(client=http) as client:
            pass
        for call in CALLS.values():
            with pytest.raises(ClientClosed, match="its block was left"):
                await call(client, "r.example/team/app")
    assert world.network.requests == []


@pytest.mark.parametrize("own", [True, False])
async def test_a_blob_that_is_open_when_the_block_is_left(own: bool, built: BuiltImage) -> None:
    """Reading the blob raises `ClientClosed`, and its block can still be left."""
    async with open_registry() as registry, httpx.AsyncClient() as http:
        registry.add(built, "team/app:1")
        client_left, blob_open = trio.Event(), trio.Event()

        async def read() -> None:
            blob = built.layers[0].descriptor
            async with client.open_blob(f"{registry.host}/team/app:1", blob) as chunks:
                blob_open.set()
                await client_left.wait()
                for _ in range(2):
                    with pytest.raises(ClientClosed):
                        await anext(chunks)
                raise KeyError("mine")

        async def expect() -> None:
            with pytest.raises(KeyError, match="mine"):
                await read()

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                async with open_registry_client(client=None if own else http) as client:
                    nursery.start_soon(expect)
                    await blob_open.wait()
                client_left.set()
        assert client.statistics().active == 0


async def test_a_read_that_waits_when_the_block_is_left() -> None:
    """The client's block ends even if a server sends nothing."""

    async def silent(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nx")
        await trio.sleep_forever()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = listeners[0].socket.getsockname()[1]
            nursery.start_soon(trio.serve_listeners, silent, listeners)
            ended = trio.Event()

            async def call() -> None:
                with pytest.raises(ClientClosed):
                    await open_blob(client, f"localhost:{port}/team/app")
                ended.set()

            async with (
                httpx.AsyncClient(mounts={"https://": None}) as http,
                open_registry_client(client=http, plain_http=True) as client,
            ):
                nursery.start_soon(call)
                while client.statistics().active == 0:
                    await trio.lowlevel.checkpoint()
                await wait_all_tasks_blocked(0.05)
            await ended.wait()
            nursery.cancel_scope.cancel()


async def test_no_other_attempt_follows() -> None:
    """This holds for a call under way, for a call in a pause, for a later call, and after the given
    client was closed.
    """
    errors: list[ClientClosed] = []
    world = World()

    async def call() -> None:
        with pytest.raises(ClientClosed) as caught:
            await client.fetch_blob("r.example/team/app", BLOB, MemorySink())
        errors.append(caught.value)

    async def close(request: httpx.Request) -> httpx.Response:
        await http.aclose()
        raise httpx.ReadError("closed")

    async def hang(request: httpx.Request) -> httpx.Response:
        await trio.sleep_forever()
        raise AssertionError

    for serve in (hang, lambda request: httpx.Response(429, headers={"Retry-After": "9"}), close):
        world.network.hosts["https://r.example"] = serve
        async with world.network.client() as http, trio.open_nursery() as nursery:
            async with open_registry_client(client=http) as client:
                nursery.start_soon(call)
                await wait_all_tasks_blocked()
            await call()
    assert len(errors) == 6
    assert all(map(is_final, errors))


@pytest.mark.parametrize("name", CALLS)
async def test_a_given_client_that_is_closed(name: str) -> None:
    """The error tells if the owner closed the httpx client too early."""
    world = World()
    async with world.network.client() as http, open_registry_client(client=http) as client:
        await CALLS[name](client, "r.example/team/app")
        await http.aclose()
        with pytest.raises(ClientClosed, match="the given httpx client is closed"):
            await CALLS[name](client, "r.example/team/app")
    assert client.statistics().active == 0


@pytest.mark.parametrize("name", ["resolve_image", "fetch_blob", "referrers"])
async def test_a_given_client_that_is_closed_at_any_step(name: str, built: BuiltImage) -> None:
    """The owner closes the httpx client and its sockets during a call."""
    blob = built.layers[0].descriptor

    async def fetch(client: RegistryClient, repository: str) -> None:
        await client.fetch_blob(f"{repository}:1", blob, MemorySink())

    call = fetch if "blob" in name else CALLS[name]
    async with open_registry(auth=TokenAuth()) as registry:
        registry.add(built, "team/app:1")
        step, left, outcomes = 1, 0, set()
        while left <= 0:
            with trio.fail_after(5):
                async with (
                    httpx.AsyncClient() as http,
                    open_registry_client(client=http) as client,
                    trio.open_nursery() as nursery,
                ):

                    async def close(
                        http: httpx.AsyncClient, task_status=trio.TASK_STATUS_IGNORED
                    ) -> None:
                        with trio.CancelScope() as scope:
                            task_status.started(scope)
                            await trio.sleep_forever()
                        await http.aclose()

                    scope = await nursery.start(close, http)
                    with moments(scope, step) as countdown:
                        try:
                            await call(client, f"{registry.host}/team/app")
                            outcomes.add("done")
                        except ClientClosed:
                            outcomes.add("closed")
                    left = countdown.left
                    scope.cancel()
            step += 23
    assert outcomes == {"done", "closed"}


# Bodies without checkpoints.


class Endless(httpx.AsyncByteStream):
    """An endless body in memory, whose iteration has no checkpoint."""

    def __init__(self) -> None:
        self.sent = 0
        self.closed = False

    async def __aiter__(self):
        try:
            while True:
                self.sent += 1
                yield b"x" * 1024
        finally:
            self.closed = True


@pytest.mark.parametrize("layers", [0, 3])
async def test_a_body_without_checkpoints(layers: int) -> None:
    """A body without checkpoints is not read once its block has ended.

    All generators around the body are closed, and other tasks run between its chunks.
    """
    body = Endless()

    async def through(chunks):
        async for chunk in chunks:
            yield chunk

    class Stream(httpx.AsyncByteStream):
        def __aiter__(self):
            chunks = aiter(body)
            for _ in range(layers):
                chunks = through(chunks)
            return chunks

    network = Network(**{"https://r.example": lambda _: httpx.Response(200, stream=Stream())})
    async with network.client() as http, open_registry_client(client=http) as client:
        async with client.open_blob("r.example/team/app:1", BLOB.digest) as chunks:
            await anext(chunks)
        assert body.sent <= 3
        assert body.closed
        with trio.move_on_after(0.05) as scope:
            async with client.open_blob("r.example/team/app:1", BLOB.digest) as chunks:
                async for _ in chunks:
                    pass
        assert scope.cancelled_caught
    gc.collect()  # trio warns of generators that were not closed
