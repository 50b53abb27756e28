"""From a layer's blob to a tree, in one blocking function for a worker thread."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self, final

import attrs

from .._compression import PIECE, Decompressor
from .._digest import DiffID, Digest
from .._entries import Entry, Summary, summary_line
from .._errors import LimitExceeded
from ..abc import LowerTree
from .nodes import Powers, naming, probe
from .tar import Limits, TarReader
from .tree import TreeWriter, implied_directory

__all__ = ["Limits", "Unpacked", "holds", "unpack"]

# A larger slice gains nothing; a smaller one keeps cancellation near.
_SLICE: Final = 256 * 1024


@attrs.frozen(kw_only=True)
class Unpacked:
    """A layer that was unpacked.

    Attributes:
        diff_id: The digest of its tar.
        size: The tar's length in bytes, all that follows its end included.
        entries: How many entries the tar had.
        assumed: What must be so below for the tree to fit (see `holds`). Empty if the layer was
            unpacked on top of its parent.
        needs_lower: The tree is not whole: the layer must be unpacked on top of its parent.
        incomplete: Something could not be set for lack of privilege; the list of entries has it.
    """

    diff_id: DiffID
    size: int
    entries: int
    assumed: tuple[bytes, ...]
    needs_lower: bool
    incomplete: bool


def _never() -> None:
    pass


def unpack(
    read: Callable[[int], bytes],
    target: Path,
    *,
    lower: LowerTree | None = None,
    limits: Limits = Limits(),  # noqa: B008  a frozen value
    check_cancelled: Callable[[], None] = _never,
) -> Unpacked:
    """Unpack a layer; blocks, so it is for a worker thread.

    Args:
        read: Gives at most as many bytes of the blob as it is asked for, ``b""`` at its end.
            It may wait. What it raises comes out as it is.
        target: An existing, empty directory of ours alone; ``fs`` and ``entries`` are made in it.
            After an error they are left as they are, and are worth nothing.
        lower: What is below the layer. Without it the tree depends on the blob alone, and fits
            wherever `holds` says so; with it, it is for this parent only.
        limits: How much the layer may hold.
        check_cancelled: Called at each chunk and entry; what it raises comes out as it is.

    Raises:
        DecompressionError: if the beginning of the blob is no valid compressed data.
        UnpackError: if the layer is damaged or holds something that must not be unpacked.
        LimitExceeded: if it holds more than ``limits``.
        StoreError: if the file system cannot take it.
    """
    with naming(os.fsencode(target)):
        os.mkdir(target / "fs", 0o755)
        root = os.open(target / "fs", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with naming(os.fsencode(target)):
            powers = probe(root)
            log = _Log(target / "entries")
        with log:
            source = _Source(read, limits, check_cancelled)
            return _unpack(source, root, powers, lower, limits, log.write)
    finally:
        os.close(root)


def _unpack(
    source: _Source,
    root: int,
    powers: Powers,
    lower: LowerTree | None,
    limits: Limits,
    log: Callable[[bytes], object],
) -> Unpacked:
    tree = TreeWriter(root, powers=powers, lower=lower, limits=limits, log=log, check=source.check)
    try:
        entries = 0
        content = 0
        reader = TarReader(source, limits)
        for member in reader:
            source.check()
            entries += 1
            content += member.size
            if entries > limits.max_entries:
                raise LimitExceeded(
                    f"more entries than the limit max_entries, {limits.max_entries}, allows"
                )
            source.allow(content)
            tree.add(member, reader.data())
        source.drain()
        tree.finish()
    finally:
        tree.close()
    unpacked = Unpacked(
        diff_id=source.diff_id,
        size=source.size,
        entries=entries,
        assumed=tree.assumed,
        needs_lower=tree.needs_lower,
        incomplete=tree.incomplete,
    )
    log(summary_line(Summary(**attrs.asdict(unpacked, recurse=False))))
    return unpacked


def holds(assumed: Iterable[bytes], lower: LowerTree) -> bool:
    """Whether a tree that was unpacked without its parent fits on this one.

    Args:
        assumed: What must be so. A path stands for a directory that had to be made without an
            entry: below it is not there, or is a directory with the metadata it was made with.
            A path with a slash at its end stands for one that has whiteouts in it: below it is a
            directory.
        lower: The parent, with all that is below it.
    """
    assumed = tuple(assumed)
    there = lower.survey(path.removesuffix(b"/") for path in assumed)
    for path in assumed:
        below = there[path.removesuffix(b"/")]
        if path.endswith(b"/"):
            if below is None or below.type != "dir":
                return False
        elif below is not None and _differs(below):
            return False
    return True


def _differs(below: Entry) -> bool:
    made = implied_directory(below.path)
    return (below.type, below.mode, below.uid, below.gid, below.xattrs) != (
        made.type,
        made.mode,
        made.uid,
        made.gid,
        made.xattrs,
    )


@final
class _Log:
    """The file ``entries``. After an error it is closed as it is: to write what is still held
    could fail, too, and would stand in the place of that error."""

    def __init__(self, path: Path) -> None:
        self._raw = io.FileIO(path, "xb")
        self._file = io.BufferedWriter(self._raw, PIECE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._raw.close()
            return
        with naming(b"entries"):
            self._file.close()

    def write(self, line: bytes) -> None:
        with naming(b"entries"):
            self._file.write(line)


@final
class _Source:
    """The plain bytes of a blob: read, inflated, counted and hashed as they are asked for."""

    def __init__(
        self, read: Callable[[int], bytes], limits: Limits, check: Callable[[], None]
    ) -> None:
        self.check = check
        self.size = 0
        self._read = read
        self._limits = limits
        self._hash = hashlib.sha256()
        self._plain = self._inflate()
        self._held = memoryview(b"")

    @property
    def diff_id(self) -> DiffID:
        """The digest of all that was read so far."""
        return DiffID(Digest(f"sha256:{self._hash.hexdigest()}"))

    def allow(self, size: int) -> None:
        """Raise unless so many bytes are within the limits."""
        if size > self._limits.max_unpacked_bytes:
            raise LimitExceeded(
                "more bytes, unpacked, than the limit max_unpacked_bytes, "
                f"{self._limits.max_unpacked_bytes}, allows"
            )

    def read(self, size: int) -> bytes:
        """``size`` plain bytes, fewer only at the end."""
        if len(self._held) >= size:
            taken, self._held = self._held[:size], self._held[size:]
            return bytes(taken)
        return b"".join(self.pieces(size))

    def pieces(self, size: int) -> Iterator[bytes]:
        """``size`` plain bytes as they come, fewer only at the end."""
        while size > 0:
            if not self._held:
                piece = next(self._plain, b"")
                if not piece:
                    return
                self._held = memoryview(piece)
            taken, self._held = self._held[:size], self._held[size:]
            size -= len(taken)
            yield bytes(taken)

    def drain(self) -> None:
        """Read on to the end: a diff ID covers what follows the archive, too."""
        self._held = memoryview(b"")
        for _ in self._plain:
            pass

    def _inflate(self) -> Iterator[bytes]:
        decompressor = Decompressor()
        while data := self._read(_SLICE):
            # Not all input gives output.
            self.check()
            yield from self._count(decompressor.feed(data))
        yield from self._count(decompressor.finish())

    def _count(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self.check()
            self.size += len(piece)
            self.allow(self.size)
            self._hash.update(piece)
            yield piece
