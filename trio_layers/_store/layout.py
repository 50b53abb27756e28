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

from .._catalog.database import (
    APPLICATION_ID,
    VERSION,
    complete_tables,
    connect,
    copy_to_memory,
    create_schema,
    is_open_here,
    migrate,
    transaction,
)
from .._catalog.rows import IndexRow, StoredImage
from .._digest import Digest
from .._errors import ManifestError, StoreNotFound, UnsupportedStore
from .._files import (
    disk_errors,
    file_name,
    file_system_type,
    lock_directory,
    replace_file,
    sync_directory,
    try_lock,
    unlock,
)
from .._manifest import Descriptor, Manifest, decode_manifest
from .._paths import real_path
from .._platform import parse_platform

__all__ = [
    "INDEX_ANNOTATION",
    "OCI_LAYOUT",
    "Flavour",
    "encode_index",
    "index_document",
    "locate",
    "open_directory",
]

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

_NO_STORE: Final = "there is no store in {}: pull or import an image into it, or name another one"

_INDEX_TYPE: Final = "application/vnd.oci.image.index.v1+json"
_JSON: Final = json.JSONEncoder(separators=(",", ":"))
_NAME: Final = "<the reference>"  # in no other member of an entry


# statfs(2), and the kernel's magic.h. Other machines may have the directory open there; SQLite's
# log and its memory, and our locks, are for the processes of one.
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


def locate(path: Path, *, create: bool) -> Path:
    """Return the real path of a store's directory.

    With ``create``, missing directories are made, including parents. Links that another user could
    have planted are not followed.

    Raises:
        StoreNotFound: if the directory does not exist and ``create`` is false.
        UnsupportedStore: if ``path`` is not a directory.
        StoreError: if the disk fails.
    """
    with disk_errors(path):
        try:
            return Path(real_path(path, make=0o700 if create else None))
        except FileNotFoundError:
            if create:
                raise
            raise StoreNotFound(_NO_STORE.format(path)) from None
        except NotADirectoryError:
            raise UnsupportedStore(
                f"{path} is not a directory: choose another path for the store"
            ) from None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise UnsupportedStore(f"{path} is not a directory: {error.strerror}") from None


def open_directory(root: Path, *, create: bool = True) -> sqlite3.Connection:
    """Open the store in ``root``, and return its catalog.

    Runs in a worker thread of trio; waiting for another process that makes it can be cancelled.

    Args:
        root: The directory, as from `locate`.
        create: Create a store if the directory has none yet.

    Raises:
        StoreNotFound: if the directory has no store and ``create`` is false.
        UnsupportedStore: if the directory has other contents or an unsupported store. The
            function changes nothing in it.
        StoreError: if the disk fails.
    """
    with disk_errors(root):
        if root.stat().st_uid != os.geteuid():
            raise UnsupportedStore(
                f"{root} belongs to user {root.stat().st_uid}, and this is user {os.geteuid()}: "
                "each user has a store of their own"
            )
        networked = _NETWORKED.get(file_system_type(root))
        if networked is not None:
            raise UnsupportedStore(
                f"{root} is on a file system that other machines may share ({networked}): "
                "choose a directory on a disk of this machine"
            )
        with lock_directory(root):
            return _open_locked(root, create=create)


def open_to_read(root: Path) -> sqlite3.Connection:
    """Open the store in ``root`` for reading, with its catalog in memory.

    The store may be on a read-only file system or belong to another user, if it is readable.

    Raises:
        StoreNotFound: if there is no store.
        UnsupportedStore: if the directory has other contents, or a store of another version.
        StoreError: if the disk fails.
    """
    with disk_errors(root):
        if not _recognise(root):
            raise StoreNotFound(_NO_STORE.format(root))
        for name in _DIRECTORIES:
            if stat.S_ISLNK(os.lstat(root / name).st_mode):
                raise UnsupportedStore(f"{root} is no store: {name} in it is a link")
        connection = copy_to_memory(root / _CATALOG)
        try:
            version: int = connection.execute("PRAGMA user_version").fetchone()[0]
            _check_version(root, version)
            if not version:
                raise StoreNotFound(_NO_STORE.format(root))
            if version < VERSION:
                raise UnsupportedStore(
                    f"the store {root} is of an older version, and cannot be brought to this one "
                    "while it is only read: open it once to be written"
                )
        except BaseException:
            connection.close()
            raise
        return connection


def index_document(images: Iterable[StoredImage]) -> bytes:
    """The layout's ``index.json``: each image under its reference (OCI image specification,
    ``image-layout.md``), which containerd reads from an annotation of its own.
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
    made = _recognise(root)
    if not made:
        if not create:
            raise StoreNotFound(_NO_STORE.format(root))
        _take(root)
    connection = connect(root / _CATALOG)
    try:
        # Asked of SQLite: the file may be behind its log, and a crash while it was made is rolled
        # back only now.
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        _check_version(root, version)
        if made and version:
            _check_flavour(root, connection)
            if version < VERSION:
                _migrate(root, connection)
            complete_tables(connection)
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
    _check_version(root, int.from_bytes(header[60:64]))
    return True


def _check_version(root: Path, version: int) -> None:
    if version > VERSION:
        raise UnsupportedStore(
            f"the store {root} has version {version}, and this is software for version {VERSION}: "
            "use a newer trio_layers"
        )


def _take(root: Path) -> None:
    """Make a directory that is no store yet ours alone. Whoever could write in it may have left
    something there for us to write through, such as a link.
    """
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


def _migrate(root: Path, connection: sqlite3.Connection) -> None:
    """Bring a store of an older version to this one. Nobody else may have it open: the older
    software would not know what it finds.
    """
    leases = root / "leases"
    for name in os.listdir(leases):
        descriptor = try_lock(leases / name)
        if descriptor is None:
            raise UnsupportedStore(
                f"the store {root} is of an older version, and in use: "
                "try again when nobody has it open"
            )
        unlock(leases / name, descriptor)

    def blobs_of(descriptor: Descriptor) -> list[Digest]:
        path = root / "blobs" / "sha256" / file_name(descriptor.digest)
        try:
            manifest = decode_manifest(path.read_bytes(), descriptor.media_type)
        except (OSError, ManifestError):
            return []  # damaged, which is nothing that a migration could mend
        return [layer.digest for layer in manifest.layers] if isinstance(manifest, Manifest) else []

    with transaction(connection):
        migrate(connection, blobs_of)
    # So that the file itself tells its version to the older software.
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


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
