"""Descriptors, manifests, indexes and image configs: plain values and their decoders.

Documents are checked against the OCI image specification (``manifest.md``, ``image-index.md``,
``config.md``) and Docker's schema 2, whose documents have the same shape. A document that two
readers could understand differently is refused (CVE-2021-41190).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import attrs

from ._digest import DiffID, Digest, digest_of, parse_verifiable
from ._errors import InvalidDigest, ManifestError
from ._gocompat import decode_base64
from ._json import AmbiguousJSON, check_names, dismantle, fold_names, parse_json
from ._json_members import (
    as_keys,
    as_list,
    as_object,
    as_optional_object,
    as_text,
    as_text_map,
    as_texts,
    as_time,
    check_flag,
    refuse,
)
from ._platform import DEFAULT_OS, Platform, host_platform
from ._printable import printable_value

__all__ = [
    "INDEX_TYPES",
    "MANIFEST_TYPES",
    "MAX_DOCUMENT_SIZE",
    "Descriptor",
    "ImageConfig",
    "Index",
    "Manifest",
    "check_image",
    "check_layer_count",
    "decode_config",
    "decode_manifest",
    "is_artifact",
]

MAX_DOCUMENT_SIZE: Final = 4 * 1024 * 1024
"""The largest manifest, index or config that is read, in bytes. The distribution specification
asks registries to take manifests of at least this size, and some take no larger ones."""

MANIFEST_TYPES: Final = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
INDEX_TYPES: Final = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_SCHEMA_1: Final = "application/vnd.docker.distribution.manifest.v1+"

_CONFIG_TYPES: Final = frozenset(
    {
        "application/vnd.oci.image.config.v1+json",
        "application/vnd.docker.container.image.v1+json",
        # Early pushes through distribution, its issue 1621.
        "application/octet-stream",
        "application/json",
        "text/html",
    }
)


def _layer_types(oci: str, docker: str) -> frozenset[str]:
    return frozenset(
        f"application/vnd.oci.image.layer.{oci}v1.tar{compression}"
        for compression in ("", "+gzip", "+zstd")
    ) | frozenset(
        f"application/vnd.docker.image.rootfs.{docker}diff.tar{compression}"
        for compression in ("", ".gzip", ".zstd")
    )


_FOREIGN_TYPES: Final = _layer_types("nondistributable.", "foreign.")
_LAYER_TYPES: Final = _layer_types("", "") | _FOREIGN_TYPES
_LAYER_PREFIXES: Final = (
    "application/vnd.oci.image.layer.",
    "application/vnd.docker.image.rootfs.",
)
_KNOWN_TYPES: Final = _LAYER_TYPES | _CONFIG_TYPES | {*MANIFEST_TYPES, *INDEX_TYPES}
_IN_TOTO: Final = "application/vnd.in-toto"

# The members that give the type of a document and the places of its parts.
_DECISIVE: Final = fold_names(
    "schemaVersion", "mediaType", "config", "layers", "manifests", "fsLayers"
)
_POINTER: Final = fold_names("mediaType", "digest", "size")
_ROOTFS: Final = fold_names("rootfs")
_DIFF_IDS: Final = fold_names("type", "diff_ids")

# The other members that are read from each object. Another spelling of one of these is common, and
# harmless unless the object has two spellings.
_MORE_OF_DOCUMENT: Final = fold_names("annotations", "artifactType", "subject")
_MORE_OF_POINTER: Final = fold_names("urls", "annotations", "platform", "artifactType", "data")
_PLATFORM: Final = ("os", "architecture", "variant", "os.version", "os.features")
_MORE_OF_PLATFORM: Final = fold_names(*_PLATFORM)
_MORE_OF_CONFIG: Final = fold_names(*_PLATFORM, "created", "author", "history", "config")
_MORE_OF_RUN: Final = fold_names(
    "Env",
    "Entrypoint",
    "Cmd",
    "WorkingDir",
    "User",
    "Labels",
    "ExposedPorts",
    "Volumes",
    "StopSignal",
    "ArgsEscaped",
)
_NONE: Final[Mapping[str, str]] = {}


@attrs.frozen
class Descriptor:
    """A pointer to content (OCI image specification, ``descriptor.md``).

    Attributes:
        media_type: The type of the content.
        digest: The digest of the content.
        size: The length of the content in bytes.
        urls: Other places of the content, which count for foreign layers only.
        annotations: Notes of the publisher.
        platform: In an index, the platform of the manifest; ``None`` if it is not given.
        artifact_type: In a list of referrers, their type; ``None`` if it is not given.
        data: The blob's bytes, if the descriptor embeds them (OCI ``descriptor.md``, "data") and
            they match its digest and size; ``None`` otherwise.
    """

    media_type: str
    digest: Digest
    size: int
    urls: tuple[str, ...] = ()
    annotations: Mapping[str, str] = attrs.field(factory=dict, hash=False)
    platform: Platform | None = None
    artifact_type: str | None = None
    data: bytes | None = attrs.field(default=None, repr=False, eq=False)

    @property
    def is_foreign(self) -> bool:
        """Whether it is a layer that registries need not have, for reasons of its licence.

        See OCI ``layer.md``, "Non-Distributable Layers".
        """
        return self.media_type in _FOREIGN_TYPES

    @property
    def is_attestation(self) -> bool:
        """Whether it is an attestation beside an image in an index, such as BuildKit's provenance.

        See BuildKit, ``attestation-storage.md``.
        """
        return self.annotations.get("vnd.docker.reference.type") == "attestation-manifest"


@attrs.frozen
class Manifest:
    """One image, or an artifact of the same shape (OCI ``manifest.md``).

    Attributes:
        media_type: One of `MANIFEST_TYPES`.
        config: The descriptor of its config.
        layers: The descriptors of its layers, bottom first.
        artifact_type: The type of an artifact; ``None`` for an image.
        annotations: Notes of the publisher.
    """

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    artifact_type: str | None = None
    annotations: Mapping[str, str] = attrs.field(factory=dict, hash=False)


@attrs.frozen
class Index:
    """Images for several platforms under one name (OCI ``image-index.md``).

    Attributes:
        media_type: One of `INDEX_TYPES`.
        manifests: The descriptors of the manifests, with their platforms.
        annotations: Notes of the publisher.
    """

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = attrs.field(factory=dict, hash=False)

    @property
    def images(self) -> tuple[Descriptor, ...]:
        """The entries that may lead to an image: no attestations, and no unknown types."""
        known = MANIFEST_TYPES + INDEX_TYPES
        return tuple(
            entry
            for entry in self.manifests
            if entry.media_type in known and not entry.is_attestation
        )


@attrs.frozen
class ImageConfig:
    """The platform of an image and the settings for running it (OCI ``config.md``).

    Attributes:
        platform: The platform of the image.
        diff_ids: The digests of its uncompressed layers, bottom first.
        created: The time of its build, as it was written (RFC 3339).
        env: The environment, as ``NAME=value``.
        entrypoint: The command, to which ``cmd`` is appended.
        cmd: The command's default arguments, or the command itself.
        working_dir: The directory in which the command starts.
        user: The user of the command, as ``user[:group]``, names or numbers.
        labels: Notes of the publisher.
        exposed_ports: The ports of its services, as ``port/protocol``.
        volumes: Directories with data of each container's own.
        stop_signal: The signal that asks it to end, as ``SIGTERM`` or a number.
        raw: The document itself, with all other members.
    """

    platform: Platform
    diff_ids: tuple[DiffID, ...]
    created: str = ""
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    labels: Mapping[str, str] = attrs.field(factory=dict, hash=False)
    exposed_ports: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    stop_signal: str = ""
    raw: bytes = attrs.field(default=b"", repr=False)


def decode_manifest(
    data: bytes, media_type: str, *, null_is_empty: bool = False
) -> Manifest | Index:
    """Decode a manifest or an index.

    Args:
        data: The document as it was served.
        media_type: The media type that the server sent. It decides between manifest and index.
        null_is_empty: Whether a missing or null ``layers`` or ``manifests`` counts as empty, as
            in Go's decoders. The specification requires arrays.

    Raises:
        ManifestError: if it is of another type, larger than `MAX_DOCUMENT_SIZE`, not valid, or
            claims to be something else.
    """
    media_type = _plain_type(media_type)
    if media_type.startswith(_SCHEMA_1):
        raise ManifestError(
            "the image is in Docker's schema 1 format, which is no longer supported: "
            "pull it with an old Docker and push it again, or ask for a newer tag"
        )
    if media_type not in MANIFEST_TYPES + INDEX_TYPES:
        raise ManifestError(
            f"media type {printable_value(media_type)} is neither that of an image manifest nor of "
            "an index"
        )
    kind = "manifest" if media_type in MANIFEST_TYPES else "index"
    with _decoded(data, kind) as document:
        return _manifest_of(document, media_type, kind, null_is_empty)


def _manifest_of(
    document: Mapping[str, object], media_type: str, kind: str, null_is_empty: bool
) -> Manifest | Index:
    _check_names(document, kind, _DECISIVE, _MORE_OF_DOCUMENT)
    version = document.get("schemaVersion")
    if type(version) is not int or version != 2:
        refuse(f"{kind}: schemaVersion is {printable_value(version)}, not 2")
    claimed = document.get("mediaType")
    same = isinstance(claimed, str) and _plain_type(claimed) == media_type
    # Go's readers treat an empty media type as a missing one.
    if claimed not in (None, "") and not same:
        refuse(f"{kind}: served as {media_type}, but its mediaType is {printable_value(claimed)}")
    foreign = ("manifests", "fsLayers") if kind == "manifest" else ("layers", "config", "fsLayers")
    for member in foreign:
        if member in document:
            refuse(f"{kind}: ambiguous, since it has {member!r} as well")
    annotations = as_text_map(document.get("annotations"), f"{kind}: annotations")
    artifact_type = as_text(document.get("artifactType"), f"{kind}: artifactType") or None
    as_optional_object(document.get("subject"), f"{kind}: subject")
    if kind == "index":
        return Index(media_type, _descriptors(document, "manifests", null_is_empty), annotations)
    return Manifest(
        media_type,
        _descriptor(document.get("config"), "config"),
        _descriptors(document, "layers", null_is_empty),
        artifact_type,
        annotations,
    )


def check_image(manifest: Manifest) -> None:
    """Check that a manifest describes an image whose layers we can unpack.

    Raises:
        ManifestError: if it is an artifact, an attestation, or has a layer of unknown type.
    """
    config_type = manifest.config.media_type
    if config_type not in _CONFIG_TYPES:
        refuse(
            "not an image but an artifact of type "
            f"{printable_value(manifest.artifact_type or config_type)}: "
            "use the tool it was made for"
        )
    for layer in manifest.layers:
        if layer.media_type.startswith(_IN_TOTO):
            refuse("not an image but an attestation, which says how an image was built")
        if layer.media_type.endswith("+encrypted"):
            refuse(f"layer {layer.digest} is encrypted: decrypt the image first")
        if layer.media_type not in _LAYER_TYPES:
            refuse(
                f"layer {layer.digest} has an unsupported type, {printable_value(layer.media_type)}"
            )


def is_artifact(manifest: Manifest) -> bool:
    """Return whether a manifest is an artifact's, a signature's or an attestation's.

    An image with layers of an unsupported type still counts as an image; `check_image` refuses it.
    """
    if manifest.config.media_type not in _CONFIG_TYPES:
        return True
    if manifest.artifact_type is not None and manifest.artifact_type not in _CONFIG_TYPES:
        return True
    # The config's type alone does not tell: cosign's signatures have an image config.
    types = [layer.media_type for layer in manifest.layers]
    return bool(types) and not any(each.startswith(_LAYER_PREFIXES) for each in types)


def check_layer_count(manifest: Manifest, config: ImageConfig) -> None:
    """Check that manifest and config have the same number of layers.

    Raises:
        ManifestError: if not. The error has both numbers.
    """
    layers, diff_ids = len(manifest.layers), len(config.diff_ids)
    if layers != diff_ids:
        refuse(f"the manifest has {layers} layers, but the image config has {diff_ids} diff IDs")


def decode_config(data: bytes, platform: Platform | None = None) -> ImageConfig:
    """Decode an image config.

    Args:
        data: The document as it was served.
        platform: The platform that the index entry names. It completes a config without operating
            system or architecture, as pack and ko write them. ``None``: the host's platform.

    Raises:
        ManifestError: if it is larger than `MAX_DOCUMENT_SIZE` or not valid.
    """
    with _decoded(data, "image config") as document:
        return _config_of(document, data, platform)


def _config_of(
    document: Mapping[str, object], data: bytes, platform: Platform | None
) -> ImageConfig:
    _check_names(document, "image config", _ROOTFS, _MORE_OF_CONFIG)
    rootfs = as_object(document.get("rootfs"), "image config: rootfs")
    _check_names(rootfs, "image config: rootfs", _DIFF_IDS)
    if rootfs.get("type") != "layers":
        refuse(f"image config: rootfs.type is {printable_value(rootfs.get('type'))}, not 'layers'")
    # Docker omits an empty list (moby image/rootfs.go), and Go writes a nil list as null.
    value = rootfs.get("diff_ids")
    diff_ids = [] if value is None else as_list(value, "image config: rootfs.diff_ids")
    _check_history(document)
    run = as_optional_object(document.get("config"), "image config: config")
    _check_names(run, "image config: config", _NONE, _MORE_OF_RUN)
    check_flag(run.get("ArgsEscaped"), "image config: ArgsEscaped")
    return ImageConfig(
        _complete(_platform(document, "image config"), platform),
        tuple(DiffID(_digest(each, "image config: rootfs.diff_ids")) for each in diff_ids),
        as_time(document.get("created"), "image config: created"),
        env=as_texts(run.get("Env"), "image config: Env"),
        entrypoint=as_texts(run.get("Entrypoint"), "image config: Entrypoint"),
        cmd=as_texts(run.get("Cmd"), "image config: Cmd"),
        working_dir=as_text(run.get("WorkingDir"), "image config: WorkingDir"),
        user=as_text(run.get("User"), "image config: User"),
        labels=as_text_map(run.get("Labels"), "image config: Labels"),
        exposed_ports=as_keys(run.get("ExposedPorts"), "image config: ExposedPorts"),
        volumes=as_keys(run.get("Volumes"), "image config: Volumes"),
        stop_signal=as_text(run.get("StopSignal"), "image config: StopSignal"),
        raw=data,
    )


def _descriptors(
    document: Mapping[str, object], member: str, null_is_empty: bool
) -> tuple[Descriptor, ...]:
    values = document.get(member)
    if values is None and null_is_empty:
        return ()
    return tuple(
        _descriptor(value, f"{member}[{index}]")
        for index, value in enumerate(as_list(values, member))
    )


def _descriptor(value: object, where: str) -> Descriptor:
    members = as_object(value, where)
    _check_names(members, where, _POINTER, _MORE_OF_POINTER)
    media_type = as_text(members.get("mediaType"), f"{where}.mediaType")
    if not media_type:
        refuse(f"{where}.mediaType is missing")
    size = members.get("size")
    # Go's readers keep it in an int64. A bool is an int to Python, but not to JSON.
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**63:
        refuse(f"{where}.size is {printable_value(size)}, not a number of bytes")
    digest = _digest(members.get("digest"), f"{where}.digest")
    data = _data(members.get("data"), f"{where}.data", digest, size)
    platform = members.get("platform")
    plain_type = _plain_type(media_type)
    return Descriptor(
        plain_type if plain_type in _KNOWN_TYPES else media_type,
        digest,
        size,
        as_texts(members.get("urls"), f"{where}.urls"),
        as_text_map(members.get("annotations"), f"{where}.annotations"),
        None if platform is None else _platform(platform, f"{where}.platform"),
        as_text(members.get("artifactType"), f"{where}.artifactType") or None,
        data,
    )


def _platform(value: object, where: str) -> Platform:
    members = as_object(value, where)
    _check_names(members, where, _NONE, _MORE_OF_PLATFORM)
    platform = _shared_platform(
        as_text(members.get("os"), f"{where}.os"),
        as_text(members.get("architecture"), f"{where}.architecture"),
        as_text(members.get("variant"), f"{where}.variant"),
        as_text(members.get("os.version"), f"{where}.os.version"),
        as_texts(members.get("os.features"), f"{where}.os.features"),
    )
    # The platform is printed.
    if not str(platform).isprintable():
        refuse(
            f"{where}: the platform {printable_value(str(platform))} has characters that cannot be "
            "shown"
        )
    return platform


def _complete(platform: Platform, default: Platform | None) -> Platform:
    """Fill in the operating system or architecture that a config lacks."""
    if platform.os and platform.architecture:
        return platform
    if default is None or not default.architecture:
        default = host_platform()
    if platform.architecture:
        return attrs.evolve(platform, os=default.os or DEFAULT_OS)
    return attrs.evolve(
        platform,
        os=platform.os or default.os or DEFAULT_OS,
        architecture=default.architecture,
        variant=platform.variant or default.variant,
    )


# An index may have thousands of entries, but they name few platforms: equal platforms are shared.
_shared_platform = functools.lru_cache(maxsize=256)(Platform)


@contextmanager
def _decoded(data: bytes, kind: str) -> Iterator[Mapping[str, object]]:
    """Decode a JSON object for the block, and free it afterwards."""
    if len(data) > MAX_DOCUMENT_SIZE:
        refuse(f"{kind}: larger than {MAX_DOCUMENT_SIZE} bytes")
    try:
        value = parse_json(data)
    except AmbiguousJSON as error:
        raise ManifestError(f"{kind}: ambiguous, since {error}") from error
    except ValueError as error:
        raise ManifestError(f"{kind}: not JSON ({error})") from error
    try:
        yield as_object(value, kind)
    finally:
        dismantle(value)


def _check_history(document: Mapping[str, object]) -> None:
    """Check the unused history, since other readers refuse an image with an invalid one."""
    as_text(document.get("author"), "image config: author")
    history = document.get("history")
    for index, value in enumerate([] if history is None else as_list(history, "history")):
        if value == {}:
            continue  # save time: a million empty entries fit into a document
        where = f"image config: history[{index}]"
        entry = as_optional_object(value, where)
        as_time(entry.get("created"), f"{where}.created")
        for member in ("created_by", "author", "comment"):
            as_text(entry.get(member), f"{where}.{member}")
        check_flag(entry.get("empty_layer"), f"{where}.empty_layer")


def _data(value: object, where: str, digest: Digest, size: int) -> bytes | None:
    """Decode a descriptor's embedded content.

    ``None`` stands for content with another digest or size, or for none at all. Other readers
    ignore embedded content, so wrong content does not make the document invalid.
    """
    try:
        data = decode_base64(as_text(value, where))
    except ValueError:
        refuse(f"{where} is not base64")
    return data if data and len(data) == size and digest_of(data, digest) == digest else None


def _check_names(
    members: Mapping[str, object],
    where: str,
    exact: Mapping[str, str],
    others: Mapping[str, str] | None = None,
) -> None:
    """Call `check_names`, and raise `ManifestError` for an ambiguous object."""
    try:
        check_names(members, exact, others)
    except AmbiguousJSON as error:
        raise ManifestError(f"{where}: ambiguous, since {error}") from error


def _digest(value: object, where: str) -> Digest:
    try:
        return parse_verifiable(as_text(value, where))
    except InvalidDigest as error:
        raise ManifestError(f"{where}: {error}") from error


def _plain_type(media_type: str) -> str:
    """Return a media type without parameters, in lower case (RFC 9110, 8.3.1)."""
    return media_type.partition(";")[0].strip().lower()
