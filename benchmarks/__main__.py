"""Compares pulls from docker-registry on loopback: this package, its peers and a lower bound.

    python -m benchmarks [--only SCENARIO,…] [--with CONTESTANT,…] [--rounds N] [--json FILE]

It needs root, Linux with cgroup v2, docker-registry and e2fsprogs. The peers that are installed
take part. Contestants take turns, in another order each round. Each pull gets a new ext4 on a file
in memory, because on a used disk the same work may take ten times as long. Daemons are started
before the clock. See docs/performance.md.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import http.client
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Collection
from pathlib import Path

import attrs

from . import plot, start
from .contestants import CONTESTANTS, FLOOR, INFLATE, Contestant, other_containerd, versions
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


@attrs.frozen
class Scenario:
    """A measured pull.

    Attributes:
        title: The title in reports.
        image: The image's shape.
        before: A tag to pull before the clock starts.
        tag: The measured tag.
    """

    title: str
    image: str
    before: str | None = None
    tag: str = "latest"


SCENARIOS = {
    "large": Scenario("8 layers, 1.04 GB, half of it in one layer", "large"),
    "small": Scenario("40 layers of 100 small files", "small"),
    "zstd": Scenario("the 8 layers, with zstd", "large-zstd"),
    "layers-200": Scenario("200 layers of 100 small files", "layers-200"),
    "layer-4G": Scenario("a single layer of 4 GB", "layer-4G"),
    "again": Scenario("the 40 layers again: nothing to do", "small", before="latest"),
    "rebased": Scenario(
        "the 8 layers, all but the lowest already there", "large", "latest", "rebased"
    ),
}


START = "start"
"""The scenario that measures the start of programs, and no pull; see `benchmarks.start`."""


@attrs.frozen
class Run:
    """One pull.

    Attributes:
        wall: Seconds until the contestant reported the end.
        sync: Seconds to write the rest to the disk after that.
        user: CPU seconds of all processes in user mode, including a daemon.
        system: The same in the kernel.
        peak: The largest resident memory of all processes together, in bytes.
    """

    scenario: str
    contestant: str
    round: int
    wall: float
    sync: float
    user: float
    system: float
    peak: int

    @property
    def cpu(self) -> float:
        return self.user + self.system


def main() -> None:
    options = _options()
    if os.geteuid() != 0:
        raise SystemExit("benchmarks need root: they make and mount file systems")
    enter_own_mounts("benchmarks")
    interrupt_on_signals()
    sweep()
    runs: list[Run] = []
    contestants = _contestants(options)
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": _machine(),
        "versions": versions(contestants),
        "scenarios": {},
        "runs": [],
    }
    with memory() as directory:
        for scenario in options.only:
            if scenario == START:
                figures = start.measure(options.cache, directory, options.rounds)
                report["start"] = [attrs.asdict(figure) for figure in figures]
                if options.json is not None:
                    options.json.write_text(json.dumps(report, indent=1) + "\n")
                continue
            storage = stock(options.cache, SCENARIOS[scenario].image)
            report["scenarios"][scenario] = {
                "title": SCENARIOS[scenario].title,
                **facts(storage, SCENARIOS[scenario].tag),
            }
            runs += _measure(scenario, storage, contestants, options.rounds, directory)
            report["runs"] = [attrs.asdict(run) for run in runs]
            _print(scenario, [run for run in runs if run.scenario == scenario], contestants)
            if options.json is not None:
                options.json.write_text(json.dumps(report, indent=1) + "\n")
            if options.plot is not None:
                options.plot.write_text(plot.draw(report))


def _options() -> argparse.Namespace:
    def names(known: Collection[str]) -> object:
        def split(text: str) -> list[str]:
            chosen = [name.strip() for name in text.split(",")]
            for name in chosen:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name}: not one of {', '.join(known)}")
            return chosen

        return split

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    scenarios = [*SCENARIOS, START]
    add("--only", type=names(scenarios), default=scenarios, metavar="SCENARIO,…",
        help=f"scenarios to run: {', '.join(scenarios)}")  # fmt: skip
    add("--with", type=names(CONTESTANTS), dest="contestants", metavar="CONTESTANT,…",
        help=f"contestants: {', '.join(CONTESTANTS)}")  # fmt: skip
    add("--containerd", type=Path, action="append", default=[], metavar="DIR",
        help="directory with another containerd and ctr to add as a contestant")  # fmt: skip
    add("--rounds", type=int, default=5, metavar="N", help="number of rounds (default: 5)")
    add("--json", type=Path, metavar="FILE", help="file for all figures")
    add("--plot", type=Path, metavar="FILE", help="file for a drawing of the figures, as SVG")
    add("--cache", type=Path, default=default_cache(), metavar="DIR", help="directory for images")
    return parser.parse_args()


def _contestants(options: argparse.Namespace) -> list[Contestant]:
    chosen = []
    for contestant in CONTESTANTS.values():
        if options.contestants is not None and contestant.name not in options.contestants:
            continue
        if missing := contestant.missing():
            print(f"{contestant.name} is skipped: {', '.join(missing)} not installed")
            continue
        chosen.append(contestant)
    return [*chosen, *map(other_containerd, options.containerd)]


def _measure(
    name: str, storage: Path, contestants: list[Contestant], rounds: int, directory: Path
) -> list[Run]:
    scenario = SCENARIOS[name]
    taking_part = [
        each
        for each in contestants
        if (each.again or scenario.before is None)
        and (each.name != INFLATE or scenario.image == "layer-4G")
    ]
    read_blobs(storage)
    images = 1 if scenario.before in (None, scenario.tag) else 2
    size = disk_for(facts(storage, "latest"), images)
    runs = []
    with registry(storage) as host:
        for number in range(rounds):
            for _ in range(len(taking_part)):
                contestant = taking_part.pop(0)
                try:
                    run = _pull(name, contestant, number, host, directory, size)
                except Failed as error:
                    print(f"{contestant.name} failed: {error}")
                    continue
                runs.append(run)
                taking_part.append(contestant)
                _say(f"{name}, round {number + 1}: {contestant.name} {run.wall:.2f} s")
            # The next round begins with another contestant.
            taking_part = taking_part[1:] + taking_part[:1]
        _say("")
        if scenario.before is not None and scenario.before == scenario.tag:
            print(f"an answer of the registry takes {_answer(host) * 1000:.1f} ms")
    return runs


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _pull(
    name: str, contestant: Contestant, number: int, host: str, directory: Path, size: int
) -> Run:
    scenario = SCENARIOS[name]
    with fresh_disk(directory, size) as disk, group("contestant") as processes:
        with contestant.open(processes, disk) as pull:
            if scenario.before is not None:
                pull(f"{host}/{REPOSITORY}:{scenario.before}")
            os.sync()  # the contestant must not wait for data of others
            before = processes.usage()
            with processes.watched() as peak:
                wall = pull(f"{host}/{REPOSITORY}:{scenario.tag}")
            after = processes.usage()
            start = time.monotonic()
            _sync_file_system(disk)
            sync = time.monotonic() - start
    return Run(
        scenario=name,
        contestant=contestant.name,
        round=number,
        wall=wall,
        sync=sync,
        user=after.user - before.user,
        system=after.system - before.system,
        peak=peak.bytes,
    )


def _sync_file_system(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            raise OSError(ctypes.get_errno(), "syncfs")
    finally:
        os.close(descriptor)


def _answer(host: str) -> float:
    """Return the median seconds for a manifest's digest, including the connection."""
    times = []
    for _ in range(50):
        start = time.monotonic()
        connection = http.client.HTTPConnection(host)
        accept = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
        connection.request("HEAD", f"/v2/{REPOSITORY}/manifests/latest", headers=accept)
        connection.getresponse().read()
        times.append(time.monotonic() - start)
        connection.close()
    return statistics.median(times)


def _print(scenario: str, runs: list[Run], contestants: list[Contestant]) -> None:
    kinds = {contestant.name: contestant.kind for contestant in contestants}
    by_name: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: list(kinds).index(run.contestant)):
        by_name.setdefault(run.contestant, []).append(run)
    if not by_name:
        return

    def median(name: str, field: str) -> float:
        return statistics.median(getattr(run, field) for run in by_name[name])

    peers = [name for name in by_name if kinds[name] == "peer"]
    best = min((median(name, "wall") for name in peers), default=None)
    floor = FLOOR in by_name
    rounds = max(run.round for run in runs) + 1
    print(f"\n{scenario}: {SCENARIOS[scenario].title}; {rounds} rounds, medians (least–most)")
    print(f"{'':22}{'wall s':>19}{'+sync':>7}{'CPU s':>8}{'peak MB':>9}"
          f"{'/ best peer':>13}{'/ floor':>9}{'CPU / floor':>13}")  # fmt: skip
    for name, own in by_name.items():
        wall, cpu = median(name, "wall"), median(name, "cpu")
        walls = [run.wall for run in own]
        columns = [
            f"{wall:8.3f} ({min(walls):.2f}–{max(walls):.2f})".rjust(19),
            f"{median(name, 'sync'):7.2f}",
            f"{cpu:8.2f}",
            f"{median(name, 'peak') / 1e6:9.0f}",
            f"{wall / best:13.2f}" if best else " " * 13,
            f"{wall / median(FLOOR, 'wall'):9.2f}" if floor else "",
            f"{cpu / median(FLOOR, 'cpu'):13.2f}" if floor else "",
        ]
        print(f"{name:22}{''.join(columns)}")
    sys.stdout.flush()


def _machine() -> dict[str, object]:
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "registry": shutil.which("docker-registry"),
    }


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
