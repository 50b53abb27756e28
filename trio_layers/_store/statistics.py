"""The present activity of an open store."""

from __future__ import annotations

import attrs

__all__ = ["StoreStatistics"]


@attrs.frozen
class StoreStatistics:
    """The present activity of an open store in this process.

    Attributes:
        layers: Number of layers with references.
        references: Number of references that are not released.
        unpacking: Number of layers that are being unpacked.
        waiting: Number of layers that wait for an unpacking worker, including layers that gave
            up their worker because their download is slow.
    """

    layers: int
    references: int
    unpacking: int
    waiting: int
