"""After a kill, visible items stay, and the rest is resumed or swept."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
import trio
import trio.testing
from store.crashing import DATA, LAYER
from store.stores import Stream, arriving, chain_of, describe, digest_of, opened, visible
from store.test_images import leases_of

SCRIPT = Path(__file__).with_name("crashing.py")
ARRIVED = 3 * 1024 * 1024


def start(path: Path, what: str) -> subprocess.Popen[str]:
    places = [str(SCRIPT.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, SCRIPT, path, what],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
    )


@asynccontextmanager
async def running(path: Path, what: str) -> AsyncIterator[subprocess.Popen[str]]:
    """Run a process up to a given point, and kill it at the end of the block."""
    process = start(path, what)
    with process:
        try:
            assert process.stdout is not None
            assert await trio.to_thread.run_sync(process.stdout.readline) == "ready\n"
            yield process
        finally:
            process.kill()


async def crash(path: Path, what: str) -> None:
    async with running(path, what):
        pass


async def swept(path: Path) -> None:
    """Wait until an open store has removed the files of dead processes."""
    with trio.fail_after(30):
        while len(os.listdir(path / "leases")) > 1:
            await trio.lowlevel.checkpoint()


async def test_killed_in_an_ingest_what_was_written_is_resumed(tmp_path: Path) -> None:
    await crash(tmp_path, "ingest")
    assert visible(tmp_path) == []
    assert len(arriving(tmp_path)) == 2
    async with opened(tmp_path) as store:
        with trio.fail_after(30):
            while len(arriving(tmp_path)) > 1:
                await trio.lowlevel.checkpoint()
        assert [name for name in arriving(tmp_path) if name.endswith(".lock")] == []
        async with store.ingest(describe(DATA)) as sink:
            assert (sink.offset, sink.digest) == (ARRIVED, digest_of(DATA[:ARRIVED]))
            await sink.write(DATA[ARRIVED:])
            await sink.commit()
        await swept(tmp_path)
    assert arriving(tmp_path) == []


async def test_who_waits_takes_over_from_the_bytes_of_the_dead(tmp_path: Path) -> None:
    offsets = []

    async def wait_for_it() -> None:
        async with store.ingest(describe(DATA)) as sink:
            offsets.append(sink.offset)

    async with opened(tmp_path) as store, running(tmp_path, "ingest") as process:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_it)
            await trio.testing.wait_all_tasks_blocked()
            assert offsets == []
            process.kill()
    assert offsets == [ARRIVED]


async def test_killed_while_a_layer_is_unpacked_nothing_of_it_stays(tmp_path: Path) -> None:
    await crash(tmp_path, "register")
    assert visible(tmp_path) == []
    async with opened(tmp_path) as store:
        assert await store.get(chain_of(LAYER)) is None
        layer = await store.register(Stream(LAYER.data), None, LAYER.descriptor)
        assert (layer.tree / "fs" / "hello").read_text() == "world"
        await swept(tmp_path)
    assert arriving(tmp_path) == []


async def test_killed_between_the_name_of_a_blob_and_its_row(tmp_path: Path) -> None:
    await crash(tmp_path, "blob-renamed")
    assert len(visible(tmp_path)) == 1
    async with opened(tmp_path) as store:
        assert await store.blob(digest_of(DATA)) is None
        async with store.ingest(describe(DATA)) as sink:
            assert (sink.offset, sink.committed) == (len(DATA), False)
            await sink.commit()
        assert await store.read_blob(digest_of(DATA)) == DATA


async def test_killed_between_the_name_of_a_tree_and_its_row(tmp_path: Path) -> None:
    await crash(tmp_path, "tree-renamed")
    assert len(visible(tmp_path)) == 2
    async with opened(tmp_path) as store:
        assert await store.get(chain_of(LAYER)) is None
        layer = await store.register(Stream(LAYER.data), None, LAYER.descriptor)
        assert (layer.tree / "fs" / "hello").read_text() == "world"
        await swept(tmp_path)
    assert arriving(tmp_path) == []


async def test_a_dead_process_holds_no_lease(tmp_path: Path) -> None:
    await crash(tmp_path, "lease")
    assert [digest for _, digest in leases_of(tmp_path)] == [LAYER.digest]
    async with opened(tmp_path):
        await swept(tmp_path)
        assert leases_of(tmp_path) == []


async def test_a_live_process_keeps_its_lease(tmp_path: Path) -> None:
    async with running(tmp_path, "lease"), opened(tmp_path) as store:
        async with store.lease(digest_of(b"ours")):
            digests = {digest for _, digest in leases_of(tmp_path)}
            assert digests == {LAYER.digest, digest_of(b"ours")}


@pytest.mark.parametrize("what", ["ingest", "register"])
async def test_a_process_that_is_interrupted_leaves_as_clean(tmp_path: Path, what: str) -> None:
    async with running(tmp_path, what) as process:
        process.send_signal(2)
        assert await trio.to_thread.run_sync(process.wait) != 0
    assert os.listdir(tmp_path / "leases") == []
    assert {name.rpartition(".")[2] for name in arriving(tmp_path)} <= {"partial", "trash"}


async def test_a_process_that_opened_it_twice_and_another_lose_nothing(tmp_path: Path) -> None:
    """SQLite's locks belong to the process, and are lost when it closes any
    descriptor of the file.
    """
    async with opened(tmp_path) as store:
        async with opened(tmp_path):
            await store.put_blob(describe(b"theirs"), b"theirs")
        for _ in range(2):
            async with running(tmp_path, "use") as process:
                assert await trio.to_thread.run_sync(process.wait) == 0
            assert (tmp_path / "catalog.sqlite-wal").exists()
            assert await store.read_blob(digest_of(b"ours")) == b"ours"
        await store.put_blob(describe(b"last"), b"last")
    async with opened(tmp_path) as store:
        for data in (b"theirs", b"ours", b"last"):
            assert await store.read_blob(digest_of(data)) == data


async def test_leases_that_could_not_be_ended_are_ended_by_the_next(tmp_path: Path) -> None:
    """The process ended normally, so its file is gone, but its rows remain."""
    async with opened(tmp_path) as store:
        async with store.lease(LAYER.digest):
            with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as other:
                # The same state as after a failed deletion of the rows.
                other.execute("UPDATE leases SET holder = '0123456789abcdef'")
                other.commit()
    assert [holder for holder, _ in leases_of(tmp_path)] == ["0123456789abcdef"]
    async with opened(tmp_path):
        with trio.fail_after(30):
            while leases_of(tmp_path):
                await trio.lowlevel.checkpoint()
        await swept(tmp_path)
