"""Runs cases in children with less privilege: a plain user, and roots of user namespaces.

One child for each mode runs all its cases, a line of JSON each. It imports everything before it
gives up root, since only root may be able to read the interpreter's directory.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

from tree.case_runner import Privilege, check_readable, run_case

NOBODY = 65534
FIRST, RANGE = 100_000, 65536

MODES = {
    "unprivileged": Privilege(known=0, root=False),
    # A namespace with one ID, as a plain user can make it, and one with a range, as newuidmap does.
    "userns": Privilege(known=1, root=True),
    "userns-range": Privilege(known=RANGE, root=True),
}

_NEW_USER, _NEW_MOUNT = 0x10000000, 0x00020000
_SET_DUMPABLE = 4


class Refused(Exception):
    """The kernel refuses to make such a process."""


class Died(Exception):
    """The child has ended without a result for its case."""


class Child:
    """A process with less privilege and its own directory."""

    def __init__(self, mode: str, base: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tree.modes", mode, str(base)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )
        try:
            ready = self._receive()
            if ready == "unshared":
                self._map_range()
                ready = self._receive()
            if ready != "ready":
                raise Refused(ready)
        except BaseException:
            self.close()
            raise

    def _map_range(self) -> None:
        try:
            for kind in ("uid", "gid"):
                Path(f"/proc/{self.process.pid}/{kind}_map").write_text(f"0 {FIRST} {RANGE}\n")
        except OSError as error:
            raise Refused(f"{kind}_map: {error.strerror}") from error
        self._send("mapped")

    def run(self, case: dict) -> str:
        """What is wrong; an empty text if nothing is.

        Raises:
            Died: If the child dies. It cannot be used again.
        """
        self._send(case)
        return self._receive()

    def close(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            # The buffer of a dead child's pipe may not be empty.
            self.process.stdin.close()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _send(self, value: object) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(value) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _receive(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise self._died()
        text = json.loads(line)
        assert isinstance(text, str)
        return text

    def _died(self) -> Died:
        return Died(f"the child has died; its return code is {self.process.wait()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def start_child(mode: str) -> Iterator[Child]:
    """Start a child in its own directory, which every user can reach.

    Raises:
        Refused: If the kernel refuses to make such a child.
    """
    base = Path(tempfile.mkdtemp(prefix="trio-layers-"))
    owner = FIRST if mode == "userns-range" else NOBODY
    os.chown(base, owner, owner)
    try:
        with Child(mode, base) as child:
            yield child
    finally:
        shutil.rmtree(base)


class Children:
    """One child for each mode, started for the first case and again after a child died."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._children: dict[str, Child | Refused] = {}

    def run(self, mode: str, case: dict) -> str:
        """Run a case in the mode's child, as `Child.run` does.

        Raises:
            Died: If the child dies.
            Refused: If the kernel refuses to make such a child.
        """
        child = self[mode]
        try:
            return child.run(case)
        except Died:
            del self._children[mode]
            raise

    def __getitem__(self, mode: str) -> Child:
        if mode not in self._children:
            try:
                self._children[mode] = self._stack.enter_context(start_child(mode))
            except Refused as refused:
                self._children[mode] = refused
        child = self._children[mode]
        if isinstance(child, Refused):
            raise child
        return child


def drop_privilege(mode: str) -> None:
    """Give up the privileges that the mode does not have."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *args: int) -> None:
        if getattr(libc, name)(*args) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), name)

    os.setgroups([])
    if mode == "userns-range":
        call("unshare", _NEW_USER | _NEW_MOUNT)
        send_answer("unshared")
        sys.stdin.readline()
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        return
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    if mode == "userns":
        # A process that changed its user may not write its own /proc unless it is dumpable.
        call("prctl", _SET_DUMPABLE, 1, 0, 0, 0)
        call("unshare", _NEW_USER | _NEW_MOUNT)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {NOBODY} 1\n")
        Path("/proc/self/gid_map").write_text(f"0 {NOBODY} 1\n")


def send_answer(text: str) -> None:
    print(json.dumps(text), flush=True)


def main(mode: str, base: Path) -> None:
    try:
        drop_privilege(mode)
    except OSError as error:
        send_answer(f"{error.filename or 'unshare'}: {error.strerror}")
        return
    os.umask(0o22)
    send_answer("ready")
    for number, line in enumerate(sys.stdin):
        where = base / str(number)
        where.mkdir()
        try:
            run_case(json.loads(line), where, MODES[mode])
            check_readable(where)
            shutil.rmtree(where)
        except Exception:
            send_answer(traceback.format_exc())
        else:
            send_answer("")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
