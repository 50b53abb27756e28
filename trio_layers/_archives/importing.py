"""From an archive or a layout to images in the store."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Final, TypeVar, TypeVarTuple, final

import attrs
import trio

from .._choice import MAX_INDEX_DEPTH, check_platform, choose_image
from .._digest import DiffID, Digest, digest_of
from .._engine.download import open_download_manager
from .._errors import (
    ArchiveError,
    InvalidReference,
    ManifestError,
    StoreError,
    VerificationError,
)
from .._image import ImageLayer, ImageSource, check_diff_ids, check_storable, layers_of
from .._manifest import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_DOCUMENT_SIZE,
    Descriptor,
    Index,
    Manifest,
    check_image,
    check_layer_count,
    decode_config,
    decode_manifest,
)
from .._platform import Platform, host_platform, parse_platform
from .._reference import Reference, parse_reference
from .._store.catalog import StoredImage
from .._store.directory import DirectoryStore
from .._store.layout import INDEX_ANNOTATION
from ..abc import BlobSink, ProgressSink, ReportProgress
from .documents import (
    CONFIG_TYPE,
    DOCKER,
    INDEX,
    LAYER_TYPES,
    LAYOUT,
    DockerImage,
    blob_path,
    check_layout,
    claimed_digest,
    decode_docker,
    encode_manifest,
    name_of,
    shown,
)
from .reading import Shelf, Source, open_source

__all__ = ["import_images"]

MAX_LAYERS: Final = 100_000
"""Of all images of a source. They take memory, and an archive can name one blob any number of
times."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def import_images(
    store: DirectoryStore,
    source: str | os.PathLike[str] | trio.abc.ReceiveStream,
    *,
    reference: str | Reference | None = None,
    platform: str | Platform | None = None,
    progress: ProgressSink | None = None,
) -> list[StoredImage]:
    """Put the images of an archive or a layout into the store, unpacked.

    It takes what ``docker save``, podman, skopeo, buildah, containerd and `export_images` write:
    docker-archives, OCI archives, and OCI layouts in directories. What it is shows in what is in
    it, not in its name. An archive may be compressed, by gzip, zstd, bzip2 or xz. Where one is
    both, as Docker 25 writes them, it is taken as an OCI layout.

    Whatever the source says is verified: blobs by their names, layers by the diff IDs in the
    image's config. What an OCI layout has keeps its digests. A docker-archive has no manifests:
    one is made, always the same of the same archive, and the config stays as it is, and with it
    the image's ID; its layers stay as they are, too, be they compressed by gzip or zstd or, as
    is usual, not at all.

    Images get the names they have in the source. Bare tags, as ``skopeo copy … oci:DIR:TAG``
    writes them, are no names.

    Args:
        store: Where to.
        source: A directory, a file, or a stream, which is read to its end; closing it is the
            caller's. It is never held in memory as a whole.
        reference: What the image is to be called, whatever it is called in the source. If there
            are several, only that one is taken that has this name, or else the tag of it. With a
            digest, that must be the digest of its manifest or index.
        platform: Which of an index's images; ``None``: the host's, or what there is if there is
            no index. Others are not imported.
        progress: Takes the events of unpacking; see `DownloadManager.download`.

    Returns:
        What was put into the store, in the order of the source, each name by itself.

    If this is cancelled or fails no image is put, and nothing of it is visible in the store but
    whole layers and blobs, which are removed when nobody needs them. A failure between two
    images that are put, such as a full disk, leaves the first.

    Raises:
        ArchiveError: if it is no archive or layout, is damaged, or lacks something; if it has an
            image without a name, or several and none is the one that ``reference`` means.
        ManifestError: if a manifest, index or config in it is not valid.
        VerificationError: if something is not what its digest says.
        PlatformError: if there is no image for the platform.
        RegistrationError: if a layer cannot be unpacked; its ``reason`` says why.
        InvalidReference: if ``reference`` does not follow the grammar.
        StoreError: for what the store's disk does.
        OSError: if the source cannot be read.
        Exception: what the stream or ``progress`` raises.
    """
    if isinstance(reference, str):
        reference = parse_reference(reference)
    if platform is not None and not isinstance(platform, Platform):
        platform = parse_platform(platform)
    async with store.lease() as lease, store.batch() as batch:
        shelf = Shelf(store, batch, lease)
        opened = await open_source(source, shelf)
        images: list[_Image] = []
        layers = 0
        try:
            for candidate, names in _select(opened.name, await _candidates(opened), reference):
                images.append(await _find(opened, shelf, candidate, names, platform))
                layers += len(images[-1].layers)
                if layers > MAX_LAYERS:
                    raise ArchiveError(f"{opened.name} has more than {MAX_LAYERS} layers")
        except ManifestError as error:
            raise ManifestError(f"{opened.name}: {error}") from error
        digests = [digest for image in images for digest in image.digests()]
        await lease.hold(*digests)
        await batch.commit(digests, lease=lease)
        return await _put(store, images, progress)


async def _put(
    store: DirectoryStore, images: Iterable[_Image], progress: ProgressSink | None
) -> list[StoredImage]:
    """Unpack the layers, which are in the store, then give the images their names."""
    put: list[StoredImage] = []
    async with AsyncExitStack() as stack:
        manager = await stack.enter_async_context(open_download_manager(store))
        for image in images:
            sources = [_StoredLayer(store, layer) for layer in image.layers]
            download = manager.download(sources, progress=progress)
            rootfs = await stack.enter_async_context(download)
            check_diff_ids(image.layers, rootfs)
        for image in images:
            for name in image.names:
                stored = image.stored_as(name)
                await store.put_image(
                    stored.reference,
                    manifest=stored.manifest,
                    config=stored.config,
                    platform=stored.platform,
                    chain_id=stored.chain_id,
                    index=stored.index,
                )
                put.append(stored)
    return put


@attrs.frozen
class _Candidate:
    """One image of a source, or one for each of some platforms.

    Attributes:
        names: Its full names.
        tag: What else it is called: a bare tag, as a rule.
        roots: In a layout, the entries that lead to it.
        docker: In a docker-archive, what that says of it.
    """

    names: tuple[Reference, ...]
    tag: str = ""
    roots: tuple[Descriptor, ...] = ()
    docker: DockerImage | None = None

    def __str__(self) -> str:
        """Its names, for messages."""
        return ", ".join(map(str, self.names)) or (f"the tag {shown(self.tag)}" * bool(self.tag))


@attrs.frozen
class _Image:
    """An image that was found, and its names in the store."""

    names: tuple[Reference, ...]
    manifest: Descriptor
    config: Descriptor
    platform: Platform
    layers: tuple[ImageLayer, ...]
    index: Descriptor | None = None

    def digests(self) -> Iterator[Digest]:
        """What must be in the store, and stay there: blobs and chains."""
        yield self.manifest.digest
        yield self.config.digest
        if self.index is not None:
            yield self.index.digest
        for layer in self.layers:
            yield layer.descriptor.digest
            yield layer.chain_id

    def stored_as(self, name: Reference) -> StoredImage:
        return StoredImage(
            str(name),
            str(self.platform),
            self.manifest,
            self.config,
            self.layers[-1].chain_id if self.layers else None,
            self.index,
        )


# What is in the source.


async def _candidates(source: Source) -> tuple[_Candidate, ...]:
    """The images of a source."""
    layout, index, docker = [await source.read(path) for path in (LAYOUT, INDEX, DOCKER)]
    if layout is None or index is None:
        if docker is not None:
            return tuple(
                _Candidate(_parsed(image.tags), docker=image)
                for image in await _decode(source, decode_docker, docker)
            )
        there = ", ".join(map(shown, await source.names()))
        raise ArchiveError(
            f"{source.name} is neither an OCI layout, with {LAYOUT} and {INDEX}, nor a "
            f"docker-archive, with {DOCKER}: it has {there or 'nothing'}"
        )
    await _decode(source, check_layout, layout)
    entries = await _decode(source, decode_manifest, index, INDEX_TYPES[0])
    assert isinstance(entries, Index)
    # Entries of one name are one image, for several platforms.
    groups: dict[Reference | str, list[Descriptor]] = {}
    for entry in entries.images:
        groups.setdefault(name_of(entry), []).append(entry)
    tags = await _docker_tags(source, docker)
    candidates = []
    for name, roots in groups.items():
        if isinstance(name, Reference):
            candidates.append(_Candidate((name,), roots=tuple(roots)))
        elif len({root.platform for root in roots}) == len(roots) and not tags:
            candidates.append(_Candidate((), name, tuple(roots)))
        else:
            # Nothing says that they are one image.
            for root in roots:
                names = await _names_by_config(source, root, tags)
                candidates.append(_Candidate(names, str(name), (root,)))
    return tuple(candidates)


async def _docker_tags(source: Source, docker: bytes | None) -> dict[Digest, tuple[str, ...]]:
    """What a ``manifest.json`` beside a layout calls its images, by their configs."""
    if docker is None:
        return {}
    tags: dict[Digest, tuple[str, ...]] = {}
    for image in await _decode(source, decode_docker, docker):
        config = claimed_digest(image.config)
        if config is not None:
            tags[config] = tags.get(config, ()) + image.tags
    return tags


async def _names_by_config(
    source: Source, root: Descriptor, tags: dict[Digest, tuple[str, ...]]
) -> tuple[Reference, ...]:
    if not tags or root.media_type not in MANIFEST_TYPES:
        return ()
    data = await _document(source, root)
    manifest = await _decode(source, decode_manifest, data, root.media_type)
    assert isinstance(manifest, Manifest)
    return _parsed(tags.get(manifest.config.digest, ()))


def _parsed(tags: Iterable[str]) -> tuple[Reference, ...]:
    names = []
    for tag in tags:
        try:
            names.append(parse_reference(tag))
        except InvalidReference:
            pass
    return tuple(dict.fromkeys(names))


def _select(
    source: str, candidates: Sequence[_Candidate], reference: Reference | None
) -> list[tuple[_Candidate, tuple[Reference, ...]]]:
    """Which images are wanted, and what they are to be called."""
    if not candidates:
        raise ArchiveError(f"{source} has no image")
    if reference is None:
        for candidate in candidates:
            if not candidate.names:
                what = f"an image with {candidate}, but" if candidate.tag else "an image"
                raise ArchiveError(
                    f"{source} has {what} without a name: say what it is to be called (reference)"
                )
        names = [name for candidate in candidates for name in candidate.names]
        if len(set(names)) < len(names):
            raise ArchiveError(f"{source} has two images of one name: say which one (reference)")
        return [(candidate, candidate.names) for candidate in candidates]
    meant: Sequence[_Candidate] = candidates
    if len(meant) > 1:
        meant = [each for each in candidates if reference in each.names]
        meant = meant or [each for each in candidates if each.tag and each.tag == reference.tag]
    if len(meant) != 1:
        there = "; ".join(str(each) for each in candidates[:20] if str(each))
        raise ArchiveError(
            f"{source} has {len(candidates)} images, and {len(meant) or 'none'} of them is "
            f"{reference}: name one of these: {there or 'they have no names'}"
        )
    return [(meant[0], (reference,))]


async def _find(
    source: Source,
    shelf: Shelf,
    candidate: _Candidate,
    names: tuple[Reference, ...],
    platform: Platform | None,
) -> _Image:
    """The image, all of whose parts the store or the batch has."""
    if candidate.docker is not None:
        image = await _find_docker(source, shelf, candidate.docker, names, platform)
    else:
        image = await _find_oci(source, candidate.roots, names, platform)
    digests = {image.manifest.digest, None if image.index is None else image.index.digest}
    for name in names:
        if name.digest is not None and name.digest not in digests:
            raise VerificationError(
                f"{source.name}: {name} is called by another digest than that of its manifest, "
                f"{image.manifest.digest}",
                digest=name.digest,
            )
    return image


async def _find_oci(
    source: Source,
    roots: Sequence[Descriptor],
    names: tuple[Reference, ...],
    platform: Platform | None,
) -> _Image:
    """By the rules of `RegistryClient.resolve`."""
    called = f"{source.name}: {', '.join(map(str, names))}"
    wanted = platform or host_platform()
    index: Descriptor | None = None
    several = len(roots) > 1
    if several:
        descriptor = choose_image(called, Index(INDEX_TYPES[0], tuple(roots)), wanted)
    else:
        [descriptor] = roots
    data = await _document(source, descriptor)
    document = await _decode(source, decode_manifest, data, descriptor.media_type)
    root = descriptor
    for _ in range(MAX_INDEX_DEPTH):
        if not isinstance(document, Index):
            break
        if index is None:
            index = descriptor
        descriptor = choose_image(called, document, wanted)
        data = await _document(source, descriptor)
        document = await _decode(source, decode_manifest, data, descriptor.media_type)
    if isinstance(document, Index):
        raise ManifestError(f"more than {MAX_INDEX_DEPTH} indexes lead to one another")
    check_image(document)
    config = await _decode(source, decode_config, await _document(source, document.config))
    check_layer_count(document, config)
    check_storable([*(layer.digest for layer in document.layers), *config.diff_ids])
    chosen = several or index is not None
    said = chosen and descriptor.platform is not None
    if not said and (chosen or platform is not None):
        check_platform(called, config.platform, wanted)
    if index is None:
        index = await _index_of(source, root)
    for part in (index, descriptor, document.config, *document.layers):
        if part is None:
            continue
        item = await source.take(blob_path(part.digest))
        if item is None:
            raise _missing(source, part)
        _check(source, part, item.digest, item.size)
    return _Image(
        names,
        _plain(descriptor),
        _plain(document.config),
        config.platform,
        layers_of(document.layers, config.diff_ids),
        None if index is None else _plain(index),
    )


async def _index_of(source: Source, root: Descriptor) -> Descriptor | None:
    """The index that an image was once chosen from, where one of our layouts has it."""
    digest = root.annotations.get(INDEX_ANNOTATION)
    if digest is None or claimed_digest(f"blobs/{digest.replace(':', '/')}") is None:
        return None
    data = await source.read(blob_path(Digest(digest)))
    if data is None or digest_of(data) != digest:
        return None
    for media_type in INDEX_TYPES:
        try:
            index = await _decode(source, decode_manifest, data, media_type)
        except ManifestError:
            continue
        return Descriptor(index.media_type, Digest(digest), len(data))
    return None


async def _find_docker(
    source: Source,
    shelf: Shelf,
    image: DockerImage,
    names: tuple[Reference, ...],
    platform: Platform | None,
) -> _Image:
    data = await source.read(image.config)
    if data is None:
        raise ArchiveError(f"{source.name} lacks {shown(image.config)}, the config of {names[0]}")
    digest = digest_of(data)
    claimed = claimed_digest(image.config, config=True)
    if claimed not in (None, digest):
        raise VerificationError(
            f"{source.name}: {shown(image.config)} is damaged: what it holds is {digest}",
            digest=claimed,
        )
    config = await _decode(source, decode_config, data)
    if platform is not None:
        check_platform(f"{source.name}: {names[0]}", config.platform, platform)
    if len(image.layers) != len(config.diff_ids):
        raise ManifestError(
            f"{DOCKER} has {len(image.layers)} layers of {names[0]}, but the image config has "
            f"{len(config.diff_ids)} diff IDs"
        )
    pairs = zip(image.layers, config.diff_ids, strict=True)
    layers = [await _docker_layer(source, path, diff_id) for path, diff_id in pairs]
    config_descriptor = Descriptor(CONFIG_TYPE, digest, len(data))
    manifest = encode_manifest(config_descriptor, layers)
    descriptor = Descriptor(MANIFEST_TYPES[0], digest_of(manifest), len(manifest))
    await source.take(image.config)
    await shelf.keep(descriptor.digest, manifest)
    return _Image(
        names,
        descriptor,
        config_descriptor,
        config.platform,
        layers_of(layers, config.diff_ids),
    )


async def _docker_layer(source: Source, path: str, diff_id: DiffID) -> Descriptor:
    item = await source.take(path)
    if item is None:
        raise ArchiveError(f"{source.name} lacks {shown(path)}, a layer")
    media_type = LAYER_TYPES.get(item.compression)
    if media_type is None:
        raise ArchiveError(
            f"{source.name}: the layer {shown(path)} is compressed by {item.compression}, for "
            "which manifests have no word: decompress it, or use gzip"
        )
    if item.compression is None and item.digest != diff_id:
        raise VerificationError(
            f"{source.name}: the layer {shown(path)} is {item.digest}, "
            f"but the image's config says {diff_id}",
            digest=diff_id,
        )
    return Descriptor(media_type, item.digest, item.size)


async def _document(source: Source, descriptor: Descriptor) -> bytes:
    """A manifest, index or config of a layout, verified."""
    if descriptor.size > MAX_DOCUMENT_SIZE:
        raise ManifestError(
            f"{descriptor.digest} has {descriptor.size} bytes, more than {MAX_DOCUMENT_SIZE}"
        )
    check_storable([descriptor.digest])
    data = await source.read(blob_path(descriptor.digest))
    if data is None:
        raise _missing(source, descriptor)
    _check(source, descriptor, digest_of(data), len(data))
    return data


def _missing(source: Source, descriptor: Descriptor) -> ArchiveError:
    hint = ": such layers are often left out, so pull the image" if descriptor.is_foreign else ""
    return ArchiveError(
        f"{source.name} lacks {blob_path(descriptor.digest)}, "
        f"a {shown(descriptor.media_type)}{hint}"
    )


def _check(source: Source, descriptor: Descriptor, digest: Digest, size: int) -> None:
    if digest != descriptor.digest:
        raise VerificationError(
            f"{source.name}: {blob_path(descriptor.digest)} is damaged: what it holds is {digest}",
            digest=descriptor.digest,
        )
    if size != descriptor.size:
        raise VerificationError(
            f"{source.name}: {descriptor.digest} is {size} bytes long, "
            f"but {descriptor.size} by what leads to it",
            digest=descriptor.digest,
        )


def _plain(descriptor: Descriptor) -> Descriptor:
    """What of a descriptor is a matter of the blob alone."""
    return Descriptor(descriptor.media_type, descriptor.digest, descriptor.size)


async def _decode(source: Source, decode: Callable[[bytes, *Ts], T], data: bytes, *args: *Ts) -> T:
    try:
        return await trio.to_thread.run_sync(decode, data, *args)
    except ArchiveError as error:
        raise ArchiveError(f"{source.name}: {error}") from error


@final
class _StoredLayer(ImageSource):
    """A layer source (see `trio_layers.abc.StagedSource`) of a blob that is in the store, and held
    there: nothing is downloaded."""

    def __init__(self, store: DirectoryStore, layer: ImageLayer) -> None:
        super().__init__(layer)
        self._store = store

    async def download(self, progress: ReportProgress) -> tuple[trio.abc.ReceiveStream, int]:
        return await self._store.open_blob(self.descriptor.digest), self.descriptor.size

    async def download_into(self, sink: BlobSink, progress: ReportProgress) -> None:
        await trio.lowlevel.checkpoint()
        raise StoreError(f"blob {self.descriptor.digest} is not in the store any more: try again")

    def close(self) -> None:
        """There is nothing to let go of."""
