"""Compares a store's catalog with its files on the disk.

It implements the documented format itself, and imports nothing from the package.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path


def problems(root: Path, *, closed: bool = True) -> Iterator[str]:
    """Return the differences. With ``closed``, no process has the store open or writes to it."""
    connection = sqlite3.connect(f"file:{root}/catalog.sqlite?mode=ro", uri=True)
    try:
        yield from _rows_and_files(root, connection)
        yield from _references(root, connection)
    finally:
        connection.close()
    if closed:
        making = {name for name in os.listdir(root / "ingest") if not name.endswith(".partial")}
        yield from (f"left in ingest/: {name}" for name in sorted(making))
        yield from (f"left in leases/: {name}" for name in sorted(os.listdir(root / "leases")))


def _rows_and_files(root: Path, connection: sqlite3.Connection) -> Iterator[str]:
    blobs = dict(connection.execute("SELECT digest, size FROM blobs"))
    files = {f"sha256:{path.name}": path for path in (root / "blobs" / "sha256").iterdir()}
    for digest in sorted(blobs.keys() ^ files.keys()):
        yield f"blob {digest} has {'no file' if digest in blobs else 'no row'}"
    for digest in sorted(blobs.keys() & files.keys()):
        data = files[digest].read_bytes()
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest or len(data) != blobs[digest]:
            yield f"blob {digest} is damaged"
    trees = {name for (name,) in connection.execute("SELECT id FROM trees")}
    found = {f"sha256:{name}" for name in os.listdir(root / "trees" / "sha256")}
    for tree in sorted(trees ^ found):
        yield f"tree {tree} has {'no directory' if tree in trees else 'no row'}"
    for tree in sorted(trees & found):
        path = root / "trees" / "sha256" / tree.removeprefix("sha256:")
        if sorted(os.listdir(path)) != ["entries", "fs"] or not any((path / "fs").iterdir()):
            yield f"tree {tree} is not whole"


def _references(root: Path, connection: sqlite3.Connection) -> Iterator[str]:
    for table, row, other, *_ in connection.execute("PRAGMA foreign_key_check"):
        yield f"row {row} of {table} refers to what is not in {other}"
    for diff_id, chain_id, parent in connection.execute(
        "SELECT diff_id, chain_id, parent FROM layers"
    ):
        expected = diff_id
        if parent is not None:
            digest = hashlib.sha256(f"{parent} {diff_id}".encode()).hexdigest()
            expected = f"sha256:{digest}"
        if chain_id != expected:
            yield f"layer {chain_id} should be {expected}"
    query = "SELECT manifest FROM image_references"
    named = {manifest for (manifest,) in connection.execute(query)}
    index = json.loads((root / "index.json").read_bytes())
    listed = {manifest["digest"] for manifest in index["manifests"]}
    for manifest in sorted(named ^ listed):
        where = "index.json" if manifest in named else "the catalog"
        yield f"image {manifest} is not in {where}"
