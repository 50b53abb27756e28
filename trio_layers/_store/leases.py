"""Leases: what must stay in the store, while somebody uses it.

A lease is rows that bear a holder's name (see ``scratch.py``): those of a process that is dead
count for nothing. The holder's file is locked before its first row is written.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import final

import trio

from .._digest import Digest
from .._errors import StoreError
from .catalog import Catalog, add_leases, drop_leases

__all__ = ["Lease", "open_lease"]

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_lease(catalog: Catalog, holder: str, name: str) -> AsyncIterator[Lease]:
    """Open the lease ``name`` of a holder; see `DirectoryStore.lease`."""
    try:
        yield Lease(catalog, holder, name)
    finally:
        try:
            with trio.CancelScope(shield=True):
                await catalog.note(drop_leases, holder, name)
        except StoreError as error:
            # It ends with its holder, if not now, and what is under way says more.
            logger.warning("cannot end a lease: %s", error)


@final
class Lease:
    """Keeps what it names in the store while it is open. It comes from `DirectoryStore.lease`."""

    def __init__(self, catalog: Catalog, holder: str, name: str) -> None:
        self._catalog = catalog
        self._holder = holder
        self._name = name
        self._digests: set[Digest] = set()

    def __repr__(self) -> str:
        return f"<Lease {self._holder}/{self._name}: {len(self._digests)} held>"

    @property
    def digests(self) -> frozenset[Digest]:
        """What is held."""
        return frozenset(self._digests)

    async def hold(self, *digests: Digest | None) -> None:
        """Hold more: blobs by their digest, layers with all that is below them by their chain
        ID, images by their manifest's digest. They need not be there yet.

        Args:
            digests: What to hold; ``None`` is left out.

        Raises:
            StoreError: for what the disk does.
        """
        new = {digest for digest in digests if digest is not None} - self._digests
        await self._catalog.note(add_leases, self._holder, self._name, new)
        self._digests |= new
