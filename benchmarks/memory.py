"""Measures the memory for unpacking hostile layers: ``python -m benchmarks.memory``.

Each layer is made and unpacked in a process of its own. The report shows the process's peak of
resident memory, its memory before, and the time. Last comes a whole pull of a layer of 10 GB, with
the peak of all its processes together. This pull needs root and 13 GB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import trio

from trio_layers import LimitExceeded, Limits
from trio_layers._tree.unpack import unpack
from trio_layers.testing import BuiltLayer, build_image, build_layer, open_registry

from .machine import group

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BLOCK = 512
MIB = 1 << 20


def header(name: str, *, size: int = 0, type: bytes = b"0") -> bytes:
    """Return a ustar header."""
    fields = name.encode().ljust(100, b"\0")
    fields += b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"14371573000\0"
    fields += b" " * 8 + type + bytes(100) + b"ustar\x0000"
    block = fields.ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def sparse_file() -> Iterator[bytes]:
    """Yield a tar with a file of 10 GB, which has a byte of data in each GB."""
    step, count = 10**9, 10
    records = {"major": "1", "minor": "0", "name": "disk", "realsize": f"{step * count}"}
    text = b""
    for key, value in records.items():
        record = f" GNU.sparse.{key}={value}\n"
        text += f"{len(record) + 2}{record}".encode()
    parts = [f"{count}\n", *(f"{step * number}\n1\n" for number in range(count))]
    content = padded("".join(parts).encode()) + b"s" * count
    yield header("PaxHeaders/disk", size=len(text), type=b"x") + padded(text)
    yield header("disk", size=len(content)) + padded(content) + bytes(2 * BLOCK)


def empty_files() -> Iterator[bytes]:
    """Yield a tar with 10⁶ empty files in 1,000 directories."""
    for directory in range(1000):
        yield b"".join(header(f"{directory}/{number}") for number in range(1000))
    yield bytes(2 * BLOCK)


def bomb() -> Iterator[bytes]:
    """Yield an archive and then zeros without end, in zstd."""
    yield zstd.compress(header("file") + bytes(2 * BLOCK))
    yield from itertools.repeat(zstd.compress(bytes(64 * MIB)))


LAYERS: dict[str, Callable[[], Iterator[bytes]]] = {
    "one sparse file of 10 GB": sparse_file,
    "a million empty files": empty_files,
    "a bomb": bomb,
}


def peak() -> int:
    """Return the peak of this process's memory in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure(name: str, directory: str | None) -> str:
    pieces = LAYERS[name]()
    held = bytearray()

    def read(size: int) -> bytes:
        while len(held) < size and (piece := next(pieces, None)) is not None:
            held.extend(piece)
        data = bytes(held[:size])
        del held[:size]
        return data

    target = Path(tempfile.mkdtemp(dir=directory))
    try:
        before, start = peak(), time.perf_counter()
        try:
            result = f"{unpack(read, target, limits=Limits()).entries} entries"
        except LimitExceeded as error:
            result = f"stopped: {error}"
        return f"{peak():6} MiB (before {before}) {time.perf_counter() - start:7.1f} s  {result}"
    finally:
        shutil.rmtree(target)


def layer_of_10_gb(path: Path) -> BuiltLayer:
    """Make a layer with ten files of 1 GB; each MiB is noise repeated 16 times."""
    piece = random.Random(1).randbytes(MIB // 16) * 16
    packed = zstd.compress(piece)
    tar = hashlib.sha256()
    size = 10**9 // MIB * MIB
    with path.open("wb") as file:
        for number in range(10):
            head = header(f"file{number}", size=size)
            tar.update(head)
            file.write(zstd.compress(head))
            for _ in range(size // MIB):
                tar.update(piece)
                file.write(packed)
        end = bytes(2 * BLOCK)
        tar.update(end)
        file.write(zstd.compress(end))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    small = build_layer([], compression="zstd")
    return attrs.evolve(
        small,
        descriptor=attrs.evolve(
            small.descriptor, digest=f"sha256:{digest}", size=path.stat().st_size
        ),
        diff_id=f"sha256:{tar.hexdigest()}",
        content=path,
    )


def measure_pull(directory: Path) -> str:
    image = build_image([layer_of_10_gb(directory / "blob")])

    def pull(reference: str) -> str:
        store = str(directory / "store")
        command = [sys.executable, "-m", "trio_layers", "pull", "-q", "--store", store, reference]
        with group("memory") as processes, processes.watched() as most:
            start = time.perf_counter()
            process = processes.start(command, stdout=subprocess.DEVNULL)
            if process.wait():
                raise SystemExit("the pull failed")
            took = time.perf_counter() - start
        return f"{most.bytes // MIB:6} MiB {'':14} {took:7.1f} s  all processes together"

    async def serve() -> str:
        async with open_registry() as registry:
            reference = registry.add(image, "library/large:latest")
            return await trio.to_thread.run_sync(pull, reference)

    return trio.run(serve)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--directory", help="directory for unpacking, with room for 10⁶ inodes")
    parser.add_argument("--layer", choices=LAYERS, help="unpack only this layer, in this process")
    arguments = parser.parse_args()
    if arguments.layer:
        print(f"{arguments.layer:25} {measure(arguments.layer, arguments.directory)}")
        return
    more = ["--directory", arguments.directory] if arguments.directory else []
    for name in LAYERS:
        command = [sys.executable, "-m", "benchmarks.memory", "--layer", name, *more]
        subprocess.run(command, check=True)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        print(f"{'a pull of 10 GB':25} {measure_pull(Path(name))}")


if __name__ == "__main__":
    main()
