"""What a recorded scenario is played with: sources and a store that write down what happens."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Callable

import attrs
import trio

from trio_layers._digest import RootFS, chain_id, extend_chain
from trio_layers._engine.download import open_download_manager
from trio_layers._errors import DecompressionError, DoNotRetry
from trio_layers._store.memory import decompressed

END = 1000.0
# The most that Docker's engine reads of a layer at once (Go's io.Copy).
MOST_READ = 32 * 1024


def diff_id_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def now() -> float:
    return round(trio.current_time(), 6)


class ScenarioError(Exception):
    """An error that a scenario asks for."""


class Body(trio.abc.ReceiveStream):
    """A layer's bytes in the pieces, at the pace, and with the failure that a scenario says."""

    def __init__(self, world: World, name: str, data: bytes, spec: dict) -> None:
        self._world, self._name, self._rest, self._spec = world, name, data, spec
        self._reads = 0
        self.name, self.closes = name, 0
        world.bodies.append(self)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        assert not self.closes, "read after it was closed"
        await trio.lowlevel.checkpoint()
        if self._reads == self._spec.get("fail_after"):
            raise ScenarioError(self._spec["error"])
        self._reads += 1
        if self._rest and self._spec.get("chunk_seconds"):
            await trio.sleep_until(trio.current_time() + self._spec["chunk_seconds"])
        size = min(self._spec.get("chunk") or MOST_READ, max_bytes or MOST_READ, MOST_READ)
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    async def aclose(self) -> None:
        self.closes += 1
        self._world.reader_close.setdefault(self._name, []).append(now())


class FirstRead(trio.abc.ReceiveStream):
    """Notes when the first read of Docker's store would have returned: when the 10 bytes were
    there that are looked at before it is asked, or the end. ``None``: it was not asked."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._count = 0
        self.at: float | None = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = await self._stream.receive_some(max_bytes)
        self._count += len(data)
        if self.at is None and (self._count >= 10 or not data):
            self.at = now()
        return data

    async def aclose(self) -> None:
        raise AssertionError("the stream is the engine's to close")


class Source:
    def __init__(self, world: World, pull: str, index: int, spec: dict) -> None:
        self._world, self._spec = world, spec
        self._name = f"{pull}/{index}"
        self._attempt = 0
        self.key, self.id = spec["key"], spec["id"]
        world.descriptor_close[self._name] = []
        if spec.get("registerer", True):
            self.registered = self._registered

    def diff_id(self) -> str | None:
        return self._spec["diff_id"]

    async def download(self, progress: Callable) -> tuple[Body, int]:
        attempts = self._spec["attempts"]
        spec = attempts[min(self._attempt, len(attempts) - 1)]
        self._attempt += 1
        record = {"layer": self._name, "attempt": self._attempt, "start": now(), "end": None}
        self._world.downloads.append(record)
        outcome = "cancelled"
        try:
            with trio.CancelScope(shield=bool(spec.get("ignores_cancel"))):
                await self._take_its_time(spec, progress)
            outcome = "ok" if spec["result"] == "ok" else "error"
        finally:
            if outcome == "cancelled" and spec.get("cancel_seconds"):
                with trio.CancelScope(shield=True):
                    await trio.sleep_until(trio.current_time() + spec["cancel_seconds"])
            record |= {"end": now(), "outcome": outcome}
        if outcome == "error":
            error = DoNotRetry(spec["error"])
            if spec["result"] == "do_not_retry":
                raise error
            if spec["result"] == "wrapped_do_not_retry":
                raise ScenarioError(f"wrapped: {spec['error']}") from error
            raise ScenarioError(spec["error"])
        body = spec.get("body", {})
        data = self._spec["content"].encode()
        if "base64" in body:
            data = base64.b64decode(body["base64"])
        return Body(self._world, self._name, data, body), spec.get("size", 0)

    async def _take_its_time(self, spec: dict, progress: Callable) -> None:
        start = trio.current_time()
        for event in spec.get("progress", []):
            await trio.sleep_until(start + event["at"])
            progress(event["action"], event.get("current", 0), event.get("total", 0))
        await trio.sleep_until(start + spec["seconds"])

    def _registered(self, diff_id: str) -> None:
        self._world.registered.append([now(), self._name, diff_id])

    def close(self) -> None:
        self._world.descriptor_close[self._name].append(now())


@attrs.define(eq=False)
class StoredLayer:
    world: World
    diff_id: str
    chain_id: str
    parent: StoredLayer | None
    content: bytes

    async def tar_stream(self) -> Body:
        return Body(self.world, f"tar of {self.chain_id}", self.content, {})


class Store:
    def __init__(self, world: World, spec: dict) -> None:
        self._world, self._work = world, spec.get("register", {})
        self.layers: dict[str, StoredLayer] = {}
        self.references: Counter[str] = Counter()
        self.log: dict[str, list] = {"get": [], "register": [], "release": []}
        for chain in spec.get("chains", []):
            parent = None
            for content in chain:
                above = self._add(content.encode(), parent)
                if parent is not None:
                    self._give_back(parent.chain_id)
                parent = above

    def _add(
        self, content: bytes, parent: StoredLayer | None, *, drop_parent: bool = False
    ) -> StoredLayer:
        diff_id = diff_id_of(content)
        chain = extend_chain(parent.chain_id if parent else None, diff_id)
        if chain not in self.layers:
            # Its chain ID still tells what it was registered on, as with the mock of moby's tests.
            parent = None if drop_parent else parent
            self.layers[chain] = StoredLayer(self._world, diff_id, chain, parent, content)
            if parent is not None:
                self.references[parent.chain_id] += 1
        self.references[chain] += 1
        return self.layers[chain]

    async def get(self, chain: str) -> StoredLayer | None:
        layer = self.layers.get(chain)
        self.log["get"].append([now(), chain, layer is not None])
        if layer is not None:
            self.references[chain] += 1
        return layer

    async def register(
        self, stream: trio.abc.ReceiveStream, parent: str | None, descriptor: object
    ) -> StoredLayer:
        first = FirstRead(stream)
        record = {"parent": parent or "", "diff_id": None, "chain": None, "error": None}
        try:
            content = await decompressed(first)
            diff_id = record["diff_id"] = diff_id_of(content)
            work = self._work.get(diff_id, self._work.get("*", {}))
            with trio.CancelScope(shield=True):
                await trio.sleep_until(trio.current_time() + work.get("seconds", 0))
            if work.get("error"):
                raise ScenarioError(work["error"])
        except DecompressionError:
            raise  # Docker's store is not asked before the stream is open
        except BaseException as error:
            if first.at is None:
                raise  # nor then
            cancelled = isinstance(error, trio.Cancelled)
            record["error"] = "context canceled" if cancelled else str(error)
            self.log["register"].append({"start": first.at, "end": now(), **record})
            raise
        below = self.layers[parent] if parent is not None else None
        layer = self._add(content, below, drop_parent=work.get("drop_parent", False))
        record["chain"] = layer.chain_id
        self.log["register"].append({"start": first.at, "end": now(), **record})
        return layer

    def release(self, layer: StoredLayer) -> None:
        self.log["release"].append([now(), layer.chain_id])
        self._give_back(layer.chain_id)

    def _give_back(self, chain: str | None) -> None:
        while chain is not None:
            self.references[chain] -= 1
            assert self.references[chain] >= 0, f"{chain} was released once too often"
            if self.references[chain]:
                return
            del self.references[chain]
            parent = self.layers.pop(chain).parent
            chain = parent.chain_id if parent else None


class World:
    """Plays one scenario, and knows afterwards what happened when."""

    def __init__(self, scenario: dict) -> None:
        self.scenario = scenario
        self.downloads: list[dict] = []
        self.descriptor_close: dict[str, list[float]] = {}
        self.reader_close: dict[str, list[float]] = {}
        self.bodies: list[Body] = []
        self.registered: list[list] = []
        self.pulls: dict[str, dict] = {}
        self.store = Store(self, scenario["store"])
        self.final: dict[str, int] = {}

    async def play(self) -> None:
        manager = self.scenario["manager"]
        options = {"max_concurrent_downloads": manager["concurrency"]}
        if manager.get("max_attempts") is not None:
            options["max_download_attempts"] = manager["max_attempts"]
        async with (
            open_download_manager(self.store, **options) as manager,
            trio.open_nursery() as nursery,
        ):
            for pull in self.scenario["pulls"]:
                nursery.start_soon(self._pull, manager, pull)
            for change in self.scenario["set_concurrency"]:
                nursery.start_soon(self._set_concurrency, manager, change)
            await trio.sleep_until(END)
            self.final = dict(self.store.references)
            idle = manager.statistics()
            assert (idle.transfers, idle.downloading, idle.queued, idle.pulls) == (0, 0, 0, 0)
            released = list(self.store.log["release"])
            nursery.cancel_scope.cancel()
        # Without what the end of the test released.
        self.store.log["release"] = released
        await trio.testing.wait_all_tasks_blocked()

    async def _set_concurrency(self, manager, change: dict) -> None:
        await trio.sleep_until(change["at"])
        manager.max_concurrent_downloads = change["value"]

    async def _pull(self, manager, spec: dict) -> None:
        await trio.sleep_until(spec["at"])
        name, layers = spec["name"], self.scenario["layers"]
        result = {"end": None, "diff_ids": None, "error": None, "progress": {}}
        self.pulls[name] = result

        async def sink(progress) -> None:
            event = [now(), progress.action, progress.current, progress.total, progress.last]
            result["progress"].setdefault(progress.id, []).append(event)
            if spec.get("output_seconds"):
                await trio.sleep_until(trio.current_time() + spec["output_seconds"])

        sources = [
            Source(self, name, index, layers[layer]) for index, layer in enumerate(spec["layers"])
        ]
        contents = spec.get("initial_rootfs") or []
        base = RootFS([diff_id_of(content.encode()) for content in contents])
        assert base.chain_id is None or chain_id(base.diff_ids) == base.chain_id
        with trio.CancelScope() as scope:
            if spec.get("cancel_at") is not None:
                scope.deadline = spec["cancel_at"]
            try:
                async with manager.download(sources, base=base, progress=sink) as rootfs:
                    scope.deadline = float("inf")
                    result |= {"end": now(), "diff_ids": list(rootfs.diff_ids)}
                    release_at = spec.get("release_at")
                    await trio.sleep_until(END + 1 if release_at is None else release_at)
            except Exception as error:
                result |= {"end": now(), "error": str(error)}
        if scope.cancelled_caught and result["end"] is None:
            result |= {"end": now(), "error": "context canceled"}
