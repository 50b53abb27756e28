"""Writes the files of an export as a tar or into a directory. Blocking: for worker threads.

The same images give the same bytes: the files have no times and no owners, and a fixed order. A
blob is hashed while it is read, so a blob that does not match its digest is an error.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Final, TypeAlias

import attrs

from .._compression import Decompressor
from .._damage import damaged
from .._digest import Digest, Verifier
from .._disk_errors import store_error
from .._errors import DecompressionError, ExportError, UnpackError
from .._paths import open_empty_directory, open_parent
from .._tar.header_writer import END_OF_ARCHIVE, header, padding
from .._tar.reader import BLOCK, Member, MemberType
from .._tree.directories import Directories, join, split

__all__ = ["Blob", "Entry", "write_directory", "write_file", "write_tar"]

_PIECE: Final = 256 * 1024
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

# The errors of file systems without hard links.
_NO_LINKS: Final = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})


@attrs.frozen
class Blob:
    """A blob of the store, to be copied.

    Attributes:
        path: Its file in the store.
        digest: The digest of the bytes to write.
        size: The number of bytes to write.
        inflate: Whether to decompress the blob; ``digest`` and ``size`` are those of the result.
    """

    path: Path
    digest: Digest
    size: int
    inflate: bool = False


Entry: TypeAlias = tuple[str, bytes | Blob]
"""A file's path and content."""


def write_tar(
    entries: Iterable[Entry], check_cancelled: Callable[[], None]
) -> Generator[bytes, None, None]:
    """Yield the pieces of a tar of files and of their directories. No piece is empty.

    Raises:
        StoreError: if a blob is damaged, or cannot be read.
    """
    made: set[str] = set()
    for path, content in entries:
        for parent in reversed(Path(path).parents[:-1]):
            if str(parent) not in made:
                made.add(str(parent))
                yield _header(f"{parent}/", "dir", 0)
        if isinstance(content, bytes):
            yield _header(path, "file", len(content)) + content + padding(len(content))
        else:
            yield _header(path, "file", content.size)
            yield from _verified_pieces(content, check_cancelled)
            if content.size % BLOCK:
                yield padding(content.size)
    yield END_OF_ARCHIVE


def write_file(target: Path, pieces: Iterable[bytes]) -> None:
    """Write a file. It appears only when it is complete and on the disk.

    Raises:
        ExportError: if it exists already, or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with _as_export_errors(target):
            parent, name = open_parent(target)
            stack.callback(os.close, parent)
            if _exists(name, parent):
                raise FileExistsError(0, "file exists: remove it, or choose another name")
            temporary = f".{name[:64]}.{secrets.token_hex(8)}"
            descriptor = os.open(temporary, _NEW, 0o666, dir_fd=parent)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                for piece in pieces:
                    with _as_export_errors(target):
                        _write(file.fileno(), piece)
                with _as_export_errors(target):
                    os.fsync(file.fileno())
            with _as_export_errors(target):
                _rename(temporary, name, parent)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=parent)


def write_directory(
    target: Path, entries: Iterable[Entry], check_cancelled: Callable[[], None]
) -> None:
    """Write files into an empty or new directory. After an error they are removed.

    Raises:
        ExportError: if the directory is not empty, or cannot be written.
        StoreError: if a blob is damaged, or cannot be read.
    """
    with contextlib.ExitStack() as stack:
        with _as_export_errors(target):
            root, remove = open_empty_directory(stack, target, mode=0o777)
        directories = Directories(root)
        stack.callback(directories.close)
        made: dict[bytes, bool] = {}  # path -> whether it is a directory
        try:
            for path, content in entries:
                check_cancelled()
                *parents, _ = itertools.accumulate(os.fsencode(path).split(b"/"), join)
                with _as_export_errors(target):
                    for parent in parents:
                        if parent not in made:
                            above, name = split(parent)
                            os.mkdir(name, dir_fd=directories.open(above))
                            made[parent] = True
                    above, name = split(os.fsencode(path))
                    descriptor = os.open(name, _NEW, 0o666, dir_fd=directories.open(above))
                made[os.fsencode(path)] = False
                try:
                    for piece in _pieces_of(content, check_cancelled):
                        with _as_export_errors(target):
                            _write(descriptor, piece)
                finally:
                    os.close(descriptor)
        except BaseException:
            for each, is_directory in reversed(made.items()):
                with contextlib.suppress(OSError):
                    above, name = split(each)
                    undo = os.rmdir if is_directory else os.unlink
                    undo(name, dir_fd=directories.open(above))
            if remove is not None:
                with contextlib.suppress(OSError):
                    remove()
            raise


def _exists(name: str, parent: int) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _rename(old: str, new: str, parent: int) -> None:
    """Rename a file. Unlike `os.rename`, replace no file that has appeared meanwhile."""
    try:
        os.link(old, new, src_dir_fd=parent, dst_dir_fd=parent, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if _exists(new, parent):
            raise FileExistsError(0, "file exists: another program has just made it") from None
        os.rename(old, new, src_dir_fd=parent, dst_dir_fd=parent)


@contextlib.contextmanager
def _as_export_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(os.fspath(target), error.strerror) from error


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _pieces_of(content: bytes | Blob, check_cancelled: Callable[[], None]) -> Iterator[bytes]:
    return (
        iter((content,))
        if isinstance(content, bytes)
        else _verified_pieces(content, check_cancelled)
    )


def _verified_pieces(blob: Blob, check_cancelled: Callable[[], None]) -> Iterator[bytes]:
    verifier = Verifier()
    try:
        for piece in (
            _decompressed_pieces(blob, check_cancelled) if blob.inflate else _file_pieces(blob.path)
        ):
            check_cancelled()
            verifier.update(piece)
            if verifier.size > blob.size:
                break
            yield piece
    except (DecompressionError, UnpackError) as error:
        raise damaged(blob.path, str(error)) from error
    except FileNotFoundError as error:
        raise damaged(blob.path, "it is missing") from error
    except OSError as error:
        raise store_error(error, blob.path) from error
    if (verifier.size, verifier.digest) != (blob.size, blob.digest):
        raise damaged(blob.path, "its content has changed")


def _file_pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        while data := file.read(_PIECE):
            yield data


def _decompressed_pieces(blob: Blob, check_cancelled: Callable[[], None]) -> Iterator[bytes]:
    decompressor = Decompressor()
    for data in _file_pieces(blob.path):
        # The decompressor may read much input before it returns output.
        check_cancelled()
        yield from decompressor.feed(data)
    yield from decompressor.finish()


def _header(path: str, kind: MemberType, size: int) -> bytes:
    return header(
        Member(
            name=path.encode(),
            type=kind,
            mode=0o755 if kind == "dir" else 0o644,
            uid=0,
            gid=0,
            mtime_ns=0,
            size=size,
            linkname=b"",
            dev=(0, 0),
            xattrs={},
        )
    )
