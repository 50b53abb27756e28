"""The parts of an open store that its modules share."""

from __future__ import annotations

from pathlib import Path
from typing import final

import attrs

from .._catalog.catalog import Catalog
from .._lifetime import Lifetime
from .._tar.limits import Limits
from .._workers.build import Builder
from .commits import Commits
from .leases import LeaseCounts
from .scratch import Scratch

__all__ = ["StoreParts"]


@final
@attrs.frozen(eq=False)
class StoreParts:
    """The parts of an open store that its modules share.

    Attributes:
        root: The store's directory, absolute.
        limits: The limits on each layer that is unpacked.
        catalog: The rows of the visible blobs, trees, layers and images.
        scratch: Names and locks for files that are not visible yet.
        commits: Makes written files durable, then visible.
        leases: Protects digests from collection.
        builder: Unpacks layers that arrive.
        lifetime: Ends the calls of all tasks when the store's block is left.
    """

    root: Path
    limits: Limits
    catalog: Catalog
    scratch: Scratch
    commits: Commits
    leases: LeaseCounts
    builder: Builder
    lifetime: Lifetime
