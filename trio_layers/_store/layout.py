"""The store's directory: opening, creating and migrating it, and its OCI layout.

Blocking, for worker threads. Nothing is written to a directory until its owner, version and
flavour are known to be right.
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

from .._catalog.connection import (
    VERSION,
    connect,
    transaction,
)
from .._catalog.database import complete_tables, create_schema, migrate
from .._catalog.rows import IndexRow, StoredImage, find_index_rows, find_layout, set_layout
from .._digest import Digest, digest_of
from .._disk_errors import disk_errors
from .._errors import ManifestError, StoreNotFound, UnsupportedStore
from .._files import (
    file_name,
    file_system_type,
    lock_directory,
    replace_file,
    sync_directory,
    try_lock,
    unlock,
)
from .._manifest import Descriptor, Manifest, decode_manifest
from .._platform import parse_platform
from .recognition import CATALOG, DIRECTORIES, INDEX, NO_STORE, check_version, has_store

__all__ = [
    "INDEX_ANNOTATION",
    "OCI_LAYOUT",
    "Flavour",
    "encode_index",
    "index_document",
    "is_index_right",
    "open_directory",
    "write_index",
]

Ts = TypeVarTuple("Ts")

# OCI image specification, image-layout.md.
OCI_LAYOUT: Final = b'{"imageLayoutVersion":"1.0.0"}'
INDEX_ANNOTATION: Final = "trio-layers.index"
"""The annotation of an image in ``index.json`` with the digest of the index that listed it.

That index is a blob of the layout, and nothing else in the layout points to it.
"""

_INDEX_TYPE: Final = "application/vnd.oci.image.index.v1+json"
_JSON: Final = json.JSONEncoder(separators=(",", ":"))
_NAME: Final = "<the reference>"  # a placeholder that no other member of an entry contains


# File systems that machines share, by their types in statfs(2) and the kernel's magic.h. SQLite's
# log and shared memory, and the store's locks, work between processes of one machine only.
_NETWORKED: Final = {
    0x0000517B: "SMB",
    0x00006969: "NFS",
    0x00C36400: "Ceph",
    0x01021997: "9P",
    0x01161970: "GFS2",
    0x0BD00BD0: "Lustre",
    0x5346414F: "AFS",
    0x7461636F: "OCFS2",
    0x786F4256: "a virtual machine's shared folder",
    0xFE534D42: "SMB",
    0xFF534D42: "SMB",
}


@attrs.frozen
class Flavour:
    """The abilities of a store's user and file system, which decide how layers are unpacked.

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
            f"user {self.owner}, {'with' if self.privileged else 'without'} privilege, "
            f"with {self.xattrs or 'no '}xattrs"
        )


def open_directory(
    root: Path, *, create: bool = True, check_cancelled: Callable[[], None]
) -> sqlite3.Connection:
    """Open the store in ``root``, and return its catalog.

    Args:
        root: The directory, as from `locate`.
        create: Create a store if the directory has none yet.
        check_cancelled: Called during the wait for another process that creates the store. Its
            exceptions are raised unchanged.

    Raises:
        StoreNotFound: if the directory has no store and ``create`` is false.
        UnsupportedStore: if the directory has other contents or an unsupported store. The
            function changes nothing in it.
        StoreError: if the disk fails.
    """
    with disk_errors(root):
        if root.stat().st_uid != os.geteuid():
            raise UnsupportedStore(
                f"the store {root} belongs to user {root.stat().st_uid}, but the program runs as "
                f"user {os.geteuid()}: each user needs a store of their own"
            )
        networked = _NETWORKED.get(file_system_type(root))
        if networked is not None:
            raise UnsupportedStore(
                f"{root} is on a file system that other machines may share ({networked}): "
                "choose a directory on a disk of this machine"
            )
        with lock_directory(root, check_cancelled):
            return _open_locked(root, create=create)


def index_document(images: Iterable[StoredImage]) -> bytes:
    """Return the ``index.json`` of the layout, with each image under its reference.

    See the OCI image specification, ``image-layout.md``. containerd reads the reference from an
    annotation of its own.
    """
    return encode_index(
        (
            image.reference,
            image.platform,
            image.manifest.media_type,
            image.manifest.digest,
            image.manifest.size,
            None if image.index is None else image.index.digest,
        )
        for image in images
    )


def encode_index(rows: Iterable[IndexRow]) -> bytes:
    """Encode entries as an ``index.json`` with one entry on each line."""
    # An image may have thousands of names, and each change writes all of them.
    lines: list[str] = []
    without_names: dict[tuple[object, ...], list[str]] = {}
    for reference, platform, media_type, digest, size, index in rows:
        key = (platform, media_type, digest, size, index)
        parts = without_names.get(key)
        if parts is None:
            entry = _encode_entry(platform, media_type, digest, size, index)
            parts = without_names[key] = entry.split(_JSON.encode(_NAME))
        lines.append(_JSON.encode(reference).join(parts))
    head = _JSON.encode({"schemaVersion": 2, "mediaType": _INDEX_TYPE, "manifests": []})
    return "".join((head[:-2], "\n", ",\n".join(lines), "\n]}\n")).encode()


def is_index_right(connection: sqlite3.Connection, root: Path) -> bool:
    """Return whether ``index.json`` is the file that was written last.

    A crash between the write of the file and the commit leaves a newer file. If another program
    changed the file, the catalog wins, too.
    """
    try:
        document = (root / INDEX).read_bytes()
    except FileNotFoundError:
        return False
    return find_layout(connection) == digest_of(document)


def write_index(connection: sqlite3.Connection, root: Path, new_name: Callable[[], Path]) -> None:
    """Bring ``index.json`` up to date, inside the transaction that changes the images.

    The last of several writers therefore sees the rows of all others.

    Args:
        connection: The catalog, in a transaction.
        root: The store's directory.
        new_name: Returns a name to write the file under first.
    """
    document = encode_index(find_index_rows(connection))
    digest = digest_of(document)
    if find_layout(connection) == digest and is_index_right(connection, root):
        return
    replace_file(root / INDEX, document, temporary=new_name())
    set_layout(connection, digest)


def _encode_entry(
    platform: str | None, media_type: str, digest: Digest, size: int, index: Digest | None
) -> str:
    """Return an image's entry, with `_NAME` as a placeholder for its name."""
    annotations: dict[str, str] = {
        "io.containerd.image.name": _NAME,
        "org.opencontainers.image.ref.name": _NAME,
    }
    if index is not None:
        # The entry names the manifest. The index may list images that the store lacks, and tools
        # fail on these.
        annotations[INDEX_ANNOTATION] = index
    entry: dict[str, object] = {
        "mediaType": media_type,
        "digest": digest,
        "size": size,
        "annotations": annotations,
    }
    if platform:
        entry["platform"] = _platform_members(platform)
    return _JSON.encode(entry)


def _platform_members(specifier: str) -> dict[str, str]:
    platform = parse_platform(specifier)
    fields = ("os", "architecture", "variant")
    values = (platform.os, platform.architecture, platform.variant)
    return {f: v for f, v in zip(fields, values, strict=True) if v}


def _open_locked(root: Path, *, create: bool) -> sqlite3.Connection:
    made = has_store(root)
    if not made:
        if not create:
            raise StoreNotFound(NO_STORE.format(root))
        _close_new_store(root)
    connection = connect(root / CATALOG)
    try:
        # Only SQLite knows the version: the file may be behind its log, and a crash during the
        # creation is rolled back only now.
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        check_version(root, version)
        if made and version:
            _check_flavour(root, connection)
            if version < VERSION:
                _migrate(root, connection)
            complete_tables(connection)
            _close_to_others(root)
        else:
            _create(root, connection)
        connection.execute("PRAGMA journal_mode = WAL")
    except BaseException:
        connection.close()
        raise
    return connection


def _close_new_store(root: Path) -> None:
    """Close a directory to other users before a store is created in it.

    Other users may have planted a link in it, through which the store would write elsewhere.

    Raises:
        UnsupportedStore: if the directory has a link, or a file of another user.
    """
    _close_to_others(root)
    has_store(root)
    for name in os.listdir(root):
        found = os.lstat(root / name)
        if stat.S_ISLNK(found.st_mode) or found.st_uid != os.geteuid():
            raise UnsupportedStore(
                f"{root} is not a store, and {name} in it is a link or belongs to another user: "
                "choose a new or empty directory"
            )


def _close_to_others(root: Path) -> None:
    """Close the directory to other users, since trees have set-uid files of strangers."""
    if stat.S_IMODE(root.stat().st_mode) != 0o700:
        os.chmod(root, 0o700)


def _create(root: Path, connection: sqlite3.Connection) -> None:
    """Create the missing parts of a store.

    The tables come last, in one transaction, and mark the store as finished. They are created
    before the catalog is in WAL mode, so that the file itself has the version.
    """
    for name in DIRECTORIES:
        (root / name).mkdir(0o700, exist_ok=True)
    replace_file(root / "oci-layout", OCI_LAYOUT, temporary=root / "ingest" / "oci-layout")
    replace_file(root / INDEX, index_document(()), temporary=root / "ingest" / INDEX)
    for name in ("blobs", "trees", "."):
        sync_directory(root / name)
    # A user who may not read the parent directory cannot sync it.
    with contextlib.suppress(PermissionError):
        sync_directory(root.parent)
    flavour = _probe_flavour(root)
    with transaction(connection):
        create_schema(connection)
        connection.executemany(
            "INSERT INTO flavour (key, value) VALUES (?, ?)",
            [(key, json.dumps(value)) for key, value in attrs.asdict(flavour).items()],
        )


def _migrate(root: Path, connection: sqlite3.Connection) -> None:
    """Migrate a store of an older version.

    No other process may have the store open, because older software does not know the new tables.
    """
    leases = root / "leases"
    for name in os.listdir(leases):
        descriptor = try_lock(leases / name)
        if descriptor is None:
            raise UnsupportedStore(
                f"the store {root} has an older version and is in use: "
                "try again when no other program has it open"
            )
        unlock(leases / name, descriptor)

    def blobs_of(descriptor: Descriptor) -> list[Digest]:
        path = root / "blobs" / "sha256" / file_name(descriptor.digest)
        try:
            manifest = decode_manifest(path.read_bytes(), descriptor.media_type)
        except (OSError, ManifestError):
            return []  # a migration cannot repair damage
        return [layer.digest for layer in manifest.layers] if isinstance(manifest, Manifest) else []

    with transaction(connection):
        migrate(connection, blobs_of)
    # Older software reads the version from the file itself.
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _check_flavour(root: Path, connection: sqlite3.Connection) -> None:
    rows = connection.execute("SELECT key, value FROM flavour")
    made = Flavour(**{key: json.loads(value) for key, value in rows})
    ours = _probe_flavour(root)
    if made != ours:
        raise UnsupportedStore(
            f"the store {root} was made by {made}, but is opened by {ours}: "
            "open it as it was made, or choose another directory"
        )


def _probe_flavour(root: Path) -> Flavour:
    """Find out the flavour by attempts on a temporary file."""
    probe = root / "ingest" / "probe"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(probe)
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        privileged = _is_permitted(os.chown, probe, 1, 1)
        prefixes = ("trusted.", "user.")
        can = (p for p in prefixes if _is_permitted(os.setxattr, probe, p + "overlay.opaque", b"y"))
        return Flavour(os.geteuid(), privileged, next(can, ""))
    finally:
        os.unlink(probe)


def _is_permitted(call: Callable[[*Ts], None], *args: *Ts) -> bool:
    try:
        call(*args)
    except OSError as error:
        # Other errors, such as a full disk, do not mean that the call is not permitted.
        if error.errno not in (errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise
        return False
    return True
