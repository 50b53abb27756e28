"""The suite for layer stores: our stores pass it, and stores with a defect fail."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio

from trio_layers import DirectoryStore, LayersError, open_store
from trio_layers._memory import MemoryLayer, MemoryStage, MemoryStream, decompressed
from trio_layers.testing import MemoryStore
from trio_layers.testing.store_suite import StagingStoreSuite


class TestMemoryStore(StagingStoreSuite[MemoryStore]):
    @asynccontextmanager
    async def open_store(self) -> AsyncIterator[MemoryStore]:
        yield MemoryStore()


class TestDirectoryStore(StagingStoreSuite[DirectoryStore]):
    verifies_descriptors = True
    keeps_blobs = True

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path

    def open_store(self) -> AbstractAsyncContextManager[DirectoryStore]:
        return open_store(self.directory)

    async def collect(self, store: DirectoryStore) -> None:
        await store.collect()


# Stores with one defect each, and the test that must show it.


class Defect(Exception):
    """An error that a store must not raise."""


DEFECTS: list[tuple[type[MemoryStore], str]] = []


def shown_by(*names: str) -> Callable[[type[MemoryStore]], type[MemoryStore]]:
    def note(defective: type[MemoryStore]) -> type[MemoryStore]:
        DEFECTS.extend((defective, f"test_{name}") for name in names)
        return defective

    return note


@shown_by("get_returns_none_for_a_missing_layer")
class InventsLayers(MemoryStore):
    async def get(self, chain_id):
        return await super().get(chain_id) or self.add(b"", None)


@shown_by("ids_of_a_layer", "each_compression", "stage_a_layer")
class NamesTheBlob(MemoryStore):
    """The diff ID is that of the blob, not of the tar inside."""

    def add(self, data, parent, *, descriptor=None):
        layer = super().add(data, parent, descriptor=descriptor)
        layer.diff_id = layer.diff_id[::-1]
        return layer


@shown_by("chain_ids_and_parents", "stage_upon_a_parent")
class ForgetsParents(MemoryStore):
    def add(self, data, parent, *, descriptor=None):
        layer = super().add(data, parent, descriptor=descriptor)
        layer.parent = None
        return layer


@shown_by("a_missing_parent_is_an_error", "stage_upon_a_parent")
class TakesAnyParent(MemoryStore):
    def add(self, data, parent, *, descriptor=None):
        return super().add(data, parent if parent in self.layers else None, descriptor=descriptor)


@shown_by("register_a_stored_layer_again", "simultaneous_registrations_of_one_layer")
class RegistersOnce(MemoryStore):
    def add(self, data, parent, *, descriptor=None):
        layer = super().add(data, parent, descriptor=descriptor)
        if layer.references > 1:
            raise Defect(layer.chain_id)
        return layer


@shown_by("empty_layers")
class WantsEntries(MemoryStore):
    def add(self, data, parent, *, descriptor=None):
        if not any(data):
            raise Defect("this tar is empty")
        return super().add(data, parent, descriptor=descriptor)


@shown_by("pieces_of_any_size")
class WantsWholePieces(MemoryStore):
    async def register(self, stream, parent, descriptor=None):
        data = await stream.receive_some(1_000_000)
        return await super().register(MemoryStream(bytes(data)), parent, descriptor)


@shown_by("invalid_beginning_of_a_stream")
class HasOneError(MemoryStore):
    async def register(self, stream, parent, descriptor=None):
        try:
            return await super().register(stream, parent, descriptor)
        except Exception as error:
            raise RuntimeError("cannot register") from error


@shown_by("errors_of_the_stream_are_unchanged")
class ReadsInANursery(MemoryStore):
    async def register(self, stream, parent, descriptor=None):
        found = []

        async def register() -> None:
            found.append(await MemoryStore.register(self, stream, parent, descriptor))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(register)
        return found[0]


@shown_by("damaged_streams_are_errors")
class TakesWhatIsDamaged(MemoryStore):
    async def register(self, stream, parent, descriptor=None):
        try:
            return await super().register(stream, parent, descriptor)
        except Exception:
            return self.add(b"what could be read", parent, descriptor=descriptor)


@shown_by("the_stream_stays_open")
class ClosesStreams(MemoryStore):
    async def register(self, stream, parent, descriptor=None):
        async with stream:
            return await super().register(stream, parent, descriptor)


@shown_by("cancelled_at_each_step", "stage_cancelled_at_each_step")
class CanBeCancelledLate(MemoryStore):
    """A call can be cancelled after it has stored the layer."""

    async def register(self, stream, parent, descriptor=None):
        layer = await super().register(stream, parent, descriptor)
        await trio.lowlevel.checkpoint()
        return layer

    @asynccontextmanager
    async def stage(self, descriptor, waiting=None):
        async with super().stage(descriptor) as stage:
            commit = stage.commit

            async def late(parent) -> MemoryLayer:
                layer = await commit(parent)
                await trio.lowlevel.checkpoint()
                return layer

            stage.commit = late
            yield stage


@shown_by("cancelled_while_the_stream_waits")
class StoresWhatCame(MemoryStore):
    """A cancelled call stores the bytes that it has read."""

    async def register(self, stream, parent, descriptor=None):
        data = b""
        try:
            while piece := await stream.receive_some(100):
                data += piece
        except trio.Cancelled:
            try:
                self.add(await shielded(data), parent)
            except Exception:
                pass
            raise
        return self.add(await decompressed(MemoryStream(data)), parent)


async def shielded(data: bytes) -> bytes:
    with trio.CancelScope(shield=True):
        return await decompressed(MemoryStream(data))


@shown_by("methods_are_checkpoints")
class DoesNotGiveWay(MemoryStore):
    async def get(self, chain_id):
        layer = self.layers.get(chain_id)
        if layer is not None:
            layer.references += 1
        return layer


@shown_by("references_keep_a_layer")
class GetsWithoutReference(MemoryStore):
    async def get(self, chain_id):
        layer = await super().get(chain_id)
        if layer is not None and layer.references > 1:
            layer.references -= 1
        return layer


@shown_by("references_keep_a_layer", "staged_layers_are_held")
class ReleasesAll(MemoryStore):
    def release(self, layer):
        layer.references = 1
        super().release(layer)


@shown_by("references_keep_lower_layers")
class DropsParents(MemoryStore):
    def add(self, data, parent, *, descriptor=None):
        layer = super().add(data, parent, descriptor=descriptor)
        if layer.parent is not None and layer.parent.references > 1:
            layer.parent.references -= 1
        return layer


@shown_by("a_failure_takes_no_reference")
class ReleasesWhatFails(MemoryStore):
    async def register(self, stream, parent, descriptor=None):
        try:
            return await super().register(stream, parent, descriptor)
        except Exception:
            if parent is not None:
                self.release(self.layers[parent])
            raise


@shown_by("the_data_can_be_registered_again")
class ForgetsItsData(MemoryStore):
    def add(self, data, parent, *, descriptor=None):
        layer = super().add(data, parent, descriptor=descriptor)
        layer.data = b""
        return layer


@shown_by("simultaneous_readers")
class GivesItsDataOnce(MemoryStore):
    def add(self, data, parent, *, descriptor=None):
        layer = super().add(data, parent, descriptor=descriptor)
        stream = MemoryStream(data)

        async def tar_stream() -> MemoryStream:
            await trio.lowlevel.checkpoint()
            return stream

        return Wrapped(layer, tar_stream)


class Wrapped:
    def __init__(self, layer: MemoryLayer, tar_stream: object) -> None:
        self.diff_id, self.chain_id, self.parent = layer.diff_id, layer.chain_id, layer.parent
        self.tar_stream = tar_stream


@shown_by("simultaneous_registrations_of_many_layers")
class IsBusy(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.busy = trio.Lock()

    async def register(self, stream, parent, descriptor=None):
        self.busy.acquire_nowait()
        try:
            return await super().register(stream, parent, descriptor)
        finally:
            self.busy.release()


@shown_by("a_cancelled_registration_affects_no_other")
class KeepsItsLock(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.busy = trio.Semaphore(1)

    async def register(self, stream, parent, descriptor=None):
        await self.busy.acquire()
        layer = await super().register(stream, parent, descriptor)
        self.busy.release()
        return layer


class ChangesStages(MemoryStore):
    @asynccontextmanager
    async def stage(self, descriptor, waiting=None):
        async with super().stage(descriptor) as stage:
            self.change(stage)
            yield stage

    def change(self, stage: MemoryStage) -> None:
        raise NotImplementedError


@shown_by("attempts_are_never_mixed", "wrong_bytes_of_an_earlier_stage")
class MixesAttempts(ChangesStages):
    def change(self, stage):
        async def restart() -> None:
            await trio.lowlevel.checkpoint()

        stage.restart = restart


@shown_by("stage_each_compression")
class WritesInPieces(ChangesStages):
    """The last byte of each piece is lost."""

    def change(self, stage):
        write = stage.write

        async def write_most(data: bytes) -> None:
            await write(data[:-1])

        stage.write = write_most


@shown_by("progress_of_a_stage")
class ProgressFalls(ChangesStages):
    def change(self, stage):
        finish = stage.finish

        async def falling(progress) -> None:
            await finish(lambda position: progress(stage._descriptor.size - position))

        stage.finish = falling


@shown_by("received_bytes_are_resumed", "a_complete_blob_is_resumed", "a_waiting_stage_takes_over")
class ForgetsAndWaits(MemoryStore):
    """Arrived bytes are dropped, and a second stage of a blob fails instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.staged: set[object] = set()

    @asynccontextmanager
    async def stage(self, descriptor, waiting=None):
        if descriptor.digest in self.staged:
            raise Defect(descriptor.digest)
        self.staged.add(descriptor.digest)
        self._arrived.clear()
        try:
            async with super().stage(descriptor) as stage:
                yield stage
        finally:
            self.staged.discard(descriptor.digest)


@shown_by("damage_in_a_verified_blob")
class NeverFails(ChangesStages):
    def change(self, stage):
        stage.wait_failed = trio.sleep_forever


@shown_by("damage_in_dropped_bytes")
class FailsTooSoon(ChangesStages):
    def change(self, stage):
        async def wait_failed() -> Exception:
            while stage._run.failure is None:
                await stage._news.park()
            return stage._run.failure

        stage.wait_failed = wait_failed


@shown_by("errors_of_the_block_are_unchanged")
class StagesInANursery(MemoryStore):
    @asynccontextmanager
    async def stage(self, descriptor, waiting=None):
        async with trio.open_nursery(), super().stage(descriptor) as stage:
            yield stage


@shown_by("waiting_for_a_failure_can_be_cancelled")
class WaitsDeafly(ChangesStages):
    def change(self, stage):
        async def wait_failed() -> Exception:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
            return Exception("nothing")

        stage.wait_failed = wait_failed


@shown_by("leaving_does_not_wait")
class StopsSlowly(MemoryStore):
    @asynccontextmanager
    async def stage(self, descriptor, waiting=None):
        async with super().stage(descriptor) as stage:
            try:
                yield stage
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(100)


@shown_by("reports_to_a_waiting_stage")
class TellsTooMuch(MemoryStore):
    @asynccontextmanager
    async def stage(self, descriptor, waiting=None):
        if waiting is not None:
            waiting(descriptor.size + 1)
        async with super().stage(descriptor) as stage:
            yield stage


@shown_by("opposite_orders_do_not_deadlock")
class LocksUntilTheLayerIsThere(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.locks: dict[object, trio.Lock] = {}

    @asynccontextmanager
    async def stage(self, descriptor, waiting=None):
        async with self.locks.setdefault(descriptor.digest, trio.Lock()):
            async with super().stage(descriptor) as stage:
                yield stage


@shown_by("many_complete_stages_wait")
class HasRoomForFew(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.room = trio.CapacityLimiter(100)

    @asynccontextmanager
    async def stage(self, descriptor, waiting=None):
        async with self.room, super().stage(descriptor) as stage:
            yield stage


@shown_by("two_stages_of_one_blob", "staged_and_registered_at_once")
class StagesWithoutReference(ChangesStages):
    def change(self, stage):
        commit = stage.commit

        async def without(parent) -> MemoryLayer:
            layer = await commit(parent)
            if layer.references > 1:
                layer.references -= 1
            return layer

        stage.commit = without


@shown_by("descriptors", "bytes_of_another_blob", "stage_a_stored_blob_again")
class PromisesTooMuch(MemoryStore):
    """The suite is told that the store verifies descriptors and keeps blobs."""


class SuiteOf(StagingStoreSuite[MemoryStore]):
    def __init__(self, store: type[MemoryStore]) -> None:
        self.store = store
        self.verifies_descriptors = self.keeps_blobs = store is PromisesTooMuch

    @asynccontextmanager
    async def open_store(self) -> AsyncIterator[MemoryStore]:
        yield self.store()


@pytest.mark.parametrize(
    ("store", "name"), DEFECTS, ids=lambda value: getattr(value, "__name__", value)
)
async def test_a_defect_is_found(store: type[MemoryStore], name: str, autojump_clock) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        await dict(SuiteOf(store).checks())[name]()
    # Errors that a store must not raise are raised unchanged.
    expected = (AssertionError, trio.TooSlowError, trio.WouldBlock, Defect, LayersError, KeyError)
    assert all(issubclass(each, expected) for each in leaves(caught.value))


def leaves(error: BaseException) -> set[type[BaseException]]:
    if isinstance(error, BaseExceptionGroup):
        return set().union(*map(leaves, error.exceptions))
    return {type(error)}


def test_each_check_finds_something() -> None:
    assert {name for _, name in DEFECTS} == {name for name, _ in SuiteOf(MemoryStore).checks()}


async def test_the_same_without_a_defect(autojump_clock) -> None:
    for _, check in SuiteOf(MemoryStore).checks():
        await check()


# Runs of the suite as users start it.

STORE = """
from contextlib import asynccontextmanager
from trio_layers.testing import MemoryStore
from trio_layers.testing.store_suite import StagingStoreSuite

{before}
class TestMyStore(StagingStoreSuite[MemoryStore]):
    many = 50

    @asynccontextmanager
    async def open_store(self):
        yield MemoryStore()
"""
PLAIN = """
import sys
sys.modules["pytest"] = None
import trio
{store}
for name, check in TestMyStore().checks():
    trio.run(check)
"""
ANYIO = """
import pytest

@pytest.fixture
def anyio_backend():
    return "trio"

@pytest.mark.anyio
"""
TRIO = """
import pytest

@pytest.mark.trio
"""


@pytest.mark.parametrize(
    ("plugins", "before"),
    [("trio", TRIO), ("trio trio_mode=true", ""), ("anyio", ANYIO)],
    ids=["marked", "trio mode", "anyio"],
)
def test_it_runs_under_pytest(tmp_path: Path, plugins: str, before: str) -> None:
    (tmp_path / "test_mine.py").write_text(STORE.format(before=before))
    plugin, *settings = plugins.split()
    other = {"trio": "anyio", "anyio": "trio"}[plugin]
    options = ["-q", "-p", f"no:{other}", "-p", "no:cacheprovider", "-W", "error"]
    options += ["-k", "cancelled_at_each_step"]
    options += [f"--override-ini={setting}" for setting in settings]
    command = [sys.executable, "-m", "pytest", "--rootdir", tmp_path, *options, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


def test_it_runs_without_pytest() -> None:
    program = PLAIN.format(store=textwrap.dedent(STORE.format(before="")))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-O", "-c", program], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
