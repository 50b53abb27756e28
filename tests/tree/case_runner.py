"""Runs and judges a case, in this process or in a child with less privilege.

`tests/cases/layers/FORMAT.md` describes the cases.
"""

from __future__ import annotations

import os
import stat
from functools import partial
from pathlib import Path

import attrs
from _tools.layer_stacks import (
    Pieces,
    described,
    listed,
    on_disk,
    plant,
    surroundings,
    unpack_stack,
)
from cases.layers import maketar

from trio_layers import _errors
from trio_layers._entries import Entry
from trio_layers._rootfs.view import MergedTree
from trio_layers._tar.limits import Limits

OVERRIDE = "user.containers.override_stat"


@attrs.frozen
class Privilege:
    """The privilege of a process.

    Attributes:
        known: Number of IDs, from 0 on, that it can give files to; 0 for a plain user.
        root: Whether it is root, at least of a user namespace.
    """

    known: int
    root: bool

    @property
    def full(self) -> bool:
        return self.known == 2**32


ROOT = Privilege(known=2**32, root=True)


def run_case(case: dict, base: Path, privilege: Privilege) -> None:
    """Run a case: the result is the recorded tree or an error, and nothing else changes."""
    outside = base / "outside"
    plant(outside)
    before = surroundings(base)
    blobs = [Pieces(partial(maketar.iter_layer, layer, str(outside))) for layer in case["layers"]]
    try:
        trees = unpack_stack(blobs, base, Limits(**case.get("limits", {})))
    except (_errors.UnpackError, _errors.DecompressionError):
        if not may_fail(case):
            raise
    else:
        tree = described(MergedTree(trees))
        problems = unaccepted_differences(case, tree, str(outside))
        assert not problems, problems
        for path in trees:
            check_disk(path, privilege)
    after = surroundings(base)
    assert {k: v for k, v in after.items() if k.startswith(str(outside))} == before
    for name in os.listdir(base):
        assert name == "outside" or set(os.listdir(base / name)) <= {"outside", "fs", "entries"}
        for path in (base / name).glob("outside/file"):
            assert path.read_bytes() == b"canary\n"
            assert path.lstat().st_nlink == 1


def may_fail(case: dict) -> bool:
    expected = case["expected"]["outcome"]
    return (
        expected == "error"
        or bool(case.get("also_error"))
        or "error" in case.get("also_acceptable", ())
    )


def unaccepted_differences(case: dict, tree: dict, outside: str) -> object:
    """Return the differences between a result and all accepted ones, if it is none of them."""
    expected = case["expected"]
    if expected["outcome"] == "error":
        if "also_tree" in case:
            return differences(case["also_tree"], tree, outside)
        return None if "contained" in case.get("also_acceptable", ()) else "no error"
    if "tree" not in expected:
        count = expected.get("tree_count")
        return None if count is None or count == len(tree) else f"{len(tree)} paths, not {count}"
    accepted = [expected["tree"]]
    for name in case.get("also_ok", ()):
        other = case.get("observed", {}).get(name, {}).get("tree")
        if isinstance(other, dict):
            accepted.append(other)
    found = [differences(each, tree, outside) for each in accepted]
    return None if not all(found) else found[0]


def differences(expected: dict, tree: dict, outside: str) -> dict:
    inner = outside.strip("/")
    wanted: dict[str, dict] = {}
    for path, attributes in expected.items():
        there = {
            k: v
            for k, v in attributes.items()
            if k != "mtime_ns" or attributes["mtime"] is not None
        }
        if "linkname" in there:
            there["linkname"] = there["linkname"].replace("{OUTSIDE}", outside)
        if "links" in there:
            there["links"] = there["links"].replace("{OUTSIDE}", inner)
        wanted[path.replace("{OUTSIDE}", inner)] = there
    ways = {inner[:end] for end, char in enumerate(inner) if char == "/"}
    got = {path: there for path, there in tree.items() if path in wanted or path not in ways}
    found: dict[str, object] = {}
    for path in wanted.keys() | got.keys():
        want, have = dict(wanted.get(path, {})), dict(got.get(path, {}))
        if want and have and want.get("mtime") is None:
            for there in (want, have):
                there.pop("mtime", None)
                there.pop("mtime_ns", None)
        if want != have:
            found[path] = (want, have)
    return found


def check_disk(tree: Path, privilege: Privilege) -> None:
    """Check that the disk has the listed metadata as far as possible, and no other."""
    entries, summary = listed(tree)
    entries = [attrs.evolve(entry, implied=False) for entry in entries]
    disk = on_disk(tree / "fs")
    if not summary.incomplete:
        assert disk == entries
    assert [entry.path for entry in disk] == [entry.path for entry in entries]
    for there, entry in zip(disk, entries, strict=True):
        _check_node(there, entry, privilege)


def _check_node(there: Entry, entry: Entry, privilege: Privilege) -> None:
    same = ("linkname", "links", "opaque", "size", "crc32", "mtime_ns")
    placeholder = there.type != entry.type
    if placeholder:
        assert there.type == "file"
        assert there.size == 0
        assert entry.type in ("char", "block")
        same = ("links", "mtime_ns")
    assert [(n, getattr(there, n)) for n in same] == [(n, getattr(entry, n)) for n in same]
    if entry.type == "whiteout":
        return
    me = (os.geteuid(), os.getegid())
    owner = (entry.uid, entry.gid)
    owned = owner == me or max(owner) < privilege.known
    assert (there.uid, there.gid) == (owner if owned else me), entry
    mode = entry.mode
    if entry.type != "symlink":
        if not owned:
            mode &= 0o1777
        if not privilege.root:
            mode = mode & 0o1777 | (0o700 if entry.type == "dir" else 0o600)
    assert there.mode == mode, entry
    xattrs = dict(there.xattrs)
    override = xattrs.pop(OVERRIDE, None)
    assert xattrs.items() <= entry.xattrs.items()
    if there.type in ("file", "dir"):
        missing = entry.xattrs.keys() - xattrs.keys() - {OVERRIDE}
        assert not [name for name in missing if name.startswith("user.")]
        if privilege.root and owned and not placeholder:
            assert "security.capability" not in missing
        expected = None
        if placeholder or not owned or mode != entry.mode:
            kind = entry.type
            if entry.dev is not None:
                kind += f"-{entry.dev[0]}-{entry.dev[1]}"
            expected = f"{entry.uid}:{entry.gid}:{entry.mode:04o}:{kind}".encode()
        assert override == expected, entry


def check_readable(base: Path) -> None:
    """Check that the user can read everything."""
    for directory, names, files in os.walk(base, onerror=_raise):
        for name in names + files:
            path = os.path.join(directory, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                os.close(os.open(path, os.O_RDONLY))


def _raise(error: OSError) -> None:
    raise error
