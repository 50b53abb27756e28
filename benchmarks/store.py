"""Measures a store of many layers: opening, a pull of a stored image, and gc.

    python -m benchmarks.store [--rounds N]

The time for opening, and for the store's part of such a pull, must not depend on the number of
layers. The time of gc must be linear. The rows are written directly to the catalog. Each blob is a
file and each tree a directory, so that gc has files to look at and to remove. The store is on a new
ext4, which needs root. The figures are medians of the rounds in milliseconds, measured in a process
of their own; for gc, they are seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import trio

from trio_layers import DirectoryStore, open_puller, open_store
from trio_layers.testing import open_registry, sample_image

from .machine import enter_own_mounts, fresh_disk, memory

SIZES = {0: 0, 100: 10, 10_000: 100, 100_000: 1_000}
"""The number of images for each number of layers."""


def digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def fill(path: Path, layers: int, images: int) -> None:
    """Write the rows and files that pulls of images without common layers leave."""
    connection = sqlite3.connect(path / "catalog.sqlite", isolation_level=None)
    connection.execute("BEGIN")
    for name, rows in rows_of(layers, images).items():
        marks = ",".join("?" * len(rows[0]))
        connection.executemany(f"INSERT INTO {name} VALUES ({marks})", rows)
    connection.execute("COMMIT")
    for kind, name in connection.execute(
        "SELECT 'blobs', digest FROM blobs UNION ALL SELECT 'trees', id FROM trees"
    ):
        place = path / kind / "sha256" / name.removeprefix("sha256:")
        if place.exists():
            continue
        if kind == "trees":
            place.mkdir()
        else:
            place.write_bytes(b"x")
    connection.close()


def rows_of(layers: int, images: int) -> dict[str, list[tuple[object, ...]]]:
    blobs, trees, stacked, manifests, references, contents = [], [], [], [], [], []
    for image in range(images):
        manifest, config = digest(f"manifest {image}"), digest(f"config {image}")
        blobs += [(manifest, 1, None), (config, 1, None)]
        chain = None
        for layer in range(layers // images):
            name = f"{image} {layer}"
            blob, diff_id = digest(f"blob {name}"), digest(f"tar {name}")
            parent, chain = chain, digest(f"chain {name}")
            blobs.append((blob, 1, diff_id))
            trees.append((diff_id, diff_id, 1024, 1, b""))
            stacked.append((chain, diff_id, parent, diff_id, blob))
            contents.append((manifest, blob))
        kind = "application/vnd.oci.image.manifest.v1+json"
        manifests.append((manifest, kind, config, kind.replace("manifest", "config"), chain))
        references.append((None, f"docker.io/library/{image}:latest", "", manifest, None, None))
    return {
        "blobs": blobs,
        "trees": trees,
        "layers": stacked,
        "images": manifests,
        "image_references": references,
        "image_blobs": contents,
    }


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


async def measure(path: Path, rounds: int, layers: int) -> dict[str, float]:
    times: dict[str, list[float]] = {}

    async def opening() -> None:
        async with open_store(path):
            times.setdefault("open", []).append(1000 * (time.perf_counter() - start))

    start = time.perf_counter()
    await opening()
    times.clear()
    for _ in range(rounds):
        start = time.perf_counter()
        await opening()
    async with open_registry() as registry, open_puller(path) as puller:
        reference = registry.add(sample_image(), "library/sample:latest")
        async with puller.pull(reference):
            pass
        for _ in range(5 * rounds):
            start = time.perf_counter()
            async with puller.pull(reference):
                times.setdefault("pull", []).append(1000 * (time.perf_counter() - start))
        await puller.store.remove(reference)
    async with open_store(path) as store:
        times["gc, nothing to do"] = [await collect(store, 0)]
        drop(path)
        times["gc, half of it"] = [await collect(store, layers // 2)]
    return {name: statistics.median(values) for name, values in times.items()}


async def collect(store: DirectoryStore, layers: int) -> float:
    start = time.perf_counter()
    collected = await store.collect()
    taken = time.perf_counter() - start
    # The first collection also deletes the layers of the sample image.
    assert layers <= collected.layers <= layers + len(sample_image().layers), collected
    return taken


def drop(path: Path) -> None:
    """Delete the references of half of the images."""
    connection = sqlite3.connect(path / "catalog.sqlite", isolation_level=None)
    connection.execute("DELETE FROM image_references WHERE serial % 2")
    connection.close()


def run(path: Path, rounds: int, layers: int) -> Iterator[tuple[str, float]]:
    command = [sys.executable, "-m", "benchmarks.store", "--rounds", str(rounds)]
    done = subprocess.run(
        [*command, "--in", os.fspath(path), "--layers", str(layers)],
        stdout=subprocess.PIPE,
        check=True,
    )
    yield from json.loads(done.stdout).items()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--in", dest="path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.path:
        print(json.dumps(trio.run(measure, arguments.path, arguments.rounds, arguments.layers)))
        return
    enter_own_mounts("benchmarks.store")
    with memory() as directory:
        for layers, images in SIZES.items():
            with fresh_disk(directory, 4 << 30) as disk:
                path = disk / "store"
                trio.run(make, path)
                if images:
                    fill(path, layers, images)
                os.sync()
                cells = [
                    f"{name} {value:8.2f}" for name, value in run(path, arguments.rounds, layers)
                ]
                print(f"{layers:7d} layers {images:5d} images:", "  ".join(cells), flush=True)


async def make(path: Path) -> None:
    async with open_store(path):
        pass


if __name__ == "__main__":
    main()
