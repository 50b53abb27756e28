"""A registry, a process that breaks, and checks of the store that is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import attrs
import trio
import trio.testing
from crashes.checker import Found, look_at
from crashes.scenarios import IMAGES, Scenario, wanted

from trio_layers.testing import BuiltImage, BuiltIndex, Cut, Registry, open_registry

SCRIPT = Path(__file__).with_name("child.py")
MEMORY = Path("/dev/shm")


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """Make a directory in memory if possible: without power cuts, thousands of
    syncs have no use.
    """
    place = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="crashes-", dir=place) as path:
        yield Path(os.path.realpath(path))


@attrs.frozen
class Run:
    """The reports of a child, and its exit status: a negative number is a signal."""

    said: list[dict]
    ended: int

    @property
    def pulled(self) -> list[str]:
        return [each["pulled"] for each in self.said if "pulled" in each]

    @property
    def failures(self) -> list[dict]:
        return [each for each in self.said if "failed" in each]

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of occurrences of each step, if the child survived to report it."""
        return next((each["counts"] for each in self.said if "counts" in each), {})

    @property
    def hit(self) -> int:
        return next((each["hit"] for each in self.said if "hit" in each), 0)

    def keys(self, *, durable: bool = False) -> dict[str, list[str]]:
        """Return the keys of the last COMMIT, or with ``durable`` of the last synced one."""
        return last_keys(self.said, durable=durable)


def last_keys(said: list[dict], *, durable: bool = False) -> dict[str, list[str]]:
    for each in reversed(said):
        if "durable" in each and (each["durable"] or not durable):
            keys: dict[str, list[str]] = each["keys"]
            return keys
    return {}


class World:
    """Child processes that pull from a registry of the test."""

    def __init__(self, registry: Registry, process: trio.Process, place: Path) -> None:
        self.registry = registry
        self.place = place
        self._process = process
        self._buffer = bytearray()
        self._stores: dict[str, Path] = {}
        self._remaining: dict[str, dict[str, list[str]]] = {}
        self._number = 0
        self.names = {
            name: registry.add(built, f"crashes/{name}") for name, (built, _) in IMAGES.items()
        }
        self.layers = {
            layer.descriptor.digest: layer.descriptor.size
            for built, _ in IMAGES.values()
            for layer in _image_of(built).layers
        }

    def new_path(self) -> Path:
        self._number += 1
        return self.place / str(self._number)

    async def store_for(self, scenario: Scenario) -> Path:
        """Make a new store with the state that the scenario begins with, which may be empty."""
        path = self.new_path()
        if scenario.before:
            if scenario.name not in self._stores:
                self._stores[scenario.name] = await self._make(scenario, self.new_path())
            copy = ["cp", "--archive", self._stores[scenario.name], path]
            await trio.run_process(copy)
        return path

    async def _make(self, scenario: Scenario, path: Path) -> Path:
        await self.prepare(scenario, path)
        return path

    async def prepare(self, scenario: Scenario, path: Path) -> None:
        """Prepare a store in ``path`` for the scenario."""
        if not scenario.before:
            return
        done = await self.run(path, scenario.before)
        assert (done.ended, done.failures) == (0, []), done
        if scenario.cut is not None:
            built = _image_of(IMAGES[scenario.pulls[0]][0])
            largest = max((each.descriptor for each in built.layers), key=lambda each: each.size)
            self.registry.inject(f"*/blobs/{largest.digest}", Cut(after=scenario.cut))
            done = await self.run(path, scenario.pulls, attempts=1)
            assert [each["failed"] for each in done.failures] == ["pull"], done
            found = look_at(path)
            assert found.wrong == []
            assert found.there[largest.digest] == scenario.cut

    async def certain(self, scenario: Scenario, had: dict[str, list[str]]) -> dict[str, list[str]]:
        """Return the keys that must exist at any break of the scenario.

        Keys that the scenario removes may be gone by a COMMIT that was not reported any more.
        """
        if not scenario.removes:
            return had
        if scenario.name not in self._remaining:
            path = await self.store_for(scenario)
            self._remaining[scenario.name] = (await self.run(path, scenario.pulls)).keys()
            remove(path)
        remaining = self._remaining[scenario.name]
        return {
            table: [key for key in keys if key in remaining.get(table, ())]
            for table, keys in had.items()
        }

    async def run(
        self,
        path: Path,
        names: tuple[str, ...],
        *,
        at: Callable[[dict, list[dict]], Awaitable[None]] | None = None,
        said: list[dict] | None = None,
        **request: object,
    ) -> Run:
        """Have a child pull into a store.

        Args:
            path: The store.
            names: The images to pull.
            at: Called where the child waits at a step, with the step and the earlier reports.
            said: Receives the reports as they come.
            request: More members, see ``child.py``.
        """
        pulls: list[tuple[str, dict[str, str] | None]] = []
        for name in names:
            if name.startswith("-"):
                pulls.append((self.names[name[1:]], None))
            else:
                pulls.append((self.names[name], wanted(name)))
        await self._tell({"path": os.fspath(path), "pulls": pulls, **request})
        said = [] if said is None else said
        with trio.fail_after(300):
            while True:
                line = await self._next()
                if "ended" in line:
                    return Run(said, line["ended"])
                if "at" in line:
                    if at is not None:
                        await at(line, said)
                    await self._tell("go on")
                said.append(line)

    async def recover(
        self, path: Path, scenario: Scenario, *, kept: bool = True, workers: bool = False
    ) -> list[str]:
        """Open a broken store, and pull all of the scenario; return the errors.

        Args:
            path: The store.
            scenario: The scenario that broke.
            kept: Whether all written bytes have survived, durable or not.
            workers: Whether layers are unpacked in processes.
        """
        # The last reports of a dead process may still be unread.
        await trio.testing.wait_all_tasks_blocked(0.01)
        before = look_at(path)
        wrong = [f"found: {each}" for each in before.wrong]
        missing = {
            digest: size - before.there.get(digest, 0) for digest, size in self.layers.items()
        }
        asked = len(self.registry.requests)
        done = await self.run(path, scenario.all, workers=workers)
        if done.ended != 0 or done.failures:
            wrong.append(f"afterwards a pull ended with {done.ended}, {done.failures}")
        if done.pulled != [self.names[name] for name in scenario.all]:
            wrong.append(f"afterwards only {done.pulled} was pulled")
        came = Counter[str]()
        for exchange in self.registry.requests[asked:]:
            if "/blobs/" in exchange.path:
                came[exchange.path.rpartition("/")[2]] += exchange.bytes_sent
        for digest, size in came.items():
            if digest in before.keys.get("blobs", ()):
                wrong.append(f"{size} bytes were downloaded of {digest}, which was there")
            elif kept and digest in missing and size != missing[digest]:
                wrong.append(f"{size} bytes were downloaded of {digest}, not {missing[digest]}")
        after = look_at(path, settled=True)
        wrong += [f"afterwards: {each}" for each in after.wrong]
        if after.unclaimed:
            wrong.append(f"afterwards without a row: {after.unclaimed}")
        wrong += [f"afterwards: {each}" for each in lost(before.keys, after.keys)]
        return wrong

    async def _tell(self, what: object) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(json.dumps(what).encode() + b"\n")

    async def _next(self) -> dict:
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            data = await self._process.stdout.receive_some()
            if not data:
                raise AssertionError("the process that forks children has ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        told: dict = json.loads(line)
        return told


def lost(had: dict[str, list[str]], found: dict[str, list[str]]) -> list[str]:
    """Return the lost keys of a catalog. A reference may point to something newer."""
    return [
        f"lost of {table}: {key}"
        for table, keys in had.items()
        for key in keys
        if key not in found.get(table, ())
    ]


def untyped(run: Run) -> list[str]:
    """Return the wrong errors in a child's reports."""
    wrong = [f"it ended with {run.ended}"] if run.ended != 0 else []
    for failure in run.failures:
        if "StoreError" not in failure["kinds"]:
            wrong.append(f"{failure['failed']}: {failure['kinds'][0]}: {failure['text']}")
        elif failure["failed"] == "again":
            wrong.append(f"when it was over: {failure['text']}")
    return wrong


async def verdict(
    world: World,
    path: Path,
    scenario: Scenario,
    had: dict[str, list[str]],
    *,
    kept: bool = True,
    workers: bool = False,
) -> list[str]:
    """Return the errors of a broken store that had committed these keys."""
    found: Found = look_at(path)
    wrong = lost(await world.certain(scenario, had), found.keys)
    return wrong + await world.recover(path, scenario, kept=kept, workers=workers)


@asynccontextmanager
async def open_world() -> AsyncIterator[World]:
    tests = os.fspath(SCRIPT.parent.parent)
    paths = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    with scratch_directory() as place:
        async with open_registry() as registry:
            process = await trio.lowlevel.open_process(
                [sys.executable, SCRIPT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": paths},
            )
            try:
                world = World(registry, process, place)
                assert await world._next() == {"ready": True}
                yield world
            finally:
                with trio.CancelScope(shield=True):
                    os.killpg(process.pid, signal.SIGKILL)  # this ends its child, too
                    await process.wait()


def remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _image_of(built: object) -> BuiltImage:
    if isinstance(built, BuiltIndex):
        return built.images[0]
    assert isinstance(built, BuiltImage)
    return built
