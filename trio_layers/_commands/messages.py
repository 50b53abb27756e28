"""Lines of results and errors, exit codes, and the end of stdout."""

from __future__ import annotations

import signal
import sys
from typing import Final

from .._errors import text_of
from .._printable import printable

__all__ = [
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "PROGRAM",
    "close_stdout",
    "error_line",
    "join_line",
    "warning_line",
]

PROGRAM: Final = "trio-layers"
EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT


def join_line(*values: object) -> str:
    return " ".join(map(str, values))


def error_line(error: BaseException, about: str | None = None) -> str:
    """Return the line on stderr for an error.

    Parts of its text come from registries, so line breaks and control characters are replaced.
    """
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    else:
        text = text_of(error)
    return warning_line(text, about)


def warning_line(text: str, about: str | None = None) -> str:
    line = ": ".join(filter(None, (PROGRAM, about, " ".join(text.split()))))
    return printable(line) + "\n"


def close_stdout() -> int:
    """Close stdout after its reader has gone, and return the exit code."""
    try:
        sys.stdout.close()  # otherwise the interpreter prints an error at its exit
    except BrokenPipeError:
        pass
    return EXIT_FAILED
