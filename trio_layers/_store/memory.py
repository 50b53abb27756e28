"""A store in memory: for tests, and for things small enough."""

from __future__ import annotations

from typing import final

import attrs
import trio

from .._compression import Decompressor
from .._digest import ChainID, DiffID, digest_of, extend_chain
from .._errors import DecompressionError, StoreError, text_of
from .._manifest import Descriptor
from ..abc import Layer

__all__ = ["MemoryLayer", "MemoryStore", "MemoryStream"]

CHUNK = 64 * 1024


@final
class MemoryStream(trio.abc.ReceiveStream):
    """Bytes, as a stream."""

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
        chain_id: Names it together with what is below it.
        parent: What is below it.
        data: Its tar, decompressed.
        descriptor: That of the blob it came from, if that was known.
        references: How many `MemoryStore.get`, `MemoryStore.register` and layers on top of it
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
    """A `~trio_layers.abc.LayerStore` that keeps each layer as one `bytes` object.

    A layer whose last reference is released is dropped, and gives back the one it has to its
    parent.
    """

    def __init__(self) -> None:
        self._layers: dict[ChainID, MemoryLayer] = {}

    def __repr__(self) -> str:
        return f"<MemoryStore: {len(self._layers)} layers>"

    @property
    def layers(self) -> dict[ChainID, MemoryLayer]:
        """What is there, by chain ID (a copy)."""
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
        """Read and decompress the stream, and keep what it holds; see `LayerStore.register`.

        Raises:
            StoreError: if there is no layer ``parent``.
        """
        data = await decompressed(stream)
        return self.add(data, parent, descriptor)

    def add(
        self, data: bytes, parent: ChainID | None, descriptor: Descriptor | None = None
    ) -> MemoryLayer:
        """Keep a layer, given as its decompressed tar; returned with a reference."""
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


async def decompressed(stream: trio.abc.ReceiveStream) -> bytes:
    """All that a layer's stream holds, decompressed, as a store has to read it."""
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
