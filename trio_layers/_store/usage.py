"""The disk space of a store and its images, which share most of it."""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import attrs

from .._catalog.rows import find_layer
from .._digest import ChainID, Digest
from .._disk_errors import disk_errors
from .._files import disk_usage, file_name

__all__ = ["ImageUsage", "StoreUsage", "find_parts", "measure"]

_BLOBS: Final = "blobs/sha256"
_TREES: Final = "trees/sha256"


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


def find_parts(connection: sqlite3.Connection) -> dict[Digest, set[str]]:
    """Return the files and trees of each image, below the store's directory (a catalog job)."""
    parts: dict[Digest, set[str]] = {}
    query = "SELECT manifest, config, chain_id FROM images"
    # Each layer's row is read once, however many images have the layer.
    stacks: dict[ChainID, tuple[ChainID | None, str, str]] = {}
    for manifest, config, chain in connection.execute(query).fetchall():
        own = parts[manifest] = {_blob(manifest), _blob(config)}
        above: ChainID | None = chain
        while above is not None:
            if above not in stacks:
                layer = find_layer(connection, above)
                assert layer is not None
                tree = f"{_TREES}/{file_name(layer.tree)}"
                stacks[above] = (layer.parent, tree, _blob(layer.blob))
            above, tree, blob = stacks[above]
            own.update((tree, blob))
    for query in (
        "SELECT manifest, digest FROM image_blobs",
        "SELECT manifest, index_digest FROM image_references WHERE index_digest IS NOT NULL",
    ):
        for manifest, digest in connection.execute(query):
            parts[manifest].add(_blob(digest))
    return parts


def _blob(digest: Digest) -> str:
    return f"{_BLOBS}/{file_name(digest)}"


def measure(
    root: Path, parts: Mapping[Digest, set[str]], *, check_cancelled: Callable[[], None]
) -> StoreUsage:
    """Measure a store by a look at every file; see `DirectoryStore.usage`. Blocking.

    Args:
        root: The store's directory.
        parts: The files and trees of each image.
        check_cancelled: Called for each file. Its exceptions are raised unchanged.
    """
    uses = Counter(path for own in parts.values() for path in own)
    with disk_errors(root):
        sizes = {path: disk_usage(root / path, check_cancelled) for path in uses}
        total = sum(sizes.values())
        # The rest belongs to no image, or is the store's own.
        for directory in (_BLOBS, _TREES):
            for name in os.listdir(root / directory):
                path = f"{directory}/{name}"
                if path not in sizes:
                    total += disk_usage(root / path, check_cancelled)
        for name in os.listdir(root):
            if name not in ("blobs", "trees"):
                total += disk_usage(root / name, check_cancelled)
    images = {
        manifest: ImageUsage(
            sum(sizes[path] for path in own),
            sum(sizes[path] for path in own if uses[path] == 1),
        )
        for manifest, own in parts.items()
    }
    return StoreUsage(total, images)
