"""Keeps secrets in our requests out of the logs of httpx and httpcore."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, final

from .._printable import printable_line
from .http import URL

__all__ = ["discreet"]

_discreet: Final = ContextVar("trio_layers_discreet", default=False)


@contextmanager
def discreet() -> Iterator[None]:
    """Keep secrets of the requests in the block out of the logs of httpx and httpcore.

    URLs are logged without paths and queries, and header fields are left out, since these may have
    signatures or cookies. The requests of other code are logged as before.
    """
    token = _discreet.set(True)
    try:
        yield
    finally:
        _discreet.reset(token)


@final
class _Redaction(logging.Filter):
    # httpcore's messages in which header fields or the login at a proxy follow these words.
    _CUT_AFTER: Final = (
        "receive_response_headers.",
        "receive_response_body.",
        "setup_socks5_connection.",
    )

    def filter(self, record: logging.LogRecord) -> bool:
        if _discreet.get():
            if isinstance(record.args, tuple):
                record.args = tuple(map(_redact_value, record.args))
            words = str(record.msg).partition(" ")[0]
            if words.startswith(self._CUT_AFTER):
                record.msg = words
        return True


def _redact_value(value: object) -> object:
    if isinstance(value, URL):
        return f"{value.scheme}://{value.netloc.decode('ascii', 'replace')}"
    # The words of a status line may have control characters.
    return printable_line(value) if isinstance(value, str) else value


# A logger's filter does not apply to the loggers below it.
for _name in ("httpx", "httpcore.http11", "httpcore.http2", "httpcore.socks"):
    logging.getLogger(_name).addFilter(_Redaction())
