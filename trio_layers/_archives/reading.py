"""Reads the files of an archive or a layout, and adds blobs to the store.

An archive may be a stream, so it is read once, front to back. Its list of images may be its last
member. So small documents are kept in memory, up to `MAX_HELD` bytes, and other files go into a
batch of blobs. Of the batch, only the blobs that belong to images become visible in the store.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol, TypeAlias, final

import attrs
import trio

from .._compression import detect_compression
from .._digest import Digest, digest_of
from .._errors import (
    ArchiveError,
    DecompressionError,
    LimitExceeded,
    UnpackError,
    VerificationError,
)
from .._manifest import MAX_DOCUMENT_SIZE
from .._printable import printable_value
from .._store.batch import Batch
from .._store.directory import DirectoryStore
from .._store.leases import Lease
from .._tar.decompressed import DecompressedBlob
from .._tar.limits import Limits
from .._tar.reader import ContentPiece, Member, TarReader
from .documents import (
    DOCKER,
    INDEX,
    LAYOUT,
    VERSION,
    claimed_digest,
    link_target,
    normalise_path,
)

__all__ = [
    "Archive",
    "ArchiveSource",
    "BlobImporter",
    "LayoutDirectory",
    "SourceFile",
    "open_source",
]

MAX_HELD: Final = 64 * 1024 * 1024
"""The limit on the bytes of documents of one archive that are held in memory."""

MAX_MEMBERS: Final = 100_000
MAX_PATH: Final = 1024
"""Tools write fewer members and shorter paths. The two limits bound the memory for names."""

_MAX_LINKS: Final = 40  # as in Linux
_DOCUMENTS: Final = frozenset({LAYOUT, INDEX, DOCKER, VERSION})
_HEAD: Final = 10
_PIECE: Final = 256 * 1024
_ZEROS: Final = bytes(_PIECE)


@attrs.frozen
class SourceFile:
    """A file of a source.

    Attributes:
        digest: The verified digest of its content.
        size: Its size in bytes.
        compression: Its compression, recognised by its first bytes; ``None``: uncompressed.
        data: Its content, if it is held in memory; otherwise it is in the store or in the batch.
    """

    digest: Digest
    size: int
    compression: str | None
    data: bytes | None = attrs.field(default=None, repr=False)


@attrs.frozen
class _Link:
    target: str


_Found: TypeAlias = SourceFile | _Link


class ArchiveSource(Protocol):
    """An archive or a layout from which images are imported.

    Attributes:
        name: Its name, for messages.
    """

    name: str

    async def read(self, path: str) -> bytes | None:
        """Read a document; ``None`` if the source lacks it.

        Raises:
            ArchiveError: if it is larger than a document may be.
        """
        ...

    async def digest(self, path: str) -> Digest | None:
        """The digest of a document; ``None`` if the source lacks it."""
        ...

    async def take(self, path: str) -> SourceFile | None:
        """Add a file to the batch, unless the store has it; ``None`` if the source lacks it."""
        ...

    async def names(self) -> list[str]:
        """Some of its files, for messages."""
        ...


@final
@attrs.frozen
class BlobImporter:
    """Adds blobs to a store. `find` and `add` block, and are for worker threads.

    Attributes:
        store: The store.
        batch: Takes the blobs that the store lacks.
        lease: Holds the blobs that the store has.
    """

    store: DirectoryStore
    batch: Batch
    lease: Lease

    def find(self, digest: Digest) -> SourceFile | None:
        """Find a blob in the store, and hold it there."""
        path = trio.from_thread.run(self._find, digest)
        if path is None:
            return None
        with open(path, "rb") as file:
            head = file.read(_HEAD)
            return SourceFile(digest, os.fstat(file.fileno()).st_size, detect_compression(head))

    def add(self, pieces: Iterable[ContentPiece]) -> SourceFile:
        """Add a blob to the batch."""
        head = b""

        def watched() -> Iterator[bytes | memoryview]:
            nonlocal head
            for piece in _fill_holes(pieces):
                if len(head) < _HEAD:
                    head += piece[:_HEAD]
                yield piece

        digest, size = self.batch.add(watched())
        return SourceFile(digest, size, detect_compression(head))

    async def add_document(self, digest: Digest, data: bytes) -> None:
        """Add a blob that is in memory, unless the store has it."""
        if await self._find(digest) is None:
            await trio.to_thread.run_sync(self.batch.add, [data])

    async def _find(self, digest: Digest) -> Path | None:
        await self.lease.hold(digest)
        return await self.store.whole_blob(digest)


async def open_source(
    source: str | os.PathLike[str] | trio.abc.ReceiveStream, blobs: BlobImporter, limits: Limits
) -> ArchiveSource:
    """Read an archive, or open a layout.

    Args:
        source: A path or a stream.
        blobs: Takes the blobs.
        limits: The limits on a layer of the store. ``max_unpacked_bytes`` holds for every member
            of an archive, since any of them may turn out to be a layer.

    Raises:
        ArchiveError: if it is neither, or damaged.
        VerificationError: if a blob does not match the digest in its path.
        OSError: if it cannot be read.
        StoreError: if the store's disk fails.
        Exception: any error that the stream raises.
    """
    # Reading may wait for a stream without end. With a limiter of its own it takes no thread from
    # the limiter of other calls.
    limiter = trio.CapacityLimiter(1)
    if isinstance(source, trio.abc.ReceiveStream):
        stream = source

        def read(size: int) -> bytes:
            return bytes(trio.from_thread.run(stream.receive_some, size))

        return await trio.to_thread.run_sync(
            Archive, "the stream", read, blobs, limits, limiter=limiter
        )
    return await trio.to_thread.run_sync(_open_path, Path(source), blobs, limits, limiter=limiter)


def _open_path(path: Path, blobs: BlobImporter, limits: Limits) -> ArchiveSource:
    if path.is_dir():
        return LayoutDirectory(path, blobs)
    with _open_file(path) as file:

        def read(size: int) -> bytes:
            trio.from_thread.check_cancelled()
            return file.read(size)

        return Archive(os.fspath(path), read, blobs, limits)


def _open_file(path: Path) -> io.FileIO:
    """Open a regular file, without waiting for the writer of a FIFO."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ArchiveError(f"{path} is neither a file nor a directory: pass it as a stream")
    return io.FileIO(descriptor, "rb")


@final
class Archive:
    """An archive. The constructor reads it, and blocks: call it in a worker thread."""

    def __init__(
        self, name: str, read: Callable[[int], bytes], blobs: BlobImporter, limits: Limits
    ) -> None:
        self.name = name
        self._blobs = blobs
        self._items: dict[str, _Found] = {}
        self._held = 0
        # An archive holds several layers, and its own paths are no paths of a layer. So only the
        # ratio and the window of the store's limits apply to the whole archive.
        whole = Limits(
            max_ratio=limits.max_ratio,
            max_ratio_from=limits.max_ratio_from,
            max_window=limits.max_window,
        )
        source = DecompressedBlob(read, whole, trio.from_thread.check_cancelled)
        members = 0
        try:
            reader = TarReader(source, whole)
            for member in reader:
                members += 1
                if members > MAX_MEMBERS:
                    raise ArchiveError(f"{name} has more than {MAX_MEMBERS} members")
                source.entry_name = member.name
                # Documents have their own limit, MAX_DOCUMENT_SIZE. So a member up to that size
                # passes here even if max_unpacked_bytes is smaller.
                if member.size > max(limits.max_unpacked_bytes, MAX_DOCUMENT_SIZE):
                    raise LimitExceeded(
                        f"{printable_value(os.fsdecode(member.name))}: a file of {member.size} "
                        f"bytes; the limit max_unpacked_bytes is {limits.max_unpacked_bytes}"
                    )
                if member.size:
                    source.require_room(reader.remaining, reader.holes)
                self._add(member, reader.data())
            # After the end of a tar, padding and a checksum of the compression may follow. The
            # checksum is verified, and the writer of a pipe gets no EPIPE.
            source.drain()
        except LimitExceeded as error:
            raise ArchiveError(f"{name} exceeds a limit of the store: {error}") from error
        except (DecompressionError, UnpackError) as error:
            raise ArchiveError(f"{name} is not an image archive, or is damaged: {error}") from error
        if not self._items:
            raise ArchiveError(f"{name} is not an image archive: it is empty")

    async def read(self, path: str) -> bytes | None:
        item = self._find(path)
        if item is None:
            await trio.lowlevel.checkpoint()
            return None
        if item.data is not None:
            await trio.lowlevel.checkpoint()
            return item.data
        if item.size > MAX_DOCUMENT_SIZE:
            raise ArchiveError(
                f"{self.name}: {printable_value(path)} is larger than {MAX_DOCUMENT_SIZE} bytes"
            )
        if item.digest in self._blobs.batch:
            return await trio.to_thread.run_sync(self._blobs.batch.read, item.digest)
        return await self._blobs.store.read_blob(item.digest)

    async def digest(self, path: str) -> Digest | None:
        await trio.lowlevel.checkpoint()
        item = self._find(path)
        return None if item is None else item.digest

    async def take(self, path: str) -> SourceFile | None:
        item = self._find(path)
        if item is None or item.data is None:
            await trio.lowlevel.checkpoint()
        else:
            await self._blobs.add_document(item.digest, item.data)
        return item

    async def names(self) -> list[str]:
        await trio.lowlevel.checkpoint()
        return sorted(self._items)[:10]

    def _find(self, path: str) -> SourceFile | None:
        found = self._items.get(path)
        for _ in range(_MAX_LINKS):
            if not isinstance(found, _Link):
                return found
            found = self._items.get(found.target)
        raise ArchiveError(f"{self.name}: the links from {printable_value(path)} form a loop")

    def _add(self, member: Member, data: Iterator[ContentPiece]) -> None:
        if member.type not in ("file", "symlink", "hardlink"):
            return
        if len(member.name) > MAX_PATH or len(member.linkname) > MAX_PATH:
            raise ArchiveError(f"{self.name} has a path of more than {MAX_PATH} bytes")
        key = normalise_path(os.fsdecode(member.name))
        target = os.fsdecode(member.linkname)
        found: _Found
        match member.type:
            case "file":
                found = self._read_file(key, member.size, data)
            case "symlink":
                found = _Link(link_target(key, target))
            case _:
                found = _Link(normalise_path(target))
        # Of two members with one name, some readers take the first and others the last.
        if self._items.setdefault(key, found) != found:
            raise ArchiveError(f"{self.name} has {printable_value(key)} twice")

    def _read_file(self, key: str, size: int, data: Iterator[ContentPiece]) -> SourceFile:
        claimed = claimed_digest(key)
        if size > MAX_DOCUMENT_SIZE:
            known = None if claimed is None else self._blobs.find(claimed)
            item = known or self._blobs.add(data)
        else:
            item = self._read_small(b"".join(_fill_holes(data)))
        return item

    def _read_small(self, data: bytes) -> SourceFile:
        beginning = data[:64].lstrip()[:1]
        if beginning not in (b"", b"{", b"[") or self._held + len(data) > MAX_HELD:
            return self._blobs.add([data])
        self._held += len(data)
        return SourceFile(digest_of(data), len(data), detect_compression(data[:_HEAD]), data)


@final
class LayoutDirectory:
    """An OCI layout in a directory. Its files are read when they are needed."""

    def __init__(self, path: Path, blobs: BlobImporter) -> None:
        self.name = os.fspath(path)
        self._path = path
        self._blobs = blobs

    async def read(self, path: str) -> bytes | None:
        return await trio.to_thread.run_sync(self._read, path)

    async def digest(self, path: str) -> Digest | None:
        def read() -> Digest | None:
            data = self._read(path)
            return None if data is None else digest_of(data)

        return await trio.to_thread.run_sync(read)

    async def take(self, path: str) -> SourceFile | None:
        return await trio.to_thread.run_sync(self._take, path)

    async def names(self) -> list[str]:
        return await trio.to_thread.run_sync(lambda: sorted(os.listdir(self._path))[:10])

    def _read(self, path: str) -> bytes | None:
        if path not in _DOCUMENTS and claimed_digest(path) is None:
            return None  # a docker-archive's path may lead outside the directory: do not open it
        try:
            with _open_file(self._path / path) as file:
                # One more byte shows whether the file is larger than a document may be.
                data = b"".join(_pieces(file, MAX_DOCUMENT_SIZE + 1))
        except FileNotFoundError:
            return None
        if len(data) > MAX_DOCUMENT_SIZE:
            raise ArchiveError(
                f"{self.name}: {printable_value(path)} is larger than {MAX_DOCUMENT_SIZE} bytes"
            )
        return data

    def _take(self, path: str) -> SourceFile | None:
        claimed = claimed_digest(path)
        if claimed is None:
            return None
        known = self._blobs.find(claimed)
        if known is not None:
            return known
        try:
            with _open_file(self._path / path) as file:
                item = self._blobs.add(_pieces(file, os.fstat(file.fileno()).st_size))
        except FileNotFoundError:
            return None
        if item.digest != claimed:
            raise VerificationError(
                f"{self.name}: {path} is damaged: its content has the digest {item.digest}",
                digest=claimed,
            )
        return item


def _pieces(file: io.FileIO, size: int) -> Iterator[bytes]:
    while size > 0 and (data := file.read(min(size, _PIECE))):
        trio.from_thread.check_cancelled()
        size -= len(data)
        yield data


def _fill_holes(content: Iterable[ContentPiece]) -> Iterator[bytes | memoryview]:
    """Replace the holes in a file's content by zeros."""
    for piece in content:
        if not isinstance(piece, int):
            yield piece
            continue
        while piece > 0:
            trio.from_thread.check_cancelled()
            yield _ZEROS[:piece]
            piece -= len(_ZEROS)
