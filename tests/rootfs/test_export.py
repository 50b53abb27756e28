"""Root file systems written out: into a directory, and as a tar."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from _tools.layer_stacks import Pieces, listed, mounted, on_disk, plant, unpack_blob, unpack_stack
from _tools.plain_tars import Plain
from _tools.plain_tars import archive as tar_of
from _tools.swapping import plant_link, swapped
from cases.layers import maketar
from pull.mounting import unmount
from tree.test_cases import CASES, without_times

from trio_layers import ExportError, ExportReport, StoreError
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

NOBODY = 65534
CAPABILITY = {"hex": "0100000200040000000000000000000000000000"}

# Of each kind, with all that a ustar header does not hold.
LAYER: list[dict] = [
    {"name": "./", "type": "dir", "mode": "0751", "uid": 3, "mtime": "77.000000001"},
    {"name": "d/", "type": "dir", "mode": "1770", "gid": 4, "mtime": "-1.5"},
    {"name": "d/file", "text": "content", "mode": "0604", "uid": 2**32 - 2, "gid": 2**31},
    {"name": "d/more", "type": "hardlink", "linkname": "d/file", "mode": "0604", "gid": 2**31}
    | {"uid": 2**32 - 2, "mtime": "1234567890.123456789"},
    {"name": "early", "text": "x", "mtime": "-2000000000.25"},
    {"name": "su", "text": "#!", "mode": "4755", "uid": 5},
    {"name": "cap", "text": "!", "pax": {"SCHILY.xattr.security.capability": CAPABILITY}},
    {"name": "attributes", "pax": {"SCHILY.xattr.user.x": {"hex": "00ff3d0a"}}},
    {"name": "disk", "type": "block", "devmajor": 4095, "devminor": 1048575, "mode": "0660"},
    {"name": "null", "type": "char", "devmajor": 1, "devminor": 3, "mode": "0666"},
    {"name": "pipe", "type": "fifo", "mode": "0622", "uid": 6},
    {"name": "away", "type": "symlink", "linkname": "/etc/passwd", "uid": 9, "mtime": 5},
    {"name": "up", "type": "symlink", "linkname": "../../../../etc"},
    {"name": {"hex": "ff0a5c20"}, "text": "bytes"},
    {"name": "line\nfeed", "type": "symlink", "linkname": {"hex": "fe0a2f00"[:6]}},
    {"name": "w" * 255, "text": "long name"},
    {"name": "/".join(["deep" * 20] * 20), "text": "long path"},
    {"name": "bare", "type": "dir", "mode": "0000", "uid": 8, "mtime": 3},
    {"name": "bare/in", "text": "in", "mode": "0000", "mtime": 3},
    {"name": "empty", "mtime": 0},
]


def never() -> None:
    pass


def exported(view: MergedTree, target: Path) -> ExportReport:
    return export(view, target, root_metadata=True, check_cancelled=never)


def packed(view: MergedTree) -> bytes:
    return b"".join(archive(view, check_cancelled=never))


@pytest.fixture
def view(tmp_path: Path) -> MergedTree:
    return MergedTree(unpack_stack([tar_of(*LAYER)], tmp_path))


STACKS = [(name, case) for name, case in CASES if "limits" not in case]


@pytest.mark.parametrize("case", [c for _, c in STACKS], ids=[name for name, _ in STACKS])
def test_cases(case: dict, tmp_path: Path) -> None:
    """What is exported is what the view shows and what the kernel's overlay has; a tar of it
    unpacks to the same again."""
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
    # A directory that no entry describes has its time from below, which overlayfs does not know.
    timeless = {e.path for tree in trees for e in listed(tree)[0] if e.implied}
    with mounted(trees, tmp_path) as root:
        assert without_times(on_disk(root), timeless) == without_times(seen, timeless)


def test_everything(view: MergedTree, tmp_path: Path) -> None:
    """One of each kind, into a directory that is made, and into one that is there."""
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
    """All but the fractions of seconds, which it makes floats of."""
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
    """To the last attribute, names byte for byte, without a complaint."""
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
    """Whatever layers a file system came from."""
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
    """However large a file, and however many there are."""
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
    """Holes at the start, in the middle and at the end, whichever way the kernel copies."""
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
    """Nothing is left, and a directory that was there is as it was."""
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


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: (path / "x").mkdir(parents=True), "directory is not empty; name an empty"),
        (lambda path: path.write_bytes(b"x"), "Not a directory"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
    ],
    ids=["not-empty", "file", "dangling"],
)
def test_unfit_target(
    make: Callable[[Path], None], text: str, view: MergedTree, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    make(target)
    before = (target.lstat(), list(target.glob("*")))
    with pytest.raises(ExportError, match=text) as caught:
        exported(view, target)
    assert caught.value.path == str(target)
    assert (target.lstat(), list(target.glob("*"))) == before


def test_no_parent(view: MergedTree, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="No such file"):
        exported(view, tmp_path / "a/b")


ACL = bytes.fromhex(
    "0200000001000700ffffffff02000700e803000004000700ffffffff10000700ffffffff20000700ffffffff"
)


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o1777, 0o2775])
@pytest.mark.parametrize("fails", [False, True])
def test_the_target_keeps_its_own_metadata(
    mode: int, fails: bool, view: MergedTree, tmp_path: Path
) -> None:
    """The image's root has another owner, mode and time; its entries match the layers."""
    target = tmp_path / "private"
    target.mkdir()
    os.chown(target, 12, 34)
    for name in ("system.posix_acl_access", "system.posix_acl_default"):
        if mode == 0o2775:
            os.setxattr(target, name, ACL)
    os.setxattr(target, "user.mine", b"mine")
    target.chmod(mode)
    os.utime(target, ns=(5, 7))
    before = on_disk(target)
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if fails and calls == len(view.walk()):
            raise Stopped

    if fails:
        with pytest.raises(Stopped):
            export(view, target, check_cancelled=check)
        assert on_disk(target) == before
    else:
        export(view, target, check_cancelled=check)
        root, *rest = on_disk(target)
        assert [root] == before
        assert rest == view.walk()[1:]


def test_a_new_target_is_closed_to_others(view: MergedTree, tmp_path: Path) -> None:
    """The tree may contain set-id files from an untrusted image."""
    umask = os.umask(0)
    try:
        export(view, tmp_path / "new", check_cancelled=never)
    finally:
        os.umask(umask)
    root, *rest = on_disk(tmp_path / "new")
    assert (root.mode, root.uid, root.gid) == (0o700, os.geteuid(), os.getegid())
    assert rest == view.walk()[1:]


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("planted_by", [0, 1234])
@pytest.mark.parametrize("below", ["", "sub"])
def test_another_user_exchanges_the_target_for_a_link(
    planted_by: int, below: str, tmp_path: Path
) -> None:
    """The export writes to that user's directory or fails, but never follows the link."""
    view = MergedTree(unpack_stack([tar_of({"name": "evil", "text": "x"})], tmp_path))
    real, link, victim = plant_link(tmp_path, below=below, owner=planted_by)
    done = refused = 0
    with swapped(real, link):
        for _ in range(10_000):
            if min(done, refused) > 50:
                break
            try:
                export(view, real / below, check_cancelled=never)
            except ExportError:
                refused += 1
            else:
                done += 1
            assert os.listdir(victim / below) == []
            for path in (real, link):
                (path / below / "evil").unlink(missing_ok=True)
    assert done
    assert refused


def test_links_that_are_followed(view: MergedTree, tmp_path: Path) -> None:
    """The export follows the caller's links if no other user can exchange them."""
    there, shared = tmp_path / "there", tmp_path / "shared"
    there.mkdir()
    shared.mkdir()
    shared.chmod(0o1777)
    for link in (tmp_path / "link", shared / "link"):
        link.symlink_to(tmp_path)
        export(view, link / "there", check_cancelled=never)
        shutil.rmtree(there)
        export(view, link / "there", check_cancelled=never)
        shutil.rmtree(there)
        there.mkdir()
    shared.chmod(0o777)
    with pytest.raises(ExportError, match="'link' in the path is a link that another user may"):
        export(view, shared / "link" / "there", check_cancelled=never)
    shared.chmod(0o1777)
    os.chown(shared / "link", 1234, 1234, follow_symlinks=False)
    with pytest.raises(ExportError, match="'link' in the path is a link that another user may"):
        export(view, shared / "link" / "there", check_cancelled=never)
    assert os.listdir(there) == []


def test_stopped_anywhere(view: MergedTree, tmp_path: Path) -> None:
    """Wherever it is cancelled, nothing is left."""
    target = tmp_path / "target"
    there = tmp_path / "there"
    there.mkdir(0o711)
    os.utime(there, ns=(12345, 67890))
    before = on_disk(there)
    for stop in range(10_000):
        left = stop

        def check() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Stopped

        try:
            export(view, target, check_cancelled=check)
        except Stopped:
            assert not target.exists()
            left = stop
            with pytest.raises(Stopped):
                export(view, there, check_cancelled=check)
            assert on_disk(there) == before
        else:
            assert stop > len(view.walk())
            return


@pytest.mark.parametrize("name", ["d", "su", "empty", "disk", "away"])
def test_what_comes_in_between_is_not_followed(name: str, view: MergedTree, tmp_path: Path) -> None:
    """Somebody plants a link where a file or a directory is to be: an error, and nothing outside
    is touched; what he planted is left to him."""
    outside, target = tmp_path / "outside", tmp_path / "target"
    plant(outside)
    before = on_disk(outside)

    def check() -> None:
        if target.exists() and not os.path.lexists(target / name):
            (target / name).symlink_to(outside)

    with pytest.raises(ExportError, match=f"target/{name}: File exists"):
        export(view, target, check_cancelled=check)
    assert on_disk(outside) == before
    assert os.listdir(target) == [name]


def test_a_directory_replaced_by_a_link(tmp_path: Path) -> None:
    view = MergedTree(
        unpack_stack([tar_of({"name": "d/", "type": "dir"}, {"name": "d/f"})], tmp_path)
    )
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()

    def check() -> None:
        if (target / "d").is_dir() and not (target / "d").is_symlink():
            (target / "d").rmdir()
            (target / "d").symlink_to(outside)

    with pytest.raises(ExportError, match="Not a directory"):
        export(view, target, check_cancelled=check)
    assert not os.listdir(outside)


@pytest.mark.parametrize("damage", ["shorter", "longer", "gone", "link"])
def test_a_damaged_store(damage: str, view: MergedTree, tmp_path: Path) -> None:
    """It is said, and nothing is left of what was written."""
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


def test_no_more_files(view: MergedTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files are no damage: nobody is told to remove the image."""

    def refuse(path: bytes) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), os.fsdecode(path))

    monkeypatch.setattr(view, "open", refuse)
    with pytest.raises(ExportError, match="Too many open files"):
        exported(view, tmp_path / "out")
    with pytest.raises(OSError, match="Too many open files"):
        packed(view)


def test_a_disk_that_cannot_be_read(view: MergedTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tar's errors are the store's, whose files it is made of."""

    def fails(descriptor: int, size: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched, pytest.raises(StoreError, match="Input/output error"):
        patched.setattr(os, "read", fails)
        list(archive(view, check_cancelled=lambda: None))


def test_no_more_files_for_the_target(
    view: MergedTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that was made goes again, even if it cannot be opened."""
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


# Privilege is dropped when all is imported: the interpreter may be in a directory of root's own.
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
    """As umoci has it: permissions as they are, owners ours, and then no set-id bits. The tar has
    it all, byte for byte. In a user namespace with one user, all but that one are out of reach."""
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
    # All but the further names of files.
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
        # The length of a record counts itself.
        *({"xattrs": {"user.x": b"v" * size}} for size in (*range(66, 80), 970, 980, 65536)),
    ],
    ids=lambda change: "-".join(f"{key}={str(value)[:20]}" for key, value in change.items()),
)
def test_headers(change: dict) -> None:
    """What ustar does not hold is read as it was, by ourselves and by Python."""
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
