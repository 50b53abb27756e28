"""Debian's containerd as a child process, and ctr, to read its overlay mounts of images."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
from _tools.docker_registry import require, stop

CONFIG = """\
version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "{socket}"
"""


@attrs.frozen
class Containerd:
    """A running containerd."""

    directory: Path
    socket: Path

    def ctr(self, *args: str) -> str:
        command = [require("ctr"), "--address", str(self.socket), *args]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.strip()

    @contextmanager
    def mounted(self, reference: str) -> Iterator[Path]:
        """Pull an image from a registry without TLS, and mount it read-only, for the block."""
        self.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference)
        target = self.directory / "mount"
        target.mkdir(exist_ok=True)
        self.ctr("images", "mount", "--snapshotter", "overlayfs", reference, str(target))
        try:
            yield target
        finally:
            self.ctr("images", "unmount", "--rm", "--snapshotter", "overlayfs", str(target))


@contextmanager
def run_containerd(directory: Path) -> Iterator[Containerd]:
    """Run a containerd with all its data in ``directory``."""
    program = require("containerd")
    # The path of a socket may have 107 bytes, and the directory's path may be longer.
    with tempfile.TemporaryDirectory() as short, (directory / "log").open("wb") as log:
        socket = Path(short) / "socket"
        config = directory / "config.toml"
        config.write_text(CONFIG.format(directory=directory, socket=socket))
        process = subprocess.Popen(
            [program, "--config", str(config)], stdout=log, stderr=subprocess.STDOUT
        )
        containerd = Containerd(directory, socket)
        try:
            _wait_until_it_answers(process, containerd)
            yield containerd
        finally:
            stop(process)


def _wait_until_it_answers(process: subprocess.Popen[bytes], containerd: Containerd) -> None:
    command = [require("ctr"), "--address", str(containerd.socket), "version"]
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        if subprocess.run(command, capture_output=True).returncode == 0:
            return
        time.sleep(0.05)  # ctr's error lacks the reason
    log = (containerd.directory / "log").read_text()
    pytest.fail(f"containerd did not start:\n{log}")
