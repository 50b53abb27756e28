"""Writes tars with PAX headers through any compressor."""

from __future__ import annotations

import bz2
import hashlib
import lzma
import os
import sys
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from typing import IO, Literal, Protocol, TypeAlias, assert_never

from .._digest import DiffID, Digest
from .._tar.header_writer import END_OF_ARCHIVE, header, padding
from .._tar.reader import Member, MemberType

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["Compression", "LayerWriter"]

Compression: TypeAlias = Literal["none", "gzip", "zstd", "bzip2", "xz"]


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _NoCompressor:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def _compressor(compression: Compression, level: int | None) -> _Compressor:
    match compression:
        case "none":
            return _NoCompressor()
        case "gzip":
            # 31 makes a gzip header; zlib leaves its time at 0.
            return zlib.compressobj(-1 if level is None else level, zlib.DEFLATED, 31)
        case "zstd":
            return zstd.ZstdCompressor(level=level)
        case "bzip2":
            return bz2.BZ2Compressor(9 if level is None else level)
        case "xz":
            return lzma.LZMACompressor(preset=level)
        case _:
            assert_never(compression)


class LayerWriter:
    """Writes a tar through a compressor, and hashes both.

    Attributes:
        size: The number of compressed bytes so far.
    """

    def __init__(self, out: IO[bytes], compression: Compression, *, level: int | None) -> None:
        self._out = out
        self._compressor = _compressor(compression, level)
        self._tar_hash = hashlib.sha256()
        self._blob_hash = hashlib.sha256()
        self.size = 0

    def add(
        self, info: tarfile.TarInfo, xattrs: Mapping[str, bytes], data: Iterable[bytes]
    ) -> None:
        self.write(header(_member(info, xattrs)))
        size = 0
        for chunk in data:
            self.write(chunk)
            size += len(chunk)
        if size != info.size:
            raise OSError(f"{info.name}: the size changed while the file was read; try again")
        self.write(padding(size))

    def end_of_archive(self) -> None:
        self.write(END_OF_ARCHIVE)

    def write(self, data: bytes) -> None:
        self._tar_hash.update(data)
        self._emit(self._compressor.compress(data))

    def finish(self) -> None:
        """Flush the compressor; `size`, `digest` and `diff_id` are final then."""
        self._emit(self._compressor.flush())

    @property
    def diff_id(self) -> DiffID:
        return DiffID(Digest(f"sha256:{self._tar_hash.hexdigest()}"))

    @property
    def digest(self) -> Digest:
        return Digest(f"sha256:{self._blob_hash.hexdigest()}")

    def _emit(self, data: bytes) -> None:
        self._blob_hash.update(data)
        self.size += len(data)
        self._out.write(data)


_TYPES: dict[bytes, MemberType] = {
    tarfile.REGTYPE: "file",
    tarfile.LNKTYPE: "hardlink",
    tarfile.SYMTYPE: "symlink",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.DIRTYPE: "dir",
    tarfile.FIFOTYPE: "fifo",
}


def _member(info: tarfile.TarInfo, xattrs: Mapping[str, bytes]) -> Member:
    slash = "/" if info.isdir() and not info.name.endswith("/") else ""
    return Member(
        name=os.fsencode(info.name + slash),
        type=_TYPES[info.type],
        mode=info.mode,
        uid=info.uid,
        gid=info.gid,
        mtime_ns=round(info.mtime * 10**9),
        size=info.size,
        linkname=os.fsencode(info.linkname),
        dev=(info.devmajor, info.devminor),
        xattrs=xattrs,
    )
