"""Blobs on their way into the store, one at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, final

import trio

from .._digest import Digest
from .._errors import StoreError
from .._lifetime import clean_up_in_thread, while_open
from .._manifest import Descriptor
from .._util import construct, made_by
from .._workers.arrival_state import ArrivalState
from ..abc import ReportArrived
from .commits import Job
from .content import Content
from .partial import CHUNK, Partial, resume_partial, verify_partial
from .scratch import HeldLock, Watch

__all__ = ["Ingest", "open_ingest"]

# Up to this number of pieces, one write for each saves a copy.
_FEW: Final = 16

# Smaller pieces come by the thousand from one read of the network.
_TINY: Final = 4096


@asynccontextmanager
async def open_ingest(
    content: Content, descriptor: Descriptor, waiting: ReportArrived | None = None
) -> AsyncIterator[Ingest]:
    """Open an ingest; see `DirectoryStore.ingest`.

    Args:
        content: The store's blobs.
        descriptor: The blob.
        waiting: See `~trio_layers.abc.StagingStore.stage`.
    """
    parts = content.parts
    path = parts.scratch.partial(descriptor.digest)
    watch = None if waiting is None else Watch(path, descriptor.size, waiting)
    async with parts.lifetime.use(), AsyncExitStack() as entering:
        lock = await entering.enter_async_context(content.lock(descriptor.digest, watch))
        partial = None
        # The earlier holder of the lock may have brought the blob, so look for it only now.
        if await content.claim(descriptor) is None:
            since = parts.commits.failures
            partial = await trio.to_thread.run_sync(resume_partial, path, descriptor, since)
        ingest = construct(Ingest, content, descriptor, partial, lock)
        entering.enter_context(parts.lifetime.own(ingest._close))
        stack = entering.pop_all()
    async with stack:
        try:
            yield ingest
        except BaseException:
            await ingest._leave(failed=True)
            raise
        await ingest._leave(failed=False)


@made_by("DirectoryStore.ingest")
@final
class Ingest:
    """A blob on its way into the store: a `~trio_layers.abc.BlobSink` with a commit.

    It comes from `DirectoryStore.ingest`. One task at a time may use it.

    Attributes:
        arriving: Set once some of the bytes are on disk, or all are verified.
    """

    def __init__(
        self, content: Content, descriptor: Descriptor, partial: Partial | None, lock: HeldLock
    ) -> None:
        self._content = content
        self._lifetime = content.parts.lifetime
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
        """Whether the store has the blob, so that nothing is left to do."""
        return self._partial is None

    @property
    def _arrival_state(self) -> ArrivalState:
        """The number of bytes on disk, for the worker that unpacks the blob meanwhile."""
        return self._arriving().arrival_state

    @property
    def offset(self) -> int:
        """Number of bytes received, in this attempt and earlier ones."""
        if self._partial is None:
            return self._descriptor.size
        return self._partial.size + self._pending_size

    @property
    def digest(self) -> Digest:
        """The digest of the bytes received so far."""
        if self._partial is None:
            return self._descriptor.digest
        return self._partial.digest(self._pending)

    async def write(self, data: bytes) -> None:
        """Append some bytes.

        They are written to disk in portions of 1 MiB, and at the latest when the ingest is left.

        Cancellation: ``data`` has been appended all the same.

        Raises:
            StoreFull: if no space is left. The bytes written before stay, for a resumption.
            StoreClosed: if the store's block was left.
            StoreError: if the store already has the blob, or for other errors of the disk.
        """
        self._lifetime.check()
        self._arriving()
        self._pending.append(data)
        self._pending_size += len(data)
        if len(data) < _TINY:
            await trio.lowlevel.checkpoint()
        if self._pending_size < CHUNK:
            # The caller's wait for each larger piece lets other tasks run.
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            async with self._lifetime.use():
                await trio.to_thread.run_sync(self._flush)
            self.arriving.set()

    @while_open
    async def restart(self) -> None:
        """Drop all received bytes.

        Cancellation: the bytes are dropped, or none of them.

        Raises:
            StoreError: as for `write`.
        """
        partial = self._arriving()
        self._pending.clear()
        self._pending_size = 0
        await trio.to_thread.run_sync(partial.restart)

    @while_open
    async def commit(self) -> None:
        """Verify the blob and make it durable and visible.

        A blob that the store already has stays as it is.

        Cancellation: the blob is not visible. Its bytes stay, as after an error, unless they are
        wrong or the disk may have lost some.

        Raises:
            VerificationError: if size or digest differ; the bytes are dropped.
            StoreError: for errors of the disk.
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
        """Verify that all bytes have arrived. The blob becomes visible by a commit only.

        Cancellation: the bytes stay.

        Raises:
            VerificationError: if size or digest differ; the bytes are dropped.
            StoreError: for errors of the disk.
        """
        if self._partial is None:
            await trio.lowlevel.checkpoint()
        else:
            await trio.to_thread.run_sync(self._finish, self._partial)
            self.arriving.set()

    async def _commit_with(self, job: Job, *, since: int) -> None:
        """Run a job that makes the blob and its tree visible; see `Commits.commit`.

        If the store already has the blob, the job makes the tree visible only.
        """
        if self._partial is None:
            await self._content.commit(job, since=since)
            return
        await self._content.commit(job, since=since, partial=self._partial)
        self._partial.close()
        self._partial = None

    async def _leave(self, *, failed: bool) -> None:
        """Keep the received bytes, also after a cancellation.

        Args:
            failed: Whether the block raises an error.
        """
        if self._left or self._partial is None:
            return
        self._left = True
        try:
            await clean_up_in_thread(self._flush)
        except StoreError:
            # The block's own error says more, and lost bytes are downloaded again.
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
            raise StoreError(
                f"blob {self._descriptor.digest} is complete in the store: nothing to add"
            )
        return self._partial

    def _finish(self, partial: Partial) -> None:
        self._flush()
        verify_partial(partial, self._descriptor)
        partial.arrival_state.mark_complete()

    def _flush(self) -> None:
        partial = self._arriving()
        if self._pending:
            few = len(self._pending) <= _FEW
            partial.append(*(self._pending if few else [b"".join(self._pending)]))
            self._pending.clear()
            self._pending_size = 0
