"""A pull by an unprivileged user: the list of entries has the metadata that the disk lacks."""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
from pathlib import Path

import pytest
import trio

from trio_layers import open_puller
from trio_layers.testing import open_registry, sample_image

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become somebody else")


async def test_pull_without_privilege(tmp_path: Path) -> None:
    """The list has the same entries as for root, including owners and whiteouts."""
    script = Path(__file__).with_name("unprivileged.py")
    # Not in tmp_path, which is for its owner only.
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        store = Path(name) / "store"
        async with open_registry() as registry:
            reference = registry.add(sample_image(), "library/demo:latest")
            done = await trio.run_process(
                [sys.executable, script, tmp_path / "root", store, reference],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
            async with open_puller(tmp_path / "root") as puller, puller.pull(reference) as image:
                entries = await image.rootfs.walk()
        assert (done.returncode, done.stderr) == (0, b"")
        assert [json.loads(line) for line in done.stdout.splitlines()] == [
            [entry.path.decode(), entry.type, entry.mode, entry.uid, entry.gid] for entry in entries
        ]
        assert any(entry.uid == 1000 for entry in entries)
        found = {path: path.lstat() for path in store.rglob("*")}
        [whiteout] = [
            status
            for path, status in found.items()
            if path.name == "motd" and stat.S_ISCHR(status.st_mode)
        ]
        assert whiteout.st_rdev == 0
        assert {status.st_uid for status in found.values()} == {65534}
