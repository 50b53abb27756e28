"""Converts unsuccessful responses to errors."""

from __future__ import annotations

import email.utils
import re
from typing import TYPE_CHECKING, Final, TypeVar

import attrs

from .._errors import (
    AuthenticationError,
    DoNotRetry,
    NotFound,
    RateLimited,
    RegistryError,
)
from .._json import parse_json

if TYPE_CHECKING:
    from .response import RegistryResponse

__all__ = [
    "PATIENCE",
    "RateLimit",
    "mark_final",
    "rate_limit",
    "read_error",
]

_QUOTA: Final = re.compile(r"\s*(\d{1,9})\s*(?:;\s*w=(\d{1,9}))?\s*\Z", re.ASCII)

MAX_ERROR_SIZE: Final = 16 * 1024

PATIENCE: Final = 60.0
"""Seconds. A longer ``Retry-After`` is not obeyed, and the error is final."""

ErrorT = TypeVar("ErrorT", bound=Exception)


@attrs.frozen
class RateLimit:
    """A registry's rate limit, as Docker Hub announces it.

    See its documentation, "Usage and rate limits".

    Attributes:
        limit: Number of requests in a window.
        remaining: Number of requests that are left.
        window: The window's length in seconds; ``None`` if it is not given.
        source: The counted client: an address, or an account's ID; ``None`` if it is not given.
    """

    limit: int
    remaining: int
    window: int | None = None
    source: str | None = None


def rate_limit(answer: RegistryResponse) -> RateLimit | None:
    """Return the rate limit in a response's header."""
    limit, window = _quota(answer.headers.get("ratelimit-limit", ""))
    remaining, _ = _quota(answer.headers.get("ratelimit-remaining", ""))
    if limit is None or remaining is None:
        return None
    source = answer.printable_line(answer.headers.get("docker-ratelimit-source", ""))
    return RateLimit(limit, remaining, window, source or None)


def _quota(field: str) -> tuple[int | None, int | None]:
    """Parse ``100;w=21600``: a number of requests, and a window in seconds."""
    match = _QUOTA.match(field)
    if match is None:
        return None, None
    return int(match[1]), None if match[2] is None else int(match[2])


async def read_error(
    answer: RegistryResponse, subject: str, *, sent_there: bool = False
) -> RegistryError:
    """Return the error for an unsuccessful response; the caller raises it.

    The error quotes the first error of the body (distribution specification, "Error Codes"), but no
    secret that was sent to the server. Client errors are final (see `mark_final`), except for 408,
    416 and 429. A 429 or 503 with a ``Retry-After`` of more than `PATIENCE` is final, too. A client
    error of a host that the registry redirected to is not final, because the next redirect has
    another URL, whose signature has not expired. A 404 with a registry's error text, and a 401 with
    a challenge, are final there, too.

    Args:
        answer: The response, with its body unread.
        subject: The requested thing in words.
        sent_there: Whether a registry redirected to this host.

    Raises:
        RegistryError: if the connection breaks meanwhile.
    """
    said = answer.printable_line(_first_error(await answer.read(MAX_ERROR_SIZE)))
    host, status = answer.host, answer.status
    text = f"{host} answered {status} for {subject}{said and ': '}{said}"
    # A redirect's target that sends a challenge, or an error text with a 404, is a registry itself
    # and no storage: its refusal is final.
    asks = status == 401 and "WWW-Authenticate" in answer.headers
    sent_there = sent_there and not (asks or (status == 404 and said))
    # 408 is the server's own timeout, and 416 to a request without a Range comes from a confused
    # cache: another attempt may succeed.
    final = 400 <= status < 500 and status not in (408, 416, 429) and not sent_there
    error = RegistryError(text, host=host, status=status)
    match status:
        case 401 | 403:
            if not sent_there:
                text += " (it may want a login, or other credentials)"
            error = AuthenticationError(text, host=host, status=status)
        case 404:
            error = NotFound(text, host=host, status=status)
        case 429 | 503:
            retry_after = _retry_after(answer)
            if retry_after is not None:
                text += f" (it asks to wait for {retry_after:g} seconds)"
            if status == 429 or retry_after is not None:
                error = RateLimited(text, host=host, status=status, retry_after=retry_after)
                # An earlier request would only make it worse.
                final = (retry_after or 0) > PATIENCE
    error.transient = status in (408, 429) or status >= 500 or (sent_there and status >= 400)
    return mark_final(error) if final else error


def mark_final(error: ErrorT) -> ErrorT:
    """Mark an error as one that another attempt cannot avoid."""
    error.__cause__ = DoNotRetry(str(error))
    return error


def _first_error(body: bytes) -> str:
    try:
        document = parse_json(body[:MAX_ERROR_SIZE])
    except ValueError:
        return ""  # the body is some proxy's page
    errors = document.get("errors") if isinstance(document, dict) else None
    first = errors[0] if isinstance(errors, list) and errors else None
    if not isinstance(first, dict):
        return ""
    texts = (first.get("code"), first.get("message"))
    return ": ".join(text for text in texts if isinstance(text, str) and text)


def _retry_after(answer: RegistryResponse) -> float | None:
    """Return the seconds of a ``Retry-After``, from a number or a date (RFC 9110, 10.2.3).

    A date counts from the response's own date, so that the clocks need not agree.
    """
    value = answer.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdecimal():
        return float(value[:9])
    try:
        then = email.utils.parsedate_to_datetime(value)
        now = email.utils.parsedate_to_datetime(answer.headers.get("Date", ""))
        return max(0.0, (then - now).total_seconds())
    except (ValueError, TypeError, OverflowError):  # TypeError: one of them has no time zone
        return None
