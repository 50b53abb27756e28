"""Makes a layer's tree from its blob: the work of one worker, a thread or a process.

This module does not import trio, so that worker processes need not load it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import attrs

from .._digest import Digest
from .._disk_errors import removed_meanwhile, store_error
from .._errors import DecompressionError, StoreError, UnpackError, VerificationError
from .._manifest import Descriptor
from .._tar.limits import Limits
from .._tree.unpacked import Unpacked
from .arrival_state import ArrivalState, Follower

if TYPE_CHECKING:
    import trio

    from ..abc import LowerTree

__all__ = ["Arrival", "BlobReader", "Builder", "Restarts", "blob_descriptor", "build", "follow"]


class BlobReader(Protocol):
    """The compressed bytes of a layer, for `build`."""

    @property
    def failure(self) -> Exception | None:
        """The error that `read` raised, if any."""
        ...

    def read(self, size: int) -> bytes:
        """Return at most ``size`` bytes; ``b""`` at the end."""
        ...

    def check(self) -> None:
        """Raise if the tree is not needed any more."""
        ...

    def finish(self) -> tuple[Digest, int]:
        """Read to the end, and return the digest and size of all bytes."""
        ...


class Builder(Protocol):
    """Unpacks blobs while they arrive, several at once, in workers of some kind.

    Attributes:
        limiter: One token for each worker.
    """

    limiter: trio.CapacityLimiter

    @property
    def waiting(self) -> int:
        """Number of blobs that wait for a worker, including blobs that gave one back."""
        ...

    def prepare(self) -> None:
        """Start a worker for a blob that will arrive soon."""
        ...

    async def follow(self, arrival: Arrival) -> Unpacked:
        """Unpack a blob while it arrives; see the function `follow`.

        Cancellation: when the call ends, no worker writes into the arrival's ``target`` any
        more, as after any other end.

        Raises:
            Recalled, WorkerLost: if the caller must start over with an empty target.
            WorkerError: if two workers died of this blob or did not answer.
        """
        ...


def build(
    reader: BlobReader,
    target: Path,
    *,
    limits: Limits,
    lower: LowerTree | None = None,
    expected: Descriptor | None = None,
    read_ahead: bool = False,
    no_umask: bool = False,
) -> tuple[Unpacked, Descriptor]:
    """Unpack a blob into ``target``, which must not exist yet.

    For ``limits``, ``lower``, ``read_ahead`` and ``no_umask``, see `unpack`.

    Returns:
        The tree, not durable yet, and the descriptor of the bytes read.

    Raises:
        DecompressionError, UnpackError: as for `unpack`; they have the blob's digest.
        VerificationError: if the bytes are not those of ``expected``.
        StoreError: for errors of the disk.
    """
    from .._tree.unpack import unpack  # a program whose pulls find everything does without it

    try:
        target.mkdir(0o700)
        unpacked = unpack(
            reader.read,
            target,
            lower=lower,
            limits=limits,
            check_cancelled=reader.check,
            read_ahead=read_ahead,
            no_umask=no_umask,
        )
        digest, size = reader.finish()
        if expected is None:
            expected = blob_descriptor(digest, size)
        elif (digest, size) != (expected.digest, expected.size):
            raise VerificationError(
                f"layer {expected.digest} does not match its descriptor: expected "
                f"{expected.size} bytes, received {size} bytes with digest {digest}; pull it again",
                digest=expected.digest,
            )
    except OSError as error:
        if error is reader.failure:
            raise  # the error of the source, not of the store's disk
        raise store_error(error, target.parent) from error
    except (DecompressionError, UnpackError, StoreError) as error:
        gone = isinstance(error.__cause__, FileNotFoundError) and not (target / "fs").is_dir()
        if gone or not target.is_dir():
            raise removed_meanwhile(target) from error
        if not isinstance(error, StoreError) and expected is not None and error.layer is None:
            error.layer = expected.digest
        raise
    return unpacked, expected


@attrs.define(eq=False)
class Restarts:
    """The restarts of a stage for other reasons than bad bytes.

    Attributes:
        recalls: Number of times that another stage needed its worker.
        recalled_at: The size of its blob at the last recall.
        thrown_away: Number of bytes of the blob whose unpacking was lost.
        lost: Number of workers that died or did not answer during its work.
    """

    recalls: int = 0
    recalled_at: int = 0
    thrown_away: int = 0
    lost: int = 0

    def note_recall(self, position: int, size: int) -> None:
        """Record a recall at ``position`` of a blob with ``size`` bytes so far."""
        self.recalls += 1
        self.recalled_at = size
        self.thrown_away += position


@attrs.frozen(eq=False)
class Arrival:
    """A blob that arrives, and the place of its tree.

    Attributes:
        path: The blob's file.
        state: The number of bytes in the file so far.
        blob: The blob's descriptor.
        target: The directory for the tree.
        report: Called regularly with the number of bytes read, in any thread.
        alone: Whether no other blob arrives, so that one worker may use two cores.
        restarts: The restarts of earlier attempts.
    """

    path: Path
    state: ArrivalState
    blob: Descriptor
    target: Path
    report: Callable[[int], object]
    alone: bool = False
    restarts: Restarts = attrs.field(factory=Restarts)


def follow(
    arrival: Arrival, limits: Limits, *, read_ahead: bool = False, no_umask: bool = False
) -> Unpacked:
    """Unpack a blob while it arrives; this blocks.

    An error in the layer is raised only once the blob is verified. Before, the received bytes may
    be wrong, and then the download replaces them.

    Raises:
        StartedOver, Abandoned: if the tree is not needed any more.
        DecompressionError, UnpackError, StoreError: as for `build`.
    """
    path, blob = arrival.path, arrival.blob
    try:
        follower = Follower(path, arrival.state, blob, arrival.report)
    except OSError as error:
        raise store_error(error, path) from error
    with follower:
        try:
            unpacked, _ = build(
                follower,
                arrival.target,
                limits=limits,
                expected=blob,
                read_ahead=read_ahead,
                no_umask=no_umask,
            )
        except (DecompressionError, UnpackError):
            follower.finish()
            raise
    return unpacked


def blob_descriptor(digest: Digest, size: int) -> Descriptor:
    """Return a blob's descriptor without a media type, which is not trusted anyway."""
    return Descriptor("application/octet-stream", digest, size)
