"""A short run of what `tree.fuzz` does for an hour."""

from __future__ import annotations

import os
import resource

import pytest
from tree.fuzz import open_world, run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices need root")

MOST_MEMORY = 256 * 1024
"""In KiB; twice what xz and zstd may ask for."""


def test_archives_at_random() -> None:
    """Whole ones are unpacked, and as Python reads them; damaged ones are, or are refused by an
    error of ours; nothing around the tree is touched, and memory stays bounded.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open_world() as world:
        run(world, 500, 20261124)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY
    # All that can come of one has come of some.
    kinds = {outcome.partition(":")[0] for outcome in world.outcomes}
    assert kinds >= {"ok, whole", "ok, all the same", "UnpackError"}
    assert world.outcomes["ok, whole"] > 100
    assert any("checksum" in outcome for outcome in world.outcomes)
