"""Layers that are unpacked while they arrive."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import threading
from pathlib import Path

import pytest
import trio
import trio.testing
from store.stores import (
    Blob,
    Stream,
    TarUnpacker,
    Watched,
    arriving,
    chain_of,
    describe,
    digest_of,
    ingest,
    layer_of,
    open_with_threads,
    opened,
    tar_of,
    visible,
)

from trio_layers._digest import ChainID
from trio_layers._errors import StoreError, StoreFull, UnpackError, VerificationError
from trio_layers._store import commits
from trio_layers._store.directory import DirectoryStore
from trio_layers._store.layers import DirectoryLayer
from trio_layers._store.partial import Partial
from trio_layers._workers.arrival_state import (
    Abandoned,
    ArrivalState,
    Follower,
    Snapshot,
    StartedOver,
)

MIB = 1024 * 1024
NOISE = random.Random(1).randbytes(3 * MIB)
BASE = layer_of(hello="world")
TOP = layer_of(more="files", big=NOISE)
ASSUMING = layer_of(assumes="", some="thing")
NEEDY = layer_of(**{"needs-lower": "", "other": "thing"})


def ignore(position: int) -> None:
    pass


async def stage(store: DirectoryStore, blob: Blob, parent: ChainID | None = None) -> DirectoryLayer:
    """Stage a blob, from the bytes already received to its end."""
    async with store.stage(blob.descriptor) as staged:
        if not staged.complete:
            await staged.write(blob.data[staged.offset :])
        await staged.finish(ignore)
        layer = await staged.commit(parent)
    assert isinstance(layer, DirectoryLayer)
    return layer


async def test_a_layer_is_unpacked_while_it_arrives(tmp_path: Path) -> None:
    unpacker = Watched()
    async with opened(tmp_path, unpacker) as store:
        async with store.stage(TOP.descriptor) as staged:
            assert (staged.complete, staged.offset) == (False, 0)
            unpacker.reached = MIB, trio.Event()
            await staged.write(TOP.data[:MIB])
            await unpacker.reached[1].wait()
            assert visible(tmp_path) == []
            await staged.write(TOP.data[MIB:])
            assert (staged.offset, staged.digest) == (len(TOP.data), TOP.digest)
            told: list[int] = []
            await staged.finish(told.append)
            assert staged.complete
            layer = await staged.commit(None)
            assert layer.chain_id == chain_of(TOP)
            assert (layer.tree / "fs" / "big").read_bytes() == NOISE
            await trio.testing.wait_all_tasks_blocked()
            assert told[-1] == len(TOP.data)
            assert told == sorted(told)
        assert unpacker.began == 1
        assert await store.read_blob(TOP.digest, limit=len(TOP.data)) == TOP.data
        assert store.statistics().references == 1
        store.release(layer)
    assert arriving(tmp_path) == []


async def test_what_is_started_over_is_never_mixed(tmp_path: Path) -> None:
    other = layer_of(other=NOISE[::-1])
    unpacker = Watched()
    async with opened(tmp_path, unpacker) as store:
        async with store.stage(TOP.descriptor) as staged:
            for data in (other.data[: 2 * MIB], other.data[: MIB + 17], TOP.data[:MIB]):
                unpacker.reached = MIB, trio.Event()
                await staged.write(data)
                await unpacker.reached[1].wait()
                await staged.restart()
                assert staged.offset == 0
            await staged.write(TOP.data)
            await staged.finish(ignore)
            layer = await staged.commit(None)
        assert unpacker.began == 4
        assert sorted(os.listdir(layer.tree / "fs")) == ["big", "more"]
        assert (layer.tree / "fs" / "big").read_bytes() == NOISE
    assert arriving(tmp_path) == []


async def test_what_is_wrong_with_unverified_bytes_is_not_the_layers_fault(tmp_path: Path) -> None:
    """The worker meets the damage before the verification does. The next attempt brings the right
    bytes.
    """
    wrong = TOP.data[: 2 * MIB] + bytes(len(TOP.data) - 2 * MIB)
    async with open_with_threads(tmp_path) as store:
        async with store.stage(TOP.descriptor) as staged:
            await staged.write(wrong)
            with trio.move_on_after(0.1) as scope:
                await staged.wait_failed()
            assert scope.cancelled_caught
            with pytest.raises(VerificationError):
                await staged.finish(ignore)
            assert (staged.complete, staged.offset) == (False, 0)
            await staged.write(TOP.data)
            await staged.finish(ignore)
            layer = await staged.commit(None)
        assert (layer.tree / "fs" / "big").read_bytes() == NOISE


async def test_a_layer_that_is_verified_and_cannot_be_unpacked(tmp_path: Path) -> None:
    data = TOP.data[:1000] + bytes(len(TOP.data) - 1000)
    async with open_with_threads(tmp_path) as store:
        async with store.stage(describe(data)) as staged:
            await staged.write(data)
            await staged.finish(ignore)
            error = await staged.wait_failed()
            assert isinstance(error, UnpackError)
            with pytest.raises(UnpackError) as caught:
                await staged.commit(None)
            assert caught.value is error
        assert visible(tmp_path) == []
        await stage(store, TOP)
    assert arriving(tmp_path) == [digest_of(data).removeprefix("sha256:") + ".partial"]


async def test_left_without_commit_the_bytes_stay_and_nothing_else(tmp_path: Path) -> None:
    unpacker = Watched()
    async with opened(tmp_path, unpacker) as store:
        unpacker.reached = MIB, trio.Event()
        async with store.stage(TOP.descriptor) as staged:
            await staged.write(TOP.data[: 2 * MIB + 1])
            await unpacker.reached[1].wait()
        assert visible(tmp_path) == []
        assert store.statistics().unpacking == 0
        async with store.stage(TOP.descriptor) as staged:
            assert staged.offset == 2 * MIB + 1
            await staged.write(TOP.data[staged.offset :])
            await staged.finish(ignore)
            await staged.commit(None)
    assert arriving(tmp_path) == []


async def test_cancelled_anywhere_it_is_resumed(tmp_path: Path) -> None:
    """The call is cancelled once at each of its checkpoints. The worker stops, and no byte is
    downloaded twice.
    """
    async with open_with_threads(tmp_path) as store:
        for deadline in range(1, 200):
            scope = trio.CancelScope()
            steps = 0

            class Cancel(trio.abc.Instrument):
                def before_task_step(self, task: trio.lowlevel.Task) -> None:
                    nonlocal steps
                    steps += 1
                    if steps == deadline:  # noqa: B023
                        scope.cancel()  # noqa: B023

            instrument = Cancel()
            trio.lowlevel.add_instrument(instrument)
            with scope:
                await stage(store, BASE)
            trio.lowlevel.remove_instrument(instrument)
            assert store.statistics().unpacking == 0
            if not scope.cancelled_caught:
                break
        assert deadline > 5
        assert await store.get(chain_of(BASE)) is not None
    assert arriving(tmp_path) == []


async def test_cancelled_in_a_write_it_lets_nobody_else_write_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that writes cannot be stopped, so the stage keeps its file until the thread has
    finished.
    """
    append, writing, go_on = Partial.append, trio.Event(), threading.Event()
    data = TOP.data[: 2 * MIB]

    def slow(self: Partial, *pieces: bytes) -> None:
        trio.from_thread.run_sync(writing.set)
        go_on.wait()
        append(self, *pieces)

    async def write() -> None:
        with scope:
            async with store.stage(TOP.descriptor) as staged:
                await staged.write(data)

    async with open_with_threads(tmp_path) as store:
        scope = trio.CancelScope()
        monkeypatch.setattr(Partial, "append", slow)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                await writing.wait()
                scope.cancel()
                await trio.testing.wait_all_tasks_blocked(0.1)
                go_on.set()
        finally:
            go_on.set()
        monkeypatch.setattr(Partial, "append", append)
        async with store.stage(TOP.descriptor) as staged:
            assert (staged.offset, staged.digest) == (len(data), digest_of(data))


async def test_the_tree_of_a_blob_serves_another_chain(tmp_path: Path) -> None:
    unpacker = TarUnpacker()
    async with opened(tmp_path, unpacker) as store:
        base = await stage(store, BASE)
        one = await stage(store, ASSUMING, base.chain_id)
        top = await stage(store, TOP)
        async with store.stage(ASSUMING.descriptor) as staged:
            assert staged.complete
            assert staged.offset == ASSUMING.descriptor.size
            await staged.finish(ignore)
            other = await staged.commit(top.chain_id)
        assert one.tree == other.tree
        assert unpacker.calls == ["alone"] * 3
        again = await stage(store, ASSUMING, top.chain_id)
        assert again is other


async def test_a_blob_that_is_there_is_unpacked_without_a_download(tmp_path: Path) -> None:
    unpacker = TarUnpacker()
    async with opened(tmp_path, unpacker) as store:
        await ingest(store, BASE.data)
        async with store.stage(BASE.descriptor) as staged:
            assert staged.complete
            await staged.finish(ignore)
            layer = await staged.commit(None)
        assert (layer.tree / "fs" / "hello").read_text() == "world"


@pytest.mark.parametrize("blob", [NEEDY, ASSUMING], ids=["needs lower", "assumption"])
async def test_where_the_tree_does_not_fit_it_is_unpacked_on_the_parent(
    tmp_path: Path, blob: Blob
) -> None:
    unpacker = TarUnpacker()
    unpacker.assumption = False
    async with opened(tmp_path, unpacker) as store:
        base = await stage(store, BASE)
        layer = await stage(store, blob, base.chain_id)
        assert layer.tree.name == chain_of(BASE, blob).removeprefix("sha256:")
        assert json.loads((layer.tree / "entries").read_text())["lower"] is True
        assert unpacker.calls == ["alone", "alone", "on top"]
    assert arriving(tmp_path) == []


async def test_a_disk_that_is_full_ends_it_early(tmp_path: Path) -> None:
    unpacker = TarUnpacker()

    def full() -> None:
        raise OSError(errno.ENOSPC, "full")

    unpacker.before_return = full
    async with opened(tmp_path, unpacker) as store, store.stage(BASE.descriptor) as staged:
        await staged.write(BASE.data)
        await staged.finish(ignore)
        assert isinstance(await staged.wait_failed(), StoreFull)
        with pytest.raises(StoreFull):
            await staged.commit(None)


class Told:
    """Records the reports to a waiting task; a test can wait for them."""

    def __init__(self) -> None:
        self.all: list[int] = []
        self._news = trio.lowlevel.ParkingLot()

    def __call__(self, count: int) -> None:
        self.all.append(count)
        self._news.unpark_all()

    async def wait_for(self, count: int) -> None:
        while count not in self.all:
            await self._news.park()


async def test_who_waits_is_told_what_is_there(tmp_path: Path) -> None:
    """The reports show the size on disk, at most the blob's; then the waiter takes over."""
    told, wrong = Told(), NOISE[: 2 * MIB] * 2
    async with opened(tmp_path) as store, opened(tmp_path) as other:

        async def wait_for_it() -> None:
            async with other.stage(TOP.descriptor, told) as staged:
                assert staged.offset == 2 * MIB
                await staged.write(TOP.data[2 * MIB :])
                await staged.finish(ignore)
                await staged.commit(None)

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                async with store.stage(TOP.descriptor) as staged:
                    nursery.start_soon(wait_for_it)
                    await staged.write(TOP.data[:MIB])
                    await told.wait_for(MIB)
                    await staged.write(wrong)
                    await told.wait_for(len(TOP.data))
                    await staged.restart()
                    await told.wait_for(0)
                    await staged.write(TOP.data[: 2 * MIB])
                    await told.wait_for(2 * MIB)
        assert told.all == [MIB, len(TOP.data), 0, 2 * MIB]
        assert await other.get(chain_of(TOP)) is not None


async def test_who_waits_can_be_cancelled_and_is_told_no_more(tmp_path: Path) -> None:
    told = Told()
    async with opened(tmp_path) as store, store.stage(TOP.descriptor) as staged:
        async with trio.open_nursery() as nursery:

            async def wait_for_it() -> None:
                async with store.stage(TOP.descriptor, told):
                    raise AssertionError("somebody else has it")

            nursery.start_soon(wait_for_it)
            await staged.write(TOP.data[: 2 * MIB])
            with trio.fail_after(30):
                await told.wait_for(2 * MIB)
            nursery.cancel_scope.cancel()
        await staged.write(TOP.data[2 * MIB :])
        await staged.finish(ignore)
        await staged.commit(None)
    assert told.all[-1] == 2 * MIB


async def test_what_nobody_brings_is_not_told(tmp_path: Path) -> None:
    """Bytes on disk count in the offset of the next stage."""
    told = Told()
    async with opened(tmp_path) as store:
        for offset in (0, MIB):
            async with store.stage(TOP.descriptor, told) as staged:
                assert staged.offset == offset
                await staged.write(TOP.data[offset : offset + MIB])
    assert told.all == []


async def test_two_who_stage_one_layer_share_the_work(tmp_path: Path) -> None:
    unpacker = TarUnpacker()
    layers = []

    async def stage_once(store: DirectoryStore) -> None:
        layers.append(await stage(store, BASE))

    async with opened(tmp_path, unpacker) as store, opened(tmp_path, unpacker) as other:
        async with trio.open_nursery() as nursery:
            for each in (store, store, other):
                nursery.start_soon(stage_once, each)
        assert [layer.chain_id for layer in layers] == [chain_of(BASE)] * 3
    assert unpacker.calls == ["alone"]


async def test_a_stage_that_waits_for_its_parent_is_in_nobodys_way(tmp_path: Path) -> None:
    """Two pulls want the same blobs in different orders, and each waits for the other's lower
    layer.
    """
    async with opened(tmp_path) as one, opened(tmp_path) as two:
        done: dict[str, trio.Event] = {name: trio.Event() for name in ("1", "2")}

        async def pull(store: DirectoryStore, name: str, first: Blob, second: Blob) -> None:
            async with store.stage(second.descriptor) as upper:
                if not upper.complete:
                    await upper.write(second.data)
                await upper.finish(ignore)
                lower = await stage(store, first)
                await upper.commit(lower.chain_id)
            done[name].set()

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pull, one, "1", BASE, TOP)
                nursery.start_soon(pull, two, "2", TOP, BASE)
        assert all(event.is_set() for event in done.values())


async def test_a_thousand_that_wait_for_their_parents_hold_nothing(tmp_path: Path) -> None:
    blobs = [layer_of(name=str(number)) for number in range(1000)]
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, limit[1]))
    go_on = trio.Event()

    async def wait_staged(blob: Blob, task_status: trio.TaskStatus[None]) -> None:
        async with store.stage(blob.descriptor) as staged:
            await staged.write(blob.data)
            await staged.finish(ignore)
            task_status.started()
            await go_on.wait()
            await staged.commit(None)

    try:
        async with opened(tmp_path) as store, trio.open_nursery() as nursery:
            for blob in blobs:
                await nursery.start(wait_staged, blob)
            go_on.set()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert len([name for name in visible(tmp_path) if name.startswith("trees")]) == 1000


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Record each sync."""
    sync = commits.sync_file_system
    synced: list[Path] = []

    def noted(path: Path) -> None:
        synced.append(path)
        sync(path)

    monkeypatch.setattr(commits, "sync_file_system", noted)
    return synced


async def test_what_is_ready_together_is_synced_together(tmp_path: Path, syncs: list[Path]) -> None:
    jobs: list[int] = []

    async def commit(store: DirectoryStore, number: int) -> None:
        await store._parts.commits.commit(lambda connection: jobs.append(number), since=0)

    async with opened(tmp_path) as store:
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(commit, store, number)
        assert sorted(jobs) == list(range(100))
    assert len(syncs) <= 2


async def test_one_that_fails_takes_nobody_with_it(tmp_path: Path) -> None:
    def fail(connection: object) -> None:
        raise StoreError("this one")

    async with opened(tmp_path) as store:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage, store, BASE)
            with pytest.raises(StoreError, match="this one"):
                await store._parts.commits.commit(fail, since=0)
        assert await store.get(chain_of(BASE)) is not None


async def test_what_the_disk_may_have_lost_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed sync is reported once, and makes all files suspect."""

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "the disk")

    async with opened(tmp_path) as store:
        async with store.stage(TOP.descriptor) as staged:
            await staged.write(TOP.data[:MIB])
            with monkeypatch.context() as patch:
                patch.setattr(commits, "sync_file_system", fail)
                with pytest.raises(StoreError, match="the disk"):
                    await stage(store, BASE)
            await staged.write(TOP.data[MIB:])
            await staged.finish(ignore)
            with pytest.raises(StoreError, match="lost"):
                await staged.commit(None)
        assert visible(tmp_path) == []
        async with store.stage(TOP.descriptor) as staged:
            assert staged.offset == 0
        await stage(store, BASE)
        await stage(store, TOP)


async def test_a_plain_tar(tmp_path: Path) -> None:
    data = tar_of(a="b")
    async with opened(tmp_path) as store:
        layer = await stage(store, Blob(data, describe(data), digest_of(data)))  # type: ignore[arg-type]
        assert layer.diff_id == digest_of(data)
        assert await store.get(layer.chain_id) is layer
        layer = await store.register(Stream(data), None, describe(data))
        assert layer.chain_id == digest_of(data)


async def test_a_commit_waits_for_those_that_are_on_their_way(
    tmp_path: Path, syncs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """… but no longer than until the last of them is there."""
    monkeypatch.setattr(commits, "_LINGER", 3600)
    sequencer = trio.testing.Sequencer()
    async with open_with_threads(tmp_path) as store:

        async def make(number: int) -> None:
            with store._parts.commits.expecting():
                async with sequencer(number):
                    pass
            await store._parts.commits.commit(lambda connection: None, since=0)

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(make, number)
    assert len(syncs) == 1


async def test_a_cancelled_commit_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sync runs all jobs that wait for it, except withdrawn ones."""
    syncing, go_on = trio.Event(), threading.Event()

    def slow(path: Path) -> None:
        trio.from_thread.run_sync(syncing.set)
        go_on.wait()

    done: list[str] = []
    async with open_with_threads(tmp_path) as store:
        monkeypatch.setattr(commits, "sync_file_system", slow)
        scope = trio.CancelScope()

        async def cancelled() -> None:
            with scope:
                await store._parts.commits.commit(
                    lambda connection: done.append("cancelled"), since=0
                )

        async def wanted() -> None:
            await store._parts.commits.commit(lambda connection: done.append("wanted"), since=0)

        try:
            async with trio.open_nursery() as others:
                others.start_soon(wanted)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(cancelled)
                    await syncing.wait()
                    scope.cancel()
                assert done == []
                go_on.set()
        finally:
            go_on.set()
    assert scope.cancelled_caught
    assert done == ["wanted"]


def test_an_attempt_that_was_given_up_is_never_complete() -> None:
    """This holds even for a late reader that learns at once of the failure and of the next
    attempt's end.
    """
    state = ArrivalState()
    state.copy(Snapshot(size=5, attempt=1, complete=True))
    with pytest.raises(StartedOver):
        state.wait_complete(0)
    with pytest.raises(StartedOver):
        state.wait(0, 0)
    state.wait_complete(1)
    state.abandon()
    with pytest.raises(Abandoned):
        state.wait_complete(1)


def test_bytes_that_are_gone_are_no_end(tmp_path: Path) -> None:
    """A reader that does not know of a truncation does not take the file for a shorter blob."""
    state = ArrivalState()
    state.grow(10)
    (tmp_path / "blob").write_bytes(b"01234")
    with Follower(tmp_path / "blob", state, describe(b"0123456789"), ignore) as follower:
        assert follower.read(100) == b"01234"
        with pytest.raises(StartedOver):
            follower.read(100)


def test_a_closed_file_is_free_though_a_child_has_its_descriptor(tmp_path: Path) -> None:
    """Between fork and exec, a child process has copies of all descriptors."""
    partial = Partial(tmp_path / "blob", since=0)
    copy = os.dup(partial._file.fileno())
    try:
        partial.close()
        Partial(tmp_path / "blob", since=0).close()
    finally:
        os.close(copy)
