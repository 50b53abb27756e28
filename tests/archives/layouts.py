"""Helpers for tests of archives: hand-made archives, streams, and the contents of stores."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from trio_layers import Descriptor, DirectoryStore, Entry, StoredImage, open_store
from trio_layers._digest import digest_of
from trio_layers.testing import Built, BuiltImage, File, build_image

NAME = "docker.io/library/demo:1"
OCI_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"

Members = dict[str, bytes]


def small_image(text: str = "hello", **options: object) -> BuiltImage:
    """Build an image with two layers of a few bytes."""
    layers = [[File("etc/motd", data=text.encode())], [File("srv/more", data=b"more")]]
    return build_image(layers, **{"compression": "none", **options})


def with_config(image: BuiltImage, **changes: object) -> BuiltImage:
    """Change members of an image's config, and the digests that depend on it."""
    config = as_json({**json.loads(image.config), **changes})
    described = Descriptor(image.config_descriptor.media_type, digest_of(config), len(config))
    document = json.loads(image.manifest)
    document["config"] = {**document["config"], "digest": described.digest, "size": len(config)}
    manifest = as_json(document)
    return attrs.evolve(
        image,
        config=config,
        config_descriptor=described,
        manifest=manifest,
        descriptor=Descriptor(image.descriptor.media_type, digest_of(manifest), len(manifest)),
    )


def tar_of(members: Mapping[str, bytes | tarfile.TarInfo] | Sequence[tuple[str, bytes]]) -> bytes:
    """Make a tar of files, and of members with given headers."""
    out = io.BytesIO()
    items = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in items:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


def hexdigits(digest: str) -> str:
    return digest.removeprefix("sha256:")


def blob(digest: str) -> str:
    return f"blobs/sha256/{hexdigits(digest)}"


def docker_members(image: BuiltImage, *tags: str) -> Members:
    """Return the members of an archive of docker before version 25, the manifest last."""
    config = f"{hexdigits(image.config_descriptor.digest)}.json"
    members: Members = {}
    layers = []
    for number, layer in enumerate(image.layers):
        assert isinstance(layer.content, bytes)
        members[f"{number}/VERSION"] = b"1.0"
        members[f"{number}/layer.tar"] = layer.content
        layers.append(f"{number}/layer.tar")
    entry = {"Config": config, "RepoTags": list(tags) or None, "Layers": layers}
    return {**members, config: image.config, "manifest.json": as_json([entry])}


def entry_of(image: Built, *, platform: str = "", **annotations: str) -> dict[str, object]:
    """Return an image's entry for ``index.json``. Underscores in annotation names become dots."""
    entry: dict[str, object] = {
        "mediaType": image.descriptor.media_type,
        "digest": image.descriptor.digest,
        "size": image.descriptor.size,
        "annotations": {name.replace("_", "."): text for name, text in annotations.items()},
    }
    if platform:
        entry["platform"] = dict(zip(("os", "architecture"), platform.split("/"), strict=True))
    return entry


def ref_name(text: str) -> dict[str, str]:
    return {"org_opencontainers_image_ref_name": text}


def oci_members(entries: Sequence[dict[str, object]], *images: Built) -> Members:
    """Return the members of an OCI layout, the index last."""
    members: Members = {"oci-layout": OCI_LAYOUT}
    for image in images:
        for digest, content in image.blobs.items():
            assert isinstance(content, bytes)
            members[blob(digest)] = content
        for descriptor, manifest in image.manifests:
            members[blob(descriptor.digest)] = manifest
    index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": list(entries)}
    return {**members, "index.json": as_json(index)}


def oci_image(image: Built, name: str = NAME) -> Members:
    return oci_members([entry_of(image, **ref_name(name))], image)


def write_layout(path: Path, members: Members) -> Path:
    for name, data in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


async def files(store: DirectoryStore, image: StoredImage) -> list[Entry]:
    return await (await store.rootfs(image.chain_id)).walk()


def leftovers(path: Path) -> list[str]:
    """Return the files in ``ingest/``, without files that are being deleted."""
    return [name for name in os.listdir(path / "ingest") if not name.endswith(".trash")]


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[DirectoryStore]:
    async with open_store(path) as store:
        yield store
    assert not leftovers(path)


class Sink(trio.abc.SendStream):
    """A stream that keeps the sent bytes. It calls ``before`` with the number of bytes so far."""

    def __init__(self, before: Callable[[int], object] = lambda size: None) -> None:
        self.data = bytearray()
        self.before = before

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.before(len(self.data))
        await trio.lowlevel.checkpoint()
        self.data += data

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
