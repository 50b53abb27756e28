"""Pulls of skopeo from the embedded registry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio
from _tools.docker_registry import require

from trio_layers.testing import (
    BasicAuth,
    TokenAuth,
    build_image,
    build_index,
    layers_from_directory,
    open_registry,
    sample_image,
)

pytestmark = pytest.mark.integration


async def skopeo(*arguments: str) -> bytes:
    with trio.fail_after(60):
        done = await trio.run_process(
            [require("skopeo"), *arguments], capture_stdout=True, capture_stderr=True
        )
    return done.stdout


@pytest.mark.parametrize("auth", [None, TokenAuth()], ids=["open", "token"])
@pytest.mark.parametrize("format", ["oci", "docker"])
async def test_inspect_by_tag(auth, format: str) -> None:
    image = sample_image(format=format)
    async with open_registry(auth=auth) as registry:
        reference = registry.add(image, "library/demo:latest")
        shown = json.loads(await skopeo("inspect", "--tls-verify=false", f"docker://{reference}"))
        assert shown["Digest"] == image.digest
        assert shown["Layers"] == [layer.descriptor.digest for layer in image.layers]
        assert shown["RepoTags"] == ["latest"]
        assert shown["Env"] == ["PATH=/usr/bin"]


@pytest.mark.parametrize(
    "auth", [BasicAuth("user", "pass"), TokenAuth("user", "pass")], ids=["basic", "token"]
)
async def test_copy_with_credentials(auth, tmp_path: Path) -> None:
    image = sample_image(compression="zstd")
    async with open_registry(auth=auth) as registry:
        reference = registry.add(image, "library/demo:latest")
        options = ["--src-tls-verify=false", "--src-creds", "user:pass"]
        await skopeo("copy", *options, f"docker://{reference}", f"dir:{tmp_path}")
    assert (tmp_path / "manifest.json").read_bytes() == image.manifest
    for digest, content in image.blobs.items():
        assert (tmp_path / digest.removeprefix("sha256:")).read_bytes() == content


async def test_copy_all_platforms(tmp_path: Path) -> None:
    index = build_index([sample_image(platform=f"linux/{name}") for name in ("amd64", "arm64")])
    async with open_registry() as registry:
        reference = registry.add(index, "library/demo:latest")
        options = ["--all", "--src-tls-verify=false"]
        await skopeo("copy", *options, f"docker://{reference}", f"oci:{tmp_path}:x")
    for digest, content in index.blobs.items():
        path = tmp_path / "blobs/sha256" / digest.removeprefix("sha256:")
        assert path.read_bytes() == content


async def test_copy_layers_that_are_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for index in range(4):
        (source / f"file{index}").write_bytes(bytes([index]) * 1_000_000)
    image = build_image(layers_from_directory(source, 2, tmp_path, compression="none"))
    async with open_registry() as registry:
        reference = registry.add(image, "files/demo:latest")
        target = f"dir:{tmp_path / 'target'}"
        await skopeo("copy", "--src-tls-verify=false", f"docker://{reference}", target)
    for layer in image.layers:
        copied = tmp_path / "target" / layer.descriptor.digest.removeprefix("sha256:")
        assert copied.read_bytes() == layer.content.read_bytes()
