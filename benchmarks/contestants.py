"""The contestants: this package in two ways, its peers, and references to compare with.

A contestant is opened on an empty disk, which starts its daemon, if any. Then it pulls.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import attrs

from .machine import Failed, Group, wait_for

ROOT = Path(__file__).parents[1]

Pull = Callable[[str], float]
"""Pulls a reference, and returns the seconds that it took."""


@attrs.frozen
class Contestant:
    """A program that pulls images.

    Attributes:
        name: The name in tables.
        kind: ``ours``, ``peer`` or ``reference``.
        programs: The programs that must be installed.
        open: Prepares the contestant on an empty disk.
        version: A command that prints the version.
        again: Whether it can pull a second image to the same disk.
    """

    name: str
    kind: str
    programs: tuple[str, ...]
    open: Callable[[Group, Path], AbstractContextManager[Pull]]
    version: tuple[str, ...] = ()
    again: bool = True

    def missing(self) -> list[str]:
        return [program for program in self.programs if shutil.which(program) is None]


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _timed(
    group: Group,
    commands: list[list[str]],
    environment: Mapping[str, str] = {},
) -> float:
    """Run commands, one after another."""
    start = time.monotonic()
    for command in commands:
        process = group.start(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, _ = process.communicate()
        if process.returncode:
            raise Failed(command, output)
    return time.monotonic() - start


@contextmanager
def _process(group: Group, disk: Path) -> Iterator[Pull]:
    def pull(reference: str) -> float:
        arguments = ["pull", "-q", "--store", str(disk / "store"), reference]
        return _timed(group, [_python("trio_layers", *arguments)])

    yield pull


@contextmanager
def _library(group: Group, disk: Path) -> Iterator[Pull]:
    process = group.start(
        _python("benchmarks.warm", str(disk / "store")),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def answer() -> str:
        line = stdout.readline()
        if not line:
            raise Failed(["library"], "the process has ended; see its error above")
        return line

    def pull(reference: str) -> float:
        stdin.write(f"{reference}\n")
        stdin.flush()
        return float(answer())

    answer()
    yield pull
    stdin.close()
    process.wait()


@contextmanager
def _floor(group: Group, disk: Path) -> Iterator[Pull]:
    yield lambda reference: _timed(group, [_python("benchmarks.floor", reference, str(disk))])


@contextmanager
def _inflate(group: Group, disk: Path) -> Iterator[Pull]:
    """Only inflates the floor's blobs on one core; they are fetched before."""

    def pull(reference: str) -> float:
        _timed(group, [_python("benchmarks.floor", reference, str(disk))])
        process = group.start(
            _python("benchmarks.floor", "--inflate", str(disk)),
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        output, _ = process.communicate()
        if process.returncode:
            raise Failed(["floor", "--inflate"], output)
        return float(output)

    yield pull


@contextmanager
def _docker(group: Group, disk: Path) -> Iterator[Pull]:
    socket, log = disk / "docker.sock", disk / "docker.log"
    (disk / "daemon.json").write_text("{}")  # the machine's own configuration is not used
    with log.open("wb") as file:
        daemon = group.start(
            ["dockerd", "--host", f"unix://{socket}", "--data-root", str(disk / "docker"),
             "--exec-root", str(disk / "exec"), "--pidfile", str(disk / "pid"),
             "--config-file", str(disk / "daemon.json"), "--storage-driver", "overlay2",
             "--bridge", "none", "--iptables=false", "--ip6tables=false"],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file,
        )  # fmt: skip
    docker = ["docker", "--host", f"unix://{socket}"]
    _wait_for_daemon([*docker, "version"], daemon, log)
    environment = {"DOCKER_CONFIG": str(disk / "config")}
    yield lambda reference: _timed(group, [[*docker, "pull", "-q", reference]], environment)


_CONTAINERD = """\
version = 2
root = "{disk}/root"
state = "{disk}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{disk}/containerd.sock"
[ttrpc]
  address = "{disk}/containerd.sock.ttrpc"
"""


def _containerd(directory: Path | None = None) -> Callable[..., AbstractContextManager[Pull]]:
    def program(name: str) -> str:
        return name if directory is None else str(directory / name)

    @contextmanager
    def opened(group: Group, disk: Path) -> Iterator[Pull]:
        config, log = disk / "config.toml", disk / "containerd.log"
        config.write_text(_CONTAINERD.format(disk=disk))
        with log.open("wb") as file:
            daemon = group.start(
                [program("containerd"), "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        ctr = [program("ctr"), "--address", str(disk / "containerd.sock")]
        _wait_for_daemon([*ctr, "version"], daemon, log)
        command = [*ctr, "images", "pull", "--plain-http"]
        yield lambda reference: _timed(group, [[*command, reference]])

    return opened


def _wait_for_daemon(command: list[str], daemon: subprocess.Popen[str], log: Path) -> None:
    def answers() -> bool:
        if daemon.poll() is not None:
            raise Failed(["the daemon"], log.read_text())
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0

    wait_for(answers, command[0])


@contextmanager
def _podman(group: Group, disk: Path) -> Iterator[Pull]:
    # podman puts blobs into TMPDIR first, so TMPDIR must be on the same disk.
    (disk / "tmp").mkdir()
    podman = ["podman", "--root", str(disk / "root"), "--runroot", str(disk / "run"),
              "--storage-driver", "overlay", "--events-backend", "none"]  # fmt: skip
    command = [*podman, "pull", "-q", "--tls-verify=false"]
    environment = {"TMPDIR": str(disk / "tmp")}
    yield lambda reference: _timed(group, [[*command, reference]], environment)


@contextmanager
def _skopeo_and_umoci(group: Group, disk: Path) -> Iterator[Pull]:
    (disk / "tmp").mkdir()
    layout = f"{disk}/layout:latest"

    def pull(reference: str) -> float:
        copy = ["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{reference}"]
        unpack = ["umoci", "unpack", "--image", layout, f"{disk}/bundle"]
        environment = {"TMPDIR": str(disk / "tmp")}
        return _timed(group, [[*copy, f"oci:{layout}"], unpack], environment)

    yield pull


@contextmanager
def _crane(group: Group, disk: Path) -> Iterator[Pull]:
    (disk / "rootfs").mkdir()
    script = 'crane export --insecure "$0" - | tar -x -C "$1"'
    yield lambda reference: _timed(group, [["sh", "-c", script, reference, str(disk / "rootfs")]])


FLOOR = "floor"
INFLATE = "inflate"

CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("library", "ours", (), _library),
        Contestant("process", "ours", (), _process),
        Contestant("docker", "peer", ("dockerd", "docker"), _docker, ("dockerd", "--version")),
        Contestant(
            "containerd", "peer", ("containerd", "ctr"), _containerd(), ("containerd", "--version")
        ),
        Contestant("podman", "peer", ("podman",), _podman, ("podman", "--version")),
        Contestant(
            "skopeo+umoci",
            "peer",
            ("skopeo", "umoci"),
            _skopeo_and_umoci,
            ("skopeo", "--version"),
            again=False,
        ),
        # crane checks less than the others, and keeps no layers.
        Contestant("crane", "reference", ("crane", "tar"), _crane, ("crane", "version"), False),
        Contestant(FLOOR, "reference", (), _floor, again=False),
        Contestant(INFLATE, "reference", (), _inflate, again=False),
    )
}


def other_containerd(directory: Path) -> Contestant:
    """Return a contestant for another containerd beside the installed one."""
    program = str(directory / "containerd")
    version = versions([Contestant("", "peer", (), _containerd(), (program, "--version"))])[""]
    name = f"containerd-{version}"
    programs = (program, str(directory / "ctr"))
    return Contestant(name, "reference", programs, _containerd(directory), (program, "--version"))


def versions(contestants: list[Contestant]) -> dict[str, str]:
    found = {}
    for contestant in contestants:
        if contestant.version:
            done = subprocess.run(contestant.version, capture_output=True, text=True)
            match = re.search(r"\d+\.\d[\w.~+-]*", done.stdout)
            found[contestant.name] = match[0] if match else "unknown"
    return found
