"""Lists in pages: tags and referrers.

See the OCI distribution specification, ``spec.md``, "Listing Tags" and "Listing Referrers".
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final, TypeAlias, final
from urllib.parse import parse_qsl, quote, unquote

import attrs

from .._errors import RegistryError
from .._json import parse_json
from .._manifest import MAX_DOCUMENT_SIZE
from .encoding import looks_like_json, read_fitting
from .response import RegistryResponse

__all__ = ["OpenPage", "Page", "Pages", "decode_tags"]

log = logging.getLogger("trio_layers.registry")

# The limits for one list of any length: bytes to read, and requests.
MAX_LIST_SIZE: Final = 64 * 1024 * 1024
MAX_PAGES: Final = 10_000
MAX_QUERY: Final = 8 * 1024

OpenPage: TypeAlias = Callable[[str], AbstractAsyncContextManager[RegistryResponse]]
"""Asks for the page with this query."""

_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
# The grammar of RFC 8288, section 3. Some registries write a target without brackets: it ends at a
# semicolon, at white space, or at a comma before white space, the next link or the field's end.
_TARGET = re.compile(r"[\s,]*(?:<([^<>]*)>|([^<>;\s,](?:[^<>;\s,]|,(?![\s<]|\Z))*))")
_PARAMETER = re.compile(
    r"""\s*;\s*(?P<name>[^\s=;,]*)\s*(?:=\s*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<token>[^\s;,]*)))?"""
)


@attrs.frozen
class Page:
    """One page with its host and media type."""

    host: str
    media_type: str
    data: bytes


@final
class Pages:
    """Fetches one page after the other, within bounds.

    Args:
        query: The query of the first page.
        subject: The requested thing in words, for errors.
        open: Requests a page.
        ending: The last part of the list's path.
    """

    def __init__(self, query: str, subject: str, open: OpenPage, ending: str) -> None:
        self._following: str | None = query
        self._what = subject
        self._open = open
        self._ending = ending
        self._seen: set[_Place] = set()
        self._size = 0

    def __aiter__(self) -> AsyncIterator[Page]:
        return self

    async def __anext__(self) -> Page:
        query = self._following
        if query is None:
            raise StopAsyncIteration
        place = _place(query)
        self._seen.add(place)
        async with self._open(query) as answer:
            data = await read_fitting(answer, MAX_DOCUMENT_SIZE, looks_like_json)
            fields = answer.headers.get_list("Link")
        self._size += len(data)
        if len(data) > MAX_DOCUMENT_SIZE:
            raise self._endless(answer, f"a page of more than {MAX_DOCUMENT_SIZE} bytes")
        if self._size > MAX_LIST_SIZE or len(self._seen) > MAX_PAGES:
            raise self._endless(answer, f"more than {MAX_LIST_SIZE} bytes or {MAX_PAGES} pages")
        if sum(map(len, fields)) > MAX_QUERY:
            raise self._endless(answer, f"a next page of more than {MAX_QUERY} characters")
        try:
            following = next_query(fields, self._ending)
        except ValueError:
            # Ignoring the link would make a truncated list look complete.
            raise self._endless(answer, "a link to the next page that cannot be read") from None
        if following is not None and _place(following) == place:
            # Some registries' last page links to itself.
            following = None
        if following is not None and _place(following) in self._seen:
            raise self._endless(answer, "a page that is followed by one that was there before")
        self._following = following
        return Page(answer.host, answer.media_type, data)

    def _endless(self, answer: RegistryResponse, how: str) -> RegistryError:
        text = f"{answer.host} sent {how} for {self._what}"
        return RegistryError(text, host=answer.host, status=answer.status)


_Place: TypeAlias = tuple[tuple[str, str], ...]


def _place(query: str) -> _Place:
    """Return a query's sorted parameters without the page size.

    Two queries with equal results lead to the same position in a list.
    """
    members = parse_qsl(query, keep_blank_values=True)
    return tuple(sorted(member for member in members if member[0] != "n"))


def next_query(fields: Sequence[str], ending: str) -> str | None:
    """Return the next page's query from ``Link`` fields (RFC 8288).

    ``None``: this page is the last. A link's host and path are ignored, because all pages of a list
    are requested from the host and path of the first.

    Args:
        fields: The fields' values.
        ending: The last part of the list's path. A link without a query must lead there.

    Raises:
        ValueError: if a field cannot be read, or the next page's link has no query and another
            path.
    """
    links = [link for field in fields for link in _links(field)]
    following = [target for target, relations in links if relations and "next" in relations]
    following += [target for target, relations in links if relations is None]
    if not following:
        return None
    if not following[0]:
        return None  # an empty link leads to this page itself
    path, mark, query = following[0].partition("#")[0].partition("?")
    if not mark and path and unquote(path).rpartition("/")[2] != ending:
        raise ValueError("there is no query in it")
    return quote(query, safe="%&=+/:?@!$'()*,;~")


def _links(field: str) -> Iterator[tuple[str, list[str] | None]]:
    """Yield a ``Link`` field's targets, each with its relations or ``None``.

    Raises:
        ValueError: if the field cannot be read.
    """
    position = 0
    while field[position:].strip(" \t,"):
        match = _TARGET.match(field, position)
        if match is None:
            raise ValueError("there is no target")
        target, relations = match[1] if match[2] is None else match[2], None
        position = match.end()
        while (parameter := _PARAMETER.match(field, position)) is not None:
            position = parameter.end()
            if parameter["name"].lower() == "rel" and relations is None:
                relation = parameter["quoted"] or parameter["token"] or ""
                relations = relation.strip("\"'").lower().split()
        yield target.strip("\"'"), relations
        if field[position:].lstrip()[:1] not in ("", ","):
            raise ValueError("something follows a link")


def decode_tags(data: bytes, host: str) -> list[str]:
    """Return a page's tags, without invalid ones, which could not be requested.

    Raises:
        RegistryError: if the page is not a list of tags.
    """
    try:
        document = parse_json(data)
    except ValueError:
        document = None
    found: object = False
    if isinstance(document, dict):
        # A missing member or null is an empty list, unless the document reports errors. Go's
        # decoder accepts the name in any case.
        empty = False if document.get("errors") else None
        found = next((document[name] for name in document if name.lower() == "tags"), empty)
    if found is None:
        return []
    if not isinstance(found, list):
        raise RegistryError(
            f"{host} sent something else than a list of tags", host=host, status=200
        )
    tags = [tag for tag in found if isinstance(tag, str) and _TAG.fullmatch(tag)]
    if len(tags) < len(found):
        log.info("%s lists %d tags that are none", host, len(found) - len(tags))
    return tags
