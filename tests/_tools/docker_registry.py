"""Debian's docker-registry as a child process, and skopeo to push to it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest

CONFIG = """\
version: 0.1
log: {{level: info, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {data}}}}}
http: {{addr: "{address}", secret: none}}
"""
LISTENING = re.compile(r"listening on (127\.0\.0\.1:\d+)")


@attrs.frozen
class DockerRegistry:
    """A running docker-registry.

    Attributes:
        host: Host and port, as they stand in references.
        log: The file its output goes to.
    """

    host: str
    log: Path

    def push(
        self,
        layout: Path,
        name: str,
        *,
        tag: str = "latest",
        as_docker: bool = False,
        creds: str | None = None,
    ) -> str:
        """Copy an OCI layout's image of that tag to ``name`` (``library/demo:1``), as it is, or
        its manifest rewritten to Docker's schema 2; returns the reference to pull it by."""
        reference = f"{self.host}/{name}"
        command = [require("skopeo"), "copy", "--quiet", "--all"]
        command += ["--format", "v2s2"] if as_docker else ["--preserve-digests"]
        command += [] if creds is None else ["--dest-creds", creds]
        command += ["--dest-tls-verify=false", f"oci:{layout}:{tag}", f"docker://{reference}"]
        subprocess.run(command, check=True, timeout=120)
        return reference


def require(program: str) -> str:
    """The program's path; without it the test is skipped, or fails where nothing may be missing."""
    path = shutil.which(program)
    if path is None:
        missing = f"{program} is not installed"
        if os.environ.get("CI") or os.environ.get("TRIO_LAYERS_REQUIRE_ALL"):
            pytest.fail(missing)
        pytest.skip(missing)
    return path


@contextmanager
def run_docker_registry(
    directory: Path, *, auth: str = "", address: str = "127.0.0.1:0"
) -> Iterator[DockerRegistry]:
    """Run one that keeps all it has in ``directory``, on a port that it chooses itself.

    Args:
        directory: Where its files are.
        auth: Who may use it: a part of its configuration.
        address: Where it listens, in place of that.
    """
    program = require("docker-registry")
    config, log = directory / "config.yml", directory / "log"
    config.write_text(CONFIG.format(data=directory / "data", address=address) + auth)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, "serve", str(config)], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield DockerRegistry(_wait_until_it_listens(process, log), log)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a child process. One that does not end when asked is killed, and that is an error."""
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise


def _wait_until_it_listens(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        found = LISTENING.search(log.read_text())
        if found:
            return found[1]
        time.sleep(0.02)  # it tells nobody but its log
    pytest.fail(f"docker-registry did not start:\n{log.read_text()}")
