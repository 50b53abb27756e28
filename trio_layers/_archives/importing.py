"""From an archive or a layout to images in the store."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Final, final

import attrs
import trio

from .._catalog.rows import StoredImage
from .._digest import DiffID, Digest, digest_of
from .._engine.download import open_download_manager
from .._errors import (
    ArchiveError,
    ManifestError,
    PlatformError,
    StoreError,
    VerificationError,
)
from .._image import (
    ImageLayer,
    ImageSource,
    check_diff_ids,
    check_storable,
    layers_of,
    off_the_loop,
)
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
from .._printable import printable_value
from .._reference import Reference, parse_reference
from .._select import check_platform, choose_image, walk_index
from .._store.directory import DirectoryStore
from .._store.layout import INDEX_ANNOTATION
from ..abc import BlobSink, ProgressSink, ReportProgress
from .candidates import Candidate, decode, list_images
from .documents import (
    CONFIG_TYPE,
    DOCKER,
    LAYER_TYPES,
    DockerImage,
    blob_path,
    claimed_digest,
    decode_document,
    encode_manifest,
)
from .reading import Shelf, Source, open_source
from .selecting import digest_prefix, select

__all__ = ["import_images"]

MAX_LAYERS: Final = 100_000
"""Of all images of a source. They take memory, and an archive can name one blob any number of
times."""

NAMELESS: Final = "localhost/unnamed"
"""The repository in the reference of an image without a name; a digest follows."""

_SHOWN: Final = 20

# These errors mean that one description of an image is unusable, so the next one is tried.
_USELESS: Final = (ArchiveError, ManifestError, PlatformError, VerificationError)


async def import_images(
    store: DirectoryStore,
    source: str | os.PathLike[str] | trio.abc.ReceiveStream,
    *,
    reference: str | Reference | None = None,
    digest: str | None = None,
    all: bool = False,
    platform: str | Platform | None = None,
    progress: ProgressSink | None = None,
) -> list[StoredImage]:
    """Put the images of an archive or a layout into the store, unpacked.

    It takes what ``docker save``, podman, skopeo, buildah, containerd and `export_images` write:
    docker-archives, OCI archives, and OCI layouts in directories. What it is shows in what is in
    it, not in its name. An archive may be compressed, by gzip, zstd, bzip2 or xz. Docker 25 writes
    archives that are both a docker-archive and an OCI archive; the images of both lists are
    imported. Entries with the same config are one image, which gets the names from both lists. Its
    manifest is the layout's if that is complete. Signatures, attestations and other artifacts
    beside images are skipped.

    Whatever the source says is verified: blobs by their names, layers by the diff IDs in the
    image's config. What an OCI layout has keeps its digests. A docker-archive has no manifests:
    one is made, always the same of the same archive, and the config stays as it is, and with it
    the image's ID; its layers stay as they are, too, be they compressed by gzip or zstd or, as
    is usual, not at all.

    Images get the names they have in the source. Bare tags, as ``skopeo copy … oci:DIR:TAG``
    writes them, are no names. An image without a name is imported if ``digest`` chooses it or
    ``all`` is set. Its name in the store is ``localhost/unnamed@sha256:…``, with the digest of its
    index, or of its manifest if it has no index.

    Args:
        store: Where to.
        source: A directory, a file, or a stream, which is read to its end; closing it is the
            caller's. It is never held in memory as a whole.
        reference: What the image is to be called, whatever it is called in the source. If there
            are several, only that one is taken that has this name, or else the tag of it. A
            digest in the reference chooses the image with this manifest, index or config. The
            stored reference has the manifest's digest in place of a config's. A ``reference``
            that is only a digest (``sha256:…``) has the effect of ``digest``.
        digest: The digest of one image's manifest, index or config (Docker's image ID), or the
            beginning of this digest; ``sha256:`` may be left out. The image keeps its names
            unless ``reference`` gives another.
        all: Whether to import images without names as well.
        platform: Which of an index's images; ``None``: the host's, or what there is if there is
            no index. Others are not imported.
        progress: Takes the events of unpacking; see `DownloadManager.download`.

    Returns:
        What was put into the store, in the order of the source, each name by itself.

    If this is cancelled or fails no image is put, and nothing of it is visible in the store but
    whole layers and blobs, which garbage collection removes unless another image needs them.

    Raises:
        ArchiveError: if it is no archive or layout, is damaged, or lacks something; if it has an
            image without a name, or several and none is the one that ``reference`` means.
        ManifestError: if a manifest, index or config in it is not valid.
        VerificationError: if something is not what its digest says.
        PlatformError: if there is no image for the platform.
        RegistrationError: if a layer cannot be unpacked; its ``reason`` says why.
        InvalidReference: if ``reference`` does not follow the grammar.
        InvalidDigest: if ``digest`` is neither a digest nor the beginning of one.
        ValueError: if ``all`` is combined with ``reference`` or ``digest``.
        StoreError: for what the store's disk does.
        OSError: if the source cannot be read.
        Exception: what the stream or ``progress`` raises.
    """
    if all and (reference is not None or digest is not None):
        raise ValueError("all images are wanted: leave out the reference and the digest of one")
    if isinstance(reference, str) and digest is None and reference.startswith("sha256:"):
        reference, digest = None, reference
    if isinstance(reference, str):
        reference = parse_reference(reference)
    prefix = None if digest is None else digest_prefix(digest)
    if platform is not None and not isinstance(platform, Platform):
        platform = parse_platform(platform)
    async with store._lifetime.use(), store.lease() as lease, store.batch() as batch:
        shelf = Shelf(store, batch, lease)
        opened = await open_source(source, shelf, store.limits)

        images: list[_Image] = []
        finder = _Finder(opened, shelf, platform)
        layers = 0
        try:
            chosen = await select(
                opened.name,
                await list_images(opened),
                reference=reference,
                prefix=prefix,
                everything=all,
                manifest_digest=finder.manifest_digest,
            )
            for candidate, names in chosen:
                images.append(await finder.find(candidate, names))
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
    store: DirectoryStore, images: Sequence[_Image], progress: ProgressSink | None
) -> list[StoredImage]:
    """Unpack the layers, which are in the store, then give the images their names."""
    async with AsyncExitStack() as stack:
        manager = await stack.enter_async_context(open_download_manager(store))
        for layers in dict.fromkeys(image.layers for image in images):
            make = partial(_StoredLayer, store)
            sources = await off_the_loop(
                len(layers), partial(list[_StoredLayer], map(make, layers))
            )
            download = manager.download(sources, progress=progress)
            rootfs = await stack.enter_async_context(download)
            check_diff_ids(layers, rootfs)
        put = await trio.to_thread.run_sync(_named, images)
        await store.put_images(put)
    return put


def _named(images: Sequence[_Image]) -> list[StoredImage]:
    return [image.stored_as(name) for image in images for name in image.names]


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


@final
class _Finder:
    """Finds a source's images for a platform, and adds their blobs to the batch."""

    def __init__(self, source: Source, shelf: Shelf, platform: Platform | None) -> None:
        self._source = source
        self._shelf = shelf
        self._platform = platform
        # Any number of indexes may lead to one manifest or index, so each is decoded only once.
        self._found: dict[tuple[Descriptor, Platform | None], _Image] = {}
        self._entries: dict[Descriptor, Descriptor] = {}

    async def find(self, candidate: Candidate, names: tuple[Reference, ...]) -> _Image:
        """Find the image of a candidate, and give it these names."""
        called = str(names[0] if names else candidate)
        if not candidate.contents.manifests and candidate.docker:
            image = await self._find_in_docker(candidate, called, self._platform)
            return await self._named(image, names)
        try:
            image = await self._find_oci(candidate.roots, called)
        except _USELESS as error:
            # An index has one image for each platform, so manifest.json may replace only the one
            # for the wanted platform.
            is_index = len(candidate.roots) > 1 or bool(candidate.contents.indexes)
            wanted = self._platform or (host_platform() if is_index else None)
            try:
                image = await self._find_in_docker(candidate, called, wanted)
            except _USELESS:
                raise error from None
        return await self._named(image, names)

    async def _named(self, image: _Image, names: tuple[Reference, ...]) -> _Image:
        names = await trio.to_thread.run_sync(_promised, self._source, image, names)
        return attrs.evolve(image, names=names)

    async def manifest_digest(self, candidate: Candidate) -> Digest | None:
        """Compute the manifest digest of a docker-archive's image.

        Returns:
            The digest; ``None`` if the image is incomplete or invalid.
        """
        try:
            image = await self._find_in_docker(candidate, str(candidate), None)
        except _USELESS:
            return None
        return image.manifest.digest

    # By index.json.

    async def _find_oci(self, roots: Sequence[Descriptor], called: str) -> _Image:
        """Find an image by the rules of `RegistryClient.resolve_image`."""
        source = self._source
        name = f"{source.name}: {called}"
        wanted = self._platform or host_platform()
        several = len(roots) > 1
        if several:
            among = Index(INDEX_TYPES[0], tuple(roots))
            root = await _choose(source, name, among, wanted)
        else:
            [root] = roots

        async def is_index(descriptor: Descriptor) -> bool:
            return descriptor.media_type in INDEX_TYPES

        async def entry_of(index: Descriptor) -> Descriptor:
            return await self._entry_of(index, name, wanted)

        descriptor, index = await walk_index(root, is_index=is_index, entry_of=entry_of)
        chosen = several or index is not None
        said = descriptor.platform if chosen else None
        image = await self._find_manifest(descriptor, said)
        if said is None and (chosen or self._platform is not None):
            check_platform(name, image.platform, wanted)
        if index is None:
            index = await _index_of(source, root)
        if index is not None:
            await self._take(index)
        return attrs.evolve(image, index=None if index is None else _plain(index))

    async def _entry_of(self, index: Descriptor, name: str, wanted: Platform) -> Descriptor:
        """Choose the entry of an index for a platform."""
        key = _plain(index)
        if key not in self._entries:
            data = await _document(self._source, index)
            document = await decode(self._source, decode_document, data, index.media_type)
            assert isinstance(document, Index)
            self._entries[key] = await _choose(self._source, name, document, wanted)
        return self._entries[key]

    async def _find_manifest(self, descriptor: Descriptor, said: Platform | None) -> _Image:
        """Find the image of a manifest; ``said`` is the platform in its index entry."""
        key = (_plain(descriptor), said)
        if key in self._found:
            return self._found[key]
        source = self._source
        data = await _document(source, descriptor)
        document = await decode(source, decode_document, data, descriptor.media_type)
        assert isinstance(document, Manifest)
        check_image(document)
        config_bytes = await _document(source, document.config)
        config = await decode(source, decode_config, config_bytes, said)
        check_layer_count(document, config)
        digests = [*(layer.digest for layer in document.layers), *config.diff_ids]
        await off_the_loop(len(digests), partial(check_storable, digests))
        for part in {(layer.digest, layer.size): layer for layer in document.layers}.values():
            await self._take(part)
        await self._take(document.config)
        manifest = _plain(descriptor)
        if document.layers or await _is_strict(data, descriptor.media_type):
            await self._take(descriptor)
        else:
            # The specification requires a list of layers, but Go may write null for an empty one.
            # So the store gets a new manifest with an empty list.
            data = encode_manifest(document.config, ())
            manifest = Descriptor(MANIFEST_TYPES[0], digest_of(data), len(data))
            await self._shelf.keep(manifest.digest, data)
        image = self._found[key] = _Image(
            (),
            manifest,
            _plain(document.config),
            config.platform,
            await _stacked(document.layers, config.diff_ids),
        )
        return image

    async def _take(self, descriptor: Descriptor) -> None:
        item = await self._source.take(blob_path(descriptor.digest))
        if item is None:
            raise _missing(self._source, descriptor)
        _check(self._source, descriptor, item.digest, item.size)

    # By manifest.json.

    async def _find_in_docker(
        self, candidate: Candidate, called: str, platform: Platform | None
    ) -> _Image:
        """Find an image by the first usable one of its entries in ``manifest.json``."""
        failure: Exception | None = None
        for image in candidate.docker:
            try:
                return await self._find_docker(image, called, platform)
            except _USELESS as error:
                failure = failure or error
        raise failure or ArchiveError(f"{self._source.name} lacks {called}")

    async def _find_docker(
        self, image: DockerImage, called: str, platform: Platform | None
    ) -> _Image:
        source = self._source
        data = await source.read(image.config)
        if data is None:
            raise ArchiveError(
                f"{source.name} lacks {printable_value(image.config)}, the config of {called}"
            )
        config = await decode(source, decode_config, data)
        if platform is not None:
            check_platform(f"{source.name}: {called}", config.platform, platform)
        if len(image.layers) != len(config.diff_ids):
            raise ManifestError(
                f"{DOCKER} has {len(image.layers)} layers of {called}, but the image config has "
                f"{len(config.diff_ids)} diff IDs"
            )
        pairs = zip(image.layers, config.diff_ids, strict=True)
        layers = [await _docker_layer(source, path, diff_id) for path, diff_id in pairs]
        digest = await trio.to_thread.run_sync(digest_of, data)
        config_descriptor = Descriptor(CONFIG_TYPE, digest, len(data))
        manifest = encode_manifest(config_descriptor, layers)
        descriptor = Descriptor(MANIFEST_TYPES[0], digest_of(manifest), len(manifest))
        await self._shelf.keep(digest, data)
        await self._shelf.keep(descriptor.digest, manifest)
        return _Image(
            (),
            descriptor,
            config_descriptor,
            config.platform,
            await _stacked(layers, config.diff_ids),
        )


def _promised(source: Source, image: _Image, names: tuple[Reference, ...]) -> tuple[Reference, ...]:
    """Check the digests in an image's names, or name it by its own digest."""
    digest = image.manifest.digest if image.index is None else image.index.digest
    if not names:
        return (attrs.evolve(parse_reference(NAMELESS), tag=None, digest=digest),)
    promised = []
    for name in names:
        if name.digest == image.config.digest:
            name = attrs.evolve(name, digest=image.manifest.digest)
        if name.digest not in (None, image.manifest.digest, digest):
            raise VerificationError(
                f"{source.name}: {name} is called by another digest than that of its manifest, "
                f"{image.manifest.digest}",
                digest=name.digest,
            )
        promised.append(name)
    return tuple(dict.fromkeys(promised))


async def _choose(source: Source, name: str, index: Index, wanted: Platform) -> Descriptor:
    """Choose the entry of an index for a platform, and check that its manifest is present.

    Archives often leave out the images for other platforms.
    """
    descriptor = await trio.to_thread.run_sync(choose_image, name, index, wanted)
    if await source.read(blob_path(descriptor.digest)) is not None:
        return descriptor
    there = {
        str(each.platform): None
        for each in index.images
        if each.platform is not None and await source.read(blob_path(each.digest)) is not None
    }
    if not there:
        raise _missing(source, descriptor)
    raise PlatformError(
        f"{name} has an entry for {descriptor.platform or wanted}, but lacks that image, "
        f"{descriptor.digest}: the source has {', '.join(list(there)[:_SHOWN])}"
    )


async def _is_strict(data: bytes, media_type: str) -> bool:
    """Whether a manifest is valid without reading missing or null lists as empty."""
    try:
        await trio.to_thread.run_sync(decode_manifest, data, media_type)
    except ManifestError:
        return False
    return True


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
            index = await decode(source, decode_document, data, media_type)
        except ManifestError:
            continue
        return Descriptor(index.media_type, Digest(digest), len(data))
    return None


async def _stacked(
    descriptors: Sequence[Descriptor], diff_ids: Sequence[DiffID]
) -> tuple[ImageLayer, ...]:
    return await off_the_loop(len(descriptors), partial(layers_of, descriptors, diff_ids))


async def _docker_layer(source: Source, path: str, diff_id: DiffID) -> Descriptor:
    item = await source.take(path)
    if item is None:
        raise ArchiveError(f"{source.name} lacks {printable_value(path)}, a layer")
    media_type = LAYER_TYPES.get(item.compression)
    if media_type is None:
        raise ArchiveError(
            f"{source.name}: the layer {printable_value(path)} is compressed by {item.compression}, for "
            "which manifests have no word: decompress it, or use gzip"
        )
    if item.compression is None and item.digest != diff_id:
        raise VerificationError(
            f"{source.name}: the layer {printable_value(path)} is {item.digest}, "
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
        f"a {printable_value(descriptor.media_type)}{hint}"
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


@final
class _StoredLayer(ImageSource):
    """A layer source (see `trio_layers.abc.StagedSource`) of a blob that is in the store, and held
    there: nothing is downloaded.
    """

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
