"""The engine on layers of nothing: what a layer costs, at 1,000 layers and at 10,000."""

from __future__ import annotations

import gc
import statistics
import time

import trio
from trio.testing import MockClock

from trio_layers import MemoryStore, MemoryStream, open_download_manager


class Nothing:
    def __init__(self, index: int) -> None:
        self.key = self.id = str(index)

    def diff_id(self) -> None:
        return None

    async def download(self, progress: object) -> tuple[MemoryStream, int]:
        await trio.lowlevel.checkpoint()
        return MemoryStream(self.key.encode()), 0

    def close(self) -> None:
        pass


async def ignore(event: object) -> None:
    await trio.lowlevel.checkpoint()


async def pull(layers: int) -> None:
    async with open_download_manager(MemoryStore()) as manager:
        sources = [Nothing(index) for index in range(layers)]
        async with manager.download(sources, progress=ignore) as rootfs:
            assert len(rootfs.diff_ids) == layers


def seconds_per_layer(layers: int) -> float:
    gc.collect()
    start = time.process_time()
    trio.run(pull, layers, clock=MockClock(autojump_threshold=0))
    return (time.process_time() - start) / layers


def main() -> None:
    sizes = (1_000, 10_000)
    rounds: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(5):
        for size in sizes:
            rounds[size].append(seconds_per_layer(size))
    medians = {size: statistics.median(times) for size, times in rounds.items()}
    for size, median in medians.items():
        print(f"{size:>6} layers: {median * 1e6:6.0f} µs of CPU a layer (median of 5)")
    print(f"ratio: {medians[10_000] / medians[1_000]:.2f}")


if __name__ == "__main__":
    main()
