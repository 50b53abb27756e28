"""Fixtures for several rooms."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from _tools.docker_registry import DockerRegistry, run_docker_registry

# A shell starts background jobs with SIGINT ignored. The tests and their child processes would
# inherit this, and the tests of Ctrl-C would fail.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def docker_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    """Debian's docker-registry on loopback, one for the whole run: use different names in it."""
    with run_docker_registry(tmp_path_factory.mktemp("docker-registry")) as registry:
        yield registry
