"""A layer source whose attempts are written down beforehand."""

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
    """One call of `~trio_layers.abc.LayerSource.download`, or of
    `~trio_layers.abc.StagedSource.download_into`, which is what a `MemoryStore` asks for.

    Attributes:
        seconds: How long it takes, in trio's time.
        progress: What it reports meanwhile, as (seconds since its start, action, current,
            total), in order of time.
        error: What it raises in the end; ``None``: it succeeds. Asked for again, the same
            object is raised again.
        body: The stream it gives; ``None``: the source's data.
        size: The size it gives; ``None``: the body's length. A descriptor has the data's.
        pieces: In how many pieces the body arrives in a sink, evenly over ``seconds``.
        arrives: How much of the body arrives in a sink, counted from its beginning; ``None``:
            all of it, or with an error nothing.
        resumes: Whether what is in a sink stays, as with a server that knows ranges.
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
    """A `~trio_layers.abc.LayerSource` for tests of what uses the engine, or is used by it, and
    a `~trio_layers.abc.StagedSource`. It verifies nothing: the attempts say what fails.

    Args:
        data: The layer, as it would be downloaded; not compressed if it is to match ``known``.
        key: Its key; by default its digest.
        id: Its display ID; by default the key's last 12 characters.
        attempts: What the calls of `download` and `download_into` do; the last one is repeated
            for ever.
        known: Whether the diff ID, that of ``data``, is known beforehand.

    Attributes:
        key: See `LayerSource.key`.
        id: See `LayerSource.id`.
        descriptor: That of the data.
        calls: How many attempts were begun.
        closes: How often `close` was called.
        diff_ids: What `registered` was told, in order.
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
    # Counted from the start: sleeps added up would drift on a mock clock.
    start = trio.current_time()
    # What is told of bytes comes after them.
    for seconds, step in sorted(steps, key=itemgetter(0)):
        await trio.sleep_until(start + seconds)
        if not isinstance(step, bytes):
            progress(*step)
        elif sink is not None and step:
            await sink.write(step)
    await trio.sleep_until(start + attempt.seconds)
    if attempt.error is not None:
        raise attempt.error
