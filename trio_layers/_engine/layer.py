"""What becomes of one layer in its transfer: downloaded, or copied from one further down, and then
registered on the layer below it."""

from __future__ import annotations

from typing import Final

import attrs
import trio

from .._digest import ChainID
from .._errors import DecompressionError, RegistrationError, TransferCancelled, text_of
from .._manifest import Descriptor
from .._progress import Status
from ..abc import DescribedSource, DigestRegisterer, Layer, LayerSource, LayerStore
from .reader import LayerReader
from .retry import RetryPolicy
from .transfer import Transfer

__all__ = ["LayerJob"]

REGISTRATION_CANCELLED: Final = "layer registration cancelled"


@attrs.frozen
class LayerJob:
    """What the transfer of one layer does, once as a download, once for a repeated layer."""

    store: LayerStore
    retry: RetryPolicy
    source: LayerSource
    base: ChainID | None
    parent: Transfer | None

    async def fetch(self, transfer: Transfer) -> Layer | Exception:
        """Download the layer and register it on its parent."""
        await transfer.slot.wait()
        if self.parent is not None and self.parent.error is not None:
            return self.parent.error
        stream, size = await self.retry.download(self.source, transfer)
        transfer.if_cancelled = REGISTRATION_CANCELLED
        transfer.now_inactive()
        reader = LayerReader(stream, size, transfer.report)
        try:
            # A source may be deaf to a cancellation: then the store is not asked.
            await trio.lowlevel.checkpoint_if_cancelled()
            if self.parent is not None:
                await self.parent.done.wait()
                if self.parent.error is not None:
                    return self.parent.error
            layer = await self._register(transfer, reader, _descriptor_of(self.source))
        finally:
            await reader.aclose()
        return self._hand_over(transfer, layer, Status.PULL_COMPLETE)

    async def copy(
        self, original: Transfer, its_source: LayerSource, transfer: Transfer
    ) -> Layer | Exception:
        """Register the data of ``original``, a layer further down, once more."""
        transfer.if_cancelled = REGISTRATION_CANCELLED
        assert self.parent is not None
        for other in (self.parent, original):
            await other.done.wait()
            if other.error is not None:
                return other.error
        assert original.layer is not None
        reader = LayerReader(await original.layer.tar_stream())
        try:
            layer = await self._register(transfer, reader, _descriptor_of(its_source))
        finally:
            await reader.aclose()
        return self._hand_over(transfer, layer, None)

    async def _register(
        self, transfer: Transfer, reader: LayerReader, descriptor: Descriptor | None
    ) -> Layer:
        below = self.base
        if self.parent is not None:
            assert self.parent.layer is not None
            below = self.parent.layer.chain_id
        try:
            return await self.store.register(reader, below, descriptor)
        except Exception as error:
            if transfer.scope.cancel_called:
                raise TransferCancelled(REGISTRATION_CANCELLED) from error
            if isinstance(error, DecompressionError):
                problem = "could not get decompression stream"
            else:
                problem = "failed to register layer"
            raise RegistrationError(f"{problem}: {text_of(error)}", reason=error) from error

    def _hand_over(self, transfer: Transfer, layer: Layer, action: str | None) -> Layer:
        """The last step, without a checkpoint: from here the layer is the transfer's."""
        try:
            # A store may finish although it was cancelled: nobody wants the layer then.
            if transfer.scope.cancel_called:
                raise TransferCancelled(REGISTRATION_CANCELLED)
            if action is not None:
                transfer.report(action)
            if isinstance(self.source, DigestRegisterer):
                self.source.registered(layer.diff_id)
        except BaseException:
            self.store.release(layer)
            raise
        return layer


def _descriptor_of(source: LayerSource) -> Descriptor | None:
    return source.descriptor if isinstance(source, DescribedSource) else None
