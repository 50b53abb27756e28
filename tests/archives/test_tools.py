"""Archives and layouts between skopeo, podman, umoci and this library."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import trio
from _tools.docker_registry import require
from _tools.podman import Podman, open_podman
from archives.layouts import NAME, files, hexdigits, oci_image, opened, tar_of
from pull.trees import Node, describe, differences
from store.stores import Stream

from trio_layers import DirectoryStore, StoredImage, export_images, import_images
from trio_layers.testing import BuiltImage, sample_image

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="owners and mounts need root"),
]

COMPRESSIONS = ["gzip", "zstd"]
IMAGES = {compression: sample_image(compression=compression) for compression in COMPRESSIONS}
FORMATS = ["oci-archive", "docker-archive", "oci"]


def run(program: str, *arguments: str | Path) -> str:
    command = [require(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def skopeo_digest(image: str) -> str:
    """Return the digest of the manifest that skopeo finds in an archive."""
    return json.loads(run("skopeo", "inspect", image))["Digest"]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("layouts")
    for compression, image in IMAGES.items():
        image.write_oci_layout(path / compression)
    return {compression: path / compression for compression in COMPRESSIONS}


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    with open_podman(tmp_path_factory.mktemp("podman")) as running:
        yield running


@pytest.fixture(scope="module")
def expected(layouts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Node]:
    """Return the files that umoci unpacks from the image."""
    return unpacked(f"{layouts['gzip']}:latest", tmp_path_factory.mktemp("umoci"))


def unpacked(image: str, work: Path) -> dict[str, Node]:
    run("umoci", "unpack", "--image", image, work / "bundle")
    return describe(work / "bundle" / "rootfs")


async def exported(store: DirectoryStore, image: StoredImage, path: Path) -> dict[str, Node]:
    await (await store.rootfs(image.chain_id)).export(path, root_metadata=True)
    return describe(path)


def same(ours: dict[str, Node], theirs: dict[str, Node]) -> list[str]:
    """Compare two trees, except for the root's time, which each tool sets differently."""
    ours["."] = attrs.evolve(ours["."], mtime_ns=theirs["."].mtime_ns)
    assert len(ours) > 15
    return differences(ours, theirs)


# Archives of other tools, read by this library.


@pytest.mark.parametrize(
    ("format", "compression"),
    [
        ("oci-archive", "gzip"),
        ("oci-archive", "zstd"),
        ("oci", "zstd"),
        ("docker-archive", "gzip"),  # skopeo writes no docker-archive with zstd layers
    ],
)
async def test_what_skopeo_copies(
    tmp_path: Path,
    layouts: dict[str, Path],
    expected: dict[str, Node],
    format: str,
    compression: str,
) -> None:
    built, source = IMAGES[compression], layouts[compression]
    run("skopeo", "copy", f"oci:{source}:latest", f"{format}:{tmp_path}/target:{NAME}")
    async with opened(tmp_path / "store") as store:
        [image] = await import_images(store, tmp_path / "target")
        assert image.reference == NAME
        assert image.config.digest == built.config_descriptor.digest
        if format != "docker-archive":
            assert image.manifest.digest == built.digest
            assert image.manifest.digest == skopeo_digest(f"{format}:{tmp_path}/target")
        assert not same(await exported(store, image, tmp_path / "rootfs"), expected)


@pytest.mark.parametrize("format", ["docker-archive", "oci-archive", "oci-dir"])
async def test_what_podman_saves(
    tmp_path: Path,
    layouts: dict[str, Path],
    expected: dict[str, Node],
    podman: Podman,
    format: str,
) -> None:
    podman.run("pull", "--quiet", f"oci:{layouts['gzip']}:latest")
    image_id = IMAGES["gzip"].config_descriptor.digest
    name = f"localhost/saved:{format}"
    podman.run("tag", hexdigits(image_id), name)
    target = tmp_path / "target"
    podman.run("save", "--quiet", "--format", format, "--output", str(target), name)
    async with opened(tmp_path / "store") as store:
        [image] = await import_images(store, target)
        assert image.reference == name
        assert image.config.digest == image_id
        if format != "docker-archive":
            transport = format.removesuffix("-dir")
            assert image.manifest.digest == skopeo_digest(f"{transport}:{target}")
        assert not same(await exported(store, image, tmp_path / "rootfs"), expected)


async def test_what_podman_saves_in_one(
    tmp_path: Path, layouts: dict[str, Path], podman: Podman
) -> None:
    """Podman writes two images with common layers to stdout, and one of them has two names."""
    podman.run("pull", "--quiet", f"oci:{layouts['gzip']}:latest")
    image_id = hexdigits(IMAGES["gzip"].config_descriptor.digest)
    names = ["localhost/one:1", "localhost/one:2"]
    podman.run("tag", image_id, *names)
    container = podman.run("create", names[0])
    podman.run("commit", "--quiet", container, "localhost/two:1")
    podman.run("rm", container)
    target = tmp_path / "target"
    saved = ["--multi-image-archive", "--output", str(target), *names, "localhost/two:1"]
    podman.run("save", "--quiet", *saved)
    two = podman.run("image", "inspect", "--format", "{{.Id}}", "localhost/two:1")
    async with opened(tmp_path / "store") as store:
        images = await import_images(store, Stream(target.read_bytes()))
        configs = {image.reference: hexdigits(image.config.digest) for image in images}
        # podman writes all names of an image.
        assert {**configs, **dict.fromkeys(names, image_id), "localhost/two:1": two} == configs
        assert image_id != two


# Archives of this library, read by other tools.


async def put(store: DirectoryStore, image: BuiltImage) -> StoredImage:
    [stored] = await import_images(store, Stream(tar_of(oci_image(image))))
    return stored


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("format", FORMATS)
async def test_skopeo_reads_what_we_export(tmp_path: Path, format: str, compression: str) -> None:
    """Skopeo finds the image by name, and its copy verifies all blobs."""
    built, target = IMAGES[compression], f"{format}:{tmp_path}/target:{NAME}"
    async with opened(tmp_path / "store") as store:
        await put(store, built)
        await export_images(store, NAME, tmp_path / "target", format=format)
    run("skopeo", "copy", target, f"dir:{tmp_path}/copy")
    manifest = (tmp_path / "copy" / "manifest.json").read_bytes()
    config = json.loads(manifest)["config"]["digest"]
    assert config == built.config_descriptor.digest
    assert (tmp_path / "copy" / hexdigits(config)).read_bytes() == built.config
    if format != "docker-archive":
        assert manifest == built.manifest
        assert skopeo_digest(target) == built.digest
    if format == "oci-archive":
        # skopeo can also read it as a docker-archive.
        shown = json.loads(
            run("skopeo", "inspect", "--config", f"docker-archive:{tmp_path}/target")
        )
        assert shown == json.loads(built.config)


@pytest.mark.parametrize(
    ("format", "compression"),
    [("oci-archive", "zstd"), ("docker-archive", "zstd"), ("oci", "gzip")],
)
async def test_podman_loads_what_we_export(
    tmp_path: Path, expected: dict[str, Node], podman: Podman, format: str, compression: str
) -> None:
    built = IMAGES[compression]
    async with opened(tmp_path / "store") as store:
        await put(store, built)
        await export_images(store, NAME, tmp_path / "target", format=format)
    podman.run("rmi", "--all", "--force")
    podman.run("load", "--quiet", "--input", str(tmp_path / "target"))
    # For skopeo, an image in a layout directory is named by the directory's path.
    name = hexdigits(built.config_descriptor.digest) if format == "oci" else NAME
    shown = podman.run("image", "inspect", "--format", "{{.Id}} {{.Digest}}", name)
    identity, digest = shown.split()
    assert identity == hexdigits(built.config_descriptor.digest)
    if format != "docker-archive":
        assert digest == built.digest
    path = Path(podman.run("image", "mount", name))
    try:
        assert not same(describe(path), expected)
    finally:
        podman.run("image", "umount", name)


async def test_podman_loads_schema_2(tmp_path: Path, podman: Podman) -> None:
    """Podman's OCI reader does not find schema 2 by name, so podman uses the manifest.json."""
    built = sample_image(format="docker")
    async with opened(tmp_path / "store") as store:
        await put(store, built)
        await export_images(store, NAME, tmp_path / "target")
    podman.run("rmi", "--all", "--force")
    podman.run("load", "--quiet", "--input", str(tmp_path / "target"))
    identity = podman.run("image", "inspect", "--format", "{{.Id}}", NAME)
    assert identity == hexdigits(built.config_descriptor.digest)


async def test_umoci_unpacks_what_we_export(tmp_path: Path, expected: dict[str, Node]) -> None:
    async with opened(tmp_path / "store") as store:
        await put(store, IMAGES["gzip"])
        await export_images(store, NAME, tmp_path / "target", format="oci")
    assert run("umoci", "ls", "--layout", tmp_path / "target").split() == [NAME]
    assert not same(unpacked(f"{tmp_path}/target:{NAME}", tmp_path), expected)


async def test_they_read_the_store_itself(
    tmp_path: Path, expected: dict[str, Node], podman: Podman
) -> None:
    built = IMAGES["gzip"]
    source = f"{tmp_path}/store:{NAME}"
    async with opened(tmp_path / "store") as store:
        stored = await put(store, built)
        assert len(await files(store, stored)) > 15
        # skopeo reads the store while it is open.
        await trio.to_thread.run_sync(run, "skopeo", "inspect", f"oci:{source}")
    assert skopeo_digest(f"oci:{source}") == built.digest
    assert not same(unpacked(source, tmp_path), expected)
    podman.run("rmi", "--all", "--force")
    identity = podman.run("pull", "--quiet", f"oci:{source}")
    assert identity == hexdigits(built.config_descriptor.digest)
