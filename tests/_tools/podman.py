"""podman with a storage of its own, to read its overlay mounts of images."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
from _tools.docker_registry import require


@attrs.frozen
class Podman:
    """Run podman on a storage directory, with a short path for its run-time files."""

    directory: Path
    short: Path

    def run(self, *args: str) -> str:
        command = [require("podman"), "--root", str(self.directory / "storage")]
        command += ["--runroot", str(self.short / "run"), "--storage-driver", "overlay"]
        command += ["--tmpdir", str(self.short / "tmp")]
        done = subprocess.run([*command, *args], stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.strip()

    @contextmanager
    def mounted(self, reference: str) -> Iterator[Path]:
        """Pull an image from a registry without TLS, and mount it, for the block."""
        self.run("pull", "--quiet", "--tls-verify=false", reference)
        path = Path(self.run("image", "mount", reference))
        try:
            yield path
        finally:
            self.run("image", "umount", reference)


@contextmanager
def open_podman(directory: Path) -> Iterator[Podman]:
    """Open a podman with all its data in ``directory``."""
    # podman's runroot may have at most 50 characters.
    with tempfile.TemporaryDirectory() as short:
        try:
            yield Podman(directory, Path(short))
        finally:
            # podman mounts its storage directory on itself.
            subprocess.run(["umount", "--quiet", directory / "storage" / "overlay"])
