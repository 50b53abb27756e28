"""From a layer's bytes to its tree: what is done in a worker, be that a thread or a process.

Nothing here knows trio: a process that only builds trees does not load it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import attrs

from .._digest import DiffID, Digest
from .._disk_errors import removed_meanwhile, store_error
from .._errors import DecompressionError, StoreError, UnpackError, VerificationError
from .._manifest import Descriptor
from .arrival_state import ArrivalState, Follower

if TYPE_CHECKING:
    from .._rootfs.merged import MergedTree

__all__ = ["Arrival", "Past", "Source", "Unpack", "Unpacked", "build", "describe", "follow"]


class Unpacked(Protocol):
    """What an unpacker says of a tree it made."""

    @property
    def diff_id(self) -> DiffID:
        """The digest of the tar."""
        ...

    @property
    def size(self) -> int:
        """The length of the tar in bytes."""
        ...

    @property
    def entries(self) -> int:
        """How many entries the tar had."""
        ...

    @property
    def assumed(self) -> tuple[bytes, ...]:
        """The directories it implies, without saying what they are like."""
        ...

    @property
    def needs_lower(self) -> bool:
        """Whether the tree is not whole without what is below it."""
        ...


class Unpack(Protocol):
    """Makes trees. It blocks, and may be called several times at once."""

    def __call__(
        self,
        read: Callable[[int], bytes],
        target: Path,
        *,
        lower: MergedTree | None,
        check_cancelled: Callable[[], None],
    ) -> Unpacked:
        """Make ``fs`` and ``entries`` in the empty directory ``target``.

        Args:
            read: Gives at most so many bytes of the layer, compressed; none at its end.
            target: Where to.
            lower: What is below, to be built upon; ``None``: make assumptions, and say which.
            check_cancelled: Called often; what it raises goes through.

        Raises:
            DecompressionError: if no valid stream begins.
            UnpackError: if the layer is damaged, or holds what must not be unpacked.
        """
        ...


class Source(Protocol):
    """What an unpacker reads from."""

    @property
    def failure(self) -> Exception | None:
        """What reading has failed with."""
        ...

    def read(self, size: int) -> bytes: ...

    def check(self) -> None:
        """Raise if nobody wants the result any more."""
        ...

    def finish(self) -> tuple[Digest, int]:
        """Read on to the end; the digest and the size of it all."""
        ...


def build(
    unpack: Unpack,
    source: Source,
    target: Path,
    *,
    lower: MergedTree | None = None,
    expected: Descriptor | None = None,
) -> tuple[Unpacked, Descriptor]:
    """Make a tree in ``target``, which is not there yet: the tree, not durable, and the
    descriptor of what was read.

    Raises:
        DecompressionError, UnpackError: as ``unpack`` does; they have the blob's digest.
        VerificationError: if what was read is not what was expected.
        StoreError: for what the disk does.
    """
    try:
        target.mkdir(0o700)
        unpacked = unpack(source.read, target, lower=lower, check_cancelled=source.check)
        digest, size = source.finish()
        if expected is None:
            expected = describe(digest, size)
        elif (digest, size) != (expected.digest, expected.size):
            raise VerificationError(
                f"layer {expected.digest} should be {expected.size} bytes long, but what came "
                f"is {digest}, {size} bytes long: pull it again",
                digest=expected.digest,
            )
    except OSError as error:
        # What the source raises is no matter of our disk.
        if error is source.failure:
            raise
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
class Past:
    """Restarts of a stage for other reasons than bad bytes.

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
    """A blob on its way in, of which a tree is to be made.

    Attributes:
        path: Where it arrives.
        growth: How much of it is there.
        blob: What it is.
        target: Where the tree is made.
        report: Told how many bytes of the blob were read, now and then, in any thread.
        alone: Nothing else is on its way, so that it may be done with all cores.
        past: The restarts of earlier attempts.
    """

    path: Path
    growth: ArrivalState
    blob: Descriptor
    target: Path
    report: Callable[[int], object]
    alone: bool = False
    past: Past = attrs.field(factory=Past)


def follow(unpack: Unpack, arrival: Arrival) -> Unpacked:
    """Make the tree of a blob while it arrives. What is found wrong with it counts when it has
    been verified: until then, what arrived may be to blame.

    Raises:
        StartedOver, Abandoned: if nobody wants it any more.
        DecompressionError, UnpackError, StoreError: as `build` does.
    """
    path, blob = arrival.path, arrival.blob
    try:
        follower = Follower(path, arrival.growth, blob, arrival.report)
    except OSError as error:
        raise store_error(error, path) from error
    with follower:
        try:
            return build(unpack, follower, arrival.target, expected=blob)[0]
        except (DecompressionError, UnpackError):
            follower.finish()
            raise


def describe(digest: Digest, size: int) -> Descriptor:
    """A layer's blob; what its media type says is not believed, so it is not kept either."""
    return Descriptor("application/octet-stream", digest, size)
