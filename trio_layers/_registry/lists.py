"""Lists that come in pages: tags and referrers (OCI distribution specification, ``spec.md``,
"Listing Tags" and "Listing Referrers")."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, TypeAlias, final
from urllib.parse import quote

import attrs

from .._errors import RegistryError
from .._manifest import MAX_DOCUMENT_SIZE
from .encoding import looks_like_json, read_fitting
from .transport import Answer

__all__ = ["OpenPage", "Page", "Pages", "decode_tags"]

log = logging.getLogger("trio_layers.registry")

# However long the list: so much of it is read, in bytes, and so many requests are made.
MAX_LIST_SIZE: Final = 64 * 1024 * 1024
MAX_PAGES: Final = 10_000
MAX_QUERY: Final = 8 * 1024

OpenPage: TypeAlias = Callable[[str], AbstractAsyncContextManager[Answer]]
"""Asks for the page with this query."""

_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_LINK = re.compile(r"<([^<>]*)>([^<>]*)")
_RELATION = re.compile(r""";\s*rel\s*=\s*(?:"([^"]*)"|([^\s;,"]*))""", re.IGNORECASE)


@attrs.frozen
class Page:
    """One page: who sent it, as what, and what."""

    host: str
    media_type: str
    data: bytes


@final
class Pages:
    """Fetches one page after the other, within bounds.

    Args:
        query: That of the first page.
        what: What is asked for, in words, for errors.
        open: Asks for a page.
    """

    def __init__(self, query: str, what: str, open: OpenPage) -> None:
        self._following: str | None = query
        self._what = what
        self._open = open
        self._seen: set[str] = set()
        self._size = 0

    def __aiter__(self) -> AsyncIterator[Page]:
        return self

    async def __anext__(self) -> Page:
        query = self._following
        if query is None:
            raise StopAsyncIteration
        self._seen.add(query)
        async with self._open(query) as answer:
            data = await read_fitting(answer, MAX_DOCUMENT_SIZE, looks_like_json)
            self._following = next_query(answer.headers.get("Link", ""))
        self._size += len(data)
        if len(data) > MAX_DOCUMENT_SIZE:
            raise self._endless(answer, f"a page of more than {MAX_DOCUMENT_SIZE} bytes")
        if self._size > MAX_LIST_SIZE or len(self._seen) > MAX_PAGES:
            raise self._endless(answer, f"more than {MAX_LIST_SIZE} bytes or {MAX_PAGES} pages")
        if self._following is not None and len(self._following) > MAX_QUERY:
            raise self._endless(answer, f"a next page of more than {MAX_QUERY} characters")
        if self._following in self._seen:
            raise self._endless(answer, "a page that is followed by one that was there before")
        return Page(answer.host, answer.media_type, data)

    def _endless(self, answer: Answer, how: str) -> RegistryError:
        text = f"{answer.host} sent {how} for {self._what}"
        return RegistryError(text, host=answer.host, status=answer.status)


def next_query(link: str) -> str | None:
    """Which query leads to the page after that with this ``Link`` field (RFC 8288); ``None``: it
    is the last. Only the query counts: a list does not go on at another host or path."""
    for target, parameters in _LINK.findall(link):
        relation = _RELATION.search(parameters)
        if relation is None or "next" in (relation[1] or relation[2]).lower().split():
            query = target.partition("#")[0].partition("?")[2]
            return quote(query, safe="%&=+/:?@!$'()*,;~")
    return None


def decode_tags(data: bytes, host: str) -> list[str]:
    """A page's tags. What cannot be one, and so cannot be asked for, is left out.

    Raises:
        RegistryError: if it is no list of tags.
    """
    try:
        document: object = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    found = document.get("tags", False) if isinstance(document, dict) else False
    if found is None:  # docker-registry's way to write an empty list
        return []
    if not isinstance(found, list):
        raise RegistryError(
            f"{host} sent something else than a list of tags", host=host, status=200
        )
    tags = [tag for tag in found if isinstance(tag, str) and _TAG.fullmatch(tag)]
    if len(tags) < len(found):
        log.info("%s lists %d tags that are none", host, len(found) - len(tags))
    return tags
