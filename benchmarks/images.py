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


LARGE = Shape(
    sizes=(520_000_000, 160_000_000, 120_000_000, 80_000_000, 60_000_000, 40_000_000, 15_000_000,
           5_000_000),
    file_size=56_000,
)  # fmt: skip
SMALL = Shape(sizes=(100 * 2_000,) * 40, file_size=2_000)


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
                    tar.addfile(info, io.BytesIO(_content(rng, words, length)))
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


def _content(rng: random.Random, words: list[bytes], length: int) -> bytes:
    """A third noise, the rest text: gzip makes of it about what it makes of a file system."""
    noise = rng.randbytes(length // 4)
    text = b" ".join(rng.choices(words, k=min(2000, length // 8 + 1)))
    text = (text * (length // len(text) + 1))[: length - len(noise)]
    return noise + text


def _write_json(blobs: Path, media_type: str, value: dict[str, object]) -> dict[str, object]:
    data = json.dumps(value).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}
