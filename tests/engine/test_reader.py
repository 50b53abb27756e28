"""The reports of `LayerReader`, as in moby's ``pkg/progress/progressreader.go``."""

from __future__ import annotations

import pytest
import trio
from engine.seeds import run

from trio_layers._engine.reader import LayerReader


class Reads(trio.abc.ReceiveStream):
    """A stream that returns these numbers of bytes at these times. ``None``: fail at this time."""

    def __init__(self, *reads: tuple[float, int | None]) -> None:
        self._reads = list(reads)
        self.closed = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        at, size = self._reads.pop(0)
        await trio.sleep_until(at)
        if size is None:
            raise OSError("reset")
        return bytes(size)

    async def aclose(self) -> None:
        self.closed += 1


def reports(size: int, *reads: tuple[float, int | None]) -> list[tuple[float, int, bool]]:
    """Read the stream to its end or failure, and return (time, current, last) of each report."""
    seen: list[tuple[float, int, bool]] = []

    async def main() -> None:
        def report(action: str, current: int, total: int, last: bool) -> None:
            assert (action, total) == ("Extracting", size)
            seen.append((round(trio.current_time(), 6), current, last))

        stream = Reads(*reads)
        reader = LayerReader(stream, size, report)
        try:
            while await reader.receive_some(100_000_000):
                pass
        except OSError:
            assert reads[-1][1] is None
        assert stream.closed == 1
        await reader.aclose()
        assert stream.closed == 1

    run(main)
    return seen


def test_more_than_one_percent() -> None:
    reads = [(float(i), 5) for i in range(1, 7)]
    assert reports(1000, *reads, (7.0, 0)) == [(3, 15, False), (6, 30, False), (7, 30, True)]


@pytest.mark.parametrize("size", [0, 2**40])
def test_more_than_512_kib(size: int) -> None:
    half = 256 * 1024
    reads = [(float(i), half) for i in range(1, 5)]
    assert reports(size, *reads, (5.0, 0)) == [(3, 3 * half, False), (5, 4 * half, True)]


def test_at_most_every_tenth_of_a_second() -> None:
    """Bytes read during the pause count, although they are not reported."""
    seen = reports(1000, (0, 20), (0.06, 20), (0.2, 5), (0.3, 20), (0.4, 20), (1, 0))
    assert seen == [(0, 20, False), (0.3, 65, False), (0.4, 85, False), (1, 85, True)]


def test_reaching_the_size_neither_heeds_nor_restarts_the_pause() -> None:
    seen = reports(40, (0, 20), (0.05, 20), (0.11, 20), (1, 0))
    assert seen == [(0, 20, False), (0.05, 40, False), (0.11, 60, False), (1, 60, True)]


@pytest.mark.parametrize("end", [0, None], ids=["end", "error"])
def test_end_neither_heeds_the_pause_nor_a_step(end: int | None) -> None:
    assert reports(1000, (0, 20), (0.01, 1), (0.02, end)) == [(0, 20, False), (0.02, 21, True)]


def test_end_once_more_is_no_read_and_no_report() -> None:
    async def main() -> None:
        seen: list[bool] = []
        reader = LayerReader(Reads((0, 3), (1, 0)), 3, lambda *event: seen.append(event[3]))
        assert [await reader.receive_some() for _ in range(4)] == [b"\0\0\0", b"", b"", b""]
        assert seen == [False, True]

    run(main)


def test_cancelled_read_closes_and_reports_nothing() -> None:
    async def main() -> None:
        seen: list[object] = []
        stream = Reads((5, 3))
        reader = LayerReader(stream, 0, lambda *event: seen.append(event))
        with trio.move_on_after(1) as scope:
            await reader.receive_some()
        assert scope.cancelled_caught
        assert (stream.closed, seen) == (1, [])
        with pytest.raises(trio.ClosedResourceError):
            await reader.receive_some()

    run(main)
