"""A process that gives up root, and stores a layer; test_unpacking runs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import trio
from store.test_unpacking import IMPLYING, PRIVATE, register

from trio_layers._store.directory import open_with_builder
from trio_layers._tar.limits import Limits
from trio_layers._workers.threads import Threads


async def main(path: Path) -> None:
    async with open_with_builder(path, Threads(Limits())) as store:
        await register(store, PRIVATE, IMPLYING)
    async with open_with_builder(path, Threads(Limits())) as store:
        top = await register(store, PRIVATE, IMPLYING)
        rootfs = await store.rootfs(top.chain_id)
        assert await rootfs.read_bytes("/etc/group") == b"wheel"


if __name__ == "__main__":
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    trio.run(main, Path(sys.argv[1]))
    print("done")
