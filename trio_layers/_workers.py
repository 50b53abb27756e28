"""Processes that make trees, so that a layer takes no time from the one that pulls it.

In threads, each file that is made takes the interpreter's lock a dozen times, from the trio loop
and from the other layers: with two cores that doubles the time of a pull of many small files.
`multiprocessing` would import the program's ``__main__`` again; these import what they need.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, cast, final

import attrs
import trio

from ._errors import WorkerError
from ._nursery import open_hidden_nursery
from ._store.build import Arrival
from ._store.growth import State
from ._store.trees import Threads, Unpacked
from ._unpack.limits import Limits
from ._unpack.unpacker import Unpacker
from ._version import __version__
from ._worker import ANSWER, FRAME, GROWTH, JOB, STATE, Job, frame

__all__ = ["Worker", "Workers", "open_workers", "start_worker"]

logger = logging.getLogger(__name__)

# More than there are cores would only wait for each other.
_FEWEST: Final = 2
_MOST: Final = 8

# Bytes of a blob that are worth a second thread, where nothing else needs the core.
_LARGE: Final = 16 << 20

# Seconds in which a worker should have started: what runs may be no interpreter.
_START: Final = 30

# Seconds that a worker has to put down its work; one that has it in the middle of a system call,
# or of a block that expands to gigabytes, is killed.
_GRACE: Final = 0.05

# The package without its __init__, which loads all that the package can do.
_PROGRAM: Final = """
import sys, types
sys.path[:] = sys.argv[2:]
package = sys.modules["trio_layers"] = types.ModuleType("trio_layers")
package.__path__ = [sys.argv[1]]
from trio_layers import _worker
_worker.main()
"""


@asynccontextmanager
async def open_workers(limits: Limits) -> AsyncIterator[Workers]:
    """Workers for the block. They are started when there will be something to do for them, and
    stay until the block ends."""
    idle: list[Worker] = []
    try:
        async with open_hidden_nursery() as nursery:
            try:
                yield Workers(limits, nursery, idle)
            finally:
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            for worker in idle:
                await worker.kill()


@final
class Workers:
    """A `~trio_layers._store.trees.Builder` in processes, of which there are never more than
    tokens. Where none can be started, threads do it."""

    def __init__(self, limits: Limits, nursery: trio.Nursery, idle: list[Worker]) -> None:
        number = min(max(_FEWEST, len(os.sched_getaffinity(0))), _MOST)
        self.limiter: trio.CapacityLimiter = trio.CapacityLimiter(number)
        self._limits = limits
        self._nursery = nursery
        self._idle = idle
        self._number = 0
        self._changed = trio.Event()
        # Python may be part of another program, which is not to be started again.
        self._possible = bool(sys.executable) and not getattr(sys, "frozen", False)

    def prepare(self) -> None:
        """There will be something to do soon: start one more worker, if that makes sense."""
        if self._possible and not self._idle and self._number < self.limiter.total_tokens:
            self._start_one()

    async def follow(self, arrival: Arrival) -> Unpacked:
        """See `~trio_layers._store.trees.Builder`."""
        async with self.limiter:
            worker = await self._take()
            if worker is not None:
                return await self._work(worker, arrival)
        return await Threads(Unpacker(self._limits).unpack, self.limiter).follow(arrival)

    async def _take(self) -> Worker | None:
        """A worker that is idle; ``None`` if there can be none."""
        while True:
            while self._idle:
                worker = self._idle.pop()
                if worker.alive:
                    return worker
                # Killed, perhaps for want of memory, while it had nothing to do.
                self._number -= 1
                with trio.CancelScope(shield=True):
                    await worker.kill()
            if not self._possible:
                return None
            if self._number < self.limiter.borrowed_tokens:
                self._start_one()
            await self._changed.wait()

    def _start_one(self) -> None:
        self._number += 1
        self._nursery.start_soon(self._start)

    async def _start(self) -> None:
        try:
            self._idle.append(await start_worker())
        except Exception as error:  # whatever it is, there is another way
            # The program may have given up the right to run it, or to read the library.
            if self._possible:
                logger.warning(
                    "cannot start %s, so threads unpack layers, which is slower: %s",
                    sys.executable,
                    error,
                )
            self._possible = False
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _work(self, worker: Worker, arrival: Arrival) -> Unpacked:
        growth, blob, report = arrival.growth, arrival.blob, arrival.report
        job = Job(
            path=os.fsencode(arrival.path),
            media_type=blob.media_type,
            digest=blob.digest,
            size=blob.size,
            target=os.fsencode(arrival.target),
            limits=attrs.asdict(self._limits),
            ahead=arrival.alone and blob.size >= _LARGE,
        )
        worker.send(JOB, pickle.dumps(tuple(job)))
        growth.listen(worker.tell)
        try:
            try:
                answer = await worker.receive(report)
            except trio.Cancelled:
                growth.abandon()
                with trio.move_on_after(_GRACE, shield=True), suppress(WorkerError):
                    await worker.receive(report)
                raise
            except WorkerError as error:
                error.layer = blob.digest
                raise
        finally:
            growth.listen(None)
            if worker.busy:
                self._number -= 1
                with trio.CancelScope(shield=True):
                    await worker.kill()
            else:
                self._idle.append(worker)
                self._wake()
        if isinstance(answer, BaseException):
            raise answer
        return cast(Unpacked, answer)


async def start_worker() -> Worker:
    """A process of its own session, which no key on the terminal interrupts; it is ready.

    Raises:
        OSError, WorkerError: if there can be none.
    """
    flags = ["-I", "-S", *(["-B"] if sys.dont_write_bytecode else [])]
    paths = [os.fspath(Path(__file__).parent), *map(str, sys.path)]
    theirs, ours = os.pipe()
    try:
        process = await trio.lowlevel.open_process(
            [sys.executable, *flags, "-c", _PROGRAM, *paths],
            stdin=theirs,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    # Whoever writes to it must not wait, see `Worker.send`.
    os.set_blocking(ours, False)
    worker = Worker(process, ours)
    try:
        with trio.move_on_after(_START):
            version = await worker.receive(lambda _: None)
            if version == __version__:
                return worker
            raise WorkerError(f"its library is {version}, and that of the program {__version__}")
        raise WorkerError(f"it did not answer in {_START} seconds")
    except BaseException:
        with trio.CancelScope(shield=True):
            await worker.kill()
        raise


@final
class Worker:
    """A process, and the two pipes to it.

    Attributes:
        busy: Whether it has not answered yet: that it is there, or to a job.
    """

    def __init__(self, process: trio.Process, messages: int) -> None:
        self.busy = True
        self._process = process
        assert process.stdout is not None
        self._answers = process.stdout
        self._received = bytearray()
        self._messages = messages

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    def tell(self, state: State) -> None:
        """Say how far the job's blob has come; in any thread."""
        self.send(GROWTH, STATE.pack(*state))

    def send(self, kind: int, payload: bytes) -> None:
        """Send a message, without waiting: the pipe has room for thousands."""
        if kind == JOB:
            self.busy = True
        message = frame(kind, payload)
        try:
            if os.write(self._messages, message) < len(message):
                self._process.kill()
        except BlockingIOError:
            # It has not listened for gigabytes.
            self._process.kill()
        except BrokenPipeError:
            # It has died; `receive` says so.
            pass

    async def receive(self, report: Callable[[int], object]) -> object:
        """The answer: what becomes of the job.

        Raises:
            WorkerError: if it dies instead.
        """
        while True:
            kind, payload = await self._next()
            if kind == ANSWER:
                self.busy = False
                # Of a program of ours, which does what we would do in its place.
                return pickle.loads(payload)
            report(int.from_bytes(payload, sys.byteorder))

    async def kill(self) -> None:
        """End the process, and wait for that. Not to be cancelled."""
        self._process.kill()
        await self._process.wait()
        os.close(self._messages)
        await self._answers.aclose()

    async def _next(self) -> tuple[int, bytes]:
        received = self._received
        while True:
            if len(received) >= FRAME.size:
                kind, size = FRAME.unpack_from(received)
                end = FRAME.size + size
                if len(received) >= end:
                    payload = bytes(received[FRAME.size : end])
                    del received[:end]
                    return kind, payload
            data = await self._answers.receive_some()
            if not data:
                raise WorkerError(_epitaph(await self._process.wait()))
            received += data


def _epitaph(status: int) -> str:
    if status < 0:
        return f"the process that unpacks was killed by signal {-status}: try again"
    return f"the process that unpacks ended with status {status}: try again"
