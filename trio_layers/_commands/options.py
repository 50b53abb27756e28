"""Options of several commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._registry.credentials import Credentials

__all__ = [
    "add_image_arguments",
    "add_platform_option",
    "add_progress_options",
    "add_pull_options",
    "add_registry_options",
]


def add_pull_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the commands that pull images."""
    add = parser.add_argument
    add_platform_option(parser)
    add_progress_options(parser)
    add_registry_options(parser)
    add(
        "--max-concurrent-downloads",
        metavar="N",
        type=_number_from(0),
        default=3,
        help="download at most N layers at once; 0: no limit but 90 connections "
        "(default: %(default)s)",
    )
    add(
        "--max-download-attempts",
        metavar="N",
        type=_number_from(1),
        default=5,
        help="try to download a layer at most N times (default: %(default)s)",
    )


def add_registry_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the commands that send requests to registries."""
    add = parser.add_argument
    add(
        "--plain-http",
        action="store_true",
        help="also allow plain HTTP for registries that are not on loopback",
    )
    add("--no-tls-verify", action="store_true", help="do not verify TLS certificates")
    add(
        "--hosts-dir",
        metavar="DIR",
        help="read mirrors and certificates from DIR, which is like containerd's certs.d",
    )
    add(
        "--creds",
        metavar="USER[:PASSWORD]",
        type=_parse_credentials,
        help="log in with this name and password; without a password, prompt for it",
    )
    add(
        "--authfile",
        metavar="FILE",
        help="read logins from FILE instead of docker's and podman's files",
    )


def add_platform_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--platform",
        metavar="OS/ARCH[/VARIANT]",
        help="use the image for this platform (default: this machine's)",
    )


def add_progress_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-q", "--quiet", action="store_true", help="do not print progress")
    add(
        "--progress",
        choices=("auto", "tty", "plain", "json", "none"),
        default="auto",
        help="print progress in this form on stderr; auto: tty on a terminal, otherwise plain "
        "(default: %(default)s)",
    )


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "reference", metavar="REF", help="image such as debian:12, pulled if the store lacks it"
    )
    add_pull_options(parser)


def _parse_credentials(text: str) -> Credentials:
    from .._registry.credentials import Credentials  # not for commands without a registry

    username, colon, password = text.partition(":")
    if not colon:
        import getpass  # rarely needed, so not imported at the start

        try:
            password = getpass.getpass(f"Password of {username}: ")
        except (EOFError, AttributeError):  # AttributeError: stdin is closed from the start
            raise argparse.ArgumentTypeError(
                "no password given: write USER:PASSWORD, or enter it at the prompt"
            ) from None
    return Credentials(username, password)


def _number_from(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return number

    return parse
