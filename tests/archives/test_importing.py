"""Imports from hand-made archives and layouts, valid and invalid."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tarfile
from pathlib import Path

import attrs
import pytest
import trio
from archives.layouts import (
    NAME,
    Members,
    as_json,
    blob,
    docker_members,
    entry_of,
    files,
    hexdigits,
    leftovers,
    link,
    oci_image,
    oci_members,
    opened,
    ref_name,
    small_image,
    tar_of,
    write_layout,
)
from store.stores import Stream, visible

from trio_layers import (
    ArchiveError,
    InvalidReference,
    LayersError,
    Limits,
    ManifestError,
    PlatformError,
    Progress,
    RegistrationError,
    Status,
    StoredImage,
    StoreError,
    UnpackError,
    VerificationError,
    import_images,
    open_store,
)
from trio_layers._archives import candidates, importing, reading, selecting
from trio_layers._compression import zstd
from trio_layers._digest import digest_of
from trio_layers._manifest import decode_manifest
from trio_layers._store import layout
from trio_layers.testing import build_image, build_index, sample_image

IMAGE = small_image()
OTHER = small_image("other")
GZIPPED = small_image(compression="gzip")
ARM = small_image("arm", platform="linux/arm64")
AMD_AND_ARM = build_index([small_image("amd"), ARM])


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# Sources that are read.


async def test_docker_archive(tmp_path: Path) -> None:
    """The config stays as it is, and the import makes the same manifest from it each time."""
    archive = write(tmp_path / "archive", tar_of(docker_members(IMAGE, "demo:1", "r.io/x/demo:2")))
    async with opened(tmp_path / "store") as store:
        [image, again] = await import_images(store, archive)
        assert (image.reference, again.reference) == (NAME, "r.io/x/demo:2")
        assert image.config == again.config
        assert image.config.digest == IMAGE.config_descriptor.digest
        assert image.platform == "linux/amd64"
        assert await store.image(NAME) == image
        data = await store.read_blob(image.manifest.digest)
        manifest = decode_manifest(data, image.manifest.media_type)
        assert manifest.config == image.config
        assert [layer.digest for layer in manifest.layers] == list(IMAGE.diff_ids)
        # This builder's layers are plain tars, too, so its manifest has the same digest.
        assert image.manifest.digest == IMAGE.digest
        names = [entry.path for entry in await files(store, image)]
        assert names == [b"", b"etc", b"etc/motd", b"srv", b"srv/more"]
        root = await store.rootfs(image.chain_id)
        assert await root.read_bytes("/etc/motd") == b"hello"


async def test_docker_archive_with_compressed_layers(tmp_path: Path) -> None:
    """``docker load`` accepts compressed layers, and the import keeps them compressed."""
    async with opened(tmp_path / "store") as store:
        for compression in ("gzip", "zstd"):
            image = small_image(compression=compression)
            data = tar_of(docker_members(image, f"demo:{compression}"))
            [stored] = await import_images(store, Stream(data))
            manifest = json.loads(await store.read_blob(stored.manifest.digest))
            layers = [(layer["mediaType"], layer["digest"]) for layer in manifest["layers"]]
            expected = [layer.descriptor for layer in image.layers]
            assert layers == [(each.media_type, each.digest) for each in expected]
            assert stored.chain_id is not None


@pytest.mark.parametrize(
    "compress",
    [bytes, gzip.compress, zstd.compress, bz2.compress, lzma.compress],
    ids=["plain", "gzip", "zstd", "bzip2", "xz"],
)
@pytest.mark.parametrize("way", ["file", "stream"])
async def test_compressed_archives(tmp_path: Path, compress, way: str) -> None:
    """Compression is recognised by content, not by the name of the file."""
    data = compress(tar_of(oci_image(GZIPPED)))
    source = write(tmp_path / "archive.tar", data) if way == "file" else Stream(data)
    async with opened(tmp_path / "store") as store:
        [image] = await import_images(store, source)
        assert image.manifest.digest == GZIPPED.digest
        assert image.reference == NAME


async def test_layout_directory(tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "layout", oci_image(GZIPPED))
    (layout / "blobs/sha256" / ("0" * 64)).write_bytes(b"nobody's, and wrong")
    async with opened(tmp_path / "store") as store:
        [image] = await import_images(store, layout)
        assert image.manifest.digest == GZIPPED.digest
        # Only the parts of the image.
        assert {f"blobs/{hexdigits(d)}" for d in [GZIPPED.digest, *GZIPPED.blobs]} == {
            name for name in visible(tmp_path / "store") if name.startswith("blobs")
        }


async def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    """For blobs that the store has, an import skips large members by name, or reads none of their
    bytes.
    """
    large = build_image([tar_of({"large": bytes(5 << 20)})], compression="none")
    data = tar_of(oci_image(large))
    layout = write_layout(tmp_path / "layout", oci_image(large))
    async with opened(tmp_path / "store") as store:
        first = await import_images(store, Stream(data))
        before = visible(tmp_path / "store")
        (layout / blob(large.diff_ids[0])).write_bytes(b"not read")
        assert await import_images(store, layout) == first
        assert await import_images(store, Stream(data)) == first
        assert visible(tmp_path / "store") == before


async def test_only_what_is_wanted_is_visible(tmp_path: Path) -> None:
    """Other platforms' layers and the files for old versions of docker are not imported."""
    data = tar_of({**oci_image(AMD_AND_ARM), "0/VERSION": b"1.0", "0/json": b"{}"})
    async with opened(tmp_path / "store") as store:
        await import_images(store, Stream(data), platform="linux/arm64")
        wanted = {*ARM.blobs, ARM.digest, AMD_AND_ARM.digest}
        found = {name for name in visible(tmp_path / "store") if name.startswith("blobs/")}
        assert found == {f"blobs/{hexdigits(digest)}" for digest in wanted}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE], ids=["symlink", "hard link"])
async def test_repeated_layers_are_links(tmp_path: Path, kind: bytes) -> None:
    """Old versions of docker save links, and a link may come before its target."""
    image = build_image([b"", b"", b""], compression="none")
    tar = image.layers[0].content
    config = f"{hexdigits(image.config_descriptor.digest)}.json"
    layers = ["a/layer.tar", "b/layer.tar", "c/layer.tar"]
    up = "../" if kind == tarfile.SYMTYPE else ""
    data = tar_of(
        {
            "b/layer.tar": link("b/layer.tar", f"{up}c/layer.tar", kind),
            "c/layer.tar": link("c/layer.tar", f"{up}a/layer.tar", kind),
            "./a/layer.tar": tar,
            config: image.config,
            "manifest.json": as_json(
                [{"Config": config, "RepoTags": ["demo:1"], "Layers": layers}]
            ),
        }
    )
    async with opened(tmp_path) as store:
        [stored] = await import_images(store, Stream(data))
        assert stored.manifest.digest == image.digest


async def test_documents_beyond_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that exceed the memory limit are read from the batch."""
    monkeypatch.setattr(reading, "MAX_HELD", 0)
    async with opened(tmp_path) as store:
        [image] = await import_images(store, Stream(tar_of(oci_image(GZIPPED))))
        assert image.manifest.digest == GZIPPED.digest
        [image] = await import_images(store, Stream(tar_of(docker_members(IMAGE, "demo:2"))))
        assert image.config.digest == IMAGE.config_descriptor.digest


async def test_a_layer_that_looks_like_a_document(tmp_path: Path) -> None:
    image = build_image([tar_of({"{}": b"a file"})], compression="none")
    async with opened(tmp_path) as store:
        [stored] = await import_images(store, Stream(tar_of(oci_image(image))))
        assert [entry.path for entry in await files(store, stored)] == [b"", b"{}"]


async def test_an_image_without_layers(tmp_path: Path) -> None:
    image = build_image([])
    async with opened(tmp_path) as store:
        [stored] = await import_images(store, Stream(tar_of(docker_members(image, "demo:1"))))
        assert stored.chain_id is None
        assert (await import_images(store, Stream(tar_of(oci_image(image, "x:y"))))) != [stored]


@pytest.mark.parametrize("format", ["gnu", "pax"])
async def test_sparse_members(tmp_path: Path, format: str) -> None:
    """Sparse members from GNU tar -S are imported with their zeros."""
    image = build_image([tar_of({"zeros": bytes(6 << 20)})], compression="none")
    layout = write_layout(tmp_path / "layout", oci_image(image))
    holes = layout / blob(image.diff_ids[0])
    data = holes.read_bytes()
    with holes.open("wb") as file:
        file.truncate(len(data))
        file.write(data[: 4 << 10])
    assert holes.read_bytes() == data
    archive = tmp_path / "archive"
    command = ["tar", f"--format={format}", "--sparse", f"--file={archive}", "--create"]
    await trio.run_process([*command, f"--directory={layout}", "."])
    assert archive.stat().st_size < 1 << 20
    async with opened(tmp_path / "store") as store:
        [stored] = await import_images(store, archive)
        root = await store.rootfs(stored.chain_id)
        assert await root.read_bytes("zeros") == bytes(6 << 20)


# Names of images.


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        (ref_name("quay.io/a/b:c"), "quay.io/a/b:c"),
        (ref_name("a:b"), "docker.io/library/a:b"),
        ({**ref_name("1"), "io_containerd_image_name": "docker.io/library/x:1"}, "x:1"),
        ({**ref_name("y:1"), "io_containerd_image_name": "docker.io/library/x:1"}, "x:1"),
        ({**ref_name("y:1"), "io_containerd_image_name": "Not A Name:1"}, "y:1"),
    ],
)
async def test_names_in_a_layout(
    tmp_path: Path, annotations: dict[str, str], expected: str
) -> None:
    data = tar_of(oci_members([entry_of(IMAGE, **annotations)], IMAGE))
    async with opened(tmp_path) as store:
        [image] = await import_images(store, Stream(data))
        assert image.reference.removeprefix("docker.io/library/") in expected


@pytest.mark.parametrize("name", ["", "latest", "Not:A/Name:1"])
async def test_an_image_without_a_name(tmp_path: Path, name: str) -> None:
    data = tar_of(oci_image(IMAGE, name))
    async with opened(tmp_path) as store:
        with pytest.raises(ArchiveError, match=rf"{name or 'image'}.*without a name.*\(reference"):
            await import_images(store, Stream(data))
        assert await store.images() == []
        [image] = await import_images(store, Stream(data), reference="demo:1")
        assert image.reference == NAME
        with pytest.raises(InvalidReference):
            await import_images(store, Stream(data), reference="Demo")


@pytest.mark.parametrize("tags", [(), ("<none>:<none>",)], ids=["null", "none"])
async def test_a_docker_image_without_a_name(tmp_path: Path, tags: tuple[str, ...]) -> None:
    data = tar_of(docker_members(IMAGE, *tags))
    async with opened(tmp_path) as store:
        with pytest.raises(ArchiveError, match="without a name"):
            await import_images(store, Stream(data))
        [image] = await import_images(store, Stream(data), reference="demo:1")
        assert image.reference == NAME


async def test_docker_25(tmp_path: Path) -> None:
    """The archive is both a layout and a docker-archive. The layout's manifest counts, and names
    come from both.
    """
    config, layers = blob(GZIPPED.config_descriptor.digest), GZIPPED.layers
    members = oci_members([entry_of(GZIPPED), entry_of(OTHER, **ref_name("a/b:2"))], GZIPPED, OTHER)
    paths = [blob(layer.descriptor.digest) for layer in layers]
    members["manifest.json"] = as_json(
        [
            {"Config": config, "RepoTags": ["demo:1"], "Layers": paths},
            {"Config": blob(OTHER.config_descriptor.digest), "RepoTags": None, "Layers": []},
        ]
    )
    async with opened(tmp_path) as store:
        images = await import_images(store, Stream(tar_of(members)))
        assert {image.reference: image.manifest.digest for image in images} == {
            NAME: GZIPPED.digest,
            "docker.io/a/b:2": OTHER.digest,
        }


async def test_one_of_several(tmp_path: Path) -> None:
    """One of several images is chosen by its name or its tag, and can get another name."""
    members = oci_members(
        [
            entry_of(IMAGE, **ref_name("x/y:1")),
            entry_of(OTHER, **ref_name("2")),
            entry_of(GZIPPED, **ref_name("3")),
        ],
        *(IMAGE, OTHER, GZIPPED),
    )
    data = tar_of(members)
    async with opened(tmp_path) as store:
        for reference, image in {"x/y:1": IMAGE, "n:2": OTHER, "n:3": GZIPPED}.items():
            [stored] = await import_images(store, Stream(data), reference=reference)
            assert stored.reference == f"docker.io/{'' if '/' in reference else 'library/'}" + (
                reference
            )
            assert stored.manifest.digest == image.digest
        for reference in ("n:4", "n:1"):
            with pytest.raises(ArchiveError, match=r"none of them is .*n:.*x/y:1; the tag '2'"):
                await import_images(store, Stream(data), reference=reference)
        with pytest.raises(ArchiveError, match="the tag '2', but without a name"):
            await import_images(store, Stream(data))


async def test_several_of_a_docker_archive(tmp_path: Path) -> None:
    first, second = docker_members(IMAGE, "a:1", "a:2"), docker_members(OTHER, "b:1")
    second = {name.replace("0/", "2/").replace("1/", "3/"): data for name, data in second.items()}
    entries = json.loads(first["manifest.json"]) + json.loads(
        second["manifest.json"].replace(b"0/", b"2/").replace(b"1/", b"3/")
    )
    data = tar_of({**first, **second, "manifest.json": as_json(entries)})
    async with opened(tmp_path) as store:
        images = await import_images(store, Stream(data))
        assert [image.reference.rpartition("/")[2] for image in images] == ["a:1", "a:2", "b:1"]
        [image] = await import_images(store, Stream(data), reference="b:1")
        assert image.config.digest == OTHER.config_descriptor.digest
        entries[1]["RepoTags"] = ["a:1"]
        twice = tar_of({**first, **second, "manifest.json": as_json(entries)})
        with pytest.raises(ArchiveError, match="two images with one name"):
            await import_images(store, Stream(twice))


async def test_a_name_with_a_digest_is_a_promise(tmp_path: Path) -> None:
    """The manifest or the index must have the digest in the name."""
    async with opened(tmp_path) as store:
        for source, digest in [(IMAGE, IMAGE.digest), (AMD_AND_ARM, AMD_AND_ARM.digest)]:
            pinned = f"r.io/demo:1@{digest}"
            data = tar_of(oci_image(source, pinned))
            [image] = await import_images(store, Stream(data), platform="linux/amd64")
            assert image.reference == pinned
        data = tar_of(oci_image(IMAGE))
        with pytest.raises(VerificationError, match=OTHER.digest):
            await import_images(store, Stream(data), reference=f"r.io/demo@{OTHER.digest}")


# Platforms.


@pytest.mark.parametrize("platform", ["linux/amd64", "linux/arm64"])
async def test_an_index_has_an_image_for_each_platform(tmp_path: Path, platform: str) -> None:
    nested = build_index([small_image("s390x", platform="linux/s390x")])
    [amd, arm] = AMD_AND_ARM.images
    inner = as_json(
        {
            "schemaVersion": 2,
            "manifests": [entry_of(nested, platform="linux/s390x"), entry_of(AMD_AND_ARM)],
        }
    )
    members = oci_image(AMD_AND_ARM, "one:1")
    members[blob(digest_of(inner))] = inner
    entries = json.loads(members["index.json"])["manifests"]
    outer = {
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "digest": digest_of(inner),
        "size": len(inner),
        "annotations": {"org.opencontainers.image.ref.name": "two:1"},
    }
    members["index.json"] = as_json({"schemaVersion": 2, "manifests": [*entries, outer]})
    wanted = arm if platform.endswith("arm64") else amd
    async with opened(tmp_path) as store:
        images = await import_images(store, Stream(tar_of(members)), platform=platform)
        assert [image.manifest.digest for image in images] == [wanted.digest] * 2
        assert [image.platform for image in images] == [platform] * 2
        indexes = [image.index.digest for image in images if image.index is not None]
        assert indexes == [AMD_AND_ARM.digest, digest_of(inner)]
        assert await store.read_blob(digest_of(inner)) == inner


async def test_entries_of_one_name_are_platforms(tmp_path: Path) -> None:
    """This library's stores list platforms as entries of one name. Attestations do not count."""
    attestation = entry_of(
        OTHER, **ref_name("demo:1"), vnd_docker_reference_type="attestation-manifest"
    )
    members = oci_members(
        [
            attestation,
            entry_of(ARM, platform="linux/arm64", **ref_name("demo:1")),
            entry_of(IMAGE, platform="linux/amd64", **ref_name("demo:1")),
        ],
        *(IMAGE, ARM),
    )
    async with opened(tmp_path) as store:
        [image] = await import_images(store, Stream(tar_of(members)), platform="linux/arm64")
        assert image.manifest.digest == ARM.digest
        [image] = await import_images(store, Stream(tar_of(members)), platform="linux/amd64")
        assert image.manifest.digest == IMAGE.digest
        assert [each.platform for each in await store.images(NAME)] == [
            "linux/amd64",
            "linux/arm64",
        ]
        with pytest.raises(PlatformError, match="linux/amd64, linux/arm64"):
            await import_images(store, Stream(tar_of(members)), platform="linux/s390x")


async def test_nothing_for_the_platform(tmp_path: Path) -> None:
    sources = [oci_image(AMD_AND_ARM), oci_image(IMAGE), docker_members(IMAGE, "demo:1")]
    async with opened(tmp_path) as store:
        for members in sources:
            with pytest.raises(PlatformError, match=r"demo:1 has no image for linux/riscv64"):
                await import_images(store, Stream(tar_of(members)), platform="linux/riscv64")
        # Without an index and without --platform, an image of any platform is imported, as in a
        # pull.
        [image] = await import_images(store, Stream(tar_of(oci_image(ARM))))
        assert image.platform == "linux/arm64"


# Sources that are refused.


def changed(members: Members, **changes: bytes | None) -> Members:
    """Return ``members`` with some of them replaced. A value of ``None`` removes the member."""
    kept = {name: data for name, data in members.items() if changes.get(name, b"") is not None}
    return {**kept, **{name: data for name, data in changes.items() if data is not None}}


def with_docker(**changes: object) -> Members:
    members = docker_members(IMAGE, "demo:1")
    [entry] = json.loads(members["manifest.json"])
    return {**members, "manifest.json": as_json([{**entry, **changes}])}


def with_manifest(**changes: object) -> Members:
    """Return a layout with another manifest for its image."""
    manifest = as_json({**json.loads(IMAGE.manifest), **changes})
    members = oci_image(IMAGE)
    members[blob(digest_of(manifest))] = manifest
    entry = {
        **entry_of(IMAGE, **ref_name(NAME)),
        "digest": digest_of(manifest),
        "size": len(manifest),
    }
    return {**members, "index.json": as_json({"schemaVersion": 2, "manifests": [entry]})}


DOCKER = docker_members(IMAGE, "demo:1")
OCI = oci_image(IMAGE)
CONFIG = f"{hexdigits(IMAGE.config_descriptor.digest)}.json"
LAYER = blob(IMAGE.diff_ids[0])
DEEP = b"[" * 200_000

BAD: dict[str, tuple[bytes | Members, type[LayersError], str]] = {
    "nothing": (b"", ArchiveError, "is empty"),
    "no members": (bytes(1024), ArchiveError, "is empty"),
    "no tar": (b"#!/bin/sh\n" * 500, ArchiveError, "not an image archive, or is damaged.*checksum"),
    "no gzip": (b"\x1f\x8b\x08" + bytes(50), ArchiveError, "not an image archive"),
    "a damaged checksum": (
        gzip.compress(tar_of(OCI))[:-8] + bytes(8),
        ArchiveError,
        "or is damaged.*gzip",
    ),
    "other files": ({"etc/passwd": b"root"}, ArchiveError, "neither.*'etc/passwd'"),
    "no oci-layout": (
        changed(OCI, **{"oci-layout": None}),
        ArchiveError,
        "neither an OCI layout .with oci-layout",
    ),
    "a version to come": (
        changed(OCI, **{"oci-layout": b'{"imageLayoutVersion":"2.0.0"}'}),
        ArchiveError,
        "oci-layout: unsupported OCI layout version: '2.0.0'",
    ),
    "a layout of no version": (
        changed(OCI, **{"oci-layout": b"[]"}),
        ArchiveError,
        "unsupported OCI layout version: missing",
    ),
    "an index that is none": (
        changed(OCI, **{"index.json": b"{}"}),
        ManifestError,
        "stream.*index",
    ),
    "an index without images": (oci_members([]), ArchiveError, "has no image"),
    "an index of no depth": (changed(OCI, **{"index.json": DEEP}), ManifestError, "not JSON"),
    "an index that is huge": (
        changed(OCI, **{"index.json": b"{" + b" " * (5 << 20)}),
        ArchiveError,
        "'index.json' is larger than 4194304 bytes",
    ),
    "a missing blob": (
        changed(OCI, **{LAYER: None}),
        ArchiveError,
        f"lacks {LAYER}, a 'application/vnd.oci.image.layer",
    ),
    "a missing manifest": (
        changed(OCI, **{blob(IMAGE.digest): None}),
        ArchiveError,
        f"lacks {blob(IMAGE.digest)}, a",
    ),
    "a damaged blob": (changed(OCI, **{LAYER: b"else"}), VerificationError, f"{LAYER} is damaged"),
    "a damaged document": (
        changed(OCI, **{blob(IMAGE.digest): b"{}"}),
        VerificationError,
        f"{blob(IMAGE.digest)} is damaged",
    ),
    "a wrong size": (
        with_manifest(
            layers=[
                {"mediaType": layer.descriptor.media_type, "digest": layer.diff_id, "size": 7}
                for layer in IMAGE.layers
            ]
        ),
        VerificationError,
        f"{LAYER} has [0-9]+ bytes, but its descriptor says 7",
    ),
    "too few layers": (with_manifest(layers=[]), ManifestError, "0 layers.*2 diff IDs"),
    "an ambiguous manifest": (with_manifest(manifests=[]), ManifestError, "ambiguous"),
    "a digest of no kind": (
        with_manifest(config={"mediaType": "x", "digest": "../../etc/passwd", "size": 1}),
        ManifestError,
        "invalid digest",
    ),
    "a digest of another algorithm": (
        with_manifest(
            config={
                "mediaType": IMAGE.config_descriptor.media_type,
                "digest": f"sha512:{'ab' * 64}",
                "size": 1,
            }
        ),
        ManifestError,
        "sha512:ab.* is part of the image, and the store",
    ),
    "an artifact": (
        with_manifest(
            config={"mediaType": "a/b", "digest": IMAGE.config_descriptor.digest, "size": 1}
        ),
        ManifestError,
        "an artifact",
    ),
    "no docker manifest": ({**DOCKER, "manifest.json": b"{}"}, ArchiveError, "not an array of"),
    "no JSON": ({**DOCKER, "manifest.json": b"[{"}, ArchiveError, "manifest.json: not JSON"),
    "JSON of no depth": ({**DOCKER, "manifest.json": DEEP}, ArchiveError, "json: not JSON"),
    "no images": ({**DOCKER, "manifest.json": b"[]"}, ArchiveError, "has no image"),
    "no path": (with_docker(Config=None), ArchiveError, "Config is missing, not a string"),
    "no layers": (with_docker(Layers="a"), ArchiveError, "Layers is 'a', not an array"),
    "no config": (changed(DOCKER, **{CONFIG: None}), ArchiveError, f"lacks '{CONFIG}', the config"),
    "another config": (
        {**DOCKER, CONFIG: OTHER.config},
        VerificationError,
        f"'0/layer.tar' has the digest {IMAGE.diff_ids[0]}, "
        f"but the image's config has the diff ID {OTHER.diff_ids[0]}",
    ),
    "no layer": (
        changed(DOCKER, **{"1/layer.tar": None}),
        ArchiveError,
        "lacks the layer '1/layer.tar'",
    ),
    "another layer": (
        {**DOCKER, "1/layer.tar": tar_of({"a": b"b"})},
        VerificationError,
        f"'1/layer.tar' has the digest sha256:.*{IMAGE.diff_ids[1]}",
    ),
    "one layer too few": (
        with_docker(Layers=["0/layer.tar"]),
        ManifestError,
        "1 layers of .*demo:1.*2 diff IDs",
    ),
    "a layer of xz": (
        {**DOCKER, "0/layer.tar": lzma.compress(b"x")},
        ArchiveError,
        "'0/layer.tar' is compressed by xz",
    ),
    "a path that leads out": (
        with_docker(Layers=["../../../../etc/passwd", "/etc/hostname"]),
        ArchiveError,
        "lacks the layer '../../../../etc/passwd'",
    ),
    "an absolute path": (
        with_docker(Layers=["/etc/hostname", "/etc/hostname"]),
        ArchiveError,
        "lacks the layer 'etc/hostname'",
    ),
    "a manifest beyond the root": (
        {"../manifest.json": DOCKER["manifest.json"]},
        ArchiveError,
        "neither.*'../manifest.json'",
    ),
    "a member twice": (
        tar_of([*DOCKER.items(), ("./manifest.json", b"[]")]),
        ArchiveError,
        "has 'manifest.json' twice",
    ),
    "a link that leads out": (
        tar_of({**DOCKER, "0/layer.tar": link("0/layer.tar", "../../../etc/passwd")}),
        ArchiveError,
        "lacks the layer '0/layer.tar'",
    ),
    "a blob that is a link": (
        tar_of({**changed(OCI, **{LAYER: None}), "x": b"no", LAYER: link(LAYER, "../../x")}),
        VerificationError,
        f"{LAYER} is damaged: its content has the digest {digest_of(b'no')}",
    ),
    "links in a circle": (
        tar_of(
            {
                **DOCKER,
                "0/layer.tar": link("0/layer.tar", "layer"),
                "0/layer": link("0/layer", "/0/layer.tar"),
            }
        ),
        ArchiveError,
        "from '0/layer.tar' form a loop",
    ),
    "a long path": ({"a" * 2000: b"", **DOCKER}, ArchiveError, "more than 1024 bytes"),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_archives(tmp_path: Path, name: str) -> None:
    """A typed error names the fault, and the store is unchanged."""
    source, kind, text = BAD[name]
    data = source if isinstance(source, bytes) else tar_of(source)
    async with opened(tmp_path) as store:
        with pytest.raises(kind, match=text) as caught:
            await import_images(store, Stream(data))
        assert type(caught.value) is kind
        assert "the stream" in str(caught.value)
        assert await store.images() == []
        assert visible(tmp_path) == []


LAYOUTS = [
    "a missing blob",
    "a damaged blob",
    "a damaged document",
    "a wrong size",
    "no oci-layout",
]
LAYOUTS += ["an index that is huge", "a missing manifest", "an artifact", "other files"]


@pytest.mark.parametrize("name", LAYOUTS)
async def test_bad_layouts(tmp_path: Path, name: str) -> None:
    source, kind, text = BAD[name]
    assert not isinstance(source, bytes)
    layout = write_layout(tmp_path / "layout", source)
    async with opened(tmp_path / "store") as store:
        with pytest.raises(kind, match=text.replace("'etc/passwd'", "'etc'")):
            await import_images(store, layout)
        assert visible(tmp_path / "store") == []


async def test_indexes_that_lead_nowhere(tmp_path: Path) -> None:
    members: Members = dict(OCI)
    entry = entry_of(IMAGE, **ref_name(NAME))
    for _ in range(5):
        index = as_json({"schemaVersion": 2, "manifests": [entry]})
        members[blob(digest_of(index))] = index
        entry = {
            **entry,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "digest": digest_of(index),
            "size": len(index),
        }
    members["index.json"] = as_json({"schemaVersion": 2, "manifests": [entry]})
    async with opened(tmp_path) as store:
        with pytest.raises(ManifestError, match="more than 4 indexes"):
            await import_images(store, Stream(tar_of(members)))


async def test_what_is_no_file(tmp_path: Path) -> None:
    async with opened(tmp_path / "store") as store:
        with pytest.raises(FileNotFoundError):
            await import_images(store, tmp_path / "nowhere")
        with pytest.raises(ArchiveError, match="/dev/null is neither a file nor a directory"):
            await import_images(store, "/dev/null")
        layout = write_layout(tmp_path / "layout", OCI)
        (layout / LAYER).unlink()
        (layout / LAYER).symlink_to("/dev/zero")
        with pytest.raises(ArchiveError, match="neither a file nor a directory"):
            await import_images(store, layout)
        assert await store.images() == []


async def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive has a maximum number of bytes and of members."""
    data = gzip.compress(tar_of({**DOCKER, "zeros": bytes(10 << 20)}))
    limits = Limits(max_ratio=100, max_ratio_from=1 << 20)
    async with open_store(tmp_path, limits=limits) as store:
        monkeypatch.setattr(reading, "MAX_MEMBERS", 5)
        with pytest.raises(ArchiveError, match="more than 5 members"):
            await import_images(store, Stream(data))
        monkeypatch.undo()
        with pytest.raises(ArchiveError, match=r"'zeros'.*limit max_ratio"):
            await import_images(store, Stream(data))
        monkeypatch.setattr(importing, "MAX_LAYERS", 1)
        with pytest.raises(ArchiveError, match="more than 1 layers"):
            await import_images(store, Stream(tar_of(DOCKER)))
        assert visible(tmp_path) == []


@pytest.mark.parametrize("kind", ["stored", "compressed", "sparse"])
async def test_limits_of_the_store_hold_for_all_members(tmp_path: Path, kind: str) -> None:
    """No member may exceed the store's limit, even one that no image uses.

    Any member may be a layer, since the lists of images may come last.
    """
    big = tmp_path / "unused.bin"
    with big.open("wb") as file:
        file.truncate(8 << 20)
    members = write_layout(tmp_path / "members", DOCKER)
    sparse = ["--sparse"] if kind == "sparse" else []
    command = ["tar", "--create", *sparse, f"--directory={tmp_path}", "unused.bin"]
    done = await trio.run_process(
        [*command, f"--directory={members}", *DOCKER], capture_stdout=True
    )
    data = gzip.compress(done.stdout) if kind == "compressed" else done.stdout
    async with open_store(tmp_path / "store", limits=Limits(max_unpacked_bytes=5 << 20)) as store:
        for source in (Stream(data), write(tmp_path / "archive", data)):
            with pytest.raises(ArchiveError, match=r"'unused.bin'.*max_unpacked_bytes is 5242880"):
                await import_images(store, source)
            assert not leftovers(tmp_path / "store")
        # A member of 4 MiB is within the limit, and within the limit for documents.
        small = tar_of({**DOCKER, "unused": bytes(4 << 20)})
        [image] = await import_images(store, Stream(small))
        assert image.reference == NAME


async def test_directories_are_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories count as members: a few compressed bytes may hold millions of them."""
    monkeypatch.setattr(reading, "MAX_MEMBERS", 10)
    directories = {f"{n}/": link(f"{n}/", "", tarfile.DIRTYPE) for n in range(11)}
    async with opened(tmp_path) as store:
        with pytest.raises(ArchiveError, match="more than 10 members"):
            await import_images(store, Stream(tar_of({**directories, **DOCKER})))


# Thousands of names.


def many_names(count: int) -> dict[str, Members]:
    names = [f"docker.io/library/name{number}:1" for number in range(count)]
    entries = [entry_of(IMAGE, **ref_name(name)) for name in names]
    one = docker_members(IMAGE, *names)
    [entry] = json.loads(one["manifest.json"])
    several = as_json([{**entry, "RepoTags": [name]} for name in names])
    return {
        "tags of one entry": one,
        "an entry for each": {**one, "manifest.json": several},
        "entries of an index": oci_members(entries, IMAGE),
        "both": {**one, **oci_members(entries, IMAGE)},
    }


@pytest.mark.parametrize("kind", many_names(1))
async def test_names_are_put_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """One import writes ``index.json`` once; its SQL statements grow linearly with its names."""
    written: list[Path] = []

    replace = layout.replace_file

    def replace_file(path: Path, data: bytes, *, temporary: Path) -> None:
        written.append(path)
        replace(path, data, temporary=temporary)

    statements: list[str] = []
    async with opened(tmp_path) as store:
        monkeypatch.setattr(layout, "replace_file", replace_file)
        await import_images(store, Stream(tar_of(OCI)), reference="first:1")
        store._parts.catalog._connection.set_trace_callback(statements.append)
        counts = []
        for count in (100, 200):
            statements.clear()
            written.clear()
            images = await import_images(store, Stream(tar_of(many_names(count)[kind])))
            assert len(images) == count
            assert len(written) == 1
            counts.append(sum(not each.startswith("--") for each in statements))
        store._parts.catalog._connection.set_trace_callback(None)
        assert counts[1] - counts[0] <= 100 * 3
        assert len(await store.images()) == 201
        assert not (await store.check()).problems


async def test_a_name_costs_later_ones_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image's entry of ``index.json`` is encoded once, not for each of its names."""
    encoded: list[object] = []
    encode = layout._encode_entry

    def encode_entry(*args: object) -> str:
        encoded.append(args)
        return encode(*args)

    async with opened(tmp_path) as store:
        data = tar_of(many_names(1000)["tags of one entry"])
        images = await import_images(store, Stream(data))
        monkeypatch.setattr(layout, "_encode_entry", encode_entry)
        await import_images(store, Stream(tar_of(oci_image(OTHER))))
        assert len(encoded) == 2
        assert len(json.loads((tmp_path / "index.json").read_bytes())["manifests"]) == 1001
        [again] = await import_images(store, tmp_path, reference=images[500].reference)
        assert again == images[500]


async def test_names_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selecting, "MAX_NAMES", 5)
    monkeypatch.setattr(candidates, "MAX_NAMES", 5)
    async with opened(tmp_path) as store:
        for members in many_names(6).values():
            with pytest.raises(ArchiveError, match="more than 5 names"):
                await import_images(store, Stream(tar_of(members)))
        monkeypatch.setattr(candidates, "MAX_LISTED", 3)
        nested = oci_members([entry_of(AMD_AND_ARM)], AMD_AND_ARM)
        with pytest.raises(ArchiveError, match="more than 3 entries in indexes"):
            await import_images(store, Stream(tar_of(nested)), all=True)
        assert await store.images() == []


async def test_all_names_or_none(tmp_path: Path) -> None:
    """If one of two images is invalid, the store puts neither."""
    async with opened(tmp_path) as store:
        [image] = await import_images(store, Stream(tar_of(OCI)))
        await store.remove(NAME)
        lacking = attrs.evolve(image, reference="b:1", config=OTHER.config_descriptor)
        for wrong in (lacking, attrs.evolve(image, chain_id="sha256:" + "0" * 64)):
            with pytest.raises(StoreError, match="lacks the"):
                await store.put_images([image, wrong])
            assert await store.images() == []
        with pytest.raises(PlatformError):
            await store.put_images([image, attrs.evolve(image, platform="no/such/one/at/all")])
        await store.put_images([image, attrs.evolve(image, reference="c:1")])
        assert len(await store.images()) == 2
        await store.put_images([])


async def test_a_layer_that_is_none(tmp_path: Path) -> None:
    """The blob matches its digest, but is not a tar."""
    image = build_image([b"no tar" * 1000], compression="none")
    async with opened(tmp_path) as store:
        for members in (oci_image(image), docker_members(image, "demo:1")):
            with pytest.raises(RegistrationError) as caught:
                await import_images(store, Stream(tar_of(members)))
            assert isinstance(caught.value.reason, UnpackError)
            assert caught.value.reason.layer == image.diff_ids[0]
        assert await store.images() == []


async def test_a_compressed_layer_that_is_another(tmp_path: Path) -> None:
    """The unpacked layer does not match the diff ID in the config."""
    wrong = {**docker_members(GZIPPED, "demo:1"), "0/layer.tar": OTHER.layers[0].content}
    wrong["0/layer.tar"] = gzip.compress(wrong["0/layer.tar"])
    async with opened(tmp_path) as store:
        with pytest.raises(VerificationError, match=f"unpacks to .*{GZIPPED.diff_ids[0]}"):
            await import_images(store, Stream(tar_of(wrong)))
        assert await store.images() == []


# Imports that are interrupted.


@pytest.mark.parametrize("kind", ["oci", "docker", "gzip"])
async def test_an_archive_that_is_cut(tmp_path: Path, kind: str) -> None:
    """The archive ends at each tenth of its length. Each time the import fails and the store stays
    unchanged. Then the whole archive is imported.
    """
    image = sample_image()
    members = docker_members(image, "demo:1") if kind == "docker" else oci_image(image)
    data = tar_of(members).rstrip(b"\0")
    if kind == "gzip":
        data = gzip.compress(data + bytes(-len(data) % 512), compresslevel=1)
    async with opened(tmp_path) as store:
        for tenth in range(10):
            with pytest.raises(ArchiveError, match="the stream"):
                await import_images(store, Stream(data[: len(data) * tenth // 10]))
            assert visible(tmp_path) == []
        data += b"" if kind == "gzip" else bytes(-len(data) % 512)
        [stored] = await import_images(store, Stream(data))
        assert stored.config.digest == image.config_descriptor.digest


async def test_what_the_stream_raises(tmp_path: Path) -> None:
    error = RuntimeError("the network")
    data = tar_of(OCI)
    async with opened(tmp_path) as store:
        for at in (0, 2000):
            with pytest.raises(RuntimeError) as caught:
                await import_images(store, Stream(data, stop_at=at, error=error))
            assert caught.value is error
        assert visible(tmp_path) == []


async def test_cancelled_while_reading(tmp_path: Path) -> None:
    data = tar_of(oci_image(sample_image()))
    async with opened(tmp_path) as store:
        for at in (0, 5000, len(data) // 2):
            stream = Stream(data, stop_at=at)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(import_images, store, stream)
                await stream.stopped.wait()
                nursery.cancel_scope.cancel()
            assert visible(tmp_path) == []
            assert await store.images() == []
            assert not leftovers(tmp_path)
        [image] = await import_images(store, Stream(data))
        assert image.manifest.digest == sample_image().digest


@pytest.mark.parametrize("at", [Status.PULLING, Status.EXTRACTING, Status.PULL_COMPLETE])
async def test_cancelled_while_unpacking(tmp_path: Path, at: Status) -> None:
    """Whole layers and their blobs may stay, but the store has no image."""
    data = tar_of(oci_image(sample_image()))
    async with opened(tmp_path) as store:
        with trio.CancelScope() as scope:

            async def progress(event: Progress) -> None:
                if event.action == at:
                    scope.cancel()
                await trio.lowlevel.checkpoint()

            await import_images(store, Stream(data), progress=progress)
        assert scope.cancelled_caught
        assert await store.images() == []
        [image] = await import_images(store, Stream(data))
        assert len(await files(store, image)) > 10


async def test_imports_side_by_side(tmp_path: Path) -> None:
    """More imports than waiting threads run at once, of the same and of other archives, into one
    store.
    """
    images = [sample_image(), IMAGE, OTHER]
    put: list[StoredImage] = []
    streams = []

    async def take(number: int, stream: Stream) -> None:
        put.extend(await import_images(store, stream, reference=f"demo:{number}"))

    async with opened(tmp_path) as store:
        async with trio.open_nursery() as nursery:
            for number in range(45):
                data = tar_of(oci_image(images[number % 3]))
                streams.append(Stream(data, stop_at=4096))
                nursery.start_soon(take, number, streams[-1])
            for stream in streams:
                await stream.stopped.wait()
            for stream in streams:
                stream.stop_at = None
                stream.go_on.set()
        assert len(put) == len(await store.images()) == 45
        assert {image.manifest.digest for image in put} == {image.digest for image in images}
