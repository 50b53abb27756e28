"""Writes a merged tree as a tar."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from typing import Final

from .._entries import Entry
from .._tar.header_writer import END_OF_ARCHIVE, header, padding
from .._tar.reader import Member
from .contents import open_content
from .merged import MergedTree

__all__ = ["archive"]

_PIECE: Final = 1 << 18


def archive(
    tree: MergedTree, *, check_cancelled: Callable[[], None]
) -> Generator[bytes, None, None]:
    """Yield the bytes of a tar of a merged tree, in pieces of about 256 KiB.

    Each step blocks, so take it in a worker thread.

    Raises:
        StoreError: if the store is damaged.
        OSError: if too many files are open.
    """
    held: list[bytes] = []
    size = 0
    for data in _tar_parts(tree, check_cancelled):
        held.append(data)
        size += len(data)
        if size >= _PIECE:
            yield b"".join(held)
            held.clear()
            size = 0
    yield b"".join(held)


def _tar_parts(tree: MergedTree, check_cancelled: Callable[[], None]) -> Iterator[bytes]:
    for entry in tree.walk():
        check_cancelled()
        member = _tar_member(tree, entry)
        yield header(member)
        if not member.size:
            continue
        with open_content(tree, entry.path) as descriptor:
            left = member.size
            while left:
                check_cancelled()
                try:
                    data = os.read(descriptor, min(left, _PIECE))
                except OSError as error:
                    raise tree.damaged_file(entry.path, error.strerror) from error
                if not data:
                    raise tree.damaged_file(entry.path, "it ends early")
                left -= len(data)
                yield data
        yield padding(member.size)
    yield END_OF_ARCHIVE


def _tar_member(tree: MergedTree, entry: Entry) -> Member:
    kind = entry.type
    if kind == "whiteout" or kind == "socket":
        raise tree.damaged_file(entry.path, f"its list of entries contains a {kind}")
    name = entry.path
    if kind == "dir":
        name = (name or b".") + b"/"
    if entry.links is not None and entry.links != entry.path:
        # The member for the file's first name has the content and metadata.
        return _hard_link_member(entry, entry.links)
    return Member(
        name=name,
        type=kind,
        mode=entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        mtime_ns=entry.mtime_ns,
        size=entry.size,
        linkname=entry.linkname or b"",
        dev=entry.dev or (0, 0),
        xattrs=entry.xattrs,
    )


def _hard_link_member(entry: Entry, target: bytes) -> Member:
    return Member(
        name=entry.path,
        type="hardlink",
        mode=entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        mtime_ns=entry.mtime_ns,
        size=0,
        linkname=target,
        dev=(0, 0),
        xattrs={},
    )
