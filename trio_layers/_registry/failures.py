"""Converts errors of httpx and of connections to errors of the registry client."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

from .._errors import ClientClosed, RegistryError
from .._printable import printable_line
from .http import URL
from .http_send import connection_failed

__all__ = ["causes_of", "client_closed_error", "host_of", "request_error", "through_proxy"]


def client_closed_error() -> ClientClosed:
    """Return the error for a closed httpx client of the caller."""
    text = "the given httpx client is closed: keep it open as long as the registry client"
    return ClientClosed(text)


def through_proxy(proxy: str | None) -> str:
    """Return the words of an error that name the proxy, if there is one."""
    return "" if proxy is None else f" through the proxy {proxy}"


def request_error(text: str, host: str, error: Exception) -> RegistryError:
    """Return the error for a failed request, with the reason behind ``text``."""
    # httpx's exception for an OpenSSL error has no text, but its cause has one.
    texts = [str(error), *(str(each) for each in causes_of(error) if isinstance(each, OSError))]
    reason = next(filter(None, map(printable_line, texts)), type(error).__name__)
    return RegistryError(f"{text}: {reason}", host=host, transient=_may_pass(error))


def _may_pass(error: Exception) -> bool:
    """Return whether a new connection may succeed after this failure."""
    for cause in causes_of(error):
        if isinstance(cause, socket.gaierror):
            return cause.errno == socket.EAI_AGAIN  # the other errors are permanent
        if isinstance(cause, ssl.SSLError):
            # A connection that broke within TLS may succeed again. Other TLS errors, such as an
            # invalid certificate, are permanent.
            return isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError)
    return connection_failed(error)


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """Yield the causes and contexts of an error, the direct one first."""
    cause = error.__cause__ or error.__context__
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def host_of(url: URL) -> str:
    """Return host and port of a URL, for messages."""
    return printable_line(url.netloc.decode("ascii", "replace"))
