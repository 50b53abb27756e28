"""Checks that secrets appear in no log, error or repr, and reach no foreign host."""

from __future__ import annotations

import base64
import gc
import logging
import pickle
import traceback
from collections.abc import Iterable, Iterator, Mapping

import httpx
import pytest

from trio_layers._errors import LayersError

__all__ = ["Canaries"]


class Canaries:
    """Records all log messages, at any level, from its creation on."""

    def __init__(self, caplog: pytest.LogCaptureFixture, *secrets: str) -> None:
        caplog.set_level(logging.DEBUG)
        self._caplog = caplog
        self._secrets: set[str] = set()
        self.add(*secrets)

    def add(self, *secrets: str) -> None:
        """Watch for these secrets, in any encoding. A login is ``name:password``."""
        for secret in secrets:
            self._secrets |= _forms(secret)

    def seen(self, text: str) -> list[str]:
        return [secret for secret in self._secrets if secret in text]

    def check(self, *things: object) -> None:
        """Check that neither the log nor these objects show a secret. An exception is searched with
        its traceback, causes and attributes; any other object by its repr.
        """
        assert self._secrets
        for record in self._caplog.records:
            assert not self.seen(logging.Formatter().format(record)), record.name
            assert not self.seen(repr((record.msg, record.args))), record.name
        for thing in things:
            if isinstance(thing, BaseException):
                assert not self.seen("".join(traceback.format_exception(thing)))
                for each in _all_of(thing):
                    assert not self.seen(f"{each}{each!r}{each.args!r}"), type(each)
                    assert not self.seen(repr(getattr(each, "__notes__", None))), type(each)
                    if isinstance(each, LayersError):
                        assert not self.seen(repr(vars(each))), type(each)
                        assert not self.seen(pickle.dumps(each).decode("latin-1")), type(each)
            assert not self.seen(repr(thing))
            assert not self.seen(str(thing))

    def check_objects(self) -> None:
        """Check that no living object of the library shows a secret in its repr."""
        gc.collect()  # objects of earlier tests
        there = [each for each in gc.get_objects() if _is_ours(type(each))]
        assert there
        for each in there:
            assert not self.seen(repr(each)), type(each)

    def check_requests(self, requests: Iterable[httpx.Request]) -> None:
        """Check that no part of these requests contains a secret."""
        for request in requests:
            assert not self.seen(_text(request)), request.url

    def reached(self, requests: Iterable[httpx.Request], secret: str) -> set[str]:
        """Return the origins that received a secret."""
        forms = _forms(secret)
        return {
            _origin(request)
            for request in requests
            if any(form in _text(request) for form in forms)
        }

    def check_origins(
        self, requests: Iterable[httpx.Request], origins: Mapping[str, Iterable[str]]
    ) -> None:
        """Check that each secret reached only its own origins."""
        requests = list(requests)
        for secret, allowed in origins.items():
            assert self.reached(requests, secret) <= set(allowed), secret


def _forms(secret: str) -> set[str]:
    name, _, password = secret.rpartition(":")
    assert len(password) >= 4
    return {
        password,
        str(httpx.QueryParams({"x": password}))[2:],
        base64.b64encode(password.encode()).decode(),
        base64.b64encode(f"{name}:{password}".encode()).decode(),
    }


def _origin(request: httpx.Request) -> str:
    return f"{request.url.scheme}://{request.url.netloc.decode()}"


def _text(request: httpx.Request) -> str:
    head = repr((request.method, str(request.url), request.headers.raw))
    return head + request.content.decode()


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "trio_layers"


def _all_of(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception with its causes and contexts, shown in tracebacks or not."""
    waiting, done = [error], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) in done:
            continue
        done.add(id(each))
        yield each
        waiting += [other for other in (each.__cause__, each.__context__) if other is not None]
        if isinstance(each, BaseExceptionGroup):
            waiting += each.exceptions
