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
log: {{level: info, accesslog: {{disabled: {quiet}}}}}
storage: {{filesystem: {{rootdirectory: {data}}}}}
http: {{addr: "{address}", secret: none{http}}}
{more}
"""
REQUEST = re.compile(r'"((?:GET|HEAD) [^"]+) HTTP/1\.1" (\d+)')
LISTENING = re.compile(r"listening on (127\.0\.0\.1:\d+)")


@attrs.frozen
class DockerRegistry:
    """A running docker-registry.

    Attributes:
        host: Host and port, as in a reference.
        log: The file its output goes to.
    """

    host: str
    log: Path

    def requests(self) -> list[str]:
        """Return the requests in its log, as ``GET /v2/… HTTP/1.1`` and the status."""
        found = REQUEST.findall(self.log.read_text())
        return [f"{request} {status}" for request, status in found]

    def push(
        self,
        layout: Path,
        name: str,
        *,
        tag: str = "latest",
        as_docker: bool = False,
        creds: str | None = None,
    ) -> str:
        """Copy the image with this tag from an OCI layout to ``name`` (``library/demo:1``). The
        manifest stays as it is, or is rewritten to Docker's schema 2. Return the reference to pull
        it by.
        """
        reference = f"{self.host}/{name}"
        command = [require("skopeo"), "copy", "--quiet", "--all"]
        command += ["--format", "v2s2"] if as_docker else ["--preserve-digests"]
        command += [] if creds is None else ["--dest-creds", creds]
        command += ["--dest-tls-verify=false", f"oci:{layout}:{tag}", f"docker://{reference}"]
        subprocess.run(command, check=True, timeout=120)
        return reference


def require(program: str) -> str:
    """Return the program's path. If it is missing, skip the test, or fail it in CI."""
    path = shutil.which(program)
    if path is None:
        missing = f"{program} is not installed"
        if os.environ.get("CI") or os.environ.get("TRIO_LAYERS_REQUIRE_ALL"):
            pytest.fail(missing)
        pytest.skip(missing)
    return path


@contextmanager
def run_docker_registry(
    directory: Path,
    *,
    address: str = "127.0.0.1:0",
    quiet: bool = True,
    http: str = "",
    more: str = "",
) -> Iterator[DockerRegistry]:
    """Run a registry with all its data in ``directory``, on a port of its own choice.

    Args:
        directory: For data, configuration and log.
        address: The host and port to listen on.
        quiet: Whether to log no requests.
        http: YAML for this part of the configuration, such as ``tls: {…}``.
        more: YAML for the top level of the configuration, such as ``auth: {…}`` or ``proxy: {…}``.
    """
    program = require("docker-registry")
    config, log = directory / "config.yml", directory / "log"
    text = CONFIG.format(
        data=directory / "data",
        address=address,
        quiet=str(quiet).lower(),
        http=f", {http}" if http else "",
        more=more,
    )
    config.write_text(text)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, "serve", str(config)], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield DockerRegistry(_wait_until_it_listens(process, log), log)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a child process. If SIGTERM does not end it, kill it and fail."""
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
        time.sleep(0.02)  # the reason is only in its log
    pytest.fail(f"docker-registry did not start:\n{log.read_text()}")
