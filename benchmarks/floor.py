"""A lower bound: the fastest pull in Python, for comparison.

    python -m benchmarks.floor HOST:PORT/REPOSITORY:TAG DIRECTORY

It fetches the blobs over plain sockets, hashes them, inflates them with isal, hashes the tars,
keeps the blobs, makes the same files with the same metadata, a directory for each layer, and ends
with one ``syncfs``. It does not compare hashes, and has no errors, retries, progress, checks of
links, whiteouts or catalog. It works with images of `benchmarks.images` only.

Each part of its design was faster than the alternatives:

- Two processes share the layers by size, the largest first. A process takes a mebibyte from the
  socket, hashes it, writes it, and inflates it 64 KiB at a time. It gives the output, at most
  128 KiB, to the hash and to the files, so the data stays in the core's cache. If the two shares
  are equal, threads would only add hand-overs.
- If one large layer makes a process's share too large, the process has three threads in a row:
  fetch, hash and keep; inflate; hash and write. Their slow calls run without the interpreter's
  lock.
- The next layers are requested on other connections before the present layer ends, so that no
  process waits for the registry's answer.
- Paths are relative to the working directory, as bytes. A file takes four calls: open with its
  mode, write, set its time, close; and one more if its owner is not that of the process. Files
  larger than 256 KiB get their space first, which makes writing cheaper.

``python -m benchmarks.floor --inflate DIRECTORY`` prints the seconds for only reading and inflating
the kept blobs on one core.
"""

from __future__ import annotations

import collections
import ctypes
import hashlib
import itertools
import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

from isal import igzip_lib

PROCESSES = 2
FETCH = 1 << 20
INFLATE = 64 << 10
INFLATED = 128 << 10
AHEAD = 3
LARGE = 256 << 10
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

Layer = dict[str, Any]
"""A descriptor from the manifest, with its position as ``index``."""


def main() -> None:
    if sys.argv[1] == "--inflate":
        print(inflate_alone(sys.argv[2]))
        return
    reference, directory = sys.argv[1:]
    host, _, name = reference.partition("/")
    repository, _, tag = name.rpartition(":")
    os.umask(0)
    os.makedirs(f"{directory}/blobs")
    os.mkdir(f"{directory}/trees")
    client = Client(host, repository)
    document = b"".join(client.get(f"manifests/{tag}"))
    manifest = json.loads(document)
    config = manifest["config"]["digest"]
    for digest, data in (
        (f"sha256:{hashlib.sha256(document).hexdigest()}", iter([document])),
        (config, hashed(client.get(f"blobs/{config}"))),
    ):
        for _ in keep(directory, digest, data):
            pass
    layers = [{**layer, "index": index} for index, layer in enumerate(manifest["layers"])]
    mine, *others = deal(layers)
    children = []
    for share in others:
        if (child := os.fork()) == 0:
            pull(Client(host, repository), directory, share, layers)
            os._exit(0)
        children.append(child)
    pull(client, directory, mine, layers)
    for child in children:
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit("the other process failed")
    descriptor = os.open(directory, os.O_RDONLY)
    ctypes.CDLL(None).syncfs(descriptor)


def deal(layers: list[Layer]) -> list[list[Layer]]:
    shares: list[list[Layer]] = [[] for _ in range(PROCESSES)]
    for layer in sorted(layers, key=lambda layer: -layer["size"]):
        min(shares, key=size_of).append(layer)
    return shares


def size_of(layers: list[Layer]) -> int:
    return sum(layer["size"] for layer in layers)


def pull(client: Client, directory: str, share: list[Layer], all_layers: list[Layer]) -> None:
    """Pull a process's share of the layers."""
    threads = size_of(share) > 1.25 * size_of(all_layers) / PROCESSES
    in_thread = beside if threads else iter
    paths = (f"blobs/{layer['digest']}" for layer in share)
    for layer, data in zip(share, client.get_all(paths), strict=True):
        kept = in_thread(keep(directory, layer["digest"], hashed(data), layer["size"]))
        tar = in_thread(inflated(kept, layer["mediaType"]))
        unpack(hashed(tar), f"{directory}/trees/{layer['index']}")


class Client:
    """A minimal HTTP client for docker-registry."""

    def __init__(self, host: str, repository: str) -> None:
        self._host, self._repository = host, repository
        self._idle: list[socket.socket] = []
        # A thread uses one buffer, two wait, and one is being filled.
        self._buffers = itertools.cycle([memoryview(bytearray(FETCH)) for _ in range(4)])

    def get_all(self, paths: Iterable[str]) -> Iterator[Iterator[memoryview]]:
        """Yield the bodies in order, and request some of them ahead."""
        paths = iter(paths)
        asked = collections.deque(map(self._ask, itertools.islice(paths, AHEAD)))
        while asked:
            yield self._answer(asked.popleft())
            asked.extend(map(self._ask, itertools.islice(paths, 1)))

    def get(self, path: str) -> Iterator[memoryview]:
        return self._answer(self._ask(path))

    def _ask(self, path: str) -> socket.socket:
        if self._idle:
            connection = self._idle.pop()
        else:
            name, _, port = self._host.rpartition(":")
            connection = socket.create_connection((name, int(port)))
        connection.sendall(
            f"GET /v2/{self._repository}/{path} HTTP/1.1\r\nHost: {self._host}\r\n"
            "Accept: application/vnd.oci.image.manifest.v1+json\r\n\r\n".encode()
        )
        return connection

    def _answer(self, connection: socket.socket) -> Iterator[memoryview]:
        end = -1
        while end < 0:
            head = connection.recv(8192, socket.MSG_PEEK)
            if not head:
                raise SystemExit("the registry closed the connection")
            end = head.find(b"\r\n\r\n")
        status, *fields = connection.recv(end + 4).lower().split(b"\r\n")
        if not status.startswith(b"http/1.1 200"):
            raise SystemExit(status.decode())
        left = next(int(field[15:]) for field in fields if field.startswith(b"content-length:"))
        for buffer in self._buffers:
            size = connection.recv_into(buffer, min(left, FETCH), socket.MSG_WAITALL)
            if not size:
                raise SystemExit("the registry closed the connection")
            yield buffer[:size]
            left -= size
            if not left:
                self._idle.append(connection)
                return


def keep(
    directory: str, digest: str, data: Iterable[memoryview | bytes], size: int = 0
) -> Iterator[memoryview | bytes]:
    """Write a blob, and yield its pieces."""
    descriptor = os.open(f"{directory}/blobs/{digest.removeprefix('sha256:')}", NEW, 0o644)
    if size > LARGE:
        os.posix_fallocate(descriptor, 0, size)
    for piece in data:
        os.write(descriptor, piece)
        yield piece
    os.close(descriptor)


def hashed(data: Iterable[Any]) -> Iterator[Any]:
    sha256 = hashlib.sha256()
    for piece in data:
        sha256.update(piece)
        yield piece
    sha256.digest()


def inflated(data: Iterable[memoryview | bytes], media_type: str) -> Iterator[bytes]:
    if media_type.endswith("zstd"):
        from backports.zstd import ZstdDecompressor

        codec: Any = ZstdDecompressor()
    else:
        codec = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    decompress = codec.decompress
    for piece in data:
        for start in range(0, len(piece), INFLATE):
            part: memoryview | bytes = piece[start : start + INFLATE]
            while True:
                if plain := decompress(part, INFLATED):
                    yield plain
                if codec.eof or codec.needs_input:
                    break
                part = b""


def beside(pieces: Iterator[Any]) -> Iterator[Any]:
    """Yield pieces that another thread makes, at most two of them ahead."""
    made: queue.SimpleQueue[Any] = queue.SimpleQueue()
    room = threading.Semaphore(2)

    def make() -> None:
        try:
            for piece in pieces:
                room.acquire()
                made.put(piece)
            made.put(None)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # the main thread would wait for ever

    threading.Thread(target=make).start()
    while (piece := made.get()) is not None:
        room.release()
        yield piece


def unpack(tar: Iterator[bytes], tree: str) -> None:
    os.mkdir(tree, 0o755)
    os.chdir(tree)
    me = (os.getuid(), os.getgid())
    directories = []
    held, position, end = b"", 0, 0
    for piece in tar:
        # The rest of the last piece is less than a header.
        held = held[position:] + piece if position < end else piece
        position, end = 0, len(held)
        while end - position >= 512:
            header = held[position : position + 512]
            position += 512
            kind = header[156]
            if not kind:  # the end, or padding after it
                continue
            name = header[:100].rstrip(b"\0")
            mode = int(header[100:107], 8)
            owner = (int(header[108:115], 8), int(header[116:123], 8))
            times = (int(header[136:147], 8),) * 2
            if kind == ord("0"):
                size = left = int(header[124:135], 8)
                file = os.open(name, NEW, mode)
                if size > LARGE:
                    os.posix_fallocate(file, 0, size)
                while left:
                    if position == end:
                        held = next(tar)
                        position, end = 0, len(held)
                    written = os.write(file, memoryview(held)[position : position + left])
                    position += written
                    left -= written
                if owner != me:
                    os.fchown(file, *owner)
                os.utime(file, times)
                os.close(file)
                position += -size % 512
                if position > end:
                    position -= end
                    held = next(tar)
                    end = len(held)
            elif kind == ord("5"):
                os.mkdir(name, mode)
                if owner != me:
                    os.chown(name, *owner)
                directories.append((name, times))
            elif kind == ord("2"):
                os.symlink(header[157:257].rstrip(b"\0"), name)
                if owner != me:
                    os.lchown(name, *owner)
                os.utime(name, times, follow_symlinks=False)
            elif kind == ord("1"):
                os.link(header[157:257].rstrip(b"\0"), name)
            else:
                raise SystemExit(
                    f"unsupported type of entry {chr(kind)}: use an image of benchmarks.images"
                )
    for name, times in reversed(directories):
        os.utime(name, times)


def inflate_alone(directory: str) -> float:
    start = time.monotonic()
    for entry in os.scandir(f"{directory}/blobs"):
        with open(entry, "rb", buffering=0) as file:
            if file.read(2) == b"\x1f\x8b":
                file.seek(0)
                for _ in inflated(iter(lambda: file.read(FETCH), b""), "gzip"):
                    pass
    return time.monotonic() - start


if __name__ == "__main__":
    main()
