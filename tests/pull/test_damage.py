"""Damage in a store. The advice in the error's message repairs the image."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from trio_layers import (
    DirectoryStore,
    LayersError,
    MemoryStream,
    PullPolicy,
    StoreError,
    VerificationError,
    _damage as damage,
    export_images,
    import_images,
    open_puller,
    open_store,
)
from trio_layers.testing import File, HardLink, build_image, build_layer, open_registry

IMAGE = build_image(
    [
        [File("one", data=b"1" * 5000), File("dir/file", data=b"2" * 5000)],
        [File("two", data=b"3" * 5000)],
    ]
)
BOTTOM, _ = IMAGE.layers


def gone(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def tree_of(store: Path, diff_id: str) -> Path:
    return store / "trees" / "sha256" / diff_id.removeprefix("sha256:")


def blob_of(store: Path, digest: str) -> Path:
    return store / "blobs" / "sha256" / digest.removeprefix("sha256:")


TREE = {
    "file gone": ("fs/dir/file", gone),
    "file shorter": ("fs/one", shorter),
    "file a link": ("fs/one", linked),
    "directory gone": ("fs/dir", gone),
    "files gone": ("fs", gone),
    "all gone": ("", gone),
    "list gone": ("entries", gone),
    "list empty": ("entries", empty),
    "list shorter": ("entries", shorter),
}
BLOBS = {
    "layer": BOTTOM.descriptor,
    "manifest": IMAGE.descriptor,
    "config": IMAGE.config_descriptor,
}


def damage_tree(name: str) -> Callable[[Path], None]:
    path, do = TREE[name]
    return lambda store: do(tree_of(store, BOTTOM.diff_id) / path)


def damage_blob(name: str, do: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda store: do(blob_of(store, BLOBS[name].digest))


DAMAGES = {
    **{f"tree: {name}": damage_tree(name) for name in TREE},
    **{f"{name}: {do.__name__}": damage_blob(name, do) for name in BLOBS for do in (gone, changed)},
}

each_damage = pytest.mark.parametrize("name", DAMAGES)


async def use(store: DirectoryStore, reference: str, target: Path) -> None:
    """Read the whole image: its files and its blobs."""
    [image] = await store.images(reference)
    await (await store.rootfs(image.chain_id)).export(target / "rootfs")
    await export_images(store, reference, target / "archive")


@each_damage
async def test_a_pull_mends_what_an_error_told(tmp_path: Path, name: str) -> None:
    policy: PullPolicy = "missing" if list(DAMAGES).index(name) % 2 else "always"
    path, target = tmp_path / "store", tmp_path / "target"
    async with open_registry() as registry, open_puller(path) as puller:
        reference = registry.add(IMAGE, "demo:1")
        async with puller.pull(reference):
            pass
        [reference] = [image.reference for image in await puller.store.images()]
        target.mkdir()
        DAMAGES[name](path)
        with pytest.raises((StoreError, VerificationError), match="pull its image again"):
            await use(puller.store, reference, target)
        shutil.rmtree(target)
        target.mkdir()
        async with puller.pull(reference, policy=policy) as image:
            assert await image.rootfs.read_bytes("dir/file") == b"2" * 5000
        await use(puller.store, reference, target)
        assert (await puller.store.check()).problems == ()


@pytest.mark.parametrize("name", ["tree: file gone", "layer: changed", "config: gone"])
async def test_an_import_mends_it_in_another_process(tmp_path: Path, name: str) -> None:
    """An import repairs the damage, even after a removal without a collection."""
    path, target = tmp_path / "store", tmp_path / "target"
    target.mkdir()
    async with open_store(path) as store:
        archive = tmp_path / "archive"
        async with open_registry() as registry, open_puller(store) as puller:
            async with puller.pull(registry.add(IMAGE, "demo:1")) as image:
                await export_images(store, image.reference, archive)
        DAMAGES[name](path)
        with pytest.raises((StoreError, VerificationError), match="pull its image again"):
            await use(store, image.reference, target)
    shutil.rmtree(target)
    target.mkdir()
    forget_what_this_process_knows()
    async with open_store(path) as store:
        assert await store.remove(image.reference)
        await import_images(store, archive)
        await use(store, image.reference, target)
        assert (await store.check()).problems == ()


def forget_what_this_process_knows() -> None:
    damage._NOTED.clear()


@pytest.mark.parametrize(
    "name", ["tree: all gone", "tree: list empty", "layer: gone", "manifest: gone"]
)
async def test_a_pull_mends_what_nobody_has_met(tmp_path: Path, name: str) -> None:
    async with open_registry() as registry:
        reference = registry.add(IMAGE, "demo:1")
        async with open_puller(tmp_path) as puller, puller.pull(reference):
            pass
        DAMAGES[name](tmp_path)
        async with open_puller(tmp_path) as puller, puller.pull(reference) as image:
            assert await image.rootfs.read_bytes("one") == b"1" * 5000
            assert (await puller.store.check()).problems == ()


async def test_a_tree_for_one_parent_is_mended(tmp_path: Path) -> None:
    """The upper layer has a hard link into the lower layer.

    The upper tree therefore belongs to one parent, and is unpacked again on that parent.
    """
    image = build_image([[File("a", data=b"a")], [HardLink("b", "a")]])
    async with open_registry() as registry, open_puller(tmp_path) as puller:
        reference = registry.add(image, "demo:1")
        async with puller.pull(reference):
            pass
        for tree in (tmp_path / "trees" / "sha256").iterdir():
            shutil.rmtree(tree / "fs")
        async with puller.pull(reference) as again:
            assert await again.rootfs.read_bytes("b") == b"a"
        assert (await puller.store.check()).problems == ()


async def test_a_damaged_blob_is_told_when_it_is_unpacked_again(tmp_path: Path) -> None:
    """The error does not blame the registry, since the blob was verified on arrival."""
    image = build_image([[File("a", data=b"a")], [HardLink("b", "a")]])
    other = build_image([[File("a", data=b"other")], [HardLink("b", "a")]])
    async with open_registry() as registry, open_puller(tmp_path) as puller:
        async with puller.pull(registry.add(image, "demo:1")):
            pass
        changed(blob_of(tmp_path, image.layers[1].descriptor.digest))
        reference = registry.add(other, "demo:2")
        with pytest.raises(LayersError, match="pull its image again"):
            async with puller.pull(reference):
                pass
        async with puller.pull(reference) as again:
            assert await again.rootfs.read_bytes("b") == b"other"
        assert (await puller.store.check()).problems == ()


async def test_a_layer_that_is_registered_again_is_mended(tmp_path: Path) -> None:
    """`DirectoryStore.register` of a stored layer also repairs its damage."""
    layer = build_layer([File("etc/motd", b"hello")])
    async with open_store(tmp_path) as store:
        registered = await store.register(MemoryStream(layer.content), None, layer.descriptor)
        view = await store.rootfs(registered.chain_id)
        (registered.tree / "fs/etc/motd").unlink()
        with pytest.raises(StoreError, match="pull"):
            await view.read_bytes("etc/motd")
        store.release(registered)
        assert await store.get(registered.chain_id) is None
        again = await store.register(MemoryStream(layer.content), None, layer.descriptor)
        assert await (await store.rootfs(again.chain_id)).read_bytes("etc/motd") == b"hello"
        store.release(again)
        assert (await store.check()).problems == ()
