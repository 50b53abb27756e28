"""Requests of the registry client to docker-registry, other than for pulls."""

from __future__ import annotations

import random
from pathlib import Path

import httpx
import pytest
import trio
from _tools.docker_registry import DockerRegistry
from registry.fakes import OCI_INDEX, MemorySink, as_json

from trio_layers import NotFound, open_registry_client
from trio_layers.testing import File, build_image

pytestmark = pytest.mark.integration

SBOM = "application/spdx+json"


async def test_docker_registry(docker_registry: DockerRegistry, tmp_path: Path) -> None:
    """Version 2.8 has no API for referrers, so the client uses the tag."""
    image = build_image([[]])
    image.write_oci_layout(tmp_path / "layout")
    references = [docker_registry.push(tmp_path / "layout", f"beyond/app:{n}") for n in "123"]
    listed = as_json(image.descriptor, artifactType=SBOM)  # listed manifests must exist
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [listed]}
    async with open_registry_client() as client:
        assert await client.resolve(references[0]) == image.descriptor
        assert sorted(await client.tags(references[0])) == ["1", "2", "3"]
        assert await client.referrers(references[0]) == ()
        async with httpx.AsyncClient() as http:
            tag = image.digest.replace(":", "-")
            url = f"http://{docker_registry.host}/v2/beyond/app/manifests/{tag}"
            headers = {"Content-Type": OCI_INDEX}
            (await http.put(url, json=index, headers=headers)).raise_for_status()
        [found] = await client.referrers(references[1], artifact_type=SBOM)
        assert (found.digest, found.artifact_type) == (image.digest, SBOM)
        assert await client.get_manifest(references[2]) == (image.descriptor, image.manifest)
        config = image.config_descriptor
        assert await client.get_blob(references[0], config) == image.config
        async with client.open_blob(references[0], image.layers[0].descriptor) as stream:
            assert sum([len(chunk) async for chunk in stream]) == image.layers[0].descriptor.size
        with pytest.raises(NotFound):
            await client.tags(f"{docker_registry.host}/beyond/none")


async def test_docker_registry_goes_on_where_a_blob_was_cut(
    docker_registry: DockerRegistry, tmp_path: Path
) -> None:
    """The client resumes with the blob's entity tag, and also with a sink of another client,
    without the tag.
    """
    content = random.Random(0).randbytes(5_000_000)
    image = build_image([[File("noise", data=content)]], compression="none")
    image.write_oci_layout(tmp_path / "layout")
    reference = docker_registry.push(tmp_path / "layout", "beyond/large:1")
    asked: list[httpx.Response] = []

    async def record(response: httpx.Response) -> None:
        asked.append(response)

    layer = image.layers[0]
    sink = MemorySink()
    scope = trio.CancelScope()

    def cut(action: str, current: int = 0, total: int = 0) -> None:
        if current:
            scope.cancel()

    async with httpx.AsyncClient(event_hooks={"response": [record]}) as http:
        async with open_registry_client(client=http) as client:
            with scope:
                await client.fetch_blob(reference, layer.descriptor, sink, progress=cut)
            assert 0 < sink.offset < layer.descriptor.size
            half = sink.data
            await client.fetch_blob(reference, layer.descriptor, sink)
        async with open_registry_client(client=http) as client:
            other = MemorySink(half)
            await client.fetch_blob(reference, layer.descriptor, other)
    assert sink.data == other.data == layer.content
    first, second, third = (each for each in asked if "/blobs/" in each.url.path)
    assert (first.status_code, second.status_code, third.status_code) == (200, 206, 206)
    rest = f"bytes={len(half)}-{layer.descriptor.size - 1}"
    assert second.request.headers["Range"] == third.request.headers["Range"] == rest
    assert second.request.headers["If-Range"] == first.headers["ETag"]
    assert "If-Range" not in third.request.headers
