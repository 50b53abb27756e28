"""Registrations that finish after their last pull was cancelled.

The scenarios have the form of the recorded ones. Their outcomes are derived by hand from moby's
code.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
from engine.fakes import FakeSource, diff_id_of
from engine.recorded_world import World
from engine.seeds import run
from engine.test_traces import broken_invariants, by_text

from trio_layers._digest import chain_id
from trio_layers._engine.download import open_download_manager
from trio_layers._memory import MemoryStage, MemoryStore

SEEDS = range(12)
CANCELED = "context canceled"


def chain(*contents: str) -> str:
    return chain_id([diff_id_of(content.encode()) for content in contents])


@attrs.frozen
class Case:
    """A scenario and its expected outcome.

    Attributes:
        pulls: Pull name -> layers, start time and time of its cancellation.
        ends: Pull name -> end time and error.
        registered: [time, source] of each call of ``registered``.
        register: [time, chain, error] of each registration.
        release: [time, chain] of each release.
        complete: Pull name -> layers for which the pull sees ``Pull complete``.
        register_work: Content -> duration and result of its registration.
        seconds: Content -> duration of its download; the default is 1.
        fails: The contents of which the download fails permanently.
    """

    pulls: dict[str, tuple[str, float, float | None]]
    ends: dict[str, tuple[float, str | None]]
    registered: list
    register: list
    release: list
    complete: dict[str, str]
    register_work: dict = attrs.field(factory=dict)
    seconds: dict = attrs.field(factory=dict)
    fails: str = ""

    def scenario(self) -> dict:
        names = sorted({name for layers, _, _ in self.pulls.values() for name in layers})
        work = {diff_id_of(name.encode()): work for name, work in self.register_work.items()}
        return {
            "manager": {"concurrency": 3},
            "store": {"register": {"*": {"seconds": 2}} | work},
            "layers": {name: self._layer(name) for name in names},
            "pulls": [
                {"name": name, "at": at, "layers": list(layers), "cancel_at": until}
                | {"release_at": 50}
                for name, (layers, at, until) in self.pulls.items()
            ],
            "set_concurrency": [],
        }

    def _layer(self, name: str) -> dict:
        attempt = {"seconds": self.seconds.get(name, 1), "result": "ok"}
        if name in self.fails:
            attempt |= {"result": "do_not_retry", "error": "gone"}
        return {"id": name, "key": name, "content": name, "diff_id": None, "attempts": [attempt]}


CASES = {
    "alone": Case(
        pulls={"p": ("a", 0, 2)},
        ends={"p": (3, CANCELED)},
        registered=[[3, "p/0"]],
        register=[[3, chain("a"), None]],
        release=[[3, chain("a")]],
        complete={"p": ""},
    ),
    "with an error": Case(
        pulls={"p": ("a", 0, 2)},
        register_work={"a": {"seconds": 2, "error": "no space"}},
        ends={"p": (3, CANCELED)},
        registered=[],
        register=[[3, None, "no space"]],
        release=[],
        complete={"p": ""},
    ),
    "on a parent that is released": Case(
        pulls={"p": ("ab", 0, 4)},
        ends={"p": (5, CANCELED)},
        registered=[[3, "p/0"], [5, "p/1"]],
        register=[[3, chain("a"), None], [5, chain("a", "b"), None]],
        release=[[4, chain("a")], [5, chain("a", "b")]],
        complete={"p": "a"},
    ),
    "below one that waits": Case(
        pulls={"p": ("ab", 0, 2)},
        ends={"p": (3, CANCELED)},
        registered=[[3, "p/0"]],
        register=[[3, chain("a"), None]],
        release=[[3, chain("a")]],
        complete={"p": ""},
    ),
    "without its parent": Case(
        pulls={"p": ("ab", 0, 4)},
        register_work={"b": {"seconds": 3, "drop_parent": True}},
        ends={"p": (6, CANCELED)},
        registered=[[3, "p/0"], [6, "p/1"]],
        register=[[3, chain("a"), None], [6, chain("a", "b"), None]],
        release=[[4, chain("a")], [6, chain("a", "b")]],
        complete={"p": "a"},
    ),
    "of a repeated layer": Case(
        pulls={"p": ("aba", 0, 6)},
        ends={"p": (7, CANCELED)},
        registered=[[3, "p/0"], [5, "p/1"], [7, "p/2"]],
        register=[
            [3, chain("a"), None],
            [5, chain("a", "b"), None],
            [7, chain("a", "b", "a"), None],
        ],
        release=[[6, chain("a")], [6, chain("a", "b")], [7, chain("a", "b", "a")]],
        complete={"p": "ab"},
    ),
    "of a layer on itself": Case(
        pulls={"p": ("aa", 0, 4)},
        ends={"p": (5, CANCELED)},
        registered=[[3, "p/0"], [5, "p/1"]],
        register=[[3, chain("a"), None], [5, chain("a", "a"), None]],
        release=[[4, chain("a")], [5, chain("a", "a")]],
        complete={"p": "a"},
    ),
    "of two pulls, one after the other": Case(
        pulls={"p": ("a", 0, 1.5), "q": ("a", 0.5, 2.5)},
        ends={"p": (1.5, CANCELED), "q": (3, CANCELED)},
        registered=[[3, "p/0"]],
        register=[[3, chain("a"), None]],
        release=[[3, chain("a")]],
        complete={"p": "", "q": ""},
    ),
    "of two pulls, one stays": Case(
        pulls={"p": ("a", 0, 2), "q": ("a", 0.5, None)},
        ends={"p": (2, CANCELED), "q": (3, None)},
        registered=[[3, "p/0"]],
        register=[[3, chain("a"), None]],
        release=[[50, chain("a")]],
        complete={"p": "", "q": "a"},
    ),
    "and again for a later pull": Case(
        pulls={"p": ("a", 0, 2), "q": ("a", 2.5, None)},
        ends={"p": (3, CANCELED), "q": (6, None)},
        registered=[[3, "p/0"], [6, "q/0"]],
        register=[[3, chain("a"), None], [6, chain("a"), None]],
        release=[[3, chain("a")], [50, chain("a")]],
        complete={"p": "", "q": "a"},
    ),
    "and twice in vain": Case(
        pulls={"p": ("ab", 0, 4), "q": ("ab", 4.5, 9)},
        ends={"p": (5, CANCELED), "q": (9.5, CANCELED)},
        # The lower layer's transfer is gone at 4, the upper layer's transfer stops at 5.
        registered=[[3, "p/0"], [5, "p/1"], [7.5, "q/0"], [9.5, "q/1"]],
        register=[
            [3, chain("a"), None],
            [5, chain("a", "b"), None],
            [7.5, chain("a"), None],
            [9.5, chain("a", "b"), None],
        ],
        release=[
            [4, chain("a")],
            [5, chain("a", "b")],
            [9, chain("a")],
            [9.5, chain("a", "b")],
        ],
        complete={"p": "a", "q": "a"},
    ),
    "when another layer fails": Case(
        pulls={"p": ("abc", 0, None)},
        seconds={"c": 2},
        fails="c",
        # The pull waits for transfers of which it was the last watcher.
        ends={"p": (3, "gone")},
        registered=[[3, "p/0"]],
        register=[[3, chain("a"), None]],
        release=[[3, chain("a")]],
        complete={"p": ""},
    ),
}


@pytest.mark.parametrize("staged", [False, True], ids=["streamed", "staged"])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_registration_finishes(case: Case, staged: bool) -> None:
    """The source learns the diff ID, and the engine releases the layer."""
    for seed in SEEDS:
        world = World(case.scenario(), staged=staged)
        run(world.play, seed)
        ends = {name: (pull["end"], pull["error"]) for name, pull in world.pulls.items()}
        registered = [each[:2] for each in world.registered]
        register = [[r["end"], r["chain"], r["error"]] for r in world.store.log["register"]]
        release = world.store.log["release"]
        assert not broken_invariants(world)
        assert not world.final
        for name, pull in world.pulls.items():
            complete = [
                layer
                for layer, events in pull["progress"].items()
                if events[-1][1] == "Pull complete"
            ]
            assert "".join(sorted(complete)) == case.complete[name]
        assert ends == case.ends
        assert by_text(registered) == by_text(case.registered)
        assert by_text(register) == by_text(case.register)
        assert by_text(release) == by_text(case.release)


class DeafStage(MemoryStore):
    """A store with one-second commits that ignore cancellation.

    Leaving a stage is a checkpoint.
    """

    @asynccontextmanager
    async def stage(self, descriptor, waiting=None) -> AsyncIterator[MemoryStage]:
        async with super().stage(descriptor) as stage:
            commit = stage.commit

            async def deaf(parent):
                held = None if parent is None else await self.get(parent)
                with trio.CancelScope(shield=True):
                    await trio.sleep(1)
                    layer = await commit(parent)
                if held is not None:
                    self.release(held)
                return layer

            stage.commit = deaf
            try:
                yield stage
            finally:
                await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("seed", range(10))
def test_commit_that_has_begun(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A started commit completes despite the cancellation; a waiting one never starts."""
    monkeypatch.setattr(FakeSource, "staged", True)
    sources = [FakeSource("a"), FakeSource("b"), FakeSource("c")]
    store = DeafStage()
    events: list[tuple[str, str]] = []

    async def sink(event) -> None:
        events.append((event.id, event.action))

    async def main() -> None:
        async with open_download_manager(store) as manager:
            with trio.move_on_at(1.5) as scope:
                async with manager.download(sources, progress=sink):
                    raise AssertionError("the pull was to be cancelled")
            assert scope.cancelled_caught
            assert trio.current_time() == 2

    run(main, seed)
    assert [source.told for source in sources] == [[diff_id_of(b"a")], [diff_id_of(b"b")], []]
    assert [source.closed for source in sources] == [1] * 3
    assert not store.layers
    assert ("a", "Pull complete") in events
    assert ("b", "Pull complete") not in events


def test_source_that_fails_when_it_is_told_too_late() -> None:
    """The engine releases the layer, and the pull ends as cancelled."""

    class Store(MemoryStore):
        async def register(self, stream, parent, descriptor=None):
            layer = await super().register(stream, parent, descriptor)
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
            return layer

    source, store = FakeSource("a"), Store()

    def registered(diff_id: str) -> None:
        raise OSError("too late")

    source.registered = registered

    async def main() -> None:
        async with open_download_manager(store) as manager:
            with trio.move_on_at(0.5) as scope:
                async with manager.download([source]):
                    raise AssertionError("the pull was to be cancelled")
            assert scope.cancelled_caught
            assert trio.current_time() == 1

    run(main)
    assert not store.layers
    assert source.closed == 1
