"""The disk space of a store and its images, which share most of it."""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import final

import attrs
import trio

from .._catalog.rows import find_layer
from .._digest import ChainID, Digest
from .._files import disk_errors, disk_usage
from .content import Content
from .parts import StoreParts
from .trees import Trees

__all__ = ["ImageUsage", "Meter", "StoreUsage"]


@attrs.frozen
class ImageUsage:
    """The disk space of an image, in bytes.

    Attributes:
        size: The space of all its documents, blobs and trees.
        exclusive: The space of those that no other image has. A `DirectoryStore.collect` frees
            this space once the image has been removed, if nothing holds parts of it.
    """

    size: int
    exclusive: int


@attrs.frozen
class StoreUsage:
    """The disk space of a store, in bytes.

    Attributes:
        size: The space of the whole store.
        images: The space of each image, by the digest of its manifest.
    """

    size: int
    images: Mapping[Digest, ImageUsage]


@final
class Meter:
    """Measures a store by a look at every file."""

    def __init__(self, parts: StoreParts, content: Content, trees: Trees) -> None:
        self._root = parts.root
        self._catalog = parts.catalog
        self._content = content
        self._trees = trees

    async def measure(self) -> StoreUsage:
        """See `DirectoryStore.usage`."""
        parts = await self._catalog.read(self._parts)
        return await trio.to_thread.run_sync(self._measure, parts)

    def _parts(self, connection: sqlite3.Connection) -> dict[Digest, set[Path]]:
        """Return the files and trees of each image (a catalog job)."""
        parts: dict[Digest, set[Path]] = {}
        query = "SELECT manifest, config, chain_id FROM images"
        # Each layer's row is read once, however many images have the layer.
        stacks: dict[ChainID, tuple[ChainID | None, Path, Path]] = {}
        for manifest, config, chain in connection.execute(query).fetchall():
            own = parts[manifest] = {self._content.path(manifest), self._content.path(config)}
            above: ChainID | None = chain
            while above is not None:
                if above not in stacks:
                    layer = find_layer(connection, above)
                    assert layer is not None
                    stacks[above] = (
                        layer.parent,
                        self._trees.path(layer.tree),
                        self._content.path(layer.blob),
                    )
                above, tree, blob = stacks[above]
                own.update((tree, blob))
        for query in (
            "SELECT manifest, digest FROM image_blobs",
            "SELECT manifest, index_digest FROM image_references WHERE index_digest IS NOT NULL",
        ):
            for manifest, digest in connection.execute(query):
                parts[manifest].add(self._content.path(digest))
        return parts

    def _measure(self, parts: dict[Digest, set[Path]]) -> StoreUsage:
        check = trio.from_thread.check_cancelled
        uses = Counter(path for own in parts.values() for path in own)
        with disk_errors(self._root):
            sizes = {path: disk_usage(path, check) for path in uses}
            total = sum(sizes.values())
            # The rest belongs to no image, or is the store's own.
            for directory in ("blobs/sha256", "trees/sha256"):
                for name in os.listdir(self._root / directory):
                    path = self._root / directory / name
                    if path not in sizes:
                        total += disk_usage(path, check)
            for name in os.listdir(self._root):
                if name not in ("blobs", "trees"):
                    total += disk_usage(self._root / name, check)
        images = {
            manifest: ImageUsage(
                sum(sizes[path] for path in own),
                sum(sizes[path] for path in own if uses[path] == 1),
            )
            for manifest, own in parts.items()
        }
        return StoreUsage(total, images)
