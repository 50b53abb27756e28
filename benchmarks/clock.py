"""Measures the time of each stage in a Python process, from its start to its end.

`benchmarks.stages` installs this by ``sitecustomize`` in the processes that it measures. In a pull,
a few functions of the standard library and of the decompressors take most of the time. Each is
replaced by a function that adds up the time of its calls, on the wall and on the thread's CPU
clock. The rest is Python. The replacement makes a call about a microsecond slower.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from isal import igzip_lib, isal_zlib

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FUNCTIONS = {
    "create files": "open mkdir mknod mkfifo symlink link",
    "write": "write writev pwrite posix_fallocate",
    "read": "read pread readv preadv",
    "set metadata": "utime chown fchown lchown chmod fchmod setxattr",
    "look at files": "stat lstat fstat listdir scandir readlink getxattr listxattr",
    "close": "close",
    "rename, remove": "rename replace unlink rmdir remove",
    "sync": "fsync fdatasync sync syncfs",
}
SOCKETS = "recv recv_into recvmsg recvmsg_into send sendall sendmsg connect"

Spent = dict[tuple[str, bool], list[float]]
"""Calls, CPU seconds and wall seconds, by stage and whether in the main thread."""

_spent: dict[int, Spent] = {}  # by thread, so no lock is needed
_threads = ("main", "others")  # names of the main thread and the others in reports
_original_exit = os._exit
_rename = os.rename


def install(directory: str) -> None:
    """Start measuring; write the figures to the directory when the process ends."""
    os.register_at_fork(after_in_child=_spent.clear)
    for stage, names in FUNCTIONS.items():
        for name in names.split():
            if (function := getattr(os, name, None)) is not None:
                _replace(os, name, _timed(stage, function))
    for name in SOCKETS.split():
        setattr(socket.socket, name, _timed("sockets", getattr(socket.socket, name)))
    original_new = hashlib.new
    hashlib.sha256 = lambda *a, **k: _Proxy("sha256", original_new("sha256", *a, **k), "update")
    hashlib.new = lambda *a, **k: _Proxy("sha256", original_new(*a, **k), "update")
    for module, name in (
        (igzip_lib, "IgzipDecompressor"),
        (isal_zlib, "decompressobj"),
        (zstd, "ZstdDecompressor"),
    ):
        setattr(module, name, _maker("inflate", getattr(module, name), "decompress"))
    _replace(isal_zlib, "crc32", _timed("crc32", isal_zlib.crc32))
    _time_syncfs()
    _time_sqlite()
    _reach_workers(directory)
    atexit.register(_write, directory)
    os._exit = lambda status: (_write(directory), _original_exit(status))  # type: ignore


def _replace(module: Any, name: str, function: Callable[..., Any]) -> None:
    original = getattr(module, name)
    for supports in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
        if original in supports:
            supports.add(function)
    setattr(module, name, function)


def _timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
            thread = threading.get_ident()
            main = thread == threading.main_thread().ident
            mine = _spent.setdefault(thread, {}).setdefault((stage, main), [0, 0.0, 0.0])
            mine[0] += 1
            mine[1] += cpu
            mine[2] += wall

    return timed


class _Proxy:
    """A proxy of an object with one timed method."""

    def __init__(self, stage: str, wrapped: Any, method: str) -> None:
        self._wrapped = wrapped
        setattr(self, method, _timed(stage, getattr(wrapped, method)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


def _maker(stage: str, make: Callable[..., Any], method: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: _Proxy(stage, make(*args, **kwargs), method)


def _time_syncfs() -> None:
    original = ctypes.CDLL.__getattr__

    def getattr_(self: ctypes.CDLL, name: str) -> Any:
        function = original(self, name)
        return _timed("sync", function) if name == "syncfs" else function

    ctypes.CDLL.__getattr__ = getattr_  # type: ignore


def _time_sqlite() -> None:
    class Timed(sqlite3.Connection):
        pass

    for name in ("execute", "executemany", "executescript", "commit"):
        setattr(Timed, name, _timed("sqlite", getattr(sqlite3.Connection, name)))
    original = sqlite3.connect
    sqlite3.connect = lambda *args, **kwargs: original(*args, **{"factory": Timed, **kwargs})


def _reach_workers(directory: str) -> None:
    """Measure the library's workers, too, although they read no ``sitecustomize``."""
    original = subprocess.Popen.__init__
    load = "from trio_layers._workers import program\n"
    count = (
        f"from benchmarks import clock\nclock.install({directory!r})\n"
        f"{load}clock.watch_worker(program, {directory!r})\n"
    )

    @functools.wraps(original)
    def start(self: Any, arguments: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(arguments, list):
            arguments = [each.replace(load, count) for each in map(os.fsdecode, arguments)]
        original(self, arguments, *args, **kwargs)

    subprocess.Popen.__init__ = start  # type: ignore


def watch_worker(worker: Any, directory: str) -> None:
    """Write the figures at each message, because an idle worker is killed."""
    global _threads
    _threads = ("worker", "its ahead")
    original = worker._send

    def send(*args: Any) -> None:
        _write(directory)
        original(*args)

    worker._send = send


def _write(directory: str) -> None:
    total, main = time.process_time(), time.thread_time()
    first, second = _threads
    stages: dict[str, dict[str, list[float]]] = {first: {}, second: {}}
    for spent in list(_spent.values()):
        for (stage, in_main), figures in spent.items():
            sums = stages[first if in_main else second].setdefault(stage, [0, 0.0, 0.0])
            sums[:] = [a + b for a, b in zip(sums, figures, strict=True)]
    for thread, cpu in ((first, main), (second, total - main)):
        rest = cpu - sum(figures[1] for figures in stages[thread].values())
        stages[thread]["Python, all the rest"] = [0, max(rest, 0.0), 0.0]
    # A new name makes the file complete, even if the process is killed meanwhile.
    path = f"{directory}/{os.getpid()}"
    with open(path, "w") as file:
        json.dump(stages, file)
    _rename(path, f"{path}.json")
