"""A layer source whose attempts are written down beforehand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import attrs
import trio

from .._digest import DiffID, digest_of
from .._store.memory import MemoryStream
from ..abc import ReportProgress

__all__ = ["Attempt", "ScriptedSource"]


@attrs.frozen(kw_only=True)
class Attempt:
    """One call of `~trio_layers.abc.LayerSource.download`.

    Attributes:
        seconds: How long it takes, in trio's time.
        progress: What it reports meanwhile, as (seconds since its start, action, current,
            total), in order of time.
        error: What it raises in the end; ``None``: it succeeds. Asked for again, the same
            object is raised again.
        body: The stream it gives; ``None``: the source's data.
        size: The size it gives; ``None``: the body's length.
    """

    seconds: float = 0
    progress: tuple[tuple[float, str, int, int], ...] = ()
    error: Exception | None = None
    body: bytes | None = attrs.field(default=None, repr=False)
    size: int | None = None


@final
class ScriptedSource:
    """A `~trio_layers.abc.LayerSource` for tests of what uses the engine, or is used by it.

    Args:
        data: The layer, as it would be downloaded; not compressed if it is to match ``known``.
        key: Its key; by default its digest.
        id: Its display ID; by default the key's last 12 characters.
        attempts: What the calls of `download` do; the last one is repeated for ever.
        known: Whether the diff ID, that of ``data``, is known beforehand.

    Attributes:
        key: See `LayerSource.key`.
        id: See `LayerSource.id`.
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
        attempt = self._attempts[min(self.calls, len(self._attempts) - 1)]
        self.calls += 1
        # Counted from the start: sleeps added up would drift on a mock clock.
        start = trio.current_time()
        for seconds, action, current, total in attempt.progress:
            await trio.sleep_until(start + seconds)
            progress(action, current, total)
        await trio.sleep_until(start + attempt.seconds)
        if attempt.error is not None:
            raise attempt.error
        body = self._data if attempt.body is None else attempt.body
        return MemoryStream(body), len(body) if attempt.size is None else attempt.size

    def registered(self, diff_id: DiffID) -> None:
        self.diff_ids.append(diff_id)

    def close(self) -> None:
        self.closes += 1
