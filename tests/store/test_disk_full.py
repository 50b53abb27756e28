"""A full disk is a typed error, and nothing stored is lost."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from store.stores import (
    Stream,
    arriving,
    describe,
    ingest,
    layer_of,
    mounted_tmpfs,
    opened,
    visible,
)

from trio_layers._errors import StoreFull

MIB = 1024 * 1024
NOISE = random.Random(1).randbytes(8 * MIB)
SMALL = NOISE[: MIB // 2]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="takes root to mount")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_tmpfs(tmp_path / "disk", "size=4m"):
        yield tmp_path / "disk"


async def test_a_blob_that_does_not_fit(small_disk: Path) -> None:
    path = small_disk / "store"
    descriptor = describe(NOISE)
    async with opened(path) as store:
        await ingest(store, SMALL)
        with pytest.raises(StoreFull, match=str(path)) as caught:
            await ingest(store, NOISE)
        assert isinstance(caught.value.__cause__, OSError)
        assert await store.read_blob(describe(SMALL).digest) == SMALL
        assert await store.blob(descriptor.digest) is None
        async with store.ingest(descriptor) as sink:
            # A partly written batch does not count.
            assert sink.offset < len(NOISE)
            assert sink.digest == describe(NOISE[: sink.offset]).digest
            await sink.restart()
        await ingest(store, SMALL[:1000])


async def test_what_came_before_it_was_full_is_resumed_when_it_is_not(small_disk: Path) -> None:
    path = small_disk / "store"
    data = NOISE[: 2 * MIB]
    async with opened(path) as store:
        filler = small_disk / "filler"
        filler.write_bytes(bytes(2 * MIB))
        with pytest.raises(StoreFull):
            async with store.ingest(describe(data)) as sink:
                await sink.write(data[:MIB])
                await sink.write(data[MIB:])
        filler.unlink()
        async with store.ingest(describe(data)) as sink:
            assert sink.offset == MIB
            await sink.write(data[MIB:])
            await sink.commit()
        assert await store.read_blob(describe(data).digest) == data


async def test_a_layer_that_does_not_fit(small_disk: Path) -> None:
    path = small_disk / "store"
    blob = layer_of(big=NOISE[: 3 * MIB])
    async with opened(path) as store:
        await ingest(store, SMALL)
        with pytest.raises(StoreFull, match=str(path)):
            await store.register(Stream(blob.data), None, blob.descriptor)
    # The unpacked part is removed in the background, before the store is left.
    async with opened(path) as store:
        assert await store.get(blob.diff_id) is None
        assert await store.read_blob(describe(SMALL).digest) == SMALL
    assert [name for name in arriving(path) if not name.endswith(".partial")] == []
    assert not [name for name in visible(path) if name.startswith("trees")]


async def test_a_catalog_that_cannot_grow(small_disk: Path) -> None:
    path = small_disk / "store"
    async with opened(path) as store:
        await ingest(store, SMALL)
        fill(small_disk / "filler")
        with pytest.raises(StoreFull, match=str(path)):
            for number in range(1000):
                await store.put_blob(describe(b"%d" % number), b"%d" % number)
        assert await store.read_blob(describe(SMALL).digest) == SMALL
        (small_disk / "filler").unlink()
        await store.put_blob(describe(b"there is space"), b"there is space")
    async with opened(path) as store:
        assert await store.read_blob(describe(b"there is space").digest) == b"there is space"


async def test_a_commit_that_failed_is_tried_again(small_disk: Path) -> None:
    path = small_disk / "store"
    async with opened(path) as store:
        data = NOISE[:MIB]
        async with store.ingest(describe(data)) as sink:
            await sink.write(data)
            fill(small_disk / "filler")
            with pytest.raises(StoreFull):
                for number in range(1000):
                    await store.put_blob(describe(b"%d" % number), b"%d" % number)
            with pytest.raises(StoreFull):
                await sink.commit()
            assert (sink.committed, sink.offset) == (False, MIB)
            (small_disk / "filler").unlink()
            await sink.commit()
            assert sink.committed
        assert await store.read_blob(describe(data).digest) == data


async def test_a_store_that_cannot_be_opened_for_lack_of_space_is_opened_later(
    small_disk: Path,
) -> None:
    path = small_disk / "store"
    async with opened(path) as store:
        await ingest(store, SMALL)
    fill(small_disk / "filler")
    with pytest.raises(StoreFull, match=str(path)):
        async with opened(path):
            pytest.fail("entered")
    (small_disk / "filler").unlink()
    async with opened(path) as store:
        assert await store.read_blob(describe(SMALL).digest) == SMALL


async def test_a_store_that_cannot_be_made_is_made_later(small_disk: Path) -> None:
    path = small_disk / "store"
    fill(small_disk / "filler")
    with pytest.raises(StoreFull, match=str(path)):
        async with opened(path):
            pytest.fail("entered")
    (small_disk / "filler").unlink()
    async with opened(path) as store:
        await ingest(store, SMALL)


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        for size in (64 * 1024, 4096):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
