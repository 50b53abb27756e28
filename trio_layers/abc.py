"""The protocols that users implement: layer sources, stores and progress sinks.

Each protocol is small and written for its caller. An extra ability is a protocol of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeAlias, runtime_checkable

import trio

from ._digest import ChainID, DiffID, Digest
from ._entries import Entry
from ._manifest import Descriptor
from ._progress import Progress

__all__ = [
    "BinaryFile",
    "BlobSink",
    "DescribedSource",
    "DigestRegisterer",
    "Layer",
    "LayerSource",
    "LayerStore",
    "LowerTree",
    "ProgressSink",
    "ReportArrived",
    "ReportProgress",
    "ReportUnpacked",
    "Stage",
    "StagedSource",
    "StagingStore",
]


def __dir__() -> list[str]:
    return __all__


ProgressSink: TypeAlias = Callable[[Progress], Awaitable[object]]
"""Takes a pull's events, one at a time for each layer, from several tasks.

It is often ``send_channel.send``. Its exception ends the pull, and comes out of the pull unchanged.
"""


class ReportProgress(Protocol):
    """Reports the progress of a `LayerSource.download`. It never waits."""

    def __call__(self, action: str, current: int = 0, total: int = 0) -> None:
        """Report an action, with the number of bytes so far and in all; 0 if unknown."""
        ...


class LayerSource(Protocol):
    """A source of one layer (moby ``distribution/xfer/download.go``, ``DownloadDescriptor``).

    Other pulls may share the download that this source started, so its resources must live as long
    as the manager. `close` is called exactly once: when the download that the source started has
    ended, or, if it started none, at the end of its pull. Only `DigestRegisterer.registered` may
    follow, for a layer that its image has twice and that other pulls still need.
    """

    @property
    def key(self) -> str:
        """The identity of the layer: sources with equal keys, on equal parents, are the same."""
        ...

    @property
    def id(self) -> str:
        """The short ID of the layer in progress events, for people."""
        ...

    def diff_id(self) -> DiffID | None:
        """Return the layer's diff ID, if it is known before the download."""
        ...

    async def download(self, progress: ReportProgress) -> tuple[trio.abc.ReceiveStream, int]:
        """Make one attempt, and return a stream of the layer and its size in bytes.

        The size is 0 if it is unknown. The stream has the layer as it is downloaded: the store
        decompresses it. After an `Exception` the engine calls this method again, unless the error
        is a `DoNotRetry` or was caused by one.

        Cancellation: the method runs in the cancel scope of the transfer, and should end within
        100 ms.
        """
        ...

    def close(self) -> None:
        """Free the source's resources. An exception is logged."""
        ...


@runtime_checkable
class DigestRegisterer(Protocol):
    """A source that is told the diff ID of its layer."""

    def registered(self, diff_id: DiffID) -> None:
        """Receive the diff ID of the registered layer."""
        ...


@runtime_checkable
class DescribedSource(Protocol):
    """A source with the descriptor of its blob, which the store gets."""

    @property
    def descriptor(self) -> Descriptor:
        """The descriptor of the blob."""
        ...


class Layer(Protocol):
    """A layer in a store, with all layers below it."""

    @property
    def diff_id(self) -> DiffID:
        """The digest of the layer's tar."""
        ...

    @property
    def chain_id(self) -> ChainID:
        """The ID of the layer together with all layers below it."""
        ...

    @property
    def parent(self) -> Layer | None:
        """The layer below; ``None`` for the bottom layer."""
        ...

    async def tar_stream(self) -> trio.abc.ReceiveStream:
        """Open a stream of the layer's data, fit for `LayerStore.register`.

        Cancellation: nothing is open.
        """
        ...


class LayerStore(Protocol):
    """A store of layers. Each `get` and `register` takes a reference, and `release` returns it."""

    async def get(self, chain_id: ChainID) -> Layer | None:
        """Return a layer by its chain ID; ``None`` if the store lacks it.

        Cancellation: no reference is taken.
        """
        ...

    async def register(
        self,
        stream: trio.abc.ReceiveStream,
        parent: ChainID | None,
        descriptor: Descriptor | None = None,
    ) -> Layer:
        """Decompress the stream (by its magic bytes) and store the layer on top of ``parent``.

        The caller closes the stream. A layer that the store already has is returned as it is.

        Cancellation: nothing is stored, or the layer is returned all the same. The caller then
        releases it.

        Args:
            stream: The layer, compressed or not.
            parent: The chain ID of the layer below; ``None`` for the bottom layer.
            descriptor: The blob's descriptor, if the source has one.

        Raises:
            DecompressionError: if reading fails, or no valid stream begins, within the first
                10 bytes, or within the header of gzip.
        """
        ...

    def release(self, layer: Layer) -> None:
        """Give one reference back, without waiting and without failing."""
        ...


class BlobSink(Protocol):
    """The place of an arriving blob. Its bytes outlive the attempt that wrote them."""

    @property
    def offset(self) -> int:
        """Number of bytes received, in this attempt and earlier ones."""
        ...

    @property
    def digest(self) -> Digest:
        """The digest of the bytes received so far."""
        ...

    async def write(self, data: bytes) -> None:
        """Append some bytes.

        Cancellation: all of ``data`` has been appended, or nothing.
        """
        ...

    async def restart(self) -> None:
        """Drop all received bytes.

        Cancellation: all bytes are dropped, or none.
        """
        ...


# Staging is a second way from a source to a store: a layer is unpacked while it arrives, before its
# parent is known. The engine takes it if the store is a `StagingStore` and the source a
# `StagedSource`. All others take the way of `LayerSource.download` and `LayerStore.register`.


@runtime_checkable
class StagedSource(DescribedSource, Protocol):
    """A layer source that can bring its blob into a sink, which unpacks it while it arrives."""

    async def download_into(self, sink: BlobSink, progress: ReportProgress) -> None:
        """Make one attempt in place of `LayerSource.download`: complete the blob in ``sink``.

        Write the bytes that are missing behind the sink's `~BlobSink.offset`, or restart the sink
        and write all bytes. Return when the whole blob is there and verified. Exceptions of the
        sink must pass through.

        After an `Exception` the engine calls this method again, unless the error is a `DoNotRetry`
        or was caused by one. It never calls it for a blob that the store has.

        Cancellation: the method runs in a scope that is cancelled when no pull needs the layer any
        more, or when the layer cannot be stored (see `Stage.wait_failed`). It should end within
        100 ms. The written bytes stay.
        """
        ...


ReportUnpacked: TypeAlias = Callable[[int], None]
"""Gets the number of unpacked bytes of a blob, as downloaded. It never waits.

Stores call it in trio's thread.
"""


ReportArrived: TypeAlias = Callable[[int], None]
"""Gets the number of received bytes of a blob that another task or process downloads.

It never waits. Stores call it in trio's thread.
"""


class Stage(BlobSink, Protocol):
    """A layer that arrives: a sink for its blob, and a worker that unpacks the received bytes.

    It comes from `StagingStore.stage`. After `~BlobSink.restart` the worker starts again, too, and
    never sees bytes of both attempts. One task at a time calls these methods, except `wait_failed`.
    """

    @property
    def complete(self) -> bool:
        """Whether the whole blob is there and verified, so that nothing must be written.

        This is so once `finish` has returned, or if the store had the blob before.
        """
        ...

    async def wait_failed(self) -> Exception:
        """Wait until the layer certainly cannot be stored, and return the error of `commit`.

        If this never becomes certain, wait for ever. Before the blob is `complete`, the return ends
        the download early. Only an error that another download could not change is certain then,
        such as a full disk or a limit. An error in the received bytes is not certain before they
        are verified, since they may not be the blob's. The stage keeps such an error until then,
        and forgets it after a restart. Once the blob is complete, every error is certain.

        Cancellation: nothing is changed.
        """
        ...

    async def finish(self, progress: ReportUnpacked) -> None:
        """Declare the blob complete and verified, without waiting for the worker.

        From now on, until `commit` has returned, ``progress`` gets the worker's position: first the
        bytes unpacked before, if any, and the blob's size at the end. It may be called more often
        than is worth showing.

        Cancellation: the blob is complete, or its bytes stay as they are.

        Raises:
            Exception: if the bytes cannot be kept. The download attempt counts as failed: another
                one follows, unless the error is a `DoNotRetry` or was caused by one.
        """
        ...

    async def commit(self, parent: ChainID | None) -> Layer:
        """Wait for the worker, put the layer on ``parent``, and return it with a reference.

        The engine calls this once, when the blob is `complete`.

        Cancellation: nothing is stored, or the layer is returned all the same.

        Raises:
            DecompressionError: as for `LayerStore.register`.
            Exception: the worker's error, or another error that prevents storing the layer.
        """
        ...


@runtime_checkable
class StagingStore(LayerStore, Protocol):
    """A store that can unpack a layer while it arrives, before its parent is known."""

    def stage(
        self, descriptor: Descriptor, waiting: ReportArrived | None = None
    ) -> AbstractAsyncContextManager[Stage]:
        """Receive a blob in the block, and unpack it meanwhile.

        Entering may wait until no other task or process receives or unpacks this blob. The bytes
        received before need not be downloaded (`~BlobSink.offset`). The store may even have the
        whole blob, its tree, or the layer that `Stage.commit` will put on its parent
        (`Stage.complete`).

        Two pulls that need the same blobs in different order must never wait for each other. So
        entering never waits for a stage whose blob is complete and whose worker has ended. Since
        thousands of such stages may wait for their parents, they hold no thread, lock or open file.

        Leaving without a commit stops the worker within 100 ms, also after a cancellation. The
        received bytes stay for the next stage of the blob. Leaving raises no error of its own.

        Cancellation: entering can be cancelled, and leaves nothing behind.

        Args:
            descriptor: The blob. Its media type is not trusted.
            waiting: Gets the number of received bytes while entering waits for another task or
                process, if the store can see it: at most every 100 ms, and never more than the
                blob's size. The number may decrease after a restart.

        Raises:
            Exception: if the store cannot receive the blob; the engine does not try again.
        """
        ...


class LowerTree(Protocol):
    """The merged layers below a layer that is being unpacked; for worker threads.

    Paths are as in `Entry`. Links on the way are not followed.
    """

    def lookup(self, path: bytes) -> Entry | None:
        """Return the visible entry at a path; ``None`` if there is none."""
        ...

    def survey(self, paths: Iterable[bytes]) -> Mapping[bytes, Entry | None]:
        """Return the entry at each path. Of other types than directories, only the type is sure."""
        ...

    def links(self, path: bytes) -> tuple[bytes, ...]:
        """Return all names of the file at a path, including ``path``."""
        ...

    def open(self, path: bytes) -> int:
        """Open the file at a path for reading; the caller closes the descriptor."""
        ...


class BinaryFile(Protocol):
    """A file that is open for reading: a part of trio's asynchronous file interface.

    Cancellation: the position may have moved.
    """

    async def read(self, size: int = -1, /) -> bytes:
        """Return ``size`` bytes, fewer only at the end; negative: all to the end."""
        ...

    async def seek(self, target: int, whence: int = 0, /) -> int:
        """Move to a byte, counted from the start (0), from here (1) or from the end (2)."""
        ...

    async def tell(self) -> int:
        """Return the number of bytes before the position."""
        ...
