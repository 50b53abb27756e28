"""Measures the start of the library and of the command line, beside that of trio.

    python -m benchmarks --only start

Each figure is the time of a whole process, with the interpreter's own start. The packages are in
two environments: with compiled modules, as pip installs them, and without, as with
``PYTHONDONTWRITEBYTECODE`` and ``pip --no-compile``. The commands take turns.
"""

from __future__ import annotations

import compileall
import os
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import trio

from trio_layers import Descriptor, open_store
from trio_layers._catalog.rows import StoredImage
from trio_layers.testing import File, build_image

from .machine import registry
from .stock import REPOSITORY, read_blobs, stock

ROOT = Path(__file__).parents[1]
IMAGES = 1000

# Prints the directories and files of all packages that a pull loads.
_LIST = """
import os, sys, sysconfig
import trio_layers._commands.pulling, trio_layers._commands.running, backports.zstd, isal
site = sysconfig.get_path("purelib")
names = {name.partition(".")[0] for name in sys.modules}
for name in sorted(names):
    path = os.path.join(site, name)
    if os.path.isdir(path) or os.path.isfile(path := path + ".py"):
        print(path)
"""
_SCRIPT = "import sys\nfrom trio_layers._cli import main\nsys.exit(main())\n"


@attrs.frozen
class Figure:
    """The start of a command in one environment.

    Attributes:
        environment: ``compiled`` or ``not compiled``.
        name: The command.
        seconds: The median time.
        ratio: The same, divided by the time of ``import trio``.
    """

    environment: str
    name: str
    seconds: float
    ratio: float


def measure(cache: Path, directory: Path, rounds: int) -> list[Figure]:
    """Measure all commands, and print a table.

    Args:
        cache: The directory of the images.
        directory: A directory in memory.
        rounds: A tenth of the number of runs of each command.
    """
    full, there = directory / "full", directory / "there"
    trio.run(_fill, full)
    storage = stock(cache, "small")
    read_blobs(storage)
    figures = []
    with registry(storage) as host:
        pull = ["pull", "-q", "--store", str(there), f"{host}/{REPOSITORY}:latest"]
        for environment in ("compiled", "not compiled"):
            with _environment(directory / "venv", environment) as python:
                script = [python, str(directory / "venv" / "bin" / "trio-layers")]
                commands = {
                    "import trio": [python, "-c", "import trio"],
                    "import trio_layers": [python, "-c", "import trio_layers"],
                    "trio-layers --version": [*script, "--version"],
                    "trio-layers --help": [*script, "--help"],
                    "trio-layers images": [*script, "images", "--store", str(full)],
                    "trio-layers pull": [*script, *pull],
                }
                _run(commands["trio-layers pull"])
                figures += _compare(environment, commands, 10 * rounds)
    print(f"\nstart: medians of {10 * rounds} runs; ratio to python -c 'import trio'")
    for figure in figures:
        print(f"{figure.environment:14}{figure.name:24}{figure.seconds * 1000:8.1f} ms"
              f"{figure.ratio:7.2f}")  # fmt: skip
    return figures


def _compare(environment: str, commands: dict[str, list[str]], runs: int) -> Iterator[Figure]:
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            start = time.perf_counter()
            _run(command)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, seconds in medians.items():
        yield Figure(environment, name, seconds, seconds / medians["import trio"])


def _run(command: list[str]) -> None:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=True)


@contextmanager
def _environment(path: Path, kind: str) -> Iterator[str]:
    """Make a virtual environment with copies of our packages; yield its interpreter."""
    venv.create(path, symlinks=True, with_pip=False)
    [site] = path.glob("lib/python*/site-packages")
    command = [sys.executable, "-c", _LIST]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    for source in map(Path, [*done.stdout.splitlines(), ROOT / "trio_layers"]):
        if source.is_dir():
            target = site / source.name
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, site)
    (path / "bin" / "trio-layers").write_text(_SCRIPT)
    if kind == "compiled":
        compileall.compile_dir(site, quiet=2)
    try:
        yield str(path / "bin" / "python")
    finally:
        shutil.rmtree(path)


async def _fill(path: Path) -> None:
    """Make a store of many names."""
    image = build_image([[File("file", b"content")]])
    async with open_store(path) as store, store.lease():
        documents = []
        for built, data in (
            (image.descriptor, image.manifest),
            (image.config_descriptor, image.config),
        ):
            descriptor = Descriptor(built.media_type, built.digest, built.size)
            await store.put_blob(descriptor, data)
            documents.append(descriptor)
        await store.put_images(
            [
                StoredImage(f"example.com/image-{number}:1", "linux/amd64", *documents, None, None)
                for number in range(IMAGES)
            ]
        )
