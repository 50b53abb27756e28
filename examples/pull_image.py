"""Pull an image, and list its layers and files.

    python examples/pull_image.py [REF] [--store DIR]

Without REF, the example starts a registry on loopback with a small image. Without --store, it uses
a temporary directory. Progress is shown on stderr: as bars on a terminal, otherwise as lines.
"""

from __future__ import annotations

import argparse
import stat
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from trio_layers import Entry, open_display, open_puller
from trio_layers.testing import open_registry, sample_image

TYPES = {
    "file": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
    "socket": stat.S_IFSOCK,
}


@asynccontextmanager
async def open_sample_registry() -> AsyncIterator[str]:
    async with open_registry() as registry:
        yield registry.add(sample_image(), "library/demo:latest")


async def main(reference: str | None, store: str) -> None:
    async with AsyncExitStack() as stack:
        if reference is None:
            reference = await stack.enter_async_context(open_sample_registry())
        puller = await stack.enter_async_context(open_puller(store))
        async with open_display() as progress:
            image = await stack.enter_async_context(puller.pull(reference, progress=progress))

        print(f"{image.reference} for {image.platform}\n{image.digest}\n")
        # The image cannot be deleted from the store until the stack closes its pull.
        for layer in image.layers:
            print(f"layer {layer.descriptor.digest}  {layer.descriptor.size} bytes")
            print(f"    = {layer.diff_id} unpacked")
        print()
        for entry in await image.rootfs.walk():
            print(line_of(entry))


def line_of(entry: Entry) -> str:
    """Format an entry like ``ls -l``."""
    mode = stat.filemode(TYPES.get(entry.type, 0) | entry.mode)
    owner = f"{entry.uid}:{entry.gid}"
    modified = time.strftime("%Y-%m-%d %H:%M", time.gmtime(entry.mtime_ns // 10**9))
    path = "/" + entry.path.decode(errors="backslashreplace")
    if entry.linkname is not None:
        path += f" -> {entry.linkname.decode(errors='backslashreplace')}"
    return f"{mode} {owner:>9} {entry.size:>9} {modified} {path}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pull an image, and list its layers and files.")
    parser.add_argument("reference", metavar="REF", nargs="?", help="reference, such as debian:12")
    parser.add_argument("--store", metavar="DIR", help="directory of the store")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        trio.run(main, arguments.reference, arguments.store or f"{temporary}/store")
