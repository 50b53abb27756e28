"""Cases in child processes with less privilege: a plain user, and roots of user namespaces.

One child for each way runs all cases it is sent, a line of JSON each. It has imported all it
needs before it gives up root: the interpreter may be in a directory that only root reads.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from layers.running import Privilege, run_case, within_reach

NOBODY = 65534
FIRST, RANGE = 100_000, 65536

MODES = {
    "unprivileged": Privilege(known=0, root=False),
    # Of one ID, its own, as a plain user can make it; and of a range, as newuidmap does.
    "userns": Privilege(known=1, root=True),
    "userns-range": Privilege(known=RANGE, root=True),
}

_NEW_USER, _NEW_MOUNT = 0x10000000, 0x00020000
_SET_DUMPABLE = 4
# No case blocks; one that does is stopped. Long, since a machine may be busy with other things.
_SECONDS = 600


class Refused(Exception):
    """The kernel does not let us make such a process."""


class Child:
    """A process with less privilege, and a directory of its own."""

    def __init__(self, mode: str, base: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "layers.modes", mode, str(base)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )
        if mode == "userns-range":
            self._receive()
            for kind in ("uid", "gid"):
                Path(f"/proc/{self._process.pid}/{kind}_map").write_text(f"0 {FIRST} {RANGE}\n")
            self._send("mapped")
        ready = self._receive()
        if ready != "ready":
            raise Refused(ready)

    def run(self, case: dict) -> str:
        """What is wrong; an empty text if nothing is."""
        self._send(case)
        return self._receive()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _send(self, value: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the child ended with {self._process.wait()}")
        answer = json.loads(line)
        assert isinstance(answer, str)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def running(mode: str) -> Iterator[Child]:
    """A child, in a directory that everyone can reach and that is its own.

    Raises:
        Refused: if the kernel has no such thing.
    """
    base = Path(tempfile.mkdtemp(prefix="trio-layers-"))
    owner = FIRST if mode == "userns-range" else NOBODY
    os.chown(base, owner, owner)
    try:
        with Child(mode, base) as child:
            yield child
    finally:
        shutil.rmtree(base)


def become(mode: str) -> None:
    """Give up what the mode does not have."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *args: int) -> None:
        if getattr(libc, name)(*args) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), name)

    os.setgroups([])
    if mode == "userns-range":
        call("unshare", _NEW_USER | _NEW_MOUNT)
        answer("unshared")
        sys.stdin.readline()
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        return
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    if mode == "userns":
        # What became somebody else may not write its own /proc, unless it may be traced.
        call("prctl", _SET_DUMPABLE, 1, 0, 0, 0)
        call("unshare", _NEW_USER | _NEW_MOUNT)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {NOBODY} 1\n")
        Path("/proc/self/gid_map").write_text(f"0 {NOBODY} 1\n")


def answer(text: str) -> None:
    print(json.dumps(text), flush=True)


def main(mode: str, base: Path) -> None:
    try:
        become(mode)
    except OSError as error:
        answer(f"{error.filename or 'unshare'}: {error.strerror}")
        return
    os.umask(0o22)
    answer("ready")
    for number, line in enumerate(sys.stdin):
        signal.alarm(_SECONDS)
        where = base / str(number)
        where.mkdir()
        try:
            run_case(json.loads(line), where, MODES[mode])
            within_reach(where)
            shutil.rmtree(where)
        except Exception:
            answer(traceback.format_exc())
        else:
            answer("")
        signal.alarm(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
