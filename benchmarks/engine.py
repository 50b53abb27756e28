"""Measures how the engine's time and memory grow, with empty layers.

    python -m benchmarks.engine

Time must be linear and memory bounded: in the number of layers of a pull, of pulls that share
their layers, and of events for a slow sink. Each measurement is a process of its own on a mock
clock. It shows CPU seconds, and the peak of memory beyond that of a pull of a single layer.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import trio
from trio.testing import MockClock

from trio_layers import MemoryStore, MemoryStream, Progress, Status, open_download_manager
from trio_layers.abc import ReportProgress

ROUNDS = 5


class EmptyLayer:
    """A unique layer that reports a number of steps."""

    def __init__(self, index: int, events: int = 0) -> None:
        self.key = self.id = str(index)
        self._events = events

    def diff_id(self) -> None:
        return None

    async def download(self, progress: ReportProgress) -> tuple[MemoryStream, int]:
        for event in range(self._events):
            progress(Status.DOWNLOADING, event, self._events)
            await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        return MemoryStream(self.key.encode()), 0

    def close(self) -> None:
        pass


async def ignore(event: Progress) -> None:
    await trio.lowlevel.checkpoint()


async def layers(number: int) -> None:
    """Pull ``number`` layers at once."""
    async with open_download_manager(MemoryStore()) as manager:
        sources = [EmptyLayer(index) for index in range(number)]
        async with manager.download(sources, progress=ignore) as rootfs:
            assert len(rootfs.diff_ids) == number


async def pulls(number: int) -> None:
    """Pull the same ten layers ``number`` times at once."""
    async with open_download_manager(MemoryStore()) as manager:

        async def pull() -> None:
            sources = [EmptyLayer(index) for index in range(10)]
            async with manager.download(sources, progress=ignore) as rootfs:
                assert len(rootfs.diff_ids) == 10

        async with trio.open_nursery() as nursery:
            for _ in range(number):
                nursery.start_soon(pull)


async def events(number: int) -> None:
    """Pull with ``number`` events, and a sink that takes a second for each event."""

    async def take(event: Progress) -> None:
        await trio.sleep(1)

    async with open_download_manager(MemoryStore()) as manager:
        async with manager.download([EmptyLayer(0, number)], progress=take):
            pass


SCENARIOS: dict[str, tuple[Callable[[int], Awaitable[None]], tuple[int, int]]] = {
    "layers": (layers, (1_000, 10_000)),
    "pulls": (pulls, (100, 1_000)),
    "events": (events, (10_000, 100_000)),
}


def peak() -> int:
    """Return the peak of this process's memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_one(scenario: str, number: int) -> None:
    trio.run(layers, 1)
    before, start = peak(), time.process_time()
    trio.run(SCENARIOS[scenario][0], number, clock=MockClock(autojump_threshold=0))
    print(time.process_time() - start, peak() - before)


def measure(scenario: str, number: int) -> tuple[float, float]:
    """Return the medians of CPU seconds and bytes."""
    command = [sys.executable, "-m", "benchmarks.engine", "--run", scenario, str(number)]
    runs = [
        [float(figure) for figure in subprocess.check_output(command, text=True).split()]
        for _ in range(ROUNDS)
    ]
    cpu, size = zip(*runs, strict=True)
    return statistics.median(cpu), statistics.median(size)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine")
    parser.add_argument(
        "--run", nargs=2, metavar=("SCENARIO", "N"), help="run one measurement in this process"
    )
    options = parser.parse_args()
    if options.run:
        run_one(options.run[0], int(options.run[1]))
        return
    for scenario, (_, numbers) in SCENARIOS.items():
        each = []
        for number in numbers:
            cpu, size = measure(scenario, number)
            each.append(cpu / number)
            print(
                f"{number:>7} {scenario:7} {cpu:7.2f} s of CPU, {cpu / number * 1e6:6.0f} µs each; "
                f"{size / 1e6:6.1f} MB more, {size / number:6.0f} bytes each"
            )
        print(
            f"{'':7} with ten times as many, each takes {each[1] / each[0]:.2f} times as long",
            flush=True,
        )


if __name__ == "__main__":
    main()
