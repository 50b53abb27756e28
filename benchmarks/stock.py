"""The images in a registry's storage, made once and kept between runs."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import attrs

from . import images
from .images import SHAPES, write_layout
from .machine import registry, uninterrupted

REPOSITORY = "bench/image"


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "trio-layers-benchmarks"


def stock(cache: Path, name: str) -> Path:
    """Return a storage with the image; making it takes half a minute for 1 GB.

    The name of the storage contains a hash of the shape and of the generator's source.
    """
    generator = Path(images.__file__).read_bytes()
    shape = f"{SHAPES[name]!r} {zlib.ZLIB_RUNTIME_VERSION}".encode()
    key = hashlib.sha256(generator + shape).hexdigest()[:16]
    made = cache / f"{name}-{key}"
    if made.exists():
        return made
    print(f"making {name} …", flush=True)
    for old in cache.glob(f"{name}-????????????????"):
        shutil.rmtree(old)
    making = cache / f"making-{name}"
    shutil.rmtree(making, ignore_errors=True)
    try:
        making.mkdir(parents=True)
        made_facts = write_layout(making / "layout", SHAPES[name])
        noted = {tag: attrs.asdict(its) for tag, its in made_facts.items()}
        (making / "facts.json").write_text(json.dumps(noted))
        with registry(making) as host:
            _push(making / "layout", host)
        shutil.rmtree(making / "layout")
        making.rename(made)
    finally:
        with uninterrupted():
            shutil.rmtree(making, ignore_errors=True)
    return made


def read_blobs(storage: Path) -> None:
    """Read all blobs into the page cache, so that no round waits for the disk."""
    for path in storage.rglob("data"):
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass


def _push(layout: Path, host: str) -> None:
    connection = http.client.HTTPConnection(host)

    def put(url: str, path: Path, media_type: str) -> None:
        headers = {"Content-Type": media_type, "Content-Length": str(path.stat().st_size)}
        with path.open("rb") as file:
            connection.request("PUT", url, file, headers)
            _expect(connection, 201)

    blobs = layout / "blobs" / "sha256"
    manifests = json.loads((layout / "index.json").read_bytes())["manifests"]
    digests = {manifest["digest"].removeprefix("sha256:") for manifest in manifests}
    for blob in blobs.iterdir():
        if blob.name not in digests:
            connection.request("POST", f"/v2/{REPOSITORY}/blobs/uploads/")
            location = urlsplit(_expect(connection, 202).headers["Location"])
            url = f"{location.path}?{location.query}&digest=sha256:{blob.name}"
            put(url, blob, "application/octet-stream")
    for manifest in manifests:
        tag = manifest["annotations"]["org.opencontainers.image.ref.name"]
        blob = blobs / manifest["digest"].removeprefix("sha256:")
        put(f"/v2/{REPOSITORY}/manifests/{tag}", blob, manifest["mediaType"])
    connection.close()


def _expect(connection: http.client.HTTPConnection, status: int) -> http.client.HTTPResponse:
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != status:
        raise RuntimeError(f"docker-registry: {answer.status} {body.decode(errors='replace')}")
    return answer


def facts(storage: Path, tag: str) -> dict[str, int]:
    """Return the size of an image as recorded when it was made."""
    noted: dict[str, dict[str, int]] = json.loads((storage / "facts.json").read_bytes())
    return noted[tag]
