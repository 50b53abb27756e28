"""Descriptors, manifests, indexes and image configs: plain values and their decoders."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from ._digest import Digest

__all__ = ["Descriptor"]


@attrs.frozen
class Descriptor:
    """A pointer to content (OCI image specification, ``descriptor.md``).

    Attributes:
        media_type: What the content is.
        digest: What it hashes to.
        size: Its length in bytes.
        urls: Where else it may be had.
        annotations: What the publisher says of it.
    """

    media_type: str
    digest: Digest
    size: int
    urls: tuple[str, ...] = ()
    annotations: Mapping[str, str] = attrs.field(factory=dict, hash=False)
