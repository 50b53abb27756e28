"""Images by reference, the OCI layout for other tools, and leases."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest
import trio
from store.stores import (
    describe,
    digest_of,
    layer_of,
    opened,
    put_sample_image,
    visible,
)

from trio_layers._catalog.rows import StoredImage
from trio_layers._errors import PlatformError, StoreError
from trio_layers._store.directory import DirectoryStore

LAYER = layer_of(hello="world")
REFERENCE = "docker.io/library/sample:1"


def index_of(path: Path) -> list[dict[str, str]]:
    return [
        {
            "digest": entry["digest"],
            "name": entry["annotations"]["org.opencontainers.image.ref.name"],
            "containerd": entry["annotations"]["io.containerd.image.name"],
            "architecture": entry["platform"]["architecture"],
        }
        for entry in json.loads((path / "index.json").read_bytes())["manifests"]
    ]


async def put_again(store: DirectoryStore, image: StoredImage, **changes: str | None) -> None:
    await store.put_image(
        changes.get("reference") or image.reference,
        manifest=image.manifest,
        config=image.config,
        platform=changes.get("platform", image.platform),
        chain_id=image.chain_id,
    )


async def test_an_image_is_found_under_its_reference(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        assert await store.image(REFERENCE) is None
        manifest = await put_sample_image(store, REFERENCE, LAYER)
    async with opened(tmp_path) as store:
        image = await store.image(REFERENCE)
        assert image is not None
        assert image.reference == REFERENCE
        assert image.platform == "linux/amd64"
        assert image.manifest.digest == manifest
        assert image.manifest.size == len(await store.read_blob(image.manifest.digest))
        assert image.config.media_type == "application/vnd.oci.image.config.v1+json"
        assert image.chain_id == LAYER.diff_id
        assert image.index is None
        assert await store.images() == [image]
        assert await store.image(REFERENCE, platform="linux/amd64") == image
        assert await store.image(REFERENCE, platform="linux/arm64") is None


async def test_the_layout_lists_each_image_under_its_reference(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        manifest = await put_sample_image(store, REFERENCE, LAYER)
        assert index_of(tmp_path) == [
            {
                "digest": manifest,
                "name": REFERENCE,
                "containerd": REFERENCE,
                "architecture": "amd64",
            }
        ]
        (tmp_path / "index.json").unlink()
    async with opened(tmp_path):
        assert [entry["digest"] for entry in index_of(tmp_path)] == [manifest]


async def test_a_tag_moves(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        first = await put_sample_image(store, REFERENCE, LAYER)
        await put_sample_image(store, "other:1", LAYER)
        second = await put_sample_image(store, REFERENCE, layer_of(hello="again"))
        image = await store.image(REFERENCE)
        assert image is not None
        assert image.manifest.digest == second
        names = [(entry["name"], entry["digest"]) for entry in index_of(tmp_path)]
        assert names == [("docker.io/library/other:1", first), (REFERENCE, second)]


async def test_a_reference_has_an_image_for_each_platform(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await put_sample_image(store, REFERENCE, LAYER)
        image = await store.image(REFERENCE)
        assert image is not None
        await put_again(store, image, platform="linux/arm64/v8")
        platforms = [image.platform for image in await store.images()]
        assert platforms == ["linux/arm64/v8", "linux/amd64"]
        assert await store.image(REFERENCE, platform="linux/amd64") == image
        newest = await store.image(REFERENCE)
        assert newest is not None
        assert newest.platform == "linux/arm64/v8"
        await put_again(store, image, platform=None)
        assert len(await store.images()) == 3


async def test_an_image_must_be_whole(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await put_sample_image(store, REFERENCE, LAYER)
        image = await store.image(REFERENCE)
        assert image is not None
        missing = describe(b"missing")
        with pytest.raises(StoreError, match=missing.digest):
            await store.put_image(
                "x:1", manifest=missing, config=image.config, platform=None, chain_id=None
            )
        with pytest.raises(StoreError, match=missing.digest):
            await store.put_image(
                "x:1",
                manifest=image.manifest,
                config=image.config,
                platform=None,
                chain_id=None,
                index=missing,
            )
        with pytest.raises(StoreError, match="lacks the layer"):
            await store.put_image(
                "x:1",
                manifest=image.manifest,
                config=image.config,
                platform=None,
                chain_id=digest_of(b"nothing"),
            )
        with pytest.raises(PlatformError):
            await put_again(store, image, platform="no such/platform at all")
        assert await store.images() == [image]


async def test_a_cancelled_put_changes_nothing_or_all(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await put_sample_image(store, REFERENCE, LAYER)
        image = await store.image(REFERENCE)
        assert image is not None
        with trio.CancelScope() as scope:
            scope.cancel()
            await put_again(store, image, reference="other:1")
        assert len(await store.images()) == len(index_of(tmp_path)) == 1


def leases_of(path: Path) -> list[tuple[str, str]]:
    connection = sqlite3.connect(path / "catalog.sqlite")
    try:
        return connection.execute("SELECT holder, digest FROM leases ORDER BY digest").fetchall()
    finally:
        connection.close()


async def test_a_lease_has_a_locked_file_and_rows_until_it_ends(tmp_path: Path) -> None:
    one, two = sorted([digest_of(b"one"), digest_of(b"two")])
    async with opened(tmp_path) as store:
        [holder] = [path.name for path in (tmp_path / "leases").iterdir()]
        async with store.lease(two) as lease, store.lease(two) as other:
            await lease.hold(one, two, None)
            assert lease.digests == {one, two}
            assert "2 held" in repr(lease)
            assert other.digests == {two}
            assert leases_of(tmp_path) == [(holder, one), (holder, two)]
        assert leases_of(tmp_path) == []


async def test_a_digest_is_held_until_the_last_of_its_leases_ends(tmp_path: Path) -> None:
    one = digest_of(b"one")
    async with opened(tmp_path) as store:
        async with store.lease(one):
            async with store.lease(one):
                pass
            assert [digest for _, digest in leases_of(tmp_path)] == [one]
        assert leases_of(tmp_path) == []


async def test_a_lease_ends_when_its_block_fails_or_is_cancelled(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        with pytest.raises(ValueError, match="mine"):
            async with store.lease(digest_of(b"one")):
                raise ValueError("mine")
        with trio.CancelScope() as scope:
            async with store.lease(digest_of(b"one")):
                scope.cancel()
                await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert leases_of(tmp_path) == []


def tool(name: str, *args: str | Path) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    run = subprocess.run([name, *args], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.integration
async def test_skopeo_reads_the_store(tmp_path: Path) -> None:
    store_path = tmp_path / "store"
    async with opened(store_path) as store:
        manifest = await put_sample_image(store, REFERENCE, LAYER)
        await put_sample_image(store, "localhost/other:latest", layer_of(other="image"))
        seen = json.loads(tool("skopeo", "inspect", f"oci:{store_path}:{REFERENCE}"))
        assert seen["Digest"] == manifest
        assert seen["Layers"] == [LAYER.digest]
        copy = tmp_path / "copy"
        tool("skopeo", "copy", f"oci:{store_path}:{REFERENCE}", f"oci:{copy}:copied")
        assert (copy / "blobs" / "sha256" / LAYER.file_name).read_bytes() == LAYER.data


@pytest.mark.integration
async def test_umoci_reads_the_store(tmp_path: Path) -> None:
    store_path = tmp_path / "store"
    async with opened(store_path) as store:
        await put_sample_image(store, REFERENCE, LAYER)
        before = visible(store_path)
        listed = tool("umoci", "list", "--layout", store_path)
        assert listed.split() == [REFERENCE]
        tool("umoci", "unpack", "--image", f"{store_path}:{REFERENCE}", tmp_path / "bundle")
        assert (tmp_path / "bundle" / "rootfs" / "hello").read_text() == "world"
        assert visible(store_path) == before
