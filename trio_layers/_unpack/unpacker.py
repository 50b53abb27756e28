"""All that a store wants of this room, in one value."""

from __future__ import annotations

from functools import partial

import attrs

from .archive import archive
from .export import export
from .limits import Limits
from .verify import verify
from .worker import Unpacked, holds, unpack

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
    verify = staticmethod(verify)

    @property
    def unpack(self) -> partial[Unpacked]:
        """`unpack`, with these limits."""
        return partial(unpack, limits=self.limits)
