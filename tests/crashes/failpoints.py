"""Hooks at every step of a process that changes the disk below a directory.

Only for processes that are meant to break (see ``child.py``): `install` replaces functions of `os`,
`io` and `builtins` and the catalog's connections, and nothing restores them. A step is a call of
the operating system. Its name has the call and the kind of file, so that names are the same in
every run: ``rename partial -> blobs/X``.

SQLite's own writes are not seen: its statements are steps, and so is each COMMIT, named by its
tables.
"""

from __future__ import annotations

import builtins
import ctypes
import io
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from trio_layers import _files as files
from trio_layers._catalog import connection

TABLES = ("blobs", "trees", "layers", "images", "image_references", "leases")

_WRITES = re.compile(
    r"\s*(?:INSERT(?:\s+OR\s+\w+)?\s+INTO|UPDATE|DELETE\s+FROM|CREATE\s+(TABLE))\s+(\w+)", re.I
)
_WRITING = os.O_WRONLY | os.O_RDWR

# The files of a process that has the store open, by their suffix.
_HELD = re.compile(r"[0-9a-f]{16}-[0-9]+\.([a-z]+)")
_BLOB = re.compile(r"[0-9a-f]{64}\.([a-z]+)")
_WHAT = {"blob": "document", "partial": "partial", "lock": "lock", "index": "new index"}


class Hook(Protocol):
    """Called before and after each step, by one thread at a time."""

    def __call__(self, name: str, when: str) -> None:
        """Call the hook; an exception before a step replaces the step.

        Args:
            name: The name of the step.
            when: ``before`` or ``after``.
        """
        ...


Committed = Callable[[dict[str, list[str]], bool], None]
"""Told after each COMMIT which keys each table has, and whether that is to be durable now."""


class Steps:
    """The steps of this process in a directory.

    Only one step runs at a time, so a waiting hook stops all other steps.

    Args:
        root: The directory, absolute.
        hook: Called at each step.
        committed: Called with the contents of the catalog after each COMMIT.
        without: The calls to leave out: ``syncfs``, which makes files durable; SQLite's ``fsync``.
    """

    def __init__(
        self, root: Path, hook: Hook, committed: Committed, without: frozenset[str]
    ) -> None:
        self.root = os.fspath(root)
        self.hook = hook
        self.committed = committed
        self.without = without
        self.lock = threading.RLock()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        with self.lock:
            self.hook(name, "before")
            yield
            self.hook(name, "after")

    def kind(self, path: object, dir_fd: int | None = None) -> str | None:
        """Return the kind of a file; ``None`` if the file is not part of the store."""
        try:
            whole = self._whole(path, dir_fd)
        except OSError:
            return None
        if whole == os.path.dirname(self.root):
            return "parent"
        if whole == self.root:
            return "."
        if not whole.startswith(self.root + "/"):
            return None
        top, _, rest = whole.removeprefix(self.root + "/").partition("/")
        if not rest:
            return top.replace("catalog.sqlite", "catalog")
        if top == "leases":
            return "lease file"
        if top == "ingest":
            name, _, inner = rest.partition("/")
            if match := _HELD.fullmatch(name):
                what = _WHAT.get(match[1], match[1])
                return f"in {what}" if inner else what
            match = _BLOB.fullmatch(name)
            return match[1] if match else name
        _, _, name = rest.partition("/")
        name, _, inner = name.partition("/")
        if not name:
            return f"{top}/sha256"
        return f"in {top}/X" if inner else f"{top}/X"

    @staticmethod
    def _whole(path: object, dir_fd: int | None) -> str:
        if isinstance(path, int):
            return os.readlink(f"/proc/self/fd/{path}")
        text = os.fsdecode(path)  # type: ignore[arg-type]
        if match := re.fullmatch("/proc/self/fd/([0-9]+)", text):
            return os.readlink(f"/proc/self/fd/{match[1]}")
        if not os.path.isabs(text):
            base = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            text = os.path.join(base, text)
        return os.path.normpath(text)


def install(steps: Steps) -> None:
    """Send all of the process's steps through ``steps``."""
    _watch_calls(steps)
    _watch_opening(steps)
    _watch_sync(steps)
    _watch_catalog(steps)


def _watch_calls(steps: Steps) -> None:
    for name in (
        *("mkdir", "rmdir", "unlink", "remove", "mknod", "mkfifo", "truncate", "ftruncate"),
        *("chmod", "fchmod", "chown", "fchown", "lchown", "utime", "setxattr", "removexattr"),
        *("fsync", "fdatasync", "write", "pwrite", "writev"),
    ):
        setattr(os, name, _call_on_one(steps, name, getattr(os, name)))
    for name in ("rename", "replace", "link"):
        setattr(os, name, _call_on_two(steps, name, getattr(os, name)))

    symlink = os.symlink

    def watched_symlink(target: object, path: object, *rest: object, **options: object) -> None:
        kind = steps.kind(path, options.get("dir_fd"))
        if kind is None:
            return symlink(target, path, *rest, **options)
        with steps.step(f"symlink {kind}"):
            return symlink(target, path, *rest, **options)

    os.symlink = watched_symlink


def _call_on_one(steps: Steps, name: str, real: Callable) -> Callable:
    def call(path: object, *rest: object, **options: object) -> object:
        kind = steps.kind(path, options.get("dir_fd"))
        if kind is None:
            return real(path, *rest, **options)
        with steps.step(f"{name} {kind}"):
            return real(path, *rest, **options)

    return call


def _call_on_two(steps: Steps, name: str, real: Callable) -> Callable:
    def call(source: object, target: object, **options: object) -> object:
        old = steps.kind(source, options.get("src_dir_fd"))
        new = steps.kind(target, options.get("dst_dir_fd"))
        if old is None and new is None:
            return real(source, target, **options)
        with steps.step(f"{name} {old} -> {new}"):
            return real(source, target, **options)

    return call


def _watch_opening(steps: Steps) -> None:
    real_open, real_file, real_io = os.open, io.FileIO, io.open

    def watched_open(path: object, flags: int, mode: int = 0o777, *, dir_fd: int | None = None):
        kind = steps.kind(path, dir_fd)
        if kind is None or not flags & (_WRITING | os.O_CREAT) or flags & os.O_PATH:
            return real_open(path, flags, mode, dir_fd=dir_fd)
        with steps.step(f"open {kind}"):
            return real_open(path, flags, mode, dir_fd=dir_fd)

    class WatchedFile(real_file):
        def __init__(self, path: object, mode: str = "r", *rest: object, **options: object) -> None:
            self._kind = steps.kind(path) if set(mode) & set("wax+") else None
            if self._kind is None or options.get("opener") is not None:
                # With an opener, the file is opened by the replaced `os.open`.
                super().__init__(path, mode, *rest, **options)
                return
            with steps.step(f"open {self._kind}"):
                super().__init__(path, mode, *rest, **options)

        def write(self, data: object) -> int:
            if self._kind is None:
                return super().write(data)
            with steps.step(f"write {self._kind}"):
                return super().write(data)

        def truncate(self, size: int | None = None) -> int:
            if self._kind is None:
                return super().truncate(size)
            with steps.step(f"truncate {self._kind}"):
                return super().truncate(size)

    def watched_io(path: object, mode: str = "r", *rest: object, **options: object):
        if set(mode) & set("wax+") and "b" in mode and steps.kind(path) is not None:
            return io.BufferedWriter(WatchedFile(path, mode.replace("b", "")))
        return real_io(path, mode, *rest, **options)

    os.open = watched_open
    io.FileIO = WatchedFile
    io.open = builtins.open = watched_io


def _watch_sync(steps: Steps) -> None:
    real = files._syncfs()
    assert real is not None

    def watched(descriptor: int) -> int:
        try:
            with steps.step("syncfs"):
                return 0 if "syncfs" in steps.without else real(descriptor)
        except OSError as error:
            ctypes.set_errno(error.errno or 0)
            return -1

    def asked() -> Callable[[int], int]:
        # This step comes before the store opens its descriptor, which gets only later failures
        # reported.
        with steps.step("look for syncfs"):
            return watched

    files._syncfs = asked


def _watch_catalog(steps: Steps) -> None:
    class Watched(connection._Connection):
        def __init__(self, *arguments: object, **options: object) -> None:
            with steps.step("open catalog"):
                super().__init__(*arguments, **options)
            self.full = True
            self.tables = set[str]()

        def execute(self, statement: str, *rest: object) -> sqlite3.Cursor:
            if match := _WRITES.match(statement):
                self.tables.add("schema" if match[1] else match[2])
            if statement.startswith("PRAGMA synchronous"):
                self.full = "FULL" in statement
                if "fsync" in steps.without:
                    statement = "PRAGMA synchronous = OFF"
            if statement == "COMMIT":
                return self._commit(statement)
            if statement.startswith(("BEGIN", "ROLLBACK", "PRAGMA journal_mode")):
                with steps.step(statement):
                    self.tables.clear()
                    return super().execute(statement, *rest)
            return super().execute(statement, *rest)

        def executemany(self, statement: str, *rest: object) -> sqlite3.Cursor:
            if match := _WRITES.match(statement):
                self.tables.add(match[2])
            return super().executemany(statement, *rest)

        def close(self) -> None:
            with steps.step("close catalog"):
                super().close()

        def _commit(self, statement: str) -> sqlite3.Cursor:
            tables = "schema" if "schema" in self.tables else ",".join(sorted(self.tables))
            noted = "" if self.full else " (noted)"
            with steps.step(f"COMMIT {tables or 'nothing'}{noted}"):
                done = super().execute(statement)
                steps.committed(keys_of(self), self.full)
                return done

    connection._Connection = Watched


def keys_of(connection: sqlite3.Connection) -> dict[str, list[str]]:
    """Return the keys in a catalog, by table."""
    run = lambda statement: sqlite3.Connection.execute(connection, statement)  # noqa: E731
    return {
        "blobs": [row[0] for row in run("SELECT digest FROM blobs")],
        "trees": [row[0] for row in run("SELECT id FROM trees")],
        "layers": [row[0] for row in run("SELECT chain_id FROM layers")],
        "images": [row[0] for row in run("SELECT manifest FROM images")],
        "references": [
            f"{reference} {platform} {manifest}"
            for reference, platform, manifest in run(
                "SELECT reference, platform, manifest FROM image_references"
            )
        ],
    }
