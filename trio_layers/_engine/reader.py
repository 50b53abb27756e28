"""The stream from which a store reads a layer, and the progress of unpacking.

The stream is counted, and closed exactly once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TypeAlias, final

import trio

from .._progress import Status
from .foreign import log

__all__ = ["Extraction", "LayerReader"]

Report: TypeAlias = Callable[[str, int, int, bool], None]

STEP = 512 * 1024
INTERVAL = 0.1
# On a virtual clock two sleeps with the same end may differ by an ulp.
SLACK = 1e-6


@final
class Extraction:
    """Chooses the counts to report, as moby's ``pkg/progress/progressreader.go`` does.

    Args:
        size: The layer's size as downloaded, in bytes; 0 if unknown.
        report: Takes the progress.
    """

    def __init__(self, size: int, report: Report) -> None:
        self._size = size
        self._report_to = report
        self._step = min(STEP, size // 100) if size > 0 else STEP
        self._count_at_step = 0
        self._reported_at = -math.inf
        self._all_unpacked = False

    def reached(self, count: int) -> None:
        """Count the read bytes so far, and report them if a report is due."""
        if count - self._count_at_step > self._step:
            self._count_at_step = count
            if count != self._size:
                now = trio.current_time()
                if now - self._reported_at < INTERVAL - SLACK:
                    return
                self._reported_at = now
            self._report(count, last=False)

    def ended(self, count: int) -> None:
        """Report the final number of read bytes."""
        self._report(count, last=True)

    def unpacked(self, count: int) -> None:
        """Report the position of a stage, for a blob of known size."""
        if count < self._size:
            self.reached(count)
        elif not self._all_unpacked:
            self._all_unpacked = True
            self.ended(count)

    def _report(self, count: int, *, last: bool) -> None:
        self._report_to(Status.EXTRACTING, count, self._size, last)


@final
class LayerReader(trio.abc.ReceiveStream):
    """Passes a layer's bytes on unchanged.

    It closes its source stream as soon as that has ended or failed, or a read was cancelled.
    `aclose` closes it otherwise.

    Args:
        stream: The layer as downloaded.
        size: The stream's length in bytes; 0 if unknown.
        report: Takes the progress; ``None``: no reports.
    """

    def __init__(
        self,
        stream: trio.abc.ReceiveStream,
        size: int = 0,
        report: Report | None = None,
    ) -> None:
        self._stream = stream
        self._extraction = None if report is None else Extraction(size, report)
        self._count = 0
        self._closed = False
        self._at_end = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._closed:
            await trio.lowlevel.checkpoint()
            if self._at_end:
                return b""
            raise trio.ClosedResourceError("the layer's stream was closed")
        try:
            data = await self._stream.receive_some(max_bytes)
        except BaseException as error:
            if isinstance(error, Exception):
                self._ended()
            await self.aclose()
            raise
        if data:
            self._count += len(data)
            if self._extraction is not None:
                self._extraction.reached(self._count)
        else:
            self._at_end = True
            self._ended()
            await self.aclose()
        return data

    async def aclose(self) -> None:
        """Close the stream of the source, unless it is closed.

        The call raises nothing: the bytes read decide whether the layer is good.

        Cancellation: the call is shielded.
        """
        if self._closed:
            return
        self._closed = True
        with trio.CancelScope(shield=True):
            try:
                await trio.aclose_forcefully(self._stream)
            except Exception as error:
                log(logging.ERROR, "closing a layer's stream failed", error=error)

    def _ended(self) -> None:
        if self._extraction is not None:
            self._extraction.ended(self._count)
