"""Blobs from other servers than docker-registry: redirects, and foreign layers."""

from __future__ import annotations

import functools
import json
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest
import trio
from _tools.canaries import Canaries
from _tools.docker_registry import DockerRegistry, require, run_docker_registry
from _tools.static_server import serve_directory

from trio_layers import (
    ArchiveError,
    Credentials,
    export_images,
    import_images,
    open_puller,
    open_store,
)
from trio_layers._digest import digest_of
from trio_layers.testing import BuiltImage, File, build_image

USER, PASSWORD = "us", "canary-5ecret"
CREDENTIALS = Credentials(USER, PASSWORD)
# The same, hashed by bcrypt with the lowest cost.
BCRYPT = "$2y$05$abcdefghijklmnopqrstuuacxD6pG5D5/pUUuKTQTOXjjnFrzV11K"
BIG = random.Random(2).randbytes(400_000)
FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"


@pytest.fixture(scope="module")
def built() -> BuiltImage:
    return build_image([[File("big", BIG)], [File("small", b"small")]])


def htpasswd(directory: Path) -> str:
    (directory / "htpasswd").write_text(f"{USER}:{BCRYPT}\n")
    return f"auth: {{htpasswd: {{realm: here, path: {directory}/htpasswd}}}}"


def push(registry: DockerRegistry, built: BuiltImage, layout: Path) -> None:
    built.write_oci_layout(layout)
    registry.push(layout, "team/app:1", creds=f"{USER}:{PASSWORD}")


async def test_a_registry_that_redirects_to_its_storage(
    built: BuiltImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another origin gets no credentials. A broken download goes on, through the redirect."""
    canaries = Canaries(caplog, f"{USER}:{PASSWORD}")
    auth = htpasswd(tmp_path)

    def fill() -> None:
        with run_docker_registry(tmp_path, more=auth) as registry:
            push(registry, built, tmp_path / "layout")

    await trio.to_thread.run_sync(fill)
    layer = built.layers[0].descriptor.digest
    file = f"/{layer.removeprefix('sha256:')}/data"
    async with serve_directory(tmp_path / "data") as storage:
        storage.cut[file] = 100_000
        redirect = f"{{storage: [{{name: redirect, options: {{baseurl: '{storage.url}'}}}}]}}"
        more = f"{auth}\nmiddleware: {redirect}"
        running = run_docker_registry(tmp_path, quiet=False, more=more)
        registry = await trio.to_thread.run_sync(running.__enter__)
        try:
            async with (
                open_puller(tmp_path / "store", credentials=CREDENTIALS, retry_tick=0.01) as puller,
                puller.pull(f"{registry.host}/team/app:1") as image,
            ):
                assert image.digest == built.digest
                assert await image.rootfs.read_bytes("big") == BIG
            asked = [each.split() for each in registry.requests() if "/blobs/" in each]
        finally:
            await trio.to_thread.run_sync(running.__exit__, None, None, None)
    assert sorted(status for *_, status in asked) == ["307"] * 4
    assert [each.status for each in storage.requests].count(200) == 3
    [resumed] = [each for each in storage.requests if each.status == 206]
    assert resumed.path.endswith(file)
    size = built.layers[0].descriptor.size
    assert resumed.headers["range"] == f"bytes=100000-{size - 1}"
    assert not any("authorization" in each.headers for each in storage.requests)
    canaries.check(*(dict(each.headers) for each in storage.requests))


def made_foreign(built: BuiltImage, urls: Sequence[str]) -> BuiltImage:
    """Return the same image with a first layer that has a URL elsewhere."""
    document = json.loads(built.manifest)
    document["layers"][0] |= {"mediaType": FOREIGN, "urls": list(urls)}
    manifest = json.dumps(document).encode()
    descriptor = attrs.evolve(built.descriptor, digest=digest_of(manifest), size=len(manifest))
    return attrs.evolve(built, manifest=manifest, descriptor=descriptor)


async def test_a_foreign_layer(
    built: BuiltImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A foreign layer comes from the second of its URLs, without credentials, in two pieces.

    The first URL is gone, and the registry lacks the layer, since skopeo did not push it. The layer
    is in the store like any other, and in an export.
    """
    canaries = Canaries(caplog, f"{USER}:{PASSWORD}")
    layer = built.layers[0]
    assert isinstance(layer.content, bytes)
    files = tmp_path / "files"
    files.mkdir()
    (files / "layer").write_bytes(layer.content)
    async with serve_directory(files) as gone:
        pass
    more = f"{htpasswd(tmp_path)}\nvalidation: {{manifests: {{urls: {{allow: ['^http://127']}}}}}}"
    async with serve_directory(files) as server:
        server.cut["/layer"] = 100_000
        foreign = made_foreign(built, [f"{gone.url}/layer", f"{server.url}/layer"])
        running = run_docker_registry(tmp_path, quiet=False, more=more)
        registry = await trio.to_thread.run_sync(running.__enter__)
        try:
            await trio.to_thread.run_sync(push, registry, foreign, tmp_path / "layout")
            pushed = len(registry.requests())
            reference = f"{registry.host}/team/app:1"
            async with open_puller(
                tmp_path / "store", credentials=CREDENTIALS, retry_tick=0.01
            ) as puller:
                async with puller.pull(reference) as image:
                    assert image.digest == foreign.digest
                    assert await image.rootfs.read_bytes("big") == BIG
                for kind in ("oci-archive", "docker-archive"):
                    target = tmp_path / f"{kind}.tar"
                    await export_images(puller.store, reference, target, format=kind)
            # The client asks the registry once, after the second URL broke off.
            asked = [
                each for each in registry.requests()[pushed:] if layer.descriptor.digest in each
            ]
            assert [each.split()[-1] for each in asked] == ["404"]
            await trio.to_thread.run_sync(
                functools.partial(
                    subprocess.run,
                    [
                        *(require("skopeo"), "copy", "--quiet", "--src-tls-verify=false"),
                        *("--src-creds", f"{USER}:{PASSWORD}"),
                        *(f"docker://{reference}", f"oci:{tmp_path}/copied:1"),
                    ],
                    check=True,
                    timeout=120,
                )
            )
        finally:
            await trio.to_thread.run_sync(running.__exit__, None, None, None)
    assert [(each.status, each.headers.get("range")) for each in server.requests] == [
        (200, None),
        (206, f"bytes=100000-{layer.descriptor.size - 1}"),
    ]
    assert not any("authorization" in each.headers for each in server.requests)
    canaries.check(*(dict(each.headers) for each in server.requests))
    for kind in ("oci-archive", "docker-archive"):
        async with open_store(tmp_path / f"of {kind}") as store:
            [imported] = await import_images(store, tmp_path / f"{kind}.tar")
            rootfs = await store.rootfs(imported.chain_id)
            assert await rootfs.read_bytes("big") == BIG
    async with open_store(tmp_path / "of a copy") as store:
        with pytest.raises(ArchiveError, match=r"lacks blobs/sha256/.* so pull the image$"):
            await import_images(store, tmp_path / "copied", reference="team/app:1")
