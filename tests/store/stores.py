"""Helpers for tests of the store: layers, streams, and a simple unpacker."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path

import attrs
import pytest
import trio

from trio_layers._compression import Decompressor
from trio_layers._digest import DiffID, Digest, extend_chain
from trio_layers._manifest import Descriptor
from trio_layers._rootfs.merged import MergedTree
from trio_layers._store import trees
from trio_layers._store.directory import DirectoryStore, open_with_builder
from trio_layers._tar.limits import Limits
from trio_layers._tree import unpack as unpacking
from trio_layers._tree.unpack import unpack
from trio_layers._tree.unpacked import Unpacked, assumptions_hold
from trio_layers._workers.threads import Threads

LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"


def digest_of(data: bytes) -> Digest:
    return Digest(f"sha256:{hashlib.sha256(data).hexdigest()}")


def describe(data: bytes, media_type: str = LAYER_TYPE) -> Descriptor:
    return Descriptor(media_type, digest_of(data), len(data))


def tar_of(**files: bytes | str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            body = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return out.getvalue()


@attrs.frozen
class Blob:
    """A layer's blob, with its digest and diff ID."""

    data: bytes
    descriptor: Descriptor
    diff_id: DiffID

    @property
    def digest(self) -> Digest:
        return self.descriptor.digest

    @property
    def file_name(self) -> str:
        return self.digest.removeprefix("sha256:")


def layer_of(**files: bytes | str) -> Blob:
    tar = tar_of(**files)
    data = gzip.compress(tar, mtime=0)
    return Blob(data, describe(data), DiffID(digest_of(tar)))


def chain_of(*blobs: Blob) -> Digest:
    chain = None
    for blob in blobs:
        chain = extend_chain(chain, blob.diff_id)
    assert chain is not None
    return chain


class Stream(trio.abc.ReceiveStream):
    """Bytes in small pieces. At ``stop_at`` it raises ``error``, or sets ``stopped`` and waits
    for ``go_on``.
    """

    def __init__(
        self, data: bytes, *, stop_at: int | None = None, error: Exception | None = None
    ) -> None:
        self.data = data
        self.stop_at = stop_at
        self.error = error
        self.position = 0
        self.stopped = trio.Event()
        self.go_on = trio.Event()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        end = min(self.position + min(max_bytes or 4096, 4096), len(self.data))
        if self.stop_at is not None:
            if self.position >= self.stop_at:
                if self.error is not None:
                    raise self.error
                self.stopped.set()
                await self.go_on.wait()
            else:
                end = min(end, self.stop_at)
        data = self.data[self.position : end]
        self.position = end
        return data

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class TarUnpacker:
    """Unpacks with `tarfile`. A layer with a file ``needs-lower`` is incomplete without its
    parents. A layer with ``assumes`` makes an assumption, which holds if `assumption` is set.
    """

    def __init__(self) -> None:
        self.assumption = True
        self.calls: list[str] = []
        self.before_return: Callable[[], None] = lambda: None

    def unpack(
        self,
        read: Callable[[int], bytes],
        target: Path,
        *,
        lower: object,
        check_cancelled: Callable[[], None],
        **options: object,
    ) -> Unpacked:
        self.calls.append("alone" if lower is None else "on top")
        decompressor = Decompressor()
        tar = bytearray()
        (target / "fs").mkdir()
        while data := read(1024):
            check_cancelled()
            (target / "fs" / "arriving").write_bytes(data)
            for piece in decompressor.feed(data):
                tar += piece
        for piece in decompressor.finish():
            tar += piece
        (target / "fs" / "arriving").unlink(missing_ok=True)
        with tarfile.open(fileobj=io.BytesIO(tar)) as members:
            names = members.getnames()
            # Debian 12's Python has no filters yet.
            members.extraction_filter = getattr(tarfile, "data_filter", None)
            members.extractall(target / "fs")
        (target / "entries").write_text(json.dumps({"names": names, "lower": lower is not None}))
        self.before_return()
        return Unpacked(
            diff_id=DiffID(digest_of(bytes(tar))),
            size=len(tar),
            entries=len(names),
            assumed=(b"", b"etc") if "assumes" in names and lower is None else (),
            needs_lower="needs-lower" in names and lower is None,
            incomplete=False,
        )

    def fits(self, assumed: tuple[bytes, ...], lower: object) -> bool:
        return not assumed or self.assumption


class Watched:
    """The real unpacker. It counts its calls and the bytes of the last one.

    Attributes:
        began: Number of calls.
        read: Number of bytes read in the last call.
        reached: A number of read bytes, and the event to set then.
    """

    def __init__(self) -> None:
        self.began = 0
        self.read = 0
        self.reached: tuple[int, trio.Event] = (0, trio.Event())

    def unpack(self, read: Callable[[int], bytes], target: Path, **options: object) -> Unpacked:
        self.began += 1
        self.read = 0

        def reading(size: int) -> bytes:
            data = read(size)
            self.read += len(data)
            wanted, event = self.reached
            if self.read >= wanted and not event.is_set():
                trio.from_thread.run_sync(event.set)
            return data

        return unpack(reading, target, **options)  # type: ignore[arg-type]

    def fits(self, assumed: tuple[bytes, ...], lower: MergedTree) -> bool:
        return assumptions_hold(assumed, lower)


@asynccontextmanager
async def opened(
    path: Path, unpacker: TarUnpacker | Watched | None = None
) -> AsyncIterator[DirectoryStore]:
    """Open a store with this unpacker, or else a `TarUnpacker`, in threads."""
    unpacker = unpacker or TarUnpacker()
    _UNPACKERS.append(unpacker)
    _replace_unpacker()
    try:
        async with open_with_threads(path) as store:
            yield store
    finally:
        _UNPACKERS.remove(unpacker)
        _replace_unpacker()


_UNPACKERS: list[TarUnpacker | Watched] = []
"""The unpackers of the open stores. They all have the newest one, so tests use one at a time."""


def _replace_unpacker() -> None:
    newest = _UNPACKERS[-1] if _UNPACKERS else None
    unpacking.unpack = newest.unpack if newest else unpack
    trees.assumptions_hold = newest.fits if newest else assumptions_hold


def open_with_threads(path: Path) -> AbstractAsyncContextManager[DirectoryStore]:
    """Open a store whose unpacker runs in threads of this process."""
    return open_with_builder(path, Threads(Limits()))


async def ingest(store: DirectoryStore, data: bytes) -> Descriptor:
    """Put a blob into the store, from the bytes already received to its end."""
    descriptor = describe(data)
    async with store.ingest(descriptor) as sink:
        if not sink.committed:
            await sink.write(data[sink.offset :])
            await sink.commit()
    return descriptor


async def put_sample_image(store: DirectoryStore, reference: str, blob: Blob) -> str:
    """Put an image of one layer that other tools can read, and return its manifest's digest."""
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": ["A=b"]},
            "rootfs": {"type": "layers", "diff_ids": [blob.diff_id]},
        }
    ).encode()
    config_descriptor = describe(config, "application/vnd.oci.image.config.v1+json")
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _as_json(config_descriptor),
            "layers": [_as_json(blob.descriptor)],
        }
    ).encode()
    manifest_descriptor = describe(manifest, "application/vnd.oci.image.manifest.v1+json")
    await store.put_blob(config_descriptor, config)
    await store.put_blob(manifest_descriptor, manifest)
    layer = await store.register(Stream(blob.data), None, blob.descriptor)
    await store.put_image(
        reference,
        manifest=manifest_descriptor,
        config=config_descriptor,
        platform="linux/amd64",
        chain_id=layer.chain_id,
    )
    store.release(layer)
    return manifest_descriptor.digest


def _as_json(descriptor: Descriptor) -> dict[str, object]:
    return {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
    }


def snapshot(path: Path) -> dict[str, bytes | None]:
    """Return all files below a directory, with their contents."""
    return {
        os.fspath(found.relative_to(path)): found.read_bytes() if found.is_file() else None
        for found in sorted(path.rglob("*"))
    }


def visible(path: Path) -> list[str]:
    """Return the names of visible blobs and trees."""
    return sorted(
        f"{kind}/{name}"
        for kind in ("blobs", "trees")
        for name in os.listdir(path / kind / "sha256")
    )


def arriving(path: Path) -> list[str]:
    """Return the names in ``ingest/``."""
    return sorted(os.listdir(path / "ingest"))


@contextmanager
def mounted_tmpfs(path: Path, options: str = "rw") -> Iterator[None]:
    """Mount a tmpfs. Skip the test if mounting is forbidden."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", path]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("kernel: mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)
