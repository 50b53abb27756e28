"""Blobs by digest. A blob becomes visible by its row in the catalog."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import sqlite3
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, final
from weakref import WeakSet

import trio

from .._catalog.rows import StoredBlob, add_blob, find_blob
from .._damage import damaged, forget_damage, is_whole_blob, note_damage
from .._digest import Digest, digest_of
from .._disk_errors import disk_errors
from .._errors import StoreError, VerificationError
from .._files import file_name
from .._lifetime import Lifetime, clean_up_in_thread
from .._manifest import Descriptor
from .._util import construct, made_by
from .commits import Job
from .partial import CHUNK, Partial, wrong_blob_error
from .parts import StoreParts
from .scratch import HeldLock, Watch, hold_lock

__all__ = ["BlobStream", "Content"]

# Number of bytes for a reader that does not say how many it wants.
_READ: Final = 256 * 1024


@made_by("DirectoryStore.open_blob")
@final
class BlobStream(trio.abc.ReceiveStream):
    """A blob, read in worker threads. Closing the stream does not wait."""

    def __init__(self, file: io.FileIO, path: Path, lifetime: Lifetime) -> None:
        self._lifetime = lifetime
        self._file = file
        self._path = path
        self._closed = False
        self._reading = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return the next bytes, at most 1 MiB; ``b""`` at the end.

        Cancellation: the stream may have moved on by some bytes.

        Raises:
            StoreClosed: if the store's block was left.
            StoreError: if the disk fails.
        """
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        self._lifetime.check()
        if self._closed:
            await trio.lowlevel.checkpoint()
            raise trio.ClosedResourceError
        size = _READ if max_bytes is None else min(max_bytes, CHUNK)
        self._reading += 1
        try:
            async with self._lifetime.use():
                data = await trio.to_thread.run_sync(self._read, size)
        finally:
            self._reading -= 1
            self._close_if_idle()
        if self._closed:
            raise trio.ClosedResourceError
        return data

    async def aclose(self) -> None:
        """Close the stream. Cancellation: the stream is closed all the same."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close the stream like `aclose`, but without a checkpoint."""
        self._closed = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        # While a thread reads, the descriptor's number must not become that of another file.
        if self._closed and not self._reading:
            self._file.close()

    def _read(self, size: int) -> bytes:
        with disk_errors(self._path):
            return self._file.read(size)


@final
class Content:
    """The blobs of a store. `DirectoryStore` documents the methods of the same name."""

    def __init__(self, parts: StoreParts) -> None:
        self.parts = parts
        self._catalog = parts.catalog
        self._streams = WeakSet[BlobStream]()
        self._blobs = parts.root / "blobs" / "sha256"

    def path(self, digest: Digest) -> Path:
        """Return the path of a blob, which need not exist."""
        return self._blobs / file_name(digest)

    async def find(self, digest: Digest) -> StoredBlob | None:
        """Return the row of a blob; ``None`` if the store lacks the blob."""
        return await self._catalog.read(find_blob, digest)

    async def require(self, digest: Digest) -> StoredBlob:
        """Return the row of a blob.

        Raises:
            StoreError: if the store lacks the blob.
        """
        blob = await self.find(digest)
        if blob is None:
            raise StoreError(f"blob {digest} is not in the store: pull an image that has it")
        return blob

    def has_whole(self, connection: sqlite3.Connection, digest: Digest) -> bool:
        """Return whether a blob exists and passes a quick check (a catalog job)."""
        blob = find_blob(connection, digest)
        return blob is not None and is_whole_blob(self.path(digest), blob.size)

    def lock(
        self, digest: Digest, watch: Watch | None = None
    ) -> AbstractAsyncContextManager[HeldLock]:
        """Hold the lock on a blob, while it arrives and while it is unpacked."""
        return hold_lock(self.parts.scratch.lock(digest), watch)

    async def claim(self, descriptor: Descriptor) -> StoredBlob | None:
        """Return the row of a blob whose lock the caller holds; ``None`` if it must arrive.

        A file without a row, left by a crash just before its row was written, becomes the
        partial file of the blob.

        Raises:
            VerificationError: if the store has the blob with another size.
        """
        return await self._catalog.write(self._claim, descriptor)

    def _claim(self, connection: sqlite3.Connection, descriptor: Descriptor) -> StoredBlob | None:
        blob = find_blob(connection, descriptor.digest)
        if blob is None:
            try:
                forget_damage(self.path(descriptor.digest))
                partial = self.parts.scratch.partial(descriptor.digest)
                os.rename(self.path(descriptor.digest), partial)
            except FileNotFoundError:
                pass
        elif blob.size != descriptor.size:
            raise wrong_blob_error(descriptor, blob.digest, blob.size)
        elif not is_whole_blob(self.path(blob.digest), blob.size):
            return None  # the caller downloads the blob again
        return blob

    async def keep(self, partial: Partial, descriptor: Descriptor) -> None:
        """Make a complete and verified blob durable and visible."""
        job = functools.partial(self.place, path=partial.path, descriptor=descriptor)
        await self.commit(job, since=partial.since, partial=partial)

    async def commit(self, job: Job, *, since: int, partial: Partial | None = None) -> None:
        """Commit a job; see `Commits.commit`.

        If the disk may have lost some bytes of ``partial``, they are dropped.
        """
        commits = self.parts.commits
        try:
            await commits.commit(job, since=since)
        except StoreError:
            failures = commits.failures
            if partial is not None and since != failures:
                await clean_up_in_thread(partial.distrust, failures)
            raise

    def place(self, connection: sqlite3.Connection, *, path: Path, descriptor: Descriptor) -> None:
        """Move a blob's file to its place and add its row (a job for `Commits`)."""
        target = self.path(descriptor.digest)
        stored = find_blob(connection, descriptor.digest) is not None
        if stored and is_whole_blob(target, descriptor.size):
            # The file is missing if an earlier commit renamed it and another wrote the row.
            path.unlink(missing_ok=True)
            return
        try:
            os.rename(path, target)
        except FileNotFoundError:
            # An earlier commit may have renamed the file, and then failed to write the row.
            if not target.exists():
                raise
        forget_damage(target)
        if not stored:
            add_blob(connection, descriptor.digest, descriptor.size)

    async def put(self, descriptor: Descriptor, data: bytes) -> None:
        """Store a blob that is in memory."""
        if await self._catalog.read(self.has_whole, descriptor.digest):
            # A pull of a stored image comes here for each document, and must not sync.
            await trio.to_thread.run_sync(_verify_data, descriptor, data)
            return
        since = self.parts.commits.failures
        async with self.written([(descriptor, data)]) as job:
            await self.parts.commits.commit(job, since=since)

    @asynccontextmanager
    async def written(self, documents: Iterable[tuple[Descriptor, bytes]]) -> AsyncIterator[Job]:
        """Write documents to scratch files, and yield the job that makes them visible."""
        async with AsyncExitStack() as stack:
            jobs: list[Job] = []
            for descriptor, data in documents:
                path = await stack.enter_async_context(self.parts.scratch.name("blob"))
                await trio.to_thread.run_sync(_write_data, path, descriptor, data)
                jobs.append(functools.partial(self.place, path=path, descriptor=descriptor))

            def place_all(connection: sqlite3.Connection) -> None:
                for job in jobs:
                    job(connection)

            yield place_all

    async def find_document(self, digest: Digest, *, limit: int) -> bytes | None:
        """Return the bytes of a small blob; ``None`` if it is missing, damaged or too large."""
        return await self._catalog.read(self._find_document, digest, limit)

    def _find_document(
        self, connection: sqlite3.Connection, digest: Digest, limit: int
    ) -> bytes | None:
        blob = find_blob(connection, digest)
        if blob is None or blob.size > limit:
            return None
        path = self.path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None  # removed or lost; the caller has another source
        if digest_of(data) != digest:
            note_damage(path)
            return None
        return data

    async def read(self, digest: Digest, *, limit: int) -> bytes:
        """Return the verified bytes of a blob; see `DirectoryStore.read_blob`."""
        blob = await self.require(digest)
        if blob.size > limit:
            raise StoreError(
                f"blob {digest} is {blob.size} bytes long, and {limit} are the most to be read "
                "at once: use open_blob"
            )
        return await trio.to_thread.run_sync(_read_verified, self.path(digest), blob)

    async def open(self, digest: Digest) -> BlobStream:
        """Open a stream of a blob; see `DirectoryStore.open_blob`."""
        async with self.parts.lifetime.use():
            await self.require(digest)
            path = self.path(digest)
            file = await trio.to_thread.run_sync(_open_file, path)
            stream = construct(BlobStream, file, path, self.parts.lifetime)
            self._streams.add(stream)
        return stream

    def close_streams(self) -> None:
        """Close the files of all open streams."""
        for stream in tuple(self._streams):
            stream.close()

    async def expect_whole(self, digest: Digest, error: Exception) -> None:
        """Verify again a blob that could not be unpacked.

        Raises:
            VerificationError: if the blob does not match its digest; ``error`` is the cause.
        """
        try:
            await trio.to_thread.run_sync(_verify_file, self.path(digest), digest)
        except StoreError as damage:
            raise VerificationError(f"blob {digest}: {damage}", digest=digest) from error


# Blocking, for worker threads.


def _verify_data(descriptor: Descriptor, data: bytes) -> None:
    digest = digest_of(data)
    if (digest, len(data)) != (descriptor.digest, descriptor.size):
        raise wrong_blob_error(descriptor, digest, len(data))


def _write_data(path: Path, descriptor: Descriptor, data: bytes) -> None:
    _verify_data(descriptor, data)
    with disk_errors(path.parent):
        path.write_bytes(data)


def _read_verified(path: Path, blob: StoredBlob) -> bytes:
    with _open_file(path) as file, disk_errors(path):
        # One byte more would show that the file has grown.
        data = file.read(blob.size + 1) or b""
    if digest_of(data) != blob.digest:
        raise VerificationError(str(damaged(path, "its content has changed")), digest=blob.digest)
    return data


def _verify_file(path: Path, digest: Digest) -> None:
    hashed = hashlib.sha256()
    with _open_file(path) as file, disk_errors(path):
        while data := file.read(CHUNK):
            trio.from_thread.check_cancelled()
            hashed.update(data)
    if f"sha256:{hashed.hexdigest()}" != digest:
        raise damaged(path, "its content has changed")


def _open_file(path: Path) -> io.FileIO:
    with disk_errors(path):
        try:
            return open(path, "rb", buffering=0)
        except FileNotFoundError as error:
            raise damaged(path, "it is not there") from error
