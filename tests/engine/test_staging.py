"""Layers that are unpacked while they arrive, beyond the recorded traces."""

from __future__ import annotations

import gzip
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from engine.fakes import FakeSource, after, diff_id_of, failing
from engine.recorded_world import World
from engine.seeds import run

from trio_layers._engine.download import open_download_manager
from trio_layers._errors import (
    DecompressionError,
    DoNotRetry,
    LayersError,
    LimitExceeded,
    RegistrationError,
    StoreError,
    StoreFull,
    TransferError,
    UnpackError,
    VerificationError,
)
from trio_layers._memory import MemoryStage, MemoryStore
from trio_layers._progress import Progress
from trio_layers.abc import Stage, StagedSource, StagingStore
from trio_layers.testing import Attempt, ScriptedSource

SEEDS = pytest.mark.parametrize("seed", range(10))


@pytest.fixture(autouse=True)
def _staged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeSource, "staged", True)


class Store(MemoryStore):
    """A store whose stages the test has changed."""

    def __init__(self, change: Callable[[MemoryStage], object]) -> None:
        super().__init__()
        self._change = change
        self.entered = 0
        self.left = 0

    @asynccontextmanager
    async def stage(self, descriptor, waiting=None) -> AsyncIterator[MemoryStage]:
        async with super().stage(descriptor) as stage:
            self.entered += 1
            self._change(stage)
            try:
                yield stage
            finally:
                self.left += 1


def failing_at(seconds: float, error: Exception, *, key: str | None = None) -> Store:
    """Return a store whose worker fails at a given time, with any bytes."""

    def change(stage: MemoryStage) -> None:
        async def wait_failed() -> Exception:
            await trio.sleep_until(seconds)
            return error

        if key is None or stage._descriptor.digest == diff_id_of(key.encode()):
            stage.wait_failed = wait_failed

    return Store(change)


def failed_at(store: MemoryStore, sources: list, error: type[Exception], text: str) -> float:
    """Return the time of a pull's failure. The pull has this error, and announced
    no other attempt.
    """
    words: list[str] = []

    async def sink(event: Progress) -> None:
        words.append(event.action)

    async def main() -> float:
        async with open_download_manager(store) as manager:
            with pytest.raises(error) as caught:
                async with manager.download(sources, progress=sink):
                    pass
            assert words[-1] != "Retrying in 5 seconds"
            assert type(caught.value) is error
            assert str(caught.value) == text
            assert manager.statistics().transfers == 0
        assert not store.layers
        return trio.current_time()

    return run(main)


def pulled(
    store: MemoryStore, *sources: ScriptedSource | FakeSource, cancel_at: float | None = None
) -> list[tuple[float, str, int, int]]:
    """Return the reports of one pull for all layers."""
    events: list[tuple[float, str, int, int]] = []

    async def sink(event: Progress) -> None:
        now = round(trio.current_time(), 6)
        events.append((now, str(event.action), event.current, event.total))

    async def main() -> None:
        async with open_download_manager(store) as manager:
            with trio.move_on_at(float("inf") if cancel_at is None else cancel_at):
                async with manager.download(sources, progress=sink) as rootfs:
                    assert cancel_at is None
                    expected = [diff_id_of(source._data) for source in sources]
                    assert list(rootfs.diff_ids) == expected

    run(main)
    return events


# The gain in time.


def scenario(*layers: dict, concurrency: int = 3) -> dict:
    names = "abcdef"[: len(layers)]
    return {
        "manager": {"concurrency": concurrency},
        "store": {"register": {"*": {"seconds": 2}}},
        "layers": {
            name: {
                "id": name,
                "key": name,
                "content": name * 60,
                "diff_id": None,
                "attempts": [{"result": "ok", "size": 60, **layer}],
            }
            for name, layer in zip(names, layers, strict=True)
        },
        "pulls": [{"name": "p", "at": 0, "layers": list(names)}],
        "set_concurrency": [],
    }


def ends(made: dict) -> tuple[float, float]:
    """Return the times at which a pull ends, streamed and staged."""
    found = []
    for staged in (False, True):
        world = World(made, staged=staged)
        run(world.play)
        assert world.pulls["p"]["error"] is None
        found.append(world.pulls["p"]["end"])
    return found[0], found[1]


def test_unpacking_overlaps_with_the_download() -> None:
    """Six pieces take half a second each, and unpacking them two seconds in all. Only the last
    piece's unpacking is left after the download.
    """
    layer = {"seconds": 8, "body": {"chunk": 10, "chunk_seconds": 0.5}}
    assert ends(scenario(layer)) == (8 + 6 * 0.5 + 2, 8 + 2 * 0.5 + 2)


def test_unpacking_overlaps_with_that_of_other_layers() -> None:
    """The fast layers are unpacked during the download of the slow one.

    Without stages each layer is read for two seconds, one after the other. With stages only the
    last piece of the slow bottom layer is unread at the end of its download.
    """
    body = {"body": {"chunk": 30, "chunk_seconds": 1}}
    fast, slow = {"seconds": 1, **body}, {"seconds": 10, **body}
    layers = (slow, fast, fast)
    assert ends(scenario(*layers, concurrency=0)) == (10 + 3 * (2 + 2), 10 + 1 + 3 * 2)


def test_extracting_shows_after_download_complete_and_starts_at_what_is_unpacked() -> None:
    layer = {
        "seconds": 8,
        "body": {"chunk": 10, "chunk_seconds": 1},
        "progress": [{"at": 4, "action": "Downloading"}, {"at": 7, "action": "Download complete"}],
    }
    world = World(scenario(layer), staged=True)
    run(world.play)
    events = [tuple(event) for event in world.pulls["p"]["progress"]["a"]]
    assert events == [
        (0, "Pulling fs layer", 0, 0, False),
        (4, "Downloading", 0, 0, False),
        (7, "Download complete", 0, 0, False),
        (8, "Extracting", 40, 60, False),
        (9, "Extracting", 50, 60, False),
        (10, "Extracting", 60, 60, True),
        (12, "Pull complete", 0, 0, False),
    ]


# The choice between streaming and staging.


class Plain:
    """A layer store without any optional methods."""

    def __init__(self, store: MemoryStore) -> None:
        self.get, self.register, self.release = store.get, store.register, store.release
        self.layers = store.layers


@pytest.mark.parametrize("staging_store", [False, True])
@pytest.mark.parametrize("staged_source", [False, True])
def test_staged_if_store_and_source_can(
    staging_store: bool, staged_source: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeSource, "staged", staged_source)
    source = FakeSource("a")
    memory = Store(lambda stage: None)
    store = memory if staging_store else Plain(memory)
    assert isinstance(store, StagingStore) is staging_store
    assert isinstance(source, StagedSource) is staged_source

    async def main() -> None:
        async with open_download_manager(store) as manager, manager.download([source]) as rootfs:
            assert rootfs.diff_ids == (diff_id_of(b"a"),)

    run(main)
    assert memory.entered == memory.left == (staging_store and staged_source)
    assert (source.calls, source.closed, source.told) == (1, 1, [diff_id_of(b"a")])


def test_descriptor_is_handed_to_the_store() -> None:
    async def main() -> None:
        store, source = MemoryStore(), FakeSource("a")
        async with open_download_manager(store) as manager, manager.download([source, source]):
            assert [layer.descriptor for layer in store.layers.values()] == [source.descriptor] * 2

    run(main)


class Shared(MemoryStore):
    """A store that receives a blob from another process, as the test says."""

    def __init__(self, *brought: int, complete: bool = True) -> None:
        super().__init__()
        self._brought = brought
        self._complete = complete

    @asynccontextmanager
    async def stage(self, descriptor, waiting=None) -> AsyncIterator[MemoryStage]:
        for count in self._brought:
            await trio.sleep(1)
            waiting(count)
        async with super().stage(descriptor) as stage:
            data = b"0123456789"[: self._brought[-1]]
            await stage.write(data)
            stage._run.arrived.complete = self._complete
            yield stage


def test_who_waits_for_another_process_shows_its_progress() -> None:
    """The wait looks like a download of its own, and completes with the other
    process's download.
    """
    source = ScriptedSource(b"0123456789")
    events = pulled(Shared(4, 8, 10), source)
    assert events[:4] == [
        (0, "Pulling fs layer", 0, 0),
        (1, "Downloading", 4, 10),
        (2, "Downloading", 8, 10),
        (3, "Downloading", 10, 10),
    ]
    # Events at the same time may be skipped.
    rest = [action for _, action, _, _ in events[4:]]
    assert set(rest) <= {"Download complete", "Extracting", "Pull complete"}
    assert rest[-1] == "Pull complete"
    assert source.calls == 0


def test_who_waited_goes_on_where_the_other_ended() -> None:
    attempt = Attempt(seconds=4, pieces=2, progress=((2, "Downloading", 7, 10),))
    source = ScriptedSource(b"0123456789", attempts=[attempt])
    events = pulled(Shared(3, 4, complete=False), source)
    assert events[:4] == [
        (0, "Pulling fs layer", 0, 0),
        (1, "Downloading", 3, 10),
        (2, "Downloading", 4, 10),
        (4, "Downloading", 7, 10),
    ]
    assert events[-1] == (6, "Pull complete", 0, 0)
    assert source.calls == 1


def test_who_waits_has_waited_for_its_slot_before() -> None:
    """… and a cancelled waiter gets no more reports."""
    store = Shared(3, 4, 5)
    sources = [ScriptedSource(name * 10) for name in (b"a", b"b", b"c", b"d")]
    events = pulled(store, *sources, cancel_at=2.5)
    assert (0, "Waiting", 0, 0) in events
    shown = sorted(event for event in events if event[1] == "Downloading")
    assert shown == [(1, "Downloading", 3, 10)] * 3 + [(2, "Downloading", 4, 10)] * 3
    assert not store.layers


# Blobs and layers in the store.


def test_resumed_where_a_cancelled_pull_ended() -> None:
    store = MemoryStore()
    first, second = (
        ScriptedSource(b"0123456789", attempts=[Attempt(seconds=10, pieces=10)]) for _ in "12"
    )
    pulled(store, first, cancel_at=4.5)
    written: list[bytes] = []

    async def main() -> None:
        async with store.stage(second.descriptor) as stage:
            assert (stage.offset, stage.complete) == (4, False)
            assert stage.digest == diff_id_of(b"0123")
            write = stage.write

            async def noting(data: bytes) -> None:
                written.append(data)
                await write(data)

            stage.write = noting
            await second.download_into(stage, lambda *event: None)
            assert stage.offset == 10
        async with open_download_manager(store) as manager, manager.download([second]) as rootfs:
            assert rootfs.diff_ids == (diff_id_of(b"0123456789"),)

    run(main)
    assert b"".join(written) == b"456789"


def test_blob_that_is_all_there_is_not_downloaded() -> None:
    """The blob arrived for a pull that was cancelled before its parent arrived."""
    store = MemoryStore()
    slow, first, second = (
        ScriptedSource(data, attempts=[Attempt(seconds=seconds)])
        for data, seconds in [(b"a", 10), (b"b", 1), (b"b", 1)]
    )
    pulled(store, slow, first, cancel_at=5)
    words = [word for _, word, *_ in pulled(store, second)]
    # The states between these may be reported together.
    assert (words[0], words[-1]) == ("Pulling fs layer", "Pull complete")
    assert {*words[1:-1]} <= {"Download complete", "Extracting"}
    assert (first.calls, second.calls, second.closes) == (1, 0, 1)


@SEEDS
def test_bytes_of_two_attempts_are_never_mixed(seed: int) -> None:
    """The server cannot resume, and its first response was both cut short and wrong."""
    data, wrong = gzip.compress(b"right" * 5000), gzip.compress(b"wrong" * 5000)
    source = ScriptedSource(
        data,
        attempts=[
            Attempt(seconds=4, pieces=4, body=wrong, arrives=25, error=OSError("reset")),
            Attempt(seconds=4, pieces=4, resumes=False),
        ],
    )

    async def main() -> None:
        store = MemoryStore()
        async with open_download_manager(store) as manager, manager.download([source]) as rootfs:
            assert rootfs.diff_ids == (diff_id_of(b"right" * 5000),)
            assert trio.current_time() == 4 + 5 + 4

    run(main, seed)
    assert source.calls == 2


# Errors of the worker.

CERTAIN = [
    (StoreFull("no space left: free some"), "failed to register layer: no space left: free some"),
    (LimitExceeded("too many entries"), "failed to register layer: too many entries"),
    (UnpackError("../etc: leads out"), "failed to register layer: ../etc: leads out"),
    (DecompressionError("no gzip"), "could not get decompression stream: no gzip"),
    (OSError("broken"), "failed to register layer: broken"),
    (ValueError(), "failed to register layer: ValueError"),
]


@pytest.mark.parametrize(("error", "text"), CERTAIN, ids=[type(e).__name__ for e, _ in CERTAIN])
def test_failure_that_is_certain_ends_the_download(error: Exception, text: str) -> None:
    """The stage fails at once and for good, and the received bytes stay."""
    source = ScriptedSource(b"0123456789", attempts=[Attempt(seconds=10, pieces=10)])
    store = failing_at(3.5, error)
    assert failed_at(store, [source], RegistrationError, text) == 3.5
    assert (source.calls, source.closes) == (1, 1)
    assert (store.entered, store.left) == (1, 1)

    async def main() -> None:
        async with MemoryStore.stage(store, source.descriptor) as stage:
            assert stage.offset == 3

    run(main)


def test_failure_ends_the_countdown_to_another_attempt() -> None:
    source = ScriptedSource(b"a", attempts=[Attempt(error=OSError("no route"))])
    store = failing_at(2.5, LimitExceeded("large"))
    text = "failed to register layer: large"
    assert failed_at(store, [source], RegistrationError, text) == 2.5
    assert source.calls == 1


def test_failure_while_the_parent_is_missing_ends_the_pull() -> None:
    sources = [FakeSource("a", after(10)), FakeSource("b")]
    store = failing_at(3, UnpackError("hostile"), key="b")
    text = "failed to register layer: hostile"
    assert failed_at(store, sources, RegistrationError, text) == 3
    assert [source.closed for source in sources] == [1, 1]


@SEEDS
def test_failure_in_the_instant_in_which_the_parent_fails(seed: int) -> None:
    async def main() -> None:
        store = failing_at(3, UnpackError("hostile"), key="b")
        sources = [FakeSource("a", failing(DoNotRetry("denied"), 3)), FakeSource("b")]
        async with open_download_manager(store) as manager:
            with pytest.raises(LayersError) as caught:
                async with manager.download(sources):
                    pass
            assert str(caught.value) in ("denied", "failed to register layer: hostile")

    run(main, seed)


@pytest.mark.parametrize("how", ["raises", "raises for good", "deaf", "returns"])
def test_failure_counts_whatever_the_source_makes_of_being_stopped(how: str) -> None:
    async def download(progress) -> None:
        if how == "deaf":
            with trio.CancelScope(shield=True):
                await trio.sleep(5)
        try:
            await trio.sleep(5)
        except trio.Cancelled:
            if how == "raises":
                raise OSError("interrupted") from None
            if how == "raises for good":
                raise DoNotRetry("interrupted") from None
            raise

    async def swallow(progress) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(5)

    source = FakeSource("a", swallow if how == "returns" else download)
    store = failing_at(3, LimitExceeded("large"))
    text = "failed to register layer: large"
    expected = 3 if how.startswith("raises") else 5
    assert failed_at(store, [source], RegistrationError, text) == expected
    assert source.calls == 1


def damaged(data: bytes) -> bytes:
    return data[:30] + bytes([data[30] ^ 255]) + data[31:]


TEXT = b"".join(b"%d " % number for number in range(5000))


def test_damage_is_no_failure_before_the_verification() -> None:
    """Bytes that cannot be unpacked may not be the blob's. The download fails its verification, and
    another attempt brings the right bytes.

    The same happens without staging.
    """
    data = gzip.compress(TEXT)
    error = VerificationError("verification failed", digest="sha256:1")
    source = ScriptedSource(
        data,
        attempts=[
            Attempt(seconds=10, pieces=10, body=damaged(data), arrives=len(data), error=error),
            Attempt(seconds=10, pieces=10, resumes=False),
        ],
    )

    async def main() -> None:
        async with (
            open_download_manager(MemoryStore()) as manager,
            manager.download([source]) as rootfs,
        ):
            assert trio.current_time() == 25
            assert rootfs.diff_ids == (diff_id_of(TEXT),)

    run(main)


@pytest.mark.parametrize("beginning", [False, True])
def test_damage_of_a_verified_blob_is_final(beginning: bool) -> None:
    data = gzip.compress(TEXT)
    data = data[:8] if beginning else damaged(data)
    source = ScriptedSource(data, attempts=[Attempt(seconds=10, pieces=10)])

    async def main() -> None:
        store = MemoryStore()
        async with open_download_manager(store) as manager:
            with pytest.raises(RegistrationError) as caught:
                async with manager.download([source]):
                    pass
        kind = DecompressionError if beginning else UnpackError
        assert type(caught.value.reason) is kind
        problem = "could not get decompression stream" if beginning else "failed to register layer"
        assert str(caught.value) == f"{problem}: {caught.value.reason}"
        assert trio.current_time() == 10
        assert source.calls == 1

    run(main)


def test_memory_stage_tells_of_damage_once_the_blob_is_complete() -> None:
    """Damage is not reported before the blob is complete, and dropped bytes do not count."""

    async def main() -> None:
        source = FakeSource("a")
        told: list[Exception] = []
        async with MemoryStore().stage(source.descriptor) as stage, trio.open_nursery() as nursery:
            tasks = trio.lowlevel.current_statistics().tasks_living

            async def wait() -> None:
                told.append(await stage.wait_failed())

            nursery.start_soon(wait)
            for _ in range(2):
                await stage.write(damaged(gzip.compress(TEXT)))
                await trio.testing.wait_all_tasks_blocked()
                assert not told
                await stage.restart()
            await stage.write(damaged(gzip.compress(TEXT)))
            await trio.testing.wait_all_tasks_blocked()
            # The waiting task, and only the last worker's, which has finished.
            assert trio.lowlevel.current_statistics().tasks_living == tasks
            await stage.finish(lambda count: None)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(UnpackError) as caught:
                await stage.commit(None)
            assert told == [caught.value]

    run(main)


# Other failures.


def test_error_of_the_source_is_retried_as_ever() -> None:
    source = ScriptedSource(
        b"0123456789",
        attempts=[
            Attempt(seconds=1, arrives=4, error=OSError("reset")),
            Attempt(seconds=1, arrives=3, error=OSError("reset")),
            Attempt(seconds=1),
        ],
    )
    words = [(at, word) for at, word, *_ in pulled(MemoryStore(), source)]
    assert words == [
        (0, "Pulling fs layer"),
        *((1 + at, f"Retrying in {5 - at} second{'s' * (at < 4)}") for at in range(5)),
        *((7 + at, f"Retrying in {10 - at} second{'s' * (at < 9)}") for at in range(10)),
        (18, "Extracting"),
        (18, "Pull complete"),
    ]


def test_disk_that_is_full_while_bytes_arrive_fails_as_itself() -> None:
    def change(stage: MemoryStage) -> None:
        async def write(data: bytes) -> None:
            raise StoreFull("free some")

        stage.write = write

    source = FakeSource("a")
    failed_at(Store(change), [source], StoreFull, "free some")
    assert source.calls == 1


@pytest.mark.parametrize(
    ("error", "calls"),
    [(VerificationError("differs", digest="sha256:1"), 2), (StoreFull("free some"), 1)],
)
def test_what_finish_raises_is_a_failed_attempt(error: LayersError, calls: int) -> None:
    """The stage may have dropped its bytes, so the whole blob is downloaded again."""
    errors = [error]

    def change(stage: MemoryStage) -> None:
        finish = stage.finish

        async def failing(progress) -> None:
            if errors:
                await stage.restart()
                raise errors.pop()
            await finish(progress)

        stage.finish = failing

    source = FakeSource("a")
    if calls == 1:
        failed_at(Store(change), [source], StoreFull, "free some")
    else:
        source._data = source.data
        pulled(Store(change), source)
    assert source.calls == calls


def test_what_entering_raises_is_final() -> None:
    class Refusing(MemoryStore):
        @asynccontextmanager
        async def stage(self, descriptor, waiting=None):
            raise VerificationError("has another size", digest=descriptor.digest)
            yield

    source = FakeSource("a")
    assert failed_at(Refusing(), [source], VerificationError, "has another size") == 0
    assert (source.calls, source.closed) == (0, 1)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (StoreError("no parent"), "failed to register layer: no parent"),
        (DecompressionError("no gzip"), "could not get decompression stream: no gzip"),
    ],
)
def test_what_commit_raises_has_the_words_of_register(error: Exception, text: str) -> None:
    def change(stage: MemoryStage) -> None:
        async def commit(parent: str | None) -> None:
            raise error

        stage.commit = commit

    source = FakeSource("a")
    failed_at(Store(change), [source], RegistrationError, text)
    assert source.calls == 1


def test_layer_is_given_back_if_leaving_fails() -> None:
    class Bad(MemoryStore):
        @asynccontextmanager
        async def stage(self, descriptor, waiting=None):
            async with super().stage(descriptor) as stage:
                yield stage
            raise OSError("cannot leave")

    failed_at(Bad(), [FakeSource("a")], TransferError, "cannot leave")


def test_store_that_loses_the_parents() -> None:
    class Orphans(MemoryStore):
        def add(self, *args, **kwargs):
            layer = super().add(*args, **kwargs)
            layer.parent = None
            return layer

    store, sources = Orphans(), [FakeSource("a"), FakeSource("b")]

    async def main() -> None:
        async with open_download_manager(store) as manager:
            with pytest.raises(LayersError, match="internal error: too few parent layers"):
                async with manager.download(sources):
                    pass

    run(main)


# Cancellation.


def stuck(name: str, *, shield: bool = False) -> Callable[[MemoryStage], None]:
    """Return stages with a method that waits for ever, or that ignores cancellation
    until second 7.
    """

    def change(stage: MemoryStage) -> None:
        method: Callable[..., Awaitable[object]] = getattr(stage, name)

        async def waiting(*args: object) -> object:
            if not shield:
                await trio.sleep_forever()
            with trio.CancelScope(shield=True):
                await trio.sleep_until(7)
                return await method(*args)

        setattr(stage, name, waiting)

    return change


def cancelled_outcomes(
    store: MemoryStore, sources: list[FakeSource], caplog: pytest.LogCaptureFixture, until: float
) -> list[str]:
    """Return the outcomes of the transfers of a pull that is cancelled at second 5."""
    caplog.set_level(logging.DEBUG, "trio_layers.engine")

    async def main() -> None:
        async with open_download_manager(store) as manager:
            with trio.move_on_at(5) as scope:
                async with manager.download(sources):
                    raise AssertionError("the pull was to be cancelled")
            assert scope.cancelled_caught
            assert trio.current_time() == until
            assert manager.statistics().transfers == 0

    run(main)
    assert not store.layers
    assert [source.closed for source in sources] == [1] * len(sources)
    messages = [record.getMessage() for record in caplog.records]
    return sorted(each.split(": ", 1)[1] for each in messages if each.startswith("transfer "))


@pytest.mark.parametrize("name", ["write", "restart", "finish", "commit"])
@pytest.mark.parametrize("deaf", [False, True])
def test_cancelled_in_a_method_of_the_stage(
    name: str, deaf: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A cancellation in each wait leaves the stage, and gives back a returned layer."""
    source = FakeSource("a")
    store = Store(stuck(name, shield=deaf))
    if name == "restart":
        run(lambda: leave_behind(store, source.descriptor))
    outcomes = cancelled_outcomes(store, [source], caplog, 7 if deaf else 5)
    registering = name in ("finish", "commit")
    if deaf and name == "commit":
        assert outcomes == []  # the commit succeeded despite the cancellation
    else:
        assert outcomes == ["layer registration cancelled" if registering else "context canceled"]
    assert store.entered == store.left


async def leave_behind(store: MemoryStore, descriptor) -> None:
    async with MemoryStore.stage(store, descriptor) as stage:
        await stage.write(b"x")


@pytest.mark.parametrize("deaf", [False, True])
def test_cancelled_as_it_enters(deaf: bool, caplog: pytest.LogCaptureFixture) -> None:
    class Entering(MemoryStore):
        @asynccontextmanager
        async def stage(self, descriptor, waiting=None) -> AsyncIterator[Stage]:
            with trio.CancelScope(shield=deaf):
                await trio.sleep(7)
            async with super().stage(descriptor) as stage:
                yield stage

    source = FakeSource("a")
    outcomes = cancelled_outcomes(Entering(), [source], caplog, 7 if deaf else 5)
    assert outcomes == ["context canceled"]
    assert source.calls == 0


def test_cancelled_as_it_leaves(caplog: pytest.LogCaptureFixture) -> None:
    """A cancellation after the commit releases the layer."""

    class Leaving(MemoryStore):
        @asynccontextmanager
        async def stage(self, descriptor, waiting=None) -> AsyncIterator[Stage]:
            async with super().stage(descriptor) as stage:
                yield stage
                assert self.layers
            await trio.sleep(10)

    outcomes = cancelled_outcomes(Leaving(), [FakeSource("a")], caplog, 5)
    assert outcomes == ["layer registration cancelled"]


def test_cancelled_while_the_parent_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    sources = [FakeSource("a", after(10)), FakeSource("b")]
    store = Store(lambda stage: None)
    outcomes = cancelled_outcomes(store, sources, caplog, 5)
    assert outcomes == ["context canceled", "layer registration cancelled"]
    assert (store.entered, store.left) == (2, 2)


def test_cancelled_in_the_countdown(caplog: pytest.LogCaptureFixture) -> None:
    source = FakeSource("a", failing(OSError("reset"), 1))
    outcomes = cancelled_outcomes(MemoryStore(), [source], caplog, 5)
    assert outcomes == ["download cancelled during retry delay"]


def test_download_deaf_to_it_is_not_committed(caplog: pytest.LogCaptureFixture) -> None:
    async def deaf(progress) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(7)

    source = ScriptedSource(b"a")
    source.download_into = lambda sink, progress: deaf(progress)
    source.closed = 1

    def change(stage: MemoryStage) -> None:
        async def never(*args: object) -> None:
            raise AssertionError("nobody wants the layer")

        stage.finish = stage.commit = never

    outcomes = cancelled_outcomes(Store(change), [source], caplog, 7)
    assert outcomes == ["layer registration cancelled"]


# The number of open stages.


def test_no_more_stages_are_unfinished_than_there_are_slots() -> None:
    """A layer that waits for its slot has no stage. The stage of a layer that waits for its parent
    has finished its work.
    """
    open_now: set[MemoryStage] = set()
    most = [0, 0]

    class Counting(MemoryStore):
        @asynccontextmanager
        async def stage(self, descriptor, waiting=None) -> AsyncIterator[Stage]:
            async with super().stage(descriptor) as stage:
                open_now.add(stage)
                most[0] = max(most[0], len(open_now))
                most[1] = max(most[1], sum(not each.complete for each in open_now))
                yield stage
                open_now.remove(stage)

    async def main() -> None:
        sources = [FakeSource("bottom", after(100))]
        sources += [FakeSource(str(index), after(1)) for index in range(50)]
        async with (
            open_download_manager(Counting(), max_concurrent_downloads=3) as manager,
            trio.open_nursery() as nursery,
        ):

            async def look() -> None:
                await trio.sleep_until(99)
                await trio.testing.wait_all_tasks_blocked()
                assert all(each._run.plain for each in open_now if each.complete)
                assert manager.statistics().downloading == 1

            nursery.start_soon(look)
            async with manager.download(sources):
                pass

    run(main)
    assert most == [51, 3]
    assert not open_now
