"""The format of the log on stderr."""

from __future__ import annotations

import logging
from typing import final

from .._printable import printable

__all__ = ["LogFormatter"]


@final
class LogFormatter(logging.Formatter):
    """Formats records with their time and logger, without control characters."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))
