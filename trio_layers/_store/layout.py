"""The store's directory: recognised, made, and described to other tools.

Blocking: for worker threads. Nothing is written to a directory before it is known to be ours, of
a version we know and of our flavour.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, TypeVarTuple

import attrs

from .._errors import UnsupportedStore
from .._platform import parse_platform
from .catalog import (
    APPLICATION_ID,
    VERSION,
    StoredImage,
    connect,
    create_schema,
    is_open_here,
    transaction,
)
from .files import disk_errors, lock_directory, replace_file, sync_directory

__all__ = ["INDEX_ANNOTATION", "OCI_LAYOUT", "Flavour", "index_document", "open_directory"]

Ts = TypeVarTuple("Ts")

_CATALOG: Final = "catalog.sqlite"
_DIRECTORIES: Final = ("blobs", "blobs/sha256", "trees", "trees/sha256", "ingest", "leases")
_NAMES: Final = {
    "blobs",
    "ingest",
    "leases",
    "trees",
    "index.json",
    "oci-layout",
    *(_CATALOG + suffix for suffix in ("", "-journal", "-shm", "-wal")),
}

# OCI image specification, image-layout.md.
OCI_LAYOUT: Final = b'{"imageLayoutVersion":"1.0.0"}'
INDEX_ANNOTATION: Final = "trio-layers.index"
"""In a layout's index, of an image: the digest of the index it was chosen from, a blob of the
layout that nothing else points to."""

_INDEX_TYPE: Final = "application/vnd.oci.image.index.v1+json"


@attrs.frozen
class Flavour:
    """What a user can keep in a store, which decides how layers are unpacked.

    Attributes:
        owner: The user's ID.
        privileged: Whether files can be given any owner and be devices, as root can do.
        xattrs: The prefix of overlay's own attributes: ``trusted.`` or ``user.``, empty if the
            file system takes neither.
    """

    owner: int
    privileged: bool
    xattrs: str

    def __str__(self) -> str:
        return (
            f"of user {self.owner}, {'with' if self.privileged else 'without'} privilege, "
            f"with {self.xattrs or 'no '}xattrs"
        )


def open_directory(root: Path) -> sqlite3.Connection:
    """Open the store in ``root``, made if there is nothing, and return its catalog.

    Runs in a worker thread of trio; waiting for another process that makes it can be cancelled.

    Raises:
        UnsupportedStore: if it is not a store, or not one for us. Nothing in it is changed.
        StoreError: for what the disk does.
    """
    with disk_errors(root):
        try:
            root.mkdir(0o700, parents=True, exist_ok=True)
        except FileExistsError:
            raise UnsupportedStore(
                f"{root} is not a directory: choose another path for the store"
            ) from None
        if root.stat().st_uid != os.geteuid():
            raise UnsupportedStore(
                f"{root} belongs to user {root.stat().st_uid}, and this is user {os.geteuid()}: "
                "each user has a store of their own"
            )
        with lock_directory(root):
            return _open_locked(root)


def index_document(images: Iterable[StoredImage]) -> bytes:
    """The layout's ``index.json``: each image under its reference (OCI image specification,
    ``image-layout.md``), which containerd reads from an annotation of its own."""
    manifests: list[dict[str, object]] = []
    for image in images:
        annotations: dict[str, str] = {
            "io.containerd.image.name": image.reference,
            "org.opencontainers.image.ref.name": image.reference,
        }
        entry: dict[str, object] = {
            "mediaType": image.manifest.media_type,
            "digest": image.manifest.digest,
            "size": image.manifest.size,
            "annotations": annotations,
        }
        if image.index is not None:
            # The index itself may have entries that are not here, over which tools stumble.
            annotations[INDEX_ANNOTATION] = image.index.digest
        if image.platform is not None:
            platform = parse_platform(image.platform)
            fields = ("os", "architecture", "variant")
            values = (platform.os, platform.architecture, platform.variant)
            entry["platform"] = {f: v for f, v in zip(fields, values, strict=True) if v}
        manifests.append(entry)
    index = {"schemaVersion": 2, "mediaType": _INDEX_TYPE, "manifests": manifests}
    return json.dumps(index, indent=1).encode() + b"\n"


def _open_locked(root: Path) -> sqlite3.Connection:
    made = _recognise(root)
    if not made:
        _take(root)
    connection = connect(root / _CATALOG)
    try:
        # A crash while it was made: SQLite has rolled that back only now.
        made = made and _is_made(connection)
        if made:
            _check_flavour(root, connection)
            _close_to_others(root)
        else:
            _make(root, connection)
        connection.execute("PRAGMA journal_mode = WAL")
    except BaseException:
        connection.close()
        raise
    return connection


def _recognise(root: Path) -> bool:
    """Whether there is a store, as opposed to nothing, or to one that was never finished."""
    names = set(os.listdir(root))
    if not names:
        return False
    if is_open_here(root / _CATALOG):
        return True  # so it was found when it was opened
    # Read without SQLite, which would write its own files beside what may be a stranger's.
    try:
        with open(root / _CATALOG, "rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        header = None
    if header == b"" and names <= _NAMES:
        return False
    if (
        header is None
        or not header.startswith(b"SQLite format 3\0")
        or int.from_bytes(header[68:72]) != APPLICATION_ID
    ):
        raise UnsupportedStore(
            f"{root} is not empty, and what it holds is no store: choose a new or empty directory"
        )
    version = int.from_bytes(header[60:64])
    if version > VERSION:
        raise UnsupportedStore(
            f"the store {root} has version {version}, and this is software for version {VERSION}: "
            "use a newer trio_layers"
        )
    return True


def _take(root: Path) -> None:
    """Make a directory that is no store yet ours alone. Whoever could write in it may have left
    something there for us to write through, such as a link."""
    _close_to_others(root)
    _recognise(root)
    for name in os.listdir(root):
        found = os.lstat(root / name)
        if stat.S_ISLNK(found.st_mode) or found.st_uid != os.geteuid():
            raise UnsupportedStore(
                f"{root} is no store, and {name} in it is a link or of another user: "
                "choose a new or empty directory"
            )


def _close_to_others(root: Path) -> None:
    """Trees hold set-uid files of strangers."""
    if stat.S_IMODE(root.stat().st_mode) != 0o700:
        os.chmod(root, 0o700)


def _is_made(connection: sqlite3.Connection) -> bool:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version == VERSION


def _make(root: Path, connection: sqlite3.Connection) -> None:
    """Make what is missing; the tables come last, in one transaction, and say that it is done.

    They are made before the catalog is in WAL mode, so that the file itself tells its version.
    """
    for name in _DIRECTORIES:
        (root / name).mkdir(0o700, exist_ok=True)
    replace_file(root / "oci-layout", OCI_LAYOUT, temporary=root / "ingest" / "oci-layout")
    replace_file(root / "index.json", index_document(()), temporary=root / "ingest" / "index.json")
    for name in ("blobs", "trees", "."):
        sync_directory(root / name)
    # Whoever may not read the parent cannot sync it.
    with contextlib.suppress(PermissionError):
        sync_directory(root.parent)
    flavour = _probe(root)
    with transaction(connection):
        create_schema(connection)
        connection.executemany(
            "INSERT INTO flavour (key, value) VALUES (?, ?)",
            [(key, json.dumps(value)) for key, value in attrs.asdict(flavour).items()],
        )


def _check_flavour(root: Path, connection: sqlite3.Connection) -> None:
    rows = connection.execute("SELECT key, value FROM flavour")
    made = Flavour(**{key: json.loads(value) for key, value in rows})
    ours = _probe(root)
    if made != ours:
        raise UnsupportedStore(
            f"the store {root} was made as one {made}, and is opened as one {ours}: "
            "open it as it was made, or choose another directory"
        )


def _probe(root: Path) -> Flavour:
    """Try out what this user can do here."""
    probe = root / "ingest" / "probe"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(probe)
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        privileged = _can(os.chown, probe, 1, 1)
        prefixes = ("trusted.", "user.")
        can = (p for p in prefixes if _can(os.setxattr, probe, p + "overlay.opaque", b"y"))
        return Flavour(os.geteuid(), privileged, next(can, ""))
    finally:
        os.unlink(probe)


def _can(call: Callable[[*Ts], None], *args: *Ts) -> bool:
    try:
        call(*args)
    except OSError as error:
        # Anything else, such as a full disk, says nothing about what is allowed.
        if error.errno not in (errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise
        return False
    return True
