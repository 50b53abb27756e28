"""Blobs by digest: they arrive in ``ingest/``, are verified, and become visible by their row."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, final
from weakref import WeakSet

import trio

from .._catalog.catalog import Catalog
from .._catalog.rows import StoredBlob, add_blob, find_blob
from .._damage import damaged, forget_damage, is_whole_blob, note_damage
from .._digest import Digest, digest_of
from .._errors import StoreError, VerificationError
from .._files import disk_errors, file_name, lock_written
from .._lifetime import Lifetime, clean_up_in_thread, while_open
from .._manifest import Descriptor
from .._workers.arrival_state import ArrivalState
from .._workers.build import describe
from ..abc import ReportArrived
from .commits import Commits, Job
from .leases import Lease
from .scratch import HeldLock, Scratch, Watch, hold_lock

__all__ = ["Batch", "BlobStream", "Content", "Ingest", "Partial"]

# What arrives is hashed and written in a worker thread, this much at once: a write may have to
# wait for the disk, and going to a thread and back costs as much as hashing 100 KiB.
_BATCH: Final = 1024 * 1024

_FEW: Final = 16
_TINY: Final = 4096

# What a reader gets at once that does not say how much it wants.
_CHUNK: Final = 256 * 1024


@final
class Partial:
    """The bytes of a blob that are there, and what they hash to. Blocking: for worker threads.

    What was written before is hashed again, since the state of a hash cannot be kept.

    Attributes:
        path: The file.
        size: How many bytes are there.
        since: `Commits.failures` before any of them was written.
        growth: Tells it to who reads them meanwhile.
    """

    def __init__(self, path: Path, *, since: int, fresh: bool = False) -> None:
        """Open the file, made if it is not there; ``fresh``: drop what is in it."""
        self.path = path
        self.size = 0
        self.since = since
        self.growth = ArrivalState()
        self._hash = hashlib.sha256()
        self._torn = False  # more may be in the file than is counted
        with disk_errors(path.parent):
            self._file = io.FileIO(path, "wb" if fresh else "a+b")
        try:
            # The lock on the digest is not enough: a cleaning program may remove its file.
            lock_written(self._file.fileno(), path)
            if not fresh:
                self._hash_again()
        except BaseException:
            self._file.close()
            raise

    def digest(self, behind: Iterable[bytes] = ()) -> Digest:
        """What the bytes that are there hash to, with others ``behind`` them."""
        whole = self._hash.copy()
        for data in behind:
            whole.update(data)
        return Digest(f"sha256:{whole.hexdigest()}")

    def matches(self, descriptor: Descriptor) -> bool:
        return self.size == descriptor.size and self.digest() == descriptor.digest

    def append(self, *pieces: bytes) -> None:
        """Write all of ``pieces``, or raise and leave the file as it was."""
        with disk_errors(self.path.parent):
            self._mend()
            self._torn = True
            try:
                for piece in pieces:
                    rest = memoryview(piece)
                    while rest:
                        rest = rest[self._file.write(rest) :]
            except BaseException:
                self._mend()
                raise
            self._torn = False
        for piece in pieces:
            self._count(piece)
        self.growth.grow(self.size)

    def restart(self) -> None:
        """Drop all that is there."""
        self.growth.start_over()
        with disk_errors(self.path.parent):
            self._cut(0)
        self._torn = False
        self.size = 0
        self._hash = hashlib.sha256()

    def distrust(self, since: int) -> None:
        """Drop all that is there, although the disk is in trouble: it may have lost some of it,
        and not say so again.
        """
        self.growth.start_over()
        self.since = since
        self.size = 0
        self._hash = hashlib.sha256()
        self._torn = True
        with contextlib.suppress(OSError):
            self._mend()

    def close(self) -> None:
        self._file.close()

    def _hash_again(self) -> None:
        with disk_errors(self.path.parent):
            self._file.seek(0)
            while data := self._file.read(_BATCH):
                trio.from_thread.check_cancelled()
                self._count(data)
        self.growth.grow(self.size)

    def _count(self, data: bytes) -> None:
        self.size += len(data)
        self._hash.update(data)

    def _mend(self) -> None:
        # Cutting off may fail too, on a disk that is full: then it is tried again.
        if self._torn:
            self._cut(self.size)
            self._torn = False

    def _cut(self, size: int) -> None:
        self._file.seek(size)
        self._file.truncate()


@final
class Ingest:
    """A blob on its way into the store: a `~trio_layers.abc.BlobSink` that can be committed.

    It comes from `DirectoryStore.ingest`. One task at a time may use it.

    Attributes:
        arriving: Set when something of it is on disk, or all of it is verified.
    """

    def __init__(
        self, content: Content, descriptor: Descriptor, partial: Partial | None, lock: HeldLock
    ) -> None:
        self._content = content
        self._lifetime = content.lifetime
        self._descriptor = descriptor
        self._partial = partial
        self._lock = lock
        self._left = False
        self._pending: list[bytes] = []
        self._pending_size = 0
        self.arriving: trio.Event = trio.Event()
        if partial is not None and partial.size:
            self.arriving.set()

    def __repr__(self) -> str:
        state = "committed" if self.committed else f"{self.offset} of {self._descriptor.size} bytes"
        return f"<Ingest {self._descriptor.digest}: {state}>"

    @property
    def committed(self) -> bool:
        """Whether the blob is in the store: then there is nothing left to do."""
        return self._partial is None

    @property
    def growth(self) -> ArrivalState:
        """How much of it is on disk, for who reads it meanwhile."""
        return self._arriving().growth

    @property
    def offset(self) -> int:
        """How many bytes are there, from this attempt and those before it."""
        if self._partial is None:
            return self._descriptor.size
        return self._partial.size + self._pending_size

    @property
    def digest(self) -> Digest:
        """What the bytes that are there hash to."""
        if self._partial is None:
            return self._descriptor.digest
        return self._partial.digest(self._pending)

    async def write(self, data: bytes) -> None:
        """Append. If this is cancelled, ``data`` has been appended all the same.

        What is appended is written to disk when 1 MiB has come together, at the latest when the
        ingest is left.

        Raises:
            StoreFull: if no space is left. What was written before stays, to be resumed.
            StoreClosed: if the store's block was left.
            StoreError: if the blob is in the store already, or for what else the disk does.
        """
        self._lifetime.check()
        self._arriving()
        self._pending.append(data)
        self._pending_size += len(data)
        if len(data) < _TINY:
            # Of these, thousands may come of one read from the network.
            await trio.lowlevel.checkpoint()
        if self._pending_size < _BATCH:
            # Who waits for each chunk to arrive has let others run.
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            async with self._lifetime.use():
                await trio.to_thread.run_sync(self._flush)
            self.arriving.set()

    @while_open
    async def restart(self) -> None:
        """Drop all that is there.

        Raises:
            StoreError: as for `write`.
        """
        partial = self._arriving()
        self._pending.clear()
        self._pending_size = 0
        await trio.to_thread.run_sync(partial.restart)

    @while_open
    async def commit(self) -> None:
        """Verify the blob and put it into the store; then it is visible and durable.

        If this is cancelled or fails it is not visible, and its bytes stay unless they are
        wrong, or the disk may have lost them. A blob that is in the store already stays as it is.

        Raises:
            VerificationError: if size or digest differ; the bytes are dropped.
            StoreError: for what the disk does.
        """
        if self._partial is None:
            await trio.lowlevel.checkpoint()
            return
        await self.finish()
        await self._content.keep(self._partial, self._descriptor)
        self._partial.close()
        self._partial = None

    @while_open
    async def finish(self) -> None:
        """Verify that all has come; it becomes visible by a commit.

        Raises:
            VerificationError: if size or digest differ; the bytes are dropped.
            StoreError: for what the disk does.
        """
        if self._partial is None:
            await trio.lowlevel.checkpoint()
        else:
            await trio.to_thread.run_sync(self._finish, self._partial)
            self.arriving.set()

    async def commit_with(self, job: Job, *, since: int) -> None:
        """Run a job that makes the blob visible, with what was made of it; see
        `Commits.commit`. If the blob is in the store already, it is for what was made only.
        """
        if self._partial is None:
            await self._content.commit(job, since=since)
            return
        await self._content.commit(job, since=since, partial=self._partial)
        self._partial.close()
        self._partial = None

    async def _leave(self, *, failed: bool) -> None:
        """Keep what came, also when cancelled; ``failed``: whether an error is under way."""
        if self._left or self._partial is None:
            return
        self._left = True
        try:
            await clean_up_in_thread(self._flush)
        except StoreError:
            # What is under way says more, and what is lost here is downloaded again.
            if not failed:
                raise
        finally:
            self._partial.close()

    async def _close(self) -> None:
        """Keep the received bytes and release the lock before the caller's block ends."""
        await self._leave(failed=True)
        await clean_up_in_thread(self._lock.release)

    def _arriving(self) -> Partial:
        if self._partial is None:
            raise StoreError(f"blob {self._descriptor.digest} is in the store: nothing is missing")
        return self._partial

    def _finish(self, partial: Partial) -> None:
        self._flush()
        _verify_partial(partial, self._descriptor)
        partial.growth.complete()

    def _flush(self) -> None:
        partial = self._arriving()
        if self._pending:
            # To write them one by one saves a copy, as long as they are few.
            few = len(self._pending) <= _FEW
            partial.append(*(self._pending if few else [b"".join(self._pending)]))
            self._pending.clear()
            self._pending_size = 0


@final
class Batch:
    """Blobs that come one after another, of digests that nobody need know before; those that are
    wanted become visible together. It comes from `DirectoryStore.batch`.

    `add` and `read` block, and are for worker threads, one at a time.
    """

    def __init__(self, content: Content, commits: Commits, directory: Path) -> None:
        self._content = content
        self._lifetime = content.lifetime
        self._commits = commits
        self._directory = directory
        self._since = commits.failures
        self._numbers = itertools.count()
        self._busy = threading.Lock()
        self._sizes: dict[Digest, int] = {}
        self._paths: dict[Digest, Path] = {}

    def __repr__(self) -> str:
        return f"<Batch: {len(self._paths)} blobs>"

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._paths

    def add(self, pieces: Iterable[bytes | memoryview]) -> tuple[Digest, int]:
        """Write a blob down, not visible yet: its digest, and its size in bytes.

        Raises:
            StoreFull: if no space is left.
            StoreError: for what else the disk does.
            Exception: what ``pieces`` raises; the blob is dropped.
        """
        with self._busy:
            self._lifetime.check()
            return self._add(pieces)

    def _add(self, pieces: Iterable[bytes | memoryview]) -> tuple[Digest, int]:
        path = self._directory / str(next(self._numbers))
        partial = Partial(path, since=self._since, fresh=True)
        try:
            for piece in pieces:
                partial.append(bytes(piece))
        except BaseException:
            path.unlink()
            raise
        finally:
            partial.close()
        digest = partial.digest()
        if digest in self._paths:
            path.unlink()
        else:
            self._paths[digest], self._sizes[digest] = path, partial.size
        return digest, partial.size

    def read(self, digest: Digest) -> bytes:
        """All of a blob that was added and not committed: a small one.

        Raises:
            StoreError: for what the disk does.
        """
        self._lifetime.check()
        with disk_errors(self._paths[digest]):
            return self._paths[digest].read_bytes()

    @while_open
    async def commit(self, digests: Iterable[Digest], *, lease: Lease) -> None:
        """Make some of the blobs durable and visible, in one go, and hold them.

        If this is cancelled or fails, none of them is visible, or all are. Those that are in the
        store already stay as they are.

        Args:
            digests: Of blobs that were added.
            lease: LeaseCounts them before they are visible.

        Raises:
            StoreError: for what the disk does.
        """
        wanted = [digest for digest in dict.fromkeys(digests) if digest in self._paths]
        await lease.hold(*wanted)
        if wanted:
            await self._commits.commit(functools.partial(self._place, wanted), since=self._since)

    async def _close(self) -> None:
        """Wait for `add`, then remove the unpublished blob, as the store closes."""

        def discard() -> None:
            with self._busy:
                self._content._scratch.discard(self._directory)

        await clean_up_in_thread(discard)

    def _place(self, wanted: Iterable[Digest], connection: sqlite3.Connection) -> None:
        for digest in wanted:
            descriptor = describe(digest, self._sizes[digest])
            self._content.place(connection, path=self._paths[digest], descriptor=descriptor)


@final
class BlobStream(trio.abc.ReceiveStream):
    """A blob, read in worker threads. Closing it does not wait."""

    def __init__(self, file: io.FileIO, path: Path, lifetime: Lifetime) -> None:
        self._lifetime = lifetime
        self._file = file
        self._path = path
        self._closed = False
        self._reading = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next bytes, at most 1 MiB; none at the end.

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
        size = _CHUNK if max_bytes is None else min(max_bytes, _BATCH)
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
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close the stream like `aclose`, but without a checkpoint."""
        self._closed = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        # Not under a thread that reads: the descriptor's number could be another file's by then.
        if self._closed and not self._reading:
            self._file.close()

    def _read(self, size: int) -> bytes:
        with disk_errors(self._path):
            return self._file.read(size)


@final
class Content:
    """The blobs of a store. What is not said here is said at `DirectoryStore`."""

    def __init__(
        self,
        root: Path,
        catalog: Catalog,
        scratch: Scratch,
        commits: Commits,
        lifetime: Lifetime,
    ) -> None:
        self.root = root
        self.lifetime = lifetime
        self._streams = WeakSet[BlobStream]()
        self._blobs = root / "blobs" / "sha256"
        self._catalog = catalog
        self._scratch = scratch
        self._commits = commits

    def path(self, digest: Digest) -> Path:
        """Where a blob is, if it is there."""
        return self._blobs / file_name(digest)

    async def find(self, digest: Digest) -> StoredBlob | None:
        return await self._catalog.read(find_blob, digest)

    def has_whole(self, connection: sqlite3.Connection, digest: Digest) -> bool:
        """Return whether a blob exists and passes a quick check (a catalog job)."""
        blob = find_blob(connection, digest)
        return blob is not None and is_whole_blob(self.path(digest), blob.size)

    def lock(self, digest: Digest) -> AbstractAsyncContextManager[HeldLock]:
        """Hold the lock on a blob: while it arrives, and while it is unpacked."""
        return hold_lock(self._scratch.lock(digest))

    async def claim(self, descriptor: Descriptor) -> StoredBlob | None:
        """The blob if it is there; to be asked under its lock. If there is only a file, left by
        a crash just before its row was written, the file is what has arrived so far.

        Raises:
            VerificationError: if the blob that is there has another size.
        """
        return await self._catalog.write(self._claim, descriptor)

    @asynccontextmanager
    async def ingest(
        self, descriptor: Descriptor, waiting: ReportArrived | None = None
    ) -> AsyncIterator[Ingest]:
        """`DirectoryStore.ingest`; ``waiting``: see `~trio_layers.abc.StagingStore.stage`."""
        digest = descriptor.digest
        watch = None
        if waiting is not None:
            watch = Watch(self._scratch.partial(digest), descriptor.size, waiting)
        async with self.lifetime.use(), AsyncExitStack() as entering:
            held = hold_lock(self._scratch.lock(digest), watch)
            lock = await entering.enter_async_context(held)
            partial = None
            # Asked only now: whoever held the lock before us may have brought the blob.
            if await self.claim(descriptor) is None:
                path = self._scratch.partial(descriptor.digest)
                since = self._commits.failures
                partial = await trio.to_thread.run_sync(_resume, path, descriptor, since)
            ingest = Ingest(self, descriptor, partial, lock)
            entering.enter_context(self.lifetime.own(ingest._close))
            stack = entering.pop_all()
        async with stack:
            try:
                yield ingest
            except BaseException:
                await ingest._leave(failed=True)
                raise
            await ingest._leave(failed=False)

    async def keep(self, partial: Partial, descriptor: Descriptor) -> None:
        """Make a blob that has arrived and was verified durable and visible."""
        job = functools.partial(self.place, path=partial.path, descriptor=descriptor)
        await self.commit(job, since=partial.since, partial=partial)

    async def commit(self, job: Job, *, since: int, partial: Partial | None = None) -> None:
        """`Commits.commit`. What has arrived is dropped if the disk may have lost some of it."""
        try:
            await self._commits.commit(job, since=since)
        except StoreError:
            if partial is not None and since != self._commits.failures:
                failures = self._commits.failures
                await clean_up_in_thread(partial.distrust, failures)
            raise

    async def put(self, descriptor: Descriptor, data: bytes) -> None:
        if await self._catalog.read(self.has_whole, descriptor.digest):
            # As a pull of what is there finds it: nothing to write, and nothing to sync.
            await trio.to_thread.run_sync(_verify_whole, descriptor, data)
            return
        since = self._commits.failures
        async with self.written([(descriptor, data)]) as job:
            await self._commits.commit(job, since=since)

    @asynccontextmanager
    async def written(self, documents: Iterable[tuple[Descriptor, bytes]]) -> AsyncIterator[Job]:
        """Write documents, and give the job that makes them visible, for the block."""
        async with AsyncExitStack() as stack:
            jobs: list[Job] = []
            for descriptor, data in documents:
                path = await stack.enter_async_context(self._scratch.name("blob"))
                await trio.to_thread.run_sync(_write_whole, path, descriptor, data)
                jobs.append(functools.partial(self.place, path=path, descriptor=descriptor))

            def place(connection: sqlite3.Connection) -> None:
                for job in jobs:
                    job(connection)

            yield place

    @asynccontextmanager
    async def batch(self) -> AsyncIterator[Batch]:
        async with self.lifetime.use(), AsyncExitStack() as entering:
            directory = await entering.enter_async_context(self._scratch.name("batch"))
            await trio.to_thread.run_sync(_make_directory, directory)
            batch = Batch(self, self._commits, directory)
            entering.enter_context(self.lifetime.own(batch._close))
            stack = entering.pop_all()
        async with stack:
            yield batch

    async def find_document(self, digest: Digest, *, limit: int) -> bytes | None:
        """A small blob, not verified; ``None`` if it is not there."""
        return await self._catalog.read(self._read_document, digest, limit)

    def _read_document(
        self, connection: sqlite3.Connection, digest: Digest, limit: int
    ) -> bytes | None:
        blob = find_blob(connection, digest)
        if blob is None or blob.size > limit:
            return None
        path = self.path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None  # removed since, or lost: whoever asks has another source
        if digest_of(data) != digest:
            note_damage(path)
            return None
        return data

    async def read(self, digest: Digest, *, limit: int) -> bytes:
        blob = await self.stored(digest)
        if blob.size > limit:
            raise StoreError(
                f"blob {digest} is {blob.size} bytes long, and {limit} are the most to be read "
                "at once: use open_blob"
            )
        return await trio.to_thread.run_sync(_read_whole, self.path(digest), blob)

    async def open(self, digest: Digest) -> BlobStream:
        async with self.lifetime.use():
            await self.stored(digest)
            path = self.path(digest)
            file = await trio.to_thread.run_sync(_open, path)
            stream = BlobStream(file, path, self.lifetime)
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
            await trio.to_thread.run_sync(_check_whole, self.path(digest), digest)
        except StoreError as damage:
            raise VerificationError(f"blob {digest}: {damage}", digest=digest) from error

    async def stored(self, digest: Digest) -> StoredBlob:
        blob = await self.find(digest)
        if blob is None:
            raise StoreError(f"blob {digest} is not in the store: pull an image that has it")
        return blob

    def _claim(self, connection: sqlite3.Connection, descriptor: Descriptor) -> StoredBlob | None:
        blob = find_blob(connection, descriptor.digest)
        if blob is None:
            try:
                forget_damage(self.path(descriptor.digest))
                os.rename(self.path(descriptor.digest), self._scratch.partial(descriptor.digest))
            except FileNotFoundError:
                pass
        elif blob.size != descriptor.size:
            raise _wrong(descriptor, blob.digest, blob.size)
        elif not is_whole_blob(self.path(blob.digest), blob.size):
            return None  # the caller downloads the blob again
        return blob

    def place(self, connection: sqlite3.Connection, *, path: Path, descriptor: Descriptor) -> None:
        """A job for `Commits`: give the blob at ``path`` its place, and its row."""
        target = self.path(descriptor.digest)
        stored = find_blob(connection, descriptor.digest) is not None
        if stored and is_whole_blob(target, descriptor.size):
            # Not there if a commit before this one renamed it, and another wrote the row.
            path.unlink(missing_ok=True)
            return
        try:
            os.rename(path, target)
        except FileNotFoundError:
            # A commit before this one could rename it, and then not write its row.
            if not target.exists():
                raise
        forget_damage(target)
        if not stored:
            add_blob(connection, descriptor.digest, descriptor.size)


# Blocking, for worker threads.


def _wrong(descriptor: Descriptor, digest: Digest, size: int) -> VerificationError:
    return VerificationError(
        f"blob {descriptor.digest} should be {descriptor.size} bytes long, "
        f"but what is there is {digest}, {size} bytes long",
        digest=descriptor.digest,
    )


def _resume(path: Path, descriptor: Descriptor, since: int) -> Partial:
    partial = Partial(path, since=since)
    try:
        # Nothing that comes could complete it.
        if partial.size >= descriptor.size and not partial.matches(descriptor):
            partial.restart()
    except BaseException:
        partial.close()
        raise
    return partial


def _verify_partial(partial: Partial, descriptor: Descriptor) -> None:
    if not partial.matches(descriptor):
        error = _wrong(descriptor, partial.digest(), partial.size)
        partial.restart()
        raise error


def _verify_whole(descriptor: Descriptor, data: bytes) -> None:
    digest = digest_of(data)
    if (digest, len(data)) != (descriptor.digest, descriptor.size):
        raise _wrong(descriptor, digest, len(data))


def _write_whole(path: Path, descriptor: Descriptor, data: bytes) -> None:
    _verify_whole(descriptor, data)
    with disk_errors(path.parent):
        path.write_bytes(data)


def _make_directory(path: Path) -> None:
    with disk_errors(path.parent):
        path.mkdir(0o700)


def _read_whole(path: Path, blob: StoredBlob) -> bytes:
    with disk_errors(path), _opened(path) as file:
        # One byte more would show that the file has grown.
        data = file.read(blob.size + 1) or b""
    if digest_of(data) != blob.digest:
        raise VerificationError(str(damaged(path, "its content has changed")), digest=blob.digest)
    return data


def _check_whole(path: Path, digest: Digest) -> None:
    hashed = hashlib.sha256()
    with disk_errors(path), _opened(path) as file:
        while data := file.read(_BATCH):
            trio.from_thread.check_cancelled()
            hashed.update(data)
    if f"sha256:{hashed.hexdigest()}" != digest:
        raise damaged(path, "its content has changed")


def _open(path: Path) -> io.FileIO:
    with disk_errors(path):
        return _opened(path)


def _opened(path: Path) -> io.FileIO:
    try:
        return open(path, "rb", buffering=0)
    except FileNotFoundError as error:
        raise damaged(path, "it is not there") from error
