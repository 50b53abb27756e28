"""A collection deletes unneeded items; anything in any kind of use stays."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from pathlib import Path

import pytest
import trio
import trio.testing
from store.crashing import LAYER as HELD
from store.stores import (
    Blob,
    Stream,
    TarUnpacker,
    arriving,
    chain_of,
    describe,
    digest_of,
    ingest,
    layer_of,
    opened,
    put_sample_image,
    visible,
)
from store.test_crashes import crash, running

from trio_layers import open_puller
from trio_layers._errors import VerificationError
from trio_layers._files import disk_usage
from trio_layers._store.collect import Collected, Collector
from trio_layers._store.directory import DirectoryStore
from trio_layers.abc import Layer
from trio_layers.testing import File, build_image, build_layer, open_registry

ONE, TWO, BASE = layer_of(one="1"), layer_of(two="2"), layer_of(base="0")
NOTHING = Collected()


def rows_of(path: Path) -> dict[str, int]:
    connection = sqlite3.connect(path / "catalog.sqlite")
    try:
        return {
            table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("images", "image_blobs", "layers", "trees", "blobs")
        }
    finally:
        connection.close()


async def give_back(store: DirectoryStore, *layers: Layer) -> None:
    """Release layers, and wait until the catalog shows it."""
    for layer in layers:
        store.release(layer)
    await store._parts.leases.drop_idle()


async def test_a_store_of_images_has_no_garbage(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await put_sample_image(store, "localhost/one:1", ONE)
        before = visible(tmp_path)
        assert await store.collect(dry_run=True) == NOTHING
        assert await store.collect() == NOTHING
        assert visible(tmp_path) == before


async def test_an_image_goes_with_its_last_reference(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await put_sample_image(store, "localhost/one:1", ONE)
        await put_sample_image(store, "localhost/one:2", ONE)
        assert await store.remove("localhost/one:1")
        assert not await store.remove("localhost/one:1")
        assert await store.collect() == NOTHING
        assert await store.remove("localhost/one:2", platform="linux/amd64")
        assert await store.images() == []
        before = visible(tmp_path)
        found = await store.collect(dry_run=True)
        assert visible(tmp_path) == before
        collected = await store.collect()
        assert collected == found
        assert (collected.images, collected.layers, collected.trees) == (1, 1, 1)
        assert collected.blobs == 3
        assert visible(tmp_path) == arriving(tmp_path) == []
        assert rows_of(tmp_path) == dict.fromkeys(rows_of(tmp_path), 0)
        # Everything is as before, and the image can be stored again.
        await put_sample_image(store, "localhost/one:1", ONE)
        assert visible(tmp_path) == before


async def test_a_tag_that_moves_leaves_an_image_for_the_next_collection(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        first = await put_sample_image(store, "localhost/one:1", ONE)
        second = await put_sample_image(store, "localhost/one:1", TWO)
        assert (await store.collect(dry_run=True)).images == 1
        async with store.lease(first):
            assert await store.collect() == NOTHING
            assert await store.read_blob(first)
        assert (await store.collect()).images == 1
        [image] = await store.images()
        assert image.manifest.digest == second
        assert await store.get(chain_of(ONE)) is None
        assert await store.get(chain_of(TWO)) is not None


async def test_an_image_is_removed_by_its_digest_with_all_references(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        manifest = await put_sample_image(store, "localhost/one:1", ONE)
        await put_sample_image(store, "localhost/one:2", ONE)
        await put_sample_image(store, "localhost/two:1", TWO)
        assert not await store.remove("sha256:" + 64 * "0")
        assert await store.remove(manifest)
        assert [image.reference for image in await store.images()] == ["localhost/two:1"]
        assert (await store.collect()).blobs == 3


async def test_what_is_shared_is_no_garbage_and_not_counted(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await put_sample_image(store, "localhost/one:1", BASE)
        base = await store.get(chain_of(BASE))
        assert base is not None
        layer = await store.register(Stream(ONE.data), base.chain_id, ONE.descriptor)
        store.release(layer)
        store.release(base)
        garbage = [tmp_path / "blobs/sha256" / ONE.file_name, layer.tree]
        size = sum(disk_usage(path, lambda: None) for path in garbage)
        assert size > 0
        found = await store.collect()
        assert found == Collected(layers=1, trees=1, blobs=1, size=size)
        assert await store.get(chain_of(BASE)) is not None


@pytest.mark.parametrize("held", ["reference", "lease", "lease on the blob"])
async def test_what_is_held_stays_with_all_below_it(tmp_path: Path, held: str) -> None:
    async with opened(tmp_path) as store, opened(tmp_path) as other:
        base = await store.register(Stream(BASE.data), None, BASE.descriptor)
        top = await store.register(Stream(ONE.data), base.chain_id, ONE.descriptor)
        alone = await store.register(Stream(TWO.data), None, TWO.descriptor)
        await give_back(store, base, alone)
        if held == "reference":
            assert (await other.collect()).layers == 1
            assert await other.get(top.chain_id) is not None
            return
        digest = top.chain_id if held == "lease" else top.blob
        async with store.lease(digest):
            await give_back(store, top)
            await other.collect()
            if held == "lease":
                again = await store.get(top.chain_id)
                assert again is not None
                assert again.parent is not None
                assert (again.tree / "fs" / "one").read_text() == "1"
                assert (again.parent.tree / "fs" / "base").read_text() == "0"
                await give_back(store, again)
            else:
                # Its layer can be unpacked from it at once.
                assert await store.get(top.chain_id) is None
                assert len(visible(tmp_path)) == 2
                assert rows_of(tmp_path)["trees"] == 1
        await other.collect()
        assert visible(tmp_path) == []


async def test_an_object_of_a_layer_does_not_bring_it_back(tmp_path: Path) -> None:
    async with opened(tmp_path) as store, opened(tmp_path) as other:
        layer = await store.register(Stream(ONE.data), None, ONE.descriptor)
        await give_back(store, layer)
        assert (await store.collect(dry_run=True)).layers == 1
        await other.collect()
        assert await store.get(layer.chain_id) is None
        assert await store.find(layer.chain_id) is None
        again = await store.register(Stream(ONE.data), None, ONE.descriptor)
        assert (again.tree / "fs" / "one").read_text() == "1"


async def test_a_layer_that_is_looked_for_in_vain_is_not_held(tmp_path: Path) -> None:
    async with opened(tmp_path) as store, opened(tmp_path) as other:
        assert await other.get(chain_of(ONE)) is None
        layer = await store.register(Stream(ONE.data), None, ONE.descriptor)
        store.release(layer)
        await give_back(other)
        assert (await store.collect()).layers == 1


async def test_what_is_staged_stays_until_it_is_a_layer(tmp_path: Path) -> None:
    async with opened(tmp_path) as store, opened(tmp_path) as other:
        base = await store.register(Stream(BASE.data), None, BASE.descriptor)
        async with store.stage(ONE.descriptor) as stage:
            await stage.write(ONE.data)
            await other.collect()
            await stage.finish(lambda _: None)
            with trio.fail_after(30):
                while len(visible(tmp_path)) < 4:
                    await trio.lowlevel.checkpoint()
            assert await other.collect() == NOTHING
            layer = await stage.commit(base.chain_id)
        assert await other.collect() == NOTHING
        await give_back(store, layer)
        assert (await other.collect()).layers == 1
        assert await store.get(base.chain_id) is not None


async def test_a_layer_upon_its_parent_alone_is_not_lost_on_its_way(tmp_path: Path) -> None:
    """Between rename and COMMIT, its tree has no row yet."""
    needs = layer_of(**{"needs-lower": "x"})
    async with opened(tmp_path) as store, opened(tmp_path) as other:
        base = await store.register(Stream(BASE.data), None, BASE.descriptor)
        put, collected = store._trees._write_layer_row, []

        async def late(*args: object) -> object:
            collected.append(await other.collect())
            return await put(*args)  # type: ignore[arg-type]

        store._trees._write_layer_row = late  # type: ignore[assignment, method-assign]
        layer = await store.register(Stream(needs.data), base.chain_id, needs.descriptor)
        assert collected == [NOTHING]
        assert (layer.tree / "fs" / "needs-lower").exists()


async def test_a_broken_off_download_goes_unless_somebody_holds_it(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    async with opened(tmp_path) as store, opened(tmp_path) as other:
        async with store.ingest(describe(data)) as sink:
            await sink.write(data[:70_000])
            assert await other.collect() == NOTHING
        async with store.lease(digest_of(data)):
            assert await other.collect() == NOTHING
        [name] = [name for name in arriving(tmp_path) if name.endswith(".partial")]
        size = disk_usage(tmp_path / "ingest" / name, lambda: None)
        assert await other.collect(dry_run=True) == Collected(blobs=1, size=size)
        assert await other.collect() == Collected(blobs=1, size=size)
        assert arriving(tmp_path) == []
        async with store.ingest(describe(data)) as sink:
            assert sink.offset == 0


async def test_a_blob_without_a_lease_is_garbage(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        descriptor = await ingest(store, b"blob")
        async with store.lease(descriptor.digest):
            assert await store.collect() == NOTHING
        assert (await store.collect()).blobs == 1
        assert await store.blob(descriptor.digest) is None


@pytest.mark.parametrize("what", ["blob-renamed", "tree-renamed"])
async def test_what_a_crash_left_without_a_row_goes(tmp_path: Path, what: str) -> None:
    await crash(tmp_path, what)
    assert visible(tmp_path)
    async with opened(tmp_path) as store:
        collected = await store.collect()
        assert collected.blobs + collected.trees >= 1
        assert visible(tmp_path) == []


async def test_the_dead_hold_nothing_and_the_living_do(tmp_path: Path) -> None:
    async with opened(tmp_path) as store, running(tmp_path, "lease") as process:
        layer = await store.register(Stream(HELD.data), None, HELD.descriptor)
        store.release(layer)
        await store.collect()
        assert len(visible(tmp_path)) == 2
        process.kill()
        await trio.to_thread.run_sync(process.wait)
        collected = await store.collect()
        assert (collected.trees, collected.blobs) == (1, 1)
        assert visible(tmp_path) == []


async def test_what_comes_back_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a collection has deleted the rows, and before it deletes the files, another process
    stores the layer again.
    """
    async with opened(tmp_path) as store, opened(tmp_path) as other:
        layer = await store.register(Stream(ONE.data), None, ONE.descriptor)
        store.release(layer)
        await store.collect(dry_run=True)
        take = Collector._take_all
        brought = []

        async def late(*args: object) -> object:
            if not brought:
                brought.append(await other.register(Stream(ONE.data), None, ONE.descriptor))
            return await take(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(Collector, "_take_all", late)
        collected = await store.collect()
        assert (collected.layers, collected.trees, collected.blobs) == (1, 0, 0)
        assert (brought[0].tree / "fs" / "one").read_text() == "1"
        assert await other.read_blob(ONE.digest) == ONE.data
        assert len(visible(tmp_path)) == 2


async def test_cancelled_it_frees_the_rest_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:
        for number in range(3):
            blob = layer_of(**{f"file{number}": "x" * 5000})
            store.release(await store.register(Stream(blob.data), None, blob.descriptor))
        with trio.CancelScope() as scope:
            take = Collector._take_partials

            def cancel(*args: object) -> object:
                trio.from_thread.run_sync(scope.cancel)
                return take(*args)  # type: ignore[arg-type]

            monkeypatch.setattr(Collector, "_take_partials", cancel)
            await store.collect()
        assert scope.cancelled_caught
        assert visible(tmp_path) == []
        assert arriving(tmp_path)
    assert arriving(tmp_path) == []


async def test_pulls_and_collections_at_once(tmp_path: Path) -> None:
    """Each layer is stored, used and released many times, while two stores collect."""
    blobs = [layer_of(**{f"file{number}": str(number) * 100}) for number in range(4)]
    running = 0

    async def use(store: DirectoryStore, blob: Blob) -> None:
        nonlocal running
        running += 1
        for _ in range(8):
            base = await store.register(Stream(BASE.data), None, BASE.descriptor)
            layer = await store.register(Stream(blob.data), base.chain_id, blob.descriptor)
            await trio.lowlevel.checkpoint()
            [name] = os.listdir(layer.tree / "fs")
            assert (layer.tree / "fs" / name).read_text()
            assert (base.tree / "fs" / "base").read_text() == "0"
            assert await store.get(layer.chain_id) is layer
            for _ in range(2):
                store.release(layer)
            store.release(base)
        running -= 1

    async def collect(store: DirectoryStore) -> None:
        while running:
            await store.collect()

    async with opened(tmp_path) as store, opened(tmp_path) as other:
        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                for index, blob in enumerate(blobs):
                    nursery.start_soon(use, (store, other)[index % 2], blob)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(collect, store)
                nursery.start_soon(collect, other)
        await store.collect()
        assert visible(tmp_path) == []
        assert rows_of(tmp_path) == dict.fromkeys(rows_of(tmp_path), 0)


async def test_what_an_image_has_alone_is_what_its_removal_frees(tmp_path: Path) -> None:
    async with open_registry() as registry, open_puller(tmp_path) as puller:
        base = build_layer([File("base", os.urandom(50_000))])
        for name in ("one", "two"):
            own = build_layer([File(name, os.urandom(30_000))])
            reference = registry.add(build_image([base, own]), f"demo:{name}")
            async with puller.pull(reference) as image:
                pass
        usage = await puller.store.usage()
        assert len(usage.images) == 2
        this = usage.images[image.digest]
        assert 2 * 80_000 <= this.size < usage.size
        assert 2 * 30_000 <= this.exclusive <= this.size - 2 * 50_000
        assert await puller.store.remove(reference)
        assert (await puller.store.collect()).size == this.exclusive
        [that] = (await puller.store.usage()).images.values()
        assert that.size == that.exclusive


def test_disk_usage_is_what_du_says(tmp_path: Path) -> None:
    deep = tmp_path
    for number in range(30):
        deep = deep / f"directory{number}"
        deep.mkdir()
        (deep / "file").write_bytes(b"x" * number * 1000)
    os.link(deep / "file", deep / "again")
    (deep / "link").symlink_to("nowhere")
    said = subprocess.run(
        ["du", "--summarize", "--block-size=1", tmp_path], capture_output=True, check=True
    )
    assert disk_usage(tmp_path, lambda: None) == int(said.stdout.split()[0])
    assert disk_usage(tmp_path / "missing", lambda: None) == 0


async def test_a_damaged_manifest_is_no_image(tmp_path: Path) -> None:
    async with opened(tmp_path, TarUnpacker()) as store:
        manifest = await put_sample_image(store, "localhost/one:1", ONE)
        path = await store.blob(manifest)
        assert path is not None
        path.write_bytes(path.read_bytes()[:-1])
        [image] = await store.images()
        with pytest.raises(VerificationError):
            await store.put_image(
                "localhost/two:1",
                manifest=image.manifest,
                config=image.config,
                platform=None,
                chain_id=None,
            )
