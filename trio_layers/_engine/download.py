"""The download manager: the entry to the engine, and the state that pulls share.

It follows moby's ``distribution/xfer/download.go``. The work of a pull is in `pull`, the work on
one layer in `layer`, and shared transfers are in `transfer`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import final

import attrs

from .._arguments import check_methods, check_sink
from .._blocks import opens_block
from .._digest import RootFS
from .._lifetime import Lifetime
from .._nursery import open_hidden_nursery
from .._util import construct, made_by
from ..abc import LayerSource, LayerStore, ProgressSink
from .pull import Pull
from .retry import RetryPolicy
from .slots import Slots
from .transfer import Transfers, manager_closed

__all__ = ["DownloadManager", "DownloadStatistics", "open_download_manager"]


@opens_block
async def open_download_manager(
    store: LayerStore,
    *,
    max_concurrent_downloads: int = 3,
    max_download_attempts: int = 5,
    retry_tick: float = 1.0,
) -> AsyncIterator[DownloadManager]:
    """Open a manager, in whose block layers are downloaded into ``store``.

    The manager's nursery is where the downloads run that pulls share. Leaving the block cancels
    all running downloads and pulls, also pulls in other tasks, and waits for their end. Cancelled
    pulls raise `ManagerClosed`. The block's own exception comes out unchanged.

    Args:
        store: The store for the layers.
        max_concurrent_downloads: Maximum number of simultaneous downloads; 0 means no limit.
        max_download_attempts: Number of attempts at a layer before its pulls fail.
        retry_tick: Seconds between two steps of the countdown to another attempt, which has 5
            steps after the first failure, 10 after the second, and so on.

    Raises:
        ValueError: for less than 1 attempt, a negative limit, or a tick that is not positive.
        TypeError: for an option of another type than a number, or a store that lacks a method.
    """
    check_methods("the store", store, ("get", "register", "release"), "LayerStore")
    slots = Slots(max_concurrent_downloads)
    retry = RetryPolicy(max_download_attempts, retry_tick)
    lifetime = Lifetime(manager_closed)
    try:
        async with open_hidden_nursery() as nursery:
            transfers = Transfers(nursery, store, slots)
            try:
                yield construct(DownloadManager, transfers, retry, lifetime)
            finally:
                transfers.close()
    finally:
        # The end of the transfers has ended most pulls. A pull may still await a progress sink or
        # the store.
        await lifetime.close()


@attrs.frozen
class DownloadStatistics:
    """The present activity of a `DownloadManager`.

    Attributes:
        transfers: Number of transfers that have not ended.
        downloading: Number of transfers with a slot.
        queued: Number of transfers that wait for a slot.
        pulls: Number of pulls that wait for their result.
    """

    transfers: int
    downloading: int
    queued: int
    pulls: int


@made_by("open_download_manager")
@final
class DownloadManager:
    """Downloads layers into a store, and shares downloads between pulls.

    It comes from `open_download_manager`.
    """

    def __init__(self, transfers: Transfers, retry: RetryPolicy, lifetime: Lifetime) -> None:
        self._lifetime = lifetime
        self._transfers = transfers
        self._retry = retry
        self._pulls = 0

    def __repr__(self) -> str:
        now = self.statistics()
        return (
            f"<DownloadManager: {now.pulls} pulls, {now.transfers} transfers, "
            f"{now.downloading} downloading, {now.queued} queued>"
        )

    @property
    def max_concurrent_downloads(self) -> int:
        """The largest number of downloads at once; 0 means no limit.

        An assignment takes effect at once. A higher limit wakes waiting transfers in the order in
        which they asked. A lower limit lets running downloads finish, and starts none above it. A
        negative limit is a `ValueError`.
        """
        return self._transfers.slots.limit

    @max_concurrent_downloads.setter
    def max_concurrent_downloads(self, limit: int) -> None:
        self._transfers.slots.limit = limit

    def statistics(self) -> DownloadStatistics:
        """Return the present activity of the manager."""
        slots = self._transfers.slots
        return DownloadStatistics(len(self._transfers), slots.borrowed, slots.queued, self._pulls)

    @opens_block
    async def download(
        self,
        sources: Iterable[LayerSource],
        *,
        base: RootFS = RootFS(),  # noqa: B008 (frozen)
        progress: ProgressSink | None = None,
    ) -> AsyncIterator[RootFS]:
        """Get a stack of layers into the store, and keep it there while the block runs.

        Entering waits until all layers are registered. No nursery is open around the block. Leaving
        it gives the layers back to the store, without waiting, and may happen after the manager has
        been left.

        Each source is closed exactly once in any case. If other pulls share its download, the
        source is closed when the download has ended.

        Cancellation: if entering is cancelled or fails, the pull releases all its layers at once,
        and then waits until the transfers that no other pull needs have stopped.

        Args:
            sources: The layers, bottom first.
            base: The layers below them, which must be in the store.
            progress: Takes the pull's events, from several tasks, in order for each layer. A slow
                sink misses some events, but never the newest.

        Raises:
            LayersError: the error of the first layer that failed. Each pull gets an error of its
                own, whose ``__cause__`` is the original.
            TransferError: in the same way, if the original is not a `LayersError`.
            ManagerClosed: if the manager has been left.
            TypeError: for a source that lacks a method, or a sink that is not asynchronous.
            Exception: an error raised by a source's ``diff_id``, the store's ``get`` or the
                progress sink, unchanged.
        """
        check_sink(progress)
        sources = tuple(sources)
        for source in sources:
            check_methods("the source", source, ("diff_id", "download", "close"), "LayerSource")
        pull = Pull(self._transfers, self._retry, sources, base, progress)
        self._pulls += 1
        try:
            async with self._lifetime.use():
                rootfs = await pull.run()
        finally:
            self._pulls -= 1
            pull.close_unused()
        try:
            yield rootfs
        finally:
            pull.release()
