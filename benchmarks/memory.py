"""How much memory unpacking takes, of layers made to take much: ``python -m benchmarks.memory``.

Each layer is unpacked by a process of its own, which makes it while it reads it. Shown are the
process's peak of resident memory, what of that it had before, and the time.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trio_layers import LimitExceeded, Limits
from trio_layers._unpack.worker import unpack

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BLOCK = 512
MIB = 1 << 20


def header(name: str, *, size: int = 0, type: bytes = b"0") -> bytes:
    """A ustar header."""
    fields = b"%-100b" % name.encode().ljust(100, b"\0")
    fields += b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"14371573000\0"
    fields += b" " * 8 + type + bytes(100) + b"ustar\x0000"
    block = fields.ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def sparse_file() -> Iterator[bytes]:
    """10 GB, of which a byte in each GB is data."""
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
    """10⁶ of them, in 1,000 directories."""
    for directory in range(1000):
        yield b"".join(header(f"{directory}/{number}") for number in range(1000))
    yield bytes(2 * BLOCK)


def bomb() -> Iterator[bytes]:
    """Zeros without end, behind an archive, in zstd."""
    yield zstd.compress(header("file") + bytes(2 * BLOCK))
    yield from itertools.repeat(zstd.compress(bytes(64 * MIB)))


LAYERS: dict[str, Callable[[], Iterator[bytes]]] = {
    "one sparse file of 10 GB": sparse_file,
    "a million empty files": empty_files,
    "a bomb": bomb,
}


def peak() -> int:
    """In MiB."""
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--directory", help="where to unpack; room for 10⁶ inodes is needed")
    parser.add_argument("--layer", choices=LAYERS, help="this one only, in this process")
    arguments = parser.parse_args()
    if arguments.layer:
        print(f"{arguments.layer:25} {measure(arguments.layer, arguments.directory)}")
        return
    more = ["--directory", arguments.directory] if arguments.directory else []
    for name in LAYERS:
        command = [sys.executable, "-m", "benchmarks.memory", "--layer", name, *more]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
