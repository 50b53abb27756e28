"""The command line: arguments and exit codes. `_commands` has the commands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from ._commands.messages import EXIT_INTERRUPTED, PROGRAM, close_stdout
from ._commands.table import COMMANDS, Command
from ._version import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    The code is 0 on success. ``mount`` ends only by Ctrl-C or SIGTERM, so these are success, too.
    It is 1 after failures: stderr has a line for each. It is 130 after Ctrl-C and 143 after
    SIGTERM. A usage error raises ``SystemExit(2)``, as in argparse.

    Args:
        argv: The arguments; ``None``: those of the process.
    """
    try:
        words = sys.argv[1:] if argv is None else argv
        arguments = _parser(words).parse_args(words)
        command: Command = arguments.command
        function = getattr(_load(command.module), f"run_{command.name}")
        runner = _load("running" if command.uses_trio else "plain")
        code: int = runner.run(function, arguments)
        stdout = sys.stdout
        if stdout is not None and not stdout.closed:  # None: closed at the program's start
            stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output is gone
        return close_stdout()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _load(module: str) -> ModuleType:
    return import_module(f"{__package__}._commands.{module}")


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Make the parser, with the arguments of those commands that are among ``words``."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="print the log on stderr")
    with_store = argparse.ArgumentParser(add_help=False)
    with_store.add_argument(
        "--store",
        metavar="DIR",
        default=_default_store(),
        help="directory of the store (default: %(default)s; $TRIO_LAYERS_STORE sets another)",
    )
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Pull container images, without a daemon.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(prog=PROGRAM, metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            parents=[with_store, common] if command.has_store else [common],
            allow_abbrev=False,
        )
        if command.name in words:
            command.add_arguments(subparser)
        subparser.set_defaults(command=command, default_store=_default_store())
    return parser


def _default_store() -> str:
    if store := os.environ.get("TRIO_LAYERS_STORE"):
        return store
    if os.geteuid() == 0:
        return "/var/lib/trio-layers"
    # XDG Base Directory Specification: unset, empty and relative paths count for nothing.
    data = os.environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(data):
        data = os.path.expanduser("~/.local/share")
    return os.path.join(data, "trio-layers")
