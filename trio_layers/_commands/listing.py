"""The commands that need the catalog alone: images and rm.

Most calls are of ``images``, so only this command's modules are imported at the top.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .._errors import LayersError, StoreError
from .._store.names import list_images
from .messages import EXIT_FAILED, join_line
from .plain import print_failure, print_lines

if TYPE_CHECKING:
    from .._digest import Digest
    from .._store.usage import ImageUsage

__all__ = ["run_images", "run_rm"]


def run_images(arguments: argparse.Namespace) -> int:
    usage: Mapping[Digest, ImageUsage] = {}
    if arguments.size:
        from .._store.plain import open_plain

        with open_plain(arguments.store, read_only=True) as store:
            images, usage = store.images(), store.usage().images
    else:
        images = list_images(arguments.store)
    lines = []
    for reference, platform, digest in images:
        sizes = usage.get(digest)
        about = () if sizes is None else (sizes.size, sizes.exclusive)
        lines.append(join_line(reference, platform or "-", digest, *about))
    print_lines(lines)
    return 0


def run_rm(arguments: argparse.Namespace) -> int:
    from .._platform import parse_platform
    from .._reference import parse_reference
    from .._store.plain import open_plain

    platform = arguments.platform and str(parse_platform(arguments.platform))
    wanted = f"image for {platform}" if platform else "image"
    failed = False
    with open_plain(arguments.store, read_only=False) as store:
        for name in arguments.references:
            try:
                digest = name.startswith("sha256:")
                reference = name if digest else str(parse_reference(name))
                if not store.remove(reference, platform):
                    raise StoreError(f"no such {wanted} in the store")
            except LayersError as error:
                print_failure(error, name)
                failed = True
    return EXIT_FAILED if failed else 0
