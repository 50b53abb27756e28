"""All that a store wants of this room, in one value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from .archive import archive
from .export import export
from .limits import Limits
from .worker import Unpacked, holds, unpack

if TYPE_CHECKING:
    from ..abc import LowerTree

__all__ = ["Unpacker"]


@attrs.frozen
class Unpacker:
    """What a store unpacks its layers with.

    Attributes:
        limits: How much each layer may hold.
    """

    limits: Limits

    archive = staticmethod(archive)
    export = staticmethod(export)
    holds = staticmethod(holds)

    def unpack(
        self,
        read: Callable[[int], bytes],
        target: Path,
        *,
        lower: LowerTree | None,
        check_cancelled: Callable[[], None],
    ) -> Unpacked:
        """See `unpack`."""
        return unpack(
            read, target, lower=lower, limits=self.limits, check_cancelled=check_cancelled
        )
