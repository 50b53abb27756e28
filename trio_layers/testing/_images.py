"""Builds small real images from a description, and the sample image."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import attrs

from .._digest import DiffID, Digest, digest_of
from .._manifest import Descriptor
from ._layers import (
    BuiltLayer,
    Compression,
    Directory,
    File,
    Format,
    HardLink,
    LayerEntry,
    Opaque,
    Symlink,
    Whiteout,
    build_layer,
    layer_media_type,
)

__all__ = [
    "Built",
    "BuiltArtifact",
    "BuiltImage",
    "BuiltIndex",
    "build_artifact",
    "build_image",
    "build_index",
    "sample_image",
]

_CREATED = "2020-09-13T12:26:40Z"  # layers.MTIME

_MANIFEST: dict[Format, str] = {
    "oci": "application/vnd.oci.image.manifest.v1+json",
    "docker": "application/vnd.docker.distribution.manifest.v2+json",
}
_INDEX: dict[Format, str] = {
    "oci": "application/vnd.oci.image.index.v1+json",
    "docker": "application/vnd.docker.distribution.manifest.list.v2+json",
}
_EMPTY = b"{}"
_CONFIG: dict[Format, str] = {
    "oci": "application/vnd.oci.image.config.v1+json",
    "docker": "application/vnd.docker.container.image.v1+json",
}


@attrs.frozen(kw_only=True)
class Built:
    """The base class of images, indexes and artifacts.

    Attributes:
        descriptor: The manifest's descriptor.
        manifest: The manifest's bytes.
    """

    descriptor: Descriptor
    manifest: bytes = attrs.field(repr=False)

    @property
    def digest(self) -> Digest:
        """The manifest's digest, for pulling by digest."""
        return self.descriptor.digest

    @property
    def manifests(self) -> list[tuple[Descriptor, bytes]]:
        """All manifests to upload, the outermost last."""
        return [(self.descriptor, self.manifest)]

    @property
    def blobs(self) -> dict[Digest, bytes | Path]:
        """All configs and layers to upload, by digest, as bytes or files."""
        return {}

    def write_oci_layout(self, directory: str | os.PathLike[str], *, tag: str = "latest") -> None:
        """Write an OCI image layout (OCI image specification, ``image-layout.md``).

        skopeo reads the directory as ``oci:DIRECTORY:TAG``, if the image is in the OCI format. An
        image in Docker's format is written as well, but skopeo does not read it from there.

        Layers in files become hard links of these files where possible. This function blocks, so
        use `trio.to_thread.run_sync` inside trio.

        Args:
            directory: The directory, made if it is missing.
            tag: The image's tag in the layout.

        Raises:
            OSError: if a file cannot be written.
        """
        root = Path(directory)
        blobs = root / "blobs" / "sha256"
        blobs.mkdir(parents=True, exist_ok=True)
        for digest, content in self.blobs.items():
            _write_blob(content, blobs / digest.removeprefix("sha256:"))
        for descriptor, manifest in self.manifests:
            _write_blob(manifest, blobs / descriptor.digest.removeprefix("sha256:"))
        named = attrs.evolve(
            self.descriptor, annotations={"org.opencontainers.image.ref.name": tag}
        )
        index = {"schemaVersion": 2, "manifests": [_descriptor_json(named)]}
        (root / "index.json").write_bytes(_encode(index))
        (root / "oci-layout").write_bytes(_encode({"imageLayoutVersion": "1.0.0"}))


@attrs.frozen(kw_only=True)
class BuiltImage(Built):
    """An image for one platform.

    Attributes:
        config: The config's bytes.
        config_descriptor: The config's descriptor; its digest is the image's ID.
        layers: The layers, bottom first.
        platform: The platform, as ``os/architecture`` or ``os/architecture/variant``.
    """

    config: bytes = attrs.field(repr=False)
    config_descriptor: Descriptor
    layers: tuple[BuiltLayer, ...]
    platform: str

    @property
    def diff_ids(self) -> tuple[DiffID, ...]:
        """The layers' diff IDs, bottom first."""
        return tuple(layer.diff_id for layer in self.layers)

    @property
    def blobs(self) -> dict[Digest, bytes | Path]:
        """The config and the layers by digest, as bytes or files."""
        blobs: dict[Digest, bytes | Path] = {self.config_descriptor.digest: self.config}
        for layer in self.layers:
            blobs[layer.descriptor.digest] = layer.content
        return blobs


@attrs.frozen(kw_only=True)
class BuiltIndex(Built):
    """An image for several platforms (OCI ``image-index.md``; docker's manifest list).

    Attributes:
        images: The images, one for each platform.
    """

    images: tuple[BuiltImage, ...]

    @property
    def manifests(self) -> list[tuple[Descriptor, bytes]]:
        """The images' manifests, and the index."""
        inner = [(image.descriptor, image.manifest) for image in self.images]
        return [*inner, (self.descriptor, self.manifest)]

    @property
    def blobs(self) -> dict[Digest, bytes | Path]:
        """The configs and layers of all images by digest, as bytes or files."""
        return {key: value for image in self.images for key, value in image.blobs.items()}


@attrs.frozen(kw_only=True)
class BuiltArtifact(Built):
    """An artifact that is not an image, such as an SBOM; see `build_artifact`.

    Attributes:
        content: The artifact's only blob.
        content_descriptor: The blob's descriptor.
    """

    content: bytes = attrs.field(repr=False)
    content_descriptor: Descriptor

    @property
    def blobs(self) -> dict[Digest, bytes | Path]:
        return {self.content_descriptor.digest: self.content, digest_of(_EMPTY): _EMPTY}


def build_artifact(
    content: bytes,
    artifact_type: str,
    *,
    subject: Descriptor | None = None,
    annotations: Mapping[str, str] | None = None,
) -> BuiltArtifact:
    """Make an artifact with one blob, such as an SBOM or a signature.

    It follows "Guidelines for Artifact Usage" of the OCI image specification (``manifest.md``).

    Args:
        content: The blob. Its media type is the artifact's type, too.
        artifact_type: The artifact's type.
        subject: The image that the artifact refers to. It becomes a referrer of this image.
        annotations: The manifest's annotations, which the list of referrers contains, too.
    """
    about = _descriptor_of(content, artifact_type)
    empty = _descriptor_of(_EMPTY, "application/vnd.oci.empty.v1+json")
    manifest = _encode(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST["oci"],
            "artifactType": artifact_type,
            "config": _descriptor_json(empty),
            "layers": [_descriptor_json(about)],
            **({} if subject is None else {"subject": _descriptor_json(subject)}),
            **({"annotations": dict(annotations)} if annotations else {}),
        }
    )
    return BuiltArtifact(
        descriptor=attrs.evolve(
            _descriptor_of(manifest, _MANIFEST["oci"]),
            artifact_type=artifact_type,
            annotations=dict(annotations or {}),
        ),
        manifest=manifest,
        content=content,
        content_descriptor=about,
    )


def build_image(
    layers: Iterable[Iterable[LayerEntry] | bytes | BuiltLayer],
    *,
    compression: Compression = "gzip",
    format: Format = "oci",
    platform: str = "linux/amd64",
    env: Mapping[str, str] | None = None,
    entrypoint: Sequence[str] = (),
    cmd: Sequence[str] = (),
    user: str = "",
    working_dir: str = "",
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> BuiltImage:
    """Make an image for one platform.

    Equal arguments give equal bytes, so tests can contain digests: diff IDs always, and digests of
    blobs that are not compressed.

    Args:
        layers: The layers, bottom first. Entries or a finished tar become a layer here. Use
            `build_layer` or `layers_from_directory` for layers with another compression, and for
            large layers.
        compression: The compression of the layers that are made here.
        format: The media types of the image and all layers: OCI's, or Docker's schema 2.
        platform: The platform, as ``os/architecture`` or ``os/architecture/variant``.
        env: The environment of the image's containers.
        entrypoint: The entrypoint of containers.
        cmd: The arguments after the entrypoint.
        user: The user of containers.
        working_dir: The working directory of containers.
        labels: The config's labels.
        annotations: The manifest's annotations (OCI only).
    """
    built = tuple(_in_format(layer, compression, format) for layer in layers)
    os_name, architecture, *variant = platform.split("/")
    container = {
        "User": user,
        "Env": [f"{name}={value}" for name, value in (env or {}).items()],
        "Entrypoint": list(entrypoint),
        "Cmd": list(cmd),
        "WorkingDir": working_dir,
        "Labels": dict(labels or {}),
    }
    config = _encode(
        {
            "created": _CREATED,
            "architecture": architecture,
            **({"variant": variant[0]} if variant else {}),
            "os": os_name,
            "config": {key: value for key, value in container.items() if value},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in built]},
            "history": [
                {"created": _CREATED, "created_by": f"layer {index}"} for index in range(len(built))
            ],
        }
    )
    config_descriptor = _descriptor_of(config, _CONFIG[format])
    manifest = _encode(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST[format],
            "config": _descriptor_json(config_descriptor),
            "layers": [_descriptor_json(layer.descriptor) for layer in built],
            **({"annotations": dict(annotations)} if annotations else {}),
        }
    )
    return BuiltImage(
        descriptor=_descriptor_of(manifest, _MANIFEST[format]),
        manifest=manifest,
        config=config,
        config_descriptor=config_descriptor,
        layers=built,
        platform=platform,
    )


def build_index(images: Iterable[BuiltImage], *, format: Format = "oci") -> BuiltIndex:
    """Make an index of images for different platforms."""
    images = tuple(images)
    manifest = _encode(
        {
            "schemaVersion": 2,
            "mediaType": _INDEX[format],
            "manifests": [
                {
                    **_descriptor_json(image.descriptor),
                    "platform": _platform_json(image.platform),
                }
                for image in images
            ],
        }
    )
    return BuiltIndex(
        descriptor=_descriptor_of(manifest, _INDEX[format]), manifest=manifest, images=images
    )


def sample_image(
    *,
    compression: Compression = "gzip",
    format: Format = "oci",
    platform: str = "linux/amd64",
) -> BuiltImage:
    """Make the image of the examples: four layers with all types of entries, 800 kB.

    Unpacked, it has ``/etc/os-release`` (a symlink to ``/usr/lib/os-release``), ``/bin`` (a
    symlink), ``/srv/app/main`` and its hard link ``/srv/app/run``. A whiteout removes
    ``/etc/motd``. ``/var/cache/app`` is opaque, so it contains only ``new``.
    """
    base = [
        Directory(""),
        Directory("etc"),
        File("etc/hostname", data=b"sample\n"),
        File("etc/motd", data=b"Removed by a later layer.\n"),
        Symlink("etc/os-release", "../usr/lib/os-release"),
        Directory("usr"),
        Directory("usr/bin"),
        File("usr/bin/hello", data=b"#!/bin/sh\necho hello\n", mode=0o755),
        Directory("usr/lib"),
        File("usr/lib/os-release", data=b'NAME="Sample"\nID=sample\nVERSION_ID="1"\n'),
        Symlink("bin", "usr/bin"),
        Directory("tmp", mode=0o1777),
        Directory("var"),
        Directory("var/cache"),
    ]
    # Each layer lists the parent directories of its entries, as Docker's layers do.
    application = [
        Directory(""),
        Directory("srv"),
        Directory("srv/app", uid=1000, gid=1000),
        File(
            "srv/app/main",
            data=_incompressible_bytes("main", 512 * 1024),
            mode=0o755,
            uid=1000,
            gid=1000,
        ),
        HardLink("srv/app/run", "srv/app/main", mode=0o755, uid=1000, gid=1000),
        Directory("var"),
        Directory("var/cache"),
        Directory("var/cache/app", mode=0o700, uid=1000, gid=1000),
        File(
            "var/cache/app/old", data=_incompressible_bytes("old", 256 * 1024), uid=1000, gid=1000
        ),
    ]
    cleaned = [
        Directory(""),
        Directory("etc"),
        Whiteout("etc/motd"),
        File("etc/hostname", data=b"sample-2\n"),
    ]
    fresh = [
        Directory(""),
        Directory("var"),
        Directory("var/cache"),
        Directory("var/cache/app", mode=0o700, uid=1000, gid=1000),
        Opaque("var/cache/app"),
        File("var/cache/app/new", data=b"fresh\n", uid=1000, gid=1000),
    ]
    return build_image(
        [base, application, cleaned, fresh],
        compression=compression,
        format=format,
        platform=platform,
        env={"PATH": "/usr/bin"},
        cmd=["/srv/app/run"],
        user="1000:1000",
        working_dir="/srv/app",
        labels={"org.example.sample": "yes"},
    )


def _incompressible_bytes(seed: str, size: int) -> bytes:
    """Return bytes that do not compress, the same in every run."""
    return hashlib.shake_128(seed.encode()).digest(size)


def _in_format(
    layer: Iterable[LayerEntry] | bytes | BuiltLayer, compression: Compression, format: Format
) -> BuiltLayer:
    if not isinstance(layer, BuiltLayer):
        return build_layer(layer, compression=compression, format=format)
    media_type = layer_media_type(format, layer.compression)
    return attrs.evolve(layer, descriptor=attrs.evolve(layer.descriptor, media_type=media_type))


def _descriptor_of(document: bytes, media_type: str) -> Descriptor:
    return Descriptor(media_type, digest_of(document), len(document))


def _descriptor_json(descriptor: Descriptor) -> dict[str, object]:
    document: dict[str, object] = {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
    }
    if descriptor.urls:
        document["urls"] = list(descriptor.urls)
    if descriptor.annotations:
        document["annotations"] = dict(descriptor.annotations)
    return document


def _platform_json(platform: str) -> dict[str, str]:
    return dict(zip(("os", "architecture", "variant"), platform.split("/"), strict=False))


def _encode(document: Mapping[str, object]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _write_blob(content: bytes | Path, path: Path) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    path.unlink(missing_ok=True)
    try:
        os.link(content, path)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(content, path)
