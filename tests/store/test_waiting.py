"""A cancelled task waits neither for other processes nor for threads of other tasks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing
from store.stores import describe, layer_of, opened

from trio_layers import DirectoryStore, StoreBusy
from trio_layers._catalog import catalog

HOLD: Final = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print(flush=True)
sys.stdin.read()
"""

DATA: Final = layer_of(file=bytes(5000)).data * 50
Block = Callable[[DirectoryStore, trio.Event], Awaitable[None]]

LIMIT: Final = 8
"""Time limit in seconds. It is below the 10 seconds that a call waits for another process."""


@asynccontextmanager
async def held_by_another_process(path: Path) -> AsyncIterator[None]:
    """Let another process hold the catalog's write lock during the block."""
    command = [sys.executable, "-c", HOLD, path / "catalog.sqlite"]
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        await process.stdout.receive_some()
        yield
    finally:
        with trio.CancelScope(shield=True):
            await process.stdin.aclose()
            await process.stdout.aclose()
            await process.wait()


@contextmanager
def no_tokens() -> Iterator[None]:
    """Let other tasks hold all tokens of the default limiter, as abandoned name look-ups do."""
    limiter = trio.to_thread.current_default_thread_limiter()
    holders = [object() for _ in range(int(limiter.available_tokens))]
    for holder in holders:
        limiter.acquire_on_behalf_of_nowait(holder)
    try:
        yield
    finally:
        for holder in holders:
            limiter.release_on_behalf_of(holder)


async def take_in(store: DirectoryStore, begun: trio.Event) -> None:
    async with store.ingest(describe(DATA)) as sink:
        await sink.write(DATA[:1000])
        begun.set()
        await trio.sleep_forever()


async def stage(store: DirectoryStore, begun: trio.Event) -> None:
    async with store.stage(describe(DATA)) as staged:
        await staged.write(DATA[:1000])
        begun.set()
        await trio.sleep_forever()


async def lease(store: DirectoryStore, begun: trio.Event) -> None:
    async with store.lease(describe(DATA).digest), store.batch():
        begun.set()
        await trio.sleep_forever()


BLOCKS = pytest.mark.parametrize("block", [take_in, stage, lease])


@BLOCKS
async def test_a_cancelled_block_needs_no_token_of_the_default_limiter(
    block: Block, tmp_path: Path
) -> None:
    begun = trio.Event()
    async with opened(tmp_path) as store, AsyncExitStack() as stack:
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(block, store, begun)
                await begun.wait()
                stack.enter_context(no_tokens())
                nursery.cancel_scope.cancel()


@BLOCKS
async def test_a_cancelled_block_does_not_wait_for_another_process(
    block: Block, tmp_path: Path
) -> None:
    begun = trio.Event()
    async with opened(tmp_path) as store, AsyncExitStack() as stack:
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(block, store, begun)
                await begun.wait()
                await stack.enter_async_context(held_by_another_process(tmp_path))
                nursery.cancel_scope.cancel()


async def test_a_cancelled_call_does_not_wait_for_another_process(tmp_path: Path) -> None:
    data = b"some data"
    async with opened(tmp_path) as store, held_by_another_process(tmp_path):
        with trio.fail_after(LIMIT):
            with trio.move_on_after(0.2) as scope:
                await store.put_blob(describe(data), data)
            assert scope.cancelled_caught
            # Readers need no lock, even while a writer waits.
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.put_blob, describe(data), data)
                assert await store.images() == []
                nursery.cancel_scope.cancel()


async def test_a_store_is_left_although_another_process_holds_its_catalog(tmp_path: Path) -> None:
    data = b"some data"
    async with AsyncExitStack() as stack:
        with trio.fail_after(LIMIT):
            async with opened(tmp_path) as store, store.lease(describe(data).digest):
                await stack.enter_async_context(held_by_another_process(tmp_path))


async def test_who_waits_goes_on_when_the_other_process_is_done(tmp_path: Path) -> None:
    data = b"some data"
    async with opened(tmp_path) as store, trio.open_nursery() as nursery:
        async with held_by_another_process(tmp_path):
            nursery.start_soon(store.put_blob, describe(data), data)
            assert await store.images() == []
            await trio.testing.wait_all_tasks_blocked()
    async with opened(tmp_path) as store:
        assert await store.blob(describe(data).digest) is not None


async def test_patience_ends_and_the_advice_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "_PATIENCE", 0.1)
    data = b"some data"
    async with opened(tmp_path) as store:
        async with held_by_another_process(tmp_path):
            with pytest.raises(StoreBusy, match="try again"):
                await store.put_blob(describe(data), data)
        await store.put_blob(describe(data), data)
