"""Unpacks random archives and checks properties that hold for all of them.

`test_fuzz.py` runs a few; ``python -m tree.fuzz --minutes 60``, from ``tests/`` and as root,
runs many and counts the results. A finding becomes a case in ``cases/layers/found.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import io
import itertools
import os
import re
import resource
import shutil
import stat
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import attrs
from _tools.layer_stacks import listed, on_disk
from _tools.plain_tars import Plain
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st
from tree.generated_tars import Archive, archives

from trio_layers._entries import Entry
from trio_layers._errors import DecompressionError, StoreFull, UnpackError
from trio_layers._rootfs.merged import MergedTree
from trio_layers._tar.limits import Limits
from trio_layers._tar.reader import Member, TarReader
from trio_layers._tree.unpack import unpack
from trio_layers._tree.unpacked import Unpacked, assumptions_hold

LIMITS = Limits(max_unpacked_bytes=8 << 20, max_entries=200, max_ratio_from=4 << 20)
"""Limits that stop damaged archives early and allow all undamaged ones."""

BATCH = 300
"""Number of examples of the long run that share a seed."""

MOST_CHECKS = 100_000
"""The most checks for cancellation; after more, the unpacker does not end."""


class World:
    """A directory for many examples, with canaries around the place of the trees."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.work = base / "work"
        self.done = base / "done"
        self.outside = base / "outside"
        self.outcomes: Counter[str] = Counter()
        self.work.mkdir()
        self.done.mkdir()
        for outside in (self.outside, self.work / "outside"):
            for name, content in (("file", "canary"), ("exec", "exec"), ("dir/keep", "keep")):
                (outside / name).parent.mkdir(parents=True, exist_ok=True)
                (outside / name).write_text(content)
        self._before = self._surroundings()

    def _surroundings(self) -> list[object]:
        found: list[object] = [set(os.listdir(self.base))]
        found.append(set(os.listdir(self.work)) - {"fs", "entries"})
        for top in (self.outside, self.work / "outside"):
            for path in [top, *sorted(top.rglob("*"))]:
                now = path.lstat()
                content = path.read_bytes() if stat.S_ISREG(now.st_mode) else b""
                found.append(
                    (path, now.st_mode, now.st_uid, now.st_nlink, now.st_ctime_ns, content)
                )
                found.append(os.listxattr(path))
        return found

    def check(self, stack: list[Archive]) -> None:
        """Unpack the layers as a store does, and check the result."""
        trees: list[Path] = []
        whole = True
        try:
            for archive in stack:
                # An undamaged layer may still be invalid on a damaged one.
                whole = whole and archive.whole
                if archive.whole:
                    agree_on_members(archive.tar)
                if not self._layer(archive, trees, whole=whole):
                    break
            else:
                list(MergedTree(trees).walk())
        finally:
            for path in self.done.iterdir():
                shutil.rmtree(path)
            self._clear()

    def _layer(self, archive: Archive, trees: list[Path], *, whole: bool) -> bool:
        lower = MergedTree(trees)
        try:
            alone = self._unpack(archive.blob, None)
            if alone.needs_lower or not assumptions_hold(alone.assumed, lower):
                self._clear()
                again = self._unpack(archive.blob, lower)
                assert again.diff_id == alone.diff_id
                assert not again.needs_lower
                assert not again.assumed
        except (UnpackError, DecompressionError, StoreFull) as error:
            # On some file systems an inode cannot hold all of the entry's attributes.
            if whole or ("attribute" not in str(error) and isinstance(error, StoreFull)):
                raise
            self.outcomes[rule_of(error)] += 1
            return False
        finally:
            assert self._surroundings() == self._before, "the surroundings have changed"
        listing, summary = listed(self.work)
        if not summary.incomplete:
            wanted = [clamped(attrs.evolve(entry, implied=False)) for entry in listing]
            assert [clamped(entry) for entry in on_disk(self.work / "fs")] == wanted
        if archive.whole:
            assert alone.diff_id == f"sha256:{hashlib.sha256(archive.tar).hexdigest()}"
        tree = self.done / str(len(trees))
        tree.mkdir()
        for name in ("fs", "entries"):
            os.rename(self.work / name, tree / name)
        trees.append(tree)
        self.outcomes["ok, whole" if whole else "ok, all the same"] += 1
        return True

    def _unpack(self, blob: bytes, lower: MergedTree | None) -> Unpacked:
        self._clear()
        checks = 0

        def check() -> None:
            nonlocal checks
            checks += 1
            assert checks < MOST_CHECKS, "it does not end"

        read = io.BytesIO(blob).read
        return unpack(read, self.work, lower=lower, limits=LIMITS, check_cancelled=check)

    def _clear(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.work / "fs")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.work / "entries")


def clamped(entry: Entry) -> Entry:
    """Return an entry with the nearest time that ext4 can hold."""
    low, high = -(2**31) * 10**9, (2**34 - 2**31) * 10**9 - 1
    return attrs.evolve(entry, mtime_ns=min(max(entry.mtime_ns, low), high))


def rule_of(error: Exception) -> str:
    """Return an error's kind and rule, without names and numbers."""
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"|-?\d+", "_", str(error))
    return f"{type(error).__name__}: {text[:100]}"


def agree_on_members(tar: bytes) -> None:
    """Compare our reader with Python's on an undamaged archive."""
    ours = []
    reader = TarReader(Plain(tar), LIMITS)
    for member in reader:
        data = reader.data()
        content = b"".join(bytes(each) if isinstance(each, int) else each for each in data)
        ours.append(member_fields(member, content))
    theirs = []
    # Python refuses an empty archive without an end.
    ended = io.BytesIO(tar + bytes(1024))
    with tarfile.open(None, "r:", ended, encoding="utf-8", errors="surrogateescape") as other:
        for info in other:
            file = other.extractfile(info) if info.isreg() else None
            theirs.append(python_member_fields(info, file.read() if file else b""))
    for one, other in itertools.zip_longest(ours, theirs):
        assert one == other


def member_fields(member: Member, content: bytes) -> dict[str, object]:
    is_device = member.type in ("char", "block")
    is_link = member.type in ("symlink", "hardlink")
    return {
        "name": member.name.rstrip(b"/"),
        "type": member.type,
        "mode": member.mode,
        "owner": (member.uid, member.gid),
        "mtime": member.mtime_ns // 10**6 / 1000,
        "linkname": member.linkname if is_link else b"",
        "dev": member.dev if is_device else None,
        "xattrs": dict(member.xattrs),
        "content": content,
    }


PYTHON_TYPES = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.GNUTYPE_SPARSE: "file",
    tarfile.LNKTYPE: "hardlink",
    tarfile.SYMTYPE: "symlink",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.DIRTYPE: "dir",
    tarfile.FIFOTYPE: "fifo",
}


def python_member_fields(info: tarfile.TarInfo, content: bytes) -> dict[str, object]:
    prefix = "SCHILY.xattr."
    return {
        "name": os.fsencode(info.name).rstrip(b"/"),
        "type": PYTHON_TYPES[info.type],
        "mode": info.mode & 0o7777,
        "owner": (info.uid, info.gid),
        "mtime": int(info.mtime * 1000 // 1) / 1000,
        "linkname": os.fsencode(info.linkname) if info.issym() or info.islnk() else b"",
        "dev": (info.devmajor, info.devminor) if info.ischr() or info.isblk() else None,
        "xattrs": {
            key.removeprefix(prefix): os.fsencode(value)
            for key, value in info.pax_headers.items()
            if key.startswith(prefix)
        },
        "content": content,
    }


# The long run.


def stacks(world: World) -> st.SearchStrategy[list[Archive]]:
    return st.lists(archives(str(world.outside)), min_size=1, max_size=3)


def run(world: World, examples: int, number: int) -> None:
    """Run a number of stacks of layers; shrink and raise a failure."""
    quiet = list(HealthCheck)

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=quiet,
        phases=[Phase.generate, Phase.shrink],
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(stacks(world))
    def one(stack: list[Archive]) -> None:
        world.check(stack)

    one()


@contextlib.contextmanager
def open_world(directory: str | None = None) -> Iterator[World]:
    base = Path(tempfile.mkdtemp(prefix="fuzz-", dir=directory))
    try:
        yield World(base)
    finally:
        shutil.rmtree(base)


def report(world: World, examples: int, findings: Counter[str]) -> None:
    print(f"{examples} examples, {sum(world.outcomes.values())} layers")
    for outcome, count in world.outcomes.most_common():
        print(f"{count:9} {outcome}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"peak memory: {peak} MiB; findings: {dict(findings) or 'none'}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tree.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--directory", help="where trees are made")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    batches = 0
    findings: Counter[str] = Counter()
    with open_world(arguments.directory) as world:
        while time.monotonic() < end:
            # An example that takes this long hangs.
            faulthandler.dump_traceback_later(900, exit=True)
            try:
                run(world, BATCH, arguments.seed + batches)
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
                findings[kind] += 1
                if findings[kind] <= 3:
                    print(f"FINDING, seed {arguments.seed + batches}:")
                    for line in "".join(traceback.format_exception(error)).splitlines():
                        print(line[:2000], flush=True)
            batches += 1
            if batches % 20 == 0:
                report(world, batches * BATCH, findings)
        faulthandler.cancel_dump_traceback_later()
        report(world, batches * BATCH, findings)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
