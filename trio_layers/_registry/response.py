"""The response of a registry while its body is open."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Final, final

import attrs

from .._printable import printable_line
from .http import URL, Headers
from .redaction import without_secrets

__all__ = ["RegistryResponse"]

# Number of bytes of a body to read so that its connection can be used again.
MAX_SKIPPED: Final = 64 * 1024


@final
@attrs.frozen(eq=False)
class RegistryResponse:
    """A response while its body is open.

    Attributes:
        host: Host and port of the server that sent it, which after a redirect is another one than
            the requested.
        status: The HTTP status.
        headers: The header fields; a name may occur several times.
        redirected: Whether another origin sent the response, or led back to this one.
        location: The target of a redirect; ``None`` if the response is no redirect.
        chunks: The body as it arrives, without any content decoding.
        secrets: Returns the secrets of the request, which messages must not show.
        url: The URL that this response came from.
    """

    host: str
    status: int
    # They may contain signed URLs and cookies, which a repr must not show.
    headers: Headers = attrs.field(repr=False)
    redirected: bool
    location: URL | None = attrs.field(repr=False)
    chunks: AsyncIterator[bytes] = attrs.field(repr=False)
    secrets: Callable[[], frozenset[str]] = attrs.field(default=frozenset, repr=False)
    url: URL | None = attrs.field(default=None, repr=False)

    def printable_line(self, text: str) -> str:
        """Return a text of the server for a message: printable, and without secrets."""
        return printable_line(without_secrets(text, self.secrets()))

    @property
    def media_type(self) -> str:
        """The media type of the body, without parameters; empty if it is missing."""
        value: str = self.headers.get("Content-Type", "")
        return value.partition(";")[0].strip().lower()

    async def read(self, limit: int) -> bytes:
        """Return the body, or the beginning of a body of more than ``limit`` bytes.

        That beginning is longer than ``limit``, by less than one chunk.
        """
        data = bytearray()
        async for chunk in self.chunks:
            data += chunk
            if len(data) > limit:
                break
        return bytes(data)

    async def skip(self) -> None:
        """Read the rest of a short body, so that the connection can be used again.

        A connection is closed if its body is left before the end.
        """
        await self.read(MAX_SKIPPED)
