"""Processes that have a store open, told apart across processes, containers and machines.

A lock tells whether its holder lives, but not all the time: a program that cleans temporary
directories removes the lock's file, and where virtual machines share a directory each may see its
own locks only. Then the process itself is looked for. Blocking: for worker threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Final, Literal, Self, TypeAlias, final

import attrs

__all__ = ["FIRST_PID_NAMESPACE", "Fate", "Process", "boot_id", "pid_namespace"]

Fate: TypeAlias = Literal["alive", "dead", "unknown"]

# PROC_PID_INIT_INO of the kernel's proc_ns.h: from there, all processes are to be seen.
FIRST_PID_NAMESPACE: Final = 0xEFFFFFFC


@final
@attrs.frozen
class Process:
    """A process of some machine.

    Attributes:
        machine: The machine's ID (machine-id(5)); empty if it has none.
        boot: The ID of its boot.
        namespace: The inode of the process's PID namespace.
        pid: Its number there.
        start: When it was started, in ticks since the boot.
        since: When it opened the store, in seconds since 1970.
    """

    machine: str
    boot: str
    namespace: int
    pid: int
    start: int
    since: float

    @classmethod
    def current(cls) -> Self:
        return cls(
            machine=_line_of("/etc/machine-id"),
            boot=boot_id(),
            namespace=pid_namespace(),
            pid=os.getpid(),
            start=_start_of("self") or 0,
            since=time.time(),
        )

    @classmethod
    def decode(cls, text: str | bytes | None) -> Self | None:
        """What `encode` gave; ``None`` for anything else."""
        try:
            return cls(**json.loads(text or ""))
        except (ValueError, TypeError):
            return None

    def encode(self) -> str:
        return json.dumps(attrs.asdict(self))

    @property
    def is_current(self) -> bool:
        here = type(self).current()
        return attrs.evolve(self, since=0) == attrs.evolve(here, since=0)

    def fate(self, *, unlocked: bool) -> Fate:
        """Whether the process still has the store open, as far as can be told from here.

        Args:
            unlocked: Whether its lock's file is there, and is not locked as seen from here.
        """
        here = type(self).current()
        if not self.boot or self.boot != here.boot:
            # Of the same machine, it ended with the boot. Others may share the directory.
            return "dead" if self.machine and self.machine == here.machine else "unknown"
        if unlocked:
            return "dead"  # one kernel, one set of locks
        if self.namespace != here.namespace:
            return "unknown"
        return "alive" if _start_of(str(self.pid)) == self.start else "dead"


def boot_id() -> str:
    return _line_of("/proc/sys/kernel/random/boot_id")


def pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _start_of(pid: str) -> int | None:
    """When a process was started (proc_pid_stat(5), field 22); ``None`` if there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open(f"/proc/{pid}/stat", "rb") as file:
            # Its name, in parentheses, may hold anything.
            fields = file.read().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    return None


def _line_of(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except (OSError, ValueError):
        return ""
