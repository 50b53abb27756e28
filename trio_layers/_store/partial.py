"""The file of a blob that is arriving: appended to, hashed, and resumed after a break."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Final, final

import trio

from .._digest import Digest
from .._disk_errors import disk_errors
from .._errors import VerificationError
from .._files import lock_written, unlock_written
from .._manifest import Descriptor
from .._workers.arrival_state import ArrivalState

__all__ = ["CHUNK", "Partial", "resume_partial", "verify_partial", "wrong_blob_error"]

CHUNK: Final = 1024 * 1024
"""Number of bytes to hash and write at once in a worker thread.

A write may have to wait for the disk, and a switch to a thread and back costs as much as hashing
100 KiB.
"""


@final
class Partial:
    """The received bytes of a blob, and their digest. Blocking: for worker threads.

    A new `Partial` hashes the file's earlier bytes again, since the state of a hash cannot be
    stored.

    Attributes:
        path: The file.
        size: Number of bytes received.
        since: `Commits.failures` before the first of them was written.
        arrival_state: Shows the size to the worker that unpacks the blob meanwhile.
    """

    def __init__(self, path: Path, *, since: int, fresh: bool = False) -> None:
        """Open or create the file; with ``fresh``, drop its bytes."""
        self.path: Path = path
        self.size: int = 0
        self.since: int = since
        self.arrival_state: ArrivalState = ArrivalState()
        self._hash = hashlib.sha256()
        self._torn = False  # the file may have more bytes than `size`
        with disk_errors(path.parent):
            self._file = io.FileIO(path, "wb" if fresh else "a+b")
        try:
            # The lock on the digest is not enough: a cleaning program may remove its file.
            lock_written(self._file.fileno(), path)
            if not fresh:
                self._hash_again()
        except BaseException:
            self.close()
            raise

    def digest(self, behind: Iterable[bytes] = ()) -> Digest:
        """Return the digest of the received bytes, followed by the bytes ``behind``."""
        whole = self._hash.copy()
        for data in behind:
            whole.update(data)
        return Digest(f"sha256:{whole.hexdigest()}")

    def matches(self, descriptor: Descriptor) -> bool:
        """Return whether size and digest are those of the descriptor."""
        return self.size == descriptor.size and self.digest() == descriptor.digest

    def append(self, *pieces: bytes) -> None:
        """Write all of ``pieces``, or raise and leave the file as it was."""
        with disk_errors(self.path.parent):
            self._repair()
            self._torn = True
            try:
                for piece in pieces:
                    rest = memoryview(piece)
                    while rest:
                        rest = rest[self._file.write(rest) :]
            except BaseException:
                self._repair()
                raise
            self._torn = False
        for piece in pieces:
            self._count(piece)
        self.arrival_state.grow(self.size)

    def restart(self) -> None:
        """Drop all received bytes."""
        self.arrival_state.start_over()
        with disk_errors(self.path.parent):
            self._truncate(0)
        self._torn = False
        self.size = 0
        self._hash = hashlib.sha256()

    def distrust(self, since: int) -> None:
        """Drop all received bytes after a failed sync; ignore errors of the disk.

        The disk may have lost some of the bytes, and does not report a loss twice.
        """
        self.arrival_state.start_over()
        self.since = since
        self.size = 0
        self._hash = hashlib.sha256()
        self._torn = True
        with contextlib.suppress(OSError):
            self._repair()

    def close(self) -> None:
        """Close the file; its bytes stay."""
        if not self._file.closed:
            unlock_written(self._file.fileno())
        self._file.close()

    def _hash_again(self) -> None:
        with disk_errors(self.path.parent):
            self._file.seek(0)
            while data := self._file.read(CHUNK):
                trio.from_thread.check_cancelled()
                self._count(data)
        self.arrival_state.grow(self.size)

    def _count(self, data: bytes) -> None:
        self.size += len(data)
        self._hash.update(data)

    def _repair(self) -> None:
        # On a full disk, truncation may fail, too. The next call then tries again.
        if self._torn:
            self._truncate(self.size)
            self._torn = False

    def _truncate(self, size: int) -> None:
        self._file.seek(size)
        self._file.truncate()


def resume_partial(path: Path, descriptor: Descriptor, since: int) -> Partial:
    """Open the file of an earlier attempt, or a new one. Blocking.

    Bytes that cannot be the beginning of the blob are dropped.
    """
    partial = Partial(path, since=since)
    try:
        if partial.size >= descriptor.size and not partial.matches(descriptor):
            partial.restart()
    except BaseException:
        partial.close()
        raise
    return partial


def verify_partial(partial: Partial, descriptor: Descriptor) -> None:
    """Compare a complete blob with its descriptor. Blocking.

    Raises:
        VerificationError: if size or digest differ; the received bytes are dropped.
    """
    if not partial.matches(descriptor):
        error = wrong_blob_error(descriptor, partial.digest(), partial.size)
        partial.restart()
        raise error


def wrong_blob_error(descriptor: Descriptor, digest: Digest, size: int) -> VerificationError:
    """Return the error for received bytes that are not the blob."""
    return VerificationError(
        f"blob {descriptor.digest} does not match its descriptor: expected "
        f"{descriptor.size} bytes, received {size} bytes with digest {digest}",
        digest=descriptor.digest,
    )
