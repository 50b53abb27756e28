"""Builds layers from a description, or from a directory on disk."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import attrs

from .._digest import DiffID
from .._manifest import Descriptor
from ._tar import Compression, LayerWriter

__all__ = [
    "MTIME",
    "BuiltLayer",
    "Compression",
    "Directory",
    "Fifo",
    "File",
    "Format",
    "HardLink",
    "LayerEntry",
    "Opaque",
    "Symlink",
    "Whiteout",
    "build_layer",
    "layer_media_type",
    "layers_from_directory",
]

Format: TypeAlias = Literal["oci", "docker"]

MTIME = 1_600_000_000
"""The default modification time, constant so that each run gives the same bytes."""

CHUNK = 1024 * 1024

# bzip2 and xz have no media type (OCI image specification, ``layer.md``), so such layers get the
# media type of a plain tar. Engines unpack them all the same, because they look at the magic bytes.
_MEDIA_TYPES: dict[Format, dict[Compression, str]] = {
    "oci": {
        "none": "application/vnd.oci.image.layer.v1.tar",
        "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
        "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
    },
    "docker": {
        "none": "application/vnd.docker.image.rootfs.diff.tar",
        "gzip": "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "zstd": "application/vnd.docker.image.rootfs.diff.tar.zstd",
    },
}


@attrs.frozen
class LayerEntry:
    """The base class of a layer's entries.

    Attributes:
        path: The path relative to the root, without a leading slash.
        mode: The permission bits, with set-uid, set-gid and sticky.
        uid: The owner.
        gid: The group.
        mtime: The modification time in seconds since 1970; may be fractional or negative.
        xattrs: Extended attributes by full name, such as ``user.mime_type``.
    """

    path: str
    mode: int = attrs.field(default=0o644, kw_only=True)
    uid: int = attrs.field(default=0, kw_only=True)
    gid: int = attrs.field(default=0, kw_only=True)
    mtime: float = attrs.field(default=MTIME, kw_only=True)
    xattrs: Mapping[str, bytes] = attrs.field(factory=dict, kw_only=True, hash=False)


@attrs.frozen
class File(LayerEntry):
    """A regular file with the content ``data``."""

    data: bytes = attrs.field(default=b"", repr=lambda data: f"<{len(data)} bytes>")


@attrs.frozen
class Directory(LayerEntry):
    """A directory."""

    mode: int = attrs.field(default=0o755, kw_only=True)


@attrs.frozen
class Symlink(LayerEntry):
    """A symbolic link; ``target`` is written unchanged."""

    target: str
    mode: int = attrs.field(default=0o777, kw_only=True)


@attrs.frozen
class HardLink(LayerEntry):
    """A second name for the file ``target``, a path relative to the root."""

    target: str


@attrs.frozen
class Fifo(LayerEntry):
    """A named pipe."""


@attrs.frozen
class Whiteout(LayerEntry):
    """Removes ``path`` of the layers below (OCI ``layer.md``, whiteouts)."""


@attrs.frozen
class Opaque(LayerEntry):
    """Removes the lower layers' entries in the directory ``path``.

    See "opaque whiteout" in OCI's ``layer.md``. The directory itself needs an entry of its own.
    """


@attrs.frozen
class BuiltLayer:
    """A layer, ready for upload.

    Attributes:
        descriptor: The blob's media type, digest and size.
        diff_id: The digest of the tar inside.
        compression: The compression of the tar.
        content: The blob, as bytes or a file.
    """

    descriptor: Descriptor
    diff_id: DiffID
    compression: Compression
    content: bytes | Path = attrs.field(repr=False)


def layer_media_type(format: Format, compression: Compression) -> str:
    """Return the media type of a layer in a manifest."""
    types = _MEDIA_TYPES[format]
    return types.get(compression, types["none"])


def build_layer(
    content: Iterable[LayerEntry] | bytes,
    *,
    compression: Compression = "gzip",
    format: Format = "oci",
) -> BuiltLayer:
    """Make a layer in memory.

    Equal arguments give equal bytes with the same version of the compressor. The tar inside is
    always the same.

    Args:
        content: The entries in the order of the tar; or a finished tar, which is used unchanged,
            even if it is invalid.
        compression: The compression.
        format: The format that defines the media type.
    """
    out = io.BytesIO()
    writer = LayerWriter(out, compression, level=None)
    if isinstance(content, bytes):
        writer.write(content)
    else:
        for entry in content:
            info, data = _tar_entry(entry)
            writer.add(info, entry.xattrs, (data,))
        writer.end_of_archive()
    writer.finish()
    return _built_layer(writer, compression, format, out.getvalue())


def layers_from_directory(
    source: Path,
    parts: int,
    output: Path,
    *,
    compression: Compression = "gzip",
    format: Format = "oci",
    level: int | None = None,
) -> list[BuiltLayer]:
    """Split a directory tree into layers of about the same size, each written to a file.

    The layers keep owners, modes, times (whole seconds), xattrs, links and device nodes, but no
    sockets. A layer that begins inside a directory repeats the parent directories. A hard link
    whose file is in an earlier layer becomes a file. Memory does not grow with the files' sizes.
    This function blocks, so use `trio.to_thread.run_sync` inside trio.

    Args:
        source: The directory that becomes the root.
        parts: The number of layers; some are empty if there are not enough files.
        output: An existing directory for the blobs ``layer-0.tar…``, ``layer-1.tar…``.
        compression: The compression.
        format: The format that defines the media types.
        level: The compression level; by default the compressor's own.

    Raises:
        ValueError: if ``parts`` is not positive.
        OSError: if a file cannot be read or written.
    """
    if parts < 1:
        raise ValueError(f"parts must be at least 1, not {parts}")
    entries = list(_walk(source))
    total = sum(weight for _, _, weight in entries)
    layers: list[BuiltLayer] = []
    position = done = 0
    for part in range(parts):
        path = output / f"layer-{part}.tar{_SUFFIXES[compression]}"
        with path.open("wb") as out:
            writer = LayerWriter(out, compression, level=level)
            first: dict[tuple[int, int], str] = {}
            while position < len(entries) and (
                part == parts - 1 or done * parts < total * (part + 1)
            ):
                name, status, weight = entries[position]
                if not first and name:
                    _repeat_parents(writer, source, name)
                _add_from_disk(writer, source, name, status, first)
                first.setdefault((status.st_dev, status.st_ino), name)
                done += weight
                position += 1
            writer.end_of_archive()
            writer.finish()
        layers.append(_built_layer(writer, compression, format, path))
    return layers


def _built_layer(
    writer: LayerWriter, compression: Compression, format: Format, content: bytes | Path
) -> BuiltLayer:
    descriptor = Descriptor(layer_media_type(format, compression), writer.digest, writer.size)
    return BuiltLayer(descriptor, writer.diff_id, compression, content)


_SUFFIXES: dict[Compression, str] = {
    "none": "",
    "gzip": ".gz",
    "zstd": ".zst",
    "bzip2": ".bz2",
    "xz": ".xz",
}


def _walk(source: Path) -> Iterator[tuple[str, os.stat_result, int]]:
    """Yield each path below ``source``, with its status and weight in bytes.

    ``source`` itself comes first, as ``""``.
    """
    stack = [""]
    while stack:
        name = stack.pop()
        path = source / name
        status = path.lstat()
        if stat.S_ISSOCK(status.st_mode):
            continue
        yield name, status, 512 + (status.st_size if stat.S_ISREG(status.st_mode) else 0)
        if stat.S_ISDIR(status.st_mode):
            below = sorted(os.listdir(path), reverse=True)
            stack.extend(f"{name}/{child}" if name else child for child in below)


def _repeat_parents(writer: LayerWriter, source: Path, name: str) -> None:
    for parent in reversed(Path(name).parents[:-1]):
        _add_from_disk(writer, source, str(parent), (source / parent).lstat(), {})


def _add_from_disk(
    writer: LayerWriter,
    source: Path,
    name: str,
    status: os.stat_result,
    first: Mapping[tuple[int, int], str],
) -> None:
    path = source / name
    info = tarfile.TarInfo(name or ".")
    info.mode = stat.S_IMODE(status.st_mode)
    info.uid, info.gid, info.mtime = status.st_uid, status.st_gid, int(status.st_mtime)
    original = first.get((status.st_dev, status.st_ino))
    if original is not None:
        info.type, info.linkname = tarfile.LNKTYPE, original
        writer.add(info, {}, ())
        return
    xattrs = {
        attribute: os.getxattr(path, attribute, follow_symlinks=False)
        for attribute in os.listxattr(path, follow_symlinks=False)
    }
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFREG:
        info.size = status.st_size
        with path.open("rb", buffering=0) as file:
            writer.add(info, xattrs, iter(lambda: file.read(CHUNK), b""))
        return
    info.type = _TYPES[kind]
    if kind == stat.S_IFLNK:
        info.linkname = os.readlink(path)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        info.devmajor, info.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    writer.add(info, xattrs, ())


_TYPES = {
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}


def _tar_entry(entry: LayerEntry) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(entry.path)
    info.mode, info.uid, info.gid, info.mtime = entry.mode, entry.uid, entry.gid, entry.mtime
    data = b""
    match entry:
        case File():
            data = entry.data
            info.size = len(data)
        case Directory():
            info.type = tarfile.DIRTYPE
        case Symlink():
            info.type, info.linkname = tarfile.SYMTYPE, entry.target
        case HardLink():
            info.type, info.linkname = tarfile.LNKTYPE, entry.target
        case Fifo():
            info.type = tarfile.FIFOTYPE
        case Whiteout():
            parent, _, name = entry.path.rpartition("/")
            info.name = f"{parent}/.wh.{name}" if parent else f".wh.{name}"
        case Opaque():
            info.name = f"{entry.path}/.wh..wh..opq" if entry.path else ".wh..wh..opq"
        case _:
            raise TypeError(f"not an entry of a layer: {entry!r}")
    return info, data
