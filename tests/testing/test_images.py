"""The image builder, checked with other tools."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from _tools.docker_registry import require

from trio_layers.testing import (
    MTIME,
    Directory,
    Fifo,
    File,
    HardLink,
    LayerEntry,
    Opaque,
    Symlink,
    Whiteout,
    build_image,
    build_index,
    build_layer,
    layers_from_directory,
    sample_image,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

DECOMPRESS = {
    "none": bytes,
    "gzip": gzip.decompress,
    "zstd": zstd.decompress,
    "bzip2": bz2.decompress,
    "xz": lzma.decompress,
}


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def members(layer) -> dict[str, tarfile.TarInfo]:
    content = layer.content if isinstance(layer.content, bytes) else layer.content.read_bytes()
    data = DECOMPRESS[layer.compression](content)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: member for member in tar}


@pytest.mark.parametrize("compression", DECOMPRESS)
def test_layer_digests_are_those_of_its_bytes(compression: str) -> None:
    """The descriptor has the blob's digest, the diff ID that of the tar, which is always equal."""
    entries = [File("a", data=b"x" * 100_000)]
    layer = build_layer(entries, compression=compression)
    assert layer.descriptor.digest == digest(layer.content)
    assert layer.descriptor.size == len(layer.content)
    assert layer.diff_id == digest(DECOMPRESS[compression](layer.content))
    assert layer.diff_id == build_layer(entries, compression="none").diff_id
    assert layer.content == build_layer(entries, compression=compression).content


def test_entries_come_back_through_tarfile() -> None:
    layer = build_layer(
        [
            Directory("d", mode=0o2750, uid=7, gid=8),
            File("d/f", data=b"data", mode=0o4755, mtime=5, xattrs={"user.a": b"\xff\0\n="}),
            Symlink("d/s", "/nowhere"),
            HardLink("d/h", "d/f"),
            Fifo("p"),
            Whiteout("d/gone"),
            Whiteout("gone"),
            Opaque("d"),
            Opaque(""),
        ]
    )
    found = members(layer)
    assert list(found) == [
        "d",
        "d/f",
        "d/s",
        "d/h",
        "p",
        "d/.wh.gone",
        ".wh.gone",
        "d/.wh..wh..opq",
        ".wh..wh..opq",
    ]
    directory, file = found["d"], found["d/f"]
    assert directory.isdir()
    assert (directory.mode, directory.uid, directory.gid) == (0o2750, 7, 8)
    assert (file.mode, file.mtime, file.size) == (0o4755, 5, 4)
    xattr = file.pax_headers["SCHILY.xattr.user.a"]
    assert xattr.encode("utf-8", "surrogateescape") == b"\xff\0\n="
    assert "hdrcharset" not in file.pax_headers
    assert found["d/s"].linkname == "/nowhere"
    assert found["d/h"].islnk()
    assert found["d/h"].linkname == "d/f"
    assert found["p"].isfifo()
    assert found["p"].mtime == MTIME


def test_what_ustar_cannot_hold_is_in_a_pax_header() -> None:
    """PAX headers hold long and non-ASCII names, large owners, fractional and negative times."""
    long = "/".join(["directory"] * 30)
    layer = build_layer(
        [
            Directory(long),
            File("é" * 60, uid=3_000_000_000, gid=2**31, mtime=-1.5),
            Symlink("link", long),
            File("n" * 100),
            File("m" * 101),
        ]
    )
    found = members(layer)
    assert list(found) == [long, "é" * 60, "link", "n" * 100, "m" * 101]
    odd = found["é" * 60]
    assert (odd.uid, odd.gid, odd.mtime) == (3_000_000_000, 2**31, -1.5)
    assert found["link"].linkname == long
    assert not found["n" * 100].pax_headers


@pytest.mark.parametrize("size", range(80, 100))
def test_pax_record_lengths_count_themselves(size: int) -> None:
    """Lengths are right around the values where they get another digit."""
    found = members(build_layer([File("f", xattrs={"user.a": b"v" * size, "user.b": b"w"})]))
    assert found["f"].pax_headers["SCHILY.xattr.user.a"] == "v" * size
    assert found["f"].pax_headers["SCHILY.xattr.user.b"] == "w"


def test_a_finished_tar_is_taken_as_it_is() -> None:
    layer = build_layer(b"not a tar", compression="gzip")
    assert layer.diff_id == digest(b"not a tar")


def test_build_layer_refuses_other_types() -> None:
    with pytest.raises(TypeError, match="not an entry"):
        build_layer([LayerEntry("plain")])


def test_image_documents_agree() -> None:
    """Manifest, config and blobs name one another by their digests."""
    image = build_image(
        [[File("a")], build_layer([File("b")], compression="zstd")],
        platform="linux/arm/v7",
        env={"A": "1"},
        cmd=["run"],
        entrypoint=["sh"],
        user="u",
        working_dir="/w",
        labels={"l": "1"},
        annotations={"k": "v"},
    )
    assert image.digest == digest(image.manifest)
    manifest, config = json.loads(image.manifest), json.loads(image.config)
    assert manifest["config"]["digest"] == digest(image.config)
    assert manifest["annotations"] == {"k": "v"}
    assert [layer["mediaType"].rpartition("+")[2] for layer in manifest["layers"]] == [
        "gzip",
        "zstd",
    ]
    assert {key: digest(value) for key, value in image.blobs.items()} == {
        key: key for key in image.blobs
    }
    assert config["rootfs"]["diff_ids"] == list(image.diff_ids)
    assert (config["os"], config["architecture"], config["variant"]) == ("linux", "arm", "v7")
    assert config["config"] == {
        "User": "u",
        "Env": ["A=1"],
        "Entrypoint": ["sh"],
        "Cmd": ["run"],
        "WorkingDir": "/w",
        "Labels": {"l": "1"},
    }


def test_docker_format_is_docker_throughout() -> None:
    image = build_image([build_layer([File("a")])], format="docker")
    manifest = json.loads(image.manifest)
    types = [manifest["mediaType"], manifest["config"]["mediaType"]]
    types += [layer["mediaType"] for layer in manifest["layers"]]
    assert all(kind.startswith("application/vnd.docker.") for kind in types)


def test_index_names_its_images_and_their_platforms() -> None:
    images = [sample_image(platform=name) for name in ("linux/amd64", "linux/arm64/v8")]
    index = build_index(images)
    entries = json.loads(index.manifest)["manifests"]
    assert [entry["digest"] for entry in entries] == [image.digest for image in images]
    assert entries[1]["platform"] == {"os": "linux", "architecture": "arm64", "variant": "v8"}
    assert index.blobs.keys() == images[0].blobs.keys() | images[1].blobs.keys()
    assert [descriptor.digest for descriptor, _ in index.manifests][-1] == index.digest


def test_sample_image_is_the_same_in_every_run() -> None:
    """The digests without compression are constant."""
    assert sample_image().diff_ids == sample_image(compression="zstd", format="docker").diff_ids
    assert sample_image(compression="none").digest == (
        "sha256:e1d43b5489adcdad30227d85ffdf2d4f1e3599f926fa7023665747ad30002156"
    )


def make_tree(root: Path) -> None:
    for name in ("a", "b/c", "d"):
        (root / name).mkdir(parents=True)
    for index in range(8):
        (root / "b/c" / f"file{index}").write_bytes(bytes([index]) * 100_000)
    os.link(root / "b/c/file0", root / "a/same")
    os.link(root / "b/c/file6", root / "b/c/file7a")
    os.link(root / "b/c/file0", root / "d/same")
    (root / "d/link").symlink_to("../a")
    os.mkfifo(root / "d/pipe")
    (root / "b").chmod(0o700)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(root / "d/socket"))


@pytest.mark.parametrize("parts", [1, 3, 40])
def test_directory_in_parts_is_the_directory(tmp_path: Path, parts: int) -> None:
    """Any number of layers unpacks to the original tree."""
    source, output, target = tmp_path / "source", tmp_path / "output", tmp_path / "target"
    make_tree(source)
    output.mkdir()
    layers = layers_from_directory(source, parts, output, level=1)
    assert len(layers) == parts
    for layer in layers:
        assert layer.descriptor.digest == digest(layer.content.read_bytes())
        with tarfile.open(layer.content) as tar:
            # Python in Debian 12 has no filters yet.
            tar.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)
            tar.extractall(target)
    names = {path.relative_to(source) for path in source.rglob("*")} - {Path("d/socket")}
    assert {path.relative_to(target) for path in target.rglob("*")} == names
    for name in names:
        before, after = source / name, target / name
        assert after.lstat().st_mode == before.lstat().st_mode
        if before.is_file() and not before.is_symlink():
            assert after.read_bytes() == before.read_bytes()
    assert (target / "b/c/file6").samefile(target / "b/c/file7a") is (parts == 1)


def test_directory_parts_are_balanced_and_begin_with_their_parents(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source)
    layers = layers_from_directory(source, 3, tmp_path, compression="none")
    names = [list(members(layer)) for layer in layers]
    assert names[0][0] == "."
    assert names[1][:2] == ["b", "b/c"]
    assert max(layer.descriptor.size for layer in layers) < 500_000


def test_directory_needs_a_part(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        layers_from_directory(tmp_path, 0, tmp_path)


def test_layout_of_file_backed_layers_does_not_copy_them(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source)
    image = build_image(layers_from_directory(source, 2, tmp_path))
    for _ in range(2):  # writing it again does no harm
        image.write_oci_layout(tmp_path / "layout")
    for layer in image.layers:
        name = layer.descriptor.digest.removeprefix("sha256:")
        assert (tmp_path / "layout/blobs/sha256" / name).samefile(layer.content)


@pytest.mark.integration
@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_umoci_unpacks_the_sample(tmp_path: Path, compression: str) -> None:
    """The sample unpacks in umoci as documented: whiteouts, opaque directory, links, owners."""
    umoci = require("umoci")
    sample_image(compression=compression).write_oci_layout(tmp_path / "layout", tag="1")
    subprocess.run(
        [umoci, "unpack", "--image", f"{tmp_path}/layout:1", tmp_path / "bundle"]
        + (["--rootless"] if os.getuid() else []),
        check=True,
        timeout=60,
    )
    root = tmp_path / "bundle/rootfs"
    assert (root / "etc/os-release").read_text().startswith('NAME="Sample"')
    assert (root / "etc/hostname").read_text() == "sample-2\n"
    assert not (root / "etc/motd").exists()
    assert (root / "srv/app/run").samefile(root / "srv/app/main")
    assert os.listdir(root / "var/cache/app") == ["new"]
    if not os.getuid():
        assert (root / "srv/app").stat().st_uid == 1000


def served_manifest(reference: str) -> bytes:
    shown = subprocess.run(
        [require("skopeo"), "inspect", "--raw", "--tls-verify=false", f"docker://{reference}"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return shown.stdout


@pytest.mark.integration
@pytest.mark.parametrize("compression", DECOMPRESS)
def test_a_docker_registry_takes_a_layout(
    tmp_path: Path, docker_registry, compression: str
) -> None:
    """docker-registry accepts a pushed layout of the builder."""
    image = sample_image(compression=compression)
    image.write_oci_layout(tmp_path)
    reference = docker_registry.push(tmp_path, f"testing/{compression}:1")
    assert served_manifest(reference) == image.manifest


@pytest.mark.integration
def test_a_docker_registry_takes_an_index(tmp_path: Path, docker_registry) -> None:
    index = build_index([sample_image(platform=f"linux/{name}") for name in ("amd64", "arm64")])
    index.write_oci_layout(tmp_path, tag="all")
    reference = docker_registry.push(tmp_path, "testing/index:1", tag="all")
    assert served_manifest(reference) == index.manifest


@pytest.mark.integration
def test_pushed_as_docker_it_is_what_the_builder_makes(tmp_path: Path, docker_registry) -> None:
    """The manifest that skopeo rewrites has the same config, layers and media types."""
    sample_image().write_oci_layout(tmp_path)
    reference = docker_registry.push(tmp_path, "testing/docker:1", as_docker=True)
    served, ours = json.loads(served_manifest(reference)), sample_image(format="docker").manifest
    assert served == json.loads(ours)
