"""Shows the time of each stage of a pull, ours and the floor's.

    python -m benchmarks.stages [--image large|small|…]

It needs root, as ``python -m benchmarks`` does. The pull is a whole ``python -m trio_layers pull``
on a new ext4, and `benchmarks.clock` measures its processes. CPU seconds add up to the total of the
processes. Wall seconds are sums over threads, and include waiting in a call, such as for the
interpreter's lock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from .images import SHAPES
from .machine import (
    Failed,
    disk_for,
    enter_own_mounts,
    fresh_disk,
    group,
    interrupt_on_signals,
    memory,
    registry,
    sweep,
)
from .stock import REPOSITORY, default_cache, facts, read_blobs, stock

ROOT = Path(__file__).parents[1]
START = "import os; from benchmarks import clock; clock.install(os.environ['BENCHMARKS_CLOCK'])\n"

Stages = dict[tuple[str, str], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages")
    parser.add_argument("--image", choices=SHAPES, default="large")
    parser.add_argument("--cache", type=Path, default=default_cache(), metavar="DIR")
    options = parser.parse_args()
    enter_own_mounts("benchmarks.stages")
    interrupt_on_signals()
    sweep()
    storage = stock(options.cache, options.image)
    read_blobs(storage)
    size = disk_for(facts(storage, "latest"))
    with (
        memory() as directory,
        registry(storage) as host,
    ):
        reference = f"{host}/{REPOSITORY}:latest"
        with fresh_disk(directory, size) as disk:
            floor = _watched(directory, ["benchmarks.floor", reference, str(disk)])
        with fresh_disk(directory, size) as disk:
            pull = ["trio_layers", "pull", "-q", "--store", f"{disk}/store", reference]
            ours = _watched(directory, pull)
    start = _cpu_of_start()
    _print(options.image, floor, ours)
    print(f"\nThe share of starting Python and importing is {start:.2f} s of CPU.")


def _watched(directory: Path, arguments: list[str]) -> tuple[float, float, Stages]:
    with tempfile.TemporaryDirectory(dir=directory) as name, group("contestant") as processes:
        Path(name, "sitecustomize.py").write_text(START)
        environment = {
            **os.environ,
            "PYTHONPATH": f"{name}{os.pathsep}{ROOT}",
            "BENCHMARKS_CLOCK": name,
        }
        command = [sys.executable, "-m", *arguments]
        begin = time.monotonic()
        process = processes.start(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output, _ = process.communicate()
        wall = time.monotonic() - begin
        if process.returncode:
            raise Failed(command, output)
        stages: Stages = defaultdict(lambda: [0, 0.0, 0.0])
        for path in Path(name).glob("*.json"):
            for thread, found in json.loads(path.read_bytes()).items():
                for stage, figures in found.items():
                    sums = stages[stage, thread]
                    sums[:] = [a + b for a, b in zip(sums, figures, strict=True)]
        return wall, processes.usage().total, stages


def _cpu_of_start() -> float:
    with group("contestant") as processes:
        command = [
            sys.executable,
            "-c",
            "import trio_layers._commands.pulling, trio_layers._commands.running",
        ]
        processes.start(command, cwd=ROOT).wait()
        return processes.usage().total


def _print(
    image: str, floor: tuple[float, float, Stages], ours: tuple[float, float, Stages]
) -> None:
    print(f"{image}, with clocks")
    print(f"{'':36}{'':^10}{'trio_layers':^37}{'floor':^34}".rstrip())
    print(f"{'stage':24}{'thread':10}" + f"{'CPU s':>9}{'wall s':>9}{'calls':>10}{'µs':>8}" * 2)
    stages = {**ours[2], **floor[2]}
    largest = sorted(stages, key=lambda key: -max(ours[2][key][1], floor[2][key][1]))
    for stage, thread in largest:
        columns = []
        for _, _, found in (ours, floor):
            calls, cpu, wall = found[stage, thread]
            each = f"{cpu / calls * 1e6:8.1f}" if calls else " " * 8
            columns.append(f"{cpu:9.3f}{wall:9.3f}{calls or '':>10}{each}")
        print(f"{stage:24}{thread:10}{''.join(columns)}".rstrip())
    totals = "".join(f"{cpu:9.3f}{wall:9.3f}{'':18}" for wall, cpu, _ in (ours, floor))
    print(f"{'the whole process':34}{totals}".rstrip())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
