"""Shared transfers, order, errors and limits, beyond the recorded traces."""

from __future__ import annotations

import bz2
import gzip
import lzma
from types import SimpleNamespace

import pytest
import trio
from engine.fakes import FakeSource, after, diff_id_of, failing
from engine.seeds import run

from trio_layers._digest import RootFS
from trio_layers._engine.download import open_download_manager
from trio_layers._errors import (
    DecompressionError,
    DoNotRetry,
    LayersError,
    ManifestError,
    RegistrationError,
    StoreFull,
    TransferError,
    VerificationError,
)
from trio_layers._manifest import Descriptor
from trio_layers._memory import MemoryStore, MemoryStream

try:
    from compression import zstd
except ImportError:
    from backports import zstd

BOTH_WAYS = True
SEEDS = pytest.mark.parametrize("seed", range(10))


@SEEDS
def test_failing_bottom_layer_with_another_queued(seed: int) -> None:
    """With two slots, the third layer's download is never called, since the pull leaves that
    transfer before the failing layer frees its slot.
    """

    async def main() -> None:
        sources = [
            FakeSource("a", failing(DoNotRetry("denied"), 3)),
            FakeSource("b", after(10)),
            FakeSource("c"),
        ]
        async with open_download_manager(MemoryStore(), max_concurrent_downloads=2) as manager:
            with pytest.raises(DoNotRetry, match="denied"):
                async with manager.download(sources):
                    pass
            assert trio.current_time() == 3
        assert [source.calls for source in sources] == [1, 1, 0]
        assert [source.closed for source in sources] == [1, 1, 1]

    run(main, seed)


@SEEDS
def test_equal_keys_on_two_bases_are_two_transfers(seed: int) -> None:
    async def main() -> None:
        store = MemoryStore()
        bases = [RootFS([store.add(data, None).diff_id]) for data in (b"one", b"two")]
        sources = [FakeSource("a", after(1)), FakeSource("a", after(1))]
        results = {}

        async def pull(manager, index: int) -> None:
            async with manager.download([sources[index]], base=bases[index]) as rootfs:
                results[index] = rootfs

        async with (
            open_download_manager(store) as manager,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(pull, manager, 0)
            nursery.start_soon(pull, manager, 1)
        assert [source.calls for source in sources] == [1, 1]
        for index, base in enumerate(bases):
            assert results[index].diff_ids == (*base.diff_ids, diff_id_of(b"a"))

    run(main, seed)


@pytest.mark.parametrize(("first", "second"), [(["ab", "c"], ["a", "bc"]), (["a:b"], ["a", "b"])])
def test_keys_are_not_joined(first: list[str], second: list[str]) -> None:
    """Two pairs of keys stay different even if their concatenations are equal."""

    async def main() -> None:
        async with (
            open_download_manager(MemoryStore()) as manager,
            trio.open_nursery() as nursery,
        ):
            all_sources = [[FakeSource(key, after(1)) for key in keys] for keys in (first, second)]

            async def pull(sources) -> None:
                async with manager.download(sources) as rootfs:
                    assert len(rootfs.diff_ids) == len(sources)

            for sources in all_sources:
                nursery.start_soon(pull, sources)
            await trio.sleep(0.5)
            assert manager.statistics().transfers == len(first) + len(second)

    run(main)


@SEEDS
def test_joined_child_whose_parent_another_pull_started_and_gives_up(seed: int) -> None:
    """A transfer keeps its parent: the remaining pull gets both layers, each downloaded once."""

    async def main() -> None:
        theirs = [FakeSource("a", after(5)), FakeSource("b", after(1)), FakeSource("c", after(1))]
        mine = [FakeSource("a"), FakeSource("b"), FakeSource("c")]
        async with (
            open_download_manager(MemoryStore()) as manager,
            trio.open_nursery() as nursery,
        ):

            async def gives_up() -> None:
                with trio.move_on_at(3):
                    async with manager.download(theirs):
                        pass

            nursery.start_soon(gives_up)
            await trio.sleep(2)
            async with manager.download(mine) as rootfs:
                assert trio.current_time() == 5
                assert len(rootfs.diff_ids) == 3
        assert [source.calls for source in mine] == [0, 0, 0]
        assert [source.calls for source in theirs] == [1, 1, 1]
        assert [source.closed for source in mine + theirs] == [1] * 6
        assert theirs[2].told == [diff_id_of(b"c")]
        assert mine[2].told == []

    run(main, seed)


@SEEDS
def test_joined_child_while_its_finished_parent_is_downloaded_afresh(seed: int) -> None:
    """The parent has left the table, but the child can still be joined. It stays when the pull that
    started it gives up.
    """

    async def main() -> None:
        store = MemoryStore()
        theirs = [FakeSource("a", after(1)), FakeSource("b", after(10))]
        mine = [FakeSource("a", after(1)), FakeSource("b")]
        async with (
            open_download_manager(store) as manager,
            trio.open_nursery() as nursery,
        ):

            async def gives_up() -> None:
                with trio.move_on_at(3):
                    async with manager.download(theirs):
                        pass

            nursery.start_soon(gives_up)
            await trio.sleep(2)
            async with manager.download(mine) as rootfs:
                assert rootfs.diff_ids == (diff_id_of(b"a"), diff_id_of(b"b"))
                assert trio.current_time() == 10
        assert [source.calls for source in theirs + mine] == [1, 1, 1, 0]
        assert not store.layers

    run(main, seed)


@SEEDS
def test_layer_above_one_that_is_there_by_now_is_shared(seed: int) -> None:
    """The second pull finds the bottom layer in the store, and shares the layers above it.

    The first pull found the bottom layer missing. The layers above are not downloaded again.
    """

    async def main() -> None:
        first, second = ([FakeSource(key, after(9), known=True) for key in "abc"] for _ in "12")
        first[0] = FakeSource("a", after(1), known=True)
        async with (
            open_download_manager(MemoryStore()) as manager,
            trio.open_nursery() as nursery,
        ):

            async def pull() -> None:
                async with manager.download(first):
                    pass

            nursery.start_soon(pull)
            await trio.sleep(5)
            async with manager.download(second) as rootfs:
                assert trio.current_time() == 9
                assert rootfs.diff_ids == tuple(diff_id_of(key) for key in (b"a", b"b", b"c"))
        assert [source.calls for source in first] == [1, 1, 1]
        assert [source.calls for source in second] == [0, 0, 0]
        assert [source.closed for source in first + second] == [1] * 6

    run(main, seed)


@SEEDS
def test_queued_layer_whose_parent_has_failed_is_not_downloaded(seed: int) -> None:
    """A pull with the parent in the store shares a layer that another pull puts on it."""

    async def main() -> None:
        store = MemoryStore()
        store.add(b"a", None)
        theirs = [FakeSource("a", failing(DoNotRetry("denied"), 3)), FakeSource("b")]
        mine = [FakeSource("a", known=True), FakeSource("b")]
        async with (
            open_download_manager(store, max_concurrent_downloads=1) as manager,
            trio.open_nursery() as nursery,
        ):

            async def pull(sources) -> None:
                with pytest.raises(DoNotRetry, match="denied"):
                    async with manager.download(sources):
                        pass
                assert trio.current_time() == 3

            nursery.start_soon(pull, theirs)
            await trio.sleep(1)
            nursery.start_soon(pull, mine)
        assert [source.calls for source in theirs + mine] == [1, 0, 0, 0]
        assert [source.closed for source in theirs + mine] == [1, 1, 1, 1]

    run(main, seed)


@SEEDS
def test_layer_that_waits_for_a_parent_of_another_pull_fails_with_it(seed: int) -> None:
    stream = MemoryStream(b"b")

    async def download(progress):
        return stream, 1

    async def main() -> None:
        store = MemoryStore()
        store.add(b"a", None)
        theirs = [FakeSource("a", failing(DoNotRetry("denied"), 3)), FakeSource("b", download)]
        mine = [FakeSource("a", known=True), FakeSource("b")]
        async with (
            open_download_manager(store) as manager,
            trio.open_nursery() as nursery,
        ):

            async def pull(sources) -> None:
                with pytest.raises(DoNotRetry, match="denied"):
                    async with manager.download(sources):
                        pass
                assert trio.current_time() == 3

            nursery.start_soon(pull, theirs)
            await trio.sleep(1)
            nursery.start_soon(pull, mine)
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()

    run(main, seed)


@pytest.mark.streamed
def test_store_that_loses_the_parents() -> None:
    class Store(MemoryStore):
        async def register(self, stream, parent, descriptor=None):
            layer = await super().register(stream, parent, descriptor)
            return SimpleNamespace(diff_id=layer.diff_id, chain_id=layer.chain_id, parent=None)

    async def main() -> None:
        store = Store()
        async with open_download_manager(store) as manager:
            with pytest.raises(LayersError, match="internal error: too few parent layers"):
                async with manager.download([FakeSource("a"), FakeSource("b")]):
                    pass
        assert not store.layers

    run(main)


def test_store_is_not_asked_for_what_is_above_a_missing_layer() -> None:
    class Store(MemoryStore):
        asked = 0

        async def get(self, chain_id):
            self.asked += 1
            return await super().get(chain_id)

    async def main() -> None:
        store = Store()
        sources = [FakeSource(key, known=True) for key in "abc"]
        async with open_download_manager(store) as manager, manager.download(sources):
            assert store.asked == 1

    run(main)


@SEEDS
def test_repeated_layer_holds_what_it_is_read_from(seed: int) -> None:
    """A repeated layer keeps the layer that it is read from, even if the first pull is gone by then
    and only another one needs it.
    """

    async def main() -> None:
        store = MemoryStore()
        theirs = [FakeSource("a"), FakeSource("b", after(10)), FakeSource("a")]
        mine = [FakeSource("a", known=True), FakeSource("b"), FakeSource("a")]
        async with (
            open_download_manager(store) as manager,
            trio.open_nursery() as nursery,
        ):

            async def gives_up() -> None:
                with trio.move_on_at(3):
                    async with manager.download(theirs):
                        pass

            nursery.start_soon(gives_up)
            await trio.sleep(2)
            async with manager.download(mine) as rootfs:
                assert rootfs.diff_ids == tuple(diff_id_of(key) for key in (b"a", b"b", b"a"))
                assert trio.current_time() == 10
        assert [source.calls for source in theirs + mine] == [1, 1, 0, 0, 0, 0]
        assert not store.layers

    run(main, seed)


@pytest.mark.streamed
def test_stream_of_a_repeated_layer_is_closed_though_the_store_does_not_read_it() -> None:
    streams: list[MemoryStream] = []

    class Store(MemoryStore):
        async def register(self, stream, parent, descriptor=None):
            if parent is not None:
                raise OSError("no space")
            layer = await super().register(stream, parent, descriptor)
            tar_stream = layer.tar_stream

            async def noting() -> MemoryStream:
                streams.append(await tar_stream())
                return streams[-1]

            return SimpleNamespace(
                diff_id=layer.diff_id, chain_id=layer.chain_id, parent=None, tar_stream=noting
            )

    async def main() -> None:
        async with open_download_manager(Store()) as manager:
            with pytest.raises(RegistrationError, match="failed to register layer: no space"):
                async with manager.download([FakeSource("a"), FakeSource("a")]):
                    pass
        [stream] = streams
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()

    run(main)


@SEEDS
def test_repeated_layer_takes_no_slot(seed: int) -> None:
    """A repeated layer downloads nothing, so with two slots the third download does not wait for
    it.
    """
    started: list[float] = []

    async def last(progress) -> None:
        started.append(trio.current_time())

    async def main() -> None:
        sources = [FakeSource("a", after(10)), FakeSource("a"), FakeSource("b", last)]
        async with open_download_manager(MemoryStore(), max_concurrent_downloads=2) as manager:
            async with manager.download(sources) as rootfs:
                assert len(rootfs.diff_ids) == 3
        assert [source.calls for source in sources] == [1, 0, 1]

    run(main, seed)
    assert started == [0]


@SEEDS
def test_slots_are_granted_in_the_order_of_asking(seed: int) -> None:
    started: list[str] = []

    def noting(key: str) -> FakeSource:
        async def download(progress) -> None:
            started.append(key)
            await trio.sleep(1)

        return FakeSource(key, download)

    async def main() -> None:
        async with open_download_manager(MemoryStore(), max_concurrent_downloads=1) as manager:
            async with manager.download([noting(f"{i:02}") for i in range(20)]):
                pass

    run(main, seed)
    assert started == sorted(started)


@SEEDS
def test_limit_changes_take_effect_at_once(seed: int) -> None:
    async def main() -> None:
        async with open_download_manager(MemoryStore(), max_concurrent_downloads=1) as manager:
            running = 0
            history = []

            async def download(progress) -> None:
                nonlocal running
                running += 1
                history.append(running)
                await trio.sleep(10)
                running -= 1

            async def change() -> None:
                for at, limit, expected in [(1, 4, 4), (2, 2, 4), (12, 0, 11), (13, 3, 11)]:
                    await trio.sleep_until(at)
                    manager.max_concurrent_downloads = limit
                    assert manager.max_concurrent_downloads == limit
                    await trio.testing.wait_all_tasks_blocked()
                    assert running == expected, at

            async with trio.open_nursery() as nursery:
                nursery.start_soon(change)
                async with manager.download([FakeSource(str(i), download) for i in range(15)]):
                    pass
            with pytest.raises(ValueError, match="-1"):
                manager.max_concurrent_downloads = -1

    run(main, seed)


@pytest.mark.parametrize(
    "options",
    [
        {"max_download_attempts": 0},
        {"max_download_attempts": -1},
        {"max_concurrent_downloads": -1},
        {"retry_tick": 0},
        {"retry_tick": -1.0},
        {"retry_tick": float("nan")},
    ],
)
def test_options_that_make_no_sense(options: dict) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="must be"):
            async with open_download_manager(MemoryStore(), **options):
                pass

    run(main)


COMPRESSIONS = {
    "none": lambda data: data,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd.compress,
}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_compressions(name: str) -> None:
    """The store recognises the compression by its magic bytes. The diff ID is of the plain data."""
    data = b"some data of a layer" * 1000
    packed = COMPRESSIONS[name](data)

    async def main() -> None:
        async def download(progress):
            return MemoryStream(packed), len(packed)

        store = MemoryStore()
        async with (
            open_download_manager(store) as manager,
            manager.download([FakeSource("a", download)]) as rootfs,
        ):
            assert rootfs.diff_ids == (diff_id_of(data),)

    run(main)


@pytest.mark.parametrize("name", [name for name in COMPRESSIONS if name != "none"])
def test_damaged_compressions(name: str) -> None:
    """Damage at the beginning and damage later have different messages."""
    packed = COMPRESSIONS[name](b"some data of a layer" * 1000)

    async def pull(data: bytes) -> RegistrationError:
        async def download(progress):
            return MemoryStream(data), len(data)

        store, source = MemoryStore(), FakeSource("a", download)
        async with open_download_manager(store) as manager:
            with pytest.raises(RegistrationError) as caught:
                async with manager.download([source]):
                    pass
        assert (source.calls, source.closed) == (1, 1)
        assert not store.layers
        return caught.value

    async def main() -> None:
        cut = await pull(packed[:-5])
        assert str(cut).startswith("failed to register layer: ")
        assert not isinstance(cut.reason, DecompressionError)
        if name == "gzip":
            cut = await pull(packed[:7])
            assert str(cut).startswith("could not get decompression stream: ")
            assert isinstance(cut.reason, DecompressionError)

    run(main)


@pytest.mark.streamed
@pytest.mark.parametrize(
    ("good", "text"),
    [(0, "could not get decompression stream: reset"), (20, "failed to register layer: reset")],
)
def test_stream_that_fails(good: int, text: str) -> None:
    class Stream(trio.abc.ReceiveStream):
        closed = 0
        given = False

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            await trio.lowlevel.checkpoint()
            if good and not self.given:
                self.given = True
                return b"x" * good
            raise OSError("reset")

        async def aclose(self) -> None:
            self.closed += 1

    stream = Stream()

    async def download(progress):
        return stream, 0

    async def main() -> None:
        async with open_download_manager(MemoryStore()) as manager:
            with pytest.raises(RegistrationError) as caught:
                async with manager.download([FakeSource("a", download)]):
                    pass
        assert str(caught.value) == text
        assert isinstance(caught.value.__cause__, RegistrationError)
        assert stream.closed == 1

    run(main)


@SEEDS
def test_each_pull_gets_an_error_of_its_own(seed: int) -> None:
    """One of our errors keeps its type and fields; any other becomes a TransferError. The original
    is the cause.
    """
    ours = VerificationError("differs", digest="sha256:12")
    foreign = OSError(5, "Input/output error")
    errors: dict[Exception, list[Exception]] = {ours: [], foreign: []}

    async def main() -> None:
        async with (
            open_download_manager(MemoryStore(), max_download_attempts=1) as manager,
            trio.open_nursery() as nursery,
        ):

            async def pull(error: Exception) -> None:
                with pytest.raises(LayersError) as caught:
                    async with manager.download([FakeSource(str(error), failing(error, 1))]):
                        pass
                errors[error].append(caught.value)

            for error in errors:
                nursery.start_soon(pull, error)
                nursery.start_soon(pull, error)

    run(main, seed)
    for original, copies in errors.items():
        assert len(copies) == 2
        assert len({id(error) for error in [original, *copies]}) == 3
        assert all(error.__cause__ is original for error in copies)
    assert all(type(error) is VerificationError for error in errors[ours])
    assert [error.digest for error in errors[ours]] == ["sha256:12"] * 2
    assert all(type(error) is TransferError for error in errors[foreign])
    assert str(errors[foreign][0]) == str(foreign)


@pytest.mark.parametrize("where", ["cause", "context", "group", "deep"])
def test_do_not_retry_is_honoured_wherever_it_is(where: str) -> None:
    async def download(progress) -> None:
        final = DoNotRetry("denied")
        if where == "cause":
            raise OSError("outer") from final
        if where == "group":
            raise ExceptionGroup("outer", [OSError(), ExceptionGroup("inner", [final])])
        try:
            try:
                raise final
            except DoNotRetry:
                if where == "deep":
                    raise OSError("middle")  # noqa: B904
                raise OSError("outer")  # noqa: B904
        except OSError as middle:
            if where == "deep":
                raise RuntimeError("outer") from middle
            raise

    async def main() -> None:
        source = FakeSource("a", download)
        async with open_download_manager(MemoryStore()) as manager:
            with pytest.raises(TransferError, match="outer"):
                async with manager.download([source]):
                    pass
        assert source.calls == 1

    run(main)


def test_disk_that_is_full_is_not_tried_again() -> None:
    async def main() -> None:
        source = FakeSource("a", failing(StoreFull("no space left on device: free some")))
        async with open_download_manager(MemoryStore()) as manager:
            with pytest.raises(StoreFull, match="free some"):
                async with manager.download([source]):
                    pass
        assert source.calls == 1

    run(main)


def test_notes_of_a_copied_error_are_its_own() -> None:
    original = VerificationError("differs", digest="sha256:12")
    original.add_note("seen here")
    again = original.copy_to_raise()
    again.add_note("and there")
    assert original.__notes__ == ["seen here"]
    assert again.__notes__ == ["seen here", "and there"]


def test_suppressed_do_not_retry_does_not_count() -> None:
    async def download(progress) -> None:
        try:
            raise DoNotRetry("denied")
        except DoNotRetry:
            raise OSError("try again") from None

    async def main() -> None:
        source = FakeSource("a", download)
        async with open_download_manager(MemoryStore(), max_download_attempts=3) as manager:
            with pytest.raises(TransferError):
                async with manager.download([source]):
                    pass
        assert source.calls == 3
        assert trio.current_time() == 15

    run(main)


@pytest.mark.parametrize("method", ["diff_id", "registered", "get"])
def test_errors_before_any_transfer_end_the_pull_as_they_are(method: str) -> None:
    error = ManifestError("nonsense")

    def fail(*args: object) -> None:
        raise error

    async def fail_async(*args: object) -> None:
        raise error

    async def main() -> None:
        store = MemoryStore()
        kept = store.add(b"a", None)
        sources = [FakeSource("a", known=True), FakeSource("b")]
        if method == "get":
            store.get = fail_async  # type: ignore[method-assign]
        else:
            setattr(sources[0], method, fail)
        async with open_download_manager(store) as manager:
            with pytest.raises(ManifestError) as caught:
                async with manager.download(sources):
                    pass
        assert caught.value is error
        assert [source.closed for source in sources] == [1, 1]
        assert kept.references == 1

    run(main)


def test_registered_that_fails_in_a_transfer_fails_it_and_gives_the_layer_back() -> None:
    async def main() -> None:
        store, source = MemoryStore(), FakeSource("a")

        def fail(diff_id: str) -> None:
            raise ValueError("cannot note it")

        source.registered = fail  # type: ignore[method-assign]
        async with open_download_manager(store) as manager:
            with pytest.raises(TransferError, match="cannot note it"):
                async with manager.download([source]):
                    pass
        assert not store.layers
        assert source.closed == 1

    run(main)


def test_close_that_fails_is_logged_and_the_others_are_closed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        sources = [FakeSource("a"), FakeSource("b", known=True), FakeSource("c")]

        def fail() -> None:
            raise OSError("cannot close")

        sources[0].close = fail  # type: ignore[method-assign]
        async with open_download_manager(MemoryStore()) as manager:
            async with manager.download(sources) as rootfs:
                assert len(rootfs.diff_ids) == 3
        assert [source.closed for source in sources[1:]] == [1, 1]

    run(main)
    assert "closing the source of layer a failed" in caplog.text


@pytest.mark.streamed
def test_descriptor_is_handed_to_the_store() -> None:
    """A repeated layer has the descriptor of the layer from which its data is read."""
    first, second = (
        Descriptor("application/octet-stream", diff_id_of(data), 1) for data in (b"1", b"2")
    )

    async def main() -> None:
        store = MemoryStore()
        sources = [FakeSource("a"), FakeSource("b"), FakeSource("a")]
        sources[0].descriptor = first  # type: ignore[attr-defined]
        sources[2].descriptor = second  # type: ignore[attr-defined]
        async with (
            open_download_manager(store) as manager,
            manager.download(sources) as rootfs,
        ):
            layer = await store.get(rootfs.chain_id)
            assert layer is not None
            assert layer.descriptor is first
            assert layer.parent.descriptor is None
            assert layer.parent.parent.descriptor is first
            assert sources[2].told == [diff_id_of(b"a")]
            store.release(layer)

    run(main)


def test_statistics_and_repr_tell_the_same() -> None:
    async def main() -> None:
        async with (
            open_download_manager(MemoryStore(), max_concurrent_downloads=2) as manager,
            trio.open_nursery() as nursery,
        ):

            async def pull() -> None:
                async with manager.download([FakeSource(str(i), after(5)) for i in range(5)]):
                    pass

            nursery.start_soon(pull)
            await trio.sleep(1)
            assert sorted(repr(each) for each in manager._transfers._running.values()) == [
                "<Transfer 0: active, 2 watchers>",
                "<Transfer 1: active, 2 watchers>",
                "<Transfer 2: queued, 2 watchers>",
                "<Transfer 3: queued, 2 watchers>",
                "<Transfer 4: queued, 1 watchers>",
            ]
            tasks = {task.name for task in manager._transfers._nursery.child_tasks}
            assert {f"transfer {i}" for i in range(5)} <= tasks
            now = manager.statistics()
            assert (now.pulls, now.transfers, now.downloading, now.queued) == (1, 5, 2, 3)
            assert repr(manager) == (
                "<DownloadManager: 1 pulls, 5 transfers, 2 downloading, 3 queued>"
            )

    run(main)


class CountSteps(trio.abc.Instrument):
    def __init__(self) -> None:
        self.steps = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1


def test_ten_thousand_layers_take_ten_times_the_steps_of_a_thousand() -> None:
    async def steps(layers: int) -> int:
        counter = CountSteps()
        trio.lowlevel.add_instrument(counter)
        sources = [FakeSource(str(index)) for index in range(layers)]
        async with (
            open_download_manager(MemoryStore()) as manager,
            manager.download(sources) as rootfs,
        ):
            assert len(rootfs.diff_ids) == layers
        trio.lowlevel.remove_instrument(counter)
        return counter.steps

    small, large = run(lambda: steps(1_000), 1), run(lambda: steps(10_000), 1)
    assert large < 10.5 * small
