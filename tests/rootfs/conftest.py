"""Fixtures for exports."""

from __future__ import annotations

from pathlib import Path

import pytest
from _tools.layer_stacks import unpack_stack
from _tools.plain_tars import archive as tar_of
from rootfs.exports import LAYER

from trio_layers._rootfs.merged import MergedTree


@pytest.fixture
def view(tmp_path: Path) -> MergedTree:
    return MergedTree(unpack_stack([tar_of(*LAYER)], tmp_path))
