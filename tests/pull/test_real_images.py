"""Whole images of current tools. umoci, podman and containerd must show the same files.

There are three images: a Debian, one with thousands of small files in a layer of zstd, and one with
whiteouts and links over many layers. podman and containerd show their own overlay mounts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import attrs
import pytest
import trio
from _tools.containerd import Containerd, run_containerd
from _tools.docker_registry import DockerRegistry, require
from _tools.podman import Podman, open_podman
from _tools.real_images import (
    RealImage,
    make_debian,
    make_links,
    make_many_files,
    open_buildah,
)
from pull.mounting import unmount
from pull.trees import Node, describe, differences

from trio_layers import Entry, open_puller

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="owners and mounts need root"),
]

TYPES = {
    "file": "file",
    "dir": "directory",
    "symlink": "symlink",
    "fifo": "fifo",
    "char": "character device",
    "block": "block device",
}


@attrs.frozen
class Pulled:
    """A pulled image in our store.

    Attributes:
        name: The name of the image.
        image: The image's source.
        mounted: The files in `RootfsView.mount`.
        listed: The entries of `RootfsView.walk`.
        layers: Number of layers.
        again: Number of layers that were unpacked again upon their real parent.
    """

    name: str
    image: RealImage
    mounted: Mapping[str, Node]
    listed: Mapping[str, Node]
    layers: int
    again: int


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a disk in memory, up to 1.5 GB large, since all of these tools sync their writes."""
    path = tmp_path_factory.mktemp("real-images")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3g", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        unmount(path)


@pytest.fixture(scope="module")
def images(work: Path, docker_registry: DockerRegistry) -> dict[str, RealImage]:
    (work / "buildah").mkdir()
    with open_buildah(work / "buildah") as buildah:
        debian = make_debian(buildah)
        made = {
            "debian": (debian, "gzip"),
            "small files": (make_many_files(buildah, debian), "zstd"),
            "links": (make_links(buildah, debian), "gzip"),
        }
        pushed = {
            name: buildah.push(image, docker_registry, compression=compression)
            for name, (image, compression) in made.items()
        }
    shutil.rmtree(work / "buildah" / "storage")
    return pushed


@pytest.fixture(scope="module")
def podman(work: Path) -> Iterator[Podman]:
    (work / "podman").mkdir()
    with open_podman(work / "podman") as running:
        yield running


@pytest.fixture(scope="module")
def containerd(work: Path) -> Iterator[Containerd]:
    (work / "containerd").mkdir()
    with run_containerd(work / "containerd") as running:
        yield running


@pytest.fixture(scope="module", params=["debian", "small files", "links"])
def ours(request: pytest.FixtureRequest, work: Path, images: dict[str, RealImage]) -> Pulled:
    return trio.run(pull, work / "store", request.param, images[request.param])


async def pull(store: Path, name: str, image: RealImage) -> Pulled:
    again = 0
    async with open_puller(store) as puller, puller.pull(image.reference) as pulled:
        for layer in pulled.layers:
            stored = await puller.store.get(layer.chain_id)
            assert stored is not None
            again += stored.tree.name != layer.diff_id.removeprefix("sha256:")
            puller.store.release(stored)
        async with pulled.rootfs.mount() as path:
            mounted = await trio.to_thread.run_sync(describe, path)
        listed = nodes(await pulled.rootfs.walk())
        return Pulled(name, image, mounted, listed, len(pulled.layers), again)


def nodes(entries: Iterable[Entry]) -> dict[str, Node]:
    """Return the result of `describe` for a directory with these entries.

    The contents of files are represented by their checksums.
    """
    groups: dict[bytes, list[str]] = {}
    for entry in entries:
        if entry.links is not None:
            groups.setdefault(entry.links, []).append(os.fsdecode(entry.path))
    return {
        os.fsdecode(entry.path or b"."): Node(
            type=TYPES[entry.type],
            mode=entry.mode,
            owner=(entry.uid, entry.gid),
            mtime_ns=entry.mtime_ns,
            device=os.makedev(*entry.dev) if entry.dev else 0,
            content=os.fsdecode(entry.linkname or b""),
            crc32=entry.crc32 or 0,
            links=tuple(sorted(groups[entry.links])) if entry.links is not None else (),
            xattrs=tuple(sorted(entry.xattrs.items())),
        )
        for entry in entries
    }


def compare(ours: Pulled, theirs: Mapping[str, Node], **root: object) -> None:
    """Check that all nodes are equal.

    ``root`` has each tool's own choice for the root, which no layer of these images lists.
    """
    mounted = dict(ours.mounted)
    assert mounted["."].mode == 0o755
    mounted["."] = attrs.evolve(mounted["."], mtime_ns=theirs["."].mtime_ns, **root)
    assert not differences(mounted, dict(theirs))


def test_they_are_what_they_should_be(ours: Pulled) -> None:
    """The images have the tested features, and none needs a layer unpacked twice.

    Today's tools list the directories that lead to their changes.
    """
    assert ours.again == 0
    found = ours.mounted
    if ours.name == "debian":
        assert ours.layers == 1
        assert found["usr/bin/su"].mode == 0o4755
        assert found["bin"].content == "usr/bin"
    elif ours.name == "small files":
        assert ours.layers == 2
        assert sum(node.type == "file" for node in found.values()) > 10_000
    else:
        assert ours.layers > 12
        assert not {"usr/share/doc", "usr/share/man", "usr/share/zoneinfo"} & found.keys()
        assert found["usr/bin/list"].mtime_ns == 10**18
        assert found["usr/bin/ls"].links == ("usr/bin/cat", "usr/bin/ls")
        assert found["media"].type == "fifo"
        assert found["dev/x"].device == os.makedev(8, 1)
        assert found["etc/issue"].content == "/nowhere"
        assert "opt/not utf-8 \udcff" in found
        assert found["opt/sparse"].owner == (70000, 2**31)
        assert found["etc/issue"].mtime_ns == 10**9
        assert found["usr/bin/tar"].mode == 0o4755
        assert [name for name, _ in found["usr/bin/tar"].xattrs] == ["security.capability"]


def test_view_and_mount_agree(ours: Pulled) -> None:
    """The view lists the same entries as the kernel shows."""
    mounted = {
        path: attrs.evolve(node, content="") if node.type == "file" else node
        for path, node in ours.mounted.items()
    }
    assert not differences(dict(ours.listed), mounted)


def test_umoci(ours: Pulled, work: Path) -> None:
    with tempfile.TemporaryDirectory(dir=work) as bundle:
        command = [require("umoci"), "raw", "unpack", "--image", ours.image.layout]
        command.append(f"{bundle}/rootfs")
        subprocess.run(command, check=True, capture_output=True)
        compare(ours, describe(Path(bundle) / "rootfs"))


def test_podman(ours: Pulled, podman: Podman) -> None:
    with podman.mounted(ours.image.reference) as path:
        # containers/storage makes the lowest directory with this mode (drivers/overlay, "create").
        compare(ours, describe(path), mode=0o555)


def test_containerd(ours: Pulled, containerd: Containerd) -> None:
    with containerd.mounted(ours.image.reference) as path:
        compare(ours, describe(path))
