"""Tests of leaving a store's block while calls run in other tasks.

Each call ends, either normally or with `StoreClosed`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

import pytest
import trio
from _tools.leaving import Discard, assert_nothing_left, leave_at, no_descriptor_left
from archives.layouts import oci_image, small_image, tar_of
from store.stores import Blob, Stream, describe, layer_of, open_with_threads

from trio_layers import DirectoryStore, StoreClosed, StoredImage, export_images, import_images

# One of `STRIDE` moments of each call is tested; the environment variable selects all.
STRIDE: Final = 1 if os.environ.get("TRIO_LAYERS_CANCELLATIONS") == "all" else 2

NAME: Final = "docker.io/library/demo:1"
NUMBERS: Final = itertools.count()

Call = Callable[[DirectoryStore, Path], Awaitable[object]]


def opened(path: Path) -> AbstractAsyncContextManager[DirectoryStore]:
    return open_with_threads(path)


def new_layer() -> Blob:
    return layer_of(**{f"file-{next(NUMBERS)}": os.urandom(20_000)})


async def sample(store: DirectoryStore) -> StoredImage:
    [image] = await store.images(NAME)
    return image


def ignore(position: int) -> None:
    pass


# The tested calls. Each gets a store with one image, and a directory beside it.


async def layers(store: DirectoryStore, beside: Path) -> None:
    chain = (await sample(store)).chain_id
    assert chain is not None
    layer = await store.get(chain)
    assert layer is not None
    await store.find(chain)
    await store.tar_size(layer)
    stream = await layer.tar_stream()
    async with stream:
        while await stream.receive_some():
            pass
    store.release(layer)


async def register(store: DirectoryStore, beside: Path) -> None:
    blob = new_layer()
    store.release(await store.register(Stream(blob.data), None, blob.descriptor))


async def register_an_unknown_blob(store: DirectoryStore, beside: Path) -> None:
    store.release(await store.register(Stream(new_layer().data), None))


async def stage(store: DirectoryStore, beside: Path) -> None:
    blob = new_layer()
    async with store.stage(blob.descriptor) as staged:
        await staged.write(blob.data[:9000])
        await staged.restart()
        await staged.write(blob.data)
        await staged.finish(ignore)
        store.release(await staged.commit(None))


async def ingest(store: DirectoryStore, beside: Path) -> None:
    data = os.urandom(1_500_000)
    async with store.ingest(describe(data)) as sink:
        await sink.write(data[:1000])
        await sink.restart()
        await sink.write(data)
        await sink.commit()


async def batch(store: DirectoryStore, beside: Path) -> None:
    async with store.batch() as taken, store.lease() as lease:
        digest, _ = await trio.to_thread.run_sync(taken.add, [os.urandom(1000)])
        await taken.commit([digest], lease=lease)


async def blobs(store: DirectoryStore, beside: Path) -> None:
    manifest = (await sample(store)).manifest
    assert await store.blob(manifest.digest)
    assert await store.read_blob(manifest.digest)
    assert await store.find_document(manifest.digest)
    async with await store.open_blob(manifest.digest) as stream:
        assert await stream.receive_some()
    data = os.urandom(100)
    await store.put_blob(describe(data, "text/plain"), data)


async def images(store: DirectoryStore, beside: Path) -> None:
    image = await sample(store)
    assert await store.image(NAME) == image
    async with store.lease(image.manifest.digest) as lease:
        await lease.hold(image.config.digest)
        await store.put_image(
            f"docker.io/library/other:{next(NUMBERS)}",
            manifest=image.manifest,
            config=image.config,
            platform=image.platform,
            chain_id=image.chain_id,
        )


async def removal(store: DirectoryStore, beside: Path) -> None:
    for image in await store.images():
        if image.reference != NAME:
            await store.remove(image.reference)
    await store.collect()


async def looks(store: DirectoryStore, beside: Path) -> None:
    await store.usage()
    await store.check()


async def import_and_export(store: DirectoryStore, beside: Path) -> None:
    number = next(NUMBERS)
    archive = beside / f"{number}.tar"
    image = small_image(str(number))
    archive.write_bytes(tar_of(oci_image(image, f"docker.io/library/in:{number}")))
    [taken] = await import_images(store, archive)
    archive.unlink()
    await export_images(store, taken.reference, Discard())


CALLS: Final[list[Call]] = [
    layers,
    register,
    register_an_unknown_blob,
    stage,
    ingest,
    batch,
    blobs,
    images,
    removal,
    looks,
    import_and_export,
]


async def prepare(path: Path) -> None:
    archive = path.with_suffix(".tar")
    archive.write_bytes(tar_of(oci_image(small_image(), NAME)))
    async with opened(path) as store:
        await import_images(store, archive)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
async def test_at_each_moment_of_a_call(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "store"
    await prepare(path)
    seen = set()
    for at in itertools.count(1, STRIDE):
        async with no_descriptor_left():
            more, error = await leave_at(
                opened(path), lambda store: call(store, tmp_path), at, StoreClosed
            )
        assert_nothing_left(path)
        seen.add(error)
        if not more:
            break
    assert seen == {"StoreClosed", None}
    async with opened(path) as store:
        assert (await store.check()).problems == ()


async def test_a_call_on_a_store_whose_block_was_left(tmp_path: Path) -> None:
    path = tmp_path / "store"
    await prepare(path)
    for call in CALLS:
        async with opened(path) as store:
            image = await sample(store)
        before = sorted(os.listdir(path / "ingest"))
        with pytest.raises(StoreClosed, match="was closed"):
            await call(store, tmp_path)
        assert sorted(os.listdir(path / "ingest")) == before
    assert image.chain_id is not None


async def test_blocks_of_callers_that_outlive_the_store(tmp_path: Path) -> None:
    """The store's end removes their locks and files, and keeps received bytes."""
    path = tmp_path / "store"
    await prepare(path)
    data, blob = os.urandom(50_000), new_layer()
    async with no_descriptor_left():
        async with trio.open_nursery() as outside:
            both, go_on = [trio.Event(), trio.Event(), trio.Event()], trio.Event()

            async def take_in(store: DirectoryStore) -> None:
                async with store.ingest(describe(data)) as sink:
                    await sink.write(data[:30_000])
                    both[0].set()
                    await go_on.wait()
                    with pytest.raises(StoreClosed):
                        await sink.write(data[30_000:])
                    with pytest.raises(StoreClosed):
                        await sink.commit()

            async def take_in_and_unpack(store: DirectoryStore) -> None:
                async with store.stage(blob.descriptor) as staged:
                    await staged.write(blob.data[:10_000])
                    both[1].set()
                    await go_on.wait()
                    with pytest.raises(StoreClosed):
                        await staged.write(blob.data[10_000:])
                    with pytest.raises(StoreClosed):
                        await staged.commit(None)
                    assert isinstance(await staged.wait_failed(), StoreClosed)

            async def read(store: DirectoryStore) -> None:
                manifest = (await sample(store)).manifest
                async with (
                    store.lease(manifest.digest) as lease,
                    store.batch() as batch,
                    await store.open_blob(manifest.digest) as stream,
                ):
                    both[2].set()
                    await go_on.wait()
                    with pytest.raises(StoreClosed):
                        await stream.receive_some()
                    with pytest.raises(StoreClosed):
                        await lease.hold(manifest.digest)
                    with pytest.raises(StoreClosed):
                        batch.add([b"data"])

            async with opened(path) as store:
                for task in (take_in, take_in_and_unpack, read):
                    outside.start_soon(task, store)
                for event in both:
                    await event.wait()
            assert_nothing_left(path)
            async with opened(path) as another, another.ingest(describe(data)) as sink:
                assert sink.offset == 30_000
                await sink.write(data[30_000:])
                await sink.commit()
            go_on.set()
    assert_nothing_left(path)
