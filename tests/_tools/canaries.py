"""Secrets that must not be seen: in logs, in errors, in reprs, and by other hosts."""

from __future__ import annotations

import base64
import logging
import traceback
from collections.abc import Iterable

import httpx
import pytest

__all__ = ["Canaries"]


class Canaries:
    """Watches all that is logged, at any level, from when it is made."""

    def __init__(self, caplog: pytest.LogCaptureFixture, *secrets: str) -> None:
        caplog.set_level(logging.DEBUG)
        self._caplog = caplog
        self._secrets: set[str] = set()
        self.add(*secrets)

    def add(self, *secrets: str) -> None:
        """Watch for these; names and passwords are ``name:password``, in any encoding."""
        for secret in secrets:
            name, _, password = secret.rpartition(":")
            assert len(password) >= 4
            self._secrets |= {password, httpx.QueryParams({"x": password}).get("x")}
            self._secrets.add(str(httpx.QueryParams({"x": password}))[2:])
            self._secrets.add(base64.b64encode(password.encode()).decode())
            self._secrets.add(base64.b64encode(f"{name}:{password}".encode()).decode())

    def seen(self, text: str) -> list[str]:
        return [secret for secret in self._secrets if secret in text]

    def check(self, *things: object) -> None:
        """Nothing was logged, nor do these things show anything: exceptions with all that they
        are caused by, and others by their repr."""
        assert self._secrets
        for record in self._caplog.records:
            assert not self.seen(logging.Formatter().format(record)), record.name
            assert not self.seen(repr(record.args)), record.name
        for thing in things:
            if isinstance(thing, BaseException):
                assert not self.seen("".join(traceback.format_exception(thing)))
                assert not self.seen("".join(_reprs(thing)))
            assert not self.seen(repr(thing))
            assert not self.seen(str(thing))

    def check_requests(self, requests: Iterable[httpx.Request]) -> None:
        """None of these has anything anywhere."""
        for request in requests:
            head = repr((request.method, request.url, request.headers.raw))
            assert not self.seen(head + request.content.decode()), request.url


def _reprs(error: BaseException) -> Iterable[str]:
    following: BaseException | None = error
    while following is not None:
        yield repr(following) + repr(following.args)
        following = following.__cause__ or following.__context__
