"""What a tree holds: the value for one path, and the file ``entries`` that lists them.

The list is the truth about a tree; its ``fs`` directory may lack what could not be set without
privilege. It is ASCII, one JSON object a line, written in the order of unpacking so that the
writer keeps nothing in memory. A later line on a path wins:

- ``{"p": path, "t": type, ...}``: this is there now, a new inode. ``m`` is its mode, ``s`` its
  mtime in nanoseconds; left out where they have their default are ``u`` uid, ``g`` gid, ``n``
  size, ``c`` CRC-32, ``l`` link target, ``d`` device numbers, ``x`` xattrs in base64, ``o``
  opaque, ``i`` implied.
- ``{"p": path, "k": target, ...}``: this is one more name of the inode that ``target`` names,
  which takes over the metadata given here.
- ``{"p": path, "o": true}``: the directory hides what is below it from now on.
- ``{"p": path, "t": null}``: this is not there any more. Every path removed has such a line.
- ``{"end": ...}``: the last line. A list without one is not whole.

A path or link target is UTF-8 with what is not UTF-8 as surrogate escapes (PEP 383), which makes
every byte string come back as it was.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from json.encoder import encode_basestring_ascii
from typing import Final, Literal, NotRequired, Protocol, Required, TypedDict, cast

import attrs

from ._acl import ACCESS_ACL, fit_acl
from ._digest import DiffID
from ._errors import StoreError

__all__ = [
    "ENTRIES_FORMAT",
    "Entry",
    "EntryType",
    "ExportReport",
    "Metadata",
    "Summary",
    "file_line",
    "lines_about",
    "lines_of_directories",
    "link_line",
    "listed_as",
    "opaque_line",
    "parse_entries",
    "put_line",
    "removal_line",
    "summary_line",
]

ENTRIES_FORMAT: Final = 1
"""The version of the format of ``entries`` that is written, and the only one that is read."""

EntryType = Literal["file", "dir", "symlink", "fifo", "char", "block", "socket", "whiteout"]

_NO_XATTRS: Final[Mapping[str, bytes]] = {}


@attrs.frozen(kw_only=True)
class Entry:
    """One path of a tree.

    Attributes:
        path: Relative to the root, without slashes at its ends; ``b""`` is the root.
        type: What it is. A ``whiteout`` says that nothing is here, whatever is below.
        mode: Permissions with the set-id and sticky bits; 0o777 for symlinks.
        uid: The owner, as the layer says.
        gid: The group, as the layer says.
        mtime_ns: When it was modified, in nanoseconds since 1970; may be negative.
        size: Of a file, in bytes, holes included.
        crc32: Of a file's content (as in gzip), to know damage by. What ties the content to the
            image is the layer's diff ID.
        linkname: Where a symlink leads, byte for byte.
        dev: A device's major and minor number.
        xattrs: Extended attributes, without those that overlayfs keeps for itself.
        opaque: Of a directory: what trees below have in it does not show.
        implied: Of a directory: no entry of the layer describes it. Its time is that of the
            directory below, if there is one.
        links: The first, in byte order, of the names a file has in this tree, if it has several.
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
    """What the last line of a list says.

    Attributes:
        diff_id: Of the tar that the tree was unpacked from.
        size: The tar's length in bytes.
        entries: How many entries the tar had.
        assumed: Paths of directories that must be, below, as they were taken to be; a slash at
            the end of one says that it has to be there. Empty for a tree that was unpacked on
            top of its parent.
        needs_lower: The tree is not whole without what is below it.
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
    """What was written, and how much of it is not as it should be, for lack of privilege or
    because the file system has no such thing.

    Attributes:
        entries: How many paths were written, the root and all names of a file included.
        owners: How many files kept our owner or group.
        set_ids: How many of those lost a set-user-ID or set-group-ID bit, which would have let
            them run as us.
        devices: How many devices became empty files.
        xattrs: How many extended attributes could not be set.
    """

    entries: int = 0
    owners: int = 0
    set_ids: int = 0
    devices: int = 0
    xattrs: int = 0

    @property
    def complete(self) -> bool:
        """Whether all is as it should be."""
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
    """Of an entry, what any type has."""

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
    """The beginning of a line; put together by hand, since a list has a million of them."""
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


def put_line(entry: Entry) -> bytes:
    """The line for a path that has come, or has been replaced."""
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
    """What `put_line` gives for a file, of what most lines are, without an `Entry`."""
    length = f',"n":{size}' if size else ""
    line = f'{_metadata(path, about, xattrs)},"t":"file"{length},"c":{crc}}}\n'
    return line.encode("ascii")


def link_line(entry: Entry, target: bytes) -> bytes:
    """The line for one more name of what ``target`` names, with the metadata of ``entry``."""
    line = f'{_metadata(entry.path, entry, entry.xattrs)},"k":{_quoted(target)}}}\n'
    return line.encode("ascii")


def opaque_line(path: bytes) -> bytes:
    """The line for a directory that has become opaque."""
    return _line({"p": _text(path), "o": True})


def removal_line(path: bytes) -> bytes:
    """The line for a path that is gone."""
    return _line({"p": _text(path), "t": None})


def summary_line(summary: Summary) -> bytes:
    """The last line."""
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
    """``inode`` with the metadata of a hard link's line: its xattrs stay and are added to."""
    owner = (line.get("u", 0), line.get("g", 0))
    xattrs = dict(inode.xattrs)
    if owner != (inode.uid, inode.gid):
        # The kernel drops it with a change of owner, unless the entry brings a new one.
        xattrs.pop("security.capability", None)
    xattrs.update(_xattrs(line))
    mode = inode.mode if inode.type == "symlink" else line.get("m", 0)
    if ACCESS_ACL in xattrs:
        fit_acl(xattrs, mode)
    return attrs.evolve(
        inode,
        mode=mode,
        uid=owner[0],
        gid=owner[1],
        mtime_ns=line.get("s", 0),
        xattrs=xattrs or _NO_XATTRS,
    )


class _Merger:
    """Brings the lines of a list together; inodes that have several names are shared."""

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
        # Damaged: to be said when the whole list is read.
        return True


def lines_about(paths: Iterable[bytes], lines: Iterable[bytes]) -> list[bytes] | None:
    """Those lines that tell of ``paths``, and the end: to be parsed where nothing else matters.

    ``None`` if they do not suffice, since one of the paths is a hard link.
    """
    wanted = {listed_as(path) for path in paths}
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


def listed_as(path: bytes) -> bytes:
    """How the lines of a list spell a path."""
    return _dump(_text(path))[1:-1].encode("ascii")


def lines_of_directories(
    lines: Iterable[bytes], directories: set[bytes], others: bytearray
) -> list[bytes] | None:
    """Those lines that tell of directories and whiteouts, of what is where one was, and the end.

    ``None`` if they do not suffice, since one of the paths is a hard link.

    Args:
        lines: The list.
        directories: Where one is or was, as `listed_as` has it; what the list has is added.
        others: Where something else may be: one is set at the hashes of such paths, modulo its
            length.
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
                # A directory that replaces it later is told in full by its own lines.
                others[hash(path) % places] = 1
                continue
            if b'"k":' in line and _may_link(line):
                return None
        found.append(line)
    return found


def parse_entries(lines: Iterable[bytes]) -> tuple[list[Entry], Summary]:
    """Read a list: its final entries, sorted by path (bytes), and its summary.

    Raises:
        StoreError: if the list is damaged, is not whole, or has a format we do not know.
    """
    try:
        return _parse(iter(lines))
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise StoreError(
            f"a tree's list of entries is damaged ({type(error).__name__}: {error}): "
            "pull its image again, and it comes anew"
        ) from error


def _parse(lines: Iterator[bytes]) -> tuple[list[Entry], Summary]:
    merger = _Merger()
    for text in lines:
        line = cast("dict[str, object]", json.loads(text))
        if "end" in line:
            return merger.result(), _summary(cast(_End, line["end"]))
        merger.add(cast(_Line, line))
    raise ValueError("its end is missing")


def _summary(end: _End) -> Summary:
    if end["format"] != ENTRIES_FORMAT:
        raise ValueError(f"its format is {end['format']}, not {ENTRIES_FORMAT}")
    return Summary(
        diff_id=cast(DiffID, end["diff_id"]),
        size=end["size"],
        entries=end["entries"],
        assumed=tuple(_bytes(path) for path in end["assumed"]),
        needs_lower=end["needs_lower"],
        incomplete=end["incomplete"],
        foreign_only=end.get("foreign_only", False),
    )
