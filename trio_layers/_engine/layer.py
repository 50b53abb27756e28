"""The work on one layer in its transfer: download or copy, then registration on its parent.

A repeated layer is copied from the same layer further down.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import attrs
import trio

from .._digest import ChainID
from .._errors import (
    DecompressionError,
    RegistrationError,
    StoreClosed,
    TransferCancelled,
    text_of,
)
from .._nursery import open_hidden_nursery
from .._progress import Status
from ..abc import (
    DescribedSource,
    DigestRegisterer,
    Layer,
    LayerSource,
    LayerStore,
    Stage,
    StagedSource,
    StagingStore,
)
from .reader import Extraction, LayerReader
from .retry import RetryPolicy
from .transfer import Transfer

__all__ = ["LayerJob"]

REGISTRATION_CANCELLED: Final = "layer registration cancelled"


@attrs.frozen
class LayerJob:
    """The work of a transfer on one layer: a download, or a copy of a repeated layer."""

    store: LayerStore
    retry: RetryPolicy
    source: LayerSource
    base: ChainID | None
    parent: Transfer | None

    async def fetch(self, transfer: Transfer) -> Exception | None:
        """Download the layer and register it on its parent."""
        await transfer.slot.wait()
        if self.parent is not None and self.parent.error is not None:
            return self.parent.error
        if isinstance(self.store, StagingStore) and isinstance(self.source, StagedSource):
            error = await self._fetch_staged(self.store, self.source, transfer)
        else:
            error = await self._fetch_streamed(transfer)
        # The scope is cancelled once the last pull has let go of the layer: no pull then gets
        # another event for the layer.
        if error is None and not transfer.scope.cancel_called:
            transfer.report(Status.PULL_COMPLETE)
        return error

    async def _fetch_streamed(self, transfer: Transfer) -> Exception | None:
        """Download the layer; the store unpacks it once its parent is there."""
        stream, size = await self.retry.run(
            partial(self.source.download, transfer.report), transfer
        )
        transfer.if_cancelled = REGISTRATION_CANCELLED
        transfer.now_inactive()
        reader = LayerReader(stream, size, transfer.report)
        try:
            # A source may ignore a cancellation. Then the store is not called.
            await trio.lowlevel.checkpoint_if_cancelled()
            if self.parent is not None:
                await self.parent.done.wait()
                if self.parent.error is not None:
                    return self.parent.error
            await self._register_stream(transfer, reader, self.source)
        finally:
            await reader.aclose()
        return None

    async def _fetch_staged(
        self, store: StagingStore, source: StagedSource, transfer: Transfer
    ) -> Exception | None:
        """Download the layer into a stage, which unpacks it, and commit it on its parent."""
        size = source.descriptor.size

        def waiting(count: int) -> None:
            # Another process downloads the blob. Users see that process's progress as this pull's.
            transfer.report(Status.DOWNLOADING, count, size)

        async with store.stage(source.descriptor, waiting) as stage:
            attempt = partial(self._receive, source, stage, transfer)
            error = await _unless_failed(stage, partial(self.retry.run, attempt, transfer))
            if error is not None:
                return _registration_error(error)
            transfer.if_cancelled = REGISTRATION_CANCELLED
            transfer.now_inactive()
            if self.parent is not None:
                if not self.parent.done.is_set():
                    error = await _unless_failed(stage, self.parent.done.wait)
                if self.parent.error is not None:
                    return self.parent.error
                if error is not None:
                    return _registration_error(error)
            # A cancellation prevents the commit from starting. A started commit may finish.
            await trio.lowlevel.checkpoint_if_cancelled()
            await self._register(transfer, stage.commit)
        return None

    async def _receive(self, source: StagedSource, stage: Stage, transfer: Transfer) -> None:
        """Make one attempt at a download into a stage."""
        if stage.complete:
            transfer.report(Status.DOWNLOAD_COMPLETE)
        else:
            await source.download_into(stage, transfer.report)
        transfer.if_cancelled = REGISTRATION_CANCELLED
        # A source may ignore a cancellation. Then the store is not called.
        await trio.lowlevel.checkpoint_if_cancelled()
        await stage.finish(Extraction(source.descriptor.size, transfer.report).unpacked)

    async def copy(
        self, original: Transfer, its_source: LayerSource, transfer: Transfer
    ) -> Exception | None:
        """Register the data of ``original``, a lower layer, once more."""
        transfer.if_cancelled = REGISTRATION_CANCELLED
        assert self.parent is not None
        for other in (self.parent, original):
            await other.done.wait()
            if other.error is not None:
                return other.error
        assert original.layer is not None
        reader = LayerReader(await original.layer.tar_stream())
        try:
            await self._register_stream(transfer, reader, its_source)
        finally:
            await reader.aclose()
        return None

    async def _register_stream(
        self, transfer: Transfer, reader: LayerReader, source: LayerSource
    ) -> None:
        descriptor = source.descriptor if isinstance(source, DescribedSource) else None

        async def register(parent: ChainID | None) -> Layer:
            return await self.store.register(reader, parent, descriptor)

        await self._register(transfer, register)

    async def _register(
        self, transfer: Transfer, register: Callable[[ChainID | None], Awaitable[Layer]]
    ) -> None:
        """Register the layer, and pass it to the transfer and the source.

        The store may complete a registration although the transfer was cancelled. The layer then
        exists, so the source learns its diff ID, as in moby. The transfer has no watchers any
        more, so the transfer releases the layer.
        """
        below = self.base
        if self.parent is not None:
            assert self.parent.layer is not None
            below = self.parent.layer.chain_id
        try:
            transfer.layer = await register(below)
        except StoreClosed:
            raise
        except Exception as error:
            if transfer.scope.cancel_called:
                raise TransferCancelled(REGISTRATION_CANCELLED) from error
            raise _registration_error(error) from error
        if isinstance(self.source, DigestRegisterer):
            self.source.registered(transfer.layer.diff_id)


def _registration_error(error: Exception) -> RegistrationError | StoreClosed:
    if isinstance(error, StoreClosed):
        return error  # the store was closed; the layer itself is sound
    if isinstance(error, DecompressionError):
        problem = "could not get decompression stream"
    else:
        problem = "failed to register layer"
    registration_error = RegistrationError(f"{problem}: {text_of(error)}", reason=error)
    registration_error.__cause__ = error
    return registration_error


async def _unless_failed(stage: Stage, do: Callable[[], Awaitable[object]]) -> Exception | None:
    """Await a function, but stop and return the stage's failure if the stage fails meanwhile."""
    failure: Exception | None = None
    try:
        async with open_hidden_nursery() as nursery:

            async def watch() -> None:
                nonlocal failure
                failure = await stage.wait_failed()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await do()
            nursery.cancel_scope.cancel()
            return None
    except Exception:
        # A stopped call may fail because it was stopped.
        if failure is None:
            raise
    return failure
