"""A layer source with scripted attempts."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from typing import final

import attrs
import trio

from .._digest import DiffID, digest_of
from .._manifest import Descriptor
from .._memory import MemoryStream
from ..abc import BlobSink, ReportProgress

__all__ = ["Attempt", "ScriptedSource"]


@attrs.frozen(kw_only=True)
class Attempt:
    """The script for one download.

    It is played by `~trio_layers.abc.LayerSource.download`, or by
    `~trio_layers.abc.StagedSource.download_into`, which a `MemoryStore` calls.

    Attributes:
        seconds: The duration, in trio's time.
        progress: The reports, as (seconds since the start, action, current, total), in order of
            time.
        error: The error at the end; ``None`` for success. A repeated attempt raises the same
            object again.
        body: The stream's bytes; ``None`` for the source's data.
        size: The returned size; ``None`` for the body's length. The descriptor has the size of
            the data.
        pieces: The number of pieces in which the body arrives in a sink, evenly over ``seconds``.
        arrives: The number of the body's first bytes that arrive in a sink; ``None`` for all, or
            for none if there is an error.
        resumes: Whether bytes in a sink are kept, as with a server that supports ranges.
    """

    seconds: float = 0
    progress: tuple[tuple[float, str, int, int], ...] = ()
    error: Exception | None = None
    body: bytes | None = attrs.field(default=None, repr=False)
    size: int | None = None
    pieces: int = 1
    arrives: int | None = None
    resumes: bool = True


@final
class ScriptedSource:
    """A layer source that plays scripted attempts, for tests around the engine.

    It is a `~trio_layers.abc.LayerSource` and a `~trio_layers.abc.StagedSource`. It verifies
    nothing: only the attempts decide about failures.

    Args:
        data: The downloaded layer; not compressed if ``known`` is true.
        key: The key; by default the data's digest.
        id: The display ID; by default the last 12 characters of the key.
        attempts: The scripts for calls of `download` and `download_into`, in order. The last one
            is repeated for ever.
        known: Whether the diff ID is known beforehand; it is the digest of ``data`` then.

    Attributes:
        key: See `LayerSource.key`.
        id: See `LayerSource.id`.
        descriptor: The descriptor of the data.
        calls: The number of started attempts.
        closes: The number of calls of `close`.
        diff_ids: The arguments of the calls of `registered`, in order.
    """

    def __init__(
        self,
        data: bytes,
        *,
        key: str | None = None,
        id: str | None = None,
        attempts: Iterable[Attempt] = (Attempt(),),
        known: bool = False,
    ) -> None:
        digest = digest_of(data)
        self.key: str = digest if key is None else key
        self.id: str = self.key[-12:] if id is None else id
        self.descriptor: Descriptor = Descriptor("application/octet-stream", digest, len(data))
        self.calls: int = 0
        self.closes: int = 0
        self.diff_ids: list[DiffID] = []
        self._data = data
        self._diff_id = DiffID(digest) if known else None
        self._attempts = tuple(attempts)
        if not self._attempts:
            raise ValueError("a source needs at least one attempt")

    def __repr__(self) -> str:
        return f"<ScriptedSource {self.id}: {self.calls} attempts, {self.closes} closes>"

    def diff_id(self) -> DiffID | None:
        return self._diff_id

    async def download(self, progress: ReportProgress) -> tuple[trio.abc.ReceiveStream, int]:
        """Play the next attempt.

        Raises:
            Exception: the attempt's error.
        """
        attempt = self._next_attempt()
        await _run_attempt(attempt, progress)
        body = self._body(attempt)
        return MemoryStream(body), len(body) if attempt.size is None else attempt.size

    async def download_into(self, sink: BlobSink, progress: ReportProgress) -> None:
        """Play the next attempt into a sink.

        Raises:
            Exception: the attempt's error.
        """
        attempt = self._next_attempt()
        if sink.offset and not attempt.resumes:
            await sink.restart()
        body = self._body(attempt)
        arrives = attempt.arrives
        if arrives is None:
            arrives = len(body) if attempt.error is None else 0
        await _run_attempt(attempt, progress, sink, body[sink.offset : arrives])

    def _next_attempt(self) -> Attempt:
        attempt = self._attempts[min(self.calls, len(self._attempts) - 1)]
        self.calls += 1
        return attempt

    def _body(self, attempt: Attempt) -> bytes:
        return self._data if attempt.body is None else attempt.body

    def registered(self, diff_id: DiffID) -> None:
        self.diff_ids.append(diff_id)

    def close(self) -> None:
        self.closes += 1


async def _run_attempt(
    attempt: Attempt, progress: ReportProgress, sink: BlobSink | None = None, data: bytes = b""
) -> None:
    steps: list[tuple[float, bytes | tuple[str, int, int]]] = []
    for piece in range(attempt.pieces):
        begin, end = (len(data) * (piece + more) // attempt.pieces for more in (0, 1))
        steps.append((attempt.seconds * (piece + 1) / attempt.pieces, data[begin:end]))
    steps += ((each[0], each[1:]) for each in attempt.progress)
    # All times count from the start, because the sum of many sleeps would drift on a mock clock.
    start = trio.current_time()
    # The sort is stable, so reports of a moment come after its bytes.
    for seconds, step in sorted(steps, key=itemgetter(0)):
        await trio.sleep_until(start + seconds)
        if not isinstance(step, bytes):
            progress(*step)
        elif sink is not None and step:
            await sink.write(step)
    await trio.sleep_until(start + attempt.seconds)
    if attempt.error is not None:
        raise attempt.error
