"""The events of a pull: a value for each change of a layer."""

from __future__ import annotations

import enum
from typing import Final

import attrs

__all__ = ["Progress", "Status", "retrying"]


class Status(enum.StrEnum):
    """Every action that the engine and the registry client report, except `retrying`'s.

    The words are those of docker's client, since people and scripts read them.
    """

    PULLING = "Pulling fs layer"
    ALREADY_EXISTS = "Already exists"
    WAITING = "Waiting"
    DOWNLOADING = "Downloading"
    VERIFYING = "Verifying Checksum"
    DOWNLOAD_COMPLETE = "Download complete"
    EXTRACTING = "Extracting"
    PULL_COMPLETE = "Pull complete"


RETRYING_PREFIX: Final = "Retrying in "


def retrying(seconds: int) -> str:
    """The action that stands for ``seconds`` ticks left before the next attempt."""
    return f"{RETRYING_PREFIX}{seconds} second{'' if seconds == 1 else 's'}"


@attrs.frozen
class Progress:
    """An event of a pull.

    Attributes:
        id: The layer's display ID, or the image's reference for events of the whole pull.
        action: The present action: a `Status`, a `retrying` text, or a layer source's own word.
        current: The position in bytes of the layer as downloaded; 0 if nothing is counted.
        total: The end in the same unit; 0 if it is unknown.
        last: Whether a counted stream has ended with this event (docker's ``LastUpdate``).
    """

    id: str
    action: str
    current: int = 0
    total: int = 0
    last: bool = False
