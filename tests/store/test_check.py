"""A check finds any damage; a repair drops the damaged item, and a pull brings it back."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from store.stores import visible
from store.test_crashes import crash

from trio_layers import DirectoryStore, Image, StoreError, open_puller
from trio_layers._store.check import Checker, Problem
from trio_layers.testing import (
    Built,
    Directory,
    Fifo,
    File,
    HardLink,
    Opaque,
    Registry,
    Symlink,
    Whiteout,
    build_image,
    build_layer,
    open_registry,
)

BASE = [
    Directory("etc"),
    File("etc/passwd", b"root:x:0:0\n", mode=0o640, uid=3, gid=4),
    File("etc/shadow", b"secret", xattrs={"user.note": b"x"}),
    HardLink("etc/again", "etc/passwd"),
    Symlink("etc/link", "passwd"),
    Fifo("pipe"),
    Directory("opt"),
    File("opt/old", b"old"),
]
TOP = [
    Directory("opt"),
    Opaque("opt"),
    File("opt/new", b"new" * 1000),
    Whiteout("etc/shadow"),
    File("etc/more", b"1"),
]


@pytest.fixture(scope="module")
def built() -> Built:
    return build_image([build_layer(BASE), build_layer(TOP)])


@contextmanager
def catalog(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path / "catalog.sqlite", isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


def file_of(path: Path, kind: str, digest: str) -> Path:
    return path / kind / "sha256" / digest.removeprefix("sha256:")


class World:
    """A pulled image: its name and its parts."""

    def __init__(self, store: DirectoryStore, image: Image) -> None:
        self.path = store.path
        self.image = image
        base, top = image.layers
        self.base, self.top = (file_of(self.path, "trees", x.diff_id) for x in (base, top))
        self.blob = file_of(self.path, "blobs", top.descriptor.digest)
        self.manifest = file_of(self.path, "blobs", image.digest)

    def edit(self, statement: str) -> None:
        with catalog(self.path) as connection:
            connection.execute(statement)


Damage = Callable[[World], object]


def flip(path: Path) -> None:
    """Change one byte, and keep size and times."""
    there = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(there.st_atime_ns, there.st_mtime_ns))


def keeping_times(change: Callable[[Path], object], path: Path) -> None:
    """Change something in a directory, and restore the directory's times."""
    there = path.parent.stat()
    change(path)
    os.utime(path.parent, ns=(there.st_atime_ns, there.st_mtime_ns))


def touched(path: Path, change: Callable[[Path], object]) -> None:
    there = path.lstat()
    change(path)
    os.utime(path, ns=(there.st_atime_ns, there.st_mtime_ns), follow_symlinks=False)


def replace_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("elsewhere")


def split_link(path: Path) -> None:
    shutil.copy2(path, path.with_name("copy"))
    there = path.stat()
    os.rename(path.with_name("copy"), path)
    os.chown(path, there.st_uid, there.st_gid)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change_list(old: bytes, new: bytes) -> Damage:
    def change(world: World) -> None:
        path = world.top / "entries"
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new, 1))

    return change


TREES: dict[str, tuple[Damage, str]] = {
    "content": (lambda w: flip(w.top / "fs/opt/new"), "'opt/new' has different content"),
    "size": (lambda w: touched(w.top / "fs/opt/new", cut), "'opt/new' has a different size"),
    "time": (
        lambda w: os.utime(w.top / "fs/opt/new", (5, 5)),
        "'opt/new' has a different modification time",
    ),
    "mode": (
        lambda w: (w.base / "fs/etc/passwd").chmod(0o4755),
        "'etc/again' has a different mode",
    ),
    "owner": (
        lambda w: os.chown(w.base / "fs/pipe", 1, 1),
        "'pipe' has a different owner or group",
    ),
    "missing": (
        lambda w: keeping_times(Path.unlink, w.top / "fs/etc/more"),
        "'etc/more' no such file",
    ),
    "more": (
        lambda w: keeping_times(Path.touch, w.top / "fs/opt/more"),
        "'opt/more' is not in the list",
    ),
    "directory": (
        lambda w: keeping_times(lambda p: (p.unlink(), p.mkdir()), w.top / "fs/opt/new"),
        "'opt/new' is not a file",
    ),
    "link": (
        lambda w: keeping_times(lambda p: touched(p, replace_link), w.base / "fs/etc/link"),
        "'etc/link' has a different target",
    ),
    "hard link": (
        lambda w: keeping_times(split_link, w.base / "fs/etc/again"),
        "'etc/again' has more or fewer hard links",
    ),
    "attribute": (
        lambda w: os.setxattr(w.base / "fs/etc/shadow", "user.note", b"y"),
        "'etc/shadow' has a different value of 'user.note'",
    ),
    "no attribute": (
        lambda w: os.removexattr(w.base / "fs/etc/shadow", "user.note"),
        "'etc/shadow' lacks the attribute",
    ),
    "capability": (
        lambda w: os.setxattr(
            w.top / "fs/opt/new",
            "security.capability",
            bytes.fromhex("0100000200040000000000000000000000000000"),
        ),
        "'opt/new' has the unexpected attribute 'security.capability'",
    ),
    "not opaque": (
        lambda w: os.removexattr(w.top / "fs/opt", "trusted.overlay.opaque"),
        "'opt' is opaque only in the list",
    ),
    "opaque": (
        lambda w: os.setxattr(w.base / "fs/etc", "trusted.overlay.opaque", b"y"),
        "'etc' is opaque only on the disk",
    ),
    "whiteout": (
        lambda w: keeping_times(lambda p: (p.unlink(), p.touch()), w.top / "fs/etc/shadow"),
        "'etc/shadow' is not a whiteout",
    ),
    "list": (change_list(b'{"end"', b'{"ond"'), "list of entries is damaged"),
    "list of others": (change_list(b'"entries":', b'"entries":1'), "differs from its row"),
    "listed mode": (change_list(b'"m":', b'"m":1'), "has a different mode"),
    "no list": (lambda w: (w.top / "entries").unlink(), "cannot be read"),
    "no files": (lambda w: shutil.rmtree(w.top / "fs"), "cannot be read"),
    "all of it": (lambda w: shutil.rmtree(w.base), "cannot be read"),
}

OTHERS: dict[str, tuple[Damage, set[str], str]] = {
    "a blob's content": (lambda w: flip(w.blob), {"blob"}, "its content has changed"),
    "a blob's size": (lambda w: cut(w.blob), {"blob"}, "bytes long"),
    "a blob": (lambda w: w.blob.unlink(), {"blob"}, "cannot be read"),
    "a manifest": (lambda w: w.manifest.unlink(), {"blob", "image"}, "cannot be read"),
    "another manifest": (
        lambda w: w.manifest.write_bytes(w.manifest.read_bytes() + b" "),
        {"blob"},
        "bytes long",
    ),
    "index.json": (lambda w: cut(w.path / "index.json"), {"index"}, "other images"),
    "no index.json": (lambda w: (w.path / "index.json").unlink(), {"index"}, "missing"),
    "oci-layout": (lambda w: (w.path / "oci-layout").unlink(), {"index"}, "missing"),
    "an image's blobs": (
        lambda w: w.edit("DELETE FROM image_blobs"),
        {"image"},
        "its manifest name different layers",
    ),
    "an image's layers": (
        lambda w: w.edit(f"UPDATE images SET chain_id = '{w.image.layers[0].chain_id}'"),
        {"image"},
        "its config name different layers",
    ),
    "a layer's tree": (
        lambda w: w.edit(f"UPDATE layers SET tree = '{w.image.layers[0].diff_id}'"),
        {"layer"},
        "belongs to another layer",
    ),
    "a layer's diff ID": (
        lambda w: w.edit("UPDATE layers SET diff_id = 'x' WHERE parent IS NOT NULL"),
        {"layer"},
        "its chain ID",
    ),
    "a blob's diff ID": (
        lambda w: w.edit("UPDATE blobs SET diff_id = 'x' WHERE diff_id IS NOT NULL"),
        {"layer"},
        "its blob",
    ),
}


async def damage_and_repair(
    path: Path, built: Built, damage: Damage, kinds: set[str], text: str
) -> tuple[Registry, list[Problem]]:
    async with open_registry() as registry:
        reference = registry.add(built, "library/sample:latest")
        async with open_puller(path) as puller:
            async with puller.pull(reference) as image:
                world = World(puller.store, image)
            report = await puller.store.check()
            assert report.problems == ()
            assert (report.blobs, report.trees, report.layers, report.images) == (4, 2, 2, 1)
            damage(world)
            report = await puller.store.check()
            assert {problem.kind for problem in report.problems} == kinds
            assert text in str(report.problems[0])
            again = await puller.store.check(repair=True)
            assert again.problems == report.problems
            assert again.repaired
            assert (await puller.store.check()).problems == ()
            registry.requests.clear()
            async with puller.pull(reference) as image:
                assert await image.rootfs.read_bytes("/opt/new") == b"new" * 1000
                assert not await image.rootfs.exists("/etc/shadow")
            report = await puller.store.check()
            assert report.problems == ()
            assert (report.blobs, report.trees, report.layers, report.images) == (4, 2, 2, 1)
            assert json.loads((path / "index.json").read_bytes())["manifests"]
            return registry, list(again.problems)


@pytest.mark.parametrize("name", TREES)
async def test_a_damaged_tree_is_made_again(tmp_path: Path, built: Built, name: str) -> None:
    damage, text = TREES[name]
    registry, _ = await damage_and_repair(tmp_path, built, damage, {"tree"}, text)
    # The layer's blob is not requested.
    assert not [exchange for exchange in registry.requests if "/blobs/" in exchange.path]


@pytest.mark.parametrize("name", OTHERS)
async def test_other_damage(tmp_path: Path, built: Built, name: str) -> None:
    damage, kinds, text = OTHERS[name]
    registry, problems = await damage_and_repair(tmp_path, built, damage, kinds, text)
    damaged = {problem.id for problem in problems if problem.kind == "blob"}
    came = {
        exchange.path.rpartition("/")[2]
        for exchange in registry.requests
        if exchange.bytes_sent and "/blobs/" in exchange.path
    }
    assert came <= damaged


async def test_a_row_without_another_is_said_and_not_mended(tmp_path: Path, built: Built) -> None:
    async with open_registry() as registry:
        reference = registry.add(built, "library/sample:latest")
        async with open_puller(tmp_path) as puller:
            async with puller.pull(reference):
                pass
            with catalog(tmp_path) as connection:
                connection.execute("DELETE FROM trees")
            report = await puller.store.check(repair=True)
            assert {problem.kind for problem in report.problems} == {"catalog"}
            assert "a row of layers" in str(report.problems[0])
            assert not report.repaired


async def test_what_a_crash_left_is_no_damage(tmp_path: Path) -> None:
    await crash(tmp_path, "tree-renamed")
    assert visible(tmp_path)
    async with open_puller(tmp_path) as puller:
        assert (await puller.store.check(repair=True)).problems == ()
        assert visible(tmp_path)


async def test_damage_that_goes_meanwhile_is_none(
    tmp_path: Path, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection removes a blob during the check."""
    async with open_registry() as registry:
        reference = registry.add(built, "library/sample:latest")
        async with open_puller(tmp_path) as puller, open_puller(tmp_path) as other:
            async with puller.pull(reference) as image:
                pass
            find, calls = Checker._suspects, 0

            async def late(*args: object) -> object:
                nonlocal calls
                calls += 1
                if calls == 1:
                    assert await other.store.remove(image.digest)
                    assert (await other.store.collect()).blobs == 4
                return await find(*args)  # type: ignore[arg-type]

            monkeypatch.setattr(Checker, "_suspects", late)
            report = await puller.store.check()
            assert report.problems == ()
            assert calls >= 4


async def test_a_check_while_images_come_and_go(tmp_path: Path, built: Built) -> None:
    async with open_registry() as registry:
        reference = registry.add(built, "library/sample:latest")
        async with open_puller(tmp_path) as puller, open_puller(tmp_path) as other:
            with trio.fail_after(120):
                async with trio.open_nursery() as nursery:

                    async def come_and_go() -> None:
                        for _ in range(6):
                            async with puller.pull(reference) as image:
                                await image.rootfs.read_bytes("/opt/new")
                            await puller.store.remove(image.digest)
                            await puller.store.collect()
                        nursery.cancel_scope.cancel()

                    nursery.start_soon(come_and_go)
                    while True:
                        assert (await other.store.check()).problems == ()
        assert visible(tmp_path) == []


async def test_a_repaired_layer_is_not_handed_out(tmp_path: Path, built: Built) -> None:
    async with open_registry() as registry:
        reference = registry.add(built, "library/sample:latest")
        async with open_puller(tmp_path) as puller:
            async with puller.pull(reference) as image:
                world, top = World(puller.store, image), image.layers[-1].chain_id
                shutil.rmtree(world.top)
                await puller.store.check(repair=True)
                assert await puller.store.get(top) is None
                with pytest.raises(StoreError):
                    await image.rootfs.read_bytes("/opt/new")
                # The image is stored, but not unpacked.
                [stored] = await puller.store.images()
                assert stored.chain_id is None
            async with puller.pull(reference, policy="missing") as image:
                assert await image.rootfs.read_bytes("/opt/new") == b"new" * 1000


async def test_other_tools_see_an_image_when_all_its_blobs_are_there(tmp_path: Path) -> None:
    """A pull does not download a layer that the store has from another blob, but other tools need
    the image's own blob.
    """
    gzip, zstd = (build_layer(BASE, compression=name) for name in ("gzip", "zstd"))
    assert gzip.diff_id == zstd.diff_id

    def listed() -> set[str]:
        document = json.loads((tmp_path / "index.json").read_bytes())
        return {entry["digest"] for entry in document["manifests"]}

    async with open_registry() as registry:
        one, two = build_image([gzip]), build_image([zstd])
        references = [registry.add(one, "demo:gzip"), registry.add(two, "demo:zstd")]
        async with open_puller(tmp_path) as puller:
            for reference in references:
                async with puller.pull(reference) as image:
                    assert await image.rootfs.exists("/etc/passwd")
            assert listed() == {one.digest}
            assert len(await puller.store.images()) == 2
            assert (await puller.store.check()).problems == ()
            async with puller.store.ingest(zstd.descriptor) as ingest:
                await ingest.write(bytes(zstd.content))
                await ingest.commit()
            assert (await puller.store.check()).problems == ()
            assert listed() == {one.digest, two.digest}
            await puller.store.collect()
            assert (await puller.store.check()).problems == ()
            assert listed() == {one.digest, two.digest}
