"""Tests of any staging store."""

from __future__ import annotations

from typing import ClassVar, TypeVar, get_args

import trio
import trio.testing

from .._digest import ChainID, digest_of
from .._errors import DecompressionError
from .._manifest import Descriptor
from ..abc import Layer, StagingStore
from ._layer_suite import StoreSuite
from ._layers import BuiltLayer, build_layer
from ._suite_tools import (
    ExpectError,
    LayerStream,
    StreamError,
    blob_of,
    cancel_at_each_step,
    chain_id_of,
    check,
    check_equal,
    check_readable,
    check_stack,
    check_stage,
    fill_stage,
    finish_stage,
    ignore,
    make_layer,
    stage_layer,
)
from ._tar import Compression

__all__ = ["StagingStoreSuite"]

StagingStoreT = TypeVar("StagingStoreT", bound=StagingStore)


class StagingStoreSuite(StoreSuite[StagingStoreT]):
    """Tests of a `~trio_layers.abc.StagingStore`, including `StoreSuite`.

    Attributes:
        keeps_blobs: Whether the store keeps a layer's blob, so that staging the layer again needs
            no download.
        many: The number of stages that must be able to wait for their parents at once.
    """

    keeps_blobs: ClassVar[bool] = False
    many: ClassVar[int] = 1000

    # From the first byte to the layer.

    async def test_stage_a_layer(self) -> None:
        """A stage counts and hashes the bytes, and makes a layer of them."""
        async with self._open_in_time() as store:
            built = make_layer("a", size=3_000_000)
            data = blob_of(built)
            async with store.stage(built.descriptor) as stage:
                check_stage(stage, b"")
                for start in range(0, len(data), 700_000):
                    await stage.write(data[start : start + 700_000])
                    check_stage(stage, data[: start + 700_000])
                await stage.finish(ignore)
                check(stage.complete, "a finished stage is not complete")
                layer = await stage.commit(None)
                check_stack(layer, built)
            await self.collect(store)
            check(await self._is_there(store, layer.chain_id), "a staged layer is not there")
            await check_readable(layer, built)
            store.release(layer)

    async def test_stage_each_compression(self) -> None:
        """A stage takes the same compressions as `register`."""
        async with self._open_in_time() as store:
            for compression in get_args(Compression):
                for built in (
                    make_layer(f"in {compression}", size=100_000, compression=compression),
                    build_layer([], compression=compression),
                ):
                    layer = await stage_layer(store, built)
                    check_stack(layer, built)
                    store.release(layer)

    async def test_stage_upon_a_parent(self) -> None:
        """A parent may come after all bytes; a missing parent is an error."""
        async with self._open_in_time() as store:
            base, built = make_layer("base"), make_layer("a")
            async with store.stage(built.descriptor) as stage:
                await fill_stage(stage, built)
                below = await stage_layer(store, base)
                layer = await stage.commit(below.chain_id)
            store.release(below)
            check_stack(layer, base, built)
            other = make_layer("other")
            with ExpectError(Exception, when="there is no such parent"):
                store.release(await stage_layer(store, other, chain_id_of(other)))
            await self._check_absent(store, other, other, when="without its parent")
            store.release(layer)

    async def test_staged_layers_are_held(self) -> None:
        """`Stage.commit` adds a reference, as `register` does."""
        async with self._open_in_time() as store:
            base, built = make_layer("base"), make_layer("a")
            below = await stage_layer(store, base)
            layers = [await stage_layer(store, built, below.chain_id)]
            layers.append(await store.register(LayerStream(built), below.chain_id))
            store.release(below)
            while layers:
                await self.collect(store)
                check_stack(layers[0], base, built)
                there = await self._is_there(store, layers[0].chain_id)
                check(there, f"a staged layer with {len(layers)} references is gone")
                store.release(layers.pop(0))

    async def test_progress_of_a_stage(self) -> None:
        """Progress never falls, and ends with the blob's size before the commit ends."""
        async with self._open_in_time() as store:
            built = make_layer("a", size=3_000_000)
            told: list[int] = []
            layer = await stage_layer(store, built, told=told.append)
            size = built.descriptor.size
            check_equal(told[-1:], [size], "the progress of a stage in the end")
            check(told == sorted(told), f"the progress of a stage falls: {told}")
            check(told[0] > 0 and told[-1] <= size, f"the progress of a stage is off: {told}")
            store.release(layer)

    async def test_stage_a_stored_blob_again(self) -> None:
        """A stage of a stored blob is complete, and makes the same layer."""
        async with self._open_in_time() as store:
            built = make_layer("a")
            layer = await stage_layer(store, built)
            async with store.stage(built.descriptor) as stage:
                if self.keeps_blobs:
                    check(stage.complete, "a blob that is there is not complete when staged")
                    check_stage(stage, blob_of(built), complete=True)
                again = await finish_stage(stage, built)
            check_equal(
                again.chain_id, layer.chain_id, "the chain ID of a layer that was staged before"
            )
            store.release(layer)
            store.release(again)

    # Attempts.

    async def test_attempts_are_never_mixed(self) -> None:
        """After a restart, earlier bytes do not count."""
        async with self._open_in_time() as store:
            built, other = make_layer("a", size=3_000_000), make_layer("other", size=3_000_000)
            async with store.stage(built.descriptor) as stage:
                for data in (blob_of(other)[:2_000_000], blob_of(built)[:1_000_000], b"x", b""):
                    await stage.write(data)
                    await stage.restart()
                    check_stage(stage, b"")
                layer = await finish_stage(stage, built)
            check_stack(layer, built)
            await check_readable(layer, built)
            store.release(layer)

    async def test_received_bytes_are_resumed(self) -> None:
        """Without a commit, a stage leaves only its bytes, for the next stage."""
        async with self._open_in_time() as store:
            built = make_layer("a", size=3_000_000)
            data = blob_of(built)
            for start, end in ((0, 1_500_000), (1_500_000, 1_500_001), (1_500_001, 2_999_999)):
                async with store.stage(built.descriptor) as stage:
                    check_stage(stage, data[:start])
                    await stage.write(data[start:end])
                await self._check_absent(store, built, when="left without a commit")
            async with store.stage(built.descriptor) as stage:
                check_stage(stage, data[:2_999_999])
                layer = await finish_stage(stage, built)
            check_stack(layer, built)
            store.release(layer)

    async def test_a_complete_blob_is_resumed(self) -> None:
        """A complete blob without a commit is there for the next stage."""
        async with self._open_in_time() as store:
            built = make_layer("a", size=100_000)
            async with store.stage(built.descriptor) as stage:
                await fill_stage(stage, built)
            await self._check_absent(store, built, when="left without a commit")
            async with store.stage(built.descriptor) as stage:
                check_stage(stage, blob_of(built), complete=None)
                layer = await finish_stage(stage, built)
            check_stack(layer, built)
            store.release(layer)

    async def test_wrong_bytes_of_an_earlier_stage(self) -> None:
        """The digest shows the next stage that the bytes left over are wrong."""
        async with self._open_in_time() as store:
            built, other = make_layer("a", size=100_000), make_layer("other", size=100_000)
            wrong = blob_of(other)[:50_000]
            async with store.stage(built.descriptor) as stage:
                await stage.write(wrong)
            async with store.stage(built.descriptor) as stage:
                check_stage(stage, wrong)
                await stage.restart()
                layer = await finish_stage(stage, built)
            check_stack(layer, built)
            store.release(layer)

    # Failures.

    async def test_damage_in_a_verified_blob(self) -> None:
        """`Stage.wait_failed` and `Stage.commit` report the same, and nothing is stored."""
        async with self._open_in_time() as store:
            good = blob_of(make_layer("a", size=100_000))
            no_gzip = b"\x1f\x8b\x08\x00" + b"\xff" * 2
            for data, kind in ((good[:50_000], Exception), (no_gzip, DecompressionError)):
                descriptor = Descriptor("application/octet-stream", digest_of(data), len(data))
                async with store.stage(descriptor) as stage:
                    await stage.write(data)
                    await stage.finish(ignore)
                    failed = await stage.wait_failed()
                    with ExpectError(kind, when="the staged blob is damaged") as raised:
                        await stage.commit(None)
                    check_equal(
                        type(failed), type(raised.error), "the type of error from wait_failed"
                    )
            await self._check_absent(
                store, make_layer("a", size=100_000), when="though it is damaged"
            )

    async def test_damage_in_dropped_bytes(self) -> None:
        """Damage in bytes before a restart does not fail the stage."""
        async with self._open_in_time() as store:
            built = make_layer("a", size=3_000_000)
            failures: list[Exception] = []
            async with store.stage(built.descriptor) as stage, trio.open_nursery() as nursery:

                async def watch() -> None:
                    failures.append(await stage.wait_failed())

                nursery.start_soon(watch)
                for wrong in (b"\x1f\x8b\x08\x00" + b"\xff" * 2_000_000, b"\x1f\x8b\x08", b"BZh"):
                    await stage.write(wrong)
                    await trio.testing.wait_all_tasks_blocked()
                    await stage.restart()
                layer = await finish_stage(stage, built)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            check_equal(failures, [], "the failures of a stage that was started over")
            check_stack(layer, built)
            store.release(layer)

    async def test_bytes_of_another_blob(self) -> None:
        """If the store verifies, wrong bytes fail the attempt, and another one can follow."""
        async with self._open_in_time() as store:
            built, other = make_layer("a", size=100_000), make_layer("other", size=100_000)
            async with store.stage(built.descriptor) as stage:
                if self.verifies_descriptors:
                    await stage.write(blob_of(other))
                    with ExpectError(Exception, when="the bytes are not the blob"):
                        await stage.finish(ignore)
                    check(not stage.complete, "a stage with wrong bytes is complete")
                    if stage.offset:
                        await stage.restart()
                layer = await finish_stage(stage, built)
            check_stack(layer, built)
            store.release(layer)

    async def test_errors_of_the_block_are_unchanged(self) -> None:
        """An error of the block is raised unchanged at each step."""
        async with self._open_in_time() as store:
            built = make_layer("a", size=100_000)
            error = StreamError()
            for step in range(3):
                with ExpectError(StreamError) as raised:
                    async with store.stage(built.descriptor) as stage:
                        if step:
                            await stage.write(blob_of(built)[stage.offset : 40_000 * step])
                        if step == 2:
                            await fill_stage(stage, built)
                        raise error
                check(raised.error is error, "the block's error is raised as another object")
            await self._check_absent(store, built, when="after its block failed")
            store.release(await stage_layer(store, built))

    # Cancellation.

    async def test_stage_cancelled_at_each_step(self) -> None:
        """At each step, a cancelled stage stores no layer, or returns it all the same."""
        async with self._open_in_time() as store:
            base = await stage_layer(store, make_layer("base"))

            async def stage(built: BuiltLayer) -> None:
                layer = await stage_layer(store, built, base.chain_id)
                store.release(layer)

            async def look(built: BuiltLayer) -> None:
                await self._check_absent(
                    store, make_layer("base"), built, when="after cancellation"
                )
                layer = await stage_layer(store, built, base.chain_id)
                check_stack(layer, make_layer("base"), built)
                store.release(layer)

            await cancel_at_each_step(stage, look)
            store.release(base)

    async def test_waiting_for_a_failure_can_be_cancelled(self) -> None:
        """Cancelling `Stage.wait_failed` changes nothing."""
        async with self._open_in_time() as store:
            built = make_layer("a")
            async with store.stage(built.descriptor) as stage:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await stage.wait_failed()
                check(scope.cancelled_caught, "wait_failed returned without a failure")
                layer = await finish_stage(stage, built)
            store.release(layer)

    async def test_leaving_does_not_wait(self) -> None:
        """Leaving a stage does not wait for unpacking or for other stages."""
        async with self._open_in_time() as store:
            built = make_layer("a", size=3_000_000)

            async def be_stuck(whole: bool) -> None:
                async with store.stage(built.descriptor) as stage:
                    if whole:
                        await fill_stage(stage, built)
                    elif not stage.complete:
                        await stage.write(blob_of(built)[stage.offset : stage.offset + 1_500_000])
                    await trio.sleep_forever()

            for whole in (False, True):
                async with trio.open_nursery() as nursery:
                    for _ in range(5):
                        nursery.start_soon(be_stuck, whole)
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.cancel_scope.cancel()
                await self._check_absent(store, built, when="after an abort")
            store.release(await stage_layer(store, built))

    # Concurrency.

    async def test_two_stages_of_one_blob(self) -> None:
        """Whether one waits, or each has its own: both get the layer."""
        async with self._open_in_time() as store:
            built = make_layer("a", size=3_000_000)
            layers: list[Layer] = []

            async def stage() -> None:
                layers.append(await stage_layer(store, built))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(stage)
                nursery.start_soon(stage)
            for layer in layers:
                check_stack(layer, built)
                await self.collect(store)
                check(await self._is_there(store, layer.chain_id), "one of two releases dropped it")
                store.release(layer)

    async def test_staged_and_registered_at_once(self) -> None:
        """Staging and registering one layer at once give the same layer."""
        async with self._open_in_time() as store:
            built = make_layer("a", size=3_000_000)
            layers: list[Layer] = []

            async def stage() -> None:
                layers.append(await stage_layer(store, built))

            async def register() -> None:
                layers.append(await store.register(LayerStream(built), None, built.descriptor))

            async with trio.open_nursery() as nursery:
                for do in (stage, register, stage, register):
                    nursery.start_soon(do)
            for layer in layers:
                check_stack(layer, built)
                store.release(layer)

    async def test_a_waiting_stage_takes_over(self) -> None:
        """A waiting stage takes over from one that fails with a part of the blob."""
        async with self._open_in_time() as store:
            built = make_layer("a", size=3_000_000)
            layers: list[Layer] = []

            async def stage() -> None:
                layers.append(await stage_layer(store, built))

            async with trio.open_nursery() as nursery:
                with ExpectError(StreamError):
                    async with store.stage(built.descriptor) as stuck:
                        await stuck.write(blob_of(built)[:1_000_000])
                        nursery.start_soon(stage)
                        nursery.start_soon(stage)
                        await trio.testing.wait_all_tasks_blocked()
                        raise StreamError
            for layer in layers:
                check_stack(layer, built)
                store.release(layer)

    async def test_reports_to_a_waiting_stage(self) -> None:
        """A waiting stage gets reports up to the blob's size, and none after entering."""
        async with self._open_in_time() as store:
            built = make_layer("a", size=3_000_000)
            told: list[int] = []
            layers: list[Layer] = []

            async def wait() -> None:
                async with store.stage(built.descriptor, told.append) as stage:
                    count = len(told)
                    layers.append(await finish_stage(stage, built))
                    check_equal(len(told), count, "how often one is told who does not wait")

            async with trio.open_nursery() as nursery:
                async with store.stage(built.descriptor) as stage:
                    nursery.start_soon(wait)
                    await stage.write(blob_of(built)[:2_000_000] * 2)
                    await trio.testing.wait_all_tasks_blocked()
                    await stage.restart()
                    layers.append(await finish_stage(stage, built))
            size = built.descriptor.size
            check(
                all(0 <= count <= size for count in told),
                f"of a blob of {size} bytes, {told} are told to be there",
            )
            for layer in layers:
                check_stack(layer, built)
                store.release(layer)

    async def test_opposite_orders_do_not_deadlock(self) -> None:
        """Pulls of [a, b] and [b, a] do not deadlock.

        Each stages its upper layer first, and then waits for the other's.
        """
        async with self._open_in_time() as store:
            layers = [make_layer(f"{number}", size=10_000) for number in range(6)]

            async def pull(stack: list[BuiltLayer]) -> None:
                """Stage from the top; each stage stays open until the layer below is there."""
                *below, top = stack
                async with store.stage(top.descriptor) as stage:
                    if not stage.complete:
                        await fill_stage(stage, top)
                    else:
                        await stage.finish(ignore)
                    if below:
                        await pull(below)
                    parent = chain_id_of(*below) if below else None
                    done.append(await stage.commit(parent))

            done: list[Layer] = []
            async with trio.open_nursery() as nursery:
                for turn in range(len(layers)):
                    stack = layers[turn:] + layers[:turn]
                    nursery.start_soon(pull, stack)
                    nursery.start_soon(pull, stack[::-1])
            check_equal(len(done), 2 * len(layers) ** 2, "the layers of pulls that cross")
            for layer in done:
                store.release(layer)

    async def test_many_complete_stages_wait(self) -> None:
        """Complete stages that wait for their parents do not block other stages."""
        async with self._open_in_time() as store:
            base = make_layer("base")
            waiting: set[int] = set()
            all_wait, go_on = trio.Event(), trio.Event()
            chains: set[ChainID] = set()

            async def stage(number: int) -> None:
                built = make_layer(f"{number}", size=10)
                async with store.stage(built.descriptor) as stage:
                    await fill_stage(stage, built)
                    waiting.add(number)
                    if len(waiting) == self.many:
                        all_wait.set()
                    await go_on.wait()
                    layer = await stage.commit(chain_id_of(base))
                    chains.add(layer.chain_id)
                    store.release(layer)

            async with trio.open_nursery() as nursery:
                for number in range(self.many):
                    nursery.start_soon(stage, number)
                await all_wait.wait()
                below = await stage_layer(store, base)
                go_on.set()
            store.release(below)
            check_equal(len(chains), self.many, "the layers of stages that waited")
