"""Pulls from a docker-registry that skopeo filled, compared with umoci and overlayfs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import trio
from _tools.docker_registry import DockerRegistry, require
from pull.trees import describe, differences

from trio_layers import Image, open_puller
from trio_layers.testing import (
    Directory,
    File,
    HardLink,
    Opaque,
    Symlink,
    Whiteout,
    build_image,
    layers_from_directory,
    sample_image,
)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="owners and mounts need root"),
]

CONTENT_LIMIT = 250_000_000


def umoci(layout: Path, tag: str, bundle: Path) -> Path:
    command = [require("umoci"), "unpack", "--image", f"{layout}:{tag}", bundle]
    subprocess.run(command, check=True, capture_output=True)
    return bundle / "rootfs"


async def compare(docker_registry: DockerRegistry, layout: Path, name: str, work: Path) -> Image:
    """Push an image, pull it, and compare it with umoci's result for the same layout."""
    reference = docker_registry.push(layout, name)
    theirs = describe(umoci(layout, "latest", work / "bundle"))
    async with open_puller(work / "store") as puller, puller.pull(reference) as image:
        async with image.rootfs.mount() as path:
            ours = describe(path)
    # The root's time is ignored, since layers seldom list the root.
    ours["."] = attrs.evolve(ours["."], mtime_ns=theirs["."].mtime_ns)
    assert not differences(ours, theirs)
    assert len(ours) > 5
    return image


async def test_sample_image_is_what_umoci_makes_of_it(
    docker_registry: DockerRegistry, tmp_path: Path
) -> None:
    layout = tmp_path / "layout"
    sample_image().write_oci_layout(layout)
    await compare(docker_registry, layout, "compare/sample:1", tmp_path)


async def test_whiteouts_and_links_over_many_layers(
    docker_registry: DockerRegistry, tmp_path: Path
) -> None:
    """Files are removed and made again, change their types, have unlisted parents, and keep their
    links.
    """
    layers = [
        [
            Directory(""),
            Directory("keep", mode=0o2750, uid=5, gid=6),
            File("keep/a", b"a"),
            File("keep/b", b"b", mode=0o4711),
            HardLink("keep/c", "keep/b", mode=0o4711),
            Directory("gone"),
            File("gone/x", b"x"),
            Directory("emptied", mode=0o700),
            File("emptied/old", b"old"),
            Symlink("to-keep", "keep"),
            File("file", b"a file", xattrs={"user.colour": b"red"}),
        ],
        [
            Directory(""),
            Whiteout("gone"),
            Directory("emptied", mode=0o700),
            Opaque("emptied"),
            File("emptied/new", b"new"),
            Directory("file"),
            File("file/inside", b"a directory now"),
        ],
        [
            Directory(""),
            Directory("gone", mode=0o711),
            File("gone/y", b"y"),
            Directory("keep", mode=0o2750, uid=5, gid=6),
            Whiteout("keep/a"),
            Whiteout("to-keep"),
        ],
        [Directory(""), Directory("to-keep"), Symlink("keep/d", "../gone")],
    ]
    layers[3].insert(2, Directory("keep", mode=0o2750, uid=5, gid=6))
    layout = tmp_path / "layout"
    build_image(layers, compression="gzip").write_oci_layout(layout)
    await compare(docker_registry, layout, "compare/links:1", tmp_path)


async def test_schema_2(docker_registry: DockerRegistry, tmp_path: Path) -> None:
    """The same image has a manifest with Docker's own media types."""
    built = sample_image()
    built.write_oci_layout(tmp_path / "layout")
    reference = docker_registry.push(tmp_path / "layout", "compare/docker:1", as_docker=True)
    async with open_puller(tmp_path / "store") as puller, puller.pull(reference) as image:
        assert [layer.diff_id for layer in image.layers] == list(built.diff_ids)
        assert image.layers[0].descriptor.media_type.startswith("application/vnd.docker.")


def size_of(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(
        os.lstat(os.path.join(directory, name)).st_size
        for directory, _, files in os.walk(path)
        for name in files
    )


def copy_of_usr(to: Path) -> None:
    """Copy a part of this machine's ``/usr``, and add some rarer files."""
    left = CONTENT_LIMIT
    for directory in sorted(Path("/usr").iterdir()):
        if directory.is_symlink() or not directory.is_dir():
            continue
        chosen = []
        for path in sorted(directory.iterdir()):
            if (size := size_of(path)) <= min(left, CONTENT_LIMIT // 10):
                left -= size
                chosen.append(path)
        copy = to / directory.relative_to("/")
        copy.mkdir(parents=True)
        if chosen:
            subprocess.run(["cp", "-ax", "-t", copy, *chosen], check=True)
    capable = to / "usr" / "bin" / "capable"
    capable.write_bytes(b"#!/bin/sh\n")
    subprocess.run([require("setcap"), "cap_net_raw+ep", capable], check=True)
    os.setxattr(capable, "user.note", b"\0\xff")
    os.chmod(capable, 0o6755)
    os.mkfifo(to / "usr" / "fifo")
    os.mknod(to / "usr" / "null", 0o20666, os.makedev(1, 3))
    os.chown(to / "usr" / "fifo", 70_000, 2**31)
    (to / "usr" / os.fsdecode(b"not utf-8 \xff")).write_bytes(b"")


async def test_real_content(docker_registry: DockerRegistry, tmp_path: Path) -> None:
    """This machine's own files, split over layers, are unpacked as umoci unpacks them."""
    source = tmp_path / "source"
    source.mkdir()
    await trio.to_thread.run_sync(copy_of_usr, source)
    (tmp_path / "blobs").mkdir()
    layers = await trio.to_thread.run_sync(
        lambda: layers_from_directory(source, 6, tmp_path / "blobs", level=1)
    )
    layout = tmp_path / "layout"
    await trio.to_thread.run_sync(build_image(layers).write_oci_layout, layout)
    image = await compare(docker_registry, layout, "compare/usr:1", tmp_path)
    assert len(image.layers) == 6


def test_command_line(docker_registry: DockerRegistry, tmp_path: Path) -> None:
    """``python -m trio_layers pull`` ends with 0, and with 1 and one line for a missing image."""
    sample_image().write_oci_layout(tmp_path / "layout")
    reference = docker_registry.push(tmp_path / "layout", "compare/cli:1")
    command = [sys.executable, "-m", "trio_layers", "pull", "--store", str(tmp_path / "store")]
    done = subprocess.run([*command, reference], capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    failed = subprocess.run([*command, "-q", f"{reference}x"], capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("trio-layers: ")
    assert "compare/cli:1x" in failed.stderr
