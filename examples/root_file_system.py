"""Read files of an image, list its largest files, export it and mount it.

    python examples/root_file_system.py [REF] [--store DIR]

Without REF, the example starts a registry on loopback with a small image. Without --store, it uses
a temporary directory. An image in the store is not pulled again. Only the mount needs root.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import trio

from trio_layers import MountError, RootfsView, open_puller
from trio_layers.testing import open_registry, sample_image


@asynccontextmanager
async def open_sample_registry() -> AsyncIterator[str]:
    async with open_registry() as registry:
        yield registry.add(sample_image(), "library/demo:latest")


async def main(reference: str | None, directory: Path, store: Path) -> None:
    async with AsyncExitStack() as stack:
        if reference is None:
            reference = await stack.enter_async_context(open_sample_registry())
        puller = await stack.enter_async_context(open_puller(store))
        image = await stack.enter_async_context(puller.pull(reference, policy="missing"))
        print(image.reference, image.digest)
        await read_files(image.rootfs)
        await export(image.rootfs, directory)
        try:
            async with image.rootfs.mount() as path:
                print(f"\nmounted on {path}:", *sorted(name.name for name in path.iterdir()))
        except MountError as error:
            print(f"\n{error}")


async def read_files(rootfs: RootfsView) -> None:
    """Read files without a mount or a container; links stay inside the image."""
    if await rootfs.exists("/etc/os-release"):
        print((await rootfs.read_bytes("/etc/os-release")).decode(errors="replace"))
    files = [entry for entry in await rootfs.walk() if entry.type == "file"]
    for entry in sorted(files, key=lambda entry: entry.size)[-5:]:
        async with rootfs.open(entry.path) as file:
            start = await file.read(16)
        print(f"{entry.size:>10}  {entry.path!r} begins with {start!r}")


async def export(rootfs: RootfsView, directory: Path) -> None:
    """Export to a directory, and to a tar, which keeps owners and devices without root."""
    report = await rootfs.export(directory / "rootfs")
    print(
        f"\n{report.entries} paths exported", "" if report.complete else f"({report})", flush=True
    )
    tar = await trio.lowlevel.open_process(
        ["tar", "--list", "--verbose", "--numeric-owner"], stdin=subprocess.PIPE
    )
    assert tar.stdin is not None
    async with tar.stdin:
        await rootfs.export_tar(tar.stdin)
    await tar.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Read, export and mount an image's files.")
    parser.add_argument("reference", metavar="REF", nargs="?", help="reference, such as debian:12")
    parser.add_argument("--store", metavar="DIR", type=Path, help="directory of the store")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        trio.run(main, arguments.reference, directory, arguments.store or directory / "store")
