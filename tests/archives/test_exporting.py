"""Exports of images to archives and layouts, and their import."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import trio
import trio.testing
from _tools.swapping import plant_link, swapped
from archives.layouts import (
    NAME,
    Sink,
    as_json,
    blob,
    files,
    hexdigits,
    oci_image,
    opened,
    small_image,
    tar_of,
)
from store.stores import Stream, visible

from trio_layers import (
    DirectoryStore,
    ExportError,
    InvalidDigest,
    InvalidReference,
    PlatformError,
    StoredImage,
    StoreError,
    export_images,
    import_images,
)
from trio_layers._archives import writing
from trio_layers._digest import digest_of
from trio_layers.testing import Built, build_image, build_index, sample_image

FORMATS = ["oci-archive", "docker-archive", "oci"]
ARCHIVES = ["oci-archive", "docker-archive"]
IMAGES = {
    "sample": sample_image(),
    "zstd": small_image(compression="zstd"),
    "plain": small_image(),
    "docker": small_image(format="docker", compression="gzip"),
    "one layer twice": build_image([b"", b""]),
    "nothing": build_image([]),
}


async def put(store: DirectoryStore, image: Built, name: str = NAME) -> StoredImage:
    [stored] = await import_images(store, Stream(tar_of(oci_image(image, name))))
    return stored


def members_of(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {
            member.name: file.read()
            for member in tar
            if (file := tar.extractfile(member)) is not None
        }


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", IMAGES)
async def test_round_trip(tmp_path: Path, format: str, name: str) -> None:
    """The OCI formats keep all digests; a docker-archive keeps the config digest and the files."""
    image = IMAGES[name]
    async with opened(tmp_path / "store") as store, opened(tmp_path / "other") as other:
        before = await put(store, image)
        await export_images(store, NAME, tmp_path / "target", format=format)
        [after] = await import_images(other, tmp_path / "target")
        if format == "docker-archive":
            assert after.config.digest == before.config.digest
            assert (after.reference, after.chain_id) == (NAME, before.chain_id)
        else:
            assert after == before
            assert visible(tmp_path / "other") == visible(tmp_path / "store")
        assert await files(other, after) == await files(store, before)


@pytest.mark.parametrize("format", ARCHIVES)
async def test_equal_images_give_equal_bytes(tmp_path: Path, format: str) -> None:
    """The bytes do not depend on other images in the store, nor on the kind of target."""
    async with opened(tmp_path / "store") as store, opened(tmp_path / "other") as other:
        await put(store, IMAGES["sample"])
        await put(other, IMAGES["plain"], "x/y:z")
        await put(other, IMAGES["sample"])
        sink = Sink()
        await export_images(store, NAME, sink, format=format)
        await export_images(other, "demo:1", os.fspath(tmp_path / "file"), format=format)
        assert bytes(sink.data) == (tmp_path / "file").read_bytes()
        assert sorted(os.listdir(tmp_path)) == ["file", "other", "store"]
        with tarfile.open(tmp_path / "file") as tar:
            assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}


async def test_what_is_in_a_docker_archive(tmp_path: Path) -> None:
    image, other = IMAGES["sample"], IMAGES["zstd"]
    async with opened(tmp_path) as store:
        names = [NAME, "r.io/x/demo:2", f"r.io/y@{image.digest}"]
        for name in names:
            await put(store, image, name)
        await put(store, other, "other:1")
        sink = Sink()
        await export_images(store, [*names, "other:1"], sink, format="docker-archive")
    members = members_of(bytes(sink.data))
    entries = json.loads(members["manifest.json"])
    tags = [[NAME, "r.io/x/demo:2"], ["docker.io/library/other:1"]]
    assert [entry["RepoTags"] for entry in entries] == tags
    for entry, built in zip(entries, (image, other), strict=True):
        assert members[entry["Config"]] == built.config
        assert entry["Config"] == f"{hexdigits(built.config_descriptor.digest)}.json"
        assert entry["Layers"] == [f"{hexdigits(diff_id)}.tar" for diff_id in built.diff_ids]
        for path in entry["Layers"]:
            assert digest_of(members[path]) == f"sha256:{path.removesuffix('.tar')}"


async def test_what_is_in_an_oci_archive(tmp_path: Path) -> None:
    """The export contains the imported files, and a manifest.json for docker."""
    image = IMAGES["sample"]
    async with opened(tmp_path) as store:
        await put(store, image)
        sink = Sink()
        await export_images(store, NAME, sink)
    members = members_of(bytes(sink.data))
    expected = {blob(digest): data for digest, data in image.blobs.items()}
    expected[blob(image.digest)] = image.manifest
    assert {k: v for k, v in members.items() if k.startswith("blobs/")} == expected
    assert list(members)[:3] == ["oci-layout", "index.json", "manifest.json"]
    [entry] = json.loads(members["index.json"])["manifests"]
    assert entry["digest"] == image.digest
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == NAME
    assert entry["annotations"]["io.containerd.image.name"] == NAME
    del members["index.json"]
    async with opened(tmp_path) as store:
        # Older versions of docker read it as a docker-archive.
        [stored] = await import_images(store, Stream(tar_of(members)))
        assert stored.config.digest == image.config_descriptor.digest
        assert stored.reference == NAME


async def test_the_index_goes_along(tmp_path: Path) -> None:
    """The archive contains the index, so an import can verify the digest in a name. Other tools see
    only the image.
    """
    index = build_index([small_image("amd"), small_image("arm", platform="linux/arm64")])
    name = f"r.io/demo@{index.digest}"
    async with opened(tmp_path / "store") as store, opened(tmp_path / "other") as other:
        [before] = await import_images(
            store, Stream(tar_of(oci_image(index, name))), platform="linux/arm64"
        )
        assert before.index is not None
        sink = Sink()
        await export_images(store, name, sink, platform="linux/arm64")
        assert await import_images(other, Stream(bytes(sink.data))) == [before]
        # The store is an OCI layout with the index, too.
        async with opened(tmp_path / "third") as third:
            assert await import_images(third, tmp_path / "store") == [before]
    members = members_of(bytes(sink.data))
    [entry] = json.loads(members["index.json"])["manifests"]
    assert entry["digest"] == index.images[1].digest
    # A wrong digest in the annotation is ignored.
    for lie in (index.images[1].digest, "sha256:../../x", "sha256:" + "0" * 64):
        entry["annotations"]["trio-layers.index"] = lie
        entry["annotations"]["org.opencontainers.image.ref.name"] = "lie:1"
        del entry["annotations"]["io.containerd.image.name"]
        members["index.json"] = as_json({"schemaVersion": 2, "manifests": [entry]})
        entry["annotations"]["io.containerd.image.name"] = ""
        async with opened(tmp_path / "other") as other:
            [image] = await import_images(other, Stream(tar_of(members)))
            assert image.index is None


async def test_one_of_several_platforms(tmp_path: Path) -> None:
    images = [small_image(p, platform=f"linux/{p}") for p in ("amd64", "arm64")]
    async with opened(tmp_path) as store:
        for image in images:
            await put(store, image)
        for image in images:
            sink = Sink()
            await export_images(store, NAME, sink, platform=image.platform)
            assert blob(image.digest) in members_of(bytes(sink.data))
        with pytest.raises(StoreError, match=r"demo:1 for linux/s390x is not in the store"):
            await export_images(store, NAME, Sink(), platform="linux/s390x")


@pytest.mark.parametrize("format", FORMATS)
async def test_by_digest(tmp_path: Path, format: str) -> None:
    """A manifest's or config's digest exports its image under all names, and no other image."""
    image, other = IMAGES["plain"], small_image("another")
    async with opened(tmp_path / "store") as store, opened(tmp_path / "other") as target:
        for name in ("a:1", "b:1"):
            await put(store, image, name)
        await put(store, other, "c:1")
        [unnamed] = await import_images(
            store, Stream(tar_of(oci_image(small_image("unnamed"), ""))), all=True
        )
        for number, digest in enumerate((image.digest, image.config_descriptor.digest)):
            path = tmp_path / f"target{number}"
            await export_images(store, [digest, "a:1", digest], path, format=format)
            images = await import_images(target, path)
            assert [each.reference.rpartition("/")[2] for each in images] == ["a:1", "b:1"]
            assert {each.config.digest for each in images} == {image.config_descriptor.digest}
        for number, name in enumerate((unnamed.manifest.digest, unnamed.reference)):
            path = tmp_path / f"unnamed{number}"
            await export_images(store, name, path, format=format)
            [again] = await import_images(target, path, all=True)
            assert again.config == unnamed.config
            assert again.reference == f"localhost/unnamed@{again.manifest.digest}"
        with pytest.raises(StoreError, match=f"{IMAGES['docker'].digest} is not in the store"):
            await export_images(store, IMAGES["docker"].digest, tmp_path / "none", format=format)
        with pytest.raises(StoreError, match=r"for linux/arm64 is not in the store"):
            await export_images(
                store, image.digest, tmp_path / "none", format=format, platform="linux/arm64"
            )
        with pytest.raises(InvalidDigest):
            await export_images(store, "sha256:abc", tmp_path / "none", format=format)
        assert not (tmp_path / "none").exists()


async def test_names_that_clash(tmp_path: Path) -> None:
    """Two images with one tag are an error in a docker-archive, not in an OCI layout.

    A docker-archive has no place for the digest of a name or the platform of an image.
    """
    amd, arm = (small_image(p, platform=f"linux/{p}") for p in ("amd64", "arm64"))
    pinned = [f"r.io/x:1@{image.digest}" for image in (amd, arm)]
    async with opened(tmp_path / "store") as store, opened(tmp_path / "other") as other:
        for image, name in zip((amd, arm), pinned, strict=True):
            await put(store, image, name)
            await put(store, image, "both:1")
        for names in (pinned, [amd.digest, arm.digest]):
            with pytest.raises(ExportError, match="would mean two images") as caught:
                await export_images(store, names, tmp_path / "target", format="docker-archive")
            assert amd.digest in str(caught.value)
            assert arm.digest in str(caught.value)
            assert not (tmp_path / "target").exists()
        # Two names of one image may become one tag.
        await put(store, amd, "r.io/x:1")
        sink = Sink()
        await export_images(store, [pinned[0], "r.io/x:1"], sink, format="docker-archive")
        [image] = await import_images(other, Stream(bytes(sink.data)))
        assert image.reference == "r.io/x:1"
        for format in ("oci-archive", "oci"):
            await export_images(store, [*pinned, amd.digest], tmp_path / format, format=format)
            for name, built in zip(pinned, (amd, arm), strict=True):
                [image] = await import_images(other, tmp_path / format, reference=name)
                assert (image.reference, image.manifest.digest) == (name, built.digest)
            await export_images(
                store, [amd.digest, arm.digest], tmp_path / f"all-{format}", format=format
            )
            for built, platform in ((amd, "linux/amd64"), (arm, "linux/arm64")):
                [image] = await import_images(
                    other, tmp_path / f"all-{format}", reference="both:1", platform=platform
                )
                assert image.manifest.digest == built.digest


async def test_a_layer_that_came_from_another_blob(tmp_path: Path) -> None:
    """The store has the layer, but not the image's own blob, since the pull did not download it."""
    first, second = small_image(compression="gzip"), small_image(compression="zstd")
    async with opened(tmp_path / "store") as store:
        await put(store, first, "first:1")
        stored = await put(store, second, "second:1")
        for layer in second.layers:
            await trio.Path(tmp_path, "store", blob(layer.descriptor.digest)).unlink()
            await store._parts.catalog.write(
                lambda connection, digest=layer.descriptor.digest: connection.execute(
                    "DELETE FROM blobs WHERE digest = ?", (digest,)
                )
            )
        missing = second.layers[0].descriptor.digest
        for format in ("oci", "oci-archive"):
            with pytest.raises(StoreError, match=f"second:1 lacks.*{missing}.*docker-archive"):
                await export_images(store, "second:1", tmp_path / "target", format=format)
            assert not (tmp_path / "target").exists()
        await export_images(store, "second:1", tmp_path / "target", format="docker-archive")
        async with opened(tmp_path / "other") as other:
            [after] = await import_images(other, tmp_path / "target")
            assert after.config == stored.config
            assert await files(other, after) == await files(store, stored)


# Exports that are refused.


async def test_what_makes_no_sense(tmp_path: Path) -> None:
    async with opened(tmp_path / "store") as store:
        await put(store, IMAGES["plain"])
        with pytest.raises(StoreError, match=r"library/none:1 is not in the store: pull"):
            await export_images(store, ["demo:1", "none:1"], tmp_path / "target")
        with pytest.raises(InvalidReference):
            await export_images(store, "No", tmp_path / "target")
        with pytest.raises(PlatformError):
            await export_images(store, NAME, tmp_path / "target", platform="no/such/one/at/all")
        with pytest.raises(ValueError, match="unknown format 'zip'"):
            await export_images(store, NAME, tmp_path / "target", format="zip")
        with pytest.raises(ValueError, match="pass at least one reference"):
            await export_images(store, [], tmp_path / "target")
        with pytest.raises(ValueError, match="writes a directory, not to a stream"):
            await export_images(store, NAME, Sink(), format="oci")
        assert os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize("format", FORMATS)
async def test_nothing_is_replaced(tmp_path: Path, format: str) -> None:
    target = tmp_path / "target"
    async with opened(tmp_path / "store") as store:
        await put(store, IMAGES["plain"])
        if format == "oci":
            target.mkdir()
            (target / "mine").write_bytes(b"mine")
        else:
            target.symlink_to("nowhere")
        with pytest.raises(ExportError, match=r"file exists|not empty") as caught:
            await export_images(store, NAME, target, format=format)
        assert caught.value.path == os.fspath(target)
        with pytest.raises(ExportError, match="No such file"):
            await export_images(store, NAME, tmp_path / "no" / "where", format=format)
        if format == "oci":
            assert os.listdir(target) == ["mine"]
            with pytest.raises(ExportError, match="Not a directory"):
                await export_images(store, NAME, target / "mine", format=format)
        else:
            assert os.readlink(target) == "nowhere"
        assert sorted(os.listdir(tmp_path)) == ["store", "target"]


@pytest.mark.parametrize("format", ARCHIVES)
async def test_what_appears_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    target = tmp_path / "target"
    write = writing._write

    def and_another_writes(descriptor: int, data: bytes) -> None:
        write(descriptor, data)
        target.write_bytes(b"mine")

    async with opened(tmp_path / "store") as store:
        await put(store, IMAGES["plain"])
        monkeypatch.setattr(writing, "_write", and_another_writes)
        with pytest.raises(ExportError, match="exists"):
            await export_images(store, NAME, target, format=format)
    assert target.read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["store", "target"]


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to be another user")
@pytest.mark.parametrize("format", ["oci-archive", "oci"])
@pytest.mark.parametrize("owner", [0, 1234])
async def test_another_user_exchanges_the_directory_for_a_link(
    tmp_path: Path, format: str, owner: int
) -> None:
    """An export writes into that user's directory or fails, but never follows the link."""
    real, link, victim = plant_link(tmp_path, owner=owner)
    done = refused = 0
    async with opened(tmp_path / "store") as store:
        await put(store, IMAGES["nothing"])
        with swapped(real, link):
            for number in range(3000):
                if min(done, refused) > 20:
                    break
                try:
                    await export_images(store, NAME, real / f"{number}", format=format)
                except ExportError:
                    refused += 1
                else:
                    done += 1
                assert os.listdir(victim) == []
    there = {name for path in (real, link) for name in os.listdir(path)}
    assert len(there) == done
    assert done
    assert refused


@pytest.mark.parametrize("format", FORMATS)
async def test_a_damaged_blob_is_not_exported(tmp_path: Path, format: str) -> None:
    """Blobs that are too long, too short or have other bytes are errors."""
    image = IMAGES["sample"]
    async with opened(tmp_path / "store") as store:
        await put(store, image)
        path = tmp_path / "store" / blob(image.layers[1].descriptor.digest)
        good = path.read_bytes()
        for bad in (good[:-20], good[:1000] + b"?" + good[1001:], good + b"more", b""):
            path.write_bytes(bad)
            with pytest.raises(StoreError, match=f"{path} is damaged"):
                await export_images(store, NAME, tmp_path / "target", format=format)
            assert os.listdir(tmp_path) == ["store"]


# Exports that are interrupted.


class Stop(Exception):
    pass


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("how", ["cancelled", "no space"])
async def test_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, how: str
) -> None:
    """An export that fails at any point leaves no file. A target directory stays, empty."""
    write = writing._write
    async with opened(tmp_path / "store") as store:
        await put(store, IMAGES["sample"])
        if format == "oci":
            (tmp_path / "there").mkdir()
        for at in (1, 3, 6):
            scope = trio.CancelScope()
            left = [at]

            def breaking_off(
                descriptor: int,
                data: bytes,
                left: list[int] = left,
                scope: trio.CancelScope = scope,
            ) -> None:
                left[0] -= 1
                if not left[0]:
                    if how == "no space":
                        raise OSError(28, "No space left on device")
                    trio.from_thread.run_sync(scope.cancel)
                write(descriptor, data)

            monkeypatch.setattr(writing, "_write", breaking_off)
            target = tmp_path / ("there" if format == "oci" and at == 3 else "target")
            if how == "cancelled":
                with scope:
                    await export_images(store, NAME, target, format=format)
                assert scope.cancelled_caught
            else:
                with pytest.raises(ExportError, match="No space left"):
                    await export_images(store, NAME, target, format=format)
            assert left[0] <= 0
            assert "target" not in os.listdir(tmp_path)
            assert format != "oci" or os.listdir(tmp_path / "there") == []
        assert [name for name in os.listdir(tmp_path) if name not in ("store", "there")] == []


@pytest.mark.parametrize("format", ARCHIVES)
async def test_a_stream_that_ends_it(tmp_path: Path, format: str) -> None:
    """An error of the stream is raised unchanged; after a cancellation, a part has been sent."""
    async with opened(tmp_path / "store") as store:
        await put(store, IMAGES["sample"])
        whole = Sink()
        await export_images(store, NAME, whole, format=format)

        def fail(size: int) -> None:
            if size > 1000:
                raise Stop

        sink = Sink(fail)
        with pytest.raises(Stop):
            await export_images(store, NAME, sink, format=format)
        with trio.CancelScope() as scope:

            def cancel(size: int) -> None:
                if size > 1000:
                    scope.cancel()

            other = Sink(cancel)
            await export_images(store, NAME, other, format=format)
        assert scope.cancelled_caught
        assert whole.data.startswith(sink.data)
        assert sink.data == other.data
        await export_images(store, NAME, tmp_path / "target", format=format)
        assert (tmp_path / "target").read_bytes() == whole.data


async def test_from_one_store_to_another_by_a_pipe(tmp_path: Path) -> None:
    """An export and an import run at the same time, without a file between them."""
    image = IMAGES["sample"]
    send, receive = trio.testing.memory_stream_one_way_pair()
    async with opened(tmp_path / "store") as store, opened(tmp_path / "other") as other:
        before = await put(store, image)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def export() -> None:
                async with send:
                    await export_images(store, NAME, send)

            [after] = await import_images(other, receive)
        assert after == before
