"""Unpacks a layer's blob to a tree, in one blocking function for a worker."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, final

import attrs

from .._compression import PIECE
from .._entries import Summary, summary_line
from .._tar.decompressed import DecompressedBlob
from .._tar.limits import Limits
from .._tar.reader import TarReader
from .capabilities import Capabilities, probe
from .inodes import translate_os_errors, unpack_error
from .unpacked import Unpacked
from .writer import TreeWriter

if TYPE_CHECKING:
    from ..abc import LowerTree

__all__ = ["unpack"]


def _do_nothing() -> None:
    pass


def unpack(
    read: Callable[[int], bytes],
    target: Path,
    *,
    lower: LowerTree | None = None,
    limits: Limits = Limits(),  # noqa: B008  a frozen value
    check_cancelled: Callable[[], None] = _do_nothing,
    read_ahead: bool = False,
    no_umask: bool = False,
) -> Unpacked:
    """Unpack a layer. The function blocks, so call it in a worker.

    Args:
        read: Returns at most as many bytes of the blob as requested, and ``b""`` at its end.
            It may block. What it raises comes out as it is.
        target: An existing, empty directory that no other process uses. The function makes ``fs``
            and ``entries`` in it. After an error they remain, but must not be used.
        lower: The merged trees below the layer. Without them the tree depends only on the blob,
            and is valid on each parent for which `assumptions_hold`. With them, the tree is valid
            only on this parent.
        limits: Limits on the layer's size.
        check_cancelled: Called at each chunk and entry; what it raises comes out as it is.
        read_ahead: Whether a separate thread reads, decompresses and hashes ahead of writing.
            This makes one large layer faster if a core is free for it. In every case, the
            function returns only after ``read`` has.
        no_umask: Whether this process has no umask and no code in it sets one. Then new files get
            their modes at once.

    Raises:
        DecompressionError: If the beginning of the blob is not valid compressed data.
        UnpackError: If the layer is damaged or contains an entry that must not be unpacked. The
            message names the entry.
        LimitExceeded: If the layer exceeds ``limits``.
        StoreError: If the file system cannot store the tree.
    """
    with translate_os_errors(os.fsencode(target)):
        os.mkdir(target / "fs", 0o755)
        root = os.open(target / "fs", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with translate_os_errors(os.fsencode(target)):
            capabilities = probe(root)
            if not no_umask:
                capabilities = attrs.evolve(capabilities, exact_modes=False)
            log = _EntriesFile(target / "entries")
        source = DecompressedBlob(read, limits, check_cancelled, read_ahead=read_ahead)
        with log, contextlib.closing(source):
            return _write_tree(source, root, capabilities, lower, limits, log.write)
    finally:
        os.close(root)


def _write_tree(
    source: DecompressedBlob,
    root: int,
    capabilities: Capabilities,
    lower: LowerTree | None,
    limits: Limits,
    log: Callable[[bytes], object],
) -> Unpacked:
    tree = TreeWriter(
        root,
        capabilities=capabilities,
        lower=lower,
        limits=limits,
        log=log,
        check_cancelled=source.check_cancelled,
    )
    try:
        entries = 0
        reader = TarReader(source, limits)
        for member in reader:
            source.check_cancelled()
            source.entry_name = member.name
            entries += 1
            tree.count(member.name)
            if member.size:
                source.require_room(reader.remaining, reader.holes)
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
        foreign_only=tree.foreign_only,
    )
    log(summary_line(Summary(**attrs.asdict(unpacked, recurse=False))))
    return unpacked


@final
class _EntriesFile:
    """The file ``entries`` during writing.

    After an error, the buffered lines are dropped: to write them could fail, too, and the second
    error would hide the first.
    """

    def __init__(self, path: Path) -> None:
        # The mode of the file must not depend on the umask.
        self._raw = io.FileIO(path, "xb", opener=lambda path, flags: os.open(path, flags, 0o600))
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
        with translate_os_errors(b"entries"):
            self._file.close()

    def write(self, line: bytes) -> None:
        try:
            self._file.write(line)
        except OSError as error:
            raise unpack_error(error, b"entries") from error
