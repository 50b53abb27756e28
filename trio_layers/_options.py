"""Options that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ._registry.credentials import Credentials

__all__ = [
    "add_image_arguments",
    "add_platform_option",
    "add_progress_options",
    "add_pull_options",
    "add_registry_options",
]


def add_pull_options(parser: argparse.ArgumentParser) -> None:
    """What every command has that may have to pull."""
    add = parser.add_argument
    add_platform_option(parser)
    add_progress_options(parser)
    add_registry_options(parser)
    add("--max-concurrent-downloads", metavar="N", type=_number_from(0), default=3)
    add("--max-download-attempts", metavar="N", type=_number_from(1), default=5)


def add_registry_options(parser: argparse.ArgumentParser) -> None:
    """What every command has that asks registries."""
    add = parser.add_argument
    add("--plain-http", action="store_true", help="allow registries without TLS")
    add("--no-tls-verify", action="store_true", help="accept any certificate")
    add("--hosts-dir", metavar="DIR", help="mirrors and certificates, as containerd's certs.d")
    add(
        "--creds",
        metavar="USER[:PASSWORD]",
        type=_parse_credentials,
        help="asks for the password if it is left out",
    )
    add(
        "--authfile",
        metavar="FILE",
        help="logins to use in place of docker's and podman's own",
    )


def add_platform_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--platform", metavar="OS/ARCH[/VARIANT]", help="default: this machine's")


def add_progress_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-q", "--quiet", action="store_true", help="no progress")
    add("--progress", choices=("auto", "tty", "plain", "json", "none"), default="auto")


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REF", help="an image, pulled if it is not there yet")
    add_pull_options(parser)


def _parse_credentials(text: str) -> Credentials:
    username, colon, password = text.partition(":")
    if not colon:
        import getpass  # few are asked

        try:
            password = getpass.getpass(f"Password of {username}: ")
        except (EOFError, AttributeError):  # AttributeError: stdin is closed from the start
            raise argparse.ArgumentTypeError("no password was given") from None
    return Credentials(username, password)


def _number_from(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} up")
        return number

    return parse
