"""A store in memory, for tests and for small images."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import final

import attrs
import trio

from ._compression import Decompressor
from ._digest import ChainID, DiffID, Digest, digest_of, extend_chain
from ._errors import DecompressionError, StoreError, text_of
from ._manifest import Descriptor
from ._nursery import open_hidden_nursery
from ._util import construct, made_by
from .abc import Layer, ReportArrived, ReportUnpacked

__all__ = ["MemoryLayer", "MemoryStage", "MemoryStore", "MemoryStream"]

CHUNK = 64 * 1024


@final
class MemoryStream(trio.abc.ReceiveStream):
    """A stream over bytes.

    Cancellation: a read has taken nothing, and a close has closed the stream.
    """

    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)
        self._closed = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError
        size = CHUNK if max_bytes is None else max_bytes
        data, self._rest = self._rest[:size], self._rest[size:]
        return bytes(data)

    async def aclose(self) -> None:
        self._closed = True
        await trio.lowlevel.checkpoint()


@final
@attrs.define(eq=False)
class MemoryLayer:
    """A layer of a `MemoryStore`.

    Attributes:
        diff_id: The digest of ``data``.
        chain_id: Identifies the layer together with all layers below it.
        parent: The layer below; ``None`` for the bottom layer.
        data: Its uncompressed tar.
        descriptor: The descriptor of its blob, if it was known.
        references: Number of `MemoryStore.get`, `MemoryStore.register` and layers on top of it that
            are not released.
    """

    diff_id: DiffID
    chain_id: ChainID
    parent: MemoryLayer | None
    data: bytes = attrs.field(repr=False)
    descriptor: Descriptor | None = None
    references: int = 0

    async def tar_stream(self) -> MemoryStream:
        await trio.lowlevel.checkpoint()
        return MemoryStream(self.data)


@final
class MemoryStore:
    """A `~trio_layers.abc.StagingStore` that keeps each layer as one `bytes` object.

    A layer whose last reference is released is dropped, and releases its parent. The received bytes
    of a blob are kept until it has become a layer.
    """

    def __init__(self) -> None:
        self._layers: dict[ChainID, MemoryLayer] = {}
        self._arrived: dict[Digest, Arrived] = {}

    def __repr__(self) -> str:
        return f"<MemoryStore: {len(self._layers)} layers>"

    @property
    def layers(self) -> dict[ChainID, MemoryLayer]:
        """The layers by chain ID (a copy)."""
        return dict(self._layers)

    async def get(self, chain_id: ChainID) -> MemoryLayer | None:
        await trio.lowlevel.checkpoint()
        layer = self._layers.get(chain_id)
        if layer is not None:
            layer.references += 1
        return layer

    async def register(
        self,
        stream: trio.abc.ReceiveStream,
        parent: ChainID | None,
        descriptor: Descriptor | None = None,
    ) -> MemoryLayer:
        """Read and decompress the stream, and keep the layer; see `LayerStore.register`.

        Cancellation: nothing is kept.

        Raises:
            StoreError: if the store lacks the layer ``parent``.
        """
        data = await decompressed(stream)
        return self.add(data, parent, descriptor=descriptor)

    @asynccontextmanager
    async def stage(
        self, descriptor: Descriptor, waiting: ReportArrived | None = None
    ) -> AsyncIterator[MemoryStage]:
        """Receive a blob and decompress it meanwhile; see `StagingStore.stage`.

        The call does not wait: of two tasks that stage one blob at once, each has its own stage.
        """
        await trio.lowlevel.checkpoint()
        arrived = self._arrived.pop(descriptor.digest, None) or Arrived()
        async with open_hidden_nursery() as nursery:
            stage = construct(MemoryStage, self, descriptor, arrived, nursery)
            try:
                yield stage
            finally:
                nursery.cancel_scope.cancel()
                if not stage._committed:
                    self._keep(descriptor.digest, stage._run.arrived)

    def _keep(self, digest: Digest, arrived: Arrived) -> None:
        other = self._arrived.get(digest)
        if arrived.data and (other is None or len(other.data) < len(arrived.data)):
            self._arrived[digest] = arrived

    def add(
        self, data: bytes, parent: ChainID | None, *, descriptor: Descriptor | None = None
    ) -> MemoryLayer:
        """Keep a layer, given its decompressed tar, and return it with a reference."""
        below = None
        if parent is not None:
            below = self._layers.get(parent)
            if below is None:
                raise StoreError(f"there is no layer {parent} to put another on")
        diff_id = DiffID(digest_of(data))
        chain = extend_chain(parent, diff_id)
        layer = self._layers.get(chain)
        if layer is None:
            layer = MemoryLayer(diff_id, chain, below, data, descriptor)
            self._layers[chain] = layer
            if below is not None:
                below.references += 1
        layer.references += 1
        return layer

    def release(self, layer: Layer) -> None:
        this: MemoryLayer | None = self._layers[layer.chain_id]
        while this is not None:
            this.references -= 1
            if this.references:
                return
            del self._layers[this.chain_id]
            this = this.parent


@attrs.define(eq=False)
class Arrived:
    """The received bytes of a blob.

    Attributes:
        data: The bytes so far.
        complete: Whether all bytes are there.
        news: The followers that wait for more bytes.
    """

    data: bytearray = attrs.field(factory=bytearray, repr=False)
    complete: bool = False
    news: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, repr=False)


@attrs.define(eq=False)
class Run:
    """A worker of a stage.

    Attributes:
        arrived: The bytes that it decompresses.
        scope: Cancels it.
        position: Number of bytes that it has taken.
        plain: The decompressed layer, once it has ended.
        failure: Its error, if it has failed.
    """

    arrived: Arrived
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    position: int = 0
    plain: bytes | None = None
    failure: Exception | None = None


@made_by("MemoryStore.stage")
@final
class MemoryStage:
    """A blob on its way into a `MemoryStore`; see `~trio_layers.abc.Stage`.

    It comes from `MemoryStore.stage`. The worker is a task that decompresses the received bytes.
    """

    def __init__(
        self, store: MemoryStore, descriptor: Descriptor, arrived: Arrived, nursery: trio.Nursery
    ) -> None:
        self._store = store
        self._descriptor = descriptor
        self._nursery = nursery
        self._news = trio.lowlevel.ParkingLot()
        self._progress: ReportUnpacked | None = None
        self._committed = False
        self._run = self._start(arrived)

    def __repr__(self) -> str:
        state = "complete" if self.complete else f"{self.offset} bytes"
        return f"<MemoryStage {self._descriptor.digest}: {state}>"

    @property
    def offset(self) -> int:
        """Number of bytes received so far."""
        return len(self._run.arrived.data)

    @property
    def digest(self) -> Digest:
        """The digest of the bytes received so far."""
        return digest_of(bytes(self._run.arrived.data))

    @property
    def complete(self) -> bool:
        """Whether the whole blob has arrived."""
        return self._run.arrived.complete

    async def write(self, data: bytes) -> None:
        """Append some bytes. After a cancellation, none of them is appended."""
        await trio.lowlevel.checkpoint()
        self._run.arrived.data += data
        self._run.arrived.news.unpark_all()

    async def restart(self) -> None:
        """Drop all received bytes, and decompress again from the beginning."""
        await trio.lowlevel.checkpoint()
        # Until it notices, the old worker writes into an object that nothing reads any more.
        self._run.scope.cancel()
        self._run = self._start(Arrived())

    async def finish(self, progress: ReportUnpacked) -> None:
        """Declare the blob complete; see `Stage.finish`. A cancellation changes nothing."""
        await trio.lowlevel.checkpoint()
        run = self._run
        self._progress = progress
        if run.position:
            progress(run.position)
        run.arrived.complete = True
        run.arrived.news.unpark_all()
        self._news.unpark_all()

    async def wait_failed(self) -> Exception:
        """Wait for a failure of a complete blob; see `Stage.wait_failed`."""
        await trio.lowlevel.checkpoint()
        while self._run.failure is None or not self.complete:
            await self._news.park()
        return self._run.failure

    async def commit(self, parent: ChainID | None) -> MemoryLayer:
        """Wait for the worker, then keep the layer; see `Stage.commit`.

        Cancellation: nothing is kept.

        Raises:
            StoreError: if the store lacks the layer ``parent``.
        """
        await trio.lowlevel.checkpoint()
        run = self._run
        while run.plain is None:
            if run.failure is not None:
                raise run.failure
            await self._news.park()
        layer = self._store.add(run.plain, parent, descriptor=self._descriptor)
        self._committed = True
        return layer

    def _start(self, arrived: Arrived) -> Run:
        run = Run(arrived)
        self._nursery.start_soon(self._work, run)
        return run

    async def _work(self, run: Run) -> None:
        with run.scope:
            try:
                run.plain = await decompressed(Following(run, self._taken))
            except Exception as error:
                run.failure = error
            self._news.unpark_all()

    def _taken(self, run: Run) -> None:
        if self._progress is not None:
            self._progress(run.position)


@final
class Following(trio.abc.ReceiveStream):
    """A blob that is still arriving, as a stream that ends when it is complete."""

    def __init__(self, run: Run, taken: Callable[[Run], None]) -> None:
        self._run = run
        self._taken = taken

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        run, arrived = self._run, self._run.arrived
        while run.position == len(arrived.data) and not arrived.complete:
            await arrived.news.park()
        size = CHUNK if max_bytes is None else max_bytes
        data = bytes(arrived.data[run.position : run.position + size])
        run.position += len(data)
        self._taken(run)
        return data

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def decompressed(stream: trio.abc.ReceiveStream) -> bytes:
    """Return a layer's whole stream, decompressed."""
    decompressor = Decompressor()
    pieces: list[bytes] = []
    while True:
        try:
            data = await stream.receive_some(CHUNK)
        except Exception as error:
            if decompressor.opened:
                raise
            raise DecompressionError(text_of(error)) from error
        if not data:
            break
        for piece in decompressor.feed(bytes(data)):
            pieces.append(piece)
            await trio.lowlevel.checkpoint()
    pieces.extend(decompressor.finish())
    return b"".join(pieces)
