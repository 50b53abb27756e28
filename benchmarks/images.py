"""Makes images for measurements from a seed, as an OCI layout, in constant memory.

The content compresses and inflates about as fast as a root file system: text, data like machine
code, and a part that is already compressed. Most files are small and a few large, as in a root file
system. The same shape and seed give the same tars everywhere.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import itertools
import json
import random
import sys
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import IO

import attrs

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


@attrs.frozen
class Shape:
    """The parameters of an image.

    Attributes:
        sizes: Bytes of file content in each layer, bottom first.
        file_size: Mean size of a file in bytes.
        compression: ``gzip`` or ``zstd``.
        other_base: Bytes in the lowest layer of a second image, tagged ``rebased``. It shares all
            other layers with the first image.
    """

    sizes: tuple[int, ...]
    file_size: int
    compression: str = "gzip"
    other_base: int | None = None


def _megabytes(*sizes: int) -> tuple[int, ...]:
    return tuple(size * 1_000_000 for size in sizes)


# The content of 1.04 GB of tars, 18,554 files, half of it in one layer.
_LARGE = Shape(_megabytes(82, 515, 160, 120, 80, 45, 17, 4), 55_139, other_base=50_000_000)
_SMALL = 200_000

SHAPES = {
    "large": _LARGE,
    "large-zstd": attrs.evolve(_LARGE, compression="zstd", other_base=None),
    "small": Shape((_SMALL,) * 40, 2_000),
    "layers-200": Shape((_SMALL,) * 200, 2_000),
    "layer-4G": Shape((4_000_000_000,), 1_000_000),
    "layer-1G": Shape((1_000_000_000,), 56_000),
    "file-1G": Shape((1_000_000_000,), 10**12),
}

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"


@attrs.frozen
class Facts:
    """The size of a layer or an image."""

    layers: int
    files: int
    packed: int
    unpacked: int


@attrs.frozen
class _Written:
    descriptor: dict[str, object]
    diff_id: str
    facts: Facts


def write_layout(directory: Path, shape: Shape, *, seed: int = 1) -> dict[str, Facts]:
    """Write an image with the tag ``latest`` into a new directory; return each tag's facts."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    sizes = [*shape.sizes, *([shape.other_base] if shape.other_base is not None else [])]
    write = functools.partial(_write_layer, blobs, shape, seed)
    with ProcessPoolExecutor() as pool:
        layers = list(pool.map(write, range(len(sizes)), sizes))
    count = len(shape.sizes)
    tags = {"latest": layers[:count]}
    if shape.other_base is not None:
        tags["rebased"] = [layers[count], *layers[1:count]]
    manifests = [_write_manifest(blobs, tag, layers) for tag, layers in tags.items()]
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return {
        tag: Facts(*map(sum, zip(*(attrs.astuple(layer.facts) for layer in layers), strict=True)))
        for tag, layers in tags.items()
    }


def _write_manifest(blobs: Path, tag: str, layers: list[_Written]) -> dict[str, object]:
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": _write_json(blobs, _CONFIG, config),
        "layers": [layer.descriptor for layer in layers],
    }
    descriptor = _write_json(blobs, _MANIFEST, manifest)
    return {**descriptor, "annotations": {"org.opencontainers.image.ref.name": tag}}


def _write_json(blobs: Path, media_type: str, value: dict[str, object]) -> dict[str, object]:
    data = json.dumps(value).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


class _Hashed:
    """A file that hashes and counts the bytes written to another."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"


def _write_layer(blobs: Path, shape: Shape, seed: int, index: int, size: int) -> _Written:
    temporary = blobs / f"layer{index}"
    with temporary.open("wb") as file:
        packed = _Hashed(file)
        with _compressed(packed, shape.compression) as compressed:
            plain = _Hashed(compressed)
            # In GNU's format, no name or number of these files needs a second header.
            with tarfile.open(mode="w|", fileobj=plain, format=tarfile.GNU_FORMAT) as tar:
                files = _Layer(tar, seed, index, size, shape.file_size).write()
    digest = packed.digest
    temporary.rename(blobs / digest.removeprefix("sha256:"))
    media_type = f"{_LAYER}+{shape.compression}"
    descriptor = {"mediaType": media_type, "digest": digest, "size": packed.size}
    return _Written(descriptor, plain.digest, Facts(1, files, packed.size, plain.size))


def _compressed(file: _Hashed, compression: str) -> IO[bytes]:
    # Both levels are those of common builders.
    if compression == "zstd":
        return zstd.ZstdFile(file, "wb", level=3)
    return gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0)


class _Layer:
    """Directories of 20 files, one link in 25 files, everything owned by root or by 1000."""

    def __init__(
        self, tar: tarfile.TarFile, seed: int, index: int, size: int, file_size: int
    ) -> None:
        self._tar = tar
        self._rng = random.Random(seed * 1000 + index)
        self._content = _Content(seed * 1000 + index, min(size, _Content.POOL))
        self._owner = 1000 if index % 4 == 3 else 0
        self._sizes = _sizes(self._rng, size, max(1, round(size / file_size)))
        self._top = f"usr/share/layer{index}"

    def write(self) -> int:
        """Write the entries; return the number of regular files."""
        for folder in ("usr", "usr/share", self._top):
            self._add(folder, tarfile.DIRTYPE, 0o755)
        for number, size in enumerate(self._sizes):
            if number % 200 == 0:
                package = f"{self._top}/package{number // 200}"
                self._add(package, tarfile.DIRTYPE, 0o755)
            if number % 20 == 0:
                folder = f"{package}/part{number // 20 % 10}"
                self._add(folder, tarfile.DIRTYPE, 0o755)
            name = f"{folder}/file{number}"
            mode = 0o755 if number % 10 == 0 else 0o644
            self._add(name, tarfile.REGTYPE, mode, size=size)
            if number % 30 == 7:
                self._add(f"{name}.link", tarfile.SYMTYPE, 0o777, link=f"file{number}")
            if number % 150 == 11:
                self._add(f"{name}.hard", tarfile.LNKTYPE, mode, link=name)
        return len(self._sizes)

    def _add(self, name: str, type_: bytes, mode: int, *, size: int = 0, link: str = "") -> None:
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.size, info.linkname = type_, mode, size, link
        below_top = name.startswith(self._top)
        info.uid = info.gid = self._owner if below_top else 0
        file = link if type_ == tarfile.LNKTYPE else name  # a hard link has its file's metadata
        info.mtime = 1_600_000_000 + (zlib.crc32(file.encode()) % 10_000_000 if below_top else 0)
        self._tar.addfile(info, _Pieces(self._content.file(size)) if size else None)


def _sizes(rng: random.Random, total: int, count: int) -> list[int]:
    """Return ``count`` sizes: the median about a seventh of the mean, none over 40 means."""
    weights = [min(rng.lognormvariate(0, 2), 300) for _ in range(count)]
    scale = total / sum(weights)
    edges = [0, *(round(scale * edge) for edge in itertools.accumulate(weights))]
    edges[-1] = total
    return [end - start for start, end in itertools.pairwise(edges)]


class _Content:
    """Content of files: slices of pools, too far apart for gzip to find repetitions."""

    POOL = 24_000_000

    def __init__(self, seed: int, pool: int) -> None:
        self._rng = rng = random.Random(seed)
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        words = [
            "".join(rng.choices(letters, range(26, 0, -1), k=rng.randint(2, 11))).encode() + b" "
            for _ in range(8000)
        ]
        codes = [rng.randbytes(rng.randint(1, 5)) for _ in range(2000)]
        self._text = _pool(rng, words, pool)
        self._code = _pool(rng, codes, pool)

    def file(self, size: int) -> Iterator[bytes]:
        """Yield a file's content: of 25 files, 13 are text, 10 code and 2 noise."""
        kind = self._rng.random() * 25
        while size > 0:
            length = min(size, self._rng.randint(2_000, 60_000))
            if kind < 2:
                yield self._rng.randbytes(length)
            else:
                pool = self._text if kind < 15 else self._code
                start = self._rng.randrange(max(1, len(pool) - length))
                piece = pool[start : start + length]
                length = len(piece)
                yield piece
            size -= length


def _pool(rng: random.Random, words: list[bytes], size: int) -> bytes:
    """Return text of words and of as many phrases, with frequencies by Zipf's law."""
    phrases = [b"".join(_choose(rng, words, rng.randint(2, 8))) for _ in range(len(words))]
    both = [*itertools.chain(*zip(words, phrases, strict=True))]
    mean = len(b"".join(both)) / len(both)
    return b"".join(_choose(rng, both, round(size / mean)))


def _choose(rng: random.Random, values: list[bytes], count: int) -> list[bytes]:
    return rng.choices(values, cum_weights=_weights(len(values)), k=count)


@functools.cache
def _weights(count: int) -> list[float]:
    return list(itertools.accumulate(1 / (rank + 3) for rank in range(count)))


class _Pieces:
    """A readable file from pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._held = b""

    def read(self, size: int) -> bytes:
        parts = [self._held]
        length = len(self._held)
        while length < size:
            piece = next(self._pieces, None)
            if piece is None:
                break
            parts.append(piece)
            length += len(piece)
        data = b"".join(parts)
        self._held = data[size:]
        return data[:size]
