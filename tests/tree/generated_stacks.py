"""Random stacks of layers, and properties that hold for all of them.

`test_random.py` runs a few. To run many and count the results, call
``python -m tree.generated_stacks --minutes 60`` from ``tests/`` as root. A finding becomes a
case in ``cases/layers/found_stacks.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import attrs
import trio
from _tools.layer_stacks import diff_id, listed, mounted, on_disk, unpack_blob, unpack_stack
from _tools.plain_tars import archive
from hypothesis import HealthCheck, Phase, given, note, seed, settings, strategies as st
from store.stores import Blob, Stream, describe, open_with_threads

from trio_layers._entries import Entry
from trio_layers._errors import UnpackError
from trio_layers._rootfs.view import MergedTree
from trio_layers.testing import build_image

# Few names, so that paths collide.
PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join)
UP = st.sampled_from(["", "", "/", "../", "../../", "a/../", "nowhere/"])
TARGETS = st.tuples(UP, PATHS).map("".join)
OWNERS = st.sampled_from([0, 0, 1, 70000])
XATTRS = st.sampled_from([{}, {}, {"SCHILY.xattr.user.x": "1"}, {"SCHILY.xattr.user.y": ""}])

OPAQUE = ".wh..wh..opq"


@st.composite
def any_entry(draw: st.DrawFn) -> dict:
    """Draw an entry of any kind, at any path."""
    kind = draw(st.sampled_from(["file"] * 4 + ["dir"] * 4 + OTHERS))
    name = draw(PATHS)
    above, _, last = name.rpartition("/")
    prefix = f"{above}/" if above else ""
    entry: dict = {"name": name, "mtime": draw(st.integers(0, 999)), "uid": draw(OWNERS)}
    if kind in ("file", "dir"):
        entry["pax"] = draw(XATTRS)
    if kind == "file":
        entry |= {"text": draw(st.sampled_from("xyz")), "mode": draw(FILE_MODES)}
    elif kind == "dir":
        entry |= {"type": "dir", "mode": draw(DIRECTORY_MODES), "name": f"{name}/"}
    elif kind in ("symlink", "hardlink"):
        entry |= {"type": kind, "linkname": draw(TARGETS if kind == "symlink" else PATHS)}
    elif kind == "char":
        entry |= {"type": kind, "devmajor": 1, "devminor": draw(st.integers(3, 5))}
    elif kind == "root":
        entry |= {"type": "dir", "mode": draw(DIRECTORY_MODES), "name": "./"}
    elif kind == "fifo":
        entry["type"] = kind
    else:
        entry = {"name": prefix + (OPAQUE if kind == "opaque" else f".wh.{last}")}
    return entry


OTHERS = ["symlink", "symlink", *["hardlink"] * 3, "whiteout", "opaque", "char", "fifo", "root"]
FILE_MODES = st.sampled_from(["0644", "4755", "0600"])
DIRECTORY_MODES = st.sampled_from(["0755", "0755", "0711", "2755", "0000"])

LAYERS = st.lists(any_entry(), min_size=1, max_size=8)

# As in distributions: an entry below a link ends up elsewhere.
MERGED_USR: list[dict] = [
    {"name": "./", "type": "dir"},
    {"name": "a/", "type": "dir", "mode": "0711", "mtime": 5},
    {"name": "a/b/", "type": "dir", "mtime": 6},
    {"name": "a/b/a", "text": "below", "uid": 3, "mode": "4755"},
    {"name": "a/c", "type": "hardlink", "linkname": "a/b/a", "uid": 3, "mode": "4755"},
    {"name": "b", "type": "symlink", "linkname": "a/b"},
    {"name": "c", "type": "symlink", "linkname": "/a"},
]

# A file and a link with several names, because a change of one name affects the others.
LINKED: list[dict] = [
    {"name": "./", "type": "dir"},
    {"name": "a/", "type": "dir", "mtime": 5},
    {"name": "b/", "type": "dir", "mtime": 6},
    {"name": "a/b/", "type": "dir", "mtime": 6},
    {"name": "a/a", "text": "below"},
    {"name": "b/a", "type": "hardlink", "linkname": "a/a"},
    {"name": "a/b/a", "type": "hardlink", "linkname": "a/a"},
    {"name": "b/b", "type": "symlink", "linkname": "/a"},
    {"name": "a/b/b", "type": "hardlink", "linkname": "b/b"},
]

STACKS = st.one_of(
    st.lists(LAYERS, min_size=2, max_size=4),
    *(
        st.lists(LAYERS, min_size=1, max_size=3).map(lambda above, base=base: [base, *above])
        for base in (MERGED_USR, LINKED)
    ),
)


def is_mark(entry: dict) -> bool:
    return "/.wh." in f"/{entry['name']}"


def for_umoci(layer: Sequence[dict], below: MergedTree) -> list[dict]:
    """Draw a layer without the constructs in which umoci 0.4.7 deviates from the specification.

    Whiteouts are in existing directories, since umoci does not make directories for them. They
    come first, since umoci lets them remove earlier entries of the same layer. A path comes once,
    since umoci keeps other parts of an earlier entry. The root is not listed, since umoci skips
    it. All entries except directories have the same metadata, since umoci does not apply that of
    a hard link's entry. Directories have no xattrs, since umoci keeps those of an earlier layer.
    They pass on no group, since umoci lets implied directories inherit it.
    """
    taken: dict[str, dict] = {}
    for entry in layer:
        name = entry["name"].strip("./")
        if is_mark(entry):
            above = below.lookup(os.fsencode(entry["name"].rpartition("/")[0]))
            if above is not None and above.type == "dir":
                taken.setdefault(entry["name"], entry)
        elif name:
            entry = {k: v for k, v in entry.items() if k != "pax"}
            if entry.get("mode") == "2755":
                entry["mode"] = "0755"
            if entry.get("type") != "dir":
                entry = {**entry, "mtime": 7, "uid": 0, "mode": "0644"}
            taken.setdefault(name, entry)
    return sorted(taken.values(), key=lambda entry: not is_mark(entry))


def blobs_of(stack: Sequence[Sequence[dict]]) -> list[bytes]:
    return [archive(*layer) for layer in stack]


def unpack_in_order(blobs: Sequence[bytes], base: Path) -> tuple[list[bytes], list[Path]]:
    """Unpack each layer on top of those before it, which defines the right result.

    A layer that is invalid there is left out.
    """
    kept: list[bytes] = []
    trees: list[Path] = []
    for number, blob in enumerate(blobs):
        target = base / f"{number}-in-order"
        try:
            unpack_blob(blob, target, MergedTree(trees))
        except UnpackError:
            continue
        kept.append(blob)
        trees.append(target)
    return kept, trees


def implied_directories(*stacks: Sequence[Path]) -> set[bytes]:
    """Return directories that some layer only implies: their times are undefined."""
    return {
        entry.path for trees in stacks for t in trees for entry in listed(t)[0] if entry.implied
    }


def clear_times(found: Sequence[Entry], without_times: set[bytes]) -> list[Entry]:
    return [attrs.evolve(e, mtime_ns=0) if e.path in without_times else e for e in found]


def check_orders(stack: Sequence[Sequence[dict]], base: Path) -> Counter[str]:
    """Unpack each layer alone if possible; compare with the right result, mounted and listed."""
    counts: Counter[str] = Counter(stacks=1, layers=len(stack))
    kept, trees = unpack_in_order(blobs_of(stack), base)
    counts["refused"] += len(stack) - len(kept)
    shared = unpack_stack(kept, base)
    counts["twice"] += sum(path.name.endswith("-on-parent") for path in shared)
    loose = implied_directories(trees, shared)
    merged = clear_times(list(MergedTree(trees).walk()), loose)
    assert clear_times(list(MergedTree(shared).walk()), loose) == merged
    for tree in (*shared, *trees):
        found, summary = listed(tree)
        assert not summary.incomplete
        assert on_disk(tree / "fs") == [attrs.evolve(e, implied=False) for e in found]
    if shared:
        with mounted(shared, base) as root:
            assert clear_times(on_disk(root), loose) == merged
    return counts


def check_refused(stack: Sequence[Sequence[dict]], base: Path) -> None:
    """Check that unpacking alone first refuses a stack exactly if unpacking in order does."""
    blobs = blobs_of(stack)
    try:
        unpack_stack(blobs, base)
        refused = False
    except UnpackError:
        refused = True
    kept, _ = unpack_in_order(blobs, base)
    assert refused is (len(kept) < len(blobs))


async def check_store(
    stack: Sequence[Sequence[dict]], orders: Sequence[Sequence[int]], base: Path
) -> Counter[str]:
    """Check layers on different parents in one store, in each order."""
    counts: Counter[str] = Counter(stores=1)
    blobs = blobs_of(stack)
    async with open_with_threads(base / "store") as store:
        for number, order in enumerate(orders):
            place = base / f"order-{number}"
            place.mkdir()
            kept, _ = unpack_in_order([blobs[index] for index in order], place)
            parent = None
            for index in order:
                data = blobs[index]
                blob = Blob(data, describe(data), diff_id(data))
                if data not in kept:
                    continue
                kept.remove(data)
                layer = await store.register(Stream(data), parent, blob.descriptor)
                parent = layer.chain_id
                counts["registered"] += 1
            rootfs = await store.rootfs(parent)
            trees = sorted(place.glob("*-in-order"), key=lambda path: int(path.name.split("-")[0]))
            trees = [tree for tree in trees if is_whole(tree)]
            loose = {e.path for e in MergedTree(trees).walk() if e.type == "dir"}
            found = await rootfs.walk()
            assert clear_times(found, loose) == clear_times(list(MergedTree(trees).walk()), loose)
    return counts


def is_whole(tree: Path) -> bool:
    return b'{"end":' in (tree / "entries").read_bytes()


def check_umoci(stack: Sequence[Sequence[dict]], base: Path) -> Counter[str]:
    """Compare with ``umoci unpack`` for layers where umoci follows the specification."""
    kept: list[bytes] = []
    trees: list[Path] = []
    for number, layer in enumerate(stack):
        below = MergedTree(trees)
        blob = archive(*for_umoci(layer, below))
        target = base / str(number)
        try:
            unpack_blob(blob, target, below)
        except UnpackError:
            continue
        kept.append(blob)
        trees.append(target)
    if not kept:
        return Counter()
    build_image(kept, compression="none").write_oci_layout(base / "layout")
    command = ["umoci", "unpack", "--image", f"{base / 'layout'}:latest", str(base / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return Counter({"umoci refused": 1, done.stderr.strip().rpartition(": ")[2][:60]: 1})
    ours = list(MergedTree(trees).walk())
    theirs = on_disk(base / "bundle" / "rootfs")
    loose = {entry.path for entry in ours if entry.type == "dir"}
    assert clear_times(theirs, loose) == clear_times(ours, loose)
    return Counter({"as umoci": 1})


ORDERS = st.lists(st.permutations(range(4)), min_size=2, max_size=2)


def search(minutes: float, base: Path, start: int) -> None:
    """Run until the time is over or a failure is found."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + 60 * minutes
    number = start
    while time.monotonic() < end:

        @seed(number)
        @settings(
            max_examples=200,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(stack=STACKS, orders=ORDERS)
        def examine(stack: list[list[dict]], orders: list[list[int]]) -> None:
            note(hashlib.sha256(repr(stack).encode()).hexdigest())
            counts.update(examine_all(stack, orders, base))

        examine()
        number += 1
        print(time.strftime("%H:%M:%S"), f"seed {number}:", dict(counts), flush=True)


def examine_all(
    stack: list[list[dict]], orders: Sequence[Sequence[int]], base: Path | None = None
) -> Counter[str]:
    """Check all properties of one stack."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=base) as name:
        for check in ("orders", "refused", "store", "umoci"):
            place = Path(name) / check
            place.mkdir()
            if check == "orders":
                counts.update(check_orders(stack, place))
            elif check == "refused":
                check_refused(stack, place)
            elif check == "store":
                fitting = [[n for n in order if n < len(stack)] for order in orders]
                counts.update(trio.run(check_store, stack, fitting, place))
            else:
                counts.update(check_umoci(stack, place))
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    os.umask(0o22)
    search(arguments.minutes, arguments.base, arguments.seed)
