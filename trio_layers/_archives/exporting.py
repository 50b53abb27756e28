"""From images in the store to an archive or a layout."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, TypeAlias

import attrs
import trio

from .._catalog.rows import StoredImage
from .._digest import Digest, parse_digest
from .._errors import ExportError, StoreError
from .._image import choose_stored
from .._manifest import Manifest, decode_config, decode_manifest
from .._platform import Platform, parse_platform
from .._reference import Reference, parse_reference
from .._store.directory import DirectoryStore
from .._store.layers import DirectoryLayer
from .._store.layout import OCI_LAYOUT, index_document
from .documents import (
    DOCKER,
    INDEX,
    LAYOUT,
    DockerImage,
    blob_path,
    encode_docker,
)
from .writing import Blob, Entry, write_directory, write_file, write_tar

__all__ = ["ArchiveFormat", "export_images"]

ArchiveFormat: TypeAlias = Literal["oci-archive", "docker-archive", "oci"]
"""An OCI layout in a tar; what ``docker save`` writes; an OCI layout in a directory."""


async def export_images(
    store: DirectoryStore,
    references: str | Reference | Iterable[str | Reference],
    target: str | os.PathLike[str] | trio.abc.SendStream,
    *,
    format: ArchiveFormat = "oci-archive",
    platform: str | Platform | None = None,
) -> None:
    """Write images of the store to an archive, or as an OCI layout into a directory.

    The OCI forms have manifest, config and layers as they were pulled, so all digests stay; and
    the index that an image was chosen from, if there was one, for `import_images`, while other
    tools are shown the image alone. Images are found in them under their full names. An
    OCI archive has a ``manifest.json`` besides, as those of Docker 25 have, so that ``docker
    load`` takes it in any version. What was pulled in Docker's schema 2 stays that, too; skopeo
    finds no such image by its name in an OCI layout, but by that ``manifest.json`` it does.

    A docker-archive has the layers as plain tars, and no manifests. The config, and so the
    image's ID, stays.

    Equal images give equal bytes.

    Args:
        store: Where from.
        references: The images, by name or by the digest of their manifest or config
            (``sha256:…``). A digest exports its image under all names that it has in the store.
        target: Where to. A file must not be there yet, and is there when it is whole. A directory
            must be empty or not there. A stream gets the archive at its own pace; closing it is
            the caller's, and cancelled or failed, part of the archive has been sent.
        format: What to write.
        platform: Which image, where a reference has several; ``None``: the host's, or the only
            one.

    Cancelled, or failed, nothing stays of a file, nor of a directory.

    Raises:
        InvalidReference: if a reference does not follow the grammar.
        PlatformError: if ``platform`` is none.
        StoreError: if an image is not in the store, or lacks one of its blobs: a layer that was
            there already, from other bytes, is not pulled again. Also if a blob is damaged.
        ExportError: if the target exists already or cannot be written, or if two images would get
            one tag in a docker-archive, which has no place for digests and platforms.
        InvalidDigest: if a digest is malformed.
        ValueError: for a stream as an OCI layout, and for no references.
        Exception: what the stream raises.
    """
    if isinstance(references, str | Reference):
        references = [references]
    parsed = [_parse_name(each) if isinstance(each, str) else each for each in references]
    if platform is not None and not isinstance(platform, Platform):
        platform = parse_platform(platform)
    if format not in ("oci-archive", "docker-archive", "oci"):
        raise ValueError(f"unknown format {format!r}: oci-archive, docker-archive or oci")
    if format == "oci" and isinstance(target, trio.abc.SendStream):
        raise ValueError("an OCI layout is a directory: to a stream write an oci-archive")
    if not parsed:
        raise ValueError("there is nothing to export: name an image")
    async with store._lifetime.use(), store.lease() as lease:
        images = []
        # One image may have thousands of names, so its manifest is read and held only once.
        manifests: dict[Digest, Manifest] = {}
        for image in await _look_up(store, parsed, platform):
            index = None if image.index is None else image.index.digest
            await lease.hold(image.manifest.digest, image.config.digest, index, image.chain_id)
            manifest = manifests.get(image.manifest.digest)
            if manifest is None:
                data = await store.read_blob(image.manifest.digest)
                document = await trio.to_thread.run_sync(
                    decode_manifest, data, image.manifest.media_type
                )
                assert isinstance(document, Manifest)
                manifest = manifests[image.manifest.digest] = document
                await lease.hold(*(layer.digest for layer in manifest.layers))
            images.append(_Exported(parse_reference(image.reference), image, manifest))
        if format == "docker-archive":
            _check_tags(images, target)
            entries = await _docker_entries(store, images)
        else:
            entries = await _oci_entries(store, images, for_docker=format == "oci-archive")
        await _write(entries, target, format)


@attrs.frozen
class _Exported:
    reference: Reference
    image: StoredImage
    manifest: Manifest


def _parse_name(text: str) -> Reference | Digest:
    return parse_digest(text) if text.startswith("sha256:") else parse_reference(text)


async def _look_up(
    store: DirectoryStore, names: Iterable[Reference | Digest], platform: Platform | None
) -> list[StoredImage]:
    """Look up the images to export, without duplicates of a name and platform."""
    found: dict[tuple[str, str | None], StoredImage] = {}
    for name in dict.fromkeys(names):
        if isinstance(name, Reference):
            image = choose_stored(await store.images(str(name)), platform)
            images = [] if image is None else [image]
        else:
            images = [
                each
                for each in await store.images()
                if name in (each.manifest.digest, each.config.digest)
                and (platform is None or choose_stored([each], platform) is not None)
            ]
        if not images:
            what = f" for {platform}" if platform else ""
            raise StoreError(f"{name}{what} is not in the store: pull it")
        for each in images:
            found.setdefault((each.reference, each.platform), each)
    return list(found.values())


def _check_tags(images: Iterable[_Exported], target: object) -> None:
    """Check that no tag in a docker-archive would denote two images."""
    holders: dict[str, StoredImage] = {}
    for exported in images:
        for tag in _tags(exported.reference):
            image = exported.image
            other = holders.setdefault(tag, image)
            if other.config.digest != image.config.digest:
                name = os.fspath(target) if isinstance(target, str | os.PathLike) else "the stream"
                raise ExportError(
                    name,
                    f"{tag} would stand for two images, {other.reference} ({other.platform}, "
                    f"{other.manifest.digest}) and {image.reference} ({image.platform}, "
                    f"{image.manifest.digest}): export them one by one, or as an oci-archive",
                )


async def _oci_entries(
    store: DirectoryStore, images: Sequence[_Exported], *, for_docker: bool
) -> list[Entry]:
    blobs: dict[Digest, Blob] = {}
    for exported in images:
        image, layers = exported.image, exported.manifest.layers
        for descriptor in (image.manifest, image.config, image.index, *layers):
            if descriptor is None or descriptor.digest in blobs:
                continue
            path = await store.blob(descriptor.digest)
            if path is None:
                raise StoreError(
                    f"{image.reference} lacks the blob {descriptor.digest}, since its content came "
                    "from another: pull the image into a store of its own, or export it as a "
                    "docker-archive"
                )
            blobs[descriptor.digest] = Blob(path, descriptor.digest, descriptor.size)
    described = (
        (
            exported.reference,
            blob_path(exported.image.config.digest),
            [blob_path(layer.digest) for layer in exported.manifest.layers],
        )
        for exported in images
    )
    docker = await trio.to_thread.run_sync(_docker_document, described)
    stored = [exported.image for exported in images]
    index = await trio.to_thread.run_sync(index_document, stored)
    documents: list[Entry] = [(LAYOUT, OCI_LAYOUT), (INDEX, index)]
    contents: list[Entry] = [(blob_path(digest), blobs[digest]) for digest in sorted(blobs)]
    if not for_docker:
        # What is there at once is a layout when it is whole.
        return contents + documents
    # Whoever reads it as it comes is to know first what it is of.
    return [*documents, (DOCKER, docker), *contents]


async def _docker_entries(store: DirectoryStore, images: Sequence[_Exported]) -> list[Entry]:
    files: dict[str, bytes | Blob] = {}
    described: list[tuple[Reference, str, list[str]]] = []
    found: dict[str, list[str]] = {}
    for exported in images:
        image = exported.image
        name = f"{_hex(image.config.digest)}.json"
        if name in found:
            described.append((exported.reference, name, found[name]))
            continue
        config = await store.read_blob(image.config.digest)
        diff_ids = (await trio.to_thread.run_sync(decode_config, config)).diff_ids
        stack = await _layers_of(store, image)
        if [layer.diff_id for layer in stack] != list(diff_ids):
            raise StoreError(f"the layers of {image.reference} are not unpacked: pull it")
        layers = []
        for layer in stack:
            layers.append(f"{_hex(layer.diff_id)}.tar")
            if layers[-1] not in files:
                path = await store.blob(layer.blob)
                if path is None:
                    raise StoreError(f"blob {layer.blob} is not in the store: pull the image again")
                size = await store.tar_size(layer)
                files[layers[-1]] = Blob(path, layer.diff_id, size, inflate=True)
        files[name] = config
        found[name] = layers
        described.append((exported.reference, name, layers))
    docker = await trio.to_thread.run_sync(_docker_document, described)
    return [*files.items(), (DOCKER, docker)]


def _docker_document(images: Iterable[tuple[Reference, str, Sequence[str]]]) -> bytes:
    """Encode ``manifest.json`` for images: names, config paths and layer paths.

    An image with several names has one entry with all of them. If two images share a name, the
    first one gets it.
    """
    tags: dict[str, dict[str, None]] = {}
    paths: dict[str, tuple[str, ...]] = {}
    holders: dict[str, str] = {}
    for reference, config, layers in images:
        paths[config] = tuple(layers)
        mine = tags.setdefault(config, {})
        for tag in _tags(reference):
            if holders.setdefault(tag, config) == config:
                mine[tag] = None
    return encode_docker(
        DockerImage(config, tuple(tags[config]), layers) for config, layers in paths.items()
    )


async def _layers_of(store: DirectoryStore, image: StoredImage) -> list[DirectoryLayer]:
    """The image's layers, bottom first."""
    layer = None if image.chain_id is None else await store.find(image.chain_id)
    layers = []
    while layer is not None:
        layers.append(layer)
        layer = layer.parent
    return layers[::-1]


def _tags(reference: Reference) -> tuple[str, ...]:
    """In full, though docker writes short ones: podman takes those for its own. They have no
    digests.
    """
    return (str(attrs.evolve(reference, digest=None)),) if reference.tag else ()


def _hex(digest: Digest) -> str:
    return digest.removeprefix("sha256:")


async def _write(
    entries: Sequence[Entry],
    target: str | os.PathLike[str] | trio.abc.SendStream,
    format: ArchiveFormat,
) -> None:
    check = trio.from_thread.check_cancelled
    if isinstance(target, trio.abc.SendStream):
        with closing(write_tar(entries, check)) as pieces:
            # Not one thread for all of it: none is kept while the stream does not take more.
            while piece := await trio.to_thread.run_sync(next, pieces, b""):
                await target.send_all(piece)
    elif format == "oci":
        await trio.to_thread.run_sync(write_directory, Path(target), entries, check)
    else:
        pieces = write_tar(entries, check)
        with closing(pieces):
            await trio.to_thread.run_sync(write_file, Path(target), pieces)
