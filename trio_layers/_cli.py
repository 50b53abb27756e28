"""The command line: arguments, output, exit codes. All else is the library's.

The result goes to stdout, progress and complaints to stderr.
"""

from __future__ import annotations

import argparse
import getpass
import json
import logging
import logging.handlers
import os
import queue
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import attrs
import trio

from ._display import open_display
from ._errors import LayersError, text_of
from ._nursery import open_hidden_nursery
from ._pull import Image, open_puller, open_store
from ._registry.auth import Credentials
from ._version import __version__

__all__ = ["main"]

PROGRAM: Final = "trio-layers"
EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done. 1: failed, and stderr says why, one line for each thing that failed. 130:
    interrupted, by Ctrl-C; 143 by SIGTERM. A usage error leaves by ``SystemExit(2)``, as
    argparse does.

    Args:
        argv: The arguments; ``None``: the process's own.
    """
    try:
        arguments = _parser().parse_args(argv)
        with _logging(arguments.verbose):
            code = trio.run(_until_signal, arguments)
        stdout = sys.stdout
        if stdout is not None:  # it may be closed from the start
            stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our result has left
        try:
            sys.stdout.close()  # otherwise the interpreter complains at its exit
        except BrokenPipeError:
            pass
        return EXIT_FAILED
    except (LayersError, OSError) as error:
        _complain(error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt) is not None:
            return EXIT_INTERRUPTED  # the second Ctrl-C, with what it broke
        if group.split((LayersError, OSError))[1] is not None:
            raise
        for leaf in _leaves(group):
            _complain(leaf)
        return EXIT_FAILED


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error


async def _until_signal(arguments: argparse.Namespace) -> int:
    """Run the command; the first signal cancels it, so that everything is left in order."""
    run: Callable[[argparse.Namespace], Awaitable[int]] = arguments.run
    code = EXIT_FAILED

    async def watch(task_status: trio.TaskStatus[None]) -> None:
        nonlocal code
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                code = 128 + number
                break
        nursery.cancel_scope.cancel()

    async with open_hidden_nursery() as nursery:
        await nursery.start(watch)
        code = await run(arguments)
        nursery.cancel_scope.cancel()
    return code


def _complain(error: BaseException, about: str | None = None) -> None:
    """One line on stderr, whatever the error's text holds: parts of it come from registries."""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    else:
        text = text_of(error)
    line = ": ".join(filter(None, (PROGRAM, about, " ".join(text.split()))))
    if sys.stderr is not None:  # print() would take stdout instead
        print(_shown(line), file=sys.stderr)


def _shown(text: str) -> str:
    """Without what could rewrite a terminal."""
    return "".join(c if c.isprintable() else "�" for c in text)


class _LogFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(_shown, super().format(record).split("\n")))


@contextmanager
def _logging(verbose: bool) -> Iterator[None]:
    """Show the library's log on stderr, by a thread: a slow terminal must not hold trio up."""
    if not verbose:
        yield
        return
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    stderr = logging.StreamHandler()
    stderr.setFormatter(_LogFormatter("%(asctime)s %(name)s: %(message)s"))
    listener = logging.handlers.QueueListener(lines, stderr)
    handler = logging.handlers.QueueHandler(lines)
    logger = logging.getLogger("trio_layers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    listener.start()
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        listener.stop()


# Commands. Each is a function for its arguments, one that runs it, and a row of the table.


@attrs.frozen
class _Command:
    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Awaitable[int]]


def _pull_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("references", metavar="REF", nargs="+", help="an image, such as debian:12")
    add("--platform", metavar="OS/ARCH[/VARIANT]", help="default: this machine's")
    add("-q", "--quiet", action="store_true", help="no progress")
    add("--progress", choices=("auto", "tty", "plain", "json", "none"), default="auto")
    add("--json", action="store_true", help="print a JSON object for each image")
    add("--plain-http", action="store_true", help="allow registries without TLS")
    add("--no-tls-verify", action="store_true", help="accept any certificate")
    add(
        "--creds",
        metavar="USER[:PASSWORD]",
        type=_credentials,
        help="asks for the password if it is left out",
    )
    add("--max-concurrent-downloads", metavar="N", type=_number(0), default=3)
    add("--max-download-attempts", metavar="N", type=_number(1), default=5)


async def _pull(arguments: argparse.Namespace) -> int:
    """Pull all images at once: layers they share are downloaded once. One that fails does not
    stop the others."""
    references: list[str] = arguments.references
    pulled: dict[int, Image] = {}
    failures: list[tuple[str, Exception]] = []
    kind = arguments.progress
    if arguments.quiet:
        kind = "none"
    elif arguments.verbose and kind == "auto":
        kind = "plain"  # bars and a log do not share a terminal

    async with (
        open_puller(
            arguments.store,
            credentials=arguments.creds,
            plain_http=arguments.plain_http,
            tls_verify=not arguments.no_tls_verify,
            max_concurrent_downloads=arguments.max_concurrent_downloads,
            max_download_attempts=arguments.max_download_attempts,
        ) as puller,
        open_display(kind) as progress,
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
            print(_as_json(image))
        else:
            print(image.reference, image.platform, image.digest)
    for reference, error in failures:
        _complain(error, reference)
    return EXIT_FAILED if failures else 0


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


def _images_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing but what every command has."""


async def _images(arguments: argparse.Namespace) -> int:
    async with open_store(arguments.store) as store:
        images = await store.images()
    for image in images:
        print(image.reference, image.platform or "-", image.manifest.digest)
    return 0


_COMMANDS: Final = (
    _Command("pull", "get images into the store", _pull_arguments, _pull),
    _Command("images", "list the images in the store", _images_arguments, _images),
)


# Arguments.


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--store",
        metavar="DIR",
        default=_default_store(),
        help="where the images are (default: %(default)s; $TRIO_LAYERS_STORE names another)",
    )
    common.add_argument("-v", "--verbose", action="store_true", help="show the log")
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Pull container images, without a daemon.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        subparser = commands.add_parser(
            command.name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            parents=[common],
            allow_abbrev=False,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
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


def _credentials(text: str) -> Credentials:
    username, colon, password = text.partition(":")
    if not colon:
        try:
            password = getpass.getpass(f"Password of {username}: ")
        except (EOFError, AttributeError):  # AttributeError: stdin is closed from the start
            raise argparse.ArgumentTypeError("no password was given") from None
    return Credentials(username, password)


def _number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} up")
        return number

    return parse
