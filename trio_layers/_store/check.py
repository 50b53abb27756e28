"""The check of a store: all blobs, trees, layers and images, and the layout for other tools.

The check covers the rows that exist at its beginning. Other tasks and processes go on meanwhile.
An item that seems damaged is therefore held and checked again, and counts only if it still has a
row.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Callable
from typing import Final, Generic, TypeVar, final

import attrs
import trio

from .._catalog.rows import (
    StoredBlob,
    StoredLayer,
    StoredTree,
    find_blob,
    find_layer,
    find_layout,
    find_tree,
    find_whole_images,
)
from .._damage import forget_damage
from .._digest import ChainID, Digest, extend_chain
from .._errors import LayersError, StoreError, StoreReadOnly, text_of
from .._files import file_name, replace_file
from .._manifest import Descriptor, Manifest, decode_config, decode_manifest
from .._nursery import open_hidden_nursery
from .._tree.verify import verify
from .collect import Collector
from .content import Content
from .layout import OCI_LAYOUT, index_document
from .parts import StoreParts
from .trees import Trees, tree_upon

__all__ = ["CheckReport", "Checker", "Problem"]

T = TypeVar("T")

_CHUNK: Final = 1 << 20

# Number of rows to check in one job, for kinds with little work for each row.
_BATCH: Final = 500


@attrs.frozen
class Problem:
    """A damaged item of a store.

    Attributes:
        kind: The kind of item: ``blob``, ``tree``, ``layer`` or ``image``; ``index`` for
            ``index.json``, which can be made again; ``catalog`` for the database, which cannot.
        id: The digest, tree ID, chain ID or manifest's digest; empty for ``index`` and
            ``catalog``.
        text: The damage, in words.
    """

    kind: str
    id: str
    text: str

    def __str__(self) -> str:
        return f"{' '.join(filter(None, (self.kind, self.id)))}: {self.text}"


@attrs.frozen
class CheckReport:
    """The result of a check.

    Attributes:
        blobs: Number of checked blobs.
        trees: Number of checked trees.
        layers: Number of checked layers.
        images: Number of checked images.
        problems: The damaged items.
        repaired: Whether the damaged items were dropped.
    """

    blobs: int
    trees: int
    layers: int
    images: int
    problems: tuple[Problem, ...]
    repaired: bool = False


@attrs.frozen
class _LayerItem:
    layer: StoredLayer
    tree: StoredTree | None
    blob: StoredBlob | None


@attrs.frozen
class _ImageItem:
    manifest: Descriptor
    config: Digest
    chain_id: ChainID | None
    layers: frozenset[Digest]


@attrs.frozen
class _Kind(Generic[T]):
    """One kind of checked item.

    Attributes:
        name: See `Problem.kind`.
        ids: The IDs of all items.
        find: Finds an item in the catalog.
        look: Raises an error for a damaged item. Blocking.
        batch: Number of items to check in one job.
    """

    name: str
    ids: list[Digest]
    find: Callable[[sqlite3.Connection, Digest], T | None]
    look: Callable[[T], None]
    batch: int


@final
class Checker:
    """Checks all items of a store, and drops damaged ones.

    Args:
        parts: The parts of the store.
        content: The store's blobs.
        trees: The store's trees.
        collector: Removes the files of dropped items.
        write_index: A catalog job that brings ``index.json`` up to date.
    """

    def __init__(
        self,
        parts: StoreParts,
        content: Content,
        trees: Trees,
        collector: Collector,
        write_index: Callable[[sqlite3.Connection], None],
    ) -> None:
        self._root = parts.root
        self._catalog = parts.catalog
        self._leases = parts.leases
        self._content = content
        self._trees = trees
        self._collector = collector
        self._write_index = write_index
        self._threads = trio.CapacityLimiter(os.cpu_count() or 1)

    async def run(self, *, repair: bool) -> CheckReport:
        """See `DirectoryStore.check`."""
        broken = await self._catalog.read(_broken)
        if broken:
            # The rows of a broken catalog cannot be trusted.
            return CheckReport(0, 0, 0, 0, tuple(Problem("catalog", "", text) for text in broken))
        ids = await self._catalog.read(_all_ids)
        blobs = _Kind("blob", ids["blobs"], find_blob, self._look_at_blob, 1)
        trees = _Kind("tree", ids["trees"], find_tree, self._look_at_tree, 1)
        layers = _Kind("layer", ids["layers"], _find_layer_item, _look_at_layer, _BATCH)
        images = _Kind("image", ids["images"], _find_image_item, self._look_at_image, _BATCH)
        problems = [
            *await self._look_at_all(blobs),
            *await self._look_at_all(trees),
            *await self._look_at_all(layers),
            *await self._look_at_all(images),
        ]
        # In a transaction, because other processes replace the file in their transactions.
        run = self._catalog.read if self._leases.read_only else self._catalog.note
        text = await run(self._look_at_index)
        if text is not None:
            problems.append(Problem("index", "", text))
        if repair and problems:
            await self._repair(problems)
        return CheckReport(
            blobs=len(blobs.ids),
            trees=len(trees.ids),
            layers=len(layers.ids),
            images=len(images.ids),
            problems=tuple(problems),
            repaired=repair and bool(problems),
        )

    async def _look_at_all(self, kind: _Kind[T]) -> list[Problem]:
        problems: list[Problem] = []
        batches = iter(
            [kind.ids[at : at + kind.batch] for at in range(0, len(kind.ids), kind.batch)]
        )

        async def work() -> None:
            for batch in batches:
                for id in await self._suspects(kind, batch):
                    problems.extend(await self._look_again(kind, id))

        async with open_hidden_nursery() as nursery:
            for _ in range(int(self._threads.total_tokens)):
                nursery.start_soon(work)
        return sorted(problems, key=lambda problem: problem.id)

    async def _suspects(self, kind: _Kind[T], ids: list[Digest]) -> list[Digest]:
        def find(connection: sqlite3.Connection) -> list[tuple[Digest, T]]:
            found = ((id, kind.find(connection, id)) for id in ids)
            return [(id, item) for id, item in found if item is not None]

        def look(items: list[tuple[Digest, T]]) -> list[Digest]:
            return [id for id, item in items if _failure(kind, item) is not None]

        items = await self._catalog.read(find)
        return await trio.to_thread.run_sync(look, items, limiter=self._threads)

    async def _look_again(self, kind: _Kind[T], id: Digest) -> list[Problem]:
        """Check a suspect again while it is held, as it may have been removed or replaced."""
        async with self._leases.holding(id):
            item = await self._catalog.read(kind.find, id)
            if item is None:
                return []
            text = await trio.to_thread.run_sync(_failure, kind, item, limiter=self._threads)
            return [] if text is None else [Problem(kind.name, id, text)]

    # Each method raises an error for a damaged item. Blocking, for worker threads.

    def _look_at_blob(self, blob: StoredBlob) -> None:
        path = self._content.path(blob.digest)
        hashed, size = hashlib.sha256(), 0
        try:
            with open(path, "rb", buffering=0) as file:
                while data := file.read(_CHUNK):
                    trio.from_thread.check_cancelled()
                    hashed.update(data)
                    size += len(data)
        except OSError as error:
            raise StoreError(f"it cannot be read ({error.strerror})") from error
        if size != blob.size:
            raise StoreError(f"it is {size} bytes long (expected {blob.size})")
        if f"sha256:{hashed.hexdigest()}" != blob.digest:
            raise StoreError("its content has changed")
        forget_damage(path)

    def _look_at_tree(self, tree: StoredTree) -> None:
        path = self._trees.path(tree.id)
        summary = verify(path, check_cancelled=trio.from_thread.check_cancelled)
        listed = (summary.diff_id, summary.size, summary.entries, tuple(summary.assumed))
        if listed != (tree.diff_id, tree.size, tree.entries, tree.assumed):
            raise StoreError("its list of entries differs from its row in the catalog")
        forget_damage(path)

    def _look_at_image(self, image: _ImageItem) -> None:
        document = self._read(image.manifest.digest)
        manifest = decode_manifest(document, image.manifest.media_type)
        if not isinstance(manifest, Manifest):
            raise StoreError("its manifest is an index")
        if manifest.config.digest != image.config:
            raise StoreError("its row in the catalog and its manifest name different configs")
        if {layer.digest for layer in manifest.layers} != image.layers:
            raise StoreError("its rows in the catalog and its manifest name different layers")
        chain: ChainID | None = None
        for diff_id in decode_config(self._read(image.config)).diff_ids:
            chain = extend_chain(chain, diff_id)
        if image.chain_id not in (None, chain):
            raise StoreError("its row in the catalog and its config name different layers")

    def _read(self, digest: Digest) -> bytes:
        try:
            return self._content.path(digest).read_bytes()
        except OSError as error:
            raise StoreError(f"{digest} cannot be read ({error.strerror})") from error

    def _look_at_index(self, connection: sqlite3.Connection) -> str | None:
        if find_layout(connection) is None:
            with contextlib.suppress(StoreReadOnly):
                self._write_index(connection)  # it is due anyway
        expected = {
            "index.json": index_document(find_whole_images(connection)),
            "oci-layout": OCI_LAYOUT,
        }
        for name, document in expected.items():
            try:
                if (self._root / name).read_bytes() != document:
                    return f"{name} is out of date: other tools see other images"
            except FileNotFoundError:
                return f"{name} is missing: other tools see no images"
        return None

    # Repairs.

    async def _repair(self, problems: list[Problem]) -> None:
        await self._catalog.write(self._drop, problems)
        self._leases.forget()
        for kind, take in (
            ("tree", self._collector.take_trees),
            ("blob", self._collector.take_blobs),
        ):
            names = [file_name(Digest(each.id)) for each in problems if each.kind == kind]
            await self._collector.delete(await take(names))

    def _drop(self, connection: sqlite3.Connection, problems: list[Problem]) -> None:
        for kind, table in _BAD.items():
            connection.execute(f"CREATE TEMP TABLE {table} (id TEXT PRIMARY KEY) WITHOUT ROWID")
            connection.executemany(
                f"INSERT INTO {table} VALUES (?)",
                [(problem.id,) for problem in problems if problem.kind == kind],
            )
        for statement in _DROP.split(";"):
            connection.execute(statement)
        for table in (*_BAD.values(), "lost_layers"):
            connection.execute(f"DROP TABLE temp.{table}")
        replace_file(self._root / "oci-layout", OCI_LAYOUT, temporary=self._collector.new_name())
        self._write_index(connection)


_BAD: Final = {
    "blob": "bad_blobs",
    "tree": "bad_trees",
    "layer": "bad_layers",
    "image": "bad_images",
}

# An image whose layers are lost stays, as an image that was never unpacked, so that a pull need
# not download its other parts. An image without its manifest or config is dropped.
_DROP: Final = """
CREATE TEMP TABLE lost_layers (chain_id TEXT PRIMARY KEY) WITHOUT ROWID;
INSERT INTO lost_layers
    WITH RECURSIVE lost (chain_id) AS (
        SELECT chain_id FROM layers
            WHERE chain_id IN bad_layers OR tree IN bad_trees OR blob IN bad_blobs
        UNION SELECT layers.chain_id FROM layers JOIN lost ON layers.parent = lost.chain_id
    )
    SELECT chain_id FROM lost;
INSERT OR IGNORE INTO bad_images
    SELECT manifest FROM images WHERE manifest IN bad_blobs OR config IN bad_blobs;
DELETE FROM image_references WHERE manifest IN bad_images;
DELETE FROM images WHERE manifest IN bad_images;
UPDATE image_references SET index_digest = NULL, index_media_type = NULL
    WHERE index_digest IN bad_blobs;
UPDATE images SET chain_id = NULL WHERE chain_id IN lost_layers;
DELETE FROM layers WHERE chain_id IN lost_layers;
DELETE FROM trees WHERE id IN bad_trees;
DELETE FROM blobs WHERE digest IN bad_blobs
"""


def _failure(kind: _Kind[T], item: T) -> str | None:
    """Return the damage of an item, in words; ``None`` if there is none."""
    trio.from_thread.check_cancelled()
    try:
        kind.look(item)
    except LayersError as error:
        return text_of(error)
    return None


def _look_at_layer(item: _LayerItem) -> None:
    layer, tree, blob = item.layer, item.tree, item.blob
    if layer.chain_id != extend_chain(layer.parent, layer.diff_id):
        raise StoreError("its chain ID does not follow from its diff ID and its parent")
    if tree is None or tree.diff_id != layer.diff_id:
        raise StoreError(f"its tree {layer.tree} belongs to another layer")
    if tree.id not in (layer.diff_id, tree_upon(layer.parent, layer.diff_id)):
        raise StoreError(f"its tree {layer.tree} fits another parent only")
    if blob is None or blob.diff_id not in (None, layer.diff_id):
        raise StoreError(f"its blob {layer.blob} belongs to another layer")


# Jobs for the catalog.


def _broken(connection: sqlite3.Connection) -> list[str]:
    """Return the errors that SQLite finds in its file, in words."""
    found: list[str] = []
    try:
        found += [text for (text,) in connection.execute("PRAGMA integrity_check") if text != "ok"]
        for table, *_ in connection.execute("PRAGMA foreign_key_check"):
            found.append(f"a row of {table} refers to a missing row")
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        found.append(str(error))
    return found


def _all_ids(connection: sqlite3.Connection) -> dict[str, list[Digest]]:
    keys = {"blobs": "digest", "trees": "id", "layers": "chain_id", "images": "manifest"}
    return {
        table: [Digest(id) for (id,) in connection.execute(f"SELECT {key} FROM {table}")]
        for table, key in keys.items()
    }


def _find_layer_item(connection: sqlite3.Connection, id: Digest) -> _LayerItem | None:
    layer = find_layer(connection, ChainID(id))
    if layer is None:
        return None
    return _LayerItem(layer, find_tree(connection, layer.tree), find_blob(connection, layer.blob))


def _find_image_item(connection: sqlite3.Connection, id: Digest) -> _ImageItem | None:
    row = connection.execute(
        "SELECT i.media_type, b.digest, b.size, i.config, i.chain_id "
        "FROM images i JOIN blobs b ON b.digest = i.manifest WHERE i.manifest = ?",
        (id,),
    ).fetchone()
    if row is None:
        return None
    layers = connection.execute("SELECT digest FROM image_blobs WHERE manifest = ?", (id,))
    return _ImageItem(
        Descriptor(*row[:3]), row[3], row[4], frozenset(digest for (digest,) in layers)
    )
