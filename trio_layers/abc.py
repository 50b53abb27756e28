"""The protocols between the rooms, and between us and our users.

Each is small and written for the one who calls it. An extra ability is a protocol of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
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
    "ReportProgress",
]

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
