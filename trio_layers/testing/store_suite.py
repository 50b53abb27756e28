"""What any layer store must do, as tests to run on yours.

`StoreSuite` checks what `trio_layers.abc.LayerStore` promises, `StagingStoreSuite` that and what
`~trio_layers.abc.StagingStore` does. Say how to open a store, and the methods are tests, for
pytest-trio (in its trio mode, or marked ``trio``):

    class TestMyStore(StagingStoreSuite[MyStore]):
        def open_store(self):
            return open_my_store()

For anyio's pytest plugin mark the class ``anyio``, and let the fixture ``anyio_backend`` be
``"trio"``. A directory for each test comes by a fixture of the class:

        @pytest.fixture(autouse=True)
        def _directory(self, tmp_path):
            self.directory = tmp_path

Nothing here needs pytest. Without it:

    for name, check in TestMyStore().checks():
        trio.run(check)

A check that fails raises `AssertionError`, or what the store raised where it must not; one that
takes longer than `StoreSuite.patience` raises `trio.TooSlowError`. The suite shows what is wrong
with a store that others see. It cannot show what a crash or a full disk does to it.
"""

from __future__ import annotations

import abc
import gzip
import hashlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import lru_cache, partial
from types import TracebackType
from typing import ClassVar, Generic, Self, TypeVar, final, get_args

import attrs
import trio
import trio.testing

from .._digest import ChainID, digest_of, extend_chain
from .._errors import DecompressionError
from .._manifest import Descriptor
from .._memory import MemoryStore
from ..abc import Layer, LayerStore, Stage, StagingStore
from ._layers import BuiltLayer, Directory, File, build_layer
from ._tar import Compression

__all__ = ["StagingStoreSuite", "StoreSuite"]

StoreT = TypeVar("StoreT", bound=LayerStore)
StagingStoreT = TypeVar("StagingStoreT", bound=StagingStore)


class StoreSuite(abc.ABC, Generic[StoreT]):
    """Tests of a `~trio_layers.abc.LayerStore`. Each opens a store of its own, once.

    Attributes:
        verifies_descriptors: Whether the store compares what comes with the descriptor it is
            given. Then a difference has to be an error; else it is not looked at.
        patience: Seconds that a test may take, on a machine as slow as they come.
    """

    verifies_descriptors: ClassVar[bool] = False
    patience: ClassVar[float] = 60

    @abc.abstractmethod
    def open_store(self) -> AbstractAsyncContextManager[StoreT]:
        """A store that is empty, for the block."""

    async def collect(self, store: StoreT) -> None:
        """Make the store drop what nobody refers to, if that takes a word. Overridden, it lets
        the suite see whether all is kept that has a reference.
        """
        await trio.lowlevel.checkpoint()

    def checks(self) -> Iterator[tuple[str, Callable[[], Awaitable[None]]]]:
        """All tests, by name: each is to be called and awaited, in trio."""
        for name in sorted(dir(self)):
            if name.startswith("test_"):
                yield name, getattr(self, name)

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[StoreT]:
        with trio.fail_after(self.patience):
            async with self.open_store() as store:
                yield store

    async def _is_there(self, store: StoreT, chain_id: ChainID) -> bool:
        layer = await store.get(chain_id)
        if layer is None:
            return False
        store.release(layer)
        return True

    async def _check_absent(self, store: StoreT, *layers: BuiltLayer, when: str) -> None:
        """That the top one of a stack is not there."""
        there = await self._is_there(store, _chain_of(*layers))
        _check(not there, f"{when}, the layer is in the store")

    # What a layer is, and where it is found.

    async def test_what_is_not_there_is_none(self) -> None:
        """`get` of a layer that nobody registered."""
        async with self._opened() as store:
            await self._check_absent(store, _layer("a"), when="before it is registered")

    async def test_a_layer_is_named_by_its_tar(self) -> None:
        """Diff ID, chain ID and parent are right, and so is what `get` finds."""
        async with self._opened() as store:
            built = _layer("a")
            layer = await store.register(_Stream(built), None)
            found = await store.get(layer.chain_id)
            assert found is not None, "a layer that is registered is not found"
            for each in (layer, found):
                _check_stack(each, built)
                store.release(each)

    async def test_layers_stand_on_each_other(self) -> None:
        """Chain IDs and parents of a stack, and of another on the same base."""
        async with self._opened() as store:
            base, one, two, top = (_layer(name) for name in ("base", "one", "two", "top"))
            for stack in ((base, one, top), (base, two, top), (base, top)):
                layers = await _register(store, *stack)
                _check_stack(layers[-1], *stack)
                found = await store.get(_chain_of(*stack))
                assert found is not None, "a layer on others is not found"
                _check_stack(found, *stack)
                for layer in (*layers, found):
                    store.release(layer)

    async def test_what_is_there_is_returned_as_it_is(self) -> None:
        """Registered again, in another compression, a layer is the same one."""
        async with self._opened() as store:
            base, built = _layer("base"), _layer("a")
            layers = await _register(store, base, built)
            again = await store.register(
                _Stream(_layer("a", compression="zstd")), layers[0].chain_id
            )
            _check_equal(again.chain_id, layers[1].chain_id, "the chain ID of an equal layer")
            for layer in (*layers, again):
                store.release(layer)

    async def test_an_unknown_parent_is_an_error(self) -> None:
        """Nothing can be put on what is not there, and nothing is stored then."""
        async with self._opened() as store:
            base, built = _layer("base"), _layer("a")
            with _Raises(Exception):
                await store.register(_Stream(built), _chain_of(base))
            await self._check_absent(store, base, built, when="without its parent")
            await self._check_absent(store, built, when="when it was meant for a parent")

    # What comes.

    async def test_each_compression(self) -> None:
        """The magic bytes say which it is; the layer is the same."""
        async with self._opened() as store:
            for compression in get_args(Compression):
                built = _layer(f"in {compression}", compression=compression)
                layer = await store.register(_Stream(built), None)
                _check_equal(layer.diff_id, built.diff_id, f"the diff ID of {compression}")
                store.release(layer)

    async def test_empty_layers(self) -> None:
        """A tar without entries; the same compressed."""
        async with self._opened() as store:
            for compression in get_args(Compression):
                built = build_layer([], compression=compression)
                layer = await store.register(_Stream(built), None)
                _check_equal(layer.diff_id, built.diff_id, f"an empty tar's diff ID, {compression}")
                store.release(layer)

    async def test_pieces_of_any_size(self) -> None:
        """A stream gives what it likes, up to what it is asked for."""
        async with self._opened() as store:
            small, large = _layer("small"), _layer("large", size=3_000_000)
            for built, piece in ((small, 1), (small, 7), (large, 10_000), (large, 10_000_000)):
                layer = await store.register(_Stream(built, piece=piece), None)
                _check_equal(layer.diff_id, built.diff_id, f"the diff ID from pieces of {piece}")
                store.release(layer)

    async def test_where_no_stream_begins(self) -> None:
        """What is wrong with, or while reading, the beginning is a `DecompressionError`."""
        async with self._opened() as store:
            built = _layer("a")
            named = _named_gzip(built)
            error = OSError("the network")
            for stream, what in (
                (_Stream(built, stop=0, error=error), "reading the first byte fails"),
                (_Stream(built, stop=9, error=error), "reading the tenth byte fails"),
                (_Stream(named, stop=20, error=error), "reading a gzip header fails"),
            ):
                with _Raises(DecompressionError, when=what) as raised:
                    await store.register(stream, None)
                _check(raised.error.__cause__ is error, f"if {what}, that is not the cause")
            for wrong in (b"\x1f\x8b\x08\x00", b"BZh9" + bytes(20), b"\x28\xb5\x2f\xfd\xff"):
                with _Raises(DecompressionError, when=f"{wrong!r} is all that comes"):
                    await store.register(_Stream(wrong), None)
            await self._check_absent(store, built, when="after its stream failed")
            await _register_all(store, built)

    async def test_what_a_stream_raises_comes_out_as_it_is(self) -> None:
        """In no group, and with nothing stored, whichever compression it is."""
        async with self._opened() as store:
            for compression in get_args(Compression):
                built = _layer(f"in {compression}", size=100_000, compression=compression)
                error = _StreamError()
                half = len(_data(built)) // 2
                with _Raises(_StreamError, when="the stream fails") as raised:
                    await store.register(_Stream(built, stop=half, error=error), None)
                _check(raised.error is error, "what the stream raised is another object now")
                await self._check_absent(store, built, when="after its stream failed")
                await _register_all(store, built)

    async def test_what_is_damaged_is_not_stored(self) -> None:
        """A stream that ends early, or has wrong bytes in the middle."""
        async with self._opened() as store:
            for compression in set(get_args(Compression)) - {"none"}:
                built = _layer(f"in {compression}", size=100_000, compression=compression)
                data = _data(built)
                half = len(data) // 2
                damaged = [data[:half]]
                if compression != "zstd":  # whose checksum is an option
                    damaged.append(data[:half] + bytes(1000) + data[half + 1000 :])
                for wrong in damaged:
                    with _Raises(Exception, when=f"{compression} is damaged"):
                        await store.register(_Stream(wrong), None)
                    await self._check_absent(store, built, when="though it came damaged")

    async def test_the_stream_is_left_open(self) -> None:
        """It is its owner's, after success, failure and cancellation."""
        async with self._opened() as store:
            built = _layer("a", size=100_000)
            streams = [
                _Stream(built, stop=50_000, error=_StreamError()),
                _Stream(built, stop=50_000),
                _Stream(built),
            ]
            with _Raises(_StreamError):
                await store.register(streams[0], None)
            await _cancelled_when(streams[1].stopped, partial(store.register, streams[1], None))
            store.release(await store.register(streams[2], None))
            for stream, when in zip(streams, ("failed", "cancelled", "registered"), strict=True):
                _check(not stream.closed, f"the stream of a layer was closed when it was {when}")

    async def test_descriptors(self) -> None:
        """One that fits changes nothing; one that does not, where the store looks."""
        async with self._opened() as store:
            built, other = _layer("a", size=10_000), _layer("other")
            if self.verifies_descriptors:
                size = attrs.evolve(built.descriptor, size=built.descriptor.size + 1)
                for wrong in (other.descriptor, size):
                    with _Raises(Exception, when="what comes is not what its descriptor says"):
                        await store.register(_Stream(built), None, wrong)
                    await self._check_absent(store, built, when="though its descriptor is wrong")
            for layer in (built, other):
                registered = await store.register(_Stream(layer), None, layer.descriptor)
                _check_stack(registered, layer)
                store.release(registered)

    # Cancellation.

    async def test_cancelled_at_each_step(self) -> None:
        """Wherever it is cancelled, a layer is not stored, or returned all the same."""
        async with self._opened() as store:
            [base] = await _register(store, _layer("base"))

            async def register(built: BuiltLayer) -> None:
                store.release(await store.register(_Stream(built), base.chain_id))

            async def look(built: BuiltLayer) -> None:
                await self._check_absent(store, _layer("base"), built, when="after cancellation")

            await _cancelled_at_each_step(register, look)
            store.release(base)

    async def test_cancelled_while_the_stream_waits(self) -> None:
        """Waiting for more ends at once, and the next to register starts afresh."""
        async with self._opened() as store:
            built = _layer("a", size=100_000)
            for stop in (0, 5, 50_000, len(_data(built))):
                stream = _Stream(built, stop=stop)
                register = partial(store.register, stream, None, built.descriptor)
                await _cancelled_when(stream.stopped, register)
                await self._check_absent(store, built, when="after cancellation")
            await _register_all(store, built)

    async def test_methods_are_checkpoints(self) -> None:
        """Also where there is nothing to do."""
        async with self._opened() as store:
            built = _layer("a")
            held: list[Layer] = []
            for _ in range(2):
                with trio.testing.assert_checkpoints():
                    layer = await store.register(_Stream(built), None, built.descriptor)
                with trio.testing.assert_checkpoints():
                    again = await store.get(layer.chain_id)
                assert again is not None
                with trio.testing.assert_checkpoints():
                    await store.get(_chain_of(_layer("none")))
                with trio.testing.assert_checkpoints():
                    stream = await layer.tar_stream()
                await stream.aclose()
                store.release(again)
                held.append(layer)
            for layer in held:
                store.release(layer)

    # References.

    async def test_a_layer_stays_while_it_is_referred_to(self) -> None:
        """Each `get` and `register` is one reference, and each `release` gives back one."""
        async with self._opened() as store:
            built = _layer("a")
            held = [
                await store.register(_Stream(built), None),
                await store.register(_Stream(built), None),
                await store.get(_chain_of(built)),
            ]
            while held:
                await self.collect(store)
                _check(
                    await self._is_there(store, _chain_of(built)),
                    f"a layer with {len(held)} references is gone",
                )
                layer = held.pop(0)
                assert layer is not None, "a layer that is registered is not found"
                await _check_readable(layer, built)
                store.release(layer)
            await self.collect(store)
            await _register_all(store, built)

    async def test_a_layer_keeps_those_below(self) -> None:
        """A reference to the top one is enough, also where it came by `get`."""
        async with self._opened() as store:
            stack = [_layer(name) for name in ("a", "b", "c")]
            *below, top = await _register(store, *stack)
            for layer in below:
                store.release(layer)
            await self.collect(store)
            again = await store.get(top.chain_id)
            store.release(top)
            await self.collect(store)
            assert again is not None, "a layer with a reference is gone"
            _check_stack(again, *stack)
            this: Layer | None = again
            for built in reversed(stack):
                assert this is not None
                await _check_readable(this, built)
                this = this.parent
            for number in (1, 2, 3):
                there = await self._is_there(store, _chain_of(*stack[:number]))
                _check(there, "a layer is gone that is below one with a reference")
            store.release(again)

    async def test_a_failure_takes_no_reference(self) -> None:
        """A layer is not kept, and not lost, by calls for it that fail."""
        async with self._opened() as store:
            base, built = _layer("base"), _layer("a", size=100_000)
            [layer] = await _register(store, base)
            for _ in range(3):
                with _Raises(_StreamError):
                    await store.register(
                        _Stream(built, stop=50_000, error=_StreamError()), layer.chain_id
                    )
            await self.collect(store)
            _check(await self._is_there(store, layer.chain_id), "a failure dropped the parent")
            top = await store.register(_Stream(built), layer.chain_id)
            store.release(layer)
            await self.collect(store)
            _check_stack(top, base, built)
            _check(await self._is_there(store, top.chain_id), "a layer with a reference is gone")
            store.release(top)

    # What was stored, once more.

    async def test_the_data_can_be_registered_again(self) -> None:
        """`Layer.tar_stream` is what `register` takes, on whatever parent."""
        async with self._opened() as store:
            base = await store.register(_Stream(_layer("base")), None)
            for compression in get_args(Compression):
                built = _layer(f"in {compression}", size=100_000, compression=compression)
                layer = await store.register(_Stream(built), None, built.descriptor)
                async with await layer.tar_stream() as stream:
                    copy = await store.register(stream, base.chain_id)
                _check_stack(copy, _layer("base"), built)
                store.release(layer)
                store.release(copy)
            store.release(base)

    async def test_the_data_can_be_read_by_many(self) -> None:
        """Each stream is one of its own, and may be closed early."""
        async with self._opened() as store:
            built = _layer("a", size=100_000)
            [layer] = await _register(store, built)
            async with await layer.tar_stream() as early:
                await early.receive_some(10)
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(_check_readable, layer, built)
            store.release(layer)

    # Many at once.

    async def test_one_layer_is_registered_by_many(self) -> None:
        """They get the same layer, and each of them a reference."""
        async with self._opened() as store:
            base, built = _layer("base"), _layer("a", size=100_000)
            layers: list[Layer] = []

            async def register() -> None:
                [below] = await _register(store, base)
                stream = _Stream(built, piece=10_000)
                layers.append(await store.register(stream, below.chain_id, built.descriptor))
                store.release(below)

            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(register)
            while layers:
                await self.collect(store)
                _check_stack(layers[0], base, built)
                there = await self._is_there(store, layers[0].chain_id)
                _check(there, f"a layer with {len(layers)} references is gone")
                store.release(layers.pop())

    async def test_many_layers_are_registered_at_once(self) -> None:
        """Any number of tasks may use a store."""
        async with self._opened() as store:
            base = _layer("base")

            async def use(number: int) -> None:
                built = _layer(str(number))
                below, layer = await _register(store, base, built)
                store.release(below)
                found = await store.get(layer.chain_id)
                assert found is not None, "a layer with a reference is gone"
                store.release(layer)
                await self.collect(store)
                await _check_readable(found, built)
                _check_stack(found, base, built)
                store.release(found)

            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(use, number)

    async def test_one_that_is_cancelled_harms_nobody(self) -> None:
        """Others may be waiting for what it was doing: then they do it."""
        async with self._opened() as store:
            built = _layer("a", size=100_000)
            stuck = _Stream(built, stop=50_000)

            async def register() -> None:
                layer = await store.register(_Stream(built), None, built.descriptor)
                _check_stack(layer, built)
                store.release(layer)

            async with trio.open_nursery() as nursery:
                scope = trio.CancelScope()

                async def be_stuck() -> None:
                    with scope:
                        await store.register(stuck, None, built.descriptor)

                nursery.start_soon(be_stuck)
                await stuck.stopped.wait()
                for _ in range(3):
                    nursery.start_soon(register)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
            await _register_all(store, built)


class StagingStoreSuite(StoreSuite[StagingStoreT]):
    """Tests of a `~trio_layers.abc.StagingStore`: those of `StoreSuite`, and more.

    Attributes:
        keeps_blobs: Whether a layer's blob stays in the store with it, so that staging it again
            needs no download.
        many: How many stages may wait for their parents at once.
    """

    keeps_blobs: ClassVar[bool] = False
    many: ClassVar[int] = 1000

    # One stage, from its first byte to its layer.

    async def test_stage_a_layer(self) -> None:
        """What has arrived is counted and hashed; all of it is a layer."""
        async with self._opened() as store:
            built = _layer("a", size=3_000_000)
            data = _data(built)
            async with store.stage(built.descriptor) as stage:
                _check_stage(stage, b"")
                for start in range(0, len(data), 700_000):
                    await stage.write(data[start : start + 700_000])
                    _check_stage(stage, data[: start + 700_000])
                await stage.finish(_ignore)
                _check(stage.complete, "a stage is not complete though it is finished")
                layer = await stage.commit(None)
                _check_stack(layer, built)
            await self.collect(store)
            _check(await self._is_there(store, layer.chain_id), "a staged layer is not there")
            await _check_readable(layer, built)
            store.release(layer)

    async def test_stage_each_compression(self) -> None:
        """As for `register`."""
        async with self._opened() as store:
            for compression in get_args(Compression):
                for built in (
                    _layer(f"in {compression}", size=100_000, compression=compression),
                    build_layer([], compression=compression),
                ):
                    layer = await _stage(store, built)
                    _check_stack(layer, built)
                    store.release(layer)

    async def test_stage_upon_a_parent(self) -> None:
        """One that comes after all has arrived, and one that does not come."""
        async with self._opened() as store:
            base, built = _layer("base"), _layer("a")
            async with store.stage(built.descriptor) as stage:
                await _fill(stage, built)
                below = await _stage(store, base)
                layer = await stage.commit(below.chain_id)
            store.release(below)
            _check_stack(layer, base, built)
            other = _layer("other")
            with _Raises(Exception, when="there is no such parent"):
                store.release(await _stage(store, other, _chain_of(other)))
            await self._check_absent(store, other, other, when="without its parent")
            store.release(layer)

    async def test_staged_layers_are_held(self) -> None:
        """`Stage.commit` gives a reference, as `register` does."""
        async with self._opened() as store:
            base, built = _layer("base"), _layer("a")
            below = await _stage(store, base)
            layers = [await _stage(store, built, below.chain_id)]
            layers.append(await store.register(_Stream(built), below.chain_id))
            store.release(below)
            while layers:
                await self.collect(store)
                _check_stack(layers[0], base, built)
                there = await self._is_there(store, layers[0].chain_id)
                _check(there, f"a staged layer with {len(layers)} references is gone")
                store.release(layers.pop(0))

    async def test_progress_of_a_stage(self) -> None:
        """It never falls, never exceeds the blob's size, and reaches it before the commit ends."""
        async with self._opened() as store:
            built = _layer("a", size=3_000_000)
            told: list[int] = []
            layer = await _stage(store, built, told=told.append)
            size = built.descriptor.size
            _check_equal(told[-1:], [size], "the progress of a stage in the end")
            _check(told == sorted(told), f"the progress of a stage falls: {told}")
            _check(told[0] > 0 and told[-1] <= size, f"the progress of a stage is off: {told}")
            store.release(layer)

    async def test_stage_again_what_is_there(self) -> None:
        """Nothing is to be written where the store has the blob; the layer is the same."""
        async with self._opened() as store:
            built = _layer("a")
            layer = await _stage(store, built)
            async with store.stage(built.descriptor) as stage:
                if self.keeps_blobs:
                    _check(stage.complete, "a blob that is there is not complete when staged")
                    _check_stage(stage, _data(built), complete=True)
                again = await _finish(stage, built)
            _check_equal(again.chain_id, layer.chain_id, "the chain ID of what was staged before")
            store.release(layer)
            store.release(again)

    # Attempts.

    async def test_attempts_are_never_mixed(self) -> None:
        """After a restart, bytes from before it count for nothing."""
        async with self._opened() as store:
            built, other = _layer("a", size=3_000_000), _layer("other", size=3_000_000)
            async with store.stage(built.descriptor) as stage:
                for data in (_data(other)[:2_000_000], _data(built)[:1_000_000], b"x", b""):
                    await stage.write(data)
                    await stage.restart()
                    _check_stage(stage, b"")
                layer = await _finish(stage, built)
            _check_stack(layer, built)
            await _check_readable(layer, built)
            store.release(layer)

    async def test_what_arrived_is_resumed(self) -> None:
        """Left without a commit, a stage leaves its bytes for the next, and nothing else."""
        async with self._opened() as store:
            built = _layer("a", size=3_000_000)
            data = _data(built)
            for start, end in ((0, 1_500_000), (1_500_000, 1_500_001), (1_500_001, 2_999_999)):
                async with store.stage(built.descriptor) as stage:
                    _check_stage(stage, data[:start])
                    await stage.write(data[start:end])
                await self._check_absent(store, built, when="left without a commit")
            async with store.stage(built.descriptor) as stage:
                _check_stage(stage, data[:2_999_999])
                layer = await _finish(stage, built)
            _check_stack(layer, built)
            store.release(layer)

    async def test_what_is_complete_is_resumed(self) -> None:
        """A blob that has come, and was not committed, need not come again."""
        async with self._opened() as store:
            built = _layer("a", size=100_000)
            async with store.stage(built.descriptor) as stage:
                await _fill(stage, built)
            await self._check_absent(store, built, when="left without a commit")
            async with store.stage(built.descriptor) as stage:
                _check_stage(stage, _data(built), complete=None)
                layer = await _finish(stage, built)
            _check_stack(layer, built)
            store.release(layer)

    async def test_wrong_bytes_can_be_dropped_later(self) -> None:
        """What an attempt left may be anything: the next sees that by its digest."""
        async with self._opened() as store:
            built, other = _layer("a", size=100_000), _layer("other", size=100_000)
            wrong = _data(other)[:50_000]
            async with store.stage(built.descriptor) as stage:
                await stage.write(wrong)
            async with store.stage(built.descriptor) as stage:
                _check_stage(stage, wrong)
                await stage.restart()
                layer = await _finish(stage, built)
            _check_stack(layer, built)
            store.release(layer)

    # What goes wrong.

    async def test_what_is_verified_and_damaged_fails_for_certain(self) -> None:
        """`Stage.wait_failed` and `Stage.commit` tell the same, and nothing is stored."""
        async with self._opened() as store:
            good = _data(_layer("a", size=100_000))
            no_gzip = b"\x1f\x8b\x08\x00" + b"\xff" * 2
            for data, kind in ((good[:50_000], Exception), (no_gzip, DecompressionError)):
                descriptor = Descriptor("application/octet-stream", digest_of(data), len(data))
                async with store.stage(descriptor) as stage:
                    await stage.write(data)
                    await stage.finish(_ignore)
                    failed = await stage.wait_failed()
                    with _Raises(kind, when="what was staged is damaged") as raised:
                        await stage.commit(None)
                    _check_equal(type(failed), type(raised.error), "what wait_failed returns")
            await self._check_absent(store, _layer("a", size=100_000), when="though it is damaged")

    async def test_what_is_not_verified_fails_nothing(self) -> None:
        """Damage in bytes that are dropped again is forgotten."""
        async with self._opened() as store:
            built = _layer("a", size=3_000_000)
            failures: list[Exception] = []
            async with store.stage(built.descriptor) as stage, trio.open_nursery() as nursery:

                async def watch() -> None:
                    failures.append(await stage.wait_failed())

                nursery.start_soon(watch)
                for wrong in (b"\x1f\x8b\x08\x00" + b"\xff" * 2_000_000, b"\x1f\x8b\x08", b"BZh"):
                    await stage.write(wrong)
                    await trio.testing.wait_all_tasks_blocked()
                    await stage.restart()
                layer = await _finish(stage, built)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            _check_equal(failures, [], "the failures of a stage that was started over")
            _check_stack(layer, built)
            store.release(layer)

    async def test_what_is_not_the_blob_is_not_finished(self) -> None:
        """Where the store compares: the attempt has failed then, and another one follows."""
        async with self._opened() as store:
            built, other = _layer("a", size=100_000), _layer("other", size=100_000)
            async with store.stage(built.descriptor) as stage:
                if self.verifies_descriptors:
                    await stage.write(_data(other))
                    with _Raises(Exception, when="what came is not the blob"):
                        await stage.finish(_ignore)
                    _check(not stage.complete, "what is not the blob is complete")
                    if stage.offset:
                        await stage.restart()
                layer = await _finish(stage, built)
            _check_stack(layer, built)
            store.release(layer)

    async def test_what_the_block_raises_comes_out_as_it_is(self) -> None:
        """At each stage of a stage."""
        async with self._opened() as store:
            built = _layer("a", size=100_000)
            error = _StreamError()
            for step in range(3):
                with _Raises(_StreamError) as raised:
                    async with store.stage(built.descriptor) as stage:
                        if step:
                            await stage.write(_data(built)[stage.offset : 40_000 * step])
                        if step == 2:
                            await _fill(stage, built)
                        raise error
                _check(raised.error is error, "what the block raised is another object now")
            await self._check_absent(store, built, when="after its block failed")
            store.release(await _stage(store, built))

    # Cancellation.

    async def test_stage_cancelled_at_each_step(self) -> None:
        """Wherever it is cancelled, a layer is not stored, or returned all the same."""
        async with self._opened() as store:
            base = await _stage(store, _layer("base"))

            async def stage(built: BuiltLayer) -> None:
                layer = await _stage(store, built, base.chain_id)
                store.release(layer)

            async def look(built: BuiltLayer) -> None:
                await self._check_absent(store, _layer("base"), built, when="after cancellation")
                layer = await _stage(store, built, base.chain_id)
                _check_stack(layer, _layer("base"), built)
                store.release(layer)

            await _cancelled_at_each_step(stage, look)
            store.release(base)

    async def test_waiting_for_a_failure_can_be_cancelled(self) -> None:
        """And changes nothing, as one that nobody hears."""
        async with self._opened() as store:
            built = _layer("a")
            async with store.stage(built.descriptor) as stage:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await stage.wait_failed()
                _check(scope.cancelled_caught, "wait_failed returned without a failure")
                layer = await _finish(stage, built)
            store.release(layer)

    async def test_abort_stops(self) -> None:
        """Leaving waits for nobody, whatever there is still to be unpacked or to arrive."""
        async with self._opened() as store:
            built = _layer("a", size=3_000_000)

            async def be_stuck(whole: bool) -> None:
                async with store.stage(built.descriptor) as stage:
                    if whole:
                        await _fill(stage, built)
                    elif not stage.complete:
                        await stage.write(_data(built)[stage.offset : stage.offset + 1_500_000])
                    await trio.sleep_forever()

            for whole in (False, True):
                async with trio.open_nursery() as nursery:
                    for _ in range(5):
                        nursery.start_soon(be_stuck, whole)
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.cancel_scope.cancel()
                await self._check_absent(store, built, when="after an abort")
            store.release(await _stage(store, built))

    # Many at once.

    async def test_two_stage_one_layer(self) -> None:
        """Whether one waits, or each has its own: both get the layer."""
        async with self._opened() as store:
            built = _layer("a", size=3_000_000)
            layers: list[Layer] = []

            async def stage() -> None:
                layers.append(await _stage(store, built))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(stage)
                nursery.start_soon(stage)
            for layer in layers:
                _check_stack(layer, built)
                await self.collect(store)
                _check(
                    await self._is_there(store, layer.chain_id), "one of two releases dropped it"
                )
                store.release(layer)

    async def test_staged_and_registered_at_once(self) -> None:
        """Both ways to one layer."""
        async with self._opened() as store:
            built = _layer("a", size=3_000_000)
            layers: list[Layer] = []

            async def stage() -> None:
                layers.append(await _stage(store, built))

            async def register() -> None:
                layers.append(await store.register(_Stream(built), None, built.descriptor))

            async with trio.open_nursery() as nursery:
                for do in (stage, register, stage, register):
                    nursery.start_soon(do)
            for layer in layers:
                _check_stack(layer, built)
                store.release(layer)

    async def test_who_waits_takes_over(self) -> None:
        """From one who is cancelled with half of the blob, and from one who fails."""
        async with self._opened() as store:
            built = _layer("a", size=3_000_000)
            layers: list[Layer] = []

            async def stage() -> None:
                layers.append(await _stage(store, built))

            async with trio.open_nursery() as nursery:
                with _Raises(_StreamError):
                    async with store.stage(built.descriptor) as stuck:
                        await stuck.write(_data(built)[:1_000_000])
                        nursery.start_soon(stage)
                        nursery.start_soon(stage)
                        await trio.testing.wait_all_tasks_blocked()
                        raise _StreamError
            for layer in layers:
                _check_stack(layer, built)
                store.release(layer)

    async def test_who_waits_is_told_no_more_than_there_can_be(self) -> None:
        """Of a blob that somebody else brings, and not after it has been entered."""
        async with self._opened() as store:
            built = _layer("a", size=3_000_000)
            told: list[int] = []
            layers: list[Layer] = []

            async def wait() -> None:
                async with store.stage(built.descriptor, told.append) as stage:
                    count = len(told)
                    layers.append(await _finish(stage, built))
                    _check_equal(len(told), count, "how often one is told who does not wait")

            async with trio.open_nursery() as nursery:
                async with store.stage(built.descriptor) as stage:
                    nursery.start_soon(wait)
                    await stage.write(_data(built)[:2_000_000] * 2)
                    await trio.testing.wait_all_tasks_blocked()
                    await stage.restart()
                    layers.append(await _finish(stage, built))
            size = built.descriptor.size
            _check(
                all(0 <= count <= size for count in told),
                f"of a blob of {size} bytes, {told} are told to be there",
            )
            for layer in layers:
                _check_stack(layer, built)
                store.release(layer)

    async def test_opposite_orders_do_not_meet(self) -> None:
        """[a, b] and [b, a] at once: each stages its upper layer first, and then waits for the
        other's.
        """
        async with self._opened() as store:
            layers = [_layer(f"{number}", size=10_000) for number in range(6)]

            async def pull(stack: list[BuiltLayer]) -> None:
                """From the top: each stage is open until the one below is a layer."""
                *below, top = stack
                async with store.stage(top.descriptor) as stage:
                    if not stage.complete:
                        await _fill(stage, top)
                    else:
                        await stage.finish(_ignore)
                    if below:
                        await pull(below)
                    parent = _chain_of(*below) if below else None
                    done.append(await stage.commit(parent))

            done: list[Layer] = []
            async with trio.open_nursery() as nursery:
                for turn in range(len(layers)):
                    stack = layers[turn:] + layers[:turn]
                    nursery.start_soon(pull, stack)
                    nursery.start_soon(pull, stack[::-1])
            _check_equal(len(done), 2 * len(layers) ** 2, "the layers of pulls that cross")
            for layer in done:
                store.release(layer)

    async def test_many_wait_for_their_parents(self) -> None:
        """Complete, and with nothing left to do but to wait, a stage is in nobody's way."""
        async with self._opened() as store:
            base = _layer("base")
            waiting: set[int] = set()
            all_wait, go_on = trio.Event(), trio.Event()
            chains: set[ChainID] = set()

            async def stage(number: int) -> None:
                built = _layer(f"{number}", size=10)
                async with store.stage(built.descriptor) as stage:
                    await _fill(stage, built)
                    waiting.add(number)
                    if len(waiting) == self.many:
                        all_wait.set()
                    await go_on.wait()
                    layer = await stage.commit(_chain_of(base))
                    chains.add(layer.chain_id)
                    store.release(layer)

            async with trio.open_nursery() as nursery:
                for number in range(self.many):
                    nursery.start_soon(stage, number)
                await all_wait.wait()
                below = await _stage(store, base)
                go_on.set()
            store.release(below)
            _check_equal(len(chains), self.many, "the layers of stages that waited")


# Layers to try it with.


@lru_cache(maxsize=64)
def _layer(name: str, *, size: int = 100, compression: Compression = "gzip") -> BuiltLayer:
    """A layer that is as large as it is downloaded, or a bit larger, and unlike all others."""
    noise = hashlib.shake_128(name.encode()).digest(size)
    return build_layer([Directory(""), File(name, data=noise)], compression=compression)


def _data(built: BuiltLayer) -> bytes:
    assert isinstance(built.content, bytes)
    return built.content


def _named_gzip(built: BuiltLayer) -> bytes:
    """The layer's tar with a gzip header of more than ten bytes."""
    out = io.BytesIO()
    with gzip.GzipFile("a-name-in-the-header", "wb", fileobj=out, mtime=0) as file:
        file.write(gzip.decompress(_data(built)))
    return out.getvalue()


def _chain_of(*layers: BuiltLayer) -> ChainID:
    chain: ChainID | None = None
    for layer in layers:
        chain = extend_chain(chain, layer.diff_id)
    assert chain is not None
    return chain


@final
class _StreamError(Exception):
    """What only a stream or a block of the suite raises."""


@final
class _Stream(trio.abc.ReceiveStream):
    """A layer's bytes, in pieces. At ``stop`` it raises ``error``, or else says so and waits for
    ever.
    """

    def __init__(
        self,
        built: BuiltLayer | bytes,
        *,
        piece: int = 4096,
        stop: int | None = None,
        error: Exception | None = None,
    ) -> None:
        self.closed = False
        self.stopped = trio.Event()
        self._data = built if isinstance(built, bytes) else _data(built)
        self._piece = piece
        self._stop = stop
        self._error = error
        self._position = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        if self.closed:
            raise trio.ClosedResourceError
        if self._position == self._stop:
            if self._error is not None:
                raise self._error
            self.stopped.set()
            await trio.sleep_forever()
        end = self._position + min(self._piece, max_bytes or self._piece)
        if self._stop is not None:
            end = min(end, self._stop)
        data = self._data[self._position : end]
        self._position += len(data)
        return data

    async def aclose(self) -> None:
        self.closed = True
        await trio.lowlevel.checkpoint()


def _ignore(position: int) -> None:
    pass


# What stores are asked to do.


async def _register(store: LayerStore, *stack: BuiltLayer) -> list[Layer]:
    """A stack, bottom first, with a reference to each."""
    layers: list[Layer] = []
    for built in stack:
        below = layers[-1].chain_id if layers else None
        layers.append(await store.register(_Stream(built), below, built.descriptor))
    return layers


async def _register_all(store: LayerStore, *stack: BuiltLayer) -> None:
    """That it can be done, after something else went wrong."""
    layers = await _register(store, *stack)
    _check_stack(layers[-1], *stack)
    for layer in layers:
        store.release(layer)


async def _fill(stage: Stage, built: BuiltLayer, told: Callable[[int], None] = _ignore) -> None:
    """Bring what is missing."""
    data = _data(built)
    if not stage.complete:
        for start in range(stage.offset, len(data), 1_000_000):
            await stage.write(data[start : start + 1_000_000])
    await stage.finish(told)


async def _finish(
    stage: Stage,
    built: BuiltLayer,
    parent: ChainID | None = None,
    told: Callable[[int], None] = _ignore,
) -> Layer:
    await _fill(stage, built, told)
    return await stage.commit(parent)


async def _stage(
    store: StagingStore,
    built: BuiltLayer,
    parent: ChainID | None = None,
    told: Callable[[int], None] = _ignore,
) -> Layer:
    """As the engine does it: a layer that a stage does not end well with goes back."""
    layer: Layer | None = None
    try:
        async with store.stage(built.descriptor) as stage:
            layer = await _finish(stage, built, parent, told)
    except BaseException:
        if layer is not None:
            store.release(layer)
        raise
    return layer


async def _cancelled_when(event: trio.Event, do: Callable[[], Awaitable[Layer]]) -> None:
    """Do something that is cancelled when ``event`` has happened."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                await event.wait()
                scope.cancel()

            nursery.start_soon(cancel)
            await do()
            nursery.cancel_scope.cancel()
    _check(scope.cancelled_caught, "what was cancelled while it waited went on all the same")


async def _cancelled_at_each_step(
    do: Callable[[BuiltLayer], Awaitable[None]], look: Callable[[BuiltLayer], Awaitable[None]]
) -> None:
    """Do something with one layer after the other, and cancel it later each time, until it gets
    to its end; ``look`` at each layer with which it was cancelled.
    """
    step = 0
    while True:
        # Each step of a short way, and some of a long one.
        step += 1 + step // 20
        built = _layer(f"step {step}")
        instrument = _CancelAtStep(step)
        trio.lowlevel.add_instrument(instrument)
        try:
            with instrument.scope:
                await do(built)
        finally:
            trio.lowlevel.remove_instrument(instrument)
        if not instrument.scope.cancel_called:
            return
        if instrument.scope.cancelled_caught:
            await look(built)


@final
class _CancelAtStep(trio.abc.Instrument):
    """Cancels when tasks have made so many steps: whatever waits then is not waited for."""

    def __init__(self, step: int) -> None:
        self.scope = trio.CancelScope()
        self._left = step

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if self._left == 0:
            self.scope.cancel()


# What is checked.


def _check(condition: bool, otherwise: str) -> None:
    # Not "assert": the suite says what is wrong where nobody rewrites that, and with -O.
    if not condition:
        raise AssertionError(otherwise)


def _check_equal(found: object, expected: object, what: str) -> None:
    _check(found == expected, f"{what} should be {expected!r}, but is {found!r}")


def _check_stack(layer: Layer, *stack: BuiltLayer) -> None:
    """Names and parents of a layer, which is the top of the stack."""
    found: Layer | None = layer
    for number in range(len(stack), 0, -1):
        assert found is not None, f"a layer on {number} others has too few parents"
        _check_equal(found.diff_id, stack[number - 1].diff_id, "the diff ID of a layer")
        _check_equal(found.chain_id, _chain_of(*stack[:number]), "the chain ID of a layer")
        found = found.parent
    _check(found is None, "the bottom layer has a parent")


async def _check_readable(layer: Layer, built: BuiltLayer) -> None:
    """That the layer's data is there, in whatever compression: as a store would take it."""
    store = MemoryStore()
    async with await layer.tar_stream() as stream:
        read = await store.register(stream, None)
    _check_equal(read.diff_id, built.diff_id, "the diff ID of a layer's data")


def _check_stage(stage: Stage, data: bytes, *, complete: bool | None = False) -> None:
    """That so much is there; ``complete``: whether that is known to be all, ``None``: may be."""
    _check_equal(stage.offset, len(data), "the offset of a stage")
    _check_equal(stage.digest, digest_of(data), "the digest of a stage")
    if complete is not None:
        _check_equal(stage.complete, complete, "whether a stage is complete")


@final
class _Raises:
    """That the block raises such an error, and no group."""

    def __init__(self, kind: type[Exception], *, when: str = "something is wrong") -> None:
        self.error = Exception()
        self._kind = kind
        self._when = when

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if error is not None and not isinstance(error, Exception):
            return False
        is_it = isinstance(error, self._kind) and not isinstance(error, ExceptionGroup)
        if error is None or not is_it or isinstance(error, AssertionError):
            found = "nothing was" if error is None else f"{error!r} was"
            expected = f"if {self._when}, {self._kind.__name__} is to be raised"
            raise AssertionError(f"{expected}, and {found}") from error
        self.error = error
        return True
