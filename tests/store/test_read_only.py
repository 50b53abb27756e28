"""Tests of missing and read-only stores."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import trio
from cli.test_rootfs import pulled, run
from store.stores import snapshot

from trio_layers import StoreNotFound, StoreReadOnly, UnsupportedStore, open_puller, open_store

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root to mount and to be another user")


@contextmanager
def bound_read_only(path: Path, target: Path) -> Iterator[None]:
    target.mkdir()
    subprocess.run(["mount", "--bind", path, target], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)
        yield
    finally:
        subprocess.run(["umount", target], check=True)


@pytest.mark.parametrize("there", [False, True])
async def test_a_store_that_is_not_there_is_not_made(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "typo"
    if there:
        path.mkdir()
    for options in ({"create": False}, {"read_only": True}):
        with pytest.raises(StoreNotFound, match=f"no store in {path}: pull or import an image"):
            async with open_store(path, **options):
                pytest.fail("entered")
    assert os.listdir(tmp_path) == (["typo"] if there else [])
    assert not there or os.listdir(path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("images",),
        ("rm", "demo:1"),
        ("gc", "--dry-run"),
        ("check", "--repair"),
        ("export", "demo:1", "out"),
        ("cat", "demo:1", "/file"),
        ("rootfs", "demo:1", "out"),
        ("mount", "demo:1"),
    ],
    ids=lambda arguments: arguments[0],
)
async def test_a_command_that_looks_or_removes_makes_no_store(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "typo"
    done = await run(arguments[0], "--store", path, *arguments[1:], store=tmp_path, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, b"")
    [line] = done.stderr.decode().splitlines()
    assert str(path) in line
    assert "pull" in line
    assert os.listdir(tmp_path) == []


async def read_all(path: Path, reference: str, target: Path, *, by_commands: bool = False) -> None:
    """Read a read-only store with the library or the commands, and check the results."""
    async with open_store(path, read_only=True) as store, open_puller(store) as puller:
        async with puller.pull(reference, policy="never") as image:
            release = await image.rootfs.read_bytes("/etc/os-release")
        assert (await store.check()).problems == ()
        assert (await store.usage()).size
        await forbidden(store, reference)
    if not by_commands:
        return
    shown = [
        await run("images", store=path),
        await run("cat", reference, "/etc/os-release", store=path),
        await run("rootfs", reference, target / "rootfs", store=path),
        await run("export", reference, target / "archive", store=path),
        await run("check", store=path),
    ]
    assert [(done.returncode, done.stderr) for done in shown] == [(0, b"")] * 5
    assert reference.encode() in shown[0].stdout
    assert shown[1].stdout == release
    assert (target / "archive").stat().st_size
    assert (target / "rootfs" / "etc" / "os-release").read_bytes() == release


async def forbidden(store: object, reference: str) -> None:
    calls = (
        lambda: store.collect(),
        lambda: store.collect(dry_run=True),
        lambda: store.remove(reference),
    )
    for call in calls:
        with pytest.raises(StoreReadOnly):
            await call()


@as_root
@pytest.mark.parametrize("log", ["none", "left", "in use"])
async def test_a_store_on_a_read_only_file_system(tmp_path: Path, log: str) -> None:
    """Reading works with a crash's log, too, and while another process uses the store."""
    path, bound = tmp_path / "store", tmp_path / "bound"
    async with pulled(path) as reference:
        pass
    catalog = path / "catalog.sqlite"
    (tmp_path / "target").mkdir()
    with closing(sqlite3.connect(catalog)) as writer:
        if log != "none":
            writer.execute("UPDATE image_references SET platform = platform")
            writer.commit()
            assert (path / "catalog.sqlite-wal").stat().st_size
        if log == "left":
            copies = {each: each.read_bytes() for each in path.glob("catalog.sqlite*")}
    if log == "left":
        for each, data in copies.items():
            each.write_bytes(data)
        (path / "catalog.sqlite-shm").unlink()
    before = snapshot(path)
    with bound_read_only(path, bound):
        with pytest.raises(StoreReadOnly, match=str(bound)):
            async with open_store(bound):
                pytest.fail("entered")
        if log == "in use":
            async with open_store(path):
                await read_all(bound, reference, tmp_path / "target")
        else:
            target, by_commands = tmp_path / "target", log == "none"
            await read_all(bound, reference, target, by_commands=by_commands)
            assert snapshot(path) == before


@as_root
async def test_root_reads_another_users_store(tmp_path: Path) -> None:
    """The commands write no file, and change no owner."""
    path = tmp_path / "store"
    async with pulled(path) as reference:
        pass
    for each in (path, *path.rglob("*")):
        if "trees" not in each.relative_to(path).parts[:1]:
            os.chown(each, 1234, 1234, follow_symlinks=False)
    (tmp_path / "target").mkdir()
    before = snapshot(path)
    with pytest.raises(UnsupportedStore, match="belongs to user 1234"):
        async with open_store(path):
            pytest.fail("entered")
    await read_all(path, reference, tmp_path / "target", by_commands=True)
    assert snapshot(path) == before
    assert (await run("rm", reference, store=path)).returncode == 1
    assert snapshot(path) == before


@as_root
async def test_a_link_in_another_users_store_leads_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "store"
    async with pulled(path):
        pass
    shutil.move(path / "trees", tmp_path / "trees")
    (path / "trees").symlink_to(tmp_path / "trees")
    with trio.fail_after(30):
        with pytest.raises(UnsupportedStore, match="trees in it is a link"):
            async with open_store(path, read_only=True):
                pytest.fail("entered")
