"""Layers: registered, found again, shared, and never visible in part."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import trio
import trio.testing
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
    tar_of,
    visible,
)

from trio_layers._errors import DecompressionError, StoreError, UnpackError, VerificationError
from trio_layers._store.directory import DirectoryStore

BASE = layer_of(hello="world")
TOP = layer_of(more="files", big="x" * 100_000)
ASSUMING = layer_of(assumes="", some="thing")
NEEDY = layer_of(**{"needs-lower": "", "other": "thing"})


async def register(store: DirectoryStore, *blobs: Blob) -> None:
    """Register a stack of layers, and release them."""
    parent = None
    for blob in blobs:
        layer = await store.register(Stream(blob.data), parent, blob.descriptor)
        parent = layer.chain_id
        store.release(layer)


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    async with stream:
        return b"".join([chunk async for chunk in stream])


async def test_a_layer_is_registered_with_its_blob_and_its_tree(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        assert await store.get(chain_of(BASE)) is None
        layer = await store.register(Stream(BASE.data), None, BASE.descriptor)
        assert (layer.diff_id, layer.chain_id) == (BASE.diff_id, chain_of(BASE))
        assert layer.parent is None
        assert (layer.tree / "fs" / "hello").read_text() == "world"
        assert json.loads((layer.tree / "entries").read_text())["lower"] is False
        assert await store.read_blob(BASE.digest) == BASE.data
        assert await read_all(await layer.tar_stream()) == BASE.data
        store.release(layer)
    assert arriving(tmp_path) == []


async def test_a_stack_is_found_again_when_the_store_is_opened_again(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await register(store, BASE, TOP)
    async with opened(tmp_path) as store:
        layer = await store.get(chain_of(BASE, TOP))
        assert layer is not None
        assert (layer.diff_id, layer.chain_id) == (TOP.diff_id, chain_of(BASE, TOP))
        assert layer.parent is not None
        assert (layer.parent.diff_id, layer.parent.parent) == (BASE.diff_id, None)
        assert (layer.tree / "fs" / "more").read_text() == "files"
        store.release(layer)
        below = await store.get(chain_of(BASE))
        assert below is layer.parent
        store.release(below)


async def test_without_a_descriptor_the_blob_is_kept_under_its_digest(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        layer = await store.register(Stream(BASE.data), None)
        assert layer.blob == BASE.digest
        assert await store.read_blob(BASE.digest) == BASE.data
        again = await store.register(Stream(BASE.data), None)
        assert again is layer
    assert arriving(tmp_path) == []


async def test_a_known_layer_is_returned_and_not_unpacked_again(tmp_path: Path) -> None:
    unpacker = TarUnpacker()
    async with opened(tmp_path, unpacker) as store:
        await register(store, BASE)
        stream = Stream(BASE.data)
        layer = await store.register(stream, None, BASE.descriptor)
        assert layer.chain_id == chain_of(BASE)
        assert (unpacker.calls, stream.position) == (["alone"], 0)


async def test_a_blob_that_was_taken_in_is_unpacked_from_the_stream(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await ingest(store, BASE.data)
        stream = await store.open_blob(BASE.digest)
        async with stream:
            layer = await store.register(stream, None, BASE.descriptor)
        assert (layer.tree / "fs" / "hello").read_text() == "world"


async def test_one_tree_serves_all_parents_while_its_assumptions_hold(tmp_path: Path) -> None:
    unpacker = TarUnpacker()
    async with opened(tmp_path, unpacker) as store:
        await register(store, BASE, ASSUMING)
        await register(store, TOP, ASSUMING)
        one = await store.get(chain_of(BASE, ASSUMING))
        other = await store.get(chain_of(TOP, ASSUMING))
        assert one is not None
        assert other is not None
        assert one.tree == other.tree
        assert one.tree.name == ASSUMING.diff_id.removeprefix("sha256:")
        assert unpacker.calls == ["alone"] * 3


async def test_where_they_do_not_hold_the_layer_gets_a_tree_of_its_chain(tmp_path: Path) -> None:
    unpacker = TarUnpacker()
    async with opened(tmp_path, unpacker) as store:
        await register(store, BASE, ASSUMING)
        unpacker.assumption = False
        await register(store, TOP, ASSUMING)
        one = await store.get(chain_of(BASE, ASSUMING))
        other = await store.get(chain_of(TOP, ASSUMING))
        assert one is not None
        assert other is not None
        assert other.tree.name == chain_of(TOP, ASSUMING).removeprefix("sha256:")
        assert json.loads((other.tree / "entries").read_text())["lower"] is True
        assert json.loads((one.tree / "entries").read_text())["lower"] is False
        assert unpacker.calls == ["alone", "alone", "alone", "on top"]
    assert arriving(tmp_path) == []


@pytest.mark.parametrize("described", [True, False])
async def test_a_layer_that_needs_its_parents_is_unpacked_on_top(
    tmp_path: Path, described: bool
) -> None:
    unpacker = TarUnpacker()
    async with opened(tmp_path, unpacker) as store:
        await register(store, BASE)
        descriptor = NEEDY.descriptor if described else None
        layer = await store.register(Stream(NEEDY.data), chain_of(BASE), descriptor)
        assert layer.tree.name == chain_of(BASE, NEEDY).removeprefix("sha256:")
        assert unpacker.calls == ["alone", "alone", "on top"]
    trees = {name for name in visible(tmp_path) if name.startswith("trees")}
    assert trees == {
        "trees/" + id.removeprefix("sha256:") for id in (BASE.diff_id, chain_of(BASE, NEEDY))
    }
    assert arriving(tmp_path) == []


async def test_two_layers_are_registered_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        slow, fast = Stream(BASE.data, stop_at=20), Stream(TOP.data)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.register, slow, None, BASE.descriptor)
            await slow.stopped.wait()
            assert store.statistics().unpacking == 1
            assert "1 unpacking" in repr(store)
            layer = await store.register(fast, None, TOP.descriptor)
            assert layer.chain_id == chain_of(TOP)
            slow.go_on.set()
        assert await store.get(chain_of(BASE)) is not None


async def test_of_two_who_register_one_layer_one_waits_and_shares(tmp_path: Path) -> None:
    unpacker = TarUnpacker()
    layers = []

    async def register_once(store: DirectoryStore, stream: Stream) -> None:
        layers.append(await store.register(stream, None, BASE.descriptor))

    async with opened(tmp_path, unpacker) as store, opened(tmp_path, unpacker) as other:
        first, second, third = Stream(BASE.data, stop_at=20), Stream(BASE.data), Stream(BASE.data)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(register_once, store, first)
            await first.stopped.wait()
            nursery.start_soon(register_once, store, second)
            nursery.start_soon(register_once, other, third)
            await trio.testing.wait_all_tasks_blocked()
            first.go_on.set()
        assert [layer.chain_id for layer in layers] == [chain_of(BASE)] * 3
        assert (second.position, third.position) == (0, 0)
        assert unpacker.calls == ["alone"]


async def test_two_blobs_of_one_layer_share_its_tree(tmp_path: Path) -> None:
    tar = tar_of(same="tree")
    blobs = [gzip.compress(tar, level, mtime=0) for level in (0, 9)]
    async with opened(tmp_path) as store:
        async with trio.open_nursery() as nursery:
            for blob in blobs:
                nursery.start_soon(store.register, Stream(blob), None, describe(blob))
        assert [await store.read_blob(digest_of(blob)) for blob in blobs] == blobs
        assert store.statistics().layers == 1
        assert store.statistics().references == 2
    assert len([name for name in visible(tmp_path) if name.startswith("trees")]) == 1


async def test_what_did_not_come_as_described_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        with pytest.raises(VerificationError, match=TOP.digest) as caught:
            await store.register(Stream(BASE.data), None, TOP.descriptor)
        assert caught.value.digest == TOP.digest
        assert visible(tmp_path) == []
        await register(store, TOP)


async def test_a_stored_blob_does_not_vouch_for_another_stream(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await ingest(store, TOP.data)
        with pytest.raises(VerificationError, match=TOP.digest):
            await store.register(Stream(BASE.data), None, TOP.descriptor)
        assert await store.get(chain_of(BASE)) is None


async def test_a_blob_that_was_damaged_later_is_not_unpacked_on_top(tmp_path: Path) -> None:
    tar = tar_of(assumes="", some="thing")
    unpacker = TarUnpacker()
    async with opened(tmp_path, unpacker) as store:
        await register(store, BASE)
        await store.register(Stream(tar), None, describe(tar))
        path = await store.blob(digest_of(tar))
        assert path is not None
        path.write_bytes(tar.replace(b"thing", b"thong"))
        unpacker.assumption = False
        with pytest.raises(VerificationError, match=digest_of(tar)):
            await store.register(Stream(tar), chain_of(BASE), describe(tar))
        assert store.statistics().unpacking == 0


@pytest.mark.parametrize("data", [BASE.data, b"plain and short"], ids=["gzip", "plain"])
async def test_a_stream_that_fails_in_its_beginning(tmp_path: Path, data: bytes) -> None:
    failure = OSError("the beginning")
    async with opened(tmp_path) as store:
        with pytest.raises(DecompressionError, match="the beginning") as caught:
            await store.register(Stream(data, stop_at=9, error=failure), None)
        assert caught.value.__cause__ is failure
    assert arriving(tmp_path) == []


async def test_a_stream_that_fails_later_fails_as_itself(tmp_path: Path) -> None:
    """The stream's error is raised even if it looks like an error of the store's disk."""
    failure = PermissionError(13, "not our disk")
    async with opened(tmp_path) as store:
        with pytest.raises(PermissionError) as caught:
            await store.register(Stream(BASE.data, stop_at=50, error=failure), None)
        assert caught.value is failure


async def test_what_begins_no_stream(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        with pytest.raises(DecompressionError):
            await store.register(Stream(b"\x1f\x8b\x08"), None)
        assert visible(tmp_path) == []


async def test_a_damaged_layer_leaves_nothing_visible(tmp_path: Path) -> None:
    data = TOP.data[:60] + bytes(len(TOP.data) - 60)
    async with opened(tmp_path) as store:
        with pytest.raises(UnpackError):
            await store.register(Stream(data), None, describe(data))
        assert visible(tmp_path) == []


async def test_a_parent_that_is_not_there(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        with pytest.raises(StoreError, match=chain_of(BASE)):
            await store.register(Stream(TOP.data), chain_of(BASE), TOP.descriptor)


@pytest.mark.parametrize("stop_at", [0, 5, 100, len(TOP.data)])
async def test_cancelled_while_bytes_come_nothing_is_visible_and_they_are_kept(
    tmp_path: Path, stop_at: int
) -> None:
    async with opened(tmp_path) as store:
        stream = Stream(TOP.data, stop_at=stop_at)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.register, stream, None, TOP.descriptor)
            await stream.stopped.wait()
            nursery.cancel_scope.cancel()
        assert nursery.cancel_scope.cancelled_caught
        assert visible(tmp_path) == []
        assert await store.get(chain_of(TOP)) is None
        async with store.ingest(TOP.descriptor) as sink:
            assert sink.offset == stop_at
            assert sink.digest == digest_of(TOP.data[:stop_at])
        await register(store, TOP)
    assert arriving(tmp_path) == []


async def test_cancelled_when_all_is_unpacked_it_is_whole_or_not_there(tmp_path: Path) -> None:
    unpacker = TarUnpacker()
    async with opened(tmp_path, unpacker) as store:
        scope = trio.CancelScope()
        unpacker.before_return = lambda: trio.from_thread.run_sync(scope.cancel)
        with scope:
            await store.register(Stream(BASE.data), None, BASE.descriptor)
        assert scope.cancelled_caught
        assert [name for name in visible(tmp_path) if name.startswith("trees")] == []
        unpacker.before_return = lambda: None
        await register(store, BASE)
    assert arriving(tmp_path) == []


async def test_cancelled_while_waiting_for_another(tmp_path: Path) -> None:
    async with opened(tmp_path) as store, store.ingest(BASE.descriptor):
        with trio.move_on_after(0.2) as scope:
            await store.register(Stream(BASE.data), None, BASE.descriptor)
        assert scope.cancelled_caught


async def test_a_tree_whose_row_was_never_written_is_replaced(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        place = tmp_path / "trees" / "sha256" / BASE.diff_id.removeprefix("sha256:")
        (place / "fs" / "stray").mkdir(parents=True)
        await register(store, BASE)
        assert sorted(p.name for p in (place / "fs").iterdir()) == ["hello"]
    assert arriving(tmp_path) == []


async def test_what_is_thrown_away_goes_however_deep_and_closed_it_is(tmp_path: Path) -> None:
    unpacker = TarUnpacker()

    def nest() -> None:
        directory = next((tmp_path / "ingest").glob("*.tree"))
        outside = tmp_path / "blobs"
        for _ in range(300):
            directory = directory / "deeper"
            directory.mkdir()
            (directory / "link").symlink_to(outside)
            (directory / "file").touch()
        while directory.name == "deeper":
            directory.chmod(0)
            directory = directory.parent
        raise UnpackError("refused")

    unpacker.before_return = nest
    async with opened(tmp_path, unpacker) as store:
        with pytest.raises(UnpackError, match="refused"):
            await store.register(Stream(BASE.data), None)
    assert arriving(tmp_path) == []
    assert (tmp_path / "blobs" / "sha256").is_dir()


async def test_references_are_counted(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await register(store, BASE, TOP)
        assert (store.statistics().layers, store.statistics().references) == (0, 0)
        one = await store.get(chain_of(BASE, TOP))
        two = await store.get(chain_of(BASE, TOP))
        three = await store.get(chain_of(BASE))
        assert one is two
        assert one is not None
        assert three is not None
        assert (store.statistics().layers, store.statistics().references) == (2, 3)
        assert "2 layers in use" in repr(store)
        for layer in (one, one, three):
            store.release(layer)
        assert (store.statistics().layers, store.statistics().references) == (0, 0)


async def test_the_files_of_a_chain(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await register(store, BASE, TOP)
        await store.rootfs(chain_of(BASE, TOP))
        await store.rootfs(None)
        with pytest.raises(StoreError, match=chain_of(TOP)):
            await store.rootfs(chain_of(TOP))
        assert store.statistics().references == 0
