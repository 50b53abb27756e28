"""A short run of `tree.fuzz`."""

from __future__ import annotations

import os
import resource

import pytest
from tree.fuzz import open_world, run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices need root")

MOST_MEMORY = 256 * 1024
"""In KiB; twice the limit of xz's and zstd's windows."""


def test_archives_at_random() -> None:
    """Undamaged archives are unpacked as Python reads them; others may raise our errors.

    Nothing around the tree changes, and memory stays bounded.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open_world() as world:
        run(world, 500, 20261124)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY
    # Each possible result has occurred.
    kinds = {outcome.partition(":")[0] for outcome in world.outcomes}
    assert kinds >= {"ok, whole", "ok, all the same", "UnpackError"}
    assert world.outcomes["ok, whole"] > 100
    assert any("checksum" in outcome for outcome in world.outcomes)
