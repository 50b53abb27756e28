"""A process without root that mounts in its own user namespace; test_mount runs it."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import attrs
import trio
from _tools.layer_stacks import on_disk
from pull.mounting import fill

from trio_layers import Entry, MountError, open_store

NOBODY = 65534
PR_SET_DUMPABLE = 4
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


def shown(entries: list[Entry]) -> list[Entry]:
    """Return the files that an unprivileged user can keep on a disk, with this user as owner."""
    return [
        attrs.evolve(
            entry,
            uid=0,
            gid=0,
            mode=entry.mode
            if entry.type == "symlink"
            else entry.mode & 0o1777 | (0o700 if entry.type == "dir" else 0o600),
            xattrs={k: v for k, v in entry.xattrs.items() if k != "user.containers.override_stat"},
        )
        for entry in entries
    ]


async def mount(store: str) -> None:
    async with open_store(store) as opened:
        view = await opened.rootfs(await fill(opened))
        entries = shown(await view.walk())
        for writable in (False, True):
            async with view.mount(writable=writable) as path:
                same = shown(on_disk(path)) == entries
                print(
                    "writable" if writable else "read-only", "same" if same else "differs", sep=": "
                )
                if writable:
                    (path / "keep" / "b").write_bytes(b"changed")
                    print("written:", (path / "keep" / "b").read_bytes())


def refused(store: str) -> None:
    try:
        trio.run(mount, store)
    except MountError as error:
        print(f"MountError: {error}", flush=True)


def enter_namespace() -> None:
    """Enter a user namespace as its root, with a mount namespace that belongs to it."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    # After a change of its user, a process does not own its files in /proc.
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
        print(f"no user namespace ({os.strerror(ctypes.get_errno())})")
        sys.exit(77)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def in_child(function: object, *args: str) -> int:
    """Run in a forked child, since only a process with one thread may enter a user namespace, and
    trio's threads linger.
    """
    if (child := os.fork()) == 0:
        status = 1
        try:
            function(*args)
            status = 0
        except SystemExit as leaving:
            status = leaving.code
        finally:
            sys.stdout.flush()
            if status == 1:
                sys.excepthook(*sys.exc_info())
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def as_nobody(store: str) -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    refused(store)


def in_namespace(store: str) -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    enter_namespace()
    trio.run(mount, store)


if __name__ == "__main__":
    [directory] = sys.argv[1:]
    for function in (as_nobody, in_namespace):
        status = in_child(function, f"{directory}/{function.__name__}")
        if status:
            sys.exit(status)
