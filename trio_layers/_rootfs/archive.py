"""A merged tree as one tar."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from typing import Final

from .._entries import Entry
from .._tar.header_writer import END_OF_ARCHIVE, header, padding
from .._tar.reader import Member
from .contents import Source, damaged, reading

__all__ = ["archive"]

_PIECE: Final = 1 << 18


def archive(source: Source, *, check_cancelled: Callable[[], None]) -> Generator[bytes, None, None]:
    """The bytes of a tar of all of ``source``, in pieces of some 256 KiB. Each step blocks.

    Raises:
        StoreError: if the store is damaged.
        OSError: if a file cannot be opened since too many are.
    """
    held: list[bytes] = []
    size = 0
    for data in _parts(source, check_cancelled):
        held.append(data)
        size += len(data)
        if size >= _PIECE:
            yield b"".join(held)
            held.clear()
            size = 0
    yield b"".join(held)


def _parts(source: Source, check_cancelled: Callable[[], None]) -> Iterator[bytes]:
    for entry in source.walk():
        check_cancelled()
        member = _member(entry)
        yield header(member)
        if not member.size:
            continue
        with reading(source, entry) as descriptor:
            left = member.size
            while left:
                check_cancelled()
                try:
                    data = os.read(descriptor, min(left, _PIECE))
                except OSError as error:
                    raise damaged(entry.path, error.strerror) from error
                if not data:
                    raise damaged(entry.path, "it ends early")
                left -= len(data)
                yield data
        yield padding(member.size)
    yield END_OF_ARCHIVE


def _member(entry: Entry) -> Member:
    kind = entry.type
    if kind == "whiteout" or kind == "socket":
        raise damaged(entry.path, f"a {kind} is in its list")
    name = entry.path
    if kind == "dir":
        name = (name or b".") + b"/"
    if entry.links is not None and entry.links != entry.path:
        # All that there is to say was said with its first name.
        return _hardlink(entry, entry.links)
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


def _hardlink(entry: Entry, target: bytes) -> Member:
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
