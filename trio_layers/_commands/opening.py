"""Opens a store for reading, and the display of progress, for several commands."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from .._display import DisplayKind, open_display
from .._errors import LayersError, StoreNotFound, StoreReadOnly, UnsupportedStore
from .._store.directory import DirectoryStore, open_store
from ..abc import ProgressSink

__all__ = ["enter_to_read", "open_display_for", "open_to_read"]


@asynccontextmanager
async def open_to_read(arguments: argparse.Namespace) -> AsyncIterator[DirectoryStore]:
    """Open an existing store, read-only if it cannot be written."""
    async with AsyncExitStack() as stack:
        try:
            store = await stack.enter_async_context(open_store(arguments.store, create=False))
        except (StoreReadOnly, UnsupportedStore) as error:
            store = await enter_to_read(stack, arguments, error)
        yield store


async def enter_to_read(
    stack: AsyncExitStack, arguments: argparse.Namespace, error: LayersError
) -> DirectoryStore:
    """Open the store read-only. If that fails, too, raise ``error``."""
    try:
        return await stack.enter_async_context(open_store(arguments.store, read_only=True))
    except StoreNotFound:
        raise
    except LayersError:
        raise error from None


def open_display_for(arguments: argparse.Namespace) -> AbstractAsyncContextManager[ProgressSink]:
    kind: DisplayKind = arguments.progress
    if arguments.quiet:
        kind = "none"
    elif arguments.verbose and kind == "auto":
        kind = "plain"  # bars and a log do not share a terminal
    return open_display(kind)
