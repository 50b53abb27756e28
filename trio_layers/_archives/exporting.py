"""Exports images of the store to an archive or a layout."""

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
"""An OCI layout in a tar, an archive like those of ``docker save``, or an OCI layout directory."""


async def export_images(
    store: DirectoryStore,
    references: str | Reference | Iterable[str | Reference],
    target: str | os.PathLike[str] | trio.abc.SendStream,
    *,
    format: ArchiveFormat = "oci-archive",
    platform: str | Platform | None = None,
) -> None:
    """Write images of the store to an archive, or as an OCI layout into a directory.

    The OCI formats have manifest, config and layers as they were pulled, so all digests stay the
    same. They also have the index from which an image was chosen, if there was one: only
    `import_images` uses it, other tools see the image alone. The images keep their full names. An
    OCI archive also has a ``manifest.json``, like those of Docker 25, so any version of ``docker
    load`` can read it. Images that were pulled in Docker's schema 2 keep that format. skopeo cannot
    find such an image by its name in an OCI layout, but it can in this ``manifest.json``.

    A docker-archive has the layers as uncompressed tars, and no manifests. The config, and so the
    image's ID, stays the same.

    Equal images give equal bytes.

    Args:
        store: The store that has the images.
        references: The images, by name or by the digest of their manifest or config
            (``sha256:…``). A digest exports its image under all names that it has in the store.
        target: A path or a stream. A file must not exist; it appears only when it is complete. A
            directory must be empty or new. A stream gets the archive at its own pace, and the
            caller closes it.
        format: The format to write.
        platform: The platform of the image, if a reference has several; ``None``: the host's, or
            the only one.

    Cancellation: if the call is cancelled or fails, no file or directory stays. A stream may have
    got part of the archive.

    Raises:
        InvalidReference: if a reference does not follow the grammar.
        PlatformError: if ``platform`` is not a valid platform.
        StoreError: if an image is not in the store, a blob is damaged, or the image lacks a blob:
            a layer that was already in the store, from other bytes, is not pulled again.
        ExportError: if the target exists already or cannot be written, or if two images would get
            one tag in a docker-archive, which has no place for digests and platforms.
        InvalidDigest: if a digest is malformed.
        ValueError: if an OCI layout is written to a stream, or there are no references.
        Exception: any error that the stream raises.
    """
    if isinstance(references, str | Reference):
        references = [references]
    parsed = [_parse_name(each) if isinstance(each, str) else each for each in references]
    if platform is not None and not isinstance(platform, Platform):
        platform = parse_platform(platform)
    if format not in ("oci-archive", "docker-archive", "oci"):
        raise ValueError(f"unknown format {format!r}: use oci-archive, docker-archive or oci")
    if format == "oci" and isinstance(target, trio.abc.SendStream):
        raise ValueError("format oci writes a directory, not to a stream: use oci-archive")
    if not parsed:
        raise ValueError("no images to export: pass at least one reference")
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
            suffix = f" for {platform}" if platform else ""
            raise StoreError(f"{name}{suffix} is not in the store: pull it")
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
                    f"the tag {tag} would mean two images, {other.reference} ({other.platform}, "
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
                    f"{image.reference} lacks the blob {descriptor.digest}, since the store got "
                    "its content from another blob: pull the image into a new store, or export it "
                    "as a docker-archive"
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
        # The documents come last, so the directory is a layout only when it is complete.
        return contents + documents
    # The documents come first, for programs that read the archive as a stream.
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
    """The name of an image for a docker-archive: a full one without a digest.

    Docker writes short names, but podman would take these for names of its own.
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
            # Each piece has a call in a thread, so a slow stream keeps no thread busy.
            while piece := await trio.to_thread.run_sync(next, pieces, b""):
                await target.send_all(piece)
    elif format == "oci":
        await trio.to_thread.run_sync(write_directory, Path(target), entries, check)
    else:
        pieces = write_tar(entries, check)
        with closing(pieces):
            await trio.to_thread.run_sync(write_file, Path(target), pieces)
