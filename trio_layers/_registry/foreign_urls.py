"""Foreign layers, which a registry need not have, by the URLs in their manifest.

The author of the manifest chose the URLs, and need not be the registry's operator. So these URLs
get nothing of the registry's credentials and header fields, and plain HTTP to this machine is only
for images from this machine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final, final

from .._errors import LayersError, RegistryError
from .._printable import printable_line
from .._reference import Reference
from .blobs import EntityTags
from .error_responses import mark_final, read_error
from .hosts import parse_url
from .http import URL, InvalidURL
from .response import RegistryResponse
from .transport import Transport

__all__ = ["MAX_URLS", "ForeignURL"]

MAX_URLS: Final = 8
"""Maximum number of URLs to try for a layer."""


@final
class ForeignURL:
    """A URL of a foreign layer, with the methods of an `Endpoint`, and without credentials.

    It is never skipped as unreachable: it may be the only place of the layer.

    Args:
        text: The URL, as the manifest has it.
        transport: Sends the requests. It allows plain HTTP where a redirect may lead to it.
    """

    trouble: Final = None

    def __init__(self, text: str, transport: Transport) -> None:
        self.tags = EntityTags()
        self._transport = transport
        self._url: URL | None = None
        self.name, self._refused = "a URL", ""
        try:
            # A user name and password in the URL would be sent.
            url = parse_url(text).copy_with(username=None, password=None)
        except InvalidURL as error:
            self._refused = f"it is none: {printable_line(str(error))}"
            return
        self.name = url.netloc.decode("ascii", "replace") or self.name
        if not url.host or url.scheme not in ("https", "http"):
            self._refused = f"it has the scheme {printable_line(url.scheme)!r}, or no host"
        elif not transport.allows(url, url):
            self._refused = "it is plain HTTP: allow that if it is meant"
        else:
            self._url = url

    def __repr__(self) -> str:
        return f"<ForeignURL {self.name}>"

    def note(self, error: LayersError) -> None:
        """Do nothing: a failure is not remembered."""

    @asynccontextmanager
    async def ask(
        self, reference: Reference, path: str, subject: str, headers: Mapping[str, str]
    ) -> AsyncIterator[RegistryResponse]:
        """See `Endpoint.ask`."""
        if self._url is None:
            message = f"{self.name}, in the manifest, is not asked for {subject}: {self._refused}"
            raise mark_final(RegistryError(message, host=self.name))
        async with self._transport.get(self._url, subject, headers=headers) as answer:
            if 200 <= answer.status < 300 or ("Range" in headers and answer.status == 416):
                yield answer
                return
            error = await read_error(answer, subject)
        raise error
