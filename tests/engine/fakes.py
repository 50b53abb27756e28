"""Layer sources for tests. Each test supplies the ``download`` function."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

import trio

from trio_layers._manifest import Descriptor
from trio_layers._memory import MemoryStream


def diff_id_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class FakeSource:
    """A source whose data is its key, unless ``download`` returns other data.

    Attributes:
        staged: Whether sources made from now on can be staged; see `conftest.py`.
    """

    staged = False

    def __init__(
        self,
        key: str,
        download: Callable[[Callable], Awaitable[object]] | None = None,
        *,
        data: bytes | None = None,
        known: bool = False,
    ) -> None:
        self.key = self.id = key
        self.data = key.encode() if data is None else data
        self.calls = 0
        self.closed = 0
        self.told: list[str] = []
        self._download = download
        self._known = known
        if self.staged:
            digest = diff_id_of(self.data)
            self.descriptor = Descriptor("application/octet-stream", digest, len(self.data))
            self.download_into = self._download_into

    def diff_id(self) -> str | None:
        return diff_id_of(self.data) if self._known else None

    async def download(self, progress: Callable) -> tuple[trio.abc.ReceiveStream, int]:
        assert not self.closed
        self.calls += 1
        if self._download is None:
            await trio.lowlevel.checkpoint()
            return MemoryStream(self.data), len(self.data)
        result = await self._download(progress)
        return result if isinstance(result, tuple) else (MemoryStream(self.data), len(self.data))

    async def _download_into(self, sink, progress: Callable) -> None:
        if sink.offset:
            await sink.restart()
        stream, _ = await self.download(progress)
        async with stream:
            while data := await stream.receive_some():
                await sink.write(data)

    def registered(self, diff_id: str) -> None:
        self.told.append(diff_id)

    def close(self) -> None:
        self.closed += 1


def after(seconds: float) -> Callable[[Callable], Awaitable[None]]:
    """Return a download that takes this long and succeeds."""

    async def download(progress: Callable) -> None:
        await trio.sleep(seconds)

    return download


def failing(error: BaseException, seconds: float = 0) -> Callable[[Callable], Awaitable[None]]:
    """Return a download that takes this long and fails."""

    async def download(progress: Callable) -> None:
        await trio.sleep(seconds)
        raise error

    return download
