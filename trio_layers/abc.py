"""The protocols between the rooms, and between us and our users.

Each is small and written for the one who calls it. An extra ability is a protocol of its own.
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
"""Takes a pull's events, one at a time for each layer, from several tasks. Often
``send_channel.send``. What it raises ends the pull, with that very exception."""


class ReportProgress(Protocol):
    """What a layer source's `~LayerSource.download` reports with. It never waits."""

    def __call__(self, action: str, current: int = 0, total: int = 0) -> None: ...


class LayerSource(Protocol):
    """A layer that can be had (moby ``distribution/xfer/download.go``, ``DownloadDescriptor``).

    Others may share the download that this source started, so what it needs must live as long
    as the manager does. `close` is called exactly once: when the download that the source
    started has ended, or, if it started none, at the end of its pull. Only `registered` may
    come after it, for a layer that is in its image twice and is still wanted by others.
    """

    @property
    def key(self) -> str:
        """Sources with equal keys, on equal parents, give the same layer."""
        ...

    @property
    def id(self) -> str:
        """What progress is reported under: short, for people."""
        ...

    def diff_id(self) -> DiffID | None:
        """The layer's diff ID, if it is known before the download."""
        ...

    async def download(self, progress: ReportProgress) -> tuple[trio.abc.ReceiveStream, int]:
        """One attempt: fetch the layer and return a stream of it, and its size in bytes (0 if
        not known). The stream is as downloaded: the store decompresses.

        Called again after an `Exception`, unless it is, or was caused by, `DoNotRetry`.
        It runs in the transfer's own cancel scope, and should give way within 100 ms.
        """
        ...

    def close(self) -> None:
        """Let go of whatever the source holds. What it raises is logged."""
        ...


@runtime_checkable
class DigestRegisterer(Protocol):
    """A source that wants to know the diff ID its layer turned out to have."""

    def registered(self, diff_id: DiffID) -> None: ...


@runtime_checkable
class DescribedSource(Protocol):
    """A source that knows its blob's descriptor, which the store is handed."""

    @property
    def descriptor(self) -> Descriptor: ...


class Layer(Protocol):
    """A layer in a store, with all that is below it."""

    @property
    def diff_id(self) -> DiffID: ...

    @property
    def chain_id(self) -> ChainID: ...

    @property
    def parent(self) -> Layer | None: ...

    async def tar_stream(self) -> trio.abc.ReceiveStream:
        """The layer's data once more, as `LayerStore.register` would take it."""
        ...


class LayerStore(Protocol):
    """Where layers go. Each `get` and `register` takes a reference; `release` gives it back."""

    async def get(self, chain_id: ChainID) -> Layer | None:
        """The layer of this chain ID, or ``None`` if it is not there."""
        ...

    async def register(
        self,
        stream: trio.abc.ReceiveStream,
        parent: ChainID | None,
        descriptor: Descriptor | None = None,
    ) -> Layer:
        """Decompress the stream (by its magic bytes) and store the layer on top of ``parent``.

        The stream is the caller's, and so is closing it. A layer that is there already is
        returned as it is. If the call is cancelled nothing is stored, or the layer is returned
        all the same: then its caller releases it.

        Raises:
            DecompressionError: if reading fails, or no valid stream begins, within the first
                10 bytes, or within the header of gzip.
        """
        ...

    def release(self, layer: Layer) -> None:
        """Give one reference back. Does not wait and does not fail."""
        ...


class BlobSink(Protocol):
    """Where a blob goes while it arrives. What is there outlives the attempt that wrote it."""

    @property
    def offset(self) -> int:
        """How many bytes are there, from this attempt and those before it."""
        ...

    @property
    def digest(self) -> Digest:
        """What the bytes that are there hash to."""
        ...

    async def write(self, data: bytes) -> None:
        """Append. Cancelled, it has appended all of ``data`` or nothing."""
        ...

    async def restart(self) -> None:
        """Drop all that is there."""
        ...


# Staging: a layer is unpacked while it arrives, before what is below it is known. A second way
# from a source to a store, taken where the store is a `StagingStore` and the source a
# `StagedSource`; all others take that of `LayerSource.download` and `LayerStore.register`.


@runtime_checkable
class StagedSource(DescribedSource, Protocol):
    """A layer source that can bring its blob into a sink, which unpacks it while it arrives."""

    async def download_into(self, sink: BlobSink, progress: ReportProgress) -> None:
        """One attempt, in the place of `LayerSource.download`: bring into ``sink`` what is
        missing behind its `~BlobSink.offset`, or restart it and bring all; return when it is all
        there and verified.

        Called again after an `Exception`, unless it is, or was caused by, `DoNotRetry`; never
        for a blob that the store has. What the sink raises is to go through.

        Cancellation: it runs in a scope that is cancelled when nobody wants the layer any more,
        or when it cannot be stored (see `Stage.wait_failed`), and should give way within 100 ms.
        What it has written stays.
        """
        ...


ReportUnpacked: TypeAlias = Callable[[int], None]
"""Told how many bytes of a blob, as downloaded, have been unpacked. It never waits, and is to be
called in trio's thread."""


ReportArrived: TypeAlias = Callable[[int], None]
"""Told how many bytes of a blob are there, while somebody else brings them. It never waits, and is
to be called in trio's thread."""


class Stage(BlobSink, Protocol):
    """A blob on its way to being a layer: the sink it arrives in, and a worker that inflates,
    hashes and unpacks what has arrived. It comes from `StagingStore.stage`.

    After `~BlobSink.restart` the worker starts again, too: it never sees bytes from before and
    after. One task at a time calls these methods, but for `wait_failed`.
    """

    @property
    def complete(self) -> bool:
        """Whether all of the blob is there and verified: `finish` has returned, or the store had
        it already. Then nothing is to be written.
        """
        ...

    async def wait_failed(self) -> Exception:
        """Wait until it is certain that the layer cannot be stored, and return why: what
        `commit` would raise. If that never becomes certain, wait for ever.

        Before the blob is `complete` this ends the download early, so it is for what another
        download could not mend: a full disk, a limit. That bytes are damaged or hostile is not
        certain before they are verified, as they may not be the blob's; until then it is kept
        back, and forgotten if there is a restart. Afterwards it is told at once.

        Cancellation: nothing is changed.
        """
        ...

    async def finish(self, progress: ReportUnpacked) -> None:
        """All of the blob is there and verified: let the worker run to its end. This does not
        wait for it.

        From now on, until `commit` has returned, ``progress`` is told how far the worker is,
        beginning with what it has unpacked before, if that is anything; the blob's size, when it
        is through. It may be told so often that showing all would be too much.

        Cancellation: the blob is complete, or its bytes stay as they are.

        Raises:
            Exception: if what is there cannot be kept. It counts as a failure of the attempt to
                download it: another one follows, unless the error is, or was caused by,
                `DoNotRetry`.
        """
        ...

    async def commit(self, parent: ChainID | None) -> Layer:
        """Wait for the worker, then put what it made on top of ``parent``, as
        `LayerStore.register` does; the layer is returned with a reference to it.

        To be called once, when the blob is `complete`.

        Cancellation: nothing is stored, or the layer is returned all the same.

        Raises:
            DecompressionError: as for `LayerStore.register`.
            Exception: what the worker failed with, or what else keeps the layer from being
                stored.
        """
        ...


@runtime_checkable
class StagingStore(LayerStore, Protocol):
    """A store that can unpack a layer while it arrives, before what is below it is known."""

    def stage(
        self, descriptor: Descriptor, waiting: ReportArrived | None = None
    ) -> AbstractAsyncContextManager[Stage]:
        """Take a blob in, and unpack it, in the block.

        Entering may wait until nobody else, in any process, takes in or unpacks this blob. What
        is there then, from them or from earlier attempts, need not be downloaded
        (`~BlobSink.offset`), perhaps nothing at all (`Stage.complete`): the blob is there, or its
        tree, or the very layer that `Stage.commit` will be asked for.

        So that two who want the same blobs in different order never wait for each other, nobody
        is made to wait for a stage whose blob is complete and whose worker is through. And as
        there may be thousands whose parent is not there yet, such a stage holds no thread, lock
        or open file.

        Leaving without commit aborts: it stops the worker, within 100 ms, also when cancelled;
        what arrived of the blob stays, for the next who stages it. Leaving raises nothing of its
        own.

        Cancellation: entering is cancellable, and then nothing is left behind.

        Args:
            descriptor: The blob. What its media type says is not believed.
            waiting: Told how much of the blob is there while entering waits for somebody else who
                takes it in, if the store can see that: at most every 100 ms, and never more than
                the blob's size. It may become less, when they start over.

        Raises:
            Exception: for what keeps the store from taking the blob in; it is not tried again.
        """
        ...


class LowerTree(Protocol):
    """What is below a layer that is unpacked: all layers under it, merged. For worker threads.

    Paths are as in `Entry`; links on the way are not followed.
    """

    def lookup(self, path: bytes) -> Entry | None:
        """What is there, neither a whiteout nor opaque or implied; ``None`` for nothing."""
        ...

    def survey(self, paths: Iterable[bytes]) -> Mapping[bytes, Entry | None]:
        """What is at each of ``paths``; of what is no directory, nothing but the type is sure."""
        ...

    def links(self, path: bytes) -> tuple[bytes, ...]:
        """All names of the file that is there, ``path`` among them."""
        ...

    def open(self, path: bytes) -> int:
        """A descriptor to read the file that is there; its taker closes it."""
        ...


class BinaryFile(Protocol):
    """A file that is open for reading: one of trio's asynchronous files, as far as it goes."""

    async def read(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes, fewer only at the end; negative: all to the end."""
        ...

    async def seek(self, target: int, whence: int = 0, /) -> int:
        """Go to a byte, counted from the start, from here (1) or from the end (2)."""
        ...

    async def tell(self) -> int:
        """How many bytes are before here."""
        ...
