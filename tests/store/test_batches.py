"""Blobs that arrive together, with digests that are known only at their end."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from store.stores import describe, digest_of, ingest, opened, visible

from trio_layers._digest import Digest
from trio_layers._errors import StoreError
from trio_layers._store.batch import Batch

ONE, TWO = b"one" * 1000, b"two"


async def add(batch: Batch, *pieces: bytes) -> Digest:
    digest, size = await trio.to_thread.run_sync(batch.add, pieces)
    assert size == sum(map(len, pieces))
    return digest


def held(path: Path) -> set[str]:
    connection = sqlite3.connect(path / "catalog.sqlite")
    try:
        return {digest for (digest,) in connection.execute("SELECT digest FROM leases")}
    finally:
        connection.close()


def blobs(path: Path) -> set[str]:
    return {name.removeprefix("blobs/") for name in visible(path)}


async def test_only_what_is_committed_is_visible(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        async with store.lease() as lease, store.batch() as batch:
            one = await add(batch, ONE[:10], b"", ONE[10:])
            two = await add(batch, TWO)
            assert (one, two) == (digest_of(ONE), digest_of(TWO))
            assert one in batch
            assert digest_of(b"three") not in batch
            assert repr(batch) == "<Batch: 2 blobs>"
            assert visible(tmp_path) == []
            assert await trio.to_thread.run_sync(batch.read, two) == TWO
            await batch.commit([one], lease=lease)
            assert await store.blob(one) is not None
            assert await store.blob(two) is None
            assert lease.digests == {one}
        assert await store.read_blob(one) == ONE
        assert blobs(tmp_path) == {one.removeprefix("sha256:")}
    assert list((tmp_path / "ingest").iterdir()) == []


async def test_they_are_held_before_they_are_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a garbage collection could remove them at once."""
    async with opened(tmp_path) as store:
        commit = store._parts.commits.commit
        seen: list[set[str]] = []

        async def watched(*args: object, **options: object) -> None:
            seen.append(await trio.to_thread.run_sync(held, tmp_path))
            await commit(*args, **options)

        monkeypatch.setattr(store._parts.commits, "commit", watched)
        async with store.lease() as lease, store.batch() as batch:
            one = await add(batch, ONE)
            await batch.commit([one], lease=lease)
        assert seen == [{one}]


async def test_the_same_twice(tmp_path: Path) -> None:
    """A blob may come twice, in the batch and in the store; the stored one stays."""
    async with opened(tmp_path) as store:
        await ingest(store, ONE)
        path = await store.blob(digest_of(ONE))
        assert path is not None
        before = path.stat().st_ino
        async with store.lease() as lease, store.batch() as batch:
            assert await add(batch, ONE) == await add(batch, ONE)
            two = [await add(batch, TWO), await add(batch, TWO)]
            await batch.commit([digest_of(ONE), *two], lease=lease)
            await batch.commit([], lease=lease)
        assert path.stat().st_ino == before
        assert await store.read_blob(two[0]) == TWO


async def test_what_fails_halfway_is_dropped(tmp_path: Path) -> None:
    def failing() -> Iterator[bytes]:
        yield ONE
        raise RuntimeError("no more")

    async with opened(tmp_path) as store:
        async with store.lease() as lease, store.batch() as batch:
            with pytest.raises(RuntimeError, match="no more"):
                await trio.to_thread.run_sync(batch.add, failing())
            assert digest_of(ONE) not in batch
            two = await add(batch, TWO)
            await batch.commit([two, digest_of(ONE)], lease=lease)
        assert blobs(tmp_path) == {two.removeprefix("sha256:")}


async def test_a_commit_that_fails_shows_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:
        with pytest.raises(StoreError, match="disk"):
            async with store.lease() as lease, store.batch() as batch:
                digests = [await add(batch, ONE), await add(batch, TWO)]

                def fail() -> None:
                    raise StoreError("the disk")

                monkeypatch.setattr(store._parts.commits, "_sync", fail)
                await batch.commit(digests, lease=lease)
        assert visible(tmp_path) == []
        monkeypatch.undo()
        # The blob was stored differently than in the other store.
        await ingest(store, ONE)


async def test_another_brings_it_meanwhile(tmp_path: Path) -> None:
    """Two commits of one blob both succeed, in any order."""
    async with opened(tmp_path) as store:
        async with store.lease() as lease, store.batch() as batch:
            one = await add(batch, ONE)
            async with store.ingest(describe(ONE)) as sink:
                await sink.write(ONE[:100])
                await batch.commit([one], lease=lease)
                await sink.write(ONE[100:])
                await sink.commit()
        assert await store.read_blob(one) == ONE
