"""Checks whether a store is whole, without the store's own code.

It reads the catalog as any program would, and looks at the file of each row. From the library it
takes only the format of ``entries`` and the computation of chain IDs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import attrs
from crashes.failpoints import keys_of

from trio_layers._digest import ChainID, DiffID, extend_chain
from trio_layers._entries import Entry, parse_entries

_TYPES = {
    "file": stat.S_ISREG,
    "dir": stat.S_ISDIR,
    "symlink": stat.S_ISLNK,
    "fifo": stat.S_ISFIFO,
    "char": stat.S_ISCHR,
    "block": stat.S_ISBLK,
    "socket": stat.S_ISSOCK,
    "whiteout": stat.S_ISCHR,
}


@attrs.frozen
class Found:
    """The result of checking a store.

    Attributes:
        wrong: The violations.
        keys: The keys in the catalog, by table.
        unclaimed: Files and trees without a row.
        there: Number of bytes of each blob on disk, in any place.
    """

    wrong: list[str]
    keys: dict[str, list[str]]
    unclaimed: list[str]
    there: dict[str, int]


def look_at(store: Path, *, settled: bool = False) -> Found:
    """Check a store that no process has open. The check changes nothing, not even SQLite's log.

    Args:
        store: The store.
        settled: It was opened and closed since it was last broken: then nothing may be left that
            a crash leaves.
    """
    if not (store / "catalog.sqlite").exists():
        return Found([], {}, [], {})
    with _copied(store) as copy, closing(sqlite3.connect(copy)) as connection:
        if connection.execute("PRAGMA user_version").fetchone() == (0,):
            return Found([], {}, [], {})  # the store's making was broken off
        return _Check(store, connection).run(settled=settled)


@contextmanager
def _copied(store: Path) -> Iterator[Path]:
    """Open a copy of the catalog, since opening the file itself would checkpoint its log."""
    with tempfile.TemporaryDirectory() as place:
        for suffix in ("", "-wal", "-journal"):
            source = store / f"catalog.sqlite{suffix}"
            if source.exists():
                shutil.copy(source, place)
        yield Path(place) / "catalog.sqlite"


class _Check:
    def __init__(self, store: Path, connection: sqlite3.Connection) -> None:
        self.store = store
        self.connection = connection
        self.wrong: list[str] = []

    def run(self, *, settled: bool) -> Found:
        self.catalog()
        self.blobs()
        self.trees()
        self.layers()
        self.images()
        unclaimed = self.unclaimed()
        if settled:
            self.index()
            self.leftovers()
        return Found(self.wrong, keys_of(self.connection), unclaimed, self.there())

    def rows(self, query: str) -> list[tuple]:
        return self.connection.execute(query).fetchall()

    def expect(self, true: object, otherwise: str) -> None:
        if not true:
            self.wrong.append(otherwise)

    def catalog(self) -> None:
        for pragma, good in (("integrity_check", [("ok",)]), ("foreign_key_check", [])):
            answer = self.rows(f"PRAGMA {pragma}")
            self.expect(answer == good, f"{pragma}: {answer}")

    def blobs(self) -> None:
        for digest, size in self.rows("SELECT digest, size FROM blobs"):
            path = self.place("blobs", digest)
            if not path.is_file():
                self.wrong.append(f"blob {digest} has no file")
                continue
            data = path.read_bytes()
            found = f"sha256:{hashlib.sha256(data).hexdigest()}"
            self.expect((found, len(data)) == (digest, size), f"blob {digest} is {found}")

    def trees(self) -> None:
        query = "SELECT id, diff_id, size, entries, assumed FROM trees"
        for id, diff_id, size, number, assumed in self.rows(query):
            tree = self.place("trees", id)
            try:
                with open(tree / "entries", "rb") as lines:
                    entries, end = parse_entries(lines)
            except Exception as error:
                self.wrong.append(f"entries of tree {id}: {error!r}")
                continue
            self.expect(
                (end.diff_id, end.size, end.entries) == (diff_id, size, number),
                f"tree {id} has another end than its row: {end}",
            )
            paths = tuple(assumed.split(b"\0")[:-1])
            self.expect(end.assumed == paths, f"tree {id} assumed {end.assumed}")
            self.expect(not end.needs_lower, f"tree {id} is not whole")
            self.files(id, tree / "fs", entries, exact=not end.incomplete)

    def files(self, id: str, root: Path, entries: list[Entry], *, exact: bool) -> None:
        """``exact``: the tree shows all that its list says, as it does for root."""
        for entry in entries:
            path = os.path.join(os.fsencode(root), entry.path)
            what = f"tree {id}, {entry.path!r}: "
            try:
                found = os.lstat(path)
            except OSError as error:
                self.wrong.append(f"{what}{error}")
                continue
            self.expect(_TYPES[entry.type](found.st_mode), f"{what}is no {entry.type}")
            if entry.type == "whiteout":
                self.expect(found.st_rdev == 0, f"{what}is no whiteout")
                continue
            if exact and not entry.implied:
                owner = (found.st_uid, found.st_gid)
                self.expect(owner == (entry.uid, entry.gid), f"{what}belongs to {owner}")
            if not entry.implied:
                self.expect(found.st_mtime_ns == entry.mtime_ns, f"{what}is of {found.st_mtime_ns}")
            if entry.type == "symlink":
                self.expect(os.readlink(path) == entry.linkname, f"{what}leads elsewhere")
                continue
            mode = stat.S_IMODE(found.st_mode)
            self.expect(
                mode == entry.mode or not exact, f"{what}has mode {mode:o}, not {entry.mode:o}"
            )
            if entry.type == "file" and stat.S_ISREG(found.st_mode):
                with open(path, "rb") as file:
                    data = file.read()
                self.expect(len(data) == entry.size, f"{what}has {len(data)} of {entry.size} bytes")
                self.expect(zlib.crc32(data) == entry.crc32, f"{what}has other bytes")
            for name, value in entry.xattrs.items() if exact else ():
                try:
                    there = os.getxattr(path, name, follow_symlinks=False)
                except OSError as error:
                    self.wrong.append(f"{what}{name}: {error}")
                else:
                    self.expect(there == value, f"{what}{name} is {there!r}")
        listed = {os.path.join(os.fsencode(root), entry.path).rstrip(b"/") for entry in entries}
        for directory, names, others in os.walk(os.fsencode(root)):
            for name in (*names, *others):
                path = os.path.join(directory, name)
                self.expect(path in listed, f"tree {id}: {path!r} is not listed")

    def layers(self) -> None:
        trees = dict(self.rows("SELECT id, diff_id FROM trees"))
        blobs = {row[0] for row in self.rows("SELECT digest FROM blobs")}
        layers = {row[0] for row in self.rows("SELECT chain_id FROM layers")}
        query = "SELECT chain_id, diff_id, parent, tree, blob FROM layers"
        for chain, diff_id, parent, tree, blob in self.rows(query):
            below = None if parent is None else ChainID(parent)
            made = extend_chain(below, DiffID(diff_id))
            self.expect(chain == made, f"layer {chain} is called {made} by its parent and diff ID")
            self.expect(parent is None or parent in layers, f"layer {chain} has no parent")
            self.expect(trees.get(tree) == diff_id, f"layer {chain} has a tree of another layer")
            self.expect(blob in blobs, f"layer {chain} has no blob")

    def images(self) -> None:
        blobs = {row[0] for row in self.rows("SELECT digest FROM blobs")}
        layers = {row[0] for row in self.rows("SELECT chain_id FROM layers")}
        manifests = {row[0] for row in self.rows("SELECT manifest FROM images")}
        for manifest, config, chain in self.rows("SELECT manifest, config, chain_id FROM images"):
            self.expect(chain is None or chain in layers, f"image {manifest} has no layer")
            for blob in (manifest, config):
                self.expect(blob in blobs, f"image {manifest} lacks {blob}")
            document, described = self.document(manifest), self.document(config)
            if document is None or described is None:
                continue
            self.expect(document["config"]["digest"] == config, f"image {manifest}: config")
            if chain is None:
                continue
            # This holds only if no layer comes in two compressions.
            for layer in document["layers"]:
                self.expect(layer["digest"] in blobs, f"image {manifest} lacks {layer['digest']}")
            made = None
            for diff_id in described["rootfs"]["diff_ids"]:
                made = extend_chain(made, DiffID(diff_id))
            self.expect(made == chain, f"image {manifest} has the layers of another")
        for reference, manifest, index in self.rows(
            "SELECT reference, manifest, index_digest FROM image_references"
        ):
            self.expect(manifest in manifests, f"{reference} stands for nothing")
            self.expect(index is None or index in blobs, f"{reference} lacks its index")

    def document(self, digest: str) -> dict | None:
        """Return a manifest or a config. Errors of its blob are already reported."""
        try:
            return json.loads(self.place("blobs", digest).read_bytes())
        except (OSError, ValueError):
            return None

    def index(self) -> None:
        """Check that other tools find the stored images."""
        rows = self.rows(
            "SELECT r.reference, r.platform, i.media_type, m.digest, m.size "
            "FROM image_references r JOIN images i USING (manifest) "
            "JOIN blobs m ON m.digest = i.manifest"
        )
        document = json.loads((self.store / "index.json").read_bytes())
        told = [
            (
                each["annotations"]["org.opencontainers.image.ref.name"],
                "/".join(
                    each["platform"][field]
                    for field in ("os", "architecture", "variant")
                    if field in each.get("platform", {})
                ),
                each["mediaType"],
                each["digest"],
                each["size"],
            )
            for each in document["manifests"]
        ]
        self.expect(sorted(told) == sorted(rows), f"index.json has {told}, the catalog {rows}")
        layout = json.loads((self.store / "oci-layout").read_bytes())
        self.expect(layout == {"imageLayoutVersion": "1.0.0"}, f"oci-layout has {layout}")

    def unclaimed(self) -> list[str]:
        rows = {
            *(f"blobs/{row[0]}" for row in self.rows("SELECT digest FROM blobs")),
            *(f"trees/{row[0]}" for row in self.rows("SELECT id FROM trees")),
        }
        there = {
            f"{kind}/sha256:{name}"
            for kind in ("blobs", "trees")
            for name in os.listdir(self.store / kind / "sha256")
        }
        return sorted(there - rows)

    def leftovers(self) -> None:
        for place in ("ingest", "leases"):
            names = os.listdir(self.store / place)
            self.expect(not names, f"left in {place}: {names}")
        leases = self.rows("SELECT holder, digest FROM leases")
        self.expect(not leases, f"leases of nobody: {leases}")

    def there(self) -> dict[str, int]:
        """Return the number of bytes of each blob that a pull need not download again."""
        rows = dict(self.rows("SELECT digest, size FROM blobs"))
        sizes = {
            f"sha256:{name}": (self.store / "blobs" / "sha256" / name).stat().st_size
            for name in os.listdir(self.store / "blobs" / "sha256")
        }
        for path in (self.store / "ingest").glob("*.partial"):
            sizes.setdefault(f"sha256:{path.stem}", path.stat().st_size)
        return {**sizes, **rows}

    def place(self, kind: str, digest: str) -> Path:
        return self.store / kind / "sha256" / digest.removeprefix("sha256:")
