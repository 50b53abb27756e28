"""Tests of stacks of thousands of layers.

Each layer costs as much as the first one, in short steps of the event loop.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import attrs
import pytest
import trio
from _tools.calls import calls_of
from store.stores import Blob, Stream, digest_of, layer_of, open_with_threads

from trio_layers._catalog.rows import StoredLayer, add_layer, find_layer
from trio_layers._digest import ChainID, extend_chain
from trio_layers._rootfs import merged
from trio_layers._rootfs.merged import MergedTree, SurveyCache, TreeStack
from trio_layers._store.directory import DirectoryStore

LAYER = layer_of(**{"a/b/file": "content"})


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[DirectoryStore]:
    async with open_with_threads(path) as store:
        yield store


async def put_stack(store: DirectoryStore, blob: Blob, height: int) -> list[ChainID]:
    """Write a stack of one repeated layer, as registrations would; return the chain IDs."""
    layer = await store.register(Stream(blob.data), None, blob.descriptor)
    store.release(layer)
    chains = [layer.chain_id]

    def add(connection: sqlite3.Connection) -> None:
        row = find_layer(connection, chains[0])
        assert row is not None
        for _ in range(height - 1):
            chain = extend_chain(chains[-1], row.diff_id)
            add_layer(connection, StoredLayer(chain, row.diff_id, chains[-1], row.tree, row.blob))
            chains.append(chain)

    await store._parts.catalog.write(add)
    return chains


class Steps(trio.abc.Instrument):
    """Counts the calls of a function in each step of the loop."""

    def __init__(self) -> None:
        self.calls = self.most = self.all = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.calls = 0

    def note(self, count: int = 1) -> None:
        self.calls += count
        self.all += count
        self.most = max(self.most, self.calls)


@contextmanager
def counting_steps() -> Iterator[Steps]:
    steps = Steps()
    trio.lowlevel.add_instrument(steps)
    try:
        yield steps
    finally:
        trio.lowlevel.remove_instrument(steps)


async def test_a_layer_of_a_high_stack_is_found_in_short_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    height = 3000
    async with opened(tmp_path / "store") as store:
        chains = await put_stack(store, LAYER, height)
        real = store._layers._object_of
        with counting_steps() as steps:
            monkeypatch.setattr(
                store._layers, "_object_of", lambda *args: (steps.note(), real(*args))[1]
            )
            layer = await store.get(chains[-1])
        assert layer is not None
        assert steps.all == height
        assert steps.most <= 512
        found = layer
        for chain in reversed(chains[:-1]):
            assert found.parent is not None
            found = found.parent
            assert found.chain_id == chain
        assert found.parent is None
        # The layer's object exists, so the store makes no other.
        assert await store.find(chains[-1]) is layer
        assert steps.all == height
        store.release(layer)
        view = await store.rootfs(chains[-1])
        assert await view.read_bytes("/a/b/file") == b"content"
        assert [entry.path for entry in await view.walk()] == [b"", b"a", b"a/b", b"a/b/file"]
        report = await view.export(tmp_path / "out")
        assert report is not None
        assert (await store.check()).problems == ()
        assert (await store.collect()).layers == height


async def test_a_repeated_layer_takes_as_many_jobs_on_any_height(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = lists = 0
    async with opened(tmp_path) as store:
        chains = await put_stack(store, LAYER, 1200)
        top = await store.get(chains[-1])
        assert top is not None
        real_read, real_list = store._parts.catalog.read, merged._open_list

        async def read(job: Callable[..., object], *args: object) -> object:
            nonlocal jobs
            jobs += 1
            return await real_read(job, *args)

        def list_of(tree: Path) -> object:
            nonlocal lists
            lists += 1
            return real_list(tree)

        monkeypatch.setattr(store._parts.catalog, "read", read)
        monkeypatch.setattr(merged, "_open_list", list_of)
        counts = []
        layers = [top]
        for _ in range(3):
            jobs = lists = 0
            layers.append(await store.register(Stream(b""), layers[-1].chain_id, LAYER.descriptor))
            counts.append((jobs, lists))
        # The first registration reads each list of the layers below once.
        assert counts[0][1] == 1200
        for jobs, lists in counts[1:]:
            assert (jobs <= 4, lists) == (True, 1)
        assert layers[-1].parent is layers[-2]
        for layer in layers:
            store.release(layer)


async def test_a_blob_of_another_size_is_not_taken_for_the_one_that_is_there(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as store:
        layer = await store.register(Stream(LAYER.data), None, LAYER.descriptor)
        wrong = attrs.evolve(LAYER.descriptor, size=LAYER.descriptor.size + 1)
        with pytest.raises(Exception, match="does not match its descriptor"):
            await store.register(Stream(LAYER.data), layer.chain_id, wrong)
        store.release(layer)


async def test_a_lease_on_many_things_ends_in_short_steps(tmp_path: Path) -> None:
    digests = [digest_of(b"%d" % number) for number in range(10_000)]
    async with opened(tmp_path) as store:
        with counting_steps() as steps:
            holds = store._parts.leases
            real = holds.let_go
            try:
                holds.let_go = lambda some: (steps.note(len(some)), real(some))[1]
                async with store.lease(*digests):
                    pass
            finally:
                del holds.let_go
        assert steps.all == len(digests)
        assert steps.most <= 2048
        assert not holds._uses
        assert not holds._written

        def leases(connection: sqlite3.Connection) -> int:
            [count] = connection.execute("SELECT count(*) FROM leases").fetchone()
            return count

        assert await store._parts.catalog.read(leases) == 0


async def test_a_lease_on_many_things_that_is_cancelled_ends_all_the_same(tmp_path: Path) -> None:
    digests = [digest_of(b"%d" % number) for number in range(5_000)]
    async with opened(tmp_path) as store:
        with trio.CancelScope() as scope:
            async with store.lease(*digests):
                scope.cancel()
                await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert not store._parts.leases._uses
        assert not store._parts.leases._written


def test_a_stack_that_grows_is_surveyed_in_linear_work(tmp_path: Path) -> None:
    async def make() -> Path:
        async with opened(tmp_path) as store:
            layer = await store.register(Stream(LAYER.data), None, LAYER.descriptor)
            store.release(layer)
            return layer.tree

    tree = trio.run(make)

    def grow(height: int) -> None:
        surveys = SurveyCache()
        stack: TreeStack | None = None
        for _ in range(height):
            stack = TreeStack(tree, stack)
            assert MergedTree(stack, surveys=surveys).survey([b""])[b""] is not None

    assert calls_of(lambda: grow(400)) <= 2.2 * calls_of(lambda: grow(200))


def test_equal_stacks_have_equal_keys(tmp_path: Path) -> None:
    def stacked(*names: str) -> TreeStack:
        stack: TreeStack | None = None
        for name in names:
            stack = TreeStack(tmp_path / name, stack)
        assert stack is not None
        return stack

    assert stacked("a", "b").key == stacked("a", "b").key
    assert stacked("a", "b").height == 2
    keys = [stacked(*names).key for names in ("a", "b", "ab", "ba", "aa", ("ab",), ("a", "a", "b"))]
    assert len(set(keys)) == len(keys)
    assert MergedTree(stacked("a", "b")).trees == (tmp_path / "a", tmp_path / "b")
