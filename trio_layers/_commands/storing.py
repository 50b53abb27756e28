"""The commands on a store that need no registry: import, export, gc and check."""

from __future__ import annotations

import argparse
import json
from functools import partial

import attrs

from .._archives.exporting import export_images
from .._archives.importing import import_images
from .._catalog.rows import StoredImage
from .._errors import LayersError
from .._printable import printable
from .._store.directory import open_store
from .messages import EXIT_FAILED
from .opening import open_display_for, open_to_read
from .stdio import archive_on_stdin, print_line, print_lines, tar_on_stdout

__all__ = ["run_check", "run_export", "run_gc", "run_import"]


async def run_import(arguments: argparse.Namespace) -> int:
    if arguments.all and (arguments.reference or arguments.digest):
        raise LayersError("--all imports every image: leave out --reference and --digest")
    source = archive_on_stdin() if arguments.source == "-" else arguments.source
    async with (
        open_store(arguments.store) as store,
        open_display_for(arguments) as progress,
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
            await print_line(_stored_as_json(image))
        else:
            await print_line(image.reference, image.platform, image.manifest.digest)
    return 0


async def run_export(arguments: argparse.Namespace) -> int:
    target = arguments.destination
    if target == "-":
        if arguments.format == "oci":
            raise LayersError(
                "--format oci writes a directory, not to stdout: use --format oci-archive"
            )
        target = tar_on_stdout()
    async with open_to_read(arguments) as store:
        await export_images(
            store,
            arguments.references,
            target,
            format=arguments.format,
            platform=arguments.platform,
        )
    return 0


async def run_gc(arguments: argparse.Namespace) -> int:
    async with open_store(arguments.store, create=False) as store:
        collected = await store.collect(dry_run=arguments.dry_run)
    counts = attrs.asdict(collected)
    mounted = counts.pop("mounted")
    if arguments.json:
        await print_line(json.dumps({**counts, "mounted": mounted} if mounted else counts))
    else:
        size = counts.pop("size")
        what = ", ".join(f"{count} {name}" for name, count in counts.items())
        await print_line(f"{'to remove' if arguments.dry_run else 'removed'}: {what}; {size} bytes")
        for tree in collected.mounted:
            where = (
                ", ".join(printable(target) for target in tree.targets) or "mount point not visible"
            )
            await print_line(f"kept: tree {tree.id} is mounted: {where}")
    return 0


async def run_check(arguments: argparse.Namespace) -> int:
    repair = partial(open_store, arguments.store, create=False)
    async with repair() if arguments.repair else open_to_read(arguments) as store:
        report = await store.check(repair=arguments.repair)
    if arguments.json:
        await print_line(json.dumps(attrs.asdict(report)))
    else:
        await print_lines([printable(str(problem)) for problem in report.problems])
        await print_line(
            f"checked: {report.blobs} blobs, {report.trees} trees, {report.layers} layers, "
            f"{report.images} images; {len(report.problems)} problems"
            + (", repaired" if report.repaired else "")
        )
    return EXIT_FAILED if report.problems and not report.repaired else 0


def _stored_as_json(image: StoredImage) -> str:
    return json.dumps(
        {
            "reference": image.reference,
            "digest": image.manifest.digest,
            "platform": image.platform,
            "config": image.config.digest,
        }
    )
