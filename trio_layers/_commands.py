"""The commands: each is a function for its arguments, one that runs it, and a row of the table.

The result goes to stdout, progress and complaints to stderr.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Final

import attrs
import trio

from ._archives.exporting import export_images
from ._archives.importing import import_images
from ._catalog.rows import StoredImage
from ._display import DisplayKind, open_display
from ._errors import (
    LayersError,
    StoreError,
    StoreNotFound,
    StoreReadOnly,
    UnsupportedStore,
)
from ._logins.lookup import LoginFiles
from ._nursery import open_hidden_nursery
from ._options import (
    add_image_arguments,
    add_platform_option,
    add_progress_options,
    add_pull_options,
    add_registry_options,
)
from ._platform import parse_platform
from ._printable import printable
from ._pull import Image, Puller, open_puller
from ._reference import parse_reference
from ._registry.client import RegistryClient, open_registry_client
from ._stdio import (
    CHUNK,
    Stdout,
    archive_on_stdin,
    complain,
    join_line,
    say,
    say_lines,
    tar_on_stdout,
    warn,
)
from ._store.directory import DirectoryStore, open_store
from .abc import ProgressSink

__all__ = ["COMMANDS", "EXIT_FAILED", "Command"]
EXIT_FAILED: Final = 1


@attrs.frozen
class Command:
    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Awaitable[int]]
    has_store: bool = True


def _pull_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("references", metavar="REF", nargs="+", help="an image, such as debian:12")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each image")
    add_pull_options(parser)


async def _pull(arguments: argparse.Namespace) -> int:
    """Pull all images at once: layers they share are downloaded once. One that fails does not
    stop the others.
    """
    references: list[str] = arguments.references
    pulled: dict[int, Image] = {}
    failures: list[tuple[str, Exception]] = []

    async with (
        _open_puller(arguments) as puller,
        _open_display(arguments) as progress,
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
            await say(_as_json(image))
        else:
            await say(image.reference, image.platform, image.digest)
    for reference, error in failures:
        await complain(error, reference)
    return EXIT_FAILED if failures else 0


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


def _open_display(arguments: argparse.Namespace) -> AbstractAsyncContextManager[ProgressSink]:
    kind: DisplayKind = arguments.progress
    if arguments.quiet:
        kind = "none"
    elif arguments.verbose and kind == "auto":
        kind = "plain"  # bars and a log do not share a terminal
    return open_display(kind)


@asynccontextmanager
async def _open_to_read(arguments: argparse.Namespace) -> AsyncIterator[DirectoryStore]:
    """Open an existing store, read-only if it cannot be written."""
    async with AsyncExitStack() as stack:
        try:
            store = await stack.enter_async_context(open_store(arguments.store, create=False))
        except (StoreReadOnly, UnsupportedStore) as error:
            store = await _enter_to_read(stack, arguments, error)
        yield store


async def _enter_to_read(
    stack: AsyncExitStack, arguments: argparse.Namespace, error: LayersError
) -> DirectoryStore:
    """Open the store read-only. If that fails, too, raise ``error``."""
    try:
        return await stack.enter_async_context(open_store(arguments.store, read_only=True))
    except StoreNotFound:
        raise
    except LayersError:
        raise error from None


@asynccontextmanager
async def _open_image(arguments: argparse.Namespace) -> AsyncIterator[Image]:
    """The image a command is about, pulled if the store does not have it."""
    named = arguments.store != getattr(arguments, "default_store", arguments.store)
    if named and not await trio.Path(arguments.store).is_dir():
        raise StoreNotFound(
            f"there is no directory {arguments.store} for a store: pull an image into it, or name "
            "another one"
        )
    async with AsyncExitStack() as stack:
        try:
            puller = await stack.enter_async_context(_open_puller(arguments))
        except (StoreReadOnly, UnsupportedStore) as error:
            store = await _enter_to_read(stack, arguments, error)
            puller = await stack.enter_async_context(_open_puller(arguments, store))
        async with _open_display(arguments) as progress:
            pull = puller.pull(
                arguments.reference,
                platform=arguments.platform,
                policy="missing",
                progress=progress,
            )
            image = await stack.enter_async_context(pull)
        yield image


def _rootfs_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument(
        "destination", metavar="DEST", help="a directory, empty or new; -: a tar to stdout"
    )
    parser.add_argument(
        "--root-metadata",
        action="store_true",
        help="give DEST owner, mode, time and attributes of the image's root",
    )


async def _rootfs(arguments: argparse.Namespace) -> int:
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
        await warn(f"not set, for lack of privilege: {text.replace('_', '-')}")
    return 0


def _cat_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument("path", metavar="PATH", help="a file in it; links are followed inside")


async def _cat(arguments: argparse.Namespace) -> int:
    stdout = Stdout()
    async with _open_image(arguments) as image, image.rootfs.open(arguments.path) as file:
        while data := await file.read(CHUNK):
            await stdout.send_all(data)
    return 0


def _mount_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument("target", metavar="TARGET", nargs="?", help="default: a new directory")
    parser.add_argument(
        "--writable", action="store_true", help="what is written is thrown away in the end"
    )


async def _mount(arguments: argparse.Namespace) -> int:
    """Until a signal, which here is no interruption: there is no other end."""
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


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help="an archive, or the directory of a layout; -: stdin")
    add(
        "--reference",
        metavar="REF",
        help="what to call the image; of several, the one that is called so already",
    )
    add(
        "--digest",
        metavar="DIGEST",
        help="import the image with this digest (of its manifest, index or config), or prefix",
    )
    add(
        "--all",
        action="store_true",
        help="import images without names, too, as localhost/unnamed@DIGEST",
    )
    add_platform_option(parser)
    add("--json", action="store_true", help="print a JSON object for each image")
    add_progress_options(parser)


async def _import(arguments: argparse.Namespace) -> int:
    if arguments.all and (arguments.reference or arguments.digest):
        raise LayersError("--all imports every image: leave out --reference and --digest")
    source = archive_on_stdin() if arguments.source == "-" else arguments.source
    async with (
        open_store(arguments.store) as store,
        _open_display(arguments) as progress,
    ):
        images = await import_images(
            store,
            source,
            reference=arguments.reference,
            digest=arguments.digest,
            all=arguments.all,
            platform=arguments.platform,
            progress=progress,
        )
    for image in images:
        if arguments.json:
            await say(_stored_as_json(image))
        else:
            await say(image.reference, image.platform, image.manifest.digest)
    return 0


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "references",
        metavar="REF",
        nargs="+",
        help="the name of an image in the store, or its digest (sha256:…): then all its names",
    )
    add(
        "destination",
        metavar="DEST",
        help="a new file; for oci a directory, empty or new; -: stdout",
    )
    add(
        "--format",
        choices=("oci-archive", "docker-archive", "oci"),
        default="oci-archive",
        help="default: %(default)s, which docker load and podman load take, too",
    )
    add_platform_option(parser)


async def _export(arguments: argparse.Namespace) -> int:
    target = arguments.destination
    if target == "-":
        if arguments.format == "oci":
            raise LayersError("an OCI layout is a directory: write an oci-archive to stdout")
        target = tar_on_stdout()
    async with _open_to_read(arguments) as store:
        await export_images(
            store,
            arguments.references,
            target,
            format=arguments.format,
            platform=arguments.platform,
        )
    return 0


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


def _stored_as_json(image: StoredImage) -> str:
    return json.dumps(
        {
            "reference": image.reference,
            "digest": image.manifest.digest,
            "platform": image.platform,
            "config": image.config.digest,
        }
    )


def _images_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        action="store_true",
        help="also the bytes an image takes, and how many of them no other image needs",
    )


async def _images(arguments: argparse.Namespace) -> int:
    async with _open_to_read(arguments) as store:
        images = await store.images()
        usage = (await store.usage()).images if arguments.size else {}
    lines = []
    for image in images:
        sizes = usage.get(image.manifest.digest)
        about = () if sizes is None else (sizes.size, sizes.exclusive)
        lines.append(
            join_line(image.reference, image.platform or "-", image.manifest.digest, *about)
        )
    await say_lines(lines)
    return 0


def _rm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "references",
        metavar="REF",
        nargs="+",
        help="an image's name, or its digest (sha256:…): then all its names",
    )
    parser.add_argument("--platform", metavar="OS/ARCH[/VARIANT]", help="default: all")


async def _rm(arguments: argparse.Namespace) -> int:
    platform = arguments.platform and str(parse_platform(arguments.platform))
    failures: list[tuple[str, Exception]] = []
    async with open_store(arguments.store, create=False) as store:
        for name in arguments.references:
            try:
                digest = name.startswith("sha256:")
                reference = name if digest else str(parse_reference(name))
                if not await store.remove(reference, platform=platform):
                    raise StoreError("it is not in the store")
            except LayersError as error:
                failures.append((name, error))
    for name, failure in failures:
        await complain(failure, name)
    return EXIT_FAILED if failures else 0


def _gc_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="only tell what would be removed")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


async def _gc(arguments: argparse.Namespace) -> int:
    async with open_store(arguments.store, create=False) as store:
        collected = await store.collect(dry_run=arguments.dry_run)
    counts = attrs.asdict(collected)
    mounted = counts.pop("mounted")
    if arguments.json:
        await say(json.dumps({**counts, "mounted": mounted} if mounted else counts))
    else:
        size = counts.pop("size")
        what = ", ".join(f"{count} {name}" for name, count in counts.items())
        await say(f"{'to remove' if arguments.dry_run else 'removed'}: {what}; {size} bytes")
        for tree in collected.mounted:
            where = ", ".join(printable(target) for target in tree.targets) or "out of sight"
            await say(f"kept: tree {tree.id} is mounted: {where}")
    return 0


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repair",
        action="store_true",
        help="drop what is damaged: the next pull of an image brings it back",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


async def _check(arguments: argparse.Namespace) -> int:
    repair = partial(open_store, arguments.store, create=False)
    async with repair() if arguments.repair else _open_to_read(arguments) as store:
        report = await store.check(repair=arguments.repair)
    if arguments.json:
        await say(json.dumps(attrs.asdict(report)))
    else:
        await say_lines([printable(str(problem)) for problem in report.problems])
        await say(
            f"checked: {report.blobs} blobs, {report.trees} trees, {report.layers} layers, "
            f"{report.images} images; {len(report.problems)} problems"
            + (", repaired" if report.repaired else "")
        )
    return EXIT_FAILED if report.problems and not report.repaired else 0


def _digest_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REF", help="an image, such as debian:12")
    add_registry_options(parser)


async def _digest(arguments: argparse.Namespace) -> int:
    async with _open_client(arguments) as client:
        await say((await client.resolve(arguments.reference)).digest)
    return 0


def _tags_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", metavar="REPOSITORY", help="such as debian")
    add_registry_options(parser)


async def _tags(arguments: argparse.Namespace) -> int:
    async with _open_client(arguments) as client:
        tags = await client.tags(arguments.repository)
    await say_lines(tags)
    return 0


def _referrers_arguments(parser: argparse.ArgumentParser) -> None:
    _digest_arguments(parser)
    parser.add_argument("--artifact-type", metavar="TYPE", help="only those of this type")


async def _referrers(arguments: argparse.Namespace) -> int:
    async with _open_client(arguments) as client:
        found = await client.referrers(arguments.reference, artifact_type=arguments.artifact_type)
    await say_lines(
        [
            join_line(each.digest, printable(each.artifact_type or each.media_type), each.size)
            for each in found
        ]
    )
    return 0


def _open_client(arguments: argparse.Namespace) -> AbstractAsyncContextManager[RegistryClient]:
    return open_registry_client(
        credentials=arguments.creds or LoginFiles(arguments.authfile),
        plain_http=arguments.plain_http,
        tls_verify=not arguments.no_tls_verify,
        hosts_dir=arguments.hosts_dir,
    )


COMMANDS: Final = (
    Command("pull", "get images into the store", _pull_arguments, _pull),
    Command("rootfs", "write an image's root file system out", _rootfs_arguments, _rootfs),
    Command("cat", "print a file of an image", _cat_arguments, _cat),
    Command(
        "mount", "mount an image's root file system until interrupted", _mount_arguments, _mount
    ),
    Command("import", "put the images of an archive into the store", _import_arguments, _import),
    Command("export", "write images of the store to an archive", _export_arguments, _export),
    Command("images", "list the images in the store", _images_arguments, _images),
    Command("rm", "remove images' names; gc removes what nobody needs then", _rm_arguments, _rm),
    Command("gc", "remove what no image needs, and nobody uses", _gc_arguments, _gc),
    Command("check", "look at all that is stored for damage", _check_arguments, _check),
    Command(
        "digest",
        "ask a registry what an image's name stands for",
        _digest_arguments,
        _digest,
        False,
    ),
    Command("tags", "list the tags in a registry's repository", _tags_arguments, _tags, False),
    Command(
        "referrers",
        "list what in its registry refers to an image: signatures, SBOMs",
        _referrers_arguments,
        _referrers,
        False,
    ),
)
