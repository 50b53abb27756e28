"""The layer objects of an open store, and the references to them."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, final
from weakref import WeakValueDictionary

import attrs
import trio

from .._catalog.rows import StoredLayer, StoredTree, find_layer, find_tree
from .._damage import any_noted, is_noted
from .._digest import ChainID, DiffID, Digest
from .._errors import StoreError
from .._manifest import Descriptor
from .._rootfs.merged import MergedTree, SurveyCache, TreeStack
from .._util import construct, made_by
from ..abc import Layer
from .content import BlobStream, Content
from .parts import StoreParts
from .trees import Base, Trees

__all__ = ["DirectoryLayer", "Layers", "missing_layer_error", "read_tar_size"]

# Number of layer objects to make between two checkpoints: a millisecond or two of work.
_STRIDE: Final = 256


@made_by("DirectoryStore.get")
@final
@attrs.frozen(eq=False)
class DirectoryLayer:
    """A layer of a `DirectoryStore`.

    Attributes:
        diff_id: The digest of its tar.
        chain_id: Identifies the layer together with all layers below it.
        parent: The layer below; ``None`` for the bottom layer.
        blob: The digest of the blob it was unpacked from, which is in the store.
        tree: The directory of its tree: files in ``fs``, the list of entries in ``entries``.
    """

    diff_id: DiffID
    chain_id: ChainID
    parent: DirectoryLayer | None = attrs.field(repr=False)
    blob: Digest
    tree: Path
    _content: Content = attrs.field(repr=False)
    _stack: TreeStack = attrs.field(repr=False)

    async def tar_stream(self) -> BlobStream:
        """Open a stream of the layer's blob, compressed as it was downloaded.

        Cancellation: nothing is open.

        Raises:
            StoreError: if the blob was removed.
            StoreClosed: if the store's block was left.
        """
        return await self._content.open(self.blob)


def missing_layer_error(chain_id: ChainID) -> StoreError:
    """Return the error for a layer that the store lacks."""
    return StoreError(f"layer {chain_id} is not in the store: pull an image that has it")


@final
class Layers:
    """The layer objects of an open store, and the references to them."""

    def __init__(self, parts: StoreParts, content: Content, trees: Trees) -> None:
        self._catalog = parts.catalog
        self._leases = parts.leases
        self._content = content
        self._trees = trees
        # One object for each layer, as long as anything refers to it.
        self._objects = WeakValueDictionary[ChainID, DirectoryLayer]()
        self._references: dict[ChainID, int] = {}
        # Layers that looked damaged at their last lookup.
        self._damaged: set[ChainID] = set()
        self._surveys = SurveyCache()

    @property
    def in_use(self) -> int:
        """Number of layers with references."""
        return len(self._references)

    @property
    def references(self) -> int:
        """Number of references that are not released."""
        return sum(self._references.values())

    async def get(self, chain_id: ChainID) -> DirectoryLayer | None:
        """Find an undamaged layer, and take a reference to it."""
        # The hold comes before the lookup, so that the found layer stays.
        await self._leases.hold([chain_id])
        try:
            layer = await self.find(chain_id)
        except BaseException:
            self._leases.let_go([chain_id])
            raise
        if layer is None or chain_id in self._damaged:
            # A damaged layer counts as missing, so that the caller downloads it again.
            self._leases.let_go([chain_id])
            return None
        return self._refer(layer)

    async def find(self, chain_id: ChainID) -> DirectoryLayer | None:
        """Find a layer, without a reference."""
        layer = self._find_sure(chain_id)
        if layer is not None:
            await trio.lowlevel.checkpoint()
            return layer
        rows, layer = await self._catalog.read(self._find_rows, chain_id)
        if not rows:
            return None
        for number, (row, tree) in enumerate(reversed(rows), 1):
            layer = self._object_of(row, tree, layer)
            if number % _STRIDE == 0:
                await trio.lowlevel.checkpoint()
        return layer

    async def register(
        self,
        stream: trio.abc.ReceiveStream,
        parent: ChainID | None,
        descriptor: Descriptor | None,
    ) -> DirectoryLayer:
        """Unpack a stream on top of ``parent``; see `DirectoryStore.register`."""
        async with self._base(parent) as (base, below):
            row = await self._trees.register(stream, base, descriptor)
            return self._refer_new(row, below)

    async def put(
        self, parent: ChainID | None, tree: StoredTree | None, blob: Digest
    ) -> DirectoryLayer:
        """Put a layer on ``parent``; see `Trees.put_on`."""
        async with self._base(parent) as (base, below):
            row = await self._trees.put_on(base, tree, blob)
            return self._refer_new(row, below)

    def release(self, layer: Layer) -> None:
        """Give back one reference."""
        references = self._references.pop(layer.chain_id)
        if references > 1:
            self._references[layer.chain_id] = references - 1
        self._leases.let_go([layer.chain_id])

    def merged(self, layer: DirectoryLayer | None) -> MergedTree:
        """Return the trees of a layer and all layers below it, merged; ``None``: no layers."""
        return MergedTree(
            None if layer is None else layer._stack,
            check_cancelled=trio.from_thread.check_cancelled,
            surveys=self._surveys,
        )

    def is_stack_whole(self, connection: sqlite3.Connection, chain_id: ChainID | None) -> bool:
        """Return whether a layer and those below it pass a quick check (a catalog job)."""
        while chain_id is not None:
            row = find_layer(connection, chain_id)
            if row is None or not self._is_row_whole(connection, row):
                return False
            chain_id = row.parent
        return True

    @asynccontextmanager
    async def _base(
        self, parent: ChainID | None
    ) -> AsyncIterator[tuple[Base, DirectoryLayer | None]]:
        """Yield the base for a new layer and its parent, with a reference for the block."""
        below = None
        if parent is not None:
            below = await self.get(parent)
            if below is None:
                raise StoreError(
                    f"the parent layer {parent} is not in the store: register it first"
                )
        try:
            yield Base(parent, self.merged(below)), below
        finally:
            if below is not None:
                self.release(below)

    def _find_rows(
        self, connection: sqlite3.Connection, chain_id: ChainID
    ) -> tuple[list[tuple[StoredLayer, Path]], DirectoryLayer | None]:
        """Read the rows and trees of a layer and its parents, top first.

        The walk stops at the first parent with a live layer object, and returns this object, too:
        otherwise each lookup of a layer would read all its parents again.
        """
        rows: list[tuple[StoredLayer, Path]] = []
        below: DirectoryLayer | None = None
        above: ChainID | None = chain_id
        while above is not None and below is None:
            row = find_layer(connection, above)
            if row is None:
                break
            rows.append((row, self._trees.path(row.tree)))
            self._leases.note_found(row.chain_id)
            if self._is_row_whole(connection, row):
                self._damaged.discard(row.chain_id)
            else:
                self._damaged.add(row.chain_id)
            above = row.parent
            if above is not None:
                below = self._find_sure(above)
        return rows, below

    def _is_row_whole(self, connection: sqlite3.Connection, row: StoredLayer) -> bool:
        return self._content.has_whole(connection, row.blob) and self._trees.is_whole(row)

    def _find_sure(self, chain_id: ChainID) -> DirectoryLayer | None:
        """Return the object of a layer that certainly was not removed since its lookup."""
        layer = self._objects.get(chain_id) if self._leases.is_sure(chain_id) else None
        if layer is None or chain_id in self._damaged:
            return None
        if any_noted() and (is_noted(layer.tree) or is_noted(self._content.path(layer.blob))):
            return None
        return layer

    def _object_of(
        self, row: StoredLayer, tree: Path, parent: DirectoryLayer | None
    ) -> DirectoryLayer:
        """Return the one object of a layer; a new one if the layer came back changed."""
        known = self._objects.get(row.chain_id)
        if known is not None and (known.blob, known.tree, known.parent) == (row.blob, tree, parent):
            return known
        stack = TreeStack(tree, None if parent is None else parent._stack)
        layer = construct(
            DirectoryLayer, row.diff_id, row.chain_id, parent, row.blob, tree, self._content, stack
        )
        self._objects[row.chain_id] = layer
        return layer

    def _refer_new(self, row: StoredLayer, below: DirectoryLayer | None) -> DirectoryLayer:
        """Take a reference to a new layer, which is held already."""
        self._leases.note_found(row.chain_id)
        self._damaged.discard(row.chain_id)
        return self._refer(self._object_of(row, self._trees.path(row.tree), below))

    def _refer(self, layer: DirectoryLayer) -> DirectoryLayer:
        self._references[layer.chain_id] = self._references.get(layer.chain_id, 0) + 1
        return layer


def read_tar_size(connection: sqlite3.Connection, chain_id: ChainID) -> int:
    """Return the size of a layer's tar in bytes (a catalog job)."""
    layer = find_layer(connection, chain_id)
    tree = None if layer is None else find_tree(connection, layer.tree)
    if tree is None:
        raise missing_layer_error(chain_id)
    return tree.size
