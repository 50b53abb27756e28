"""The small documents of archives and layouts, names of images, and paths.

OCI image layouts have ``oci-layout``, ``index.json`` and blobs by their digests (OCI image
specification, ``image-layout.md``). Archives of ``docker save`` have a ``manifest.json`` (moby,
``image/spec/spec.md``, "Combined Image JSON + Filesystem Changeset Format").
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Final

import attrs

from .._digest import Digest
from .._errors import ArchiveError, InvalidReference
from .._json import AmbiguousJSON, check_names, fold_names, parse_json
from .._manifest import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_DOCUMENT_SIZE,
    Descriptor,
    Index,
    Manifest,
    decode_manifest,
)
from .._printable import printable_value
from .._reference import Reference, parse_reference

__all__ = [
    "BLOBS",
    "CONFIG_TYPE",
    "DOCKER",
    "INDEX",
    "LAYER_TYPES",
    "LAYOUT",
    "VERSION",
    "DockerImage",
    "blob_path",
    "check_layout",
    "claimed_digest",
    "decode_docker",
    "decode_document",
    "decode_index",
    "encode_docker",
    "encode_manifest",
    "is_dir_transport",
    "is_id",
    "link_target",
    "name_of",
    "normalise_path",
]

LAYOUT: Final = "oci-layout"
INDEX: Final = "index.json"
VERSION: Final = "version"
DOCKER: Final = "manifest.json"
BLOBS: Final = "blobs/sha256/"

CONFIG_TYPE: Final = "application/vnd.oci.image.config.v1+json"
LAYER_TYPES: Final = {
    None: "application/vnd.oci.image.layer.v1.tar",
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
}
"""The media types of layers, by their compression."""

_DOCKER_NAMES: Final = fold_names("Config", "RepoTags", "Layers")
_BLOB: Final = re.compile(r"blobs/sha256/([0-9a-f]{64})\Z")
_ID: Final = re.compile(r"@?sha256:[0-9a-f]{64}\Z")
_CONFIG: Final = re.compile(r"(?:.*/)?(?:sha256:)?([0-9a-f]{64})(?:\.json)?\Z")


@attrs.frozen
class DockerImage:
    """An image in a docker-archive.

    Attributes:
        config: The path of its config.
        tags: Its names, as they stand in the archive.
        layers: The paths of its layers, bottom first.
    """

    config: str
    tags: tuple[str, ...]
    layers: tuple[str, ...]


def normalise_path(path: str) -> str:
    """Remove empty parts and ``.`` from a path, for use as a key.

    A ``..`` stays, so such a path matches no member.
    """
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def link_target(key: str, target: str) -> str:
    """Resolve a symlink to the key of its target.

    The archive is the root, and ``..`` at the root stays there.
    """
    parts: list[str] = [] if target.startswith("/") else key.split("/")[:-1]
    for part in target.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def blob_path(digest: Digest) -> str:
    return BLOBS + digest.removeprefix("sha256:")


def claimed_digest(key: str, *, config: bool = False) -> Digest | None:
    """The digest in a blob's path; ``config``: in a docker-archive's config path.

    Only the blobs of a layout must match the digests in their paths. The paths in a docker-archive
    promise nothing.
    """
    match = (_CONFIG if config else _BLOB).match(key)
    return None if match is None else Digest(f"sha256:{match[1]}")


def name_of(descriptor: Descriptor) -> Reference | str:
    """The name of an entry of a layout's index.

    Returns:
        A full name, or else the text of the annotation, such as a bare tag; empty without one.
    """
    annotations = descriptor.annotations
    full = annotations.get("io.containerd.image.name", "")
    name = annotations.get("org.opencontainers.image.ref.name", "")
    for text in (full, name):
        # A text without any of these characters may be a bare tag.
        if re.search("[/:@]", text) and not is_id(text):
            try:
                return parse_reference(text)
            except InvalidReference:
                pass
    return name or full


def is_id(text: str) -> bool:
    """Whether a name is only a digest.

    The reference grammar would parse ``sha256:…`` as a tag of a repository ``sha256``.
    """
    return _ID.match(text) is not None


def check_layout(data: bytes) -> None:
    """Check ``oci-layout``.

    Raises:
        ArchiveError: if it is not valid, or of an unsupported version.
    """
    document = _decode(data, LAYOUT)
    version = document.get("imageLayoutVersion") if isinstance(document, dict) else None
    if not isinstance(version, str) or version.split(".")[0] != "1":
        raise ArchiveError(
            f"{LAYOUT}: unsupported OCI layout version: {printable_value(version)} (expected 1.0.0)"
        )


def decode_docker(data: bytes) -> tuple[DockerImage, ...]:
    """Decode ``manifest.json``.

    Raises:
        ArchiveError: if it is not valid.
    """
    return tuple(
        DockerImage(
            normalise_path(_text(image.get("Config"), "Config")),
            tuple(
                tag for tag in _texts(image.get("RepoTags"), "RepoTags") if tag != "<none>:<none>"
            ),
            tuple(normalise_path(layer) for layer in _texts(image.get("Layers"), "Layers")),
        )
        for image in _objects(_decode(data, DOCKER))
    )


def decode_index(data: bytes) -> Index:
    """Decode ``index.json``.

    Docker 25.0 writes an empty list of manifests as null (moby issue 47210).

    Raises:
        ManifestError: if it is not valid.
    """
    index = decode_document(data, INDEX_TYPES[0])
    assert isinstance(index, Index)
    return index


def decode_document(data: bytes, media_type: str) -> Manifest | Index:
    """Decode a manifest or index of a layout.

    A missing list and a null one count as empty.

    Raises:
        ManifestError: if it is not valid.
    """
    return decode_manifest(data, media_type, null_is_empty=True)


def is_dir_transport(version: bytes | None) -> bool:
    """Whether a file ``version`` marks a directory of skopeo's ``dir:`` transport.

    See containers/image, ``docs/containers-transports.5.md``.
    """
    return version is not None and version.startswith(b"Directory Transport Version")


def encode_docker(images: Iterable[DockerImage]) -> bytes:
    """Encode the ``manifest.json`` of images."""
    return _encode(
        [
            {"Config": image.config, "RepoTags": list(image.tags), "Layers": list(image.layers)}
            for image in images
        ]
    )


def encode_manifest(config: Descriptor, layers: Sequence[Descriptor]) -> bytes:
    """Encode an OCI image manifest."""
    return _encode(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPES[0],
            "config": _descriptor(config),
            "layers": [_descriptor(layer) for layer in layers],
        }
    )


def _descriptor(descriptor: Descriptor) -> dict[str, object]:
    return {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
    }


def _encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _decode(data: bytes, name: str) -> object:
    if len(data) > MAX_DOCUMENT_SIZE:
        raise ArchiveError(f"{name}: larger than {MAX_DOCUMENT_SIZE} bytes")
    try:
        return parse_json(data)
    except AmbiguousJSON as error:
        raise ArchiveError(f"{name}: ambiguous, since {error}") from error
    except ValueError as error:
        raise ArchiveError(f"{name}: not JSON ({error})") from error


def _objects(value: object) -> list[dict[str, object]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ArchiveError(f"{DOCKER}: not an array of objects")
    for members in value:
        try:
            check_names(members, _DOCKER_NAMES)
        except AmbiguousJSON as error:
            raise ArchiveError(f"{DOCKER}: ambiguous, since {error}") from error
    return value


def _texts(value: object, where: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ArchiveError(f"{DOCKER}: {where} is {printable_value(value)}, not an array")
    return [_text(each, where) for each in value]


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ArchiveError(f"{DOCKER}: {where} is {printable_value(value)}, not a string")
    return value
