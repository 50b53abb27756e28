"""A process that pulls on request, and is broken during the pull.

It serves one request after the other, each in a fork of its own, so that the slow import of the
library happens once. Requests come as lines of JSON on its standard input. Its reports are lines of
JSON on its standard output: ``{"at": ...}`` at a step where the child waits for a line to go on,
``{"durable": ...}`` after each COMMIT, ``{"pulled": ...}``, ``{"failed": ...}``, and at last
``{"ended": ...}`` from the waiting parent.

A request has:

- ``path``: the store; ``pulls``: references, each with files and their digests; with none, the
  reference is removed instead, and the garbage collected;
- ``workers``: whether layers are unpacked in processes, or in threads, whose steps count too;
- ``attempts``: tries for each download; ``again``: if a pull fails, the fault ends, and the pull is
  tried once more with the same open store;
- ``mode``: the action at the steps, see `Hooks`; with ``name``, ``nth``, ``when``, ``errno``;
- ``kill_after``: seconds after which it is killed, with its workers or without;
- ``without``: see `failpoints.Steps`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import sqlite3
import sys
import threading
from collections import Counter
from pathlib import Path

import trio
from _tools.processes import list_children
from crashes import failpoints

import trio_layers
from trio_layers._rootfs import mount  # noqa: F401
from trio_layers._tree import unpack  # noqa: F401

# The forks would load each part of the library anew.
for _name in trio_layers.__all__:
    getattr(trio_layers, _name)

_OUT = threading.Lock()


def say(**what: object) -> None:
    line = json.dumps(what).encode() + b"\n"
    with _OUT:
        while line:
            line = line[_WRITE(1, line) :]


# The original functions, before failpoints replace them.
_WRITE, _READ = os.write, os.read


def listen() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        piece = _READ(0, 1)
        if not piece:
            os._exit(3)
        line += piece
    return line


class Hooks:
    """The actions at a step, by ``mode``.

    - ``record``: it is counted;
    - ``kill``: at the ``nth`` step of this name the process kills itself, before or after it;
    - ``pause``: it is reported, and the process waits for a line that lets it go on;
    - ``once``, ``always``: instead of the ``nth`` step, or of all from then on, there is an error.
    """

    def __init__(self, request: dict) -> None:
        self.mode = request.get("mode", "record")
        self.name = request.get("name")
        self.nth = request.get("nth", 1)
        self.when = request.get("when", "before")
        self.errno = request.get("errno", errno.EIO)
        self.counts = Counter[str]()
        self.hit = 0

    def __call__(self, name: str, when: str) -> None:
        if when == "before":
            self.counts[name] += 1
        if self.mode == "pause":
            say(at=name, nth=self.counts[name], when=when)
            listen()
        if name != self.name:
            return
        if self.mode == "kill" and when == self.when and self.counts[name] == self.nth:
            os.kill(os.getpid(), signal.SIGKILL)
        if when == "after":
            return
        reached = self.counts[name] - self.nth
        if (self.mode == "once" and reached == 0) or (self.mode == "always" and reached >= 0):
            self.hit += 1
            raise failure(name, self.errno)


_OF_SQLITE = ("open catalog", "close catalog", "BEGIN", "COMMIT", "ROLLBACK", "PRAGMA")


def failure(name: str, number: int) -> Exception:
    text = f"injected: {os.strerror(number)}"
    if not name.startswith(_OF_SQLITE):
        return OSError(number, text)
    error = sqlite3.OperationalError(text)
    full = number in (errno.ENOSPC, errno.EDQUOT)
    read_only = "SQLITE_READONLY" if number == errno.EROFS else "SQLITE_IOERR"
    error.sqlite_errorname = "SQLITE_FULL" if full else read_only
    return error


async def attempt(puller: trio_layers.Puller, pulls: list) -> None:
    for reference, wanted in pulls:
        if wanted is None:
            await puller.store.remove(reference)
            await puller.store.collect()
            continue
        async with puller.pull(reference) as image:
            for path, digest in wanted.items():
                data = await image.rootfs.read_bytes(path)
                if hashlib.sha256(data).hexdigest() != digest:
                    raise AssertionError(f"{reference} has another {path}")
            say(pulled=reference)


def told(where: str, error: BaseException) -> None:
    kinds = [each.__name__ for each in type(error).__mro__]
    behind = getattr(error, "reason", None)
    if isinstance(behind, Exception):
        kinds += [each.__name__ for each in type(behind).__mro__]
    say(failed=where, kinds=kinds, text=str(error))


async def main(request: dict, hooks: Hooks) -> None:
    pulls, again = request["pulls"], request.get("again", False)
    try:
        async with trio_layers.open_puller(
            request["path"],
            retry_tick=0.001,
            max_download_attempts=request.get("attempts", 5),
        ) as puller:
            try:
                await attempt(puller, pulls)
            except Exception as error:
                told("pull", error)
                if again:
                    hooks.mode = "record"
                    try:
                        await attempt(puller, pulls)
                    except Exception as second:
                        told("again", second)
    except Exception as error:
        told("store", error)


def run(request: dict) -> None:
    if not request.get("workers"):
        sys.frozen = True
    hooks = Hooks(request)
    path = Path(request["path"])
    without = frozenset(request.get("without", ()))
    # Workers inherit nothing of this; with them only steps of this process count.
    failpoints.install(failpoints.Steps(path, hooks, committed, without))
    trio.run(main, request, hooks)
    say(counts=dict(hooks.counts), hit=hooks.hit)


def committed(keys: dict[str, list[str]], durable: bool) -> None:
    say(durable=durable, keys=keys)


def watch(child: int, request: dict) -> int:
    """Wait for the child's end, or kill it after a delay."""
    delay = request.get("kill_after")
    if delay is not None and signal.sigtimedwait([signal.SIGCHLD], delay) is None:
        workers = list_children(child) if request.get("kill_workers") else set()
        os.kill(child, signal.SIGKILL)
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def serve() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    say(ready=True)
    while True:
        request = json.loads(listen())
        while signal.sigtimedwait([signal.SIGCHLD], 0) is not None:
            pass  # the signal is from a child that has ended by itself
        child = os.fork()
        if child == 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            try:
                run(request)
            except BaseException as error:
                told("child", error)
                os._exit(1)
            os._exit(0)
        say(ended=watch(child, request))


if __name__ == "__main__":
    serve()
