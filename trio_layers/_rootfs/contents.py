"""File contents of a merged tree, for copying them out of the store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from .merged import MergedTree

__all__ = ["open_content"]


@contextmanager
def open_content(tree: MergedTree, path: bytes) -> Iterator[int]:
    """Open a file's content for the block.

    Raises:
        StoreError: if the file cannot be opened, or has the wrong size.
        OSError: if too many files are open.
    """
    descriptor = tree.open_listed(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
