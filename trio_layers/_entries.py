"""The entries of a tree, and the file ``entries`` that lists them.

The list describes the tree completely; the tree's ``fs`` directory may lack metadata that needs
privilege. The list is ASCII, one JSON object a line, in the order of unpacking, so that the writer
keeps nothing in memory. A later line on a path wins:

- ``{"p": path, "t": type, ...}``: a new inode at this path. ``m`` is its mode, ``s`` its
  mtime in nanoseconds. The following are left out if they have their default: ``u`` uid, ``g``
  gid, ``n`` size, ``c`` CRC-32, ``l`` link target, ``d`` device numbers, ``x`` xattrs in base64,
  ``o`` opaque, ``i`` implied.
- ``{"p": path, "k": target, ...}``: one more name of the inode at ``target``. The inode takes the
  metadata of this line.
- ``{"p": path, "o": true}``: from now on, the directory hides the entries of lower trees.
- ``{"p": path, "t": null}``: the path was removed. Every removed path has such a line.
- ``{"end": ...}``: the last line. A list without this line is not complete.

A path or link target is UTF-8. Other bytes become surrogate escapes (PEP 383), so that every byte
string can be restored.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from json.encoder import encode_basestring_ascii
from typing import Final, Literal, NotRequired, Protocol, Required, TypedDict, cast

import attrs

from ._acl import ACCESS_ACL, apply_mode_to_acl
from ._digest import DiffID
from ._errors import StoreError

__all__ = [
    "ENTRIES_FORMAT",
    "Entry",
    "EntryType",
    "ExportReport",
    "Metadata",
    "Summary",
    "entry_line",
    "file_line",
    "lines_about",
    "lines_of_directories",
    "link_line",
    "opaque_line",
    "parse_entries",
    "path_in_list",
    "removal_line",
    "summary_line",
]

ENTRIES_FORMAT: Final = 1
"""The version of the format of ``entries``; no other version is read."""

EntryType = Literal["file", "dir", "symlink", "fifo", "char", "block", "socket", "whiteout"]

_NO_XATTRS: Final[Mapping[str, bytes]] = {}


@attrs.frozen(kw_only=True)
class Entry:
    """An entry of a tree: one path with its metadata.

    Attributes:
        path: Path relative to the root, without slashes at its ends; ``b""`` is the root.
        type: The entry's type. A ``whiteout`` removes the path of the trees below.
        mode: Permissions with the set-id and sticky bits; 0o777 for symlinks.
        uid: The owner in the layer.
        gid: The group in the layer.
        mtime_ns: Modification time in nanoseconds since 1970; may be negative.
        size: Size of a file in bytes, holes included.
        crc32: CRC-32 of a file's content (as in gzip), to detect damage. The layer's diff ID, not
            this sum, ties the content to the image.
        linkname: Target of a symlink, byte for byte.
        dev: A device's major and minor number.
        xattrs: Extended attributes, without those that overlayfs reserves for itself.
        opaque: Whether a directory hides the entries that lower trees have in it.
        implied: Whether a directory has no entry in the layer. Its time is then that of the
            directory below, if there is one.
        links: The first name, in byte order, of a file with several names in this tree.
    """

    path: bytes
    type: EntryType
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    crc32: int | None = None
    linkname: bytes | None = None
    dev: tuple[int, int] | None = None
    xattrs: Mapping[str, bytes] = attrs.field(default=_NO_XATTRS, hash=False)
    opaque: bool = False
    implied: bool = False
    links: bytes | None = None


@attrs.frozen(kw_only=True)
class Summary:
    """The last line of a list.

    Attributes:
        diff_id: The digest of the layer's tar.
        size: The tar's length in bytes.
        entries: The number of entries in the tar.
        assumed: Paths of directories that the trees below must have as they were assumed, or not
            at all. A path with a slash at its end must exist there. Empty for a tree that was
            unpacked on top of its parent.
        needs_lower: The tree is not complete without the trees below it.
        incomplete: ``fs`` lacks metadata from the list, because the process had no privilege to
            set it or because Linux has no such attribute.
        foreign_only: Attributes that Linux does not have are the only cause of ``incomplete``.
    """

    diff_id: DiffID
    size: int
    entries: int
    assumed: tuple[bytes, ...] = ()
    needs_lower: bool = False
    incomplete: bool = False
    foreign_only: bool = False


@attrs.frozen(kw_only=True)
class ExportReport:
    """The result of an export: how much was written, and how much of it is incomplete.

    The cause is a lack of privilege or of a feature in the file system.

    Attributes:
        entries: Number of paths written, including the root and all names of a file.
        owners: Number of files that kept our owner or group.
        set_ids: Number of those files that lost a set-user-ID or set-group-ID bit. With the bit,
            programs would run as us.
        devices: Number of devices that became empty files.
        xattrs: Number of extended attributes that could not be set.
    """

    entries: int = 0
    owners: int = 0
    set_ids: int = 0
    devices: int = 0
    xattrs: int = 0

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return not (self.owners or self.set_ids or self.devices or self.xattrs)


class _Line(TypedDict, total=False):
    p: Required[str]
    t: EntryType | None
    k: str
    m: int
    u: int
    g: int
    s: int
    n: int
    c: int
    l: str  # noqa: E741
    d: list[int]
    x: dict[str, str]
    o: bool
    i: bool


class Metadata(Protocol):
    """The metadata that every type of entry has."""

    @property
    def mode(self) -> int: ...
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...


class _End(TypedDict):
    format: int
    diff_id: str
    size: int
    entries: int
    assumed: list[str]
    needs_lower: bool
    incomplete: bool
    foreign_only: NotRequired[bool]


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


_dump = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), check_circular=False).encode


def _line(line: object) -> bytes:
    return _dump(line).encode("ascii") + b"\n"


def _quoted(path: bytes) -> str:
    return encode_basestring_ascii(path.decode("utf-8", "surrogateescape"))


def _metadata(path: bytes, about: Metadata, xattrs: Mapping[str, bytes]) -> str:
    """Return the beginning of a line, without a JSON encoder: a list may have a million lines."""
    line = f'{{"p":{_quoted(path)},"m":{about.mode},"s":{about.mtime_ns}'
    if about.uid:
        line += f',"u":{about.uid}'
    if about.gid:
        line += f',"g":{about.gid}'
    if xattrs:
        encoded = {
            name: base64.b64encode(value).decode("ascii") for name, value in sorted(xattrs.items())
        }
        line += f',"x":{_dump(encoded)}'
    return line


def entry_line(entry: Entry) -> bytes:
    """Return the line for a path that was created or replaced."""
    line = f'{_metadata(entry.path, entry, entry.xattrs)},"t":"{entry.type}"'
    if entry.size:
        line += f',"n":{entry.size}'
    if entry.crc32 is not None:
        line += f',"c":{entry.crc32}'
    if entry.linkname is not None:
        line += f',"l":{_quoted(entry.linkname)}'
    if entry.dev is not None:
        line += f',"d":[{entry.dev[0]},{entry.dev[1]}]'
    if entry.opaque:
        line += ',"o":true'
    if entry.implied:
        line += ',"i":true'
    return (line + "}\n").encode("ascii")


def file_line(
    path: bytes, about: Metadata, size: int, crc: int, xattrs: Mapping[str, bytes]
) -> bytes:
    """Return the line for a file, as `entry_line` does, but without an `Entry`.

    Most lines of a list are about files.
    """
    length = f',"n":{size}' if size else ""
    line = f'{_metadata(path, about, xattrs)},"t":"file"{length},"c":{crc}}}\n'
    return line.encode("ascii")


def link_line(entry: Entry, target: bytes) -> bytes:
    """Return the line for another name of the inode at ``target``, with ``entry``'s metadata."""
    line = f'{_metadata(entry.path, entry, entry.xattrs)},"k":{_quoted(target)}}}\n'
    return line.encode("ascii")


def opaque_line(path: bytes) -> bytes:
    """Return the line for a directory that became opaque."""
    return _line({"p": _text(path), "o": True})


def removal_line(path: bytes) -> bytes:
    """Return the line for a path that was removed."""
    return _line({"p": _text(path), "t": None})


def summary_line(summary: Summary) -> bytes:
    """Return the last line of a list."""
    end: _End = {
        "format": ENTRIES_FORMAT,
        "diff_id": summary.diff_id,
        "size": summary.size,
        "entries": summary.entries,
        "assumed": [_text(path) for path in summary.assumed],
        "needs_lower": summary.needs_lower,
        "incomplete": summary.incomplete,
    }
    if summary.foreign_only:
        end["foreign_only"] = True
    return _line({"end": end})


def _entry(path: bytes, line: _Line) -> Entry:
    link = line.get("l")
    device = line.get("d")
    kind = line.get("t")
    assert kind is not None
    return Entry(
        path=path,
        type=kind,
        mode=line.get("m", 0),
        uid=line.get("u", 0),
        gid=line.get("g", 0),
        mtime_ns=line.get("s", 0),
        size=line.get("n", 0),
        crc32=line.get("c"),
        linkname=None if link is None else _bytes(link),
        dev=None if device is None else (device[0], device[1]),
        xattrs=_xattrs(line),
        opaque=line.get("o", False),
        implied=line.get("i", False),
    )


def _xattrs(line: _Line) -> Mapping[str, bytes]:
    given = line.get("x")
    if not given:
        return _NO_XATTRS
    return {name: base64.b64decode(value) for name, value in given.items()}


def _linked(inode: Entry, line: _Line) -> Entry:
    """Return ``inode`` with the metadata of a hard link's line, and the xattrs of both."""
    owner = (line.get("u", 0), line.get("g", 0))
    xattrs = dict(inode.xattrs)
    if owner != (inode.uid, inode.gid):
        # The kernel drops capabilities with a change of owner. The line may have new ones.
        xattrs.pop("security.capability", None)
    xattrs.update(_xattrs(line))
    mode = inode.mode if inode.type == "symlink" else line.get("m", 0)
    if ACCESS_ACL in xattrs:
        apply_mode_to_acl(xattrs, mode)
    return attrs.evolve(
        inode,
        mode=mode,
        uid=owner[0],
        gid=owner[1],
        mtime_ns=line.get("s", 0),
        xattrs=xattrs or _NO_XATTRS,
    )


class _Merger:
    """Merges the lines of a list; the names of an inode share one cell."""

    def __init__(self) -> None:
        self.inodes: dict[bytes, list[Entry]] = {}

    def add(self, line: _Line) -> None:
        path = _bytes(line["p"])
        if "k" in line:
            cell = self.inodes[_bytes(line["k"])]
            cell[0] = _linked(cell[0], line)
            self.inodes[path] = cell
        elif "t" not in line:
            cell = self.inodes[path]
            cell[0] = attrs.evolve(cell[0], opaque=True)
        elif line.get("t") is None:
            del self.inodes[path]
        else:
            entry = _entry(path, line)
            cell = self.inodes.get(path, [entry])
            if entry.type == "dir" and cell[0].opaque:
                entry = attrs.evolve(entry, opaque=True)
            self.inodes[path] = [entry]

    def result(self) -> list[Entry]:
        names: dict[int, bytes] = {}
        shared: set[int] = set()
        paths = sorted(self.inodes)
        for path in paths:
            inode = id(self.inodes[path])
            if names.setdefault(inode, path) is not path:
                shared.add(inode)
        result: list[Entry] = []
        for path in paths:
            cell = self.inodes[path]
            entry, links = cell[0], names[id(cell)] if id(cell) in shared else None
            if entry.path != path or links is not None:
                entry = attrs.evolve(entry, path=path, links=links)
            result.append(entry)
        return result


_LINES_PATH: Final = re.compile(rb'\{"p":"([^"\\]*(?:\\.[^"\\]*)*)"')


def _may_link(line: bytes) -> bool:
    try:
        return "k" in cast("dict[str, object]", json.loads(line))
    except ValueError:
        # The line is damaged. `parse_entries` reports this when it reads the whole list.
        return True


def lines_about(paths: Iterable[bytes], lines: Iterable[bytes]) -> list[bytes] | None:
    """Return only the lines about ``paths``, and the last line, for `parse_entries`.

    Returns ``None`` if one of the paths is a hard link: then these lines are not enough.
    """
    wanted = {path_in_list(path) for path in paths}
    found: list[bytes] = []
    for line in lines:
        match = _LINES_PATH.match(line)
        if match is None:
            found.append(line)
        elif match[1] in wanted:
            if b'"k":' in line and _may_link(line):
                return None
            found.append(line)
    return found


def path_in_list(path: bytes) -> bytes:
    """Return a path as it is written in a list's lines."""
    return _dump(_text(path))[1:-1].encode("ascii")


def lines_of_directories(
    lines: Iterable[bytes], directories: set[bytes], others: bytearray
) -> list[bytes] | None:
    """Return only the lines about paths of directories and whiteouts, and the last line.

    All later lines about such a path are included. Returns ``None`` if one of the paths is a hard
    link: then these lines are not enough.

    Args:
        lines: The list.
        directories: Paths of directories and whiteouts, as `path_in_list` returns them; the list's
            own are added.
        others: A set of hashes of all other paths: the byte at a path's hash, modulo the array's
            length, becomes 1.
    """
    found: list[bytes] = []
    path_of, places = _LINES_PATH.match, len(others)
    for line in lines:
        match = path_of(line)
        if match is not None:
            path = match[1]
            if b'"t":"dir"' in line or b'"t":"whiteout"' in line:
                directories.add(path)
            elif path not in directories:
                # If a directory replaces this entry later, its own lines describe it fully.
                others[hash(path) % places] = 1
                continue
            if b'"k":' in line and _may_link(line):
                return None
        found.append(line)
    return found


def parse_entries(lines: Iterable[bytes]) -> tuple[list[Entry], Summary]:
    """Parse a list; return its final entries, sorted by path (bytes), and its summary.

    Raises:
        StoreError: If the list is damaged or incomplete, or has an unknown format.
    """
    try:
        return _parse(iter(lines))
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise StoreError(
            f"a tree's list of entries is damaged ({type(error).__name__}: {error}): "
            "pull its image again to replace the tree"
        ) from error


def _parse(lines: Iterator[bytes]) -> tuple[list[Entry], Summary]:
    merger = _Merger()
    for text in lines:
        line = cast("dict[str, object]", json.loads(text))
        if "end" in line:
            return merger.result(), _summary(cast(_End, line["end"]))
        merger.add(cast(_Line, line))
    raise ValueError("the last line is missing")


def _summary(end: _End) -> Summary:
    if end["format"] != ENTRIES_FORMAT:
        raise ValueError(f"the format is {end['format']}, not {ENTRIES_FORMAT}")
    return Summary(
        diff_id=cast(DiffID, end["diff_id"]),
        size=end["size"],
        entries=end["entries"],
        assumed=tuple(_bytes(path) for path in end["assumed"]),
        needs_lower=end["needs_lower"],
        incomplete=end["incomplete"],
        foreign_only=end.get("foreign_only", False),
    )
