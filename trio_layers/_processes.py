"""Identities of processes with an open store, across containers and machines.

A lock usually shows whether its holder lives, with two exceptions: a program that cleans temporary
directories can remove the lock file, and virtual machines that share a directory may each see
their own locks only. The store then searches for the process itself.

All functions block, so call them in worker threads.
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

# PROC_PID_INIT_INO of the kernel's proc_ns.h: this namespace shows all processes.
FIRST_PID_NAMESPACE: Final = 0xEFFFFFFC


@final
@attrs.frozen
class Process:
    """A process with an open store, on any machine.

    Attributes:
        machine: The machine's ID (machine-id(5)); empty if it has none.
        boot: The ID of its boot.
        namespace: The inode of the process's PID namespace.
        pid: The process ID in this namespace.
        start: The start of the process, in ticks since the boot.
        since: The time at which the process opened the store, in seconds since 1970.
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
        """Decode the result of `encode`; return ``None`` for any other value."""
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
        """Judge from this process whether the other still has the store open.

        Args:
            unlocked: Whether its lock file exists, and this process sees no lock on it.
        """
        here = type(self).current()
        if not self.boot or self.boot != here.boot:
            # A process of this machine ended with its boot. Other machines may share the directory,
            # so their processes may be alive.
            return "dead" if self.machine and self.machine == here.machine else "unknown"
        if unlocked:
            return "dead"  # both processes run on one kernel, and so see the same locks
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
    """Return a process's start time (proc_pid_stat(5), field 22), or ``None``.

    ``None`` means that no such process is running.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name, in parentheses, can contain any byte, so parsing starts after it.
            fields = file.read().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    return None


def _line_of(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except (OSError, ValueError):
        return ""
