"""Merged trees and the root file system view."""

from __future__ import annotations

import base64
import errno
import os
import re
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio
import trio.testing
from _tools.layer_stacks import on_disk, unpack_blob, unpack_stack
from _tools.plain_tars import archive

from trio_layers._digest import DiffID, Digest
from trio_layers._entries import (
    Entry,
    Summary,
    entry_line,
    link_line,
    opaque_line,
    parse_entries,
    removal_line,
    summary_line,
)
from trio_layers._errors import ExportError, StoreError
from trio_layers._lifetime import Lifetime
from trio_layers._rootfs.merged import MergedTree
from trio_layers._rootfs.view import RootfsView
from trio_layers._util import construct

LOWER = [
    {"name": "./", "type": "dir"},
    {"name": "etc/", "type": "dir"},
    {"name": "etc/os-release", "type": "symlink", "linkname": "../usr/lib/os-release"},
    {"name": "usr/", "type": "dir"},
    {"name": "usr/lib/", "type": "dir"},
    {"name": "usr/lib/os-release", "text": "NAME=old\n"},
    {"name": "lib", "type": "symlink", "linkname": "/usr/lib"},
    {"name": "loop", "type": "symlink", "linkname": "loop"},
    {"name": "out", "type": "symlink", "linkname": "../../../etc/os-release"},
    {"name": "dangling", "type": "symlink", "linkname": "nowhere"},
    {"name": "gone", "text": "x"},
    {"name": {"b64": "/2Zvbw=="}, "text": "bytes"},
]
UPPER = [
    {"name": "./", "type": "dir"},
    {"name": "usr/", "type": "dir"},
    {"name": "usr/lib/", "type": "dir"},
    {"name": "usr/lib/os-release", "text": "NAME=new\n"},
    {"name": ".wh.gone"},
]


@pytest.mark.parametrize(
    "layers",
    [
        [LOWER, UPPER],
        [[{"name": "./", "type": "dir", "mode": "0700", "uid": 7, "mtime": 5}], [{"name": "a"}]],
        [[{"name": "a"}], [{"name": "b"}]],
        [
            [{"name": 'a"\\'}, {"name": "b", "type": "hardlink", "linkname": 'a"\\'}],
            [{"name": "c/d"}],
        ],
        [[{"name": "a"}, {"name": "./", "type": "dir", "mtime": 9}], [{"name": ".wh..wh..opq"}]],
    ],
)
def test_survey(layers: list, tmp_path: Path) -> None:
    """A survey finds the same directories and other entries as the whole lists."""
    trees = unpack_stack([archive(*layer) for layer in layers], tmp_path)
    alone, whole = MergedTree(trees), MergedTree(trees)
    paths = [b"", b"a", b"b", b"usr", b"usr/lib/os-release", b"gone", b"no/such", b"a/b"]
    paths += [entry.path for entry in whole.walk()]

    def sure(entry: Entry | None) -> object:
        return entry if entry is None or entry.type == "dir" else entry.type

    expected = {path: sure(whole.lookup(path)) for path in paths}
    for some in (paths, *([path] for path in paths)):
        found = alone.survey(some)
        assert {path: sure(entry) for path, entry in found.items()} == {
            path: expected[path] for path in some
        }
    assert not alone.loaded


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture
def view(tmp_path: Path) -> RootfsView:
    return view_of(unpack_stack([archive(*LOWER), archive(*UPPER)], tmp_path))


def no_scratch(kind: str) -> AbstractAsyncContextManager[Path]:
    raise NotImplementedError("nothing is mounted here")


def view_of(trees: list[Path]) -> RootfsView:
    tree = MergedTree(trees, check_cancelled=trio.from_thread.check_cancelled)
    return construct(RootfsView, tree, no_scratch, Lifetime(StoreError))


async def test_read_bytes(view: RootfsView) -> None:
    """Links stay inside the root, and the content is that of the top layer."""
    for path in ("etc/os-release", "/etc/os-release", b"/lib/os-release", "lib/../lib/os-release"):
        assert await view.read_bytes(path) == b"NAME=new\n"
    assert await view.read_bytes("out") == b"NAME=new\n"
    assert await view.read_bytes(b"\xfffoo") == b"bytes"
    assert await view.read_bytes("\udcfffoo") == b"bytes"


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("gone", errno.ENOENT),
        ("dangling", errno.ENOENT),
        ("no/where", errno.ENOENT),
        ("loop", errno.ELOOP),
        ("usr/lib", errno.EISDIR),
        ("/lib/", errno.EISDIR),
        ("/", errno.EISDIR),
        ("usr/lib/os-release/x", errno.ENOTDIR),
        ("usr/lib/os-release/", errno.ENOTDIR),
    ],
)
async def test_errors(view: RootfsView, path: str, number: int) -> None:
    """Failures raise the errors of a real directory, with the requested path."""
    with pytest.raises(OSError, match=re.escape(path)) as caught:
        await view.read_bytes(path)
    assert caught.value.errno == number
    assert caught.value.filename == path
    if number in (errno.ENOENT, errno.ELOOP):
        assert not await view.exists(path)


async def test_stat_and_readlink(view: RootfsView) -> None:
    """`stat` returns a link or its target, `readlink` the target's path."""
    assert (await view.stat("lib")).path == b"usr/lib"
    assert (await view.stat("/lib", follow_symlinks=False)).type == "symlink"
    assert await view.readlink("lib") == b"/usr/lib"
    assert (await view.stat("/")).path == b""
    with pytest.raises(OSError, match="Invalid argument"):
        await view.readlink("usr")


async def test_walk_is_sorted(view: RootfsView) -> None:
    """`walk` returns all visible entries by path, with whiteouts applied."""
    paths = [entry.path for entry in await view.walk()]
    assert paths == sorted(paths)
    assert paths[0] == b""
    assert b"gone" not in paths
    assert b"\xfffoo" in paths


async def test_every_call_is_a_checkpoint(view: RootfsView) -> None:
    """Each call is a checkpoint, even if the answer is in memory."""
    await view.stat("/")
    with trio.CancelScope() as scope:
        scope.cancel()
        await view.stat("/")
    assert scope.cancelled_caught
    with trio.CancelScope() as scope:
        scope.cancel()
        await view.read_bytes("/etc/os-release")
    assert scope.cancelled_caught
    with trio.CancelScope() as scope:
        scope.cancel()
        async with view.open("/etc/os-release"):
            raise AssertionError
    assert scope.cancelled_caught


async def test_open(tmp_path: Path) -> None:
    """A file can seek while its block is open."""
    content = bytes(range(256)) * 1000
    view = view_of(unpack_stack([archive(*LOWER, {"name": "f", "b64": b64(content)})], tmp_path))
    before = os.listdir("/proc/self/fd")
    async with view.open("f") as file:
        assert await file.read(10) == content[:10]
        assert await file.seek(-7, os.SEEK_END) == len(content) - 7
        assert await file.tell() == len(content) - 7
        assert await file.read() == content[-7:]
        assert await file.read() == b""
        await file.seek(1000)
        assert await file.read(5) == content[1000:1005]
    with pytest.raises(ValueError, match="closed file"):
        await file.read()
    with pytest.raises(ZeroDivisionError):
        async with view.open("/f"):
            raise ZeroDivisionError
    with trio.CancelScope() as scope:
        async with view.open("/f"):
            scope.cancel()
    assert os.listdir("/proc/self/fd") == before
    for path, number in (("gone?", errno.ENOENT), ("usr", errno.EISDIR), ("loop", errno.ELOOP)):
        with pytest.raises(OSError, match=re.escape(path)) as caught:
            async with view.open(path):
                raise AssertionError
        assert caught.value.errno == number


async def test_nothing_on_the_disk_is_followed(view: RootfsView, tmp_path: Path) -> None:
    """An unlisted link on the disk is not followed, and the error names the path."""
    (tmp_path / "secret").write_bytes(b"secret")
    file = view._tree.trees[1] / "fs/usr/lib/os-release"
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    with pytest.raises(StoreError, match="usr/lib/os-release"):
        await view.read_bytes("/etc/os-release")
    with pytest.raises(StoreError, match="usr/lib/os-release"):
        async with view.open("/etc/os-release"):
            raise AssertionError


@pytest.mark.parametrize("method", ["stat", "walk", "read_bytes", "export", "export_tar"])
async def test_cancelled_while_lists_are_read(method: str, tmp_path: Path) -> None:
    """Reading and waiting stop within some thousand lines; the next call gets all entries."""
    entries = [{"name": f"{number}"} for number in range(3000)]
    trees = unpack_stack([archive(*entries)], tmp_path)
    scope = trio.CancelScope()
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks == 2:
            trio.from_thread.run_sync(scope.cancel)
        trio.from_thread.check_cancelled()

    view = construct(
        RootfsView,
        MergedTree(trees, check_cancelled=check),
        no_scratch,
        Lifetime(StoreError),
    )
    argument = {
        "walk": (),
        "export": (tmp_path / "out",),
        "export_tar": (trio.testing.MemorySendStream(),),
    }.get(method, ("/5",))
    with scope:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(getattr(view, method), *argument)
    assert scope.cancelled_caught
    assert checks < 10
    assert not (tmp_path / "out").exists()
    checks = 10
    assert len(await view.walk()) == 3001


async def test_export(view: RootfsView, tmp_path: Path) -> None:
    report = await view.export(tmp_path / "out", root_metadata=True)
    entries = await view.walk()
    assert report.entries == len(entries)
    assert on_disk(tmp_path / "out") == entries
    await view.export(tmp_path / "closed")
    assert on_disk(tmp_path / "closed")[1:] == entries[1:]
    assert on_disk(tmp_path / "closed")[0].mode == 0o700
    with pytest.raises(ExportError, match="not empty"):
        await view.export(str(tmp_path / "out"))


async def test_export_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export cancelled inside a large file leaves no file and no descriptor."""
    large = {"name": "large", "fill": {"byte": 65, "count": 30_000_000}}
    view = view_of(unpack_stack([archive({"name": "a"}, large)], tmp_path))
    copy, copied = os.copy_file_range, []

    def cancel(*arguments: int) -> int:
        trio.from_thread.run_sync(scope.cancel)
        copied.append(copy(*arguments))
        return copied[-1]

    monkeypatch.setattr(os, "copy_file_range", cancel)
    before = os.listdir("/proc/self/fd")
    with trio.CancelScope() as scope:
        await view.export(tmp_path / "out")
    assert scope.cancelled_caught
    assert sum(copied) < 30_000_000
    assert not (tmp_path / "out").exists()
    assert os.listdir("/proc/self/fd") == before


async def test_export_tar(view: RootfsView, tmp_path: Path) -> None:
    """The tar unpacks to the same tree, and the stream stays open."""
    stream = trio.testing.MemorySendStream()
    await view.export_tar(stream)
    unpack_blob(bytes(stream.get_data_nowait()), tmp_path / "again")
    await stream.send_all(b"x")
    assert MergedTree([tmp_path / "again"]).walk() == await view.walk()


class Slow(trio.abc.SendStream):
    """A stream that takes one piece and then blocks."""

    def __init__(self) -> None:
        self.taken = 0
        self.asked = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.taken:
            self.asked.set()
            await trio.sleep_forever()
        self.taken += 1

    async def wait_send_all_might_not_block(self) -> None:
        raise AssertionError

    async def aclose(self) -> None:
        raise AssertionError


async def test_a_stream_sets_the_pace(tmp_path: Path) -> None:
    """A blocked stream occupies no thread, and cancellation leaves nothing open."""
    large = {"name": "large", "fill": {"byte": 65, "count": 5_000_000}}
    view = view_of(unpack_stack([archive(large)], tmp_path))
    before = os.listdir("/proc/self/fd")
    stream = Slow()
    limiter = trio.to_thread.current_default_thread_limiter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(view.export_tar, stream)
        await stream.asked.wait()
        assert limiter.borrowed_tokens == 0
        nursery.cancel_scope.cancel()
    assert stream.taken == 1
    assert os.listdir("/proc/self/fd") == before


async def test_what_a_stream_raises_comes_out(view: RootfsView) -> None:
    send, receive = trio.testing.memory_stream_one_way_pair()
    await receive.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await view.export_tar(send)


def test_open_does_not_follow_what_is_on_the_disk(tmp_path: Path) -> None:
    """A manipulated tree does not lead out of the tree."""
    (tree,) = unpack_stack([archive({"name": "d/f", "text": "x"})], tmp_path)
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "f").write_bytes(b"secret")
    merged = MergedTree([tree])
    with open(merged.open(b"d/f"), "rb") as file:
        assert file.read() == b"x"
    (tree / "fs/d/f").unlink()
    (tree / "fs/d").rmdir()
    (tree / "fs/d").symlink_to(secret)
    with pytest.raises(StoreError, match="'d/f' cannot be read"):
        merged.open(b"d/f")


SUMMARY = Summary(
    diff_id=DiffID(Digest("sha256:" + "0" * 64)), size=1, entries=2, assumed=(b"\xff",)
)


def test_entries_round_trip() -> None:
    """Writing and parsing entries keeps every field, names byte for byte."""
    entries = [
        Entry(path=b"", type="dir", mode=0o755, opaque=True, implied=True),
        Entry(path=b"\xff\n\xc3\xa9", type="symlink", mode=0o777, linkname=b"\xfe/%"),
        Entry(path=b"d", type="block", mode=0o600, dev=(8, 1), mtime_ns=-1),
        Entry(path=b"f", type="file", size=3, crc32=171, uid=1, gid=2, xattrs={"user.x": b"\0"}),
    ]
    lines = [entry_line(entry) for entry in entries] + [summary_line(SUMMARY)]
    assert all(line.isascii() and line.count(b"\n") == 1 for line in lines)
    found, summary = parse_entries(lines)
    assert found == sorted(entries, key=lambda entry: entry.path)
    assert summary == SUMMARY


def test_later_lines_win() -> None:
    """The last lines decide about replaced, removed, linked and opaque entries."""
    file = Entry(path=b"a", type="file", crc32=1, xattrs={"security.capability": b"c"})
    directory = Entry(path=b"d", type="dir", mode=0o700)
    lines = [
        entry_line(file),
        link_line(Entry(path=b"b", type="file", mode=0o600, uid=5), b"a"),
        entry_line(Entry(path=b"x", type="file")),
        removal_line(b"x"),
        entry_line(directory),
        opaque_line(b"d"),
        entry_line(Entry(path=b"d", type="dir", mode=0o755)),
        summary_line(SUMMARY),
    ]
    found, _ = parse_entries(lines)
    assert [(entry.path, entry.mode, entry.links) for entry in found] == [
        (b"a", 0o600, b"a"),
        (b"b", 0o600, b"a"),
        (b"d", 0o755, None),
    ]
    assert found[0].uid == 5
    assert not found[0].xattrs  # a change of owner drops a capability
    assert found[2].opaque


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [entry_line(Entry(path=b"a", type="file"))],
        [b"{\n"],
        [removal_line(b"a"), summary_line(SUMMARY)],
        [opaque_line(b"a"), summary_line(SUMMARY)],
        [summary_line(SUMMARY).replace(b'"format":1', b'"format":2')],
    ],
)
def test_damaged_list(lines: list[bytes]) -> None:
    """An incomplete or invalid list is a `StoreError`."""
    with pytest.raises(StoreError, match="list of entries"):
        parse_entries(lines)


@pytest.mark.parametrize(
    "lines",
    [
        [entry_line(Entry(path=b"a/b", type="file"))],
        [entry_line(Entry(path=b"", type="dir")), entry_line(Entry(path=b"a/b", type="file"))],
        [b'{"p":5,"t":"dir"}\n'],
        [entry_line(Entry(path=b"", type="dir")), b'{"p":"a","k":"b\n'],
    ],
    ids=["no-root", "no-parent", "no-path", "cut-off"],
)
def test_damaged_list_of_a_tree(tmp_path: Path, lines: list[bytes]) -> None:
    """Any damage of a list is a `StoreError` in all methods."""
    (tmp_path / "entries").write_bytes(b"".join([*lines, summary_line(SUMMARY)]))
    with pytest.raises(StoreError, match="list of entries"):
        MergedTree([tmp_path]).lookup(b"a")
    with pytest.raises(StoreError, match="list of entries"):
        MergedTree([tmp_path]).survey([b"a", b"a/b"])


def test_too_many_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files are not damage, so the error does not mention the layer."""
    (tree,) = unpack_stack([archive(*LOWER)], tmp_path)

    def refuse(path: Path, mode: str) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), os.fspath(path))

    monkeypatch.setattr("builtins.open", refuse)
    merged = MergedTree([tree])
    with pytest.raises(StoreError, match=r"\(Too many open files\); try again$"):
        merged.load()
    with pytest.raises(StoreError, match=r"\(Too many open files\); try again$"):
        merged.survey([b"a"])
    monkeypatch.undo()
    assert merged.lookup(b"gone") is not None


def test_deep_links_are_linear(tmp_path: Path) -> None:
    """Links through deep directories take linear time, because trio's thread resolves them."""
    depth, links = 500, 35
    down, up = "/".join("a" * depth), "/.." * depth
    entries: list[dict] = [{"name": "./", "type": "dir"}, {"name": down, "type": "dir"}]
    for number in range(links):
        target = f"{down}{up}/l{number + 1}"
        entries.append({"name": f"l{number}", "type": "symlink", "linkname": target})
    entries.append({"name": f"l{links}", "text": "x"})
    (tree,) = unpack_stack([archive(*entries)], tmp_path)
    merged = MergedTree([tree])
    merged.load()
    steps = 0

    def count(frame: object, event: str, argument: object) -> object:
        nonlocal steps
        steps += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        found = merged.resolve(b"l0", follow=True)
    finally:
        sys.settrace(before)
    assert found.path == b"l%d" % links
    assert steps < 20 * 2 * depth * links
