"""Tests of any layer store."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import ClassVar, Generic, TypeVar, get_args

import attrs
import trio
import trio.testing

from .._digest import ChainID
from .._errors import DecompressionError
from ..abc import Layer, LayerStore
from ._layers import BuiltLayer, build_layer
from ._suite_tools import (
    ExpectError,
    LayerStream,
    StreamError,
    blob_of,
    cancel_at_each_step,
    cancel_when,
    chain_id_of,
    check,
    check_can_register,
    check_equal,
    check_readable,
    check_stack,
    gzip_with_name,
    make_layer,
    register_stack,
)
from ._tar import Compression

__all__ = ["StoreSuite"]

StoreT = TypeVar("StoreT", bound=LayerStore)


class StoreSuite(abc.ABC, Generic[StoreT]):
    """Tests of a `~trio_layers.abc.LayerStore`, each with a new store.

    Attributes:
        verifies_descriptors: Whether the store compares blobs with their descriptors. If so, a
            difference must be an error; otherwise it is not tested.
        patience: The longest time of a test in seconds, on the slowest machine.
    """

    verifies_descriptors: ClassVar[bool] = False
    patience: ClassVar[float] = 60

    @abc.abstractmethod
    def open_store(self) -> AbstractAsyncContextManager[StoreT]:
        """Open an empty store for the block."""

    async def collect(self, store: StoreT) -> None:
        """Make the store delete all layers without a reference.

        Override this if your store needs a call for that. Then the suite can test that the store
        keeps all layers with a reference.
        """
        await trio.lowlevel.checkpoint()

    def checks(self) -> Iterator[tuple[str, Callable[[], Awaitable[None]]]]:
        """Yield the name and the asynchronous function of each test."""
        for name in sorted(dir(self)):
            if name.startswith("test_"):
                yield name, getattr(self, name)

    @asynccontextmanager
    async def _open_in_time(self) -> AsyncIterator[StoreT]:
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
        """Check that the store lacks the top layer of a stack."""
        there = await self._is_there(store, chain_id_of(*layers))
        check(not there, f"{when}, the layer is in the store")

    # The identity of layers.

    async def test_get_returns_none_for_a_missing_layer(self) -> None:
        """`get` returns ``None`` for a layer that was never registered."""
        async with self._open_in_time() as store:
            await self._check_absent(store, make_layer("a"), when="before it is registered")

    async def test_ids_of_a_layer(self) -> None:
        """Diff ID, chain ID and parent are right, also in the layer from `get`."""
        async with self._open_in_time() as store:
            built = make_layer("a")
            layer = await store.register(LayerStream(built), None)
            found = await store.get(layer.chain_id)
            assert found is not None, "a layer that is registered is not found"
            for each in (layer, found):
                check_stack(each, built)
                store.release(each)

    async def test_chain_ids_and_parents(self) -> None:
        """Chain IDs and parents are right in several stacks on the same base."""
        async with self._open_in_time() as store:
            base, one, two, top = (make_layer(name) for name in ("base", "one", "two", "top"))
            for stack in ((base, one, top), (base, two, top), (base, top)):
                layers = await register_stack(store, *stack)
                check_stack(layers[-1], *stack)
                found = await store.get(chain_id_of(*stack))
                assert found is not None, "a layer on others is not found"
                check_stack(found, *stack)
                for layer in (*layers, found):
                    store.release(layer)

    async def test_register_a_stored_layer_again(self) -> None:
        """A layer that is registered again, with another compression, is the same layer."""
        async with self._open_in_time() as store:
            base, built = make_layer("base"), make_layer("a")
            layers = await register_stack(store, base, built)
            again = await store.register(
                LayerStream(make_layer("a", compression="zstd")), layers[0].chain_id
            )
            check_equal(again.chain_id, layers[1].chain_id, "the chain ID of an equal layer")
            for layer in (*layers, again):
                store.release(layer)

    async def test_a_missing_parent_is_an_error(self) -> None:
        """A layer upon a missing parent is an error, and is not stored."""
        async with self._open_in_time() as store:
            base, built = make_layer("base"), make_layer("a")
            with ExpectError(Exception):
                await store.register(LayerStream(built), chain_id_of(base))
            await self._check_absent(store, base, built, when="without its parent")
            await self._check_absent(store, built, when="when it was meant for a parent")

    # The stream of a layer.

    async def test_each_compression(self) -> None:
        """The store finds the compression by the magic bytes."""
        async with self._open_in_time() as store:
            for compression in get_args(Compression):
                built = make_layer(f"in {compression}", compression=compression)
                layer = await store.register(LayerStream(built), None)
                check_equal(layer.diff_id, built.diff_id, f"the diff ID of {compression}")
                store.release(layer)

    async def test_empty_layers(self) -> None:
        """A tar without entries is a layer, with each compression."""
        async with self._open_in_time() as store:
            for compression in get_args(Compression):
                built = build_layer([], compression=compression)
                layer = await store.register(LayerStream(built), None)
                check_equal(layer.diff_id, built.diff_id, f"an empty tar's diff ID, {compression}")
                store.release(layer)

    async def test_pieces_of_any_size(self) -> None:
        """A stream may return pieces of any size up to the requested one."""
        async with self._open_in_time() as store:
            small, large = make_layer("small"), make_layer("large", size=3_000_000)
            for built, piece in ((small, 1), (small, 7), (large, 10_000), (large, 10_000_000)):
                layer = await store.register(LayerStream(built, piece=piece), None)
                check_equal(layer.diff_id, built.diff_id, f"the diff ID from pieces of {piece}")
                store.release(layer)

    async def test_invalid_beginning_of_a_stream(self) -> None:
        """A wrong or unreadable beginning is a `DecompressionError`."""
        async with self._open_in_time() as store:
            built = make_layer("a")
            named = gzip_with_name(built)
            error = OSError("the network")
            for stream, what in (
                (LayerStream(built, stop=0, error=error), "reading the first byte fails"),
                (LayerStream(built, stop=9, error=error), "reading the tenth byte fails"),
                (LayerStream(named, stop=20, error=error), "reading a gzip header fails"),
            ):
                with ExpectError(DecompressionError, when=what) as raised:
                    await store.register(stream, None)
                check(raised.error.__cause__ is error, f"if {what}, that is not the cause")
            for wrong in (b"\x1f\x8b\x08\x00", b"BZh9" + bytes(20), b"\x28\xb5\x2f\xfd\xff"):
                with ExpectError(DecompressionError, when=f"{wrong!r} is all that comes"):
                    await store.register(LayerStream(wrong), None)
            await self._check_absent(store, built, when="after its stream failed")
            await check_can_register(store, built)

    async def test_errors_of_the_stream_are_unchanged(self) -> None:
        """The stream's error is raised unchanged, without a group, and nothing is stored."""
        async with self._open_in_time() as store:
            for compression in get_args(Compression):
                built = make_layer(f"in {compression}", size=100_000, compression=compression)
                error = StreamError()
                half = len(blob_of(built)) // 2
                with ExpectError(StreamError, when="the stream fails") as raised:
                    await store.register(LayerStream(built, stop=half, error=error), None)
                check(raised.error is error, "the stream's error is raised as another object")
                await self._check_absent(store, built, when="after its stream failed")
                await check_can_register(store, built)

    async def test_damaged_streams_are_errors(self) -> None:
        """A stream that ends early or has wrong bytes is an error."""
        async with self._open_in_time() as store:
            for compression in set(get_args(Compression)) - {"none"}:
                built = make_layer(f"in {compression}", size=100_000, compression=compression)
                data = blob_of(built)
                half = len(data) // 2
                damaged = [data[:half]]
                if compression != "zstd":  # its checksum is optional
                    damaged.append(data[:half] + bytes(1000) + data[half + 1000 :])
                for wrong in damaged:
                    with ExpectError(Exception, when=f"{compression} is damaged"):
                        await store.register(LayerStream(wrong), None)
                    await self._check_absent(store, built, when="though it came damaged")

    async def test_the_stream_stays_open(self) -> None:
        """The store does not close the stream after success, failure or cancellation."""
        async with self._open_in_time() as store:
            built = make_layer("a", size=100_000)
            streams = [
                LayerStream(built, stop=50_000, error=StreamError()),
                LayerStream(built, stop=50_000),
                LayerStream(built),
            ]
            with ExpectError(StreamError):
                await store.register(streams[0], None)
            await cancel_when(streams[1].stopped, partial(store.register, streams[1], None))
            store.release(await store.register(streams[2], None))
            for stream, when in zip(streams, ("failed", "cancelled", "registered"), strict=True):
                check(not stream.closed, f"the stream of a layer was closed when it was {when}")

    async def test_descriptors(self) -> None:
        """A wrong descriptor is an error if the store verifies them."""
        async with self._open_in_time() as store:
            built, other = make_layer("a", size=10_000), make_layer("other")
            if self.verifies_descriptors:
                size = attrs.evolve(built.descriptor, size=built.descriptor.size + 1)
                for wrong in (other.descriptor, size):
                    with ExpectError(Exception, when="the stream differs from its descriptor"):
                        await store.register(LayerStream(built), None, wrong)
                    await self._check_absent(store, built, when="though its descriptor is wrong")
            for layer in (built, other):
                registered = await store.register(LayerStream(layer), None, layer.descriptor)
                check_stack(registered, layer)
                store.release(registered)

    # Cancellation.

    async def test_cancelled_at_each_step(self) -> None:
        """At each step, a cancelled call stores no layer, or returns it all the same."""
        async with self._open_in_time() as store:
            [base] = await register_stack(store, make_layer("base"))

            async def register(built: BuiltLayer) -> None:
                store.release(await store.register(LayerStream(built), base.chain_id))

            async def look(built: BuiltLayer) -> None:
                await self._check_absent(
                    store, make_layer("base"), built, when="after cancellation"
                )

            await cancel_at_each_step(register, look)
            store.release(base)

    async def test_cancelled_while_the_stream_waits(self) -> None:
        """Cancellation stops a wait at once, and the next call starts anew."""
        async with self._open_in_time() as store:
            built = make_layer("a", size=100_000)
            for stop in (0, 5, 50_000, len(blob_of(built))):
                stream = LayerStream(built, stop=stop)
                register = partial(store.register, stream, None, built.descriptor)
                await cancel_when(stream.stopped, register)
                await self._check_absent(store, built, when="after cancellation")
            await check_can_register(store, built)

    async def test_methods_are_checkpoints(self) -> None:
        """All methods are checkpoints, even if there is nothing to do."""
        async with self._open_in_time() as store:
            built = make_layer("a")
            held: list[Layer] = []
            for _ in range(2):
                with trio.testing.assert_checkpoints():
                    layer = await store.register(LayerStream(built), None, built.descriptor)
                with trio.testing.assert_checkpoints():
                    again = await store.get(layer.chain_id)
                assert again is not None
                with trio.testing.assert_checkpoints():
                    await store.get(chain_id_of(make_layer("none")))
                with trio.testing.assert_checkpoints():
                    stream = await layer.tar_stream()
                await stream.aclose()
                store.release(again)
                held.append(layer)
            for layer in held:
                store.release(layer)

    # References.

    async def test_references_keep_a_layer(self) -> None:
        """Each `get` and `register` adds a reference, and each `release` removes one."""
        async with self._open_in_time() as store:
            built = make_layer("a")
            held = [
                await store.register(LayerStream(built), None),
                await store.register(LayerStream(built), None),
                await store.get(chain_id_of(built)),
            ]
            while held:
                await self.collect(store)
                check(
                    await self._is_there(store, chain_id_of(built)),
                    f"a layer with {len(held)} references is gone",
                )
                layer = held.pop(0)
                assert layer is not None, "a layer that is registered is not found"
                await check_readable(layer, built)
                store.release(layer)
            await self.collect(store)
            await check_can_register(store, built)

    async def test_references_keep_lower_layers(self) -> None:
        """A reference to the top layer, also one from `get`, keeps all layers below."""
        async with self._open_in_time() as store:
            stack = [make_layer(name) for name in ("a", "b", "c")]
            *below, top = await register_stack(store, *stack)
            for layer in below:
                store.release(layer)
            await self.collect(store)
            again = await store.get(top.chain_id)
            store.release(top)
            await self.collect(store)
            assert again is not None, "a layer with a reference is gone"
            check_stack(again, *stack)
            this: Layer | None = again
            for built in reversed(stack):
                assert this is not None
                await check_readable(this, built)
                this = this.parent
            for number in (1, 2, 3):
                there = await self._is_there(store, chain_id_of(*stack[:number]))
                check(there, "a layer is gone that is below one with a reference")
            store.release(again)

    async def test_a_failure_takes_no_reference(self) -> None:
        """A failed call neither adds nor removes a reference to the parent."""
        async with self._open_in_time() as store:
            base, built = make_layer("base"), make_layer("a", size=100_000)
            [layer] = await register_stack(store, base)
            for _ in range(3):
                with ExpectError(StreamError):
                    await store.register(
                        LayerStream(built, stop=50_000, error=StreamError()), layer.chain_id
                    )
            await self.collect(store)
            check(await self._is_there(store, layer.chain_id), "a failure dropped the parent")
            top = await store.register(LayerStream(built), layer.chain_id)
            store.release(layer)
            await self.collect(store)
            check_stack(top, base, built)
            check(await self._is_there(store, top.chain_id), "a layer with a reference is gone")
            store.release(top)

    # The data of layers.

    async def test_the_data_can_be_registered_again(self) -> None:
        """`register` takes the stream of `Layer.tar_stream`, upon any parent."""
        async with self._open_in_time() as store:
            base = await store.register(LayerStream(make_layer("base")), None)
            for compression in get_args(Compression):
                built = make_layer(f"in {compression}", size=100_000, compression=compression)
                layer = await store.register(LayerStream(built), None, built.descriptor)
                async with await layer.tar_stream() as stream:
                    copy = await store.register(stream, base.chain_id)
                check_stack(copy, make_layer("base"), built)
                store.release(layer)
                store.release(copy)
            store.release(base)

    async def test_simultaneous_readers(self) -> None:
        """Each stream is independent, and may be closed early."""
        async with self._open_in_time() as store:
            built = make_layer("a", size=100_000)
            [layer] = await register_stack(store, built)
            async with await layer.tar_stream() as early:
                await early.receive_some(10)
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(check_readable, layer, built)
            store.release(layer)

    # Concurrency.

    async def test_simultaneous_registrations_of_one_layer(self) -> None:
        """All callers get the same layer, and each gets a reference."""
        async with self._open_in_time() as store:
            base, built = make_layer("base"), make_layer("a", size=100_000)
            layers: list[Layer] = []

            async def register() -> None:
                [below] = await register_stack(store, base)
                stream = LayerStream(built, piece=10_000)
                layers.append(await store.register(stream, below.chain_id, built.descriptor))
                store.release(below)

            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(register)
            while layers:
                await self.collect(store)
                check_stack(layers[0], base, built)
                there = await self._is_there(store, layers[0].chain_id)
                check(there, f"a layer with {len(layers)} references is gone")
                store.release(layers.pop())

    async def test_simultaneous_registrations_of_many_layers(self) -> None:
        """Any number of tasks may use a store at once."""
        async with self._open_in_time() as store:
            base = make_layer("base")

            async def use(number: int) -> None:
                built = make_layer(str(number))
                below, layer = await register_stack(store, base, built)
                store.release(below)
                found = await store.get(layer.chain_id)
                assert found is not None, "a layer with a reference is gone"
                store.release(layer)
                await self.collect(store)
                await check_readable(found, built)
                check_stack(found, base, built)
                store.release(found)

            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(use, number)

    async def test_a_cancelled_registration_affects_no_other(self) -> None:
        """If a cancelled call did work for others, one of the others does it."""
        async with self._open_in_time() as store:
            built = make_layer("a", size=100_000)
            stuck = LayerStream(built, stop=50_000)

            async def register() -> None:
                layer = await store.register(LayerStream(built), None, built.descriptor)
                check_stack(layer, built)
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
            await check_can_register(store, built)
