"""Pulls from docker-registry on loopback, beside ``skopeo copy`` and ``umoci unpack``.

    python -m benchmarks.pull [--shape large|small|layer-100M|layer-1G|file-1G] [--rounds N]

As root, with docker-registry, skopeo, umoci and e2fsprogs installed. Each run writes to an ext4
of its own, made for it on a file in memory: on a used disk the same work may take ten times as
long. Contestants take turns. Peak memory is that of the largest process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from .images import SHAPES, write_layout

CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {root}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


@attrs.frozen
class Figures:
    wall: float
    cpu: float
    peak_mb: float


def ours(host: str, disk: Path) -> list[list[str]]:
    command = [sys.executable, "-m", "trio_layers", "pull", "-q", f"{host}/bench/image:latest"]
    return [[*command, "--store", str(disk / "store")]]


def skopeo_and_umoci(host: str, disk: Path) -> list[list[str]]:
    image = f"docker://{host}/bench/image:latest"
    layout = f"{disk}/layout:latest"
    return [
        ["skopeo", "copy", "-q", "--src-tls-verify=false", image, f"oci:{layout}"],
        ["umoci", "unpack", "--image", layout, f"{disk}/bundle"],
    ]


CONTESTANTS: dict[str, Callable[[str, Path], list[list[str]]]] = {
    "trio_layers": ours,
    "skopeo copy + umoci unpack": skopeo_and_umoci,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="large")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    figures: dict[str, list[Figures]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, _registry(Path(name)) as host:
        layout = Path(name) / "layout"
        write_layout(layout, SHAPES[options.shape])
        _run(["skopeo", "copy", "-q", "--dest-tls-verify=false", f"oci:{layout}:latest",
              f"docker://{host}/bench/image:latest"])  # fmt: skip
        shutil.rmtree(layout)
        for _ in range(options.rounds):
            for contestant, commands in CONTESTANTS.items():
                with _fresh_disk(Path(name)) as disk:
                    figures[contestant].append(_measure(commands(host, disk)))
    print(f"{options.shape}: {options.rounds} rounds, medians")
    for contestant, runs in figures.items():
        wall, cpu, peak = (
            statistics.median(getattr(run, field) for run in runs)
            for field in ("wall", "cpu", "peak_mb")
        )
        print(f"  {contestant:<28} wall {wall:6.2f} s   CPU {cpu:6.2f} s   peak {peak:6.0f} MB")


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _measure(commands: list[list[str]]) -> Figures:
    """Run commands one after another, to the moment when all is on disk."""
    start, cpu, peak = time.monotonic(), 0.0, 0
    for command in commands:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        cpu += usage.ru_utime + usage.ru_stime
        peak = max(peak, usage.ru_maxrss)
    os.sync()
    return Figures(time.monotonic() - start, cpu, peak / 1024)


@contextmanager
def _registry(directory: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = directory / "config.yml"
    config.write_text(CONFIG.format(root=directory / "registry", port=port))
    serve = ["docker-registry", "serve", str(config)]
    # It calls each question whether a blob is there an error.
    with subprocess.Popen(serve, stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for(port)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def _wait_for(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError("docker-registry does not answer")


@contextmanager
def _fresh_disk(directory: Path) -> Iterator[Path]:
    image, mount = directory / "disk.img", directory / "disk"
    with image.open("wb") as file:
        file.truncate(6 << 30)
    mount.mkdir()
    _run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image)])
    _run(["mount", "-o", "loop", str(image), str(mount)])
    try:
        yield mount
    finally:
        _run(["umount", str(mount)])
        mount.rmdir()
        image.unlink()


if __name__ == "__main__":
    main()
