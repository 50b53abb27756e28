"""A server for the files of a directory, like the storage behind a registry, with ranges."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from trio_layers._nursery import open_hidden_nursery
from trio_layers.testing import Answer, Blob, Exchange, Request
from trio_layers.testing._serve import serve

RANGE = re.compile(r"bytes=(\d+)-\d*")


@attrs.define
class StaticServer:
    """A running server.

    Attributes:
        url: Scheme, host and port.
        root: The served directory.
        cut: For the end of a path, the number of bytes after which to close the connection once.
        requests: All requests.
    """

    url: str
    root: Path
    cut: dict[str, int] = attrs.field(factory=dict)
    requests: list[Exchange] = attrs.field(factory=list)

    def respond(self, request: Request, now: float) -> tuple[Answer, Exchange]:
        exchange = Exchange(
            method=request.method,
            path=request.path,
            query=request.query,
            headers=request.headers,
            at=now,
        )
        self.requests.append(exchange)
        answer = self._answer(request)
        exchange.status = answer.status
        return answer, exchange

    def _answer(self, request: Request) -> Answer:
        path = self.root / request.path.lstrip("/")
        if not path.is_file():
            return Answer(status=404, headers={"Content-Length": "0"})
        size = path.stat().st_size
        asked = RANGE.fullmatch(request.headers.get("range", ""))
        start = int(asked[1]) if asked else 0
        headers = {"Content-Length": str(size - start)}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        cuts = [self.cut.pop(end) for end in list(self.cut) if request.path.endswith(end)]
        return Answer(
            status=206 if asked else 200,
            headers=headers,
            blob=Blob(path, size),
            start=start,
            stop=size,
            cut_after=cuts[0] if cuts else None,
        )


@asynccontextmanager
async def serve_directory(root: Path) -> AsyncIterator[StaticServer]:
    """Serve a directory's files on a free port of 127.0.0.1 during the block."""
    async with open_hidden_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        server = StaticServer(f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}", root)
        await nursery.start(serve, server.respond, listeners, "http", None)
        yield server
        nursery.cancel_scope.cancel()
