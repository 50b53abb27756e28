"""Unpacks stacks of layers as a store does, and reads the result as a tree of the cases."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import stat
import subprocess
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import attrs

from trio_layers._digest import DiffID, Digest
from trio_layers._entries import Entry, Summary, parse_entries
from trio_layers._rootfs.view import MergedTree
from trio_layers._tar.limits import Limits
from trio_layers._tree.unpack import unpack
from trio_layers._tree.unpacked import Unpacked, assumptions_hold
from trio_layers._tree.verify import verify

UNLIMITED = Limits()

CANARIES = {
    "file": (b"canary\n", 0o644),
    "exec": (b"exec\n", 0o755),
    "dir/keep": (b"keep\n", 0o600),
}


OVERLAY = ("trusted.overlay.", "user.overlay.")


class Pieces:
    """Makes a blob while it is read, since some blobs are too large to make in full."""

    def __init__(self, make: Callable[[], Iterable[bytes]]) -> None:
        self._make = make

    def reader(self) -> Callable[[int], bytes]:
        pieces, held = iter(self._make()), bytearray()

        def read(size: int) -> bytes:
            while len(held) < size and (piece := next(pieces, None)) is not None:
                held.extend(piece)
            data = bytes(held[:size])
            del held[:size]
            return data

        return read


def unpack_blob(
    blob: bytes | Pieces,
    target: Path,
    lower: MergedTree | None = None,
    limits: Limits = UNLIMITED,
    *,
    verified: bool = True,
) -> Unpacked:
    """Unpack a layer into a new directory, with canaries where ``..`` leads from its root."""
    target.mkdir()
    plant(target / "outside")
    read = blob.reader() if isinstance(blob, Pieces) else io.BytesIO(blob).read
    unpacked = unpack(read, target, lower=lower, limits=limits)
    if verified and not unpacked.needs_lower:
        # A check must find no difference in the tree of any layer.
        verify(target, check_cancelled=lambda: None)
    return unpacked


def unpack_stack(
    blobs: Sequence[bytes | Pieces], base: Path, limits: Limits = UNLIMITED
) -> list[Path]:
    """Unpack each layer alone, and on top of its parent only if necessary."""
    trees: list[Path] = []
    for number, blob in enumerate(blobs):
        lower = MergedTree(trees)
        target = base / f"{number}-alone"
        alone = unpack_blob(blob, target, limits=limits)
        if alone.needs_lower or not assumptions_hold(alone.assumed, lower):
            target = base / f"{number}-on-parent"
            again = unpack_blob(blob, target, lower, limits)
            assert again.diff_id == alone.diff_id
            assert not again.needs_lower
            assert not again.assumed
        trees.append(target)
    return trees


def plant(outside: Path) -> None:
    for name, (content, mode) in CANARIES.items():
        path = outside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)
    for path in [*outside.rglob("*"), outside]:
        os.utime(path, (10**9, 10**9))


def surroundings(base: Path) -> dict[str, object]:
    """Return everything below ``base`` that is not in a tree, in full detail, by path."""
    found: dict[str, object] = {}
    for directory, names, files in os.walk(base):
        if (Path(directory) / "outside").is_dir() and Path(directory) != base:
            names[:] = ["outside"]
            files = []
        for name in names + files:
            path = Path(directory) / name
            now = path.lstat()
            if name.endswith(("-alone", "-on-parent")):
                continue
            content = path.read_bytes() if stat.S_ISREG(now.st_mode) else b""
            found[str(path)] = (
                *(now.st_mode, now.st_uid, now.st_gid, now.st_nlink),
                *(now.st_mtime_ns, now.st_ctime_ns, content, os.listxattr(path)),
            )
    return found


def text(path: bytes) -> str:
    return "".join(
        "%25"
        if char == "%"
        else f"%{ord(char) - 0xDC00:02X}"
        if 0xDC80 <= ord(char) < 0xDD00
        else char
        for char in path.decode("utf-8", "surrogateescape")
    )


def described(merged: MergedTree) -> dict[str, dict[str, object]]:
    """Return the merged layers as a tree of the cases (``FORMAT.md``)."""
    tree: dict[str, dict[str, object]] = {}
    for entry in merged.walk():
        seconds, rest = divmod(entry.mtime_ns, 10**9)
        there: dict[str, object] = {"type": entry.type, "uid": entry.uid, "gid": entry.gid}
        there["mtime"] = seconds
        if rest:
            there["mtime_ns"] = rest
        if entry.type != "symlink":
            there["mode"] = f"{entry.mode:04o}"
        if entry.type == "file":
            with open(merged.open(entry.path), "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            there |= {"size": entry.size, "sha256": digest}
        if entry.linkname is not None:
            there["linkname"] = text(entry.linkname)
        if entry.dev is not None:
            there["dev"] = list(entry.dev)
        if entry.links is not None:
            there["links"] = text(entry.links)
        if entry.xattrs:
            there["xattrs"] = {
                name: base64.b64encode(value).decode() for name, value in entry.xattrs.items()
            }
        tree[text(entry.path) or "."] = there
    return tree


def on_disk(root: Path) -> list[Entry]:
    """Return a directory's content as the kernel reports it."""
    top = os.fsencode(root)
    entries: list[Entry] = []
    inodes: dict[int, list[int]] = {}
    todo = [b""]
    while todo:
        path = todo.pop()
        full = top + b"/" + path if path else top
        now = os.lstat(full)
        kind = {
            stat.S_IFREG: "file",
            stat.S_IFDIR: "dir",
            stat.S_IFLNK: "symlink",
            stat.S_IFIFO: "fifo",
            stat.S_IFCHR: "char",
            stat.S_IFBLK: "block",
        }[stat.S_IFMT(now.st_mode)]
        device = (
            (os.major(now.st_rdev), os.minor(now.st_rdev)) if kind in ("char", "block") else None
        )
        content = Path(os.fsdecode(full)).read_bytes() if kind == "file" else None
        xattrs = {
            name: os.getxattr(full, name, follow_symlinks=False)
            for name in os.listxattr(full, follow_symlinks=False)
        }
        opaque = b"y" in [xattrs.pop(f"{prefix}opaque", None) for prefix in OVERLAY]
        xattrs = {k: v for k, v in xattrs.items() if not k.startswith(OVERLAY)}
        if device == (0, 0):
            entries.append(Entry(path=path, type="whiteout", mode=0))
            continue
        inodes.setdefault(now.st_ino, []).append(len(entries))
        entries.append(
            Entry(
                path=path,
                type=kind,
                mode=stat.S_IMODE(now.st_mode),
                uid=now.st_uid,
                gid=now.st_gid,
                mtime_ns=now.st_mtime_ns,
                size=len(content) if content is not None else 0,
                crc32=zlib.crc32(content) if content is not None else None,
                linkname=os.readlink(full) if kind == "symlink" else None,
                dev=device,
                xattrs=xattrs,
                opaque=opaque,
            )
        )
        if kind == "dir":
            todo += [path + b"/" + name if path else name for name in os.listdir(full)]
    for same in inodes.values():
        if len(same) > 1:
            first = min(entries[number].path for number in same)
            for number in same:
                entries[number] = attrs.evolve(entries[number], links=first)
    return sorted(entries, key=lambda entry: entry.path)


def listed(tree: Path) -> tuple[list[Entry], Summary]:
    with open(tree / "entries", "rb") as lines:
        return parse_entries(lines)


def diff_id(plain: bytes) -> DiffID:
    return DiffID(Digest(f"sha256:{hashlib.sha256(plain).hexdigest()}"))


@contextlib.contextmanager
def mounted(trees: list[Path], base: Path) -> Iterator[Path]:
    """Mount the trees as a read-only overlay, down to the first tree with an opaque root."""
    stack: list[Path] = []
    for tree in reversed(trees):
        stack.append(tree / "fs")
        if listed(tree)[0][0].opaque:
            break
    (base / "empty").mkdir()
    (base / "mnt").mkdir()
    option = "lowerdir=" + ":".join(str(path) for path in [*stack, base / "empty"])
    command = ["mount", "-t", "overlay", "overlay", "-o", option, str(base / "mnt")]
    subprocess.run(command, check=True)
    try:
        yield base / "mnt"
    finally:
        subprocess.run(["umount", str(base / "mnt")], check=True)
