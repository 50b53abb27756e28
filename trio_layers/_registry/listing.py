"""Lists of registries: the tags of a repository, and the referrers of an image."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Final
from urllib.parse import urlencode

import attrs

from .._digest import Digest
from .._errors import ManifestError, NotFound, RegistryError
from .._manifest import INDEX_TYPES, Descriptor, Index, decode_manifest
from .._reference import Reference
from .documents import decode_large
from .endpoints import Endpoint, Endpoints, try_each
from .error_responses import mark_final
from .pagination import Pages, decode_tags
from .resolving import Resolver
from .response import RegistryResponse
from .retries import is_transient

__all__ = ["Lists"]

_JSON: Final = {"Accept": "application/json, */*"}
_REFERRERS: Final = {"Accept": f"{INDEX_TYPES[0]}, */*"}

_PAGE: Final = 1000
"""Number of tags to ask for at once; no known registry allows more."""

_PAGE_SIZE_REFUSED: Final = (400, 416, 422, 501)
"""Statuses of registries that refuse this page size."""

_NO_REFERRERS: Final = (400, 404, 405, 406, 501)
"""Statuses of registries without the referrers API."""


class Lists:
    """Fetches lists page by page.

    If a page fails, the next attempt at the same host goes on from that page.
    """

    def __init__(self, endpoints: Endpoints, resolver: Resolver) -> None:
        self._endpoints = endpoints
        self._resolver = resolver

    async def tags(self, reference: Reference) -> tuple[str, ...]:
        """See `RegistryClient.tags`."""
        subject = f"the tags of {reference.name}"
        retries = self._resolver.retries()
        # The pages that each host has sent so far.
        begun: dict[Endpoint, tuple[Pages, dict[str, None]]] = {}

        async def attempt(endpoint: Endpoint) -> tuple[str, ...]:
            try:
                return await fetch(endpoint, f"n={_PAGE}")
            except RegistryError as error:
                if error.status not in _PAGE_SIZE_REFUSED:
                    raise
            begun.pop(endpoint, None)
            return await fetch(endpoint, "")

        async def fetch(endpoint: Endpoint, query: str) -> tuple[str, ...]:
            def open_page(query: str) -> AbstractAsyncContextManager[RegistryResponse]:
                return endpoint.ask(reference, f"tags/list?{query}".rstrip("?"), subject, _JSON)

            pages, tags = begun.pop(endpoint, (Pages(query, subject, open_page, "list"), {}))
            try:
                async for page in pages:
                    await decode_large(_add_tags, page.data, page.host, tags)
                    retries.reset()
            except RegistryError as error:
                if is_transient(error):
                    begun[endpoint] = pages, tags
                raise
            return tuple(tags)

        endpoints = await self._endpoints.find(reference, "pull", "resolve")
        return await try_each(endpoints, attempt, retries)

    async def referrers(
        self, reference: Reference, digest: Digest, artifact_type: str | None
    ) -> tuple[Descriptor, ...]:
        """List the referrers of a manifest by the API, or else by the tag; not yet filtered."""
        found = await self._list_referrers(reference, digest, artifact_type)
        if found is None:
            found = await self._tagged_referrers(reference, digest)
        return found

    async def _list_referrers(
        self, reference: Reference, digest: Digest, artifact_type: str | None
    ) -> tuple[Descriptor, ...] | None:
        """List referrers by the API; ``None`` if no host has it."""
        path, subject = f"referrers/{digest}", f"the referrers of {reference.name}@{digest}"
        query = "" if artifact_type is None else urlencode({"artifactType": artifact_type})
        retries = self._resolver.retries()
        begun: dict[Endpoint, tuple[Pages, dict[Descriptor, None]]] = {}

        async def attempt(endpoint: Endpoint) -> tuple[Descriptor, ...]:
            def open_page(query: str) -> AbstractAsyncContextManager[RegistryResponse]:
                return endpoint.ask(reference, f"{path}?{query}".rstrip("?"), subject, _REFERRERS)

            pages, found = begun.pop(endpoint, (Pages(query, subject, open_page, digest), {}))
            try:
                async for page in pages:
                    if page.media_type != INDEX_TYPES[0]:
                        # Some servers send the same page for every path.
                        text = f"{page.host} sent something else than {subject}"
                        raise NotFound(text, host=page.host, status=404)
                    await decode_large(_add_referrers, page.data, page.media_type, found)
                    retries.reset()
            except RegistryError as error:
                if error.status in _NO_REFERRERS:
                    mark_final(error)  # this host lacks the API, so do not retry
                elif is_transient(error):
                    begun[endpoint] = pages, found
                raise
            return tuple(found)

        endpoints = await self._endpoints.find(reference)
        able = [endpoint for endpoint in endpoints if "referrers" in endpoint.capabilities]
        if not able:
            return None
        try:
            return await try_each(able, attempt, retries)
        except RegistryError as error:
            if error.status not in _NO_REFERRERS:
                raise
            return None

    async def _tagged_referrers(
        self, reference: Reference, digest: Digest
    ) -> tuple[Descriptor, ...]:
        """List referrers by the tag ``sha256-…``, as the specification's fallback."""
        tag = attrs.evolve(reference, tag=digest.replace(":", "-"), digest=None)
        try:
            _, _, document = await self._resolver.find_manifest(tag, None)
        except NotFound:
            return ()
        if not isinstance(document, Index):
            raise ManifestError(f"{tag} is not an index")
        return document.manifests


def _add_tags(data: bytes, host: str, tags: dict[str, None]) -> None:
    """Add a page's tags, one at a time.

    One call into C for all of them would hold the GIL for 200 ms.
    """
    for tag in decode_tags(data, host):
        tags[tag] = None


def _add_referrers(data: bytes, media_type: str, found: dict[Descriptor, None]) -> None:
    index = decode_manifest(data, media_type)
    assert isinstance(index, Index)
    for each in index.manifests:
        found[each] = None
