"""Layers, streams, calls and checks for the suites that test layer stores."""

from __future__ import annotations

import gzip
import hashlib
import io
from collections.abc import Awaitable, Callable
from functools import lru_cache
from types import TracebackType
from typing import Self, final

import trio
import trio.testing

from .._digest import ChainID, digest_of, extend_chain
from .._memory import MemoryStore
from ..abc import Layer, LayerStore, Stage, StagingStore
from ._layers import BuiltLayer, Directory, File, build_layer
from ._tar import Compression

__all__ = [
    "ExpectError",
    "LayerStream",
    "StreamError",
    "blob_of",
    "cancel_at_each_step",
    "cancel_when",
    "chain_id_of",
    "check",
    "check_can_register",
    "check_equal",
    "check_readable",
    "check_stack",
    "check_stage",
    "fill_stage",
    "finish_stage",
    "gzip_with_name",
    "ignore",
    "make_layer",
    "register_stack",
    "stage_layer",
]


# Layers and streams for the tests.


@lru_cache(maxsize=64)
def make_layer(name: str, *, size: int = 100, compression: Compression = "gzip") -> BuiltLayer:
    """Make a unique layer, whose blob has at least ``size`` bytes."""
    noise = hashlib.shake_128(name.encode()).digest(size)
    return build_layer([Directory(""), File(name, data=noise)], compression=compression)


def blob_of(built: BuiltLayer) -> bytes:
    assert isinstance(built.content, bytes)
    return built.content


def gzip_with_name(built: BuiltLayer) -> bytes:
    """Return the layer's tar with a gzip header of more than ten bytes."""
    out = io.BytesIO()
    with gzip.GzipFile("a-name-in-the-header", "wb", fileobj=out, mtime=0) as file:
        file.write(gzip.decompress(blob_of(built)))
    return out.getvalue()


def chain_id_of(*layers: BuiltLayer) -> ChainID:
    chain: ChainID | None = None
    for layer in layers:
        chain = extend_chain(chain, layer.diff_id)
    assert chain is not None
    return chain


@final
class StreamError(Exception):
    """An error that only streams and blocks of the suite raise."""


@final
class LayerStream(trio.abc.ReceiveStream):
    """A layer's bytes in pieces.

    At the offset ``stop``, it raises ``error``; without an error, it sets `stopped` and waits for
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
        self._data = built if isinstance(built, bytes) else blob_of(built)
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


def ignore(position: int) -> None:
    pass


# Calls of stores.


async def register_stack(store: LayerStore, *stack: BuiltLayer) -> list[Layer]:
    """Register a stack, bottom first, with a reference to each layer."""
    layers: list[Layer] = []
    for built in stack:
        below = layers[-1].chain_id if layers else None
        layers.append(await store.register(LayerStream(built), below, built.descriptor))
    return layers


async def check_can_register(store: LayerStore, *stack: BuiltLayer) -> None:
    """Check that the store can register a stack, after a failure."""
    layers = await register_stack(store, *stack)
    check_stack(layers[-1], *stack)
    for layer in layers:
        store.release(layer)


async def fill_stage(stage: Stage, built: BuiltLayer, told: Callable[[int], None] = ignore) -> None:
    """Write the missing bytes and finish the stage."""
    data = blob_of(built)
    if not stage.complete:
        for start in range(stage.offset, len(data), 1_000_000):
            await stage.write(data[start : start + 1_000_000])
    await stage.finish(told)


async def finish_stage(
    stage: Stage,
    built: BuiltLayer,
    parent: ChainID | None = None,
    told: Callable[[int], None] = ignore,
) -> Layer:
    await fill_stage(stage, built, told)
    return await stage.commit(parent)


async def stage_layer(
    store: StagingStore,
    built: BuiltLayer,
    parent: ChainID | None = None,
    told: Callable[[int], None] = ignore,
) -> Layer:
    """Stage a layer as the engine does, and release it if the stage fails."""
    layer: Layer | None = None
    try:
        async with store.stage(built.descriptor) as stage:
            layer = await finish_stage(stage, built, parent, told)
    except BaseException:
        if layer is not None:
            store.release(layer)
        raise
    return layer


async def cancel_when(event: trio.Event, do: Callable[[], Awaitable[Layer]]) -> None:
    """Cancel a call when ``event`` has happened, and check that it stopped."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                await event.wait()
                scope.cancel()

            nursery.start_soon(cancel)
            await do()
            nursery.cancel_scope.cancel()
    check(scope.cancelled_caught, "a call that was cancelled while it waited went on")


async def cancel_at_each_step(
    do: Callable[[BuiltLayer], Awaitable[None]], look: Callable[[BuiltLayer], Awaitable[None]]
) -> None:
    """Call ``do`` with new layers, cancel each call a bit later, until one ends.

    ``look`` is called with the layer of each cancelled call.
    """
    step = 0
    while True:
        # All steps of a short call, and some steps of a long one.
        step += 1 + step // 20
        built = make_layer(f"step {step}")
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
    """Cancels its scope when tasks have made a number of steps."""

    def __init__(self, step: int) -> None:
        self.scope = trio.CancelScope()
        self._left = step

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if self._left == 0:
            self.scope.cancel()


# Checks.


def check(condition: bool, otherwise: str) -> None:
    # An assert statement would say nothing with -O, or without pytest's rewriting.
    if not condition:
        raise AssertionError(otherwise)


def check_equal(found: object, expected: object, what: str) -> None:
    check(found == expected, f"{what} should be {expected!r}, but is {found!r}")


def check_stack(layer: Layer, *stack: BuiltLayer) -> None:
    """Check IDs and parents of the top layer of a stack."""
    found: Layer | None = layer
    for number in range(len(stack), 0, -1):
        assert found is not None, f"a layer on {number} others has too few parents"
        check_equal(found.diff_id, stack[number - 1].diff_id, "the diff ID of a layer")
        check_equal(found.chain_id, chain_id_of(*stack[:number]), "the chain ID of a layer")
        found = found.parent
    check(found is None, "the bottom layer has a parent")


async def check_readable(layer: Layer, built: BuiltLayer) -> None:
    """Check that a store can register the layer's data, in any compression."""
    store = MemoryStore()
    async with await layer.tar_stream() as stream:
        read = await store.register(stream, None)
    check_equal(read.diff_id, built.diff_id, "the diff ID of a layer's data")


def check_stage(stage: Stage, data: bytes, *, complete: bool | None = False) -> None:
    """Check the bytes of a stage, and whether it is complete (``None``: either)."""
    check_equal(stage.offset, len(data), "the offset of a stage")
    check_equal(stage.digest, digest_of(data), "the digest of a stage")
    if complete is not None:
        check_equal(stage.complete, complete, "whether a stage is complete")


@final
class ExpectError:
    """Expects an error of a type from the block, without a group."""

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
            expected = f"if {self._when}, {self._kind.__name__} has to be raised"
            raise AssertionError(f"{expected}, and {found}") from error
        self.error = error
        return True
