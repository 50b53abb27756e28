"""The names of images, as plain rows, for a command that lists them at once."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._digest import Digest

__all__ = ["list_names"]


def list_names(connection: sqlite3.Connection) -> list[tuple[str, str, Digest]]:
    """Return reference, platform and manifest digest of all images, in the order of `find_images`.

    The platform is empty if none was given.
    """
    return connection.execute(
        "SELECT reference, platform, manifest FROM image_references ORDER BY reference, serial DESC"
    ).fetchall()
