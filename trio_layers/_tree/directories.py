"""Opens the directories of a tree, one path component at a time, without following links.

All access to a tree goes through these descriptors. Paths are real paths: relative to the root,
without dots and links; ``b""`` is the root.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Final, final

__all__ = ["Directories", "join", "split"]

_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_OPEN: Final = 128
# The number of a directory's last ancestors that the cache keeps, too: the next path is often near
# them, and few other directories leave the cache.
_KEPT_ANCESTORS: Final = 16


def join(parent: bytes, name: bytes) -> bytes:
    """Return the path of ``name`` in ``parent``."""
    return parent + b"/" + name if parent else name


def split(path: bytes) -> tuple[bytes, bytes]:
    """Split a path into its parent and its name there."""
    parent, _, name = path.rpartition(b"/")
    return parent, name


@final
class Directories:
    """A cache of the most recently used open directories.

    A returned descriptor stays open during the next call of `open`; a later call may close it.
    Call `forget` for each directory that is replaced or removed.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._open: OrderedDict[bytes, int] = OrderedDict()

    def open(self, path: bytes) -> int:
        """Return the descriptor of a directory.

        Raises:
            FileNotFoundError: If the directory or one of its ancestors does not exist.
            NotADirectoryError: If one of them is not a directory; a link is none.
        """
        if not path:
            return self._root
        known = self._open.get(path)
        if known is not None:
            self._open.move_to_end(path)
            return known
        end = len(path)
        while end > 0 and path[:end] not in self._open:
            end = path.rfind(b"/", 0, end)
        here, end = self._root, max(end, 0)
        if end:
            here = self._open[path[:end]]
            self._open.move_to_end(path[:end])
        names = path[end + 1 if end else 0 :].split(b"/")
        passed = None
        try:
            for left, name in zip(range(len(names) - 1, -1, -1), names, strict=True):
                here = os.open(name, _DIRECTORY_FLAGS, dir_fd=here)
                if passed is not None:
                    os.close(passed)
                    passed = None
                end += len(name) + (1 if end else 0)
                if left < _KEPT_ANCESTORS:
                    self._keep(path[:end], here)
                else:
                    passed = here
        finally:
            if passed is not None:
                os.close(passed)
        return here

    def forget(self, path: bytes) -> None:
        """Close ``path`` and all directories below it."""
        below = path + b"/"
        for known in [k for k in self._open if k == path or k.startswith(below)]:
            os.close(self._open.pop(known))

    def close(self) -> None:
        """Close all directories except the root."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _keep(self, path: bytes, descriptor: int) -> None:
        self._open[path] = descriptor
        if len(self._open) > _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
