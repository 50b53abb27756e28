"""Seeded images to measure with, written as an OCI layout, in constant memory."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tarfile
from pathlib import Path
from typing import IO

import attrs


@attrs.frozen
class Shape:
    """What an image is like.

    Attributes:
        sizes: Bytes of file content in each layer, bottom first.
        file_size: Mean size of a file in bytes; their sizes spread widely around it.
    """

    sizes: tuple[int, ...]
    file_size: int


SHAPES = {
    "large": Shape(tuple(n * 1_000_000 for n in (520, 160, 120, 80, 60, 40, 15, 5)), 56_000),
    "small": Shape((200_000,) * 40, 2_000),
    "layer-100M": Shape((100_000_000,), 56_000),
    "layer-1G": Shape((1_000_000_000,), 56_000),
    "file-1G": Shape((1_000_000_000,), 10**12),
}


class Hashed:
    """Passes on what is written, hashed and counted."""

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


def write_layout(directory: Path, shape: Shape, *, seed: int = 1) -> None:
    """Write the image, tagged ``latest``, into a fresh directory."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    layers, diff_ids = [], []
    for index, size in enumerate(shape.sizes):
        layer, diff_id = _write_layer(blobs, index, size, shape.file_size, seed)
        layers.append(layer)
        diff_ids.append(diff_id)
    config = _write_json(
        blobs,
        "application/vnd.oci.image.config.v1+json",
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        },
    )
    manifest_type = "application/vnd.oci.image.manifest.v1+json"
    manifest = _write_json(
        blobs,
        manifest_type,
        {"schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": layers},
    )
    manifest["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [manifest]}))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def _write_layer(
    blobs: Path, index: int, size: int, file_size: int, seed: int
) -> tuple[dict[str, object], str]:
    rng = random.Random(seed * 1000 + index)
    words = [rng.randbytes(rng.randint(2, 12)).hex().encode() for _ in range(4000)]
    temporary = blobs / "layer"
    with temporary.open("wb") as file:
        packed = Hashed(file)
        with gzip.GzipFile("", "wb", compresslevel=1, fileobj=packed, mtime=0) as zipped:
            plain = Hashed(zipped)
            with tarfile.open(mode="w|", fileobj=plain, format=tarfile.PAX_FORMAT) as tar:
                left, number = size, 0
                while left > 0:
                    if number % 50 == 0:
                        folder = tarfile.TarInfo(f"data/layer{index}/dir{number // 50}")
                        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
                        tar.addfile(folder)
                    length = min(left, int(rng.expovariate(1 / file_size)) + 1)
                    info = tarfile.TarInfo(f"{folder.name}/file{number}")
                    info.size, info.mtime = length, 1_600_000_000 + number
                    tar.addfile(info, _Content(rng, words, length))
                    left -= length
                    number += 1
    digest = packed.digest
    temporary.rename(blobs / digest.removeprefix("sha256:"))
    layer: dict[str, object] = {
        "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
        "digest": digest,
        "size": packed.size,
    }
    return layer, plain.digest


class _Content(io.RawIOBase):
    """A quarter noise, the rest text: gzip makes of it about what it makes of a file system."""

    def __init__(self, rng: random.Random, words: list[bytes], length: int) -> None:
        noise = rng.randbytes(min(length // 4, 100_000))
        text = b" ".join(rng.choices(words, k=min(2000, length // 8 + 1)))
        self._pattern = noise + text * (len(noise) * 3 // len(text) + 1)
        self._left = length

    def read(self, size: int = -1) -> bytes:
        size = self._left if size < 0 else min(size, self._left)
        self._left -= size
        return (self._pattern * (size // len(self._pattern) + 1))[:size]


def _write_json(blobs: Path, media_type: str, value: dict[str, object]) -> dict[str, object]:
    data = json.dumps(value).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}
