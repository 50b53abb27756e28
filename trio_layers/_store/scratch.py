"""Unfinished files in ``ingest/``, and their holders in ``leases/``.

Each open store is a *holder*: it has a name, and a file ``leases/NAME`` that it keeps locked while
it is open. Its files in ``ingest/`` have that name until they are renamed to their visible places.
The kernel drops the locks of a dead process. The files of a holder whose lock is free are
therefore garbage, and are swept away. A partial blob is named after its digest instead: it
outlives its holder, so that a later download goes on from it.

If the lock tells nothing, because its file was removed or belongs to another machine, the file
and the rows of leases name the holder's process, and the sweep looks for that process. The files
of a holder that may be alive elsewhere are swept when they are a day old.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, final

import attrs
import trio

from .._catalog.catalog import Catalog
from .._catalog.rows import drop_leases, find_holders
from .._digest import Digest
from .._disk_errors import disk_errors
from .._errors import StoreError, StoreReadOnly
from .._files import file_name, remove_directory, try_lock, unlock
from .._lifetime import clean_up_in_thread
from .._nursery import open_hidden_nursery
from .._processes import Fate, Process

__all__ = ["HeldLock", "Scratch", "Watch", "hold_lock", "open_scratch"]

logger = logging.getLogger(__name__)

# Seconds between two attempts to take a lock.
_POLL: Final = 0.05

# Seconds between two reports of another holder's progress.
_LOOK: Final = 0.1

# Seconds for which the files of a holder that may be alive are kept.
_DAY: Final = 24 * 3600

# Maximum number of bytes to read from a lock file.
_PROCESS_LIMIT: Final = 4096

_OPEN_HERE: Final[set[str]] = set()
"""Names of the holders in this process."""

_HOLDER: Final = re.compile(r"[0-9a-f]{16}")
_HELD: Final = re.compile(r"([0-9a-f]{16})-[0-9]+\.[a-z]+")


@final
@attrs.define(eq=False)
class Watch:
    """The progress of another task's or process's download of a blob.

    Attributes:
        path: The growing file.
        size: The final size of the blob in bytes.
        report: Called with the size of the file when it has changed.
    """

    path: Path
    size: int
    report: Callable[[int], None]
    _seen: int = 0
    _looked_at: float = -math.inf

    async def look(self) -> None:
        """Report the size of the file, at most once every `_LOOK` seconds."""
        if trio.current_time() - self._looked_at < _LOOK:
            return
        size = min(await trio.to_thread.run_sync(self._measure), self.size)
        self._looked_at = trio.current_time()
        if size != self._seen:
            self._seen = size
            self.report(size)

    def _measure(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:
            # The file does not exist yet, or is a visible blob by now.
            return self._seen


@final
class HeldLock:
    """A locked lock file, from `hold_lock`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Release the lock if it is held; blocking, for any thread."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            unlock(self._path, descriptor)


@asynccontextmanager
async def hold_lock(
    path: Path, watch: Watch | None = None, *, text: str = ""
) -> AsyncIterator[HeldLock]:
    """Hold a lock file for the block, against other tasks and processes.

    Never wait for one lock while holding another: two tasks with different orders would wait for
    ever.

    Cancellation: the wait for the lock ends.

    Args:
        path: The lock file.
        watch: Reports the progress of the present holder during the wait.
        text: The contents of the lock file.

    Raises:
        StoreError: if the lock file cannot be made.
    """

    def attempt() -> int | None:
        with disk_errors(path.parent):
            descriptor = try_lock(path)
            if descriptor is not None and text:
                try:
                    os.write(descriptor, text.encode())
                except BaseException:
                    unlock(path, descriptor)
                    raise
            return descriptor

    # The kernel does not report that a lock has become free.
    while (descriptor := await trio.to_thread.run_sync(attempt)) is None:
        if watch is not None:
            await watch.look()
        await trio.sleep(_POLL)
    lock = HeldLock(path, descriptor)
    try:
        yield lock
    finally:
        await clean_up_in_thread(lock.release)


@asynccontextmanager
async def open_scratch(
    root: Path, catalog: Catalog, *, read_only: bool = False
) -> AsyncIterator[Scratch]:
    """Register a holder for the block, and remove the files of dead holders.

    With ``read_only``, the block has no holder, and refuses all writes.

    Discarded files are removed during the block or, if it ends without an error, at its end. After
    an error, the next process that opens the store removes them.
    """
    if read_only:
        yield Scratch(root, read_only=True)
        return
    scratch = Scratch(root)
    async with hold_lock(root / "leases" / scratch.holder, text=scratch.process):
        _OPEN_HERE.add(scratch.holder)
        try:
            async with open_hidden_nursery() as nursery:
                nursery.start_soon(scratch.sweep_in_background, catalog)
                try:
                    yield scratch
                finally:
                    nursery.cancel_scope.cancel()
            await scratch.sweep()
        finally:
            _OPEN_HERE.discard(scratch.holder)


@final
class Scratch:
    """A holder's names in ``ingest/``, and the removal of discarded files."""

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        self._read_only = read_only
        self._ingest = root / "ingest"
        self._leases = root / "leases"
        self._numbers = itertools.count()
        self._waste = trio.Event()
        self._sweeping = trio.Lock()
        # Number of ended `name` blocks that still move their files to the trash.
        self._discarding = 0
        self._discarded = trio.Event()
        self.holder: str = secrets.token_hex(8)
        self.process: str = Process.current().encode()

    def new(self, kind: str) -> Path:
        """Return an unused path in ``ingest/``, in any thread.

        Args:
            kind: The suffix of the name, in letters.
        """
        self._expect_writable()
        return self._ingest / f"{self.holder}-{next(self._numbers)}.{kind}"

    def partial(self, digest: Digest) -> Path:
        """Return the path of a blob's partial file."""
        self._expect_writable()
        return self._ingest / f"{file_name(digest)}.partial"

    def lock(self, digest: Digest) -> Path:
        """Return the path of a blob's lock file, which protects its arrival and unpacking."""
        self._expect_writable()
        return self._ingest / f"{file_name(digest)}.lock"

    def _expect_writable(self) -> None:
        if self._read_only:
            raise StoreReadOnly(
                f"the store {self._ingest.parent} was opened read-only: "
                "open it without read_only, as the user who owns it"
            )

    def discard(self, path: Path) -> bool:
        """Move a file or directory to the trash, for the next sweep; return whether it existed.

        Blocking, for any thread.
        """
        try:
            os.rename(path, self.new("trash"))
        except FileNotFoundError:
            return False
        return True

    @asynccontextmanager
    async def name(self, kind: str) -> AsyncIterator[Path]:
        """Yield an unused path, as from `new`, for a file or a directory.

        If the path exists at the end of the block, it is discarded. The block does not wait for
        the removal.
        """
        path = self.new(kind)
        try:
            yield path
        finally:
            self._discarding += 1
            try:
                if await clean_up_in_thread(self._discard_unused, path):
                    self._waste.set()
            except OSError as error:
                # The file still has the holder's name, and is swept when the store is left.
                logger.warning("cannot move %s out of the way: %s", path, error)
            finally:
                self._discarding -= 1
                self._discarded.set()
                self._discarded = trio.Event()

    def _discard_unused(self, path: Path) -> bool:
        """Discard a mount's directory unless another namespace has a copy of the mount."""
        return not (path.suffix == ".mount" and _is_mounted(path)) and self.discard(path)

    async def sweep(self) -> None:
        """Remove all files of this holder.

        Cancellation: another sweep removes the rest.
        """
        while self._discarding:
            await self._discarded.wait()
        await trio.to_thread.run_sync(self._remove, self.holder, "")

    async def sweep_in_background(self, catalog: Catalog) -> None:
        """Remove the files of dead holders, then discarded files, until cancelled."""
        try:
            await self.sweep_after_the_dead(catalog)
        except StoreError as error:
            # None of these files is visible, and the next opening of the store tries again.
            logger.warning("cannot remove the files of dead processes: %s", error)
        while True:
            await self._waste.wait()
            self._waste = trio.Event()
            await trio.to_thread.run_sync(self._remove, self.holder, ".trash")

    async def sweep_after_the_dead(self, catalog: Catalog) -> None:
        """Remove the files and leases of dead holders, one sweep at a time.

        Raises:
            StoreError: for errors of the disk.
        """
        self._expect_writable()
        async with self._sweeping:
            with disk_errors(self._ingest):
                await self._sweep_after_the_dead(catalog)

    async def _sweep_after_the_dead(self, catalog: Catalog) -> None:
        # Of a holder that could not end its leases, only the leases may be left.
        leases = await catalog.read(find_holders)
        others = await trio.to_thread.run_sync(self._others, leases)
        for holder, items in others.items():
            path = self._leases / holder
            judge = partial(self._lock_dead, holder, leases.get(holder), items)
            descriptor = await trio.to_thread.run_sync(judge)
            if descriptor is None:
                continue
            # The lock file goes last: after a cancellation, another sweep does all steps again.
            try:
                await trio.to_thread.run_sync(self._remove, holder, "")
                await catalog.write(drop_leases, holder)
                await trio.to_thread.run_sync(os.unlink, path)
            finally:
                os.close(descriptor)
        await trio.to_thread.run_sync(self._remove_locks)

    def _others(self, holders: Iterable[str]) -> dict[str, list[str]]:
        """Find the other holders, with their entries in ``ingest/`` except mounts.

        Mount directories stay while they are mounted, even after the death of their holder.
        """
        found: dict[str, list[str]] = {holder: [] for holder in holders}
        for name in os.listdir(self._ingest):
            if match := _HELD.fullmatch(name):
                items = found.setdefault(match[1], [])
                if not name.endswith(".mount"):
                    items.append(name)
        for name in os.listdir(self._leases):
            if _HOLDER.fullmatch(name):
                found.setdefault(name, [])
        found.pop(self.holder, None)
        return found

    def _lock_dead(self, holder: str, process: str | None, items: list[str]) -> int | None:
        """Take the lock of a dead holder; ``None`` if the holder may be alive."""
        path = self._leases / holder
        descriptor: int | None = None
        with disk_errors(self._leases):
            with contextlib.suppress(FileNotFoundError):
                descriptor = try_lock(path, make=False)
                if descriptor is None:
                    return None
            unlocked = descriptor is not None
            if descriptor is not None:
                process = (
                    os.pread(descriptor, _PROCESS_LIMIT, 0).decode("ascii", "replace") or process
                )
            known = Process.decode(process)
            if known is None:
                # Older software writes no process, and trusts the lock files while they exist.
                fate: Fate = "dead" if unlocked or not items else "unknown"
            else:
                fate = known.fate(unlocked=unlocked)
            if fate == "alive" and known is not None and known.is_current:
                # A holder of this process could not end its leases when it left the store.
                fate = "alive" if holder in _OPEN_HERE else "dead"
            if fate == "unknown" and not self._is_young(path, items, known):
                fate = "dead"
            if fate == "dead":
                return descriptor if unlocked else try_lock(path)
            if descriptor is not None:
                os.close(descriptor)
        if fate == "unknown":
            # No process writes discarded files any more, so they can go.
            self._remove(holder, ".trash")
        logger.warning(
            "%s: found no lock of %s: its files and leases are kept%s",
            path,
            "the holder" if known is None else f"process {known.pid}, which may be alive",
            "" if fate == "alive" else " for a day",
        )
        return None

    def _is_young(self, lease: Path, items: list[str], process: Process | None) -> bool:
        times = [] if process is None else [process.since]
        for path in (lease, *(self._ingest / name for name in items)):
            with contextlib.suppress(FileNotFoundError):
                times.append(os.lstat(path).st_mtime)
        return any(abs(time.time() - each) < _DAY for each in times)

    def _remove_locks(self) -> None:
        """Remove the lock files that are free; a task that waits for one tries again."""
        for path in self._ingest.glob("*.lock"):
            descriptor = try_lock(path)
            if descriptor is not None:
                unlock(path, descriptor)

    def _remove(self, holder: str, suffix: str) -> None:
        try:
            names = os.listdir(self._ingest)
        except OSError as error:
            logger.warning("cannot list the discarded files in %s: %s", self._ingest, error)
            return
        for name in names:
            match = _HELD.fullmatch(name)
            if not match or match[1] != holder or not name.endswith(suffix):
                continue
            path = self._ingest / name
            try:
                if name.endswith(".mount"):
                    _detach_stale(path)
                    if _is_mounted(path):
                        continue  # the mount still uses its mark and written files
                if path.is_dir() and not path.is_symlink():
                    remove_directory(
                        path,
                        aside=lambda: self.new("trash"),
                        check_cancelled=trio.from_thread.check_cancelled,
                    )
                else:
                    path.unlink()
            except OSError as error:
                logger.warning("cannot remove %s: %s", path, error)


def _is_mounted(path: Path) -> bool:
    from .._rootfs.mount_table import is_mounted  # most programs mount nothing

    return is_mounted(path)


def _detach_stale(path: Path) -> None:
    from .._rootfs.mount import detach_stale  # most programs find no such mount

    detach_stale(path)
