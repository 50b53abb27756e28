"""From a reference to an image: its manifest and config, through indexes, all verified."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias, final

import attrs

from .._digest import DiffID, Digest, digest_of
from .._errors import ManifestError, RegistryError
from .._manifest import (
    MAX_DOCUMENT_SIZE,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    check_image,
    check_layer_count,
    decode_config,
    decode_manifest,
)
from .._platform import Platform, host_platform
from .._reference import Reference
from .._select import check_platform, choose_image, walk_index
from .documents import (
    BLOBS,
    MANIFESTS,
    capabilities_for,
    decode_large,
    descriptor_of,
    fetch_manifest,
    read_verified,
)
from .endpoints import Endpoint, Endpoints, try_each
from .http_send import never_connected
from .retries import Announce, Retries

__all__ = ["Known", "ResolvedImage", "Resolver"]

log = logging.getLogger("trio_layers.registry")


@attrs.frozen
class ResolvedImage:
    """The documents of a reference's image for one platform, all verified.

    Attributes:
        reference: The requested reference.
        descriptor: The image's manifest. Its digest identifies the image.
        manifest: The decoded manifest.
        manifest_bytes: The manifest as it was served.
        config: The decoded config of the image; ``config.raw`` is as it was served.
        index: The index that listed the manifest; ``None`` if the reference leads to the manifest
            itself.
        index_bytes: The index as it was served.
    """

    reference: Reference
    descriptor: Descriptor
    manifest: Manifest
    manifest_bytes: bytes = attrs.field(repr=False)
    config: ImageConfig
    index: Descriptor | None = None
    index_bytes: bytes | None = attrs.field(default=None, repr=False)

    @property
    def layers(self) -> tuple[Descriptor, ...]:
        """The layers' blobs, bottom first."""
        return self.manifest.layers

    @property
    def diff_ids(self) -> tuple[DiffID, ...]:
        """The digests of the uncompressed layers, in the order of `layers`."""
        return self.config.diff_ids

    @property
    def config_bytes(self) -> bytes:
        """The image's config as it was served."""
        return self.config.raw


Known: TypeAlias = Callable[[Digest], Awaitable[bytes | None]]
"""Returns the document of a digest, if it is at hand."""


@final
class Resolver:
    """Resolves references at their registries.

    Args:
        endpoints: The hosts of the registries.
        retry_tick: See `Retries`.
    """

    def __init__(self, endpoints: Endpoints, retry_tick: float) -> None:
        self._endpoints = endpoints
        self._retry_tick = retry_tick

    def retries(self, announce: Announce | None = None) -> Retries:
        """Return a new count of the attempts at one request."""
        return Retries(announce, tick=self._retry_tick)

    async def look_up(
        self, reference: Reference, announce: Announce | None
    ) -> tuple[Descriptor, bytes | None]:
        """Return the descriptor of a manifest or index, and its bytes if they were fetched."""
        path = f"manifests/{reference.fetched_by}"
        subject = f"the manifest of {reference}"

        async def attempt(endpoint: Endpoint) -> tuple[Descriptor, bytes | None]:
            try:
                async with endpoint.ask(reference, path, subject, MANIFESTS, "HEAD") as answer:
                    found = descriptor_of(answer)
                if found is not None and reference.digest in (None, found.digest):
                    return found, None
            except RegistryError as error:
                if never_connected(error.__cause__):
                    raise
                # Some registries refuse HEAD alone, with any status. If GET fails as well, the
                # error of GET is raised.
                log.debug("HEAD is refused, and GET tried: %s", error)
            return await fetch_manifest(endpoint, reference)

        endpoints = await self._endpoints.find(reference, *capabilities_for(reference))
        return await try_each(endpoints, attempt, self.retries(announce))

    async def resolve_image(
        self,
        reference: Reference,
        platform: Platform | None,
        known: Known | None,
        head_first: bool,
        announce: Announce | None,
    ) -> ResolvedImage:
        """See `RegistryClient.resolve_image`."""
        known = known or _know_nothing
        wanted = platform or host_platform()
        first = await self._recall_manifest(reference, known, announce) if head_first else None
        top, data, document = first or await self.find_manifest(reference, announce)
        first = None
        index_bytes = data if isinstance(document, Index) else None
        loaded: list[Manifest | Index] = [document]
        del document

        async def is_index(descriptor: Descriptor) -> bool:
            nonlocal data
            if not loaded:
                data = await self._get_document(
                    reference, "manifests", MANIFESTS, descriptor, known, announce
                )
                loaded.append(await decode_large(decode_manifest, data, descriptor.media_type))
            return isinstance(loaded[0], Index)

        async def entry_of(descriptor: Descriptor) -> Descriptor:
            return await decode_large(_choose_and_free, data, str(reference), loaded, wanted)

        descriptor, index = await walk_index(top, is_index=is_index, entry_of=entry_of)
        [manifest] = loaded
        assert isinstance(manifest, Manifest)
        await decode_large(_check_image, data, manifest)
        config_bytes = await self._get_document(
            reference, "blobs", BLOBS, manifest.config, known, announce
        )
        listed = None if index is None else descriptor.platform
        config = await decode_large(decode_config, config_bytes, listed)
        check_layer_count(manifest, config)
        # An index's entry need not name its platform, and an image without an index never does.
        if listed is None and (index is not None or platform is not None):
            check_platform(str(reference), config.platform, wanted)
        return ResolvedImage(reference, descriptor, manifest, data, config, index, index_bytes)

    async def _recall_manifest(
        self, reference: Reference, known: Known, announce: Announce | None
    ) -> tuple[Descriptor, bytes, Manifest | Index] | None:
        """Return the document of a reference, if it is known; ``None`` if it must be fetched."""
        found, data = await self.look_up(reference, announce)
        if data is None:
            data = await known(found.digest)
            if data is None or len(data) != found.size:
                return None
            if await decode_large(digest_of, data) != found.digest:
                return None
        try:
            return found, data, await decode_large(decode_manifest, data, found.media_type)
        except ManifestError:
            # The host may be wrong, or no registry at all, so the document must be fetched.
            return None

    async def find_manifest(
        self, reference: Reference, announce: Announce | None
    ) -> tuple[Descriptor, bytes, Manifest | Index]:
        """Fetch and decode the document of a reference, verified if its digest is known."""

        async def attempt(endpoint: Endpoint) -> tuple[Descriptor, bytes, Manifest | Index]:
            found, data = await fetch_manifest(endpoint, reference)
            # Decoded in here, since a mirror may answer with any page, and the next host is right.
            return found, data, await decode_large(decode_manifest, data, found.media_type)

        endpoints = await self._endpoints.find(reference, *capabilities_for(reference))
        return await try_each(endpoints, attempt, self.retries(announce))

    async def _get_document(
        self,
        reference: Reference,
        kind: str,
        headers: Mapping[str, str],
        descriptor: Descriptor,
        known: Known,
        announce: Announce | None,
    ) -> bytes:
        """Fetch a manifest (``manifests``) or config (``blobs``) by its descriptor, verified."""
        digest, size = descriptor.digest, descriptor.size
        if size > MAX_DOCUMENT_SIZE:
            raise ManifestError(f"{digest} has {size} bytes, more than {MAX_DOCUMENT_SIZE}")
        there = await known(digest)
        if there is not None and len(there) != size:
            there = None
        if there is not None and await decode_large(digest_of, there, digest) == digest:
            return there
        if descriptor.data is not None:
            return descriptor.data
        path = f"{kind}/{digest}"
        subject = f"{descriptor.media_type} {digest} of {reference}"

        async def attempt(endpoint: Endpoint) -> bytes:
            return await read_verified(
                endpoint, reference, path, subject, headers, digest, size, size
            )

        endpoints = await self._endpoints.find(reference, "pull")
        return await try_each(endpoints, attempt, self.retries(announce))


async def _know_nothing(digest: Digest) -> bytes | None:
    return None


def _choose_and_free(
    data: bytes, name: str, loaded: list[Manifest | Index], wanted: Platform
) -> Descriptor:
    """Choose an entry of the index, and free the index.

    This is for `decode_large`. Choosing takes longer for a larger document, and freeing a large one
    takes 20 ms, so both must be possible in a thread. The list has the only reference.
    """
    index = loaded.pop()
    assert isinstance(index, Index)
    return choose_image(name, index, wanted)


def _check_image(data: bytes, manifest: Manifest) -> None:
    check_image(manifest)
