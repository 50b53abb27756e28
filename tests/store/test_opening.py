"""Opening a store: its parts, and directories that are refused and left unchanged."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from _tools.swapping import plant_link
from store.stores import (
    Stream,
    arriving,
    describe,
    layer_of,
    mounted_tmpfs,
    opened,
    put_sample_image,
    remount,
    snapshot,
)

from trio_layers._errors import StoreError, StoreReadOnly, UnsupportedStore
from trio_layers._store import layout

LAYER = layer_of(hello="world")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root to be another user")


async def make(path: Path) -> None:
    async with opened(path) as store:
        await put_sample_image(store, "localhost/sample:1", LAYER)


def edit_catalog(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path / "catalog.sqlite", isolation_level=None)
    # As a program of another version leaves it, all of it in the one file.
    connection.execute("PRAGMA journal_mode = DELETE")
    for statement in statements:
        connection.execute(statement)
    connection.close()


@pytest.mark.parametrize("there", [False, True])
async def test_a_store_is_made_in_an_empty_directory(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "some" / "where"
    if there:
        path.mkdir(0o755, parents=True)
    async with opened(path) as store:
        assert store.path == path
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert json.loads((path / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
        assert json.loads((path / "index.json").read_bytes())["manifests"] == []
        assert len(os.listdir(path / "leases")) == 1
    assert sorted(os.listdir(path)) == [
        "blobs",
        "catalog.sqlite",
        "index.json",
        "ingest",
        "leases",
        "oci-layout",
        "trees",
    ]
    assert os.listdir(path / "leases") == []


async def test_opening_and_leaving_changes_nothing(tmp_path: Path) -> None:
    await make(tmp_path / "store")
    before = snapshot(tmp_path / "store")
    async with opened(tmp_path / "store"):
        pass
    after = snapshot(tmp_path / "store")
    assert {k: v for k, v in before.items() if k != "catalog.sqlite"} == {
        k: v for k, v in after.items() if k != "catalog.sqlite"
    }


async def test_many_open_a_new_store_at_once(tmp_path: Path) -> None:
    async def open_one() -> None:
        async with opened(tmp_path / "store") as store:
            await put_sample_image(store, "localhost/sample:1", LAYER)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(open_one)
    assert arriving(tmp_path / "store") == []


def foreign_file(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("somebody's")


def foreign_layout(path: Path) -> None:
    (path / "blobs" / "sha256").mkdir(parents=True)
    (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (path / "index.json").write_text('{"schemaVersion":2,"manifests":[]}')


def foreign_database(path: Path) -> None:
    path.mkdir()
    connection = sqlite3.connect(path / "catalog.sqlite")
    connection.execute("CREATE TABLE theirs (value)")
    connection.close()


def foreign_catalog(path: Path) -> None:
    path.mkdir()
    (path / "catalog.sqlite").write_text("no database at all " * 10)


def empty_catalog_among_others(path: Path) -> None:
    path.mkdir()
    (path / "catalog.sqlite").touch()
    (path / "file").write_text("somebody's")


@pytest.mark.parametrize(
    "foreign",
    [foreign_file, foreign_layout, foreign_database, foreign_catalog, empty_catalog_among_others],
)
async def test_a_foreign_directory_is_left_alone(
    tmp_path: Path, foreign: Callable[[Path], None]
) -> None:
    path = tmp_path / "theirs"
    foreign(path)
    before = snapshot(path)
    mode = path.stat().st_mode
    with pytest.raises(UnsupportedStore, match="new or empty directory") as caught:
        async with opened(path):
            pytest.fail("entered")
    assert str(path) in str(caught.value)
    assert snapshot(path) == before
    assert path.stat().st_mode == mode


async def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnsupportedStore, match="not a directory"):
        async with opened(tmp_path / "file"):
            pytest.fail("entered")
    with pytest.raises(StoreError):
        async with opened(tmp_path / "file" / "below"):
            pytest.fail("entered")


async def test_a_directory_that_other_machines_share_is_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert layout.file_system_type(Path("/proc")) == 0x9FA0
    monkeypatch.setattr(layout, "file_system_type", lambda path: 0x6969)
    with pytest.raises(UnsupportedStore, match="NFS"):
        async with opened(tmp_path / "store"):
            pytest.fail("entered")
    assert snapshot(tmp_path / "store") == {}


def scribble(path: Path, start: int) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\x55" * 2000)


async def test_a_damaged_catalog_is_said_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store"
    await make(path)
    edit_catalog(path)
    scribble(path / "catalog.sqlite", 100)
    before = snapshot(path)
    with pytest.raises(StoreError, match=r"catalog of the store .* is damaged") as caught:
        async with opened(path):
            pytest.fail("entered")
    assert str(path) in str(caught.value)
    assert snapshot(path) == before


async def test_a_check_finds_a_damaged_catalog(tmp_path: Path) -> None:
    path = tmp_path / "store"
    await make(path)
    edit_catalog(path)
    [(page,)] = rows_of(path, "SELECT rootpage FROM sqlite_schema WHERE name = 'layers_by_tree'")
    assert isinstance(page, int)
    scribble(path / "catalog.sqlite", 4096 * (page - 1))
    async with opened(path) as store:
        report = await store.check(repair=True)
        assert {problem.kind for problem in report.problems} == {"catalog"}
        assert not report.repaired


async def test_a_newer_store_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store"
    await make(path)
    edit_catalog(path, "PRAGMA user_version = 1000")
    before = snapshot(path)
    with pytest.raises(UnsupportedStore, match="version 1000") as caught:
        async with opened(path):
            pytest.fail("entered")
    assert str(path) in str(caught.value)
    assert snapshot(path) == before


VERSION_1 = """
DROP TRIGGER blob_comes;
DROP TRIGGER blob_goes;
DROP TABLE image_blobs;
DROP TABLE lacking;
DROP TABLE layout;
DROP TABLE leases;
CREATE TABLE leases (id INTEGER PRIMARY KEY, holder TEXT NOT NULL, lease TEXT NOT NULL,
    digest TEXT NOT NULL);
CREATE INDEX leases_by_holder ON leases (holder, lease);
CREATE INDEX leases_by_digest ON leases (digest);
INSERT INTO leases (holder, lease, digest) VALUES ('0123456789abcdef', '0', 'sha256:0');
PRAGMA user_version = 1;
"""


def rows_of(path: Path, query: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path / "catalog.sqlite")
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


async def test_an_older_store_is_brought_to_this_version(tmp_path: Path) -> None:
    layer = layer_of(hello="world")
    async with opened(tmp_path) as store:
        manifest = await put_sample_image(store, "docker.io/library/sample:1", layer)
    for statement in VERSION_1.split(";"):
        edit_catalog(tmp_path, statement)
    async with opened(tmp_path) as store:
        assert rows_of(tmp_path, "SELECT * FROM image_blobs") == [(manifest, layer.digest)]
        assert rows_of(tmp_path, "SELECT * FROM leases") == []
        # The file header identifies a store to programs without SQLite.
        header = (tmp_path / "catalog.sqlite").read_bytes()[:100]
        assert int.from_bytes(header[60:64]) == 2
        [image] = await store.images()
        assert image.manifest.digest == manifest
        assert (await store.collect()).blobs == 0


async def test_an_older_store_is_not_changed_under_somebody(tmp_path: Path) -> None:
    await make(tmp_path)
    for statement in VERSION_1.split(";"):
        edit_catalog(tmp_path, statement)
    file = os.open(tmp_path / "leases" / "0123456789abcdef", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UnsupportedStore, match="in use"):
            async with opened(tmp_path):
                pytest.fail("entered")
        assert rows_of(tmp_path, "PRAGMA user_version") == [(1,)]
    finally:
        os.close(file)
    async with opened(tmp_path):
        assert rows_of(tmp_path, "PRAGMA user_version") == [(2,)]


async def test_a_store_of_another_flavour_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store"
    await make(path)
    edit_catalog(path, "UPDATE flavour SET value = '\"none.\"' WHERE key = 'xattrs'")
    before = snapshot(path)
    with pytest.raises(UnsupportedStore, match=r"none\.xattrs") as caught:
        async with opened(path):
            pytest.fail("entered")
    assert str(path) in str(caught.value)
    assert snapshot(path) == before


@as_root
async def test_a_store_of_another_user_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store"
    await make(path)
    os.chown(path, 12345, 12345)
    before = snapshot(path)
    with pytest.raises(UnsupportedStore, match="12345"):
        async with opened(path):
            pytest.fail("entered")
    assert snapshot(path) == before


async def test_a_store_that_was_not_finished_is_finished(tmp_path: Path) -> None:
    (tmp_path / "ingest").mkdir()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "catalog.sqlite").touch()
    await make(tmp_path)
    async with opened(tmp_path) as store:
        assert [image.reference for image in await store.images()] == ["localhost/sample:1"]


async def test_a_damaged_catalog_is_named(tmp_path: Path) -> None:
    await make(tmp_path)
    catalog = tmp_path / "catalog.sqlite"
    data = catalog.read_bytes()
    catalog.write_bytes(data[:100] + b"x" * 4000 + data[4100:])
    with pytest.raises(StoreError, match=str(tmp_path)):
        async with opened(tmp_path):
            pytest.fail("entered")


async def test_the_path_may_be_relative_and_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    async with opened(Path("link")) as store:
        assert store.path == tmp_path / "real"


@as_root
async def test_no_store_is_made_beyond_a_link_of_another_user(tmp_path: Path) -> None:
    real, link, victim = plant_link(tmp_path, owner=0)
    async with opened(real / "store"):
        pass
    with pytest.raises(UnsupportedStore, match="'link' in the path is a link that another user"):
        async with opened(link / "store"):
            pytest.fail("entered")
    assert os.listdir(victim) == []


async def test_links_that_lead_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(UnsupportedStore, match="not a directory"):
        async with opened(tmp_path / "link"):
            pytest.fail("entered")


async def test_a_store_that_was_opened_to_others_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "store"
    await make(path)
    path.chmod(0o755)
    async with opened(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def foreign_link(path: Path) -> None:
    (path / "ingest").symlink_to(path.parent)


def foreign_owner(path: Path) -> None:
    (path / "ingest").mkdir()
    os.chown(path / "ingest", 12345, 12345)


@pytest.mark.parametrize("plant", [foreign_link, pytest.param(foreign_owner, marks=as_root)])
async def test_what_others_left_in_a_directory_is_not_made_a_store_of(
    tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    path = tmp_path / "store"
    path.mkdir()
    (path / "catalog.sqlite").touch()
    plant(path)
    before = snapshot(path)
    with pytest.raises(UnsupportedStore, match="ingest in it is a link or belongs to another user"):
        async with opened(path):
            pytest.fail("entered")
    assert snapshot(path) == before
    assert os.listdir(tmp_path) == ["store"]


async def test_a_sweep_that_fails_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    listdir = os.listdir
    failed = trio.Event()

    def fail(path: Path) -> list[str]:
        if path.name != "ingest":
            return listdir(path)
        trio.from_thread.run_sync(failed.set)
        raise OSError(errno.EMFILE, "too many open files")

    async with opened(tmp_path) as store:
        monkeypatch.setattr(os, "listdir", fail)
        await store.put_blob(describe(b"data"), b"data")
        async with store._parts.scratch.name("blob") as path:
            path.touch()  # the store discards and removes it
        await failed.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert await store.read_blob(describe(b"data").digest) == b"data"
    assert "too many open files" in caplog.text


async def test_a_store_that_is_removed_while_it_is_open(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path / "store") as store:
        shutil.rmtree(store.path)
        with pytest.raises(StoreError):
            await store.put_blob(describe(b"data"), b"data")
    assert str(store.path) in caplog.text


async def test_what_dead_holders_left_is_swept_and_what_live_ones_make_is_not(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as store:
        stream = Stream(LAYER.data, stop_at=20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.register, stream, None)
            await stream.stopped.wait()
            live = arriving(tmp_path)
            assert len(live) == 2
            dead = "0123456789abcdef"
            remains = [
                tmp_path / "leases" / dead,
                tmp_path / "ingest" / f"{dead}-0.tree",
                tmp_path / "ingest" / f"{dead}-1.blob",
                tmp_path / "ingest" / "fedcba9876543210-0.trash",
            ]
            remains[0].touch()
            (remains[1] / "fs").mkdir(parents=True)
            remains[2].touch()
            remains[3].mkdir()
            (tmp_path / "ingest" / ("a" * 64 + ".partial")).touch()
            async with opened(tmp_path):
                with trio.fail_after(30):
                    while any(path.exists() for path in remains):
                        await trio.lowlevel.checkpoint()
            assert arriving(tmp_path) == sorted([*live, "a" * 64 + ".partial"])
            stream.go_on.set()


@as_root
async def test_a_read_only_file_system_is_named(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "mount", "ro"):
        with pytest.raises(StoreReadOnly, match="mount/store"):
            async with opened(tmp_path / "mount" / "store"):
                pytest.fail("entered")


@as_root
async def test_a_store_on_a_file_system_gone_read_only_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mount"
    with mounted_tmpfs(path):
        await make(path)
        remount(path, "ro")
        with pytest.raises(StoreReadOnly, match=str(path)):
            async with opened(path):
                pytest.fail("entered")
        remount(path, "rw")
        async with opened(path) as store:
            assert len(await store.images()) == 1
