"""The images of a store: references, and ``index.json`` for other tools."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Final, final

import trio

from .._catalog.rows import (
    StoredImage,
    drop_image,
    drop_references,
    find_blob,
    find_image,
    find_layer,
    put_image,
)
from .._digest import Digest
from .._errors import ManifestError, StoreError
from .._manifest import Descriptor, Manifest, decode_manifest
from .._platform import parse_platform
from .commits import Job
from .content import Content
from .layers import Layers
from .layout import write_index
from .parts import StoreParts

__all__ = ["DOCUMENT_LIMIT", "Images"]

DOCUMENT_LIMIT: Final = 4 * 1024 * 1024
"""The largest manifest, in bytes, that registries must accept (OCI distribution specification,
"Pushing Manifests")."""


@final
class Images:
    """The images of a store. `DirectoryStore` documents the methods of the same name."""

    def __init__(self, parts: StoreParts, content: Content, layers: Layers) -> None:
        self._parts = parts
        self._catalog = parts.catalog
        self._content = content
        self._layers = layers

    async def put_image(self, image: StoredImage, documents: Mapping[Digest, bytes]) -> None:
        """Point a reference to an image; write nothing if it points there already.

        Args:
            image: The image and its reference.
            documents: Its manifest, config and index, if the store may lack them.
        """
        if await self._catalog.read(self._is_put, image):
            return
        document = documents.get(image.manifest.digest)
        if document is None:
            document = await self._content.read(image.manifest.digest, limit=DOCUMENT_LIMIT)
        layers = await trio.to_thread.run_sync(_layer_blobs, document, image.manifest)
        blobs = [blob for blob in (image.manifest, image.config, image.index) if blob is not None]
        new = [(blob, documents[blob.digest]) for blob in blobs if blob.digest in documents]
        commits = self._parts.commits
        since = commits.failures
        async with self._content.written(new) as place:
            await commits.commit(partial(self._put_image, image, layers, place), since=since)

    async def put_images(self, images: Sequence[StoredImage]) -> None:
        """Point several references to their images in one transaction."""
        commits = self._parts.commits
        since = commits.failures
        layers: dict[Digest, list[Digest]] = {}
        for manifest in {image.manifest.digest: image.manifest for image in images}.values():
            document = await self._content.read(manifest.digest, limit=DOCUMENT_LIMIT)
            layers[manifest.digest] = await trio.to_thread.run_sync(
                _layer_blobs, document, manifest
            )
        await trio.to_thread.run_sync(_check_platforms, images)
        await commits.commit(partial(self._put_images, images, layers), since=since)

    async def looks_whole(self, image: StoredImage) -> bool:
        """Return whether an image is free of visible or known damage."""
        for blob in (image.manifest, image.config, image.index):
            if blob is None:
                continue
            if await self._content.find_document(blob.digest, limit=DOCUMENT_LIMIT) is None:
                return False
        return await self._catalog.read(self._layers.is_stack_whole, image.chain_id)

    async def remove(self, reference: str, platform: str | None) -> bool:
        """Delete a reference, and return whether it existed."""

        def remove(connection: sqlite3.Connection) -> bool:
            found = drop_references(connection, reference, platform) > 0
            self.write_index(connection)
            return found

        return await self._catalog.write(remove)

    async def remove_image(self, manifest: Digest) -> bool:
        """Delete an image with all its references, and return whether it existed."""

        def remove(connection: sqlite3.Connection) -> bool:
            found = drop_image(connection, manifest)
            self.write_index(connection)
            return found

        return await self._catalog.write(remove)

    def _is_put(self, connection: sqlite3.Connection, image: StoredImage) -> bool:
        """Return whether the reference points to this image, with undamaged documents."""
        documents = (image.manifest, image.config, image.index)
        return find_image(connection, image.reference, None) == image and all(
            self._content.has_whole(connection, each.digest) for each in documents if each
        )

    def _put_image(
        self,
        image: StoredImage,
        layers: list[Digest],
        place_documents: Job,
        connection: sqlite3.Connection,
    ) -> None:
        place_documents(connection)
        self._put_images([image], {image.manifest.digest: layers}, connection)

    def _put_images(
        self,
        images: Iterable[StoredImage],
        layers: Mapping[Digest, list[Digest]],
        connection: sqlite3.Connection,
    ) -> None:
        known: set[Digest] = set()
        put: set[Digest] = set()
        for image in images:
            for blob in (image.manifest, image.config, image.index):
                if blob is None or blob.digest in known:
                    continue
                if find_blob(connection, blob.digest) is None:
                    raise StoreError(
                        f"{image.reference} lacks the blob {blob.digest}: store it first"
                    )
                known.add(blob.digest)
            if image.chain_id is not None and image.chain_id not in known:
                if find_layer(connection, image.chain_id) is None:
                    raise StoreError(
                        f"{image.reference} lacks the layer {image.chain_id}: store it first"
                    )
                known.add(image.chain_id)
            is_new = image.manifest.digest not in put
            put_image(connection, image, layers[image.manifest.digest] if is_new else ())
            put.add(image.manifest.digest)
        self.write_index(connection)

    def write_index(self, connection: sqlite3.Connection) -> None:
        """Bring ``index.json`` up to date, inside the transaction that changes the images."""
        scratch = self._parts.scratch
        write_index(connection, self._parts.root, partial(scratch.new, "index"))


def _layer_blobs(document: bytes, descriptor: Descriptor) -> list[Digest]:
    manifest = decode_manifest(document, descriptor.media_type)
    if not isinstance(manifest, Manifest):
        raise ManifestError(f"{descriptor.digest} is an index: the manifest of an image is needed")
    return [layer.digest for layer in manifest.layers]


def _check_platforms(images: Iterable[StoredImage]) -> None:
    for platform in {image.platform for image in images}:
        if platform is not None:
            parse_platform(platform)
