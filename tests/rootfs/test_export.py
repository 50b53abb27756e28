"""Exports of root file systems, to a directory and to a tar."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from _tools.layer_stacks import Pieces, listed, mounted, on_disk, plant, unpack_blob, unpack_stack
from _tools.plain_tars import Plain, archive as tar_of
from cases.layers import maketar
from pull.mounting import unmount
from rootfs.exports import LAYER, NOBODY, exported, never, packed
from tree.test_cases import CASES, without_times

from trio_layers import ExportError, ExportReport, StoreError
from trio_layers._damage import forget_damage, is_whole_tree
from trio_layers._entries import Entry
from trio_layers._errors import DecompressionError, StoreFull, UnpackError
from trio_layers._rootfs.archive import archive
from trio_layers._rootfs.export import export
from trio_layers._rootfs.merged import MergedTree
from trio_layers._tar.header_writer import header
from trio_layers._tar.limits import Limits
from trio_layers._tar.reader import Member, TarReader
from trio_layers._tree.verify import verify

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices need root")

STACKS = [(name, case) for name, case in CASES if "limits" not in case]


@pytest.mark.parametrize("case", [c for _, c in STACKS], ids=[name for name, _ in STACKS])
def test_cases(case: dict, tmp_path: Path) -> None:
    """The export equals the view and the kernel's overlay, and its tar unpacks to the same."""
    outside = tmp_path / "outside"
    plant(outside)
    blobs = [Pieces(partial(maketar.iter_layer, layer, str(outside))) for layer in case["layers"]]
    try:
        trees = unpack_stack(blobs, tmp_path)
    except (UnpackError, DecompressionError, StoreFull):
        return
    view = MergedTree(trees)
    entries = view.walk()
    if sum(entry.size for entry in entries) < 1 << 28:
        unpack_blob(packed(view), tmp_path / "again")
        assert MergedTree([tmp_path / "again"]).walk() == entries
    report = exported(view, tmp_path / "out")
    assert report.entries == len(entries)
    incomplete = any(listed(tree)[1].incomplete for tree in trees)
    assert report.complete or incomplete
    seen = on_disk(tmp_path / "out")
    if incomplete:
        return
    assert seen == entries
    # A directory without an entry has the time of the lower layer, unlike in overlayfs.
    timeless = {e.path for tree in trees for e in listed(tree)[0] if e.implied}
    with mounted(trees, tmp_path) as root:
        assert without_times(on_disk(root), timeless) == without_times(seen, timeless)


def test_everything(view: MergedTree, tmp_path: Path) -> None:
    """All types of entries are exported, to a new and to an existing directory."""
    entries = view.walk()
    assert exported(view, tmp_path / "made") == ExportReport(entries=len(entries))
    assert on_disk(tmp_path / "made") == entries
    there = tmp_path / "there"
    there.mkdir()
    os.setxattr(
        there,
        "system.posix_acl_default",
        bytes.fromhex(
            "02000000"
            "01000700ffffffff"
            "02000700e8030000"
            "04000000ffffffff"
            "10000700ffffffff"
            "20000000ffffffff"
        ),
    )
    (tmp_path / "link").symlink_to(there)
    exported(view, tmp_path / "link")
    assert on_disk(there) == entries


def test_tarfile_reads_it(view: MergedTree) -> None:
    """Python's tarfile reads all fields; it makes floats of fractions of seconds."""
    found = []
    with tarfile.open(fileobj=io.BytesIO(packed(view)), errors="surrogateescape") as reader:
        for info in reader:
            found.append(
                (
                    b"" if info.name == "." else os.fsencode(info.name),
                    info.mode,
                    (info.uid, info.gid),
                    info.mtime,
                    reader.extractfile(info).read() if info.isreg() else None,
                    os.fsencode(info.linkname),
                    (info.devmajor, info.devminor),
                    {
                        key.removeprefix("SCHILY.xattr."): os.fsencode(value)
                        for key, value in info.pax_headers.items()
                        if key.startswith("SCHILY")
                    },
                )
            )
    expected = []
    for entry in view.walk():
        linked = entry.links not in (None, entry.path)
        expected.append(
            (
                entry.path,
                entry.mode,
                (entry.uid, entry.gid),
                pytest.approx(entry.mtime_ns / 10**9),
                content(view, entry) if entry.type == "file" and not linked else None,
                entry.links if linked else entry.linkname or b"",
                entry.dev or (0, 0),
                {} if linked else entry.xattrs,
            )
        )
    assert found == expected


def content(view: MergedTree, entry: Entry) -> bytes:
    with open(view.open(entry.path), "rb") as file:
        return file.read()


def test_gnu_tar_reads_it(view: MergedTree, tmp_path: Path) -> None:
    """GNU tar extracts all attributes and names byte for byte, without a warning."""
    out = tmp_path / "out"
    out.mkdir()
    command = ["tar", "--extract", "--preserve-permissions", "--same-owner", "--numeric-owner"]
    command += ["--xattrs", "--xattrs-include=*", "--directory", str(out)]
    done = subprocess.run(command, input=packed(view), capture_output=True, check=False)
    complaints = [
        line for line in done.stderr.splitlines() if b"implausibly old time stamp" not in line
    ]
    assert (done.returncode, complaints) == (0, [])
    assert on_disk(out) == view.walk()


def test_tar_is_the_same_each_time(tmp_path: Path) -> None:
    """Equal file systems from different layers give the same tar."""
    one = [tar_of(*LAYER)]
    several = [
        tar_of({"name": "gone"}),
        tar_of(*LAYER[:5]),
        tar_of(*LAYER[5:], {"name": ".wh.gone"}),
    ]
    made = []
    for number, blobs in enumerate((one, one, several)):
        base = tmp_path / str(number)
        base.mkdir()
        made.append(packed(MergedTree(unpack_stack(blobs, base))))
    assert made[0] == made[1] == made[2]


def test_pieces_are_small(tmp_path: Path) -> None:
    """Pieces stay small for large files and for many files."""
    entries = [{"name": f"{n}", "text": ""} for n in range(2000)]
    large = {"name": "large", "fill": {"byte": 65, "count": 5_000_000}}
    view = MergedTree(unpack_stack([tar_of(large, *entries)], tmp_path))
    sizes = [len(piece) for piece in archive(view, check_cancelled=never)]
    assert max(sizes) < 1 << 20
    assert min(sizes[:-1]) >= 1 << 18


@pytest.mark.parametrize("error", [None, errno.EXDEV, errno.ENOSYS])
def test_sparse_files_stay_sparse(
    error: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holes at the start, in the middle and at the end stay, with each way of copying."""
    data = [[1 << 20, 4096], [1 << 30, 70000]]
    sparse = {"format": "pax-1.0", "realsize": 1 << 31, "map": data}
    entry = {"name": "sparse", "sparse": sparse, "fill": {"byte": 65, "count": 74096}}
    hole = {"name": "hole", "sparse": {"format": "pax-1.0", "realsize": 1 << 30, "map": []}}
    view = MergedTree(unpack_stack([tar_of(entry, hole)], tmp_path))
    if error is not None:

        def refuse(*arguments: int) -> int:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(os, "copy_file_range", refuse)
    exported(view, tmp_path / "out")
    for name, size in (("sparse", 1 << 31), ("hole", 1 << 30)):
        status = (tmp_path / "out" / name).stat()
        assert status.st_size == size
        assert status.st_blocks * 512 < 1 << 20
    with open(tmp_path / "out" / "sparse", "rb") as file:
        for offset, length in data:
            assert os.pread(file.fileno(), length + 9, offset) == b"A" * length + bytes(9)


def test_to_another_file_system(view: MergedTree, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64m") as disk:
        exported(view, disk / "out")
        assert on_disk(disk / "out") == view.walk()


@pytest.mark.parametrize("made", [True, False])
def test_a_full_disk(made: bool, tmp_path: Path) -> None:
    """After the failure nothing is left, and an existing directory is unchanged."""
    files = [{"name": f"d/{n}", "fill": {"byte": 65, "count": 300_000}} for n in range(9)]
    view = MergedTree(unpack_stack([tar_of(*files)], tmp_path))
    with small_disk(tmp_path / "disk", "2m") as disk:
        target = disk / "out"
        if not made:
            target.mkdir(0o750)
            os.chown(target, 7, 8)
            os.utime(target, (5, 5))
        before = on_disk(disk)
        with pytest.raises(ExportError, match=r"out/d/\d: No space left on device") as caught:
            exported(view, target)
        assert caught.value.path.startswith(str(target))
        assert on_disk(disk)[1:] == before[1:]


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    subprocess.run(command, check=True)
    try:
        yield path
    finally:
        unmount(path)


@pytest.mark.parametrize("damage", ["shorter", "longer", "gone", "link"])
def test_a_damaged_store(damage: str, view: MergedTree, tmp_path: Path) -> None:
    """Damage is an error, and the partial export is removed."""
    [tree] = view.trees
    file = tree / "fs/su"
    if damage in ("gone", "link"):
        file.unlink()
    if damage == "link":
        file.symlink_to("cap")
    elif damage != "gone":
        file.write_bytes(b"" if damage == "shorter" else b"longer")
    with pytest.raises(StoreError, match="'su' cannot be read from the store"):
        exported(view, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(StoreError, match="'su' cannot be read from the store"):
        packed(view)


def test_too_many_open_files(
    view: MergedTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files are not damage, so the error does not mention the image."""

    def refuse(path: bytes) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), os.fsdecode(path))

    monkeypatch.setattr(view, "open", refuse)
    with pytest.raises(ExportError, match="Too many open files"):
        exported(view, tmp_path / "out")
    with pytest.raises(OSError, match="Too many open files"):
        packed(view)


def test_a_disk_that_cannot_be_read(view: MergedTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read error while the tar is made is noted as damage, so that a pull replaces the tree."""

    def fails(descriptor: int, size: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def ends(descriptor: int, size: int) -> bytes:
        return b""

    for read, reason in ((fails, "Input/output error"), (ends, "it ends early")):
        with monkeypatch.context() as patched, pytest.raises(StoreError, match=reason):
            patched.setattr(os, "read", read)
            list(archive(view, check_cancelled=lambda: None))
        assert [tree for tree in view.trees if not is_whole_tree(tree)] != []
        for tree in view.trees:
            forget_damage(tree)


def test_too_many_open_files_at_the_target(
    view: MergedTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new directory is removed, even if it cannot be opened."""
    view.load()
    really = os.open

    def refuse(path: object, *arguments: int, **options: int) -> int:
        if path == "out":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return really(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ExportError, match="out: Too many open files"):
        exported(view, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_layers(tmp_path: Path) -> None:
    exported(MergedTree([]), tmp_path / "out")
    [root] = on_disk(tmp_path / "out")
    assert root.mode == 0o755
    assert packed(MergedTree([])) == bytes(1024)


# Privilege is dropped after the imports, because only root may be able to read the interpreter.
CHILD = """
import io, json, os, shutil, sys
from pathlib import Path
import attrs
from trio_layers._rootfs.merged import MergedTree
from trio_layers._rootfs.archive import archive
from trio_layers._rootfs.export import export
from trio_layers._tree.unpack import unpack
base, mode = Path(sys.argv[1]), sys.argv[2]
if mode == "user":
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
(base / "tree").mkdir()
unpack(io.BytesIO(sys.stdin.buffer.read()).read, base / "tree")
view = MergedTree([base / "tree"])
checks = 0
def check():
    global checks
    checks += 1
report = export(view, base / "out", root_metadata=True, check_cancelled=check)
def stop():
    global checks
    checks -= 1
    if not checks:
        raise KeyboardInterrupt
try:
    export(view, base / "stopped", root_metadata=True, check_cancelled=stop)
except KeyboardInterrupt:
    # All directories but the root have their modes already.
    assert not (base / "stopped").exists()
    (base / "tar").write_bytes(b"".join(archive(view, check_cancelled=check)))
print(json.dumps(attrs.asdict(report)))
"""


@pytest.fixture
def theirs() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    os.chown(path, NOBODY, NOBODY)
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("mode", ["user", "namespace"])
def test_unprivileged(mode: str, view: MergedTree, theirs: Path) -> None:
    """Without privilege, the directory lacks owners and set-id bits, as with umoci.

    Permissions stay. The tar has everything, byte for byte. In a user namespace with one user, no
    other user can be an owner.
    """
    command = [sys.executable, "-c", CHILD, str(theirs), mode]
    if mode == "namespace":
        unshare = ["unshare", "--user", "--map-root-user"]
        if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
            pytest.skip("kernel: no user namespaces")
        os.chown(theirs, 0, 0)
        command = unshare + command
    done = subprocess.run(command, input=tar_of(*LAYER), check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    report = ExportReport(**json.loads(done.stdout))
    entries = view.walk()
    seen = {entry.path: entry for entry in on_disk(theirs / "out")}
    us = NOBODY if mode == "user" else 0
    # All entries except the further names of files.
    files = [entry for entry in entries if entry.links in (None, entry.path)]
    assert report == ExportReport(
        entries=len(entries),
        owners=sum((entry.uid, entry.gid) != (us, us) for entry in files),
        set_ids=1,
        devices=2,
        xattrs=1 if mode == "user" else 0,
    )
    assert not report.complete
    for entry in entries:
        there = seen[entry.path]
        assert (there.uid, there.gid) == (us, us)
        lost = 0 if entry.type == "dir" else 0o6000
        assert there.mode == entry.mode & ~lost
        assert there.mtime_ns == entry.mtime_ns
        assert there.type == (entry.type if entry.dev is None else "file")
        assert (there.linkname, there.links) == (entry.linkname, entry.links)
        assert entry.dev or (there.size, there.crc32) == (entry.size, entry.crc32)
    assert seen[b"attributes"].xattrs == {"user.x": b"\x00\xff=\n"}
    assert (theirs / "tar").read_bytes() == packed(view)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0o77777777777},
        {"size": 0o100000000000},
        {"size": 1 << 42},
        {"mtime_ns": (1 << 33) * 10**9},
        {"mtime_ns": (1 << 33) * 10**9 + 1},
        {"mtime_ns": -1},
        {"mtime_ns": -(10**9)},
        {"uid": 0o7777777, "gid": 0o10000000},
        {"name": b"n" * 100},
        {"name": b"n" * 101},
        {"name": b"\xff"},
        {"type": "symlink", "linkname": b"l" * 101},
        {"type": "symlink", "linkname": b"\xc3\xa9"},
        # The length of a record includes the digits of the length.
        *({"xattrs": {"user.x": b"v" * size}} for size in (*range(66, 80), 970, 980, 65536)),
    ],
    ids=lambda change: "-".join(f"{key}={str(value)[:20]}" for key, value in change.items()),
)
def test_headers(change: dict) -> None:
    """Our reader and Python read values that do not fit into ustar."""
    member = Member(
        **{
            "name": b"name",
            "type": "file",
            "mode": 0o644,
            "uid": 0,
            "gid": 0,
            "mtime_ns": 0,
            "size": 0,
            "linkname": b"",
            "dev": (0, 0),
            "xattrs": {},
            **change,
        }
    )
    data = header(member)
    assert len(data) % 512 == 0
    assert next(iter(TarReader(Plain(data), Limits()))) == member
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as reader:
        info = reader.next()
    assert os.fsencode(info.name) == member.name
    assert os.fsencode(info.linkname) == member.linkname
    assert (info.size, info.uid, info.gid) == (member.size, member.uid, member.gid)
    assert info.mtime == member.mtime_ns / 10**9


FOREIGN = ["com.apple.provenance", "osx.x", "user", "user.", "x" * 300, "security"]


def test_attributes_that_linux_does_not_have(tmp_path: Path) -> None:
    """Attributes from macOS are listed and exported to tars, but no file gets them.

    A check of the tree is as strict as of any other tree.
    """
    pax = {f"SCHILY.xattr.{name}": "v" for name in FOREIGN}
    data = tar_of(
        {"name": "d", "type": "dir", "pax": pax},
        {"name": "d/f", "text": "f", "pax": {**pax, "SCHILY.xattr.user.a": "a"}},
        {"name": "d/l", "type": "symlink", "linkname": "f", "pax": pax},
        {"name": "d/h", "type": "hardlink", "linkname": "d/f", "pax": pax},
    )
    unpack_blob(data, tmp_path / "t")
    entries, summary = listed(tmp_path / "t")
    assert summary.foreign_only
    wanted = dict.fromkeys(FOREIGN, b"v")
    assert [dict(entry.xattrs) for entry in entries] == [
        *({}, wanted),
        *({**wanted, "user.a": b"a"},) * 2,
        wanted,
    ]
    assert os.listxattr(tmp_path / "t/fs/d/f") == ["user.a"]
    tree = MergedTree([tmp_path / "t"])
    report = export(tree, tmp_path / "exported", check_cancelled=lambda: None)
    assert report == ExportReport(entries=5, xattrs=3 * len(FOREIGN))
    assert os.listxattr(tmp_path / "exported/d/f") == ["user.a"]
    exported = b"".join(archive(tree, check_cancelled=lambda: None))
    found = {member.name: member.xattrs for member in TarReader(Plain(exported), Limits())}
    assert found[b"d/f"] == {**wanted, "user.a": b"a"}
    verify(tmp_path / "t", check_cancelled=lambda: None)
    os.chmod(tmp_path / "t/fs/d/f", 0o4755)
    with pytest.raises(StoreError, match="has a different mode"):
        verify(tmp_path / "t", check_cancelled=lambda: None)
