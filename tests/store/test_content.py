"""Blobs in the store: received, resumed, verified, kept and read."""

from __future__ import annotations

import errno
import gc
import io
import os
import sqlite3
import threading
from pathlib import Path

import attrs
import pytest
import trio
from store.stores import Stream, arriving, describe, digest_of, ingest, opened, visible

from trio_layers._digest import Digest
from trio_layers._errors import InvalidDigest, StoreError, StoreFull, VerificationError
from trio_layers._manifest import Descriptor
from trio_layers._store import commits, content

DATA = bytes(range(256)) * 16 * 1024  # 4 MiB
DESCRIPTOR = describe(DATA)
NAME = DESCRIPTOR.digest.removeprefix("sha256:")


async def test_a_committed_blob_is_there_and_stays_there(tmp_path: Path) -> None:
    async with opened(tmp_path / "store") as store:
        assert await store.blob(DESCRIPTOR.digest) is None
        await ingest(store, DATA)
        path = await store.blob(DESCRIPTOR.digest)
        assert path == store.path / "blobs" / "sha256" / NAME
        assert path.read_bytes() == DATA
        assert arriving(store.path) == []
    async with opened(tmp_path / "store") as store:
        assert await store.blob(DESCRIPTOR.digest) == path
        assert await store.read_blob(DESCRIPTOR.digest) == DATA


async def test_what_is_there_is_told_at_every_moment(tmp_path: Path) -> None:
    async with opened(tmp_path) as store, store.ingest(DESCRIPTOR) as sink:
        assert (sink.offset, sink.digest) == (0, digest_of(b""))
        for position in range(0, len(DATA), 300_000):
            piece = DATA[position : position + 300_000]
            await sink.write(piece)
            there = position + len(piece)
            assert (sink.offset, sink.digest) == (there, digest_of(DATA[:there]))
        await sink.restart()
        assert (sink.offset, sink.digest) == (0, digest_of(b""))
        await sink.write(DATA)
        await sink.commit()
        assert sink.committed
        assert (sink.offset, sink.digest) == (len(DATA), DESCRIPTOR.digest)


async def test_left_without_commit_the_bytes_are_kept_and_the_blob_is_not_visible(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as store:
        async with store.ingest(DESCRIPTOR) as sink:
            await sink.write(DATA[:1_500_000])
        assert await store.blob(DESCRIPTOR.digest) is None
        assert arriving(tmp_path) == [f"{NAME}.partial"]
        async with store.ingest(DESCRIPTOR) as sink:
            assert (sink.offset, sink.digest) == (1_500_000, digest_of(DATA[:1_500_000]))
    async with opened(tmp_path) as store:
        async with store.ingest(DESCRIPTOR) as sink:
            assert sink.offset == 1_500_000
            await sink.write(DATA[1_500_000:])
            await sink.commit()
        assert await store.read_blob(DESCRIPTOR.digest) == DATA
    assert arriving(tmp_path) == []


async def test_a_failure_in_the_block_comes_out_as_it_is_and_keeps_the_bytes(
    tmp_path: Path,
) -> None:
    class Failure(Exception):
        pass

    async with opened(tmp_path) as store:
        failure = Failure()
        with pytest.raises(Failure) as caught:
            async with store.ingest(DESCRIPTOR) as sink:
                await sink.write(DATA[:1000])
                raise failure
        assert caught.value is failure
        async with store.ingest(DESCRIPTOR) as sink:
            assert sink.offset == 1000


async def test_a_failure_goes_through_the_store_as_it_is(tmp_path: Path) -> None:
    failure = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:
        async with opened(tmp_path):
            raise failure
    assert caught.value is failure


async def test_cancelled_in_a_write_nothing_is_visible_and_all_bytes_are_kept(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as store:
        with trio.CancelScope() as scope:
            async with store.ingest(DESCRIPTOR) as sink:
                await sink.write(DATA[:2_000_000])
                scope.cancel()
                await sink.write(DATA[2_000_000:3_000_000])
        assert scope.cancelled_caught
        assert visible(tmp_path) == []
        async with store.ingest(DESCRIPTOR) as sink:
            assert (sink.offset, sink.digest) == (3_000_000, digest_of(DATA[:3_000_000]))


async def test_cancelled_at_the_commit_the_whole_blob_is_kept_to_be_committed(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as store:
        with trio.CancelScope() as scope:
            async with store.ingest(DESCRIPTOR) as sink:
                await sink.write(DATA)
                scope.cancel()
                await sink.commit()
        assert scope.cancelled_caught
        assert visible(tmp_path) == []
        async with store.ingest(DESCRIPTOR) as sink:
            assert sink.offset == len(DATA)
            await sink.commit()
        assert visible(tmp_path) == [f"blobs/{NAME}"]


@pytest.mark.parametrize("wrong", [DATA[:-1], DATA[:-1] + b"x", DATA + b"x"])
async def test_wrong_bytes_are_never_visible_and_not_kept(tmp_path: Path, wrong: bytes) -> None:
    async with opened(tmp_path) as store:
        async with store.ingest(DESCRIPTOR) as sink:
            await sink.write(wrong)
            with pytest.raises(VerificationError, match=DESCRIPTOR.digest) as caught:
                await sink.commit()
            assert caught.value.digest == DESCRIPTOR.digest
            assert sink.offset == 0
            assert not sink.committed
        assert await store.blob(DESCRIPTOR.digest) is None
        await ingest(store, DATA)


@pytest.mark.parametrize("left", [b"x" * len(DATA), DATA + b"x"], ids=["wrong", "long"])
async def test_what_cannot_become_the_blob_any_more_is_dropped(tmp_path: Path, left: bytes) -> None:
    async with opened(tmp_path) as store:
        (tmp_path / "ingest" / f"{NAME}.partial").write_bytes(left)
        async with store.ingest(DESCRIPTOR) as sink:
            assert sink.offset == 0


async def test_a_file_whose_row_was_never_written_is_adopted(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        (tmp_path / "blobs" / "sha256" / NAME).write_bytes(DATA)
        assert await store.blob(DESCRIPTOR.digest) is None
        async with store.ingest(DESCRIPTOR) as sink:
            assert (sink.offset, sink.committed) == (len(DATA), False)
            await sink.commit()
        assert await store.read_blob(DESCRIPTOR.digest) == DATA


async def test_a_damaged_file_whose_row_was_never_written_is_replaced(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        (tmp_path / "blobs" / "sha256" / NAME).write_bytes(DATA[:100] + b"x" * 100)
        async with store.ingest(DESCRIPTOR) as sink:
            await sink.write(DATA[sink.offset :])
            with pytest.raises(VerificationError):
                await sink.commit()
            await sink.write(DATA)
            await sink.commit()
        assert await store.read_blob(DESCRIPTOR.digest) == DATA


async def test_a_row_that_could_not_be_written_is_written_by_another_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise sqlite3.OperationalError("the row")

    async with opened(tmp_path) as store, store.ingest(DESCRIPTOR) as sink:
        await sink.write(DATA)
        with monkeypatch.context() as patch:
            patch.setattr(content, "add_blob", fail)
            with pytest.raises(StoreError, match="the row"):
                await sink.commit()
        assert await store.blob(DESCRIPTOR.digest) is None
        assert (sink.committed, sink.offset) == (False, len(DATA))
        await sink.commit()
        assert await store.read_blob(DESCRIPTOR.digest) == DATA


async def test_a_row_that_another_wrote_meanwhile_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise sqlite3.OperationalError("the row")

    async with opened(tmp_path) as store, store.ingest(DESCRIPTOR) as sink:
        await sink.write(DATA)
        with monkeypatch.context() as patch:
            patch.setattr(content, "add_blob", fail)
            with pytest.raises(StoreError, match="the row"):
                await sink.commit()
        await store.put_blob(DESCRIPTOR, DATA)
        await sink.commit()
        assert sink.committed


async def test_what_could_not_be_cut_off_is_cut_off_before_more_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class File(io.FileIO):
        """A file on a disk that becomes full within a write, and stays full for a while."""

        room = 1000

        def write(self, data: memoryview) -> int:  # type: ignore[override]
            if not self.room:
                raise OSError(errno.ENOSPC, "full")
            written = super().write(data[: self.room])
            self.room -= written
            return written

        def truncate(self, size: int | None = None) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "full")
            return super().truncate(size)

    files = []

    def make(*args: str) -> File:
        files.append(File(*args))
        return files[-1]

    async with opened(tmp_path) as store:
        monkeypatch.setattr(content.io, "FileIO", make)
        async with store.ingest(DESCRIPTOR) as sink:
            with pytest.raises(StoreFull):
                await sink.write(DATA)
            files[0].room = len(DATA)
            await sink.commit()
        path = await store.blob(DESCRIPTOR.digest)
        assert path is not None
        assert path.read_bytes() == DATA


async def test_what_the_disk_may_have_lost_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "the disk")

    async with opened(tmp_path) as store, store.ingest(DESCRIPTOR) as sink:
        await sink.write(DATA)
        with monkeypatch.context() as patch:
            patch.setattr(commits, "sync_file_system", fail)
            with pytest.raises(StoreError, match="the disk"):
                await sink.commit()
        assert sink.offset == 0
        with pytest.raises(VerificationError):
            await sink.commit()
        await sink.write(DATA)
        await sink.commit()
        assert await store.read_blob(DESCRIPTOR.digest) == DATA


@pytest.mark.parametrize("digest", ["sha256:../../evil", "sha256:", "md5:0", "/evil"])
async def test_a_digest_that_is_none_leads_nowhere(tmp_path: Path, digest: str) -> None:
    descriptor = Descriptor("x", Digest(digest), 4)
    async with opened(tmp_path / "store") as store:
        with pytest.raises(InvalidDigest):
            async with store.ingest(descriptor):
                pytest.fail("entered")
        with pytest.raises(InvalidDigest):
            await store.register(Stream(b""), None, descriptor)
        assert await store.blob(descriptor.digest) is None
        assert arriving(store.path) == []
    assert os.listdir(tmp_path) == ["store"]


async def test_two_tasks_share_one_arrival(tmp_path: Path) -> None:
    waiting = trio.Event()
    order = []

    async def second() -> None:
        waiting.set()
        async with store.ingest(DESCRIPTOR) as sink:
            order.append(("second", sink.committed))

    async with opened(tmp_path) as store, trio.open_nursery() as nursery:
        async with store.ingest(DESCRIPTOR) as sink:
            nursery.start_soon(second)
            await waiting.wait()
            await sink.write(DATA)
            order.append(("first", sink.committed))
            await sink.commit()
    assert order == [("first", False), ("second", True)]


async def test_waiting_for_another_can_be_cancelled(tmp_path: Path) -> None:
    async with opened(tmp_path) as store, store.ingest(DESCRIPTOR) as sink:
        with trio.move_on_after(0.2) as scope:
            async with store.ingest(DESCRIPTOR):
                pytest.fail("two at once")
        assert scope.cancelled_caught
        await sink.write(DATA)
        await sink.commit()


async def test_who_waited_goes_on_from_the_bytes_of_one_who_failed(tmp_path: Path) -> None:
    offsets = []

    async def second() -> None:
        async with store.ingest(DESCRIPTOR) as sink:
            offsets.append(sink.offset)

    async with opened(tmp_path) as store, trio.open_nursery() as nursery:
        async with store.ingest(DESCRIPTOR) as sink:
            nursery.start_soon(second)
            await sink.write(DATA[:12345])
    assert offsets == [12345]


async def test_a_store_opened_twice_is_one_store(tmp_path: Path) -> None:
    async with opened(tmp_path) as one, opened(tmp_path) as other:
        await ingest(one, DATA)
        assert await other.read_blob(DESCRIPTOR.digest) == DATA
        async with other.ingest(DESCRIPTOR) as sink:
            assert sink.committed


async def test_a_blob_that_is_there_takes_nothing_in(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await ingest(store, DATA)
        async with store.ingest(DESCRIPTOR) as sink:
            assert (sink.offset, sink.digest) == (len(DATA), DESCRIPTOR.digest)
            with pytest.raises(StoreError, match=DESCRIPTOR.digest):
                await sink.write(b"more")
            with pytest.raises(StoreError, match=DESCRIPTOR.digest):
                await sink.restart()
            await sink.commit()


async def test_a_descriptor_with_another_size_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await ingest(store, DATA)
        with pytest.raises(VerificationError, match=DESCRIPTOR.digest):
            async with store.ingest(attrs.evolve(DESCRIPTOR, size=5)):
                pytest.fail("entered")


async def test_documents_are_put_whole(tmp_path: Path) -> None:
    document = b'{"schemaVersion": 2}'
    async with opened(tmp_path) as store:
        await store.put_blob(describe(document), document)
        await store.put_blob(describe(document), document)
        assert await store.read_blob(digest_of(document)) == document
        with pytest.raises(VerificationError):
            await store.put_blob(describe(b"another"), document)
        assert await store.blob(digest_of(b"another")) is None
    assert arriving(tmp_path) == []


async def test_a_document_that_is_there_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pull of a stored image syncs no document, but still refuses a wrong one."""
    async with opened(tmp_path) as store:
        await store.put_blob(DESCRIPTOR, DATA)
        synced: list[Path] = []
        monkeypatch.setattr(commits, "sync_file_system", synced.append)
        await store.put_blob(DESCRIPTOR, DATA)
        assert synced == []
        with pytest.raises(VerificationError):
            await store.put_blob(DESCRIPTOR, DATA + b"more")


async def test_reading_is_bounded_and_verified(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await ingest(store, DATA)
        with pytest.raises(StoreError, match="open_blob"):
            await store.read_blob(DESCRIPTOR.digest, limit=len(DATA) - 1)
        path = await store.blob(DESCRIPTOR.digest)
        assert path is not None
        path.write_bytes(DATA[:-1] + b"x")
        with pytest.raises(VerificationError, match="damaged"):
            await store.read_blob(DESCRIPTOR.digest)
        with pytest.raises(StoreError, match="not in the store"):
            await store.read_blob(digest_of(b""))
        with pytest.raises(StoreError, match="not in the store"):
            await store.open_blob(digest_of(b""))


async def test_a_stream_of_a_blob(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await ingest(store, DATA)
        stream = await store.open_blob(DESCRIPTOR.digest)
        async with stream:
            assert await stream.receive_some(7) == DATA[:7]
            assert len(await stream.receive_some(len(DATA))) == 1024 * 1024
            rest = b"".join([chunk async for chunk in stream])
            assert rest == DATA[7 + 1024 * 1024 :]
            assert await stream.receive_some() == b""
            with pytest.raises(ValueError, match="max_bytes"):
                await stream.receive_some(0)
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()
        gc.collect()


async def test_a_stream_closed_under_a_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on = trio.Event(), threading.Event()
    read = content.BlobStream._read

    def slow(stream: content.BlobStream, size: int) -> bytes:
        trio.from_thread.run_sync(reading.set)
        go_on.wait()
        return read(stream, size)

    async def receive() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()

    monkeypatch.setattr(content.BlobStream, "_read", slow)
    async with opened(tmp_path) as store:
        await ingest(store, DATA)
        stream = await store.open_blob(DESCRIPTOR.digest)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await reading.wait()
            await stream.aclose()
            closed_at_once = stream._file.closed
            go_on.set()
        assert not closed_at_once
        assert stream._file.closed


async def test_no_lock_file_and_no_descriptor_is_left(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with opened(tmp_path) as store:
        await ingest(store, DATA)
        async with store.ingest(describe(b"other")) as sink:
            await sink.write(b"ot")
    assert arriving(tmp_path) == [describe(b"other").digest.removeprefix("sha256:") + ".partial"]
    assert os.listdir(tmp_path / "leases") == []
    assert len(os.listdir("/proc/self/fd")) == before
