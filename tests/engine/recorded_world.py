"""Sources and a store that play a recorded scenario, and write down the events."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import trio

from trio_layers._digest import RootFS, chain_id, extend_chain
from trio_layers._engine.download import open_download_manager
from trio_layers._errors import DecompressionError, DoNotRetry
from trio_layers._manifest import Descriptor
from trio_layers._memory import decompressed
from trio_layers._nursery import open_hidden_nursery

END = 1000.0
# The number of pieces in which a blob arrives in a stage.
PIECES = 4
# The maximum that Docker's engine reads of a layer at once (Go's io.Copy).
MOST_READ = 32 * 1024


def diff_id_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def now() -> float:
    return round(trio.current_time(), 6)


class ScenarioError(Exception):
    """An error that a scenario prescribes."""


class Body(trio.abc.ReceiveStream):
    """A layer's bytes, with the pieces, the pace and the failure that a scenario prescribes."""

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
    """Records the time at which Docker's first read would have returned: after the 10 bytes that
    Docker looks at before it asks its store, or at the end. ``None``: the store was not asked.
    """

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
        if world.staged:
            digest, size = diff_id_of(self.key.encode()), len(self._body(spec["attempts"][-1]))
            self.descriptor = Descriptor("application/octet-stream", digest, size)
            self.download_into = self._download_into

    def diff_id(self) -> str | None:
        return self._spec["diff_id"]

    async def download(self, progress: Callable) -> tuple[Body, int]:
        spec = await self._try(progress, None)
        body = Body(self._world, self._name, self._body(spec), spec.get("body", {}))
        return body, spec.get("size", 0)

    async def _download_into(self, sink: Stage, progress: Callable) -> None:
        await self._try(progress, sink)

    def _body(self, attempt: dict) -> bytes:
        packed = attempt.get("body", {}).get("base64")
        return self._spec["content"].encode() if packed is None else base64.b64decode(packed)

    async def _try(self, progress: Callable, sink: Stage | None) -> dict:
        attempts = self._spec["attempts"]
        spec = attempts[min(self._attempt, len(attempts) - 1)]
        self._attempt += 1
        record = {"layer": self._name, "attempt": self._attempt, "start": now(), "end": None}
        self._world.downloads.append(record)
        outcome = "cancelled"
        try:
            with trio.CancelScope(shield=bool(spec.get("ignores_cancel"))):
                await self._take_its_time(spec, progress, sink)
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
        return spec

    async def _take_its_time(self, spec: dict, progress: Callable, sink: Stage | None) -> None:
        start = trio.current_time()
        steps: list[tuple[float, object]] = []
        if sink is not None:
            body = self._body(spec)
            if not body.startswith(sink.run.data) or spec.get("ignores_ranges"):
                await sink.restart()
            sink.run.pace = spec.get("body", {})
            # A failing download delivers half of its bytes.
            missing = len(body) // (1 if spec["result"] == "ok" else 2) - sink.offset
            for piece in range(PIECES):
                begin, end = (sink.offset + missing * (piece + i) // PIECES for i in (0, 1))
                steps.append((spec["seconds"] * (piece + 1) / PIECES, body[begin:end]))
        steps += ((event["at"], event) for event in spec.get("progress", []))
        for at, step in sorted(steps, key=lambda step: step[0]):
            await trio.sleep_until(start + at)
            if isinstance(step, bytes):
                await sink.write(step)
            else:
                progress(step["action"], step.get("current", 0), step.get("total", 0))
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

    def _hold(self, chain: str | None) -> StoredLayer | None:
        """Add a reference to a parent for the duration of a registration."""
        if chain is None:
            return None
        self.references[chain] += 1
        return self.layers[chain]

    def _add(
        self, content: bytes, parent: StoredLayer | None, *, drop_parent: bool = False
    ) -> StoredLayer:
        diff_id = diff_id_of(content)
        chain = extend_chain(parent.chain_id if parent else None, diff_id)
        if chain not in self.layers:
            # Its chain ID still contains its parent, as with the mock in moby's tests.
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
        # As in moby's store, the registration holds the parent, because the pull that wanted the
        # parent may release it meanwhile.
        below = self._hold(parent)
        try:
            content = await decompressed(first)
            record["diff_id"] = diff_id_of(content)
            layer = await self._work_and_add(content, below)
        except DecompressionError:
            raise  # Docker asks its store only after the stream is open
        except BaseException as error:
            if first.at is None:
                raise  # the same holds after a cancellation
            cancelled = isinstance(error, trio.Cancelled)
            record["error"] = "context canceled" if cancelled else str(error)
            self.log["register"].append({"start": first.at, "end": now(), **record})
            raise
        finally:
            self._give_back(parent)
        record["chain"] = layer.chain_id
        self.log["register"].append({"start": first.at, "end": now(), **record})
        return layer

    def work_on(self, diff_id: str) -> dict:
        """Return the time that a registration takes in addition to the reading."""
        return self._work.get(diff_id, self._work.get("*", {}))

    async def put(self, content: bytes, parent: str | None) -> StoredLayer:
        """Register the unpacked content of a stage.

        This work follows the last read, so the work overlaps with no download.
        """
        diff_id, start = diff_id_of(content), now()
        record = {"parent": parent or "", "diff_id": diff_id, "chain": None, "error": None}
        below = self._hold(parent)
        try:
            layer = await self._work_and_add(content, below)
            record["chain"] = layer.chain_id
        except ScenarioError as error:
            record["error"] = str(error)
            raise
        finally:
            self._give_back(parent)
            self.log["register"].append({"start": start, "end": now(), **record})
        return layer

    async def _work_and_add(self, content: bytes, below: StoredLayer | None) -> StoredLayer:
        work = self.work_on(diff_id_of(content))
        with trio.CancelScope(shield=True):
            await trio.sleep_until(trio.current_time() + work.get("seconds", 0))
        if work.get("error"):
            raise ScenarioError(work["error"])
        return self._add(content, below, drop_parent=work.get("drop_parent", False))

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


class StagingStore(Store):
    """A store that unpacks arriving bytes at the scenario's pace of reading.

    It drops the bytes of a failed blob, since the sources of a trace deliver the whole blob again.
    """

    @asynccontextmanager
    async def stage(
        self, descriptor: Descriptor, waiting: Callable[[int], None]
    ) -> AsyncIterator[Stage]:
        await trio.lowlevel.checkpoint()
        self._world.open_stages += 1
        try:
            async with open_hidden_nursery() as nursery:
                yield Stage(self, nursery)
                nursery.cancel_scope.cancel()
        finally:
            self._world.open_stages -= 1

    async def register(self, stream: trio.abc.ReceiveStream, *args: object) -> StoredLayer:
        """Register a repeated layer. Other layers use a stage."""
        assert stream._stream.name.startswith("tar of ")
        return await super().register(stream, *args)


@attrs.define(eq=False)
class Run:
    """A worker and its work."""

    data: bytes = b""
    complete: bool = False
    pace: dict | None = None
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    taken: int = 0
    content: bytes | None = None
    failure: Exception | None = None


class Stage:
    def __init__(self, store: StagingStore, nursery: trio.Nursery) -> None:
        self._store, self._nursery = store, nursery
        self._progress: Callable[[int], None] | None = None
        self.news = trio.lowlevel.ParkingLot()
        self.run = Run()
        nursery.start_soon(self._work, self.run)

    @property
    def offset(self) -> int:
        return len(self.run.data)

    @property
    def digest(self) -> str:
        return diff_id_of(self.run.data)

    @property
    def complete(self) -> bool:
        return self.run.complete

    async def write(self, data: bytes) -> None:
        assert not self.complete
        await trio.lowlevel.checkpoint()
        self.run.data += data
        self.news.unpark_all()

    async def restart(self) -> None:
        assert not self.complete
        await trio.lowlevel.checkpoint()
        self.run.scope.cancel()
        self.run = Run()
        self._nursery.start_soon(self._work, self.run)

    async def finish(self, progress: Callable[[int], None]) -> None:
        await trio.lowlevel.checkpoint()
        self._progress = progress
        if self.run.taken:
            progress(self.run.taken)
        self.run.complete = True
        self.news.unpark_all()

    async def wait_failed(self) -> Exception:
        await trio.lowlevel.checkpoint()
        while not (self.run.failure and (self.complete or self.run.pace.get("certain"))):
            await self.news.park()
        return self.run.failure

    async def commit(self, parent: str | None) -> StoredLayer:
        assert self.complete
        await trio.lowlevel.checkpoint()
        while self.run.content is None:
            if self.run.failure is not None:
                raise self.run.failure
            await self.news.park()
        return await self._store.put(self.run.content, parent)

    def taken(self, run: Run) -> None:
        if run is self.run and self._progress is not None:
            self._progress(run.taken)

    async def _work(self, run: Run) -> None:
        with run.scope:
            try:
                run.content = await decompressed(Arriving(self, run))
            except Exception as error:
                run.failure = error
            self.news.unpark_all()


class Arriving(trio.abc.ReceiveStream):
    """The counterpart of `Body` for arriving bytes: the same pieces at the same pace."""

    def __init__(self, stage: Stage, run: Run) -> None:
        self._stage, self._run = stage, run
        self._reads = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        run = self._run
        while not (run.complete or len(run.data) - run.taken >= self._least()):
            await self._stage.news.park()
        if self._reads == run.pace.get("fail_after"):
            raise ScenarioError(run.pace["error"])
        self._reads += 1
        if run.taken < len(run.data) and run.pace.get("chunk_seconds"):
            await trio.sleep_until(trio.current_time() + run.pace["chunk_seconds"])
        size = min(run.pace.get("chunk") or MOST_READ, max_bytes or MOST_READ, MOST_READ)
        data = run.data[run.taken : run.taken + size]
        run.taken += len(data)
        self._stage.taken(run)
        return data

    def _least(self) -> float:
        """Return the number of bytes that must have arrived for any read but the last."""
        if self._run.pace is None:
            return float("inf")
        whole = "fail_after" in self._run.pace or self._run.pace.get("chunk_seconds")
        return self._run.pace.get("chunk") or MOST_READ if whole else 1

    async def aclose(self) -> None:
        raise AssertionError("nobody closes it")


class World:
    """Plays one scenario, and records its events with their times."""

    def __init__(self, scenario: dict, *, staged: bool = False) -> None:
        self.scenario = scenario
        self.staged = staged
        self.open_stages = 0
        self.downloads: list[dict] = []
        self.descriptor_close: dict[str, list[float]] = {}
        self.reader_close: dict[str, list[float]] = {}
        self.bodies: list[Body] = []
        self.registered: list[list] = []
        self.pulls: dict[str, dict] = {}
        self.store = (StagingStore if staged else Store)(self, scenario["store"])
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
            assert self.open_stages == 0
            released = list(self.store.log["release"])
            nursery.cancel_scope.cancel()
        # The state before the end of the test releases its layers.
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
