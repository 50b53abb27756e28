"""A pull: which layers the store has, which must be downloaded, and in which order.

A pull asks for its layers bottom first. It skips the lowest layers that the store has. Each other
layer becomes a transfer, or joins the transfer of another pull. Downloads run side by side. A layer
is registered once the layer below it is registered.

A pull requests a bounded number of layers (`WINDOW`) ahead of its lowest unregistered layer. An
image with 10,000 layers therefore needs no more tasks than an image with `WINDOW` layers, and
letting go of all watched transfers takes no longer. Docker's own images have at most 127 layers.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Container
from functools import partial
from typing import Final, final

import trio

from .._digest import ChainID, DiffID, RootFS, extend_chain
from .._errors import LayersError
from .._nursery import open_hidden_nursery
from .._progress import Progress, Status
from ..abc import DigestRegisterer, Layer, LayerSource, ProgressSink
from .foreign import log, tell
from .layer import LayerJob
from .retry import RetryPolicy
from .transfer import Transfer, Transfers

__all__ = ["Pull"]


WINDOW: Final = 128
"""The number of possibly unfinished transfers that a pull watches at once.

The pull lets go of all of them in one step, which takes about 20 microseconds for each.
"""

# The rounds of a cheap loop over layers between two checkpoints. They take 1 to 2 milliseconds.
_STRIDE: Final = 256


@final
class Pull:
    """A call of `DownloadManager.download`, and the watcher of its transfers."""

    def __init__(
        self,
        transfers: Transfers,
        retry: RetryPolicy,
        sources: tuple[LayerSource, ...],
        base: RootFS,
        sink: ProgressSink | None,
    ) -> None:
        self._transfers = transfers
        self._store = transfers.store
        self._retry = retry
        self._sources = sources
        self._base = base
        self._sink = sink
        self._nursery: trio.Nursery | None = None
        # Returns the error that the pull ends with. Copying an error can run foreign code, so the
        # pull copies it later, outside the state change.
        self._failure: Callable[[], Exception] | None = None
        self._result = base
        # The topmost layer that the store had, while the pull holds a reference to it.
        self._existing: Layer | None = None
        # The watched transfers, bottom first; and those that this pull was the last to watch, and
        # that have to stop.
        self._watched: deque[Transfer] = deque()
        self._stopping: list[Transfer] = []
        # Ended transfers of layers that the image repeats further up.
        self._originals: set[Transfer] = set()
        # The sources that started no transfer, by index. The pull closes them.
        self._unused = dict(enumerate(sources))

    # Ctrl-C waits for the next checkpoint of this task or of the program's main task. Sinks are
    # not protected.
    @trio.lowlevel.enable_ki_protection
    async def run(self) -> RootFS:
        try:
            await self._get_there()
            if self._failure is not None:
                raise self._failure()
            if self._watched:
                self._release_existing()  # the layers above hold it now
            return self._result
        except BaseException:
            try:
                self._let_go()
                self._transfers.foreign.run()
            finally:
                try:
                    await self._wait_until_stopped()
                    await self._let_go_of_originals()
                finally:
                    self._release_existing()
            raise

    def close_unused(self) -> None:
        """Close the sources that started no transfer. Call once, after `run`."""
        for source in self._unused.values():
            self._transfers.foreign.later(partial(_close, source), "closing a source failed")
        self._transfers.foreign.run()

    @trio.lowlevel.enable_ki_protection
    def release(self) -> None:
        self._let_go()
        self._release_existing()
        self._transfers.foreign.run()

    async def _get_there(self) -> None:
        await trio.lowlevel.checkpoint()  # a pull that is already cancelled starts no transfer
        try:
            async with open_hidden_nursery() as self._nursery:
                try:
                    await self._get_all_layers()
                except Exception as error:
                    self._fail(error)
                except BaseException:
                    self._let_go()
                    self._transfers.foreign.run()
                    raise
        except Exception:
            # The pull's end cancels a running sink, which may raise an exception in turn. The
            # pull's own failure takes precedence.
            if self._failure is None:
                raise

    # The end of the pull.

    def transfer_ended(self, transfer: Transfer) -> None:
        if transfer.error is not None:
            self._end_with(transfer.own_error)

    def _fail(self, error: Exception) -> None:
        self._end_with(lambda: error)
        self._transfers.foreign.run()

    def _end_with(self, failure: Callable[[], Exception]) -> None:
        """End the pull with an error; the first error counts."""
        if self._failure is not None:
            return
        self._failure = failure
        self._let_go()
        assert self._nursery is not None
        self._nursery.start_soon(self._wind_up, self._nursery.cancel_scope)

    @trio.lowlevel.enable_ki_protection
    async def _wind_up(self, scope: trio.CancelScope) -> None:
        # The tasks that deliver progress are awake, and run in this step of the scheduler at the
        # latest. An idle one still delivers the last event.
        await trio.lowlevel.checkpoint()
        scope.cancel()

    def _let_go(self) -> None:
        """Stop watching, from the top layer down.

        In this order a layer is never cancelled below one that is still needed.
        """
        watched, self._watched = self._watched, deque()
        for transfer in reversed(watched):
            transfer.let_go(self)
            if transfer.scope.cancel_called and not transfer.done.is_set():
                self._stopping.append(transfer)

    async def _let_go_of_originals(self) -> None:
        """Stop watching ended transfers, with checkpoints in between.

        The transfers may be thousands, and their release is not urgent. Not cancellable.
        """
        with trio.CancelScope(shield=True):
            while self._originals:
                for _ in range(min(_STRIDE, len(self._originals))):
                    self._originals.pop().let_go(self)
                self._transfers.foreign.run()
                await trio.lowlevel.checkpoint()

    async def _wait_until_stopped(self) -> None:
        # There is no deadline: a layer that is written behind its ended pull would be worse.
        with trio.CancelScope(shield=True):
            for transfer in self._stopping:
                if not transfer.done.is_set():
                    await transfer.done.wait()

    def _release_existing(self) -> None:
        layer, self._existing = self._existing, None
        if layer is not None:
            self._transfers.release_later(layer)

    # The way to the result.

    async def _get_all_layers(self) -> None:
        base: ChainID | None = None
        for index, below in enumerate(self._base.diff_ids, 1):
            base = extend_chain(base, below)
            if index % _STRIDE == 0:
                await trio.lowlevel.checkpoint()
        known, chain, key = await self._take_existing(base)
        if len(known) == len(self._sources):
            self._result = RootFS((*self._base.diff_ids, *known))
            return
        top = await self._ask_for(len(known), chain, key)
        if top is None:
            return  # the pull has failed meanwhile
        await top.done.wait()
        if top.layer is None:
            return  # the transfer failed, and transfer_ended has ended the pull
        self._result = RootFS(self._base.diff_ids + self._diff_ids_down_from(top.layer))
        # The reference to the top layer keeps the layers below.
        self._watched.pop()
        lower = self._watched
        self._let_go()
        self._watched.append(top)
        self._transfers.foreign.run()
        for transfer in lower:
            # A transfer may still run if the layer above it belongs to another pull's transfer.
            if not transfer.done.is_set():
                transfer.wake()
        await self._let_go_of_originals()

    async def _take_existing(
        self, chain: ChainID | None
    ) -> tuple[list[DiffID], ChainID | None, bytes]:
        """Skip the bottom layers that are in the store already.

        Args:
            chain: The chain ID of the base below these layers.

        Returns:
            The diff IDs of the skipped layers, the chain ID of the top one, and the prefix of the
            transfer key of the layer above.
        """
        diff_ids: list[DiffID] = []
        key = _key_of_base(chain)
        for source in self._sources:
            diff_id = source.diff_id()
            if diff_id is None:
                break
            candidate = extend_chain(chain, diff_id)
            layer = await self._store.get(candidate)
            if layer is None:
                break
            self._release_existing()
            self._existing = layer
            self._transfers.foreign.run()
            chain = candidate
            # Skipped layers are part of the key, too. They may have been missing for an earlier
            # pull, and this pull still shares that pull's transfers of the layers above.
            key = _key_on(key, source.key)
            diff_ids.append(diff_id)
            if self._sink is not None:  # otherwise the question to the store was a checkpoint
                await tell(self._sink, Progress(source.id, Status.ALREADY_EXISTS))
            if isinstance(source, DigestRegisterer):
                source.registered(diff_id)
        return diff_ids, chain, key

    async def _ask_for(self, first: int, base: ChainID | None, key: bytes) -> Transfer | None:
        """Start or join a transfer for each missing layer.

        Args:
            first: The index of the lowest missing layer.
            base: The chain ID of the layer below, if any.
            key: The prefix of the lowest missing layer's transfer key.

        Returns:
            The transfer of the top layer, or ``None`` if the pull has failed meanwhile.
        """
        parent: Transfer | None = None
        by_source_key: dict[str, tuple[Transfer, LayerSource]] = {}
        repeated_later: set[Transfer] = set()
        # Source key -> index of the topmost layer with that key.
        last = {self._sources[i].key: i for i in range(first, len(self._sources))}
        for index in range(first, len(self._sources)):
            source = self._sources[index]
            if not await self._make_room(repeated_later):
                return None
            key = _key_on(key, source.key)
            repeated = by_source_key.get(source.key)
            if repeated is None:
                await self._tell(source, Status.PULLING)
            while (transfer := self._transfers.get(key)) and transfer.scope.cancel_called:
                await transfer.done.wait()
            # From here to the end of the round there is no checkpoint.
            if self._failure is not None:
                return None
            if transfer is None:
                transfer = self._start(key, index, base, parent, repeated)
            transfer.watch(self)
            self._watched.append(transfer)
            if repeated is None:
                if index < last[source.key]:
                    by_source_key[source.key] = transfer, source
                    repeated_later.add(transfer)
                if self._sink is not None:
                    assert self._nursery is not None
                    self._nursery.start_soon(self._deliver, transfer, source.id, self._sink)
            elif index == last[source.key]:
                original, _ = repeated
                repeated_later.discard(original)
                if original in self._originals:
                    # The new transfer watches its original itself, so the pull need not.
                    self._originals.discard(original)
                    original.let_go(self)
            parent = transfer
        return parent

    async def _make_room(self, repeated: Container[Transfer]) -> bool:
        """Wait until the pull watches fewer than `WINDOW` transfers.

        The pull lets go of ended transfers at the bottom: a layer above holds the layer below.
        Transfers in ``repeated`` move to the originals.

        Returns:
            Whether the pull may continue: ``False`` once it has failed.
        """
        while len(self._watched) >= WINDOW:
            lowest = self._watched[0]
            await lowest.done.wait()
            if self._failure is not None:
                return False
            self._watched.popleft()
            if lowest in repeated:
                self._originals.add(lowest)
            else:
                lowest.let_go(self)
        return True

    def _start(
        self,
        key: bytes,
        index: int,
        base: ChainID | None,
        parent: Transfer | None,
        repeated: tuple[Transfer, LayerSource] | None,
    ) -> Transfer:
        source = self._sources[index]
        job = LayerJob(self._store, self._retry, source, base, parent)
        if repeated is not None:
            assert parent is not None
            original, its_source = repeated
            return self._transfers.start(
                key,
                partial(job.copy, original, its_source),
                name=_id_of(source),
                builds_on=(parent, original),
                close=_nothing,
                needs_slot=False,
            )
        transfer = self._transfers.start(
            key,
            job.fetch,
            name=_id_of(source),
            builds_on=() if parent is None else (parent,),
            close=partial(_close, source),
            needs_slot=True,
        )
        del self._unused[index]
        return transfer

    def _diff_ids_down_from(self, top: Layer) -> tuple[DiffID, ...]:
        diff_ids: list[DiffID] = []
        layer: Layer | None = top
        # One round for each source, since the layers below them are the base.
        for _ in self._sources:
            if layer is None:
                raise LayersError("internal error: too few parent layers")
            diff_ids.append(layer.diff_id)
            layer = layer.parent
        return tuple(reversed(diff_ids))

    # The events.

    async def _tell(self, source: LayerSource, action: str) -> None:
        if self._sink is not None:
            await tell(self._sink, Progress(source.id, action))
        else:
            await trio.lowlevel.checkpoint()

    @trio.lowlevel.enable_ki_protection
    async def _deliver(self, transfer: Transfer, id: str, sink: ProgressSink) -> None:
        try:
            await transfer.deliver(self, id, sink)
        except Exception as error:
            self._fail(error)


def _key_of_base(base: ChainID | None) -> bytes:
    """Return the beginning of a chain of keys, for the base of a pull's bottom layer."""
    return hashlib.sha256(b"base " + (base or "").encode()).digest()


def _key_on(below: bytes, key: str) -> bytes:
    """Return the key of a transfer from the key of the layer below and its source's key.

    It is a hash, as chain IDs are, so that a key among 10,000 layers costs no more than the first
    one.
    """
    return hashlib.sha256(b"on " + below + key.encode("utf-8", "surrogatepass")).digest()


def _id_of(source: LayerSource) -> str:
    """Return a source's ID, or its type's name if the source fails."""
    try:
        return str(source.id)
    except Exception:
        return type(source).__name__


def _close(source: LayerSource) -> None:
    try:
        source.close()
    except Exception as error:
        log(logging.ERROR, "closing the source of layer %s failed", source.id, error=error)


def _nothing() -> None:
    pass
