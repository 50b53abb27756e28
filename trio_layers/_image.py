"""The layers of an image, and the choice among stored images, for pulls and archives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

import attrs
import trio

from ._catalog.rows import StoredImage
from ._digest import ChainID, DiffID, Digest, RootFS, extend_chain, parse_digest
from ._errors import InvalidDigest, ManifestError, VerificationError
from ._manifest import Descriptor
from ._platform import Platform, choose, host_platform, parse_platform

__all__ = [
    "ImageLayer",
    "ImageSource",
    "check_diff_ids",
    "check_storable",
    "choose_stored",
    "layers_of",
    "off_the_loop",
]

T = TypeVar("T")

# Work on 256 layers takes about a millisecond, as long as the round trip to a worker thread.
_FEW: Final = 256


@attrs.frozen
class ImageLayer:
    """A layer of an image.

    Attributes:
        descriptor: The layer's blob: media type, digest, and size in bytes.
        diff_id: The digest of its uncompressed tar.
        chain_id: Identifies the layer together with all layers below it.
    """

    descriptor: Descriptor
    diff_id: DiffID
    chain_id: ChainID


def layers_of(
    descriptors: Sequence[Descriptor], diff_ids: Sequence[DiffID]
) -> tuple[ImageLayer, ...]:
    """Return the layers of a manifest and a config that agree on their number."""
    layers = []
    chain: ChainID | None = None
    for descriptor, diff_id in zip(descriptors, diff_ids, strict=True):
        chain = extend_chain(chain, diff_id)
        layers.append(ImageLayer(descriptor, diff_id, chain))
    return tuple(layers)


async def off_the_loop(layers: int, work: Callable[[], T]) -> T:
    """Run work on an image's layers, in a thread for many layers.

    This function is a checkpoint in any case.
    """
    if layers > _FEW:
        return await trio.to_thread.run_sync(work)
    await trio.lowlevel.checkpoint()
    return work()


def check_storable(digests: Iterable[Digest]) -> None:
    """Check that the store accepts these digests, before any download.

    Raises:
        ManifestError: if a digest is of another algorithm than SHA-256.
    """
    for digest in digests:
        try:
            parse_digest(digest)
        except InvalidDigest as error:
            raise ManifestError(
                f"{digest} is part of the image, and the store keeps what has a SHA-256 digest only"
            ) from error


def check_diff_ids(layers: tuple[ImageLayer, ...], rootfs: RootFS) -> None:
    """Compare the diff IDs of the unpacked layers with those in the config.

    This is not a check of the registration: a download may serve images with different configs, and
    only the pull of the wrong config must fail.

    Raises:
        VerificationError: if one differs.
    """
    for layer, diff_id in zip(layers, rootfs.diff_ids, strict=True):
        if diff_id != layer.diff_id:
            raise VerificationError(
                f"layer {layer.descriptor.digest} unpacks to {diff_id}, "
                f"but the image's config says {layer.diff_id}",
                digest=layer.diff_id,
            )


def choose_stored(images: Sequence[StoredImage], platform: Platform | None) -> StoredImage | None:
    """Return the stored image that a pull for the platform would bring.

    See `RegistryClient.resolve_image`. Of equal images, the one stored last is chosen.
    """
    offered = [parse_platform(image.platform) if image.platform else None for image in images]
    index = choose(platform or host_platform(), offered)
    if index is not None:
        return images[index]
    if platform is not None:
        return None
    return next((image for image in images if image.index is None), None)


class ImageSource:
    """The properties that the engine needs of any source of an image's layer.

    See `trio_layers.abc.LayerSource`. The key is the blob's digest.
    """

    def __init__(self, layer: ImageLayer) -> None:
        self._diff_id = layer.diff_id
        self.descriptor = layer.descriptor
        self.key = f"v2:{layer.descriptor.digest}"
        self.id = layer.descriptor.digest.removeprefix("sha256:")[:12]

    def diff_id(self) -> DiffID:
        return self._diff_id
