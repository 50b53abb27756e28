"""Random stacks of layers: whichever way they come, the result is that of unpacking in order."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from _tools.docker_registry import require
from hypothesis import HealthCheck, given, settings
from tree.generated_stacks import ORDERS, STACKS, examine_all

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="owners and mounts need root"),
]


def memory() -> Path | None:
    """A file system in memory, where nothing waits for a disk, if it takes user attributes (Linux
    6.6); ``None`` for the usual one.
    """
    try:
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            os.setxattr(file.fileno(), "user.probe", b"")
    except OSError:
        return None
    return Path("/dev/shm")


@settings(
    max_examples=80,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(stack=STACKS, orders=ORDERS)
def test_agreement(stack: list[list[dict]], orders: list[list[int]]) -> None:
    """Alone first or upon the parent, in one store upon several, mounted, as umoci has it."""
    require("umoci")
    examine_all(stack, orders, memory())
