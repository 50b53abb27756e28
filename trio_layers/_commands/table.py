"""The commands by name: their help texts, their arguments, and the functions that run them.

This module imports none of the modules that run a command.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Final, NamedTuple

from .options import (
    add_image_arguments,
    add_platform_option,
    add_progress_options,
    add_pull_options,
    add_registry_options,
)

__all__ = ["COMMANDS", "Command"]


class Command(NamedTuple):
    """A command of the command line.

    Attributes:
        name: The command's name.
        help: Its purpose, in a line.
        add_arguments: Adds its arguments to a parser.
        module: The module in this package with the function of the command's name, which runs it.
        has_store: Whether the command has the option ``--store``.
        uses_trio: Whether the function is asynchronous.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    module: str
    has_store: bool = True
    uses_trio: bool = True


def _pull_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("references", metavar="REF", nargs="+", help="image, such as debian:12")
    parser.add_argument("--json", action="store_true", help="print each image as a JSON object")
    add_pull_options(parser)


def _rootfs_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument(
        "destination", metavar="DEST", help="new or empty directory; -: write a tar to stdout"
    )
    parser.add_argument(
        "--root-metadata",
        action="store_true",
        help="set the owner, mode, time and attributes of DEST to those of the image's root",
    )


def _cat_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument(
        "path",
        metavar="PATH",
        help="file in the image; symbolic links are followed inside the image",
    )


def _mount_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument(
        "target", metavar="TARGET", nargs="?", help="mount point (default: a new directory)"
    )
    parser.add_argument(
        "--writable", action="store_true", help="allow writes; they are discarded at the end"
    )


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help="archive, or directory of an OCI layout; -: read stdin")
    add(
        "--reference",
        metavar="REF",
        help="import one image, and name it REF; of several, the one with this name or tag",
    )
    add(
        "--digest",
        metavar="DIGEST",
        help="import the image with this manifest, index or config digest; a prefix is enough",
    )
    add(
        "--all",
        action="store_true",
        help="also import images without names, as localhost/unnamed@DIGEST",
    )
    add_platform_option(parser)
    add("--json", action="store_true", help="print each image as a JSON object")
    add_progress_options(parser)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "references",
        metavar="REF",
        nargs="+",
        help="name of an image in the store, or its digest (sha256:…), which exports all its names",
    )
    add(
        "destination",
        metavar="DEST",
        help="new file; with --format oci a new or empty directory; -: write to stdout",
    )
    add(
        "--format",
        choices=("oci-archive", "docker-archive", "oci"),
        default="oci-archive",
        help="write this format (default: %(default)s, which docker load and podman load can read)",
    )
    add_platform_option(parser)


def _images_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        action="store_true",
        help="also print the bytes each image uses, and the bytes that no other image shares",
    )


def _rm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "references",
        metavar="REF",
        nargs="+",
        help="name of an image, or its digest (sha256:…), which untags all its names",
    )
    parser.add_argument(
        "--platform",
        metavar="OS/ARCH[/VARIANT]",
        help="untag the image for this platform only (default: all platforms)",
    )


def _gc_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be deleted, and delete nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the result as a JSON object")


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repair",
        action="store_true",
        help="delete damaged data; the next pull of an image downloads it again",
    )
    parser.add_argument("--json", action="store_true", help="print the result as a JSON object")


def _digest_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REF", help="image, such as debian:12")
    add_registry_options(parser)


def _tags_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", metavar="REPOSITORY", help="repository, such as debian")
    add_registry_options(parser)


def _referrers_arguments(parser: argparse.ArgumentParser) -> None:
    _digest_arguments(parser)
    parser.add_argument("--artifact-type", metavar="TYPE", help="list artifacts of this type only")


COMMANDS: Final = (
    Command("pull", "download images into the store", _pull_arguments, "pulling"),
    Command(
        "rootfs",
        "write an image's root file system to a directory or a tar",
        _rootfs_arguments,
        "pulling",
    ),
    Command("cat", "print a file of an image", _cat_arguments, "pulling"),
    Command(
        "mount", "mount an image's root file system until interrupted", _mount_arguments, "pulling"
    ),
    Command(
        "import",
        "load the images of an archive or an OCI layout into the store",
        _import_arguments,
        "storing",
    ),
    Command(
        "export",
        "save images of the store to an archive or an OCI layout",
        _export_arguments,
        "storing",
    ),
    Command(
        "images", "list the images in the store", _images_arguments, "listing", uses_trio=False
    ),
    Command(
        "rm",
        "untag images; gc then deletes unreferenced data",
        _rm_arguments,
        "listing",
        uses_trio=False,
    ),
    Command("gc", "delete unreferenced images, layers and blobs", _gc_arguments, "storing"),
    Command("check", "verify all data in the store", _check_arguments, "storing"),
    Command("digest", "print the digest a tag points to", _digest_arguments, "asking", False),
    Command(
        "tags", "list the tags of a repository in a registry", _tags_arguments, "asking", False
    ),
    Command(
        "referrers",
        "list the artifacts that refer to an image, such as signatures and SBOMs",
        _referrers_arguments,
        "asking",
        False,
    ),
)
