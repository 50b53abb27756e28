"""An attacker that swaps a directory for a link while root writes below it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ATTACKER = 1234

SWAP = """
import ctypes, os, sys
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
one, two = map(os.fsencode, sys.argv[2:])
exchange = ctypes.CDLL(None).renameat2
print(flush=True)
while True:
    exchange(-100, one, -100, two, 2)
"""


def plant_link(base: Path, *, below: str = "", owner: int = ATTACKER) -> tuple[Path, Path, Path]:
    """Make an attacker's directory with a subdirectory and a link in it.

    The link leads to a victim's directory beside the attacker's. Return all three.
    """
    for parent in (base, *base.parents):
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(0o711)
    theirs, victim = base / "theirs", base / "victim"
    real, link = theirs / "real", theirs / "link"
    for path in (victim / below, real / below):
        path.mkdir(parents=True)
    link.symlink_to(victim)
    for path in (theirs, real, real / below):
        os.chown(path, ATTACKER, ATTACKER)
    os.chown(link, owner, owner, follow_symlinks=False)
    return real, link, victim


@contextmanager
def swapped(one: Path, two: Path) -> Iterator[None]:
    """Exchange two names repeatedly."""
    command = [sys.executable, "-c", SWAP, str(ATTACKER), str(one), str(two)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()
