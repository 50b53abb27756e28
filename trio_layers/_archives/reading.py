"""What is in a source of images, whatever the source is: documents, and blobs for the store.

An archive is read once, front to back, since it may be a stream. What it is of turns out in the
end, so small documents are kept in memory, up to a sum, and all else goes into a batch of blobs,
of which only what images consist of is ever visible in the store.
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
    key_of,
    link_target,
)

__all__ = ["Archive", "Item", "LayoutDirectory", "Shelf", "Source", "open_source"]

MAX_HELD: Final = 64 * 1024 * 1024
"""How many bytes of documents of one archive are held in memory."""

MAX_MEMBERS: Final = 100_000
MAX_PATH: Final = 1024
"""More, or longer, than any tool writes; together they bound what names take of memory."""

_MAX_LINKS: Final = 40  # as in Linux
_DOCUMENTS: Final = frozenset({LAYOUT, INDEX, DOCKER, VERSION})
_HEAD: Final = 10
_PIECE: Final = 256 * 1024
_ZEROS: Final = bytes(_PIECE)


@attrs.frozen
class Item:
    """A file of a source.

    Attributes:
        digest: What it hashes to; verified.
        size: In bytes.
        compression: How it is compressed, by its first bytes; ``None``: not at all.
        data: All of it, if it is held in memory; else it is in the store or in the batch.
    """

    digest: Digest
    size: int
    compression: str | None
    data: bytes | None = attrs.field(default=None, repr=False)


@attrs.frozen
class _Link:
    target: str


_Found: TypeAlias = Item | _Link


class Source(Protocol):
    """Where images come from.

    Attributes:
        name: What it is called, for messages.
    """

    name: str

    async def read(self, path: str) -> bytes | None:
        """A document; ``None`` if there is none.

        Raises:
            ArchiveError: if it is larger than a document may be.
        """
        ...

    async def digest(self, path: str) -> Digest | None:
        """The digest of a document; ``None`` if the source lacks it."""
        ...

    async def take(self, path: str) -> Item | None:
        """A file that the store shall have: it is there, or in the batch, now."""
        ...

    async def names(self) -> list[str]:
        """Some of what there is, for messages."""
        ...


@final
@attrs.frozen
class Shelf:
    """Where blobs go. `find` and `add` block, and are for worker threads.

    Attributes:
        store: What they are for.
        batch: Takes in those that the store does not have.
        lease: LeaseCounts those that it has.
    """

    store: DirectoryStore
    batch: Batch
    lease: Lease

    def find(self, digest: Digest) -> Item | None:
        """The blob if it is in the store, where it then stays."""
        path = trio.from_thread.run(self._find, digest)
        if path is None:
            return None
        with open(path, "rb") as file:
            head = file.read(_HEAD)
            return Item(digest, os.fstat(file.fileno()).st_size, detect_compression(head))

    def add(self, pieces: Iterable[ContentPiece]) -> Item:
        """Take a blob in."""
        head = b""

        def watched() -> Iterator[bytes | memoryview]:
            nonlocal head
            for piece in _plain(pieces):
                if len(head) < _HEAD:
                    head += piece[:_HEAD]
                yield piece

        digest, size = self.batch.add(watched())
        return Item(digest, size, detect_compression(head))

    async def keep(self, digest: Digest, data: bytes) -> None:
        """Take in a blob that is in memory."""
        if await self._find(digest) is None:
            await trio.to_thread.run_sync(self.batch.add, [data])

    async def _find(self, digest: Digest) -> Path | None:
        await self.lease.hold(digest)
        return await self.store.whole_blob(digest)


async def open_source(
    source: str | os.PathLike[str] | trio.abc.ReceiveStream, shelf: Shelf, limits: Limits
) -> Source:
    """Read an archive, or find a layout.

    Args:
        source: A path or a stream.
        shelf: Takes the blobs.
        limits: The limits on a layer of the store. ``max_unpacked_bytes`` holds for every member
            of an archive, since any of them may turn out to be a layer.

    Raises:
        ArchiveError: if it is neither, or damaged.
        VerificationError: if a blob of an archive is not what it is called.
        OSError: if it cannot be read.
        StoreError: for what the store's disk does.
        Exception: what the stream raises.
    """
    # Of its own, so that any number of those who wait for their streams hold up nobody else.
    limiter = trio.CapacityLimiter(1)
    if isinstance(source, trio.abc.ReceiveStream):
        stream = source

        def read(size: int) -> bytes:
            return bytes(trio.from_thread.run(stream.receive_some, size))

        return await trio.to_thread.run_sync(
            Archive, "the stream", read, shelf, limits, limiter=limiter
        )
    return await trio.to_thread.run_sync(_open_path, Path(source), shelf, limits, limiter=limiter)


def _open_path(path: Path, shelf: Shelf, limits: Limits) -> Source:
    if path.is_dir():
        return LayoutDirectory(path, shelf)
    with _open_file(path) as file:

        def read(size: int) -> bytes:
            trio.from_thread.check_cancelled()
            return file.read(size)

        return Archive(os.fspath(path), read, shelf, limits)


def _open_file(path: Path) -> io.FileIO:
    """Open a file that reading does not wait for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ArchiveError(f"{path} is neither a file nor a directory: read it as a stream")
    return io.FileIO(descriptor, "rb")


@final
class Archive:
    """An archive that has been read. Making one blocks, in a worker thread."""

    def __init__(
        self, name: str, read: Callable[[int], bytes], shelf: Shelf, limits: Limits
    ) -> None:
        self.name = name
        self._shelf = shelf
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
                        f"{printable_value(os.fsdecode(member.name))}: a file of {member.size} bytes; "
                        f"the limit max_unpacked_bytes is {limits.max_unpacked_bytes}"
                    )
                if member.size:
                    source.require_room(reader.remaining, reader.holes)
                self._add(member, reader.data())
            # The rest is nothing, but whoever writes it wants to be rid of it, and a checksum may
            # stand in it.
            source.drain()
        except LimitExceeded as error:
            raise ArchiveError(f"{name} exceeds a limit of the store: {error}") from error
        except (DecompressionError, UnpackError) as error:
            raise ArchiveError(f"{name} is no image archive, or damaged: {error}") from error
        if not self._items:
            raise ArchiveError(f"{name} is no image archive: it is empty")

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
        if item.digest in self._shelf.batch:
            return await trio.to_thread.run_sync(self._shelf.batch.read, item.digest)
        return await self._shelf.store.read_blob(item.digest)

    async def digest(self, path: str) -> Digest | None:
        await trio.lowlevel.checkpoint()
        item = self._find(path)
        return None if item is None else item.digest

    async def take(self, path: str) -> Item | None:
        item = self._find(path)
        if item is None or item.data is None:
            await trio.lowlevel.checkpoint()
        else:
            await self._shelf.keep(item.digest, item.data)
        return item

    async def names(self) -> list[str]:
        await trio.lowlevel.checkpoint()
        return sorted(self._items)[:10]

    def _find(self, path: str) -> Item | None:
        found = self._items.get(path)
        for _ in range(_MAX_LINKS):
            if not isinstance(found, _Link):
                return found
            found = self._items.get(found.target)
        raise ArchiveError(f"{self.name}: the links from {printable_value(path)} lead in a circle")

    def _add(self, member: Member, data: Iterator[ContentPiece]) -> None:
        if member.type not in ("file", "symlink", "hardlink"):
            return
        if len(member.name) > MAX_PATH or len(member.linkname) > MAX_PATH:
            raise ArchiveError(f"{self.name}: a path of more than {MAX_PATH} bytes")
        key = key_of(os.fsdecode(member.name))
        target = os.fsdecode(member.linkname)
        found: _Found
        match member.type:
            case "file":
                found = self._file(key, member.size, data)
            case "symlink":
                found = _Link(link_target(key, target))
            case _:
                found = _Link(key_of(target))
        # Of two with one name some readers take the first, and others the last.
        if self._items.setdefault(key, found) != found:
            raise ArchiveError(f"{self.name} has {printable_value(key)} twice")

    def _file(self, key: str, size: int, data: Iterator[ContentPiece]) -> Item:
        claimed = claimed_digest(key)
        if size > MAX_DOCUMENT_SIZE:
            known = None if claimed is None else self._shelf.find(claimed)
            item = known or self._shelf.add(data)
        else:
            item = self._small(b"".join(_plain(data)))
        return item

    def _small(self, data: bytes) -> Item:
        beginning = data[:64].lstrip()[:1]
        if beginning not in (b"", b"{", b"[") or self._held + len(data) > MAX_HELD:
            return self._shelf.add([data])
        self._held += len(data)
        return Item(digest_of(data), len(data), detect_compression(data[:_HEAD]), data)


@final
class LayoutDirectory:
    """An OCI layout in a directory. Only what is asked for is read."""

    def __init__(self, path: Path, shelf: Shelf) -> None:
        self.name = os.fspath(path)
        self._path = path
        self._shelf = shelf

    async def read(self, path: str) -> bytes | None:
        return await trio.to_thread.run_sync(self._read, path)

    async def digest(self, path: str) -> Digest | None:
        def read() -> Digest | None:
            data = self._read(path)
            return None if data is None else digest_of(data)

        return await trio.to_thread.run_sync(read)

    async def take(self, path: str) -> Item | None:
        return await trio.to_thread.run_sync(self._take, path)

    async def names(self) -> list[str]:
        return await trio.to_thread.run_sync(lambda: sorted(os.listdir(self._path))[:10])

    def _read(self, path: str) -> bytes | None:
        if path not in _DOCUMENTS and claimed_digest(path) is None:
            return None  # a docker-archive's path may lead outside the directory: do not open it
        try:
            with _open_file(self._path / path) as file:
                # One byte more shows that there is more.
                data = b"".join(_pieces(file, MAX_DOCUMENT_SIZE + 1))
        except FileNotFoundError:
            return None
        if len(data) > MAX_DOCUMENT_SIZE:
            raise ArchiveError(
                f"{self.name}: {printable_value(path)} is larger than {MAX_DOCUMENT_SIZE} bytes"
            )
        return data

    def _take(self, path: str) -> Item | None:
        claimed = claimed_digest(path)
        if claimed is None:
            return None
        known = self._shelf.find(claimed)
        if known is not None:
            return known
        try:
            with _open_file(self._path / path) as file:
                item = self._shelf.add(_pieces(file, os.fstat(file.fileno()).st_size))
        except FileNotFoundError:
            return None
        if item.digest != claimed:
            raise VerificationError(
                f"{self.name}: {path} is damaged: what it holds is {item.digest}", digest=claimed
            )
        return item


def _pieces(file: io.FileIO, size: int) -> Iterator[bytes]:
    while size > 0 and (data := file.read(min(size, _PIECE))):
        trio.from_thread.check_cancelled()
        size -= len(data)
        yield data


def _plain(content: Iterable[ContentPiece]) -> Iterator[bytes | memoryview]:
    """The content of a file, with zeros for its holes."""
    for piece in content:
        if not isinstance(piece, int):
            yield piece
            continue
        while piece > 0:
            trio.from_thread.check_cancelled()
            yield _ZEROS[:piece]
            piece -= len(_ZEROS)
