"""The checker finds each kind of damage."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trio
from crashes.checker import look_at
from crashes.harness import open_world, scratch_directory


@pytest.fixture(scope="module")
def whole() -> Iterator[Path]:
    async def pull(path: Path) -> None:
        async with open_world() as world:
            done = await world.run(path, ("first:1", "needy:1"))
            assert done.failures == []

    with scratch_directory() as place:
        trio.run(pull, place / "store")
        yield place / "store"


@pytest.fixture
def store(whole: Path) -> Iterator[Path]:
    copy = whole.with_name("copy")
    subprocess.run(["cp", "--archive", whole, copy], check=True)
    yield copy
    shutil.rmtree(copy)


def test_a_store_that_is_whole(store: Path) -> None:
    found = look_at(store, settled=True)
    assert (found.wrong, found.unclaimed) == ([], [])
    assert {table: len(keys) for table, keys in found.keys.items()} == {
        # Layers, manifests, configs, and the index of one of the two.
        "blobs": 5 + 2 + 2 + 1,
        # One layer is used above two different layers.
        "trees": 6,
        "layers": 5,
        "images": 2,
        "references": 2,
    }


def run(statement: str) -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        with closing(sqlite3.connect(store / "catalog.sqlite")) as connection:
            connection.execute(statement)
            connection.commit()

    return damage


def find(store: Path, name: str) -> Path:
    return next(path for path in sorted(store.glob(f"trees/sha256/*/fs/{name}")))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def largest(store: Path) -> Path:
    return max(store.glob("blobs/sha256/*"), key=lambda path: path.stat().st_size)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a blob with another byte": (lambda store: flip(largest(store)), "blob .* is sha256"),
    "a blob that is shorter": (lambda store: os.truncate(largest(store), 10), "blob .* is sha256"),
    "no blob": (lambda store: largest(store).unlink(), "has no file"),
    "a file with another byte": (lambda store: flip(find(store, "usr/tool")), "has other bytes"),
    "a file that is shorter": (
        lambda store: os.truncate(find(store, "usr/tool"), 5),
        "has 5 of 20000 bytes",
    ),
    "no file": (lambda store: find(store, "usr/tool").unlink(), "No such file"),
    "another file": (
        lambda store: (find(store, "usr") / "new").write_bytes(b""),
        "is not listed",
    ),
    "another mode": (lambda store: find(store, "usr/tool").chmod(0o755), "has mode 755, not 4755"),
    "another owner": (lambda store: os.chown(find(store, "srv"), 0, 0), "belongs to"),
    "a list that was cut off": (
        lambda store: os.truncate(find(store, "usr/tool").parents[2] / "entries", 200),
        "entries of tree",
    ),
    "no tree": (lambda store: shutil.rmtree(find(store, "usr/tool").parents[2]), "entries of tree"),
    "another index": (
        lambda store: (store / "index.json").write_bytes(b'{"manifests": []}'),
        "index.json has",
    ),
    "something left": (lambda store: (store / "ingest" / "x").touch(), "left in ingest"),
    "a row less": (run("DELETE FROM trees"), "foreign_key_check"),
    "another parent": (run("UPDATE layers SET parent = NULL"), "is called"),
    "another size": (run("UPDATE blobs SET size = size + 1"), "blob .* is sha256"),
    "a lease of nobody": (
        run("INSERT INTO leases (holder, digest) VALUES ('a', 'b')"),
        "leases of nobody",
    ),
    "an image without its layers": (
        run("UPDATE images SET chain_id = (SELECT min(chain_id) FROM layers)"),
        "has the layers of another",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage(store: Path, damage: str) -> None:
    do, seen = DAMAGES[damage]
    do(store)
    found = look_at(store, settled=True)
    assert any(re.search(seen, each) for each in found.wrong), found.wrong


def test_files_without_rows_are_named(store: Path) -> None:
    (store / "blobs" / "sha256" / ("0" * 64)).write_bytes(b"")
    (store / "trees" / "sha256" / ("1" * 64)).mkdir()
    found = look_at(store)
    assert found.wrong == []
    assert found.unclaimed == [f"blobs/sha256:{'0' * 64}", f"trees/sha256:{'1' * 64}"]
