"""The catalog's rows as values, and the queries on them.

Queries are plain functions over the connection; the jobs of a `Catalog` are composed of them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias

import attrs

from .._digest import ChainID, DiffID, Digest
from .._manifest import Descriptor

__all__ = [
    "IndexRow",
    "StoredBlob",
    "StoredImage",
    "StoredLayer",
    "StoredTree",
    "add_blob",
    "add_image_blobs",
    "add_layer",
    "add_leases",
    "add_tree",
    "drop_image",
    "drop_leases",
    "drop_references",
    "find_blob",
    "find_holders",
    "find_image",
    "find_images",
    "find_index_rows",
    "find_layer",
    "find_layout",
    "find_tree",
    "find_whole_images",
    "put_image",
    "set_diff_id",
    "set_layout",
]


@attrs.frozen
class StoredBlob:
    """A blob in the store.

    Attributes:
        digest: The digest of its bytes.
        size: Its length in bytes.
        diff_id: The digest of the tar inside; ``None`` if the blob has not been unpacked.
    """

    digest: Digest
    size: int
    diff_id: DiffID | None


@attrs.frozen
class StoredTree:
    """The tree of an unpacked layer.

    Attributes:
        id: The layer's diff ID; for a tree that fits one parent only, the result of `tree_upon`.
        diff_id: The digest of the layer's tar.
        size: The length of the tar in bytes.
        entries: The number of entries in the tar.
        assumed: Assumptions about the layers below; see `Unpacked.assumed`.
    """

    id: Digest
    diff_id: DiffID
    size: int
    entries: int
    assumed: tuple[bytes, ...]


@attrs.frozen
class StoredLayer:
    """A layer on top of its parent layer.

    Attributes:
        chain_id: Identifies the layer together with all layers below it.
        diff_id: The digest of its tar.
        parent: The chain ID of the parent layer; ``None`` for the bottom layer.
        tree: The ID of its tree.
        blob: The digest of a blob that unpacks to it.
    """

    chain_id: ChainID
    diff_id: DiffID
    parent: ChainID | None
    tree: Digest
    blob: Digest


@attrs.frozen
class StoredImage:
    """An image and the reference that points to it.

    Attributes:
        reference: The image's full name.
        platform: The platform it was stored for; ``None`` if none was given.
        manifest: The image's manifest, which is in the store.
        config: The image's config, which is in the store.
        chain_id: The top layer; ``None`` if the image has no layers, or they are not unpacked.
        index: The index that listed the manifest, if the store has it.
    """

    reference: str
    platform: str | None
    manifest: Descriptor
    config: Descriptor
    chain_id: ChainID | None
    index: Descriptor | None = None


IndexRow: TypeAlias = tuple[str, str | None, str, Digest, int, Digest | None]
"""An entry of ``index.json``.

The fields are reference, platform, the manifest's media type, digest and size, and the digest of
the index that listed the manifest.
"""


# The queries: plain functions over the connection, to be put together in jobs.


def find_blob(connection: sqlite3.Connection, digest: Digest) -> StoredBlob | None:
    query = "SELECT digest, size, diff_id FROM blobs WHERE digest = ?"
    row = connection.execute(query, (digest,)).fetchone()
    return None if row is None else StoredBlob(*row)


def add_blob(connection: sqlite3.Connection, digest: Digest, size: int) -> None:
    connection.execute("INSERT INTO blobs (digest, size) VALUES (?, ?)", (digest, size))


def set_diff_id(connection: sqlite3.Connection, digest: Digest, diff_id: DiffID) -> None:
    connection.execute("UPDATE blobs SET diff_id = ? WHERE digest = ?", (diff_id, digest))


def find_tree(connection: sqlite3.Connection, id: Digest) -> StoredTree | None:
    query = "SELECT id, diff_id, size, entries, assumed FROM trees WHERE id = ?"
    row = connection.execute(query, (id,)).fetchone()
    if row is None:
        return None
    id, diff_id, size, entries, assumed = row
    return StoredTree(id, diff_id, size, entries, tuple(assumed.split(b"\0")[:-1]))


def add_tree(connection: sqlite3.Connection, tree: StoredTree) -> None:
    assumed = b"".join(path + b"\0" for path in tree.assumed)
    connection.execute(
        "INSERT INTO trees (id, diff_id, size, entries, assumed) VALUES (?, ?, ?, ?, ?)",
        (tree.id, tree.diff_id, tree.size, tree.entries, assumed),
    )


def find_layer(connection: sqlite3.Connection, chain_id: ChainID) -> StoredLayer | None:
    query = "SELECT chain_id, diff_id, parent, tree, blob FROM layers WHERE chain_id = ?"
    row = connection.execute(query, (chain_id,)).fetchone()
    return None if row is None else StoredLayer(*row)


def add_layer(connection: sqlite3.Connection, layer: StoredLayer) -> None:
    """Add a layer, unless the catalog has it already."""
    connection.execute(
        "INSERT INTO layers (chain_id, diff_id, parent, tree, blob) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT DO NOTHING",
        attrs.astuple(layer),
    )


def put_image(connection: sqlite3.Connection, image: StoredImage, layers: Iterable[Digest]) -> None:
    """Point a reference to an image with these layer blobs.

    The image that the reference pointed to before, on the same platform, loses the reference.
    """
    connection.execute(
        "INSERT INTO images (manifest, media_type, config, config_media_type, chain_id) "
        "VALUES (?, ?, ?, ?, ?) ON CONFLICT (manifest) DO UPDATE "
        "SET chain_id = coalesce(excluded.chain_id, chain_id)",
        (
            image.manifest.digest,
            image.manifest.media_type,
            image.config.digest,
            image.config.media_type,
            image.chain_id,
        ),
    )
    add_image_blobs(connection, image.manifest.digest, layers)
    # Replaced, not updated: the newest of a reference's platforms has the highest serial.
    connection.execute(
        "INSERT OR REPLACE INTO image_references "
        "(reference, platform, manifest, index_digest, index_media_type) VALUES (?, ?, ?, ?, ?)",
        (
            image.reference,
            image.platform or "",
            image.manifest.digest,
            image.index and image.index.digest,
            image.index and image.index.media_type,
        ),
    )


def add_image_blobs(
    connection: sqlite3.Connection, manifest: Digest, blobs: Iterable[Digest]
) -> None:
    connection.executemany(
        "INSERT OR IGNORE INTO image_blobs (manifest, digest) VALUES (?, ?)",
        [(manifest, blob) for blob in blobs],
    )


_IMAGES: Final = """
SELECT r.reference, r.platform, i.chain_id,
    i.media_type, m.digest, m.size,
    i.config_media_type, c.digest, c.size,
    r.index_media_type, x.digest, x.size
FROM image_references r
    JOIN images i ON i.manifest = r.manifest
    JOIN blobs m ON m.digest = i.manifest
    JOIN blobs c ON c.digest = i.config
    LEFT JOIN blobs x ON x.digest = r.index_digest
"""


def find_image(
    connection: sqlite3.Connection, reference: str, platform: str | None
) -> StoredImage | None:
    """Find the image of a reference on a platform; ``None``: on the platform stored last."""
    rows = connection.execute(
        _IMAGES + "WHERE r.reference = :reference AND (:platform IS NULL OR platform = :platform) "
        "ORDER BY r.serial DESC LIMIT 1",
        {"reference": reference, "platform": platform},
    )
    return next(_images(rows), None)


def find_images(connection: sqlite3.Connection, reference: str | None = None) -> list[StoredImage]:
    """Find all images, or those of one reference, by reference and then newest first."""
    where, parameters = ("", ()) if reference is None else ("WHERE r.reference = ? ", (reference,))
    rows = connection.execute(_IMAGES + where + "ORDER BY r.reference, r.serial DESC", parameters)
    return list(_images(rows))


def _images(rows: sqlite3.Cursor) -> Iterator[StoredImage]:
    for reference, platform, chain_id, *rest in rows:
        yield StoredImage(
            reference,
            platform or None,
            manifest=Descriptor(*rest[0:3]),
            config=Descriptor(*rest[3:6]),
            chain_id=chain_id,
            index=None if rest[7] is None else Descriptor(*rest[6:9]),
        )


def find_whole_images(connection: sqlite3.Connection) -> list[StoredImage]:
    """Find the images whose blobs are all in the store.

    A blob can be missing although its layer is there: if the store had the layer already, from a
    blob of another compression, the image's own blob was not downloaded.
    """
    where = "WHERE r.manifest NOT IN (SELECT manifest FROM lacking) "
    rows = connection.execute(_IMAGES + where + "ORDER BY r.reference, r.serial DESC")
    return list(_images(rows))


def find_index_rows(connection: sqlite3.Connection) -> Iterator[IndexRow]:
    """Find images like `find_whole_images`, but return plain rows.

    Each write reads all rows, of which there may be thousands.
    """
    return connection.execute(
        "SELECT r.reference, r.platform, i.media_type, m.digest, m.size, x.digest "
        "FROM image_references r "
        "JOIN images i ON i.manifest = r.manifest JOIN blobs m ON m.digest = r.manifest "
        "LEFT JOIN blobs x ON x.digest = r.index_digest "
        "WHERE r.manifest NOT IN (SELECT manifest FROM lacking) "
        "ORDER BY r.reference, r.serial DESC"
    )


def find_layout(connection: sqlite3.Connection) -> Digest | None:
    """Return the digest of ``index.json`` at its last write; ``None`` if it must be rewritten."""
    row = connection.execute("SELECT index_digest FROM layout").fetchone()
    return None if row is None else row[0]


def set_layout(connection: sqlite3.Connection, index_digest: Digest) -> None:
    connection.execute("DELETE FROM layout")
    connection.execute("INSERT INTO layout VALUES (?)", (index_digest,))


def drop_references(connection: sqlite3.Connection, reference: str, platform: str | None) -> int:
    """Delete a reference on one platform, or on all (``None``), and return the number deleted."""
    return connection.execute(
        "DELETE FROM image_references "
        "WHERE reference = :reference AND (:platform IS NULL OR platform = :platform)",
        {"reference": reference, "platform": platform},
    ).rowcount


def drop_image(connection: sqlite3.Connection, manifest: Digest) -> bool:
    """Delete an image with all its references; return whether it existed."""
    connection.execute("DELETE FROM image_references WHERE manifest = ?", (manifest,))
    return connection.execute("DELETE FROM images WHERE manifest = ?", (manifest,)).rowcount > 0


def add_leases(
    connection: sqlite3.Connection, holder: str, digests: Iterable[Digest], process: str
) -> None:
    """Add leases of a holder; for ``process`` see `Process.encode`."""
    connection.executemany(
        "INSERT OR IGNORE INTO leases (holder, digest, process) VALUES (?, ?, ?)",
        [(holder, digest, process) for digest in digests],
    )


def drop_leases(
    connection: sqlite3.Connection, holder: str, digests: Iterable[Digest] | None = None
) -> None:
    """Delete a holder's leases on these digests; ``None``: all its leases."""
    if digests is None:
        connection.execute("DELETE FROM leases WHERE holder = ?", (holder,))
        return
    connection.executemany(
        "DELETE FROM leases WHERE holder = ? AND digest = ?",
        [(holder, digest) for digest in digests],
    )


def find_holders(connection: sqlite3.Connection) -> dict[str, str | None]:
    """Return the holders of leases, alive or dead, with their processes."""
    return dict(connection.execute("SELECT holder, max(process) FROM leases GROUP BY holder"))
