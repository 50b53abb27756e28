"""Tools for fair runs: a new disk, a measured group of processes, a clean end.

They need Linux and root. The context managers remove everything that they make.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import attrs

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PREFIX = "layers-bench-"  # short, because podman accepts no long paths
MEMORY = Path("/dev/shm")
PAGE = os.sysconf("SC_PAGE_SIZE")


def enter_own_mounts(module: str) -> None:
    """Continue in a new mount namespace, whose mounts end with this process."""
    marker = "TRIO_LAYERS_BENCHMARKS_UNSHARED"
    if os.environ.pop(marker, None) is None:
        os.environ[marker] = "1"
        unshare = ["unshare", "--mount", "--propagation", "private"]
        os.execvp("unshare", [*unshare, sys.executable, "-m", module, *sys.argv[1:]])


def interrupt_on_signals() -> None:
    """Raise `KeyboardInterrupt` for each signal that ends a process."""
    for number in ENDING:
        signal.signal(number, signal.default_int_handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Block these signals during a clean-up."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run(command: list[str], **options: object) -> None:
    """Run a command, and show its output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise Failed(command, done.stdout + done.stderr)


class Failed(Exception):
    """A command failed."""

    def __init__(self, command: list[str], output: str) -> None:
        last = " / ".join(output.strip().splitlines()[-2:])
        super().__init__(f"{' '.join(command[:4])}: {last}")


def disk_for(facts: Mapping[str, int], images: int = 1) -> int:
    """Return the size of a disk for some images.

    It is large enough for contestants that keep more than others.
    """
    return images * (facts["packed"] + facts["unpacked"]) * 3 // 2 + (1 << 30)


@contextmanager
def fresh_disk(memory: Path, size: int) -> Iterator[Path]:
    """Make and mount an ext4 on a file in memory."""
    image, mount = memory / "disk.img", memory / "disk"
    try:
        with image.open("wb") as file:
            # A real disk has its sectors already. A sparse file gets its memory at the first write,
            # perhaps from the host, which takes three times as long.
            os.posix_fallocate(file.fileno(), 0, size)
        mount.mkdir()
        options = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
        run(["mkfs.ext4", "-q", "-F", "-E", options, str(image)])
        run(["mount", "-o", "loop", str(image), str(mount)])  # the loop device ends with the mount
        yield mount
    finally:
        with uninterrupted():
            _unmount_all(mount)
            shutil.rmtree(mount, ignore_errors=True)
            image.unlink(missing_ok=True)


def _unmount_all(top: Path) -> None:
    """Unmount it and all mounts of daemons in it, the newest first."""
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for path in reversed(mounted):
        path = path.encode().decode("unicode_escape")
        if path == str(top) or path.startswith(f"{top}/"):
            for _ in range(100):
                if subprocess.run(["umount", path], stderr=subprocess.DEVNULL).returncode == 0:
                    break
                time.sleep(0.05)
            else:
                run(["umount", "--lazy", path])


@attrs.frozen
class Usage:
    """CPU time of a group of processes so far, in seconds."""

    user: float
    system: float

    @property
    def total(self) -> float:
        return self.user + self.system


@attrs.define
class Peak:
    bytes: int = 0

    def note(self, size: int) -> None:
        self.bytes = max(self.bytes, size)


@attrs.define
class Group:
    """A cgroup (v2) with all processes of one contestant.

    The kernel counts CPU time, including ended processes. Memory is the sum of the resident memory
    of all processes, read a hundred times a second; pages that two processes share count twice.
    """

    path: Path

    def usage(self) -> Usage:
        fields = dict(line.split() for line in (self.path / "cpu.stat").read_text().splitlines())
        return Usage(int(fields["user_usec"]) / 1e6, int(fields["system_usec"]) / 1e6)

    def start(self, command: list[str], **options: object) -> subprocess.Popen[str]:
        """Start a process in the group, in a session of its own, safe from our Ctrl-C."""
        enter = 'echo $$ > "$0" && exec "$@"'
        shell = ["/bin/sh", "-c", enter, str(self.path / "cgroup.procs"), *command]
        return subprocess.Popen(shell, start_new_session=True, text=True, **options)

    def kill(self) -> None:
        (self.path / "cgroup.kill").write_text("1")
        for _ in range(1000):
            if "populated 0" in (self.path / "cgroup.events").read_text():
                return
            time.sleep(0.01)
        raise TimeoutError(f"{self.path}: its processes do not end")

    @contextmanager
    def watched(self) -> Iterator[Peak]:
        """Note the peak of memory while the block runs."""
        peak, done = Peak(), threading.Event()

        def watch() -> None:
            while not done.wait(0.01):
                peak.note(self._resident())

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield peak
        finally:
            done.set()
            watcher.join()

    def _resident(self) -> int:
        total = 0
        for pid in (self.path / "cgroup.procs").read_text().split():
            try:
                with open(f"/proc/{pid}/statm") as file:
                    total += int(file.read().split()[1])
            except (FileNotFoundError, ProcessLookupError):
                pass  # it has ended
        return total * PAGE


def _cgroup_root() -> Path:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(mount)
    raise SystemExit(
        "benchmarks need cgroup v2 to measure the CPU time of daemons: none is mounted"
    )


@contextmanager
def group(name: str) -> Iterator[Group]:
    """Make a cgroup, and kill all its processes in the end."""
    path = _cgroup_root() / f"{PREFIX}{os.getpid()}-{name}"
    path.mkdir()
    made = Group(path)
    try:
        yield made
    finally:
        with uninterrupted():
            made.kill()
            path.rmdir()


@contextmanager
def memory() -> Iterator[Path]:
    """Make a directory in memory."""
    made = MEMORY / f"{PREFIX}{os.getpid()}"
    made.mkdir(mode=0o700)
    try:
        yield made
    finally:
        with uninterrupted():
            shutil.rmtree(made)


def sweep() -> None:
    """Remove the leftovers of a killed run."""
    with uninterrupted():
        _sweep()


def _sweep() -> None:
    for path in (*_cgroup_root().glob(f"{PREFIX}*"), *MEMORY.glob(f"{PREFIX}*")):
        pid = path.name.removeprefix(PREFIX).partition("-")[0]
        if Path("/proc", pid).exists():
            continue
        if path.parent == MEMORY:
            shutil.rmtree(path)
        else:
            Group(path).kill()
            path.rmdir()


REGISTRY = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {root}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


@contextmanager
def registry(root: Path) -> Iterator[str]:
    """Run docker-registry on loopback with the storage ``root``."""
    if shutil.which("docker-registry") is None:
        raise SystemExit("docker-registry is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = root / "config.yml"
    config.write_text(REGISTRY.format(root=root, port=port))
    # The group is not measured; it ends all processes of the registry.
    with group("registry") as processes:
        serve = ["docker-registry", "serve", str(config)]
        processes.start(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: _listens(port), "docker-registry")
        yield f"127.0.0.1:{port}"


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def wait_for(ready: Callable[[], bool], program: str) -> None:
    for _ in range(600):
        if ready():
            return
        time.sleep(0.05)
    raise Failed([program], "does not answer")
