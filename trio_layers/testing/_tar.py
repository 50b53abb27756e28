"""Writing tars, PAX headers included, through any compressor."""

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

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["Compression", "LayerWriter"]

Compression: TypeAlias = Literal["none", "gzip", "zstd", "bzip2", "xz"]


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _Plain:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def _compressor(compression: Compression, level: int | None) -> _Compressor:
    match compression:
        case "none":
            return _Plain()
        case "gzip":
            # 31: with gzip's header, whose time zlib leaves at 0.
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
    """A tar on its way through a compressor, hashed before and after.

    Attributes:
        size: How many bytes came out of the compressor so far.
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
        self.write(_header(info, xattrs))
        size = 0
        for chunk in data:
            self.write(chunk)
            size += len(chunk)
        if size != info.size:
            raise OSError(f"{info.name} changed its size while it was read; try again")
        self.write(bytes(-size % 512))

    def end_of_archive(self) -> None:
        self.write(bytes(1024))

    def write(self, data: bytes) -> None:
        self._tar_hash.update(data)
        self._emit(self._compressor.compress(data))

    def finish(self) -> None:
        """Compress what is left. Now `size`, `digest` and `diff_id` are the layer's."""
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


def _header(info: tarfile.TarInfo, xattrs: Mapping[str, bytes]) -> bytes:
    """A ustar header, with a PAX header before it for what ustar cannot hold.

    `tarfile` would do, but for xattrs that are not UTF-8: it marks those ``hdrcharset=BINARY``,
    which nobody else does, while everyone writes them as they are.
    """
    records = {f"SCHILY.xattr.{name}".encode(): xattrs[name] for name in sorted(xattrs)}
    ustar = tarfile.TarInfo()
    ustar.type, ustar.mode = info.type, info.mode
    ustar.devmajor, ustar.devminor = info.devmajor, info.devminor
    slash = "/" if info.isdir() and not info.name.endswith("/") else ""
    ustar.name = _short(info.name + slash, b"path", records)
    ustar.linkname = _short(info.linkname, b"linkpath", records)
    ustar.uid = int(_fitting(info.uid, 0o7777777, b"uid", records))
    ustar.gid = int(_fitting(info.gid, 0o7777777, b"gid", records))
    ustar.size = int(_fitting(info.size, 0o77777777777, b"size", records))
    ustar.mtime = _fitting(info.mtime, 0o77777777777, b"mtime", records)
    header = _block(ustar)
    if not records:
        return header
    body = b"".join(_record(keyword, value) for keyword, value in records.items())
    pax = tarfile.TarInfo("PaxHeader")
    pax.type, pax.size = tarfile.XHDTYPE, len(body)
    return _block(pax) + body + bytes(-len(body) % 512) + header


def _block(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def _short(text: str, keyword: bytes, records: dict[bytes, bytes]) -> str:
    raw = os.fsencode(text)
    if text.isascii() and len(raw) <= 100:
        return text
    records[keyword] = raw
    return raw[:90].decode("ascii", "ignore")


def _fitting(number: float, largest: int, keyword: bytes, records: dict[bytes, bytes]) -> float:
    if number == int(number) and 0 <= number <= largest:
        return number
    records[keyword] = str(number).encode()
    return 0


def _record(keyword: bytes, value: bytes) -> bytes:
    """``LENGTH KEYWORD=VALUE``, the length being that of the whole record, itself included."""
    rest = len(keyword) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length += 1
    return b"%d %s=%s\n" % (length, keyword, value)
