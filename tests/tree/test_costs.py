"""Deep paths and repeated removals cost no more than one visit of each entry."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from _tools.layer_stacks import unpack_blob
from _tools.plain_tars import archive

from trio_layers._errors import LimitExceeded
from trio_layers._tree.directories import Directories

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices need root")


def count_calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> Callable[[], int]:
    """Count the calls of these functions of `os`."""
    calls = 0

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return lambda: calls


def test_depth_costs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep file takes one open call, also if a few directories alternate."""
    deep = "/".join(["d"] * 300)
    files = [{"name": f"{branch}/{deep}/{number}"} for number in range(200) for branch in "abc"]
    opened = count_calls(monkeypatch, "open")
    unpack_blob(archive(*files), tmp_path / "t", verified=False)
    # Each directory is looked up, opened when it is made, and opened for its times.
    assert opened() < len(files) + 4 * 3 * 300


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "l", "type": "hardlink", "linkname": "d/" * 3000 + "f"},
        {"name": "d/" * 3000 + ".wh..wh..opq"},
        {"name": "d/" * 3000 + ".wh.f"},
    ],
    ids=range(3),
)
def test_long_paths_are_refused_as_they_stand(tmp_path: Path, entry: dict) -> None:
    """The length is checked before any look-up, whose cost would be the square of the length."""
    with pytest.raises(LimitExceeded, match=rf"^'{entry['name'][:50]}.*max_path"):
        unpack_blob(archive({"name": "d"}, entry), tmp_path / "t", verified=False)


@pytest.mark.parametrize(
    "removals",
    [
        [".wh.d"] * 300,
        ["d/.wh..wh..opq"] * 300,
        [f"d/.wh.{number}" for number in range(300)],
        [f"{'d/' * depth}.wh..wh..opq" for depth in range(100, 0, -1)] * 3,
        [f"{'d/' * depth}.wh..wh..opq" for depth in range(1, 101)] * 3,
    ],
    ids=range(5),
)
def test_removals_are_linear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removals: list[str]
) -> None:
    """However often a directory is removed or hidden, each child is visited once."""
    files = [{"name": f"d/{number}"} for number in range(300)]
    files += [{"name": f"{'d/' * depth}.wh.x"} for depth in range(2, 101)]
    looked = count_calls(monkeypatch, "scandir", "listdir")
    unpack_blob(
        archive(*files, *({"name": name} for name in removals)), tmp_path / "t", verified=False
    )
    assert looked() <= 4 * 101


def test_directory_cache_is_bounded(tmp_path: Path) -> None:
    """Only a few visited directories stay open, and each path leads to the right one."""
    root = os.open(tmp_path, os.O_RDONLY)
    directories = Directories(root)
    before = len(os.listdir("/proc/self/fd"))
    deep = b"/".join([b"d"] * 300)
    os.makedirs(os.fsencode(tmp_path) + b"/" + deep)
    for number in range(300):
        (tmp_path / str(number)).mkdir()
        there = os.fstat(directories.open(b"%d" % number))
        assert there.st_ino == (tmp_path / str(number)).stat().st_ino
    there = os.fstat(directories.open(deep))
    assert there.st_ino == os.stat(os.fsencode(tmp_path) + b"/" + deep).st_ino
    assert len(os.listdir("/proc/self/fd")) <= before + 128
    directories.close()
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(root)
