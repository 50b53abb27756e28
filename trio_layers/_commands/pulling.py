"""The commands that pull images: pull, rootfs, cat and mount.

The result goes to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

import attrs
import trio

from .._errors import LayersError, StoreNotFound, StoreReadOnly, UnsupportedStore
from .._logins.lookup import LoginFiles
from .._nursery import open_hidden_nursery
from .._pull import Image, Puller, open_puller
from .._store.directory import DirectoryStore
from .messages import EXIT_FAILED
from .opening import enter_to_read, open_display_for
from .stdio import CHUNK, Stdout, print_error, print_line, print_warning, tar_on_stdout

__all__ = ["run_cat", "run_mount", "run_pull", "run_rootfs"]


async def run_pull(arguments: argparse.Namespace) -> int:
    """Pull all images at once.

    Layers that images share are downloaded once. If one image fails, the others are still pulled.
    """
    references: list[str] = arguments.references
    pulled: dict[int, Image] = {}
    failures: list[tuple[str, Exception]] = []

    async with (
        _open_puller(arguments) as puller,
        open_display_for(arguments) as progress,
        open_hidden_nursery() as nursery,
    ):

        async def pull(index: int, reference: str) -> None:
            try:
                async with puller.pull(
                    reference, platform=arguments.platform, progress=progress
                ) as image:
                    pulled[index] = image
            except (LayersError, OSError) as error:
                failures.append((reference, error))

        for index, reference in enumerate(references):
            nursery.start_soon(pull, index, reference)

    for _, image in sorted(pulled.items()):
        if arguments.json:
            await print_line(_as_json(image))
        else:
            await print_line(image.reference, image.platform, image.digest)
    for reference, error in failures:
        await print_error(error, reference)
    return EXIT_FAILED if failures else 0


async def run_rootfs(arguments: argparse.Namespace) -> int:
    stdout = tar_on_stdout() if arguments.destination == "-" else None
    async with _open_image(arguments) as image:
        if stdout is not None:
            await image.rootfs.export_tar(stdout)
            return 0
        report = await image.rootfs.export(
            arguments.destination, root_metadata=arguments.root_metadata
        )
    if not report.complete:
        missing = attrs.asdict(report, filter=lambda field, _: field.name != "entries")
        text = ", ".join(f"{count} {name}" for name, count in missing.items() if count)
        await print_warning(f"not set, for lack of privilege: {text.replace('_', '-')}")
    return 0


async def run_cat(arguments: argparse.Namespace) -> int:
    stdout = Stdout()
    async with _open_image(arguments) as image, image.rootfs.open(arguments.path) as file:
        while data := await file.read(CHUNK):
            await stdout.send_all(data)
    return 0


async def run_mount(arguments: argparse.Namespace) -> int:
    """Mount an image until a signal, which is the normal end and so no failure."""
    async with (
        _open_image(arguments) as image,
        image.rootfs.mount(arguments.target, writable=arguments.writable) as path,
    ):
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with open_hidden_nursery() as nursery:
                if sys.stdout is not None:
                    # A path need not be text in the encoding of stdout.
                    nursery.start_soon(Stdout().send_all, bytes(path) + b"\n")
                async for _ in signals:
                    break
                nursery.cancel_scope.cancel()
    return 0


@asynccontextmanager
async def _open_image(arguments: argparse.Namespace) -> AsyncIterator[Image]:
    """Open the image of a command, and pull it if the store lacks it."""
    named = arguments.store != getattr(arguments, "default_store", arguments.store)
    if named and not await trio.Path(arguments.store).is_dir():
        raise StoreNotFound(
            f"store directory {arguments.store} does not exist: pull an image into it, or pass "
            "another --store"
        )
    async with AsyncExitStack() as stack:
        try:
            puller = await stack.enter_async_context(_open_puller(arguments))
        except (StoreReadOnly, UnsupportedStore) as error:
            store = await enter_to_read(stack, arguments, error)
            puller = await stack.enter_async_context(_open_puller(arguments, store))
        async with open_display_for(arguments) as progress:
            pull = puller.pull(
                arguments.reference,
                platform=arguments.platform,
                policy="missing",
                progress=progress,
            )
            image = await stack.enter_async_context(pull)
        yield image


def _open_puller(
    arguments: argparse.Namespace, store: DirectoryStore | None = None
) -> AbstractAsyncContextManager[Puller]:
    return open_puller(
        store or arguments.store,
        credentials=arguments.creds or LoginFiles(arguments.authfile),
        plain_http=arguments.plain_http,
        tls_verify=not arguments.no_tls_verify,
        hosts_dir=arguments.hosts_dir,
        max_concurrent_downloads=arguments.max_concurrent_downloads,
        max_download_attempts=arguments.max_download_attempts,
    )


def _as_json(image: Image) -> str:
    layers = [
        {
            "digest": layer.descriptor.digest,
            "size": layer.descriptor.size,
            "diffId": layer.diff_id,
            "chainId": layer.chain_id,
        }
        for layer in image.layers
    ]
    return json.dumps(
        {
            "reference": image.reference,
            "digest": image.digest,
            "platform": str(image.platform),
            "layers": layers,
        }
    )
