"""Mounts show the same files as the view, and leave nothing behind."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio
from _tools.layer_stacks import on_disk
from _tools.plain_tars import archive
from _tools.swapping import plant_link, swapped
from pull.mounting import fill, mounts_below, unmount_below

from trio_layers import MountError, RootfsView, StoreClosed, StoreError, open_store
from trio_layers._lifetime import Lifetime
from trio_layers._rootfs import mount
from trio_layers._rootfs.mount import open_mount
from trio_layers._tree.unpack import unpack

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
]

ALL = {"name": "all/", "type": "dir"}


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    yield
    assert not unmount_below(tmp_path)


def need_single_layers() -> None:
    if tuple(map(int, os.uname().release.split(".")[:2])) < (6, 8):
        pytest.skip("kernel: takes no lowerdir+")


@pytest.fixture(params=["by layer", "by page"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Test both system calls for mounting on a kernel that has the new one."""
    if request.param == "by page":

        def missing(*args: object) -> int:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(mount, "_mount_by_layer", missing)
    else:
        need_single_layers()

        def refused(*args: object) -> int:
            raise AssertionError("fell back")

        monkeypatch.setattr(mount, "_mount_by_page", refused)
    name: str = request.param
    return name


class Stack:
    """Trees of layers with one file each, all of them in ``all/``, and scratch directories."""

    def __init__(self, base: Path, count: int) -> None:
        self.scratch = base / "scratch"
        self.scratch.mkdir()
        self.trees = [base / f"tree{number}" for number in range(count)]
        for number, tree in enumerate(self.trees):
            tree.mkdir()
            name = f"all/{number}"
            unpack(io.BytesIO(archive(ALL, {"name": name, "text": name})).read, tree)

    @asynccontextmanager
    async def _name(self, kind: str) -> AsyncIterator[Path]:
        path = self.scratch / f"{len(list(self.scratch.iterdir()))}.{kind}"
        try:
            yield path
        finally:
            if path.exists():
                shutil.rmtree(path)

    def mount(
        self, target: Path | str | None = None, *, writable: bool = False
    ) -> AbstractAsyncContextManager[Path]:
        return open_mount(
            self.trees,
            target,
            scratch=self._name,
            lifetime=Lifetime(lambda: StoreClosed("closed")),
            writable=writable,
        )


@asynccontextmanager
async def open_view(store: Path) -> AsyncIterator[RootfsView]:
    """Open a view of `LAYERS` in a store."""
    async with open_store(store) as opened:
        yield await opened.rootfs(await fill(opened))


@pytest.mark.parametrize("writable", [False, True])
async def test_kernel_shows_what_the_view_says(tmp_path: Path, way: str, writable: bool) -> None:
    """Compare each file, and the root's own metadata."""
    # Characters with a meaning for mount(2) and for /proc/self/mountinfo.
    async with open_view(tmp_path / "a:b,c\\d=e f\xff") as view:
        entries = await view.walk()
        async with view.mount(writable=writable) as path:
            assert on_disk(path) == entries
            assert bool(os.statvfs(path).f_flag & os.ST_RDONLY) != writable
        assert not path.exists()
    assert {entry.path for entry in entries} > {
        b"keep/c",
        b"gone/y",
        b"file/inside",
        b"emptied/new",
    }
    assert not {entry.path for entry in entries} & {b"keep/a", b"gone/x", b"emptied/old", b"link"}


@pytest.mark.parametrize("count", [0, 1, 2, 127, 128])
@pytest.mark.parametrize("writable", [False, True])
async def test_numbers_of_layers(tmp_path: Path, way: str, count: int, writable: bool) -> None:
    """Docker's images have at most 127 layers."""
    async with Stack(tmp_path, count).mount(writable=writable) as path:
        names = {name.name for name in (path / "all").iterdir()} if count else set()
        assert names == {str(number) for number in range(count)}
        assert len(list(path.iterdir())) == bool(count)


async def test_as_many_layers_as_the_kernel_takes(tmp_path: Path) -> None:
    need_single_layers()
    stack = Stack(tmp_path, 500)
    async with stack.mount() as path:
        assert len(list((path / "all").iterdir())) == 500


async def test_more_layers_than_the_kernel_takes(tmp_path: Path) -> None:
    with pytest.raises(MountError, match=r"501 layers: Linux mounts at most 500; use export"):
        async with Stack(tmp_path, 501).mount():
            pass
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("way", ["by page"], indirect=True)
async def test_more_layers_than_a_page_takes(tmp_path: Path, way: str) -> None:
    with pytest.raises(
        MountError, match=r"300 layers: their names exceed the \d+ bytes .*; use Linux 6\.8"
    ):
        async with Stack(tmp_path, 300).mount():
            pass


async def test_more_layers_than_a_page_takes_without_privilege(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The missing privilege is the reason, not the number of layers, so the message does not advise
    another kernel.
    """

    def refuse(overlay: mount._Overlay, target: int) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(mount, "_mount_by_layer", refuse)
    with pytest.raises(MountError, match="cannot mount layers: the process must be root"):
        async with Stack(tmp_path, 300).mount():
            pass


async def test_one_layer_several_times(tmp_path: Path, way: str) -> None:
    """An image may contain the same empty layer several times, but the kernel accepts each
    directory only once.
    """
    stack = Stack(tmp_path, 3)
    stack.trees = [stack.trees[number] for number in (0, 1, 0, 2, 1)]
    async with stack.mount() as path:
        assert {name.name for name in (path / "all").iterdir()} == {"0", "1", "2"}


async def test_what_is_written_goes_with_the_mount(tmp_path: Path, way: str) -> None:
    """The store's files do not change, and another mount of the layers sees no change."""
    async with open_view(tmp_path / "store") as view:
        entries = await view.walk()
        before = inodes(tmp_path / "store" / "trees")
        async with view.mount(writable=True) as path, view.mount(writable=True) as other:
            (path / "keep" / "b").write_text("changed")
            (path / "gone" / "y").unlink()
            (path / "new").mkdir()
            os.rename(path / "keep" / "c", path / "new" / "c")
            os.chmod(path, 0o700)
            assert on_disk(other) == entries
        assert not mounts_below(tmp_path)
        async with view.mount() as path:
            assert on_disk(path) == entries
            with pytest.raises(OSError, match="Read-only file system"):
                (path / "new").mkdir()
        assert inodes(tmp_path / "store" / "trees") == before
    assert not list((tmp_path / "store" / "ingest").iterdir())


def inodes(directory: Path) -> dict[Path, tuple[int, ...]]:
    found = {path: path.lstat() for path in directory.rglob("*")}
    return {
        path: (status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_nlink)
        for path, status in found.items()
    }


async def test_what_the_body_raises_comes_out(tmp_path: Path, way: str) -> None:
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:
        async with Stack(tmp_path, 2).mount():
            raise error
    assert caught.value is error
    assert not mounts_below(tmp_path)


async def test_cancelled_in_the_body(tmp_path: Path, way: str) -> None:
    with trio.CancelScope() as scope:
        async with Stack(tmp_path, 2).mount() as path:
            assert mounts_below(tmp_path) == [str(path)]
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert not mounts_below(tmp_path)
    assert not list((tmp_path / "scratch").iterdir())


async def test_cancelled_before_it_is_mounted(tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        async with Stack(tmp_path, 2).mount():
            raise AssertionError("entered")
    assert scope.cancelled_caught
    assert not list((tmp_path / "scratch").iterdir())


async def test_cancelled_while_it_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's work cannot be cancelled. The body runs up to its first checkpoint."""
    ready, cancelled = trio.Event(), threading.Event()
    really = mount._mount_by_layer

    def slow(overlay: mount._Overlay, target: int) -> int:
        trio.from_thread.run_sync(ready.set)
        assert cancelled.wait(10)
        return really(overlay, target)

    monkeypatch.setattr(mount, "_mount_by_layer", slow)
    entered = False
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                await ready.wait()
                scope.cancel()
                cancelled.set()

            nursery.start_soon(cancel)
            async with Stack(tmp_path, 2).mount() as path:
                entered = path.joinpath("all").is_dir()
                await trio.lowlevel.checkpoint()
    assert entered
    assert scope.cancelled_caught
    assert not mounts_below(tmp_path)
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("name", ["given", "a:b,c\\d=e f", "link/given"])
async def test_target(tmp_path: Path, way: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty directory with any name can be the target, and remains after the mount."""
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    stack = Stack(tmp_path, 2)
    async with stack.mount(name) as path:
        assert path == tmp_path / name
        monkeypatch.chdir("/")  # the path does not depend on the working directory
        assert (path / "all" / "1").read_text() == "all/1"
        assert "root" not in os.listdir(stack.scratch / "0.mount")
    assert not list((tmp_path / name).iterdir())


async def test_target_beyond_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``..`` leads up from the link's target, as in the kernel."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b")
    for parent in (tmp_path, tmp_path / "a"):
        (parent / "target").mkdir()
    monkeypatch.chdir(tmp_path)
    async with Stack(tmp_path, 2).mount("link/../target") as path:
        assert mounts_below(tmp_path) == [str(tmp_path / "a" / "target")]
        assert (path / "all" / "1").read_text() == "all/1"


async def test_targets_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "full" / "of").mkdir(parents=True)
    (tmp_path / "file").touch()
    stack = Stack(tmp_path, 2)
    for name, reason in [
        ("missing", "No such file or directory"),
        ("full", "Directory not empty"),
        ("file", "Not a directory"),
    ]:
        with pytest.raises(MountError, match=rf"{tmp_path / name}.*: {reason}"):
            async with stack.mount(tmp_path / name):
                pass
    assert not list(stack.scratch.iterdir())


async def test_file_system_without_attributes(tmp_path: Path) -> None:
    """No attribute can mark opaque directories there. An error is better than a wrong mount."""
    (tmp_path / "ram").mkdir()
    await trio.run_process(["mount", "-t", "ramfs", "ramfs", tmp_path / "ram"])
    try:
        stack = Stack(tmp_path / "ram", 2)
        with pytest.raises(MountError, match=r"has no extended attributes.*use export"):
            async with stack.mount():
                pass
        assert not list(stack.scratch.iterdir())
    finally:
        await trio.run_process(["umount", tmp_path / "ram"])


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENODEV, "this kernel has no overlayfs"),
        (errno.EACCES, "must be root on the machine or in a user and mount namespace"),
        (errno.ENOMEM, r"cannot mount 2 layers: Cannot allocate memory"),
    ],
)
async def test_what_the_kernel_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def refuse(overlay: mount._Overlay, target: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(mount, "_mount_by_layer", refuse)
    stack = Stack(tmp_path, 2)
    with pytest.raises(MountError, match=f"{message}.*export") as caught:
        async with stack.mount():
            pass
    assert isinstance(caught.value.__cause__, OSError)
    assert not list(stack.scratch.iterdir())


async def test_target_that_is_in_use(tmp_path: Path) -> None:
    """A mount cannot hide another mount."""
    (tmp_path / "target").mkdir()
    stack = Stack(tmp_path, 2)
    async with stack.mount(tmp_path / "target"):
        with pytest.raises(MountError, match="target: Directory not empty"):
            async with stack.mount(tmp_path / "target"):
                pass
        assert len(mounts_below(tmp_path)) == 1


async def test_unmounted_though_it_is_in_use(tmp_path: Path, way: str) -> None:
    """Open files stay readable, mounts inside are unmounted, and a mount on top is not mistaken for
    ours.
    """
    stack = Stack(tmp_path, 2)
    async with stack.mount() as path:
        file = (path / "all" / "0").open()
        for target in (path / "all", path):
            await trio.run_process(["mount", "-t", "tmpfs", "tmpfs", target])
    assert not mounts_below(tmp_path)
    with file:
        assert file.read() == "all/0"


async def test_unmounted_where_it_went(tmp_path: Path, way: str) -> None:
    """The target was renamed during the block."""
    (tmp_path / "parent" / "target").mkdir(parents=True)
    async with Stack(tmp_path, 2).mount(tmp_path / "parent" / "target"):
        (tmp_path / "parent").rename(tmp_path / "elsewhere")
        assert mounts_below(tmp_path) == [str(tmp_path / "elsewhere" / "target")]
    assert not mounts_below(tmp_path)


async def test_layers_do_not_speak_to_overlayfs(tmp_path: Path, way: str) -> None:
    """An attribute of overlayfs in a tree has no effect."""
    stack = Stack(tmp_path, 2)
    below, above = stack.trees
    (below / "fs" / "secret").mkdir()
    (below / "fs" / "secret" / "file").write_text("secret")
    (above / "fs" / "redirected").mkdir()
    (above / "fs" / "meta").write_text("")
    os.setxattr(above / "fs" / "redirected", "trusted.overlay.redirect", b"/secret")
    os.setxattr(above / "fs" / "meta", "trusted.overlay.metacopy", b"")
    os.setxattr(above / "fs" / "meta", "trusted.overlay.redirect", b"/secret/file")
    async with stack.mount() as path:
        for name in ("redirected", "meta"):
            with pytest.raises(PermissionError):
                os.open(path / name, os.O_RDONLY)


CHILD = """
import sys, trio
from pathlib import Path
from pull.mounting import fill
from trio_layers import open_store

async def main():
    async with open_store(sys.argv[1]) as store:
        view = await store.rootfs(await fill(store))
        target = sys.argv[2] if sys.argv[2:] else None
        async with view.mount(target, writable=True) as path:
            (path / "keep" / "b").write_text("written")
            print(path, flush=True)
            await trio.sleep_forever()

trio.run(main)
"""


def mount_and_be_killed(store: Path, *target: Path) -> Path:
    command = [sys.executable, "-c", CHILD, str(store), *map(str, target)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        path = child.stdout.readline().removesuffix("\n")
        child.kill()
    return Path(path)


async def test_killed_while_mounted(tmp_path: Path) -> None:
    """The next opening of the store removes the mount, and stored files are unchanged."""
    path = await trio.to_thread.run_sync(mount_and_be_killed, tmp_path / "store")
    assert mounts_below(tmp_path) == [str(path)]
    before = inodes(tmp_path / "store" / "trees")
    async with open_view(tmp_path / "store") as view:
        async with view.mount() as another:
            assert on_disk(another) == await view.walk()
    assert not mounts_below(tmp_path)
    assert not list((tmp_path / "store" / "ingest").iterdir())
    assert inodes(tmp_path / "store" / "trees") == before


async def test_a_mount_outlives_its_process_with_its_trees(tmp_path: Path, way: str) -> None:
    """The store keeps the trees of a mount whose process was killed.

    The target stays mounted without its process. The store deletes the trees only once the target
    and its bind mount elsewhere are unmounted.
    """
    target, copy, store = tmp_path / "target", tmp_path / "copy", tmp_path / "store"
    target.mkdir()
    copy.mkdir()
    await trio.to_thread.run_sync(mount_and_be_killed, store, target)
    before = on_disk(target)
    await trio.run_process(["mount", "--bind", target / "keep", copy])
    for points in ([copy, target], [copy]):
        async with open_store(store) as opened:
            expected = tuple(map(str, points))
            for dry_run in (True, False):
                collected = await opened.collect(dry_run=dry_run)
                assert {tree.targets for tree in collected.mounted} == {expected}
                assert collected.trees == (1 if points[1:] and len(collected.mounted) == 3 else 0)
        assert (copy / "b").read_text() == "written"
        if points[1:]:
            assert on_disk(target) == before
            await trio.run_process(["umount", target])
    await trio.run_process(["umount", copy])
    async with open_store(store) as opened:
        collected = await opened.collect()
        assert collected.mounted == ()
        assert collected.trees
        assert not list((store / "trees" / "sha256").iterdir())
        assert [path.suffix for path in (store / "ingest").iterdir()] == []


async def test_a_copy_in_another_namespace(tmp_path: Path, way: str) -> None:
    """A container in another mount namespace keeps the mount after the block."""
    store = tmp_path / "store"
    async with open_view(store) as view:
        async with view.mount(writable=True) as path:
            (path / "new").write_text("new")
            child = subprocess.Popen(  # noqa: ASYNC220
                ["unshare", "--mount", "sh", "-c", f"cd {path}; echo; read x; cat new keep/b"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert child.stdout is not None
            await trio.to_thread.run_sync(child.stdout.readline)
        assert not mounts_below(tmp_path)
    async with open_store(store) as opened:
        collected = await opened.collect()
        assert {tree.targets for tree in collected.mounted} == {(str(path),)}
        output, _ = await trio.to_thread.run_sync(child.communicate, b"\n")
        assert output == b"newb"
        assert (await opened.collect()).mounted == ()
    assert not list((store / "ingest").iterdir())


async def test_a_mount_needs_no_lease(tmp_path: Path) -> None:
    """A collection by another process keeps the files under a mount.

    The collection does remove the layers from the catalog.
    """
    async with open_store(tmp_path / "store") as store:
        layer = await fill(store)
        view = await store.rootfs(layer)
        entries = await view.walk()
    async with open_store(tmp_path / "store") as store:
        view = await store.rootfs(layer)
        async with view.mount() as path, open_store(tmp_path / "store") as other:
            assert (await other.collect()).layers
            assert on_disk(path) == entries
        async with open_store(tmp_path / "store") as other:
            await other.collect()
        with pytest.raises(StoreError, match="was removed from the store: pull an image that has"):
            async with view.mount():
                pass


async def test_a_tree_that_somebody_else_mounts(tmp_path: Path) -> None:
    """Other software mounts trees by their paths, as layers of an overlay."""
    target = tmp_path / "target"
    target.mkdir()
    async with open_store(tmp_path / "store") as store:
        await fill(store)
        trees = sorted((tmp_path / "store" / "trees" / "sha256").iterdir())
        lower = ":".join(str(tree / "fs") for tree in trees[:2])
        command = ["mount", "-t", "overlay", "-o", f"lowerdir={lower}", "theirs", str(target)]
        await trio.run_process(command)
        try:
            async with open_store(tmp_path / "store") as other:
                await store._parts.leases.drop_all()
                collected = await other.collect()
            assert [tree.id for tree in collected.mounted] == [
                f"sha256:{t.name}" for t in trees[:2]
            ]
            assert {tree.targets for tree in collected.mounted} == {(str(target),)}
            assert sorted((tmp_path / "store" / "trees" / "sha256").iterdir()) == trees[:2]
        finally:
            await trio.run_process(["umount", target])


async def test_another_user_exchanges_the_target_for_another_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With mount(2) alone, leaving the block still unmounts our own mount."""

    def missing(*args: object) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(mount, "_mount_by_layer", missing)
    real, link, victim = plant_link(tmp_path)
    stack = Stack(tmp_path, 1)
    done = refused = 0
    other = real.with_name("other")
    other.mkdir()
    await trio.run_process(["mount", "-t", "tmpfs", "victim", victim])
    await trio.run_process(["mount", "--bind", victim, other])
    try:
        for second in (link, other):
            with swapped(real, second):
                for _ in range(2000):
                    if min(done, refused) > 10:
                        break
                    try:
                        async with stack.mount(real):
                            done += 1
                    except MountError:
                        refused += 1
                    assert victim.is_mount()
        assert done
        assert refused
        assert mounts_below(tmp_path) == [str(victim), str(other)]
    finally:
        unmount_below(tmp_path)


async def test_live_mount_survives_the_sweep(tmp_path: Path) -> None:
    """Another process that opens the store leaves used mounts alone."""
    async with open_view(tmp_path / "store") as view, view.mount(writable=True) as path:
        (path / "new").write_text("new")
        async with open_store(tmp_path / "store") as other:
            assert len(await other.images()) == 0
        assert (path / "new").read_text() == "new"


def test_without_root() -> None:
    """A plain user gets advice; in a user namespace they can mount their layers."""
    script = Path(__file__).with_name("namespace.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # Not in tmp_path, which is for its owner only.
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        done = subprocess.run(
            [sys.executable, script, name], capture_output=True, text=True, env=environment
        )
    if done.returncode == 77:
        pytest.skip(f"kernel: {done.stdout}")
    assert (done.returncode, done.stderr) == (0, "")
    plain, *mounted = done.stdout.splitlines()
    assert plain.startswith("MountError: cannot mount layers: the process must be root")
    assert mounted == ["read-only: same", "writable: same", "written: b'changed'"]
