"""All that a store wants of this room, in one value."""

from __future__ import annotations

from functools import partial

import attrs

from .._rootfs.archive import archive
from .._rootfs.export import export
from .._tar.limits import Limits
from .._tree.unpack import Unpacked, holds, unpack
from .._tree.verify import verify

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
