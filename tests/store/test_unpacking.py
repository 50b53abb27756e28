"""The store with its real unpacker."""

from __future__ import annotations

import io
import os
import random
import stat
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import trio
from store.stores import (
    Blob,
    Stream,
    arriving,
    chain_of,
    describe,
    digest_of,
    layer_of,
    open_with_threads,
    visible,
)

from trio_layers._digest import DiffID
from trio_layers._errors import UnpackError, UnsupportedStore
from trio_layers._store.directory import DirectoryStore
from trio_layers._store.layers import DirectoryLayer


def layer(*members: tarfile.TarInfo, **files: str) -> Blob:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member in members:
            tar.addfile(member)
        for name, data in files.items():
            member = tarfile.TarInfo(name.replace("__", "/"))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data.encode()))
    data = out.getvalue()
    return Blob(data, describe(data), DiffID(digest_of(data)))


def member(name: str, type: bytes, mode: int = 0o755, link: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.mode, found.linkname = type, mode, link
    return found


USUAL = layer(member("etc", tarfile.DIRTYPE), etc__passwd="root")
PRIVATE = layer(member("etc", tarfile.DIRTYPE, 0o700), etc__passwd="root")
IMPLYING = layer(etc__group="wheel")
LINKING = layer(member("etc/users", tarfile.LNKTYPE, link="etc/passwd"))


async def register(store: DirectoryStore, *blobs: Blob) -> DirectoryLayer:
    parent = None
    for blob in blobs:
        top = await store.register(Stream(blob.data), parent, blob.descriptor)
        parent = top.chain_id
    return top


def is_shared(layer: DirectoryLayer) -> bool:
    return layer.tree.name == layer.diff_id.removeprefix("sha256:")


async def test_a_tree_is_shared_where_the_directories_it_implies_are_as_implied(
    tmp_path: Path,
) -> None:
    async with open_with_threads(tmp_path) as store:
        for below in ([], [USUAL]):
            top = await register(store, *below, IMPLYING)
            assert is_shared(top)
            rootfs = await store.rootfs(top.chain_id)
            assert (await rootfs.stat("etc")).mode == 0o755
            assert await rootfs.read_bytes("/etc/group") == b"wheel"


async def test_where_they_are_not_the_layer_is_unpacked_on_top(tmp_path: Path) -> None:
    async with open_with_threads(tmp_path) as store:
        top = await register(store, PRIVATE, IMPLYING)
        assert not is_shared(top)
        rootfs = await store.rootfs(top.chain_id)
        assert (await rootfs.stat("etc")).mode == 0o700
        assert await rootfs.read_bytes("/etc/group") == b"wheel"
        assert await rootfs.read_bytes("/etc/passwd") == b"root"
    async with open_with_threads(tmp_path) as store:
        again = await register(store, USUAL, IMPLYING)
        assert is_shared(again)


async def test_a_hard_link_to_a_file_below(tmp_path: Path) -> None:
    async with open_with_threads(tmp_path) as store:
        top = await register(store, USUAL, LINKING)
        assert not is_shared(top)
        rootfs = await store.rootfs(top.chain_id)
        assert await rootfs.read_bytes("/etc/users") == b"root"
        with pytest.raises(UnpackError):
            await register(store, LINKING)
        assert await store.get(chain_of(LINKING)) is None


async def test_a_tree_that_was_made_upon_nothing_is_not_shared(tmp_path: Path) -> None:
    """The unpacker drops a whiteout without an entry to hide, so a tree for one parent lacks a
    whiteout that another needs.
    """
    whiteout = layer(**{"home__.wh.secret": ""})
    below = layer(member("home", tarfile.DIRTYPE), home__secret="s", home__other="o")
    async with open_with_threads(tmp_path) as store:
        alone = await register(store, whiteout)
        assert alone.chain_id == alone.diff_id
        assert not is_shared(alone)
        assert await register(store, whiteout) is alone
        top = await register(store, below, whiteout)
        assert is_shared(top)
        rootfs = await store.rootfs(top.chain_id)
        assert [entry.path for entry in await rootfs.walk()] == [b"", b"home", b"home/other"]


async def test_a_stream_that_fails_in_the_middle_of_a_file_fails_as_itself(tmp_path: Path) -> None:
    failure = PermissionError(13, "not our disk")
    blob = layer_of(big=random.Random(1).randbytes(300_000))
    async with open_with_threads(tmp_path) as store:
        with pytest.raises(PermissionError) as caught:
            await store.register(Stream(blob.data, stop_at=200_000, error=failure), None)
        assert caught.value is failure


async def test_cancelled_in_the_middle_of_a_file_nothing_is_left_but_its_bytes(
    tmp_path: Path,
) -> None:
    blob = layer_of(big=random.Random(1).randbytes(300_000))
    async with open_with_threads(tmp_path) as store:
        stream = Stream(blob.data, stop_at=200_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.register, stream, None, blob.descriptor)
            await stream.stopped.wait()
            nursery.cancel_scope.cancel()
        assert visible(tmp_path) == []
        async with store.ingest(blob.descriptor) as sink:
            assert sink.offset == 200_000
    assert arriving(tmp_path) == [blob.file_name + ".partial"]
    assert os.listdir(tmp_path / "leases") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become somebody else")
def test_without_privilege() -> None:
    """An unprivileged user has a store. Root may open another user's store, and leaves it
    unchanged.
    """
    script = Path(__file__).with_name("unprivileged.py")
    # Not in tmp_path, which is for its owner only.
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        path = Path(name) / "store"
        run = subprocess.run(
            [sys.executable, script, path],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(script.parent.parent)},
        )
        assert (run.stdout, run.stderr) == ("done\n", "")
        assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (65534, 0o700)
        with pytest.raises(UnsupportedStore, match="65534"):
            trio.run(open_and_leave, path)


async def open_and_leave(path: Path) -> None:
    async with open_with_threads(path):
        pytest.fail("entered")
