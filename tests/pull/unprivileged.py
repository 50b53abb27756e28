"""A process that gives up root, and pulls an image; test_unprivileged runs it."""

from __future__ import annotations

import json
import logging
import os
import sys

import httpx
import trio

from trio_layers import Entry, open_puller


async def pull(store: str, reference: str, client: httpx.AsyncClient) -> list[Entry]:
    async with open_puller(store, client=client) as puller, puller.pull(reference) as image:
        assert b"Sample" in await image.rootfs.read_bytes("/etc/os-release")
        return await image.rootfs.walk()


if __name__ == "__main__":
    roots, users, reference = sys.argv[1:]
    # An unprivileged user may be unable to start the interpreter. Then the store logs a warning and
    # uses threads.
    logging.getLogger("trio_layers").setLevel(logging.ERROR)
    clients = [httpx.AsyncClient(verify=False) for _ in range(3)]
    # The first pull runs as root, so that all modules are imported: others may be unable to read
    # them.
    trio.run(pull, roots, reference, clients[0])
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    for client in clients[1:]:
        entries = trio.run(pull, users, reference, client)
    for entry in entries:
        print(json.dumps([entry.path.decode(), entry.type, entry.mode, entry.uid, entry.gid]))
