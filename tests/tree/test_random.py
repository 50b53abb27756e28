"""Random stacks of layers give the same result however they are unpacked."""

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
    """Return a directory in memory, which is faster, or ``None`` for the usual one.

    A tmpfs needs Linux 6.6 for user attributes.
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
    """Alone or on the parent, on several parents, mounted, and compared with umoci."""
    require("umoci")
    examine_all(stack, orders, memory())
