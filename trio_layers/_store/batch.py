"""Blobs whose digests are unknown before they arrive, made visible together."""

from __future__ import annotations

import itertools
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import final

import trio

from .._digest import Digest
from .._disk_errors import disk_errors
from .._lifetime import clean_up_in_thread, while_open
from .._util import construct, made_by
from .._workers.build import blob_descriptor
from .content import Content
from .leases import Lease
from .partial import Partial

__all__ = ["Batch", "open_batch"]


@asynccontextmanager
async def open_batch(content: Content) -> AsyncIterator[Batch]:
    """Open a batch; see `DirectoryStore.batch`."""
    parts = content.parts
    async with parts.lifetime.use(), AsyncExitStack() as entering:
        directory = await entering.enter_async_context(parts.scratch.name("batch"))
        await trio.to_thread.run_sync(_make_directory, directory)
        batch = construct(Batch, content, directory)
        entering.enter_context(parts.lifetime.own(batch._close))
        stack = entering.pop_all()
    async with stack:
        yield batch


@made_by("DirectoryStore.batch")
@final
class Batch:
    """Blobs that arrive before their digests are known; a commit makes some of them visible.

    It comes from `DirectoryStore.batch`. The methods `add` and `read` block, and are for worker
    threads, one at a time.
    """

    def __init__(self, content: Content, directory: Path) -> None:
        self._content = content
        self._parts = content.parts
        self._lifetime = content.parts.lifetime
        self._directory = directory
        self._since = content.parts.commits.failures
        self._numbers = itertools.count()
        self._busy = threading.Lock()
        self._sizes: dict[Digest, int] = {}
        self._paths: dict[Digest, Path] = {}

    def __repr__(self) -> str:
        return f"<Batch: {len(self._paths)} blobs>"

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._paths

    def add(self, pieces: Iterable[bytes | memoryview]) -> tuple[Digest, int]:
        """Write a blob, and return its digest and its size in bytes. It is not visible yet.

        Raises:
            StoreFull: if no space is left.
            StoreClosed: if the store's block was left.
            StoreError: for other errors of the disk.
            Exception: an error raised by ``pieces``; the blob is dropped.
        """
        with self._busy:
            self._lifetime.check()
            return self._add(pieces)

    def _add(self, pieces: Iterable[bytes | memoryview]) -> tuple[Digest, int]:
        path = self._directory / str(next(self._numbers))
        blob = Partial(path, since=self._since, fresh=True)
        try:
            for piece in pieces:
                blob.append(bytes(piece))
        except BaseException:
            path.unlink()
            raise
        finally:
            blob.close()
        digest = blob.digest()
        if digest in self._paths:
            path.unlink()
        else:
            self._paths[digest], self._sizes[digest] = path, blob.size
        return digest, blob.size

    def read(self, digest: Digest) -> bytes:
        """Return all bytes of a small blob that was added and not committed.

        Raises:
            StoreClosed: if the store's block was left.
            StoreError: for errors of the disk.
        """
        self._lifetime.check()
        with disk_errors(self._paths[digest]):
            return self._paths[digest].read_bytes()

    @while_open
    async def commit(self, digests: Iterable[Digest], *, lease: Lease) -> None:
        """Make some of the blobs durable and visible at once, and hold them.

        Blobs that the store already has stay as they are.

        Cancellation: all of the blobs are visible, or none, as after an error.

        Args:
            digests: Digests of added blobs.
            lease: Holds the blobs from before they are visible.

        Raises:
            StoreError: for errors of the disk.
        """
        wanted = [digest for digest in dict.fromkeys(digests) if digest in self._paths]
        await lease.hold(*wanted)
        if wanted:
            await self._parts.commits.commit(partial(self._place, wanted), since=self._since)

    async def _close(self) -> None:
        """Wait for `add`, then remove the unpublished blobs, as the store closes."""

        def discard() -> None:
            with self._busy:
                self._parts.scratch.discard(self._directory)

        await clean_up_in_thread(discard)

    def _place(self, wanted: Iterable[Digest], connection: sqlite3.Connection) -> None:
        for digest in wanted:
            descriptor = blob_descriptor(digest, self._sizes[digest])
            self._content.place(connection, path=self._paths[digest], descriptor=descriptor)


def _make_directory(path: Path) -> None:
    with disk_errors(path.parent):
        path.mkdir(0o700)
