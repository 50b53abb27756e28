"""Finds the child processes of a process."""

from __future__ import annotations

import os

__all__ = ["list_children"]


def list_children(pid: int) -> set[int]:
    """Return the IDs of a process's children, including those that have ended unreaped.

    Each process names its parent. The files ``/proc/PID/task/TID/children`` would be fewer, but
    proc(5) calls them unreliable unless all children are stopped, and each goes with its thread.
    """
    found = set()
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # The name of the program is in parentheses, and may contain any character.
                state_and_parent = file.read().rpartition(b")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process has ended
        if int(state_and_parent[1]) == pid:
            found.add(int(name))
    return found
