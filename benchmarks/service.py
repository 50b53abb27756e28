"""Measures the effects of pulls on a service: lag of its loop, and ends of cancelled pulls.

    python -m benchmarks.service [--rounds N]

It needs root, as ``python -m benchmarks`` does, and uses the same registry and the same disks.

Lag: during pulls, another task sleeps for a millisecond, again and again. Its lag is the time by
which it wakes up late. For comparison, the lag of an idle loop is shown while another process
pulls; this is the lag of the machine itself. Quiet: pulls are cancelled at random moments. Shown is
the time until the pull has ended and no work for it goes on. One of the images is a bomb: a layer
of zeros, in zstd, that expands to 16 GB. Start: the time from the decision to start a worker until
it can take a layer.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tarfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from trio_layers import Puller, open_puller
from trio_layers._workers.pool import start_worker
from trio_layers.testing import BuiltImage, build_image, build_layer, open_registry

from .machine import (
    disk_for,
    enter_own_mounts,
    fresh_disk,
    interrupt_on_signals,
    memory,
    registry,
    sweep,
)
from .stock import REPOSITORY, default_cache, facts, read_blobs, stock

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MIB = 1 << 20
TICK = 0.001


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service")
    parser.add_argument("--rounds", type=int, default=10, metavar="N")
    parser.add_argument("--cache", type=Path, default=default_cache(), metavar="DIR")
    options = parser.parse_args()
    enter_own_mounts("benchmarks.service")
    interrupt_on_signals()
    sweep()
    trio.run(_start)
    bomb = make_bomb()
    with memory() as directory:
        for image in ("large", "small"):
            storage = stock(options.cache, image)
            read_blobs(storage)
            size = disk_for(facts(storage, "latest"))
            with registry(storage) as host:
                reference = f"{host}/{REPOSITORY}:latest"
                _measure(image, reference, directory, size, options.rounds)
        trio.run(_with_bomb, bomb, directory, options.rounds)


def _measure(image: str, reference: str, directory: Path, size: int, rounds: int) -> None:
    lags: list[float] = []
    machine: list[float] = []
    walls: list[float] = []
    for _ in range(max(1, rounds // 2)):
        with fresh_disk(directory, size) as disk:
            walls.append(trio.run(_pull, reference, disk, lags))
        with fresh_disk(directory, size) as disk:
            trio.run(_watch_another, reference, disk, machine)
    _print_lag(f"{image}, pulled here", lags)
    _print_lag(f"{image}, pulled by another process", machine)
    quiet: list[float] = []
    for _ in range(rounds):
        with fresh_disk(directory, size) as disk:
            after = random.uniform(0, statistics.median(walls))
            quiet += trio.run(_cancel, reference, disk, after)
    _print_quiet(image, quiet)


async def _pull(reference: str, disk: Path, lags: list[float]) -> float:
    async with open_puller(disk / "store") as puller, watched(lags):
        start = time.perf_counter()
        async with puller.pull(reference):
            return time.perf_counter() - start


async def _watch_another(reference: str, disk: Path, lags: list[float]) -> None:
    command = [sys.executable, "-m", "trio_layers", "pull", "-q", "--store", str(disk / "store")]
    async with watched(lags):
        await trio.run_process([*command, reference], capture_stdout=True)


@asynccontextmanager
async def watched(lags: list[float]) -> AsyncIterator[None]:
    """Record the lags of a task that sleeps during the block."""

    async def sleep() -> None:
        while True:
            start = time.perf_counter()
            await trio.sleep(TICK)
            lags.append(time.perf_counter() - start - TICK)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleep)
        yield
        nursery.cancel_scope.cancel()


async def _cancel(reference: str, disk: Path, after: float) -> list[float]:
    """Return the seconds until a cancelled pull has ended; none if it ended before."""
    async with open_puller(disk / "store") as puller:
        return await until_quiet(puller, reference, partial(trio.sleep, after))


async def until_quiet(
    puller: Puller, reference: str, moment: Callable[[], Awaitable[None]]
) -> list[float]:
    cancelled = 0.0

    async def pull() -> None:
        async with puller.pull(reference):
            pass
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull)
        await moment()
        cancelled = time.perf_counter()
        nursery.cancel_scope.cancel()
    took = time.perf_counter() - cancelled
    busy = puller.store.statistics().unpacking
    if busy:
        raise AssertionError(f"{busy} layers are still being unpacked after the end of the pull")
    return [took] if cancelled else []


def make_bomb() -> BuiltImage:
    """Make an image with one layer of 1.5 MB that contains a file of 16 GB."""
    info = tarfile.TarInfo("zeros")
    info.size = 16 << 30
    pieces = [zstd.compress(info.tobuf(tarfile.GNU_FORMAT))]
    pieces += [zstd.compress(bytes(64 * MIB))] * (info.size // (64 * MIB))
    layer = build_layer(b"".join(pieces), compression="none")
    return build_image([layer])


async def _with_bomb(bomb: BuiltImage, directory: Path, rounds: int) -> None:
    lags: list[float] = []
    quiet: list[float] = []
    async with open_registry() as server:
        reference = server.add(bomb, "library/bomb:latest")
        for _ in range(rounds):
            with fresh_disk(directory, 6 << 30) as disk:
                async with open_puller(disk / "store") as puller, watched(lags):

                    async def moment() -> None:
                        # The moment comes some time after unpacking has begun.
                        while not puller.store.statistics().unpacking:  # noqa: ASYNC110
                            await trio.sleep(TICK)
                        await trio.sleep(random.uniform(0.3, 1))

                    quiet += await until_quiet(puller, reference, moment)
    _print_lag("a bomb, pulled here", lags)
    _print_quiet("a bomb", quiet)


async def _start() -> None:
    times = []
    for _ in range(10):
        start = time.perf_counter()
        worker = await start_worker()
        times.append(time.perf_counter() - start)
        await worker.kill()
    print(f"start of a worker: {statistics.median(times) * 1000:.0f} ms (median of 10)")


def _print_lag(title: str, lags: list[float]) -> None:
    cuts = statistics.quantiles(lags, n=1000)
    print(
        f"lag, {title:36} p50 {cuts[499] * 1000:6.2f} ms, p99 {cuts[989] * 1000:6.2f}, "
        f"p99.9 {cuts[998] * 1000:6.2f}, most {max(lags) * 1000:6.1f}, of {len(lags)}",
        flush=True,
    )


def _print_quiet(title: str, times: list[float]) -> None:
    print(
        f"quiet, {title:34} median {statistics.median(times) * 1000:6.1f} ms, "
        f"most {max(times) * 1000:6.1f}, of {len(times)}",
        flush=True,
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
