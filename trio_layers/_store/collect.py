"""Garbage collection: unneeded rows and files are deleted while pulls go on.

Rows go first, in one durable transaction: a power cut must not bring back the row of a deleted
file. Then files at visible places without a row are moved away, a few at a time, each time in a
transaction, so that no other process can give them a row meanwhile. The leftovers of crashes go in
the same way, and files that another process has brought back meanwhile stay.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias, final

import attrs
import trio

from .._damage import forget_damage
from .._digest import Digest
from .._disk_errors import disk_errors
from .._files import disk_usage, file_name, remove_directory, try_lock, unlock
from .._rootfs.mount_table import find_used_trees
from .parts import StoreParts

__all__ = ["Collected", "Collector", "MountedTree"]

_Used: TypeAlias = Mapping[str, tuple[str, ...]]
"""Names of mounted trees, with their mount points; see `find_used_trees`."""

_NAME: Final = re.compile(r"[0-9a-f]{64}")
_PARTIAL: Final = re.compile(r"([0-9a-f]{64})\.partial")
_LOCK: Final = re.compile(r"([0-9a-f]{64})\.lock")

# Number of files to look up and move in one transaction, which takes some milliseconds.
_BATCH: Final = 256


@attrs.frozen
class MountedTree:
    """An unreferenced tree that stays because it is mounted.

    Attributes:
        id: The tree's ID.
        targets: The mount points of the tree in all mount namespaces; empty if none is visible.
    """

    id: Digest
    targets: tuple[str, ...]


@attrs.frozen
class Collected:
    """The result of a garbage collection, or of its dry run.

    Attributes:
        images: Number of deleted images, which had no reference.
        layers: Number of deleted layers.
        trees: Number of deleted unpacked layers, leftovers of crashes included.
        blobs: Number of deleted blobs, leftovers of crashes and downloads included.
        size: The freed disk space in bytes, without files that are also linked elsewhere.
        mounted: Trees that stay only because they are mounted. The first collection after their
            unmounting removes them.
    """

    images: int = 0
    layers: int = 0
    trees: int = 0
    blobs: int = 0
    size: int = 0
    mounted: tuple[MountedTree, ...] = ()


@attrs.frozen
class _Dropped:
    images: int
    layers: int
    mounted: tuple[MountedTree, ...]


@attrs.frozen
class _Garbage:
    rows: _Dropped
    trees: list[Path]
    blobs: list[Path]

    def sized(self, size: int) -> Collected:
        rows = self.rows
        return Collected(
            rows.images, rows.layers, len(self.trees), len(self.blobs), size, rows.mounted
        )


@final
class Collector:
    """Finds and removes unneeded rows and files."""

    def __init__(self, parts: StoreParts) -> None:
        self._root = parts.root
        self._blobs = parts.root / "blobs" / "sha256"
        self._trees = parts.root / "trees" / "sha256"
        self._ingest = parts.root / "ingest"
        self._catalog = parts.catalog
        self._scratch = parts.scratch

    async def find(self) -> Collected:
        """Find the garbage, and remove nothing."""
        await self._scratch.sweep_after_the_dead(self._catalog)
        used = await trio.to_thread.run_sync(find_used_trees, self._root)
        garbage = await self._catalog.read(self._look, used)
        paths = garbage.blobs + garbage.trees
        return garbage.sized(await trio.to_thread.run_sync(self._measure, paths))

    async def remove(self) -> Collected:
        """Remove the garbage."""
        await self._scratch.sweep_after_the_dead(self._catalog)
        used = await trio.to_thread.run_sync(find_used_trees, self._root)
        dropped = await self._catalog.write(self._drop_rows, used)
        names = await trio.to_thread.run_sync(_names_in, self._trees)
        trees = await self.take_trees([name for name in names if name not in used])
        blobs = await self.take_blobs(await trio.to_thread.run_sync(_names_in, self._blobs))
        held = await self._catalog.read(_held)
        blobs += await trio.to_thread.run_sync(self._take_partials, held)
        garbage = _Garbage(dropped, trees, blobs)
        return garbage.sized(await self.delete(trees + blobs))

    async def take_trees(self, names: Sequence[str]) -> list[Path]:
        """Move away those of these trees that have no row; return their new paths."""
        return await self._take_all(self._trees, "trees", "id", names)

    async def take_blobs(self, names: Sequence[str]) -> list[Path]:
        """Move away blobs without a row like `take_trees`, except blobs that are arriving.

        The ingest of an arriving blob may go on from the file.
        """
        return await self._take_all(self._blobs, "blobs", "digest", names)

    async def delete(self, paths: Sequence[Path]) -> int:
        """Delete moved files and trees; return their disk space in bytes."""
        return await trio.to_thread.run_sync(self._delete, paths)

    def new_name(self) -> Path:
        """Return an unused path in ``ingest/``."""
        return self._scratch.new("garbage")

    # Jobs for the catalog.

    def _look(self, connection: sqlite3.Connection, used: _Used) -> _Garbage:
        with _undone(connection):
            busy = set(self._busy())
            dropped = _drop(connection, busy, used)
            names = _without_row(connection, "trees", "id", _names_in(self._trees))
            trees = [self._trees / name for name in names if name not in used]
            names = _without_row(connection, "blobs", "digest", _names_in(self._blobs))
            blobs = [self._blobs / name for name in names if f"sha256:{name}" not in busy]
            partials = self._partials(_held(connection) | busy)
            return _Garbage(dropped, trees, [*blobs, *partials])

    def _drop_rows(self, connection: sqlite3.Connection, used: _Used) -> _Dropped:
        return _drop(connection, self._busy(), used)

    def _take(
        self,
        connection: sqlite3.Connection,
        place: Path,
        table: str,
        key: str,
        names: Sequence[str],
    ) -> list[Path]:
        """Move away the files without a row (a catalog job in a transaction)."""
        taken: list[Path] = []
        for name in _without_row(connection, table, key, names):
            # An ingest may go on from a file without a row.
            if self._is_busy(self._ingest / f"{name}.lock"):
                continue
            path = self._scratch.new("garbage")
            with contextlib.suppress(FileNotFoundError):
                os.rename(place / name, path)
                forget_damage(place / name)  # a new blob or tree may get the same path
                taken.append(path)
        return taken

    async def _take_all(
        self, place: Path, table: str, key: str, names: Sequence[str]
    ) -> list[Path]:
        rows = await self._catalog.read(_keys, table, key)
        names = [name for name in names if f"sha256:{name}" not in rows]
        taken: list[Path] = []
        for start in range(0, len(names), _BATCH):
            batch = names[start : start + _BATCH]
            taken += await self._catalog.note(self._take, place, table, key, batch)
        return taken

    # Blocking, for worker threads.

    def _busy(self) -> Iterator[Digest]:
        """Yield the blobs that any process receives or unpacks."""
        for name in os.listdir(self._ingest):
            match = _LOCK.fullmatch(name)
            if match and self._is_busy(self._ingest / name):
                yield Digest(f"sha256:{match[1]}")

    def _is_busy(self, lock: Path) -> bool:
        if not lock.exists():
            return False
        descriptor = try_lock(lock)
        if descriptor is None:
            return True
        unlock(lock, descriptor)
        return False

    def _partials(self, held: set[Digest]) -> Iterator[Path]:
        for name in os.listdir(self._ingest):
            match = _PARTIAL.fullmatch(name)
            if match and f"sha256:{match[1]}" not in held:
                yield self._ingest / name

    def _take_partials(self, held: set[Digest]) -> list[Path]:
        taken: list[Path] = []
        with disk_errors(self._ingest):
            for path in self._partials(held):
                lock = path.with_suffix(".lock")
                descriptor = try_lock(lock)
                if descriptor is None:
                    continue
                try:
                    new = self._scratch.new("garbage")
                    os.rename(path, new)
                    taken.append(new)
                except FileNotFoundError:
                    pass  # it has become a visible blob
                finally:
                    unlock(lock, descriptor)
        return taken

    def _measure(self, paths: Iterable[Path]) -> int:
        with disk_errors(self._root):
            return sum(disk_usage(path, trio.from_thread.check_cancelled) for path in paths)

    def _delete(self, paths: Iterable[Path]) -> int:
        check = trio.from_thread.check_cancelled
        size = 0
        with disk_errors(self._root):
            for path in paths:
                size += disk_usage(path, check)
                if path.is_dir() and not path.is_symlink():
                    aside = partial(self._scratch.new, "garbage")
                    remove_directory(path, aside=aside, check_cancelled=check)
                else:
                    path.unlink()
        return size


@contextlib.contextmanager
def _undone(connection: sqlite3.Connection) -> Iterator[None]:
    """Run a transaction and roll it back."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _drop(connection: sqlite3.Connection, busy: Iterable[Digest], used: _Used) -> _Dropped:
    """Delete unreferenced rows from the catalog.

    Return the numbers of deleted images and layers, and the trees that stay because they are
    mounted.

    The needed rows are computed with sets, because SQL takes five times as long, and all other
    writers wait meanwhile.
    """
    select = connection.execute
    held: set[str] = {*_held(connection), *busy}
    trees, blobs, layers = set(held), set(held), set[str]()

    references = select("SELECT manifest, index_digest FROM image_references").fetchall()
    images = {
        manifest: (config, chain)
        for manifest, config, chain in select("SELECT manifest, config, chain_id FROM images")
    }
    kept = {manifest for manifest, _ in references} | (held & images.keys())
    blobs.update(index for _, index in references if index is not None)
    for manifest, blob in select("SELECT manifest, digest FROM image_blobs"):
        if manifest in kept:
            blobs.add(blob)

    # An image needs its layers, a layer needs its parents, and a held blob needs its tree.
    stacked = {
        chain: (parent, tree, blob)
        for chain, parent, tree, blob in select("SELECT chain_id, parent, tree, blob FROM layers")
    }
    tops: set[str | None] = {*(held & stacked.keys())}
    for manifest in kept:
        config, top = images[manifest]
        blobs.update((manifest, config))
        tops.add(top)
    for chain in tops:
        while chain is not None and chain not in layers:
            layers.add(chain)
            chain, tree, blob = stacked[chain]
            trees.add(tree)
            blobs.add(blob)
    for blob, diff_id in select("SELECT digest, diff_id FROM blobs WHERE diff_id IS NOT NULL"):
        if blob in held:
            trees.add(diff_id)

    mounted = tuple(
        MountedTree(Digest(id), used[file_name(Digest(id))])
        for id in sorted(_keys(connection, "trees", "id") - trees)
        if file_name(Digest(id)) in used
    )
    trees.update(tree.id for tree in mounted)

    # A parent layer may be deleted before its children, which are deleted, too.
    connection.execute("PRAGMA defer_foreign_keys = ON")
    dropped = _Dropped(
        _drop_others(connection, "images", "manifest", kept),
        _drop_others(connection, "layers", "chain_id", layers),
        mounted,
    )
    _drop_others(connection, "trees", "id", trees)
    _drop_others(connection, "blobs", "digest", blobs)
    return dropped


def _drop_others(connection: sqlite3.Connection, table: str, key: str, kept: set[str]) -> int:
    others = _keys(connection, table, key) - kept
    connection.executemany(f"DELETE FROM {table} WHERE {key} = ?", [(other,) for other in others])
    return len(others)


def _held(connection: sqlite3.Connection) -> set[Digest]:
    return {Digest(digest) for (digest,) in connection.execute("SELECT digest FROM leases")}


def _names_in(place: Path) -> list[str]:
    with disk_errors(place):
        return [name for name in os.listdir(place) if _NAME.fullmatch(name)]


def _without_row(
    connection: sqlite3.Connection, table: str, key: str, names: Iterable[str]
) -> Iterator[str]:
    query = f"SELECT 1 FROM {table} WHERE {key} = ?"
    for name in names:
        if connection.execute(query, (f"sha256:{name}",)).fetchone() is None:
            yield name


def _keys(connection: sqlite3.Connection, table: str, key: str) -> set[str]:
    return {value for (value,) in connection.execute(f"SELECT {key} FROM {table}")}
