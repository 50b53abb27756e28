"""Tests of invisible locks: removed files, and locks of other machines."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import attrs
import pytest
import trio
from store.stores import Stream, arriving, describe, layer_of, opened, visible
from store.test_crashes import leases_of, running

from trio_layers._errors import StoreError
from trio_layers._processes import Process

LAYER = layer_of(hello="world")
DAY = 24 * 3600


def remove_lease_files(path: Path) -> None:
    for name in os.listdir(path / "leases"):
        os.unlink(path / "leases" / name)


@pytest.mark.parametrize("what", ["register", "lease", "ingest"])
async def test_a_process_whose_lease_file_was_removed(tmp_path: Path, what: str) -> None:
    """Other processes keep its files until it ends.

    Programs that clean temporary directories remove such lock files.
    """
    async with running(tmp_path, what) as process:
        before = (arriving(tmp_path), leases_of(tmp_path))
        assert any(before)
        remove_lease_files(tmp_path)
        async with opened(tmp_path) as store:
            await store.collect()
            assert (arriving(tmp_path), leases_of(tmp_path)) == before
        process.kill()
        await trio.to_thread.run_sync(process.wait)
        async with opened(tmp_path) as store:
            await store.collect()
            assert [name for name in arriving(tmp_path) if "-" in name] == []
            assert leases_of(tmp_path) == []


async def test_a_store_that_is_open_here_without_its_lease_file(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        stream = Stream(LAYER.data, stop_at=20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.register, stream, None, LAYER.descriptor)
            await stream.stopped.wait()
            remove_lease_files(tmp_path)
            async with opened(tmp_path) as other:
                await other.collect()
            stream.go_on.set()
        assert len(visible(tmp_path)) == 2


@attrs.frozen
class ForeignProcess:
    """Files of a process on another machine, dead or alive."""

    path: Path
    process: Process
    holder: str = "0123456789abcdef"

    def leave(self, *, lease_file: bool, age: float) -> None:
        process = attrs.evolve(self.process, since=time.time() - age)
        tree = self.path / "ingest" / f"{self.holder}-0.tree"
        tree.mkdir()
        lease = self.path / "leases" / self.holder
        if lease_file:
            lease.write_text(process.encode())
        for path in (tree, *([lease] if lease_file else ())):
            os.utime(path, (time.time() - age,) * 2)
        with closing(sqlite3.connect(self.path / "catalog.sqlite")) as catalog:
            row = (self.holder, describe(b"x").digest, process.encode())
            catalog.execute("INSERT INTO leases (holder, digest, process) VALUES (?, ?, ?)", row)
            catalog.commit()

    @property
    def is_left(self) -> bool:
        return bool(leases_of(self.path)) and any(self.holder in n for n in arriving(self.path))


@pytest.mark.parametrize("lease_file", [True, False])
@pytest.mark.parametrize(
    ("change", "age", "stays"),
    [
        ({"boot": "another", "machine": "another"}, DAY / 2, True),
        ({"boot": "another", "machine": "another"}, 2 * DAY, False),
        ({"boot": "another", "machine": ""}, DAY / 2, True),
        ({"boot": "another", "machine": "this"}, DAY / 2, False),
        ({"pid": 0}, DAY / 2, False),
        ({"start": 0}, DAY / 2, False),
        ({}, 2 * DAY, True),
    ],
    ids=["elsewhere", "old", "nowhere", "rebooted", "dead", "reused", "alive"],
)
async def test_a_holder_that_cannot_be_asked(
    tmp_path: Path, lease_file: bool, change: dict[str, object], age: float, stays: bool
) -> None:
    """The holder's files are removed if the holder is dead, or after a day."""
    process = attrs.evolve(Process.current(), **{"pid": 1, "start": start_of(1), **change})
    if change.get("machine") == "this":
        process = attrs.evolve(process, machine=Process.current().machine)
        stays = not process.machine  # a machine without an ID may be any machine
    left = ForeignProcess(tmp_path, process)
    async with opened(tmp_path) as store:
        left.leave(lease_file=lease_file, age=age)
        assert left.is_left
        await store.collect()
        # On this machine, an existing lock file is enough to judge the holder.
        assert left.is_left == (stays and bool(change or not lease_file))
        assert left.is_left or not leases_of(tmp_path)


def start_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])


async def test_two_write_one_blob(tmp_path: Path) -> None:
    """A second writer of a blob comes after the removal of its lock file.

    The second writer gets an error, and the first one continues.
    """
    data = os.urandom(100_000)
    async with opened(tmp_path) as store, opened(tmp_path) as other:
        async with store.ingest(describe(data)) as sink:
            await sink.write(data[:60_000])
            for path in (tmp_path / "ingest").glob("*.lock"):
                path.unlink()
            with pytest.raises(StoreError, match="written by another process, and the file of its"):
                async with other.ingest(describe(data)):
                    pytest.fail("entered")
            await sink.write(data[60_000:])
            await sink.commit()
        assert await other.read_blob(describe(data).digest) == data


async def test_what_is_written_is_removed(tmp_path: Path) -> None:
    """The error reports the removal, and does not blame the layer."""
    async with opened(tmp_path) as store:
        stream = Stream(LAYER.data, stop_at=20)

        async def register() -> None:
            with pytest.raises(StoreError, match=r"was removed while it was written.*no program"):
                await store.register(stream, None)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(register)
            await stream.stopped.wait()
            await trio.run_process(["sh", "-c", f"rm -r {tmp_path}/ingest/*"])
            stream.go_on.set()
