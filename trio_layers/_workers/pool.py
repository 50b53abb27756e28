"""Worker processes, which unpack layers without delaying the trio loop.

A thread that makes a file takes the interpreter's lock a dozen times, from the trio loop and from
the threads of other layers. On two cores, this doubles the time of a pull of many small files.
`multiprocessing` would import the program's ``__main__`` again. These processes import only the
modules that they need.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, cast, final

import attrs
import trio

from .._errors import StoreClosed, WorkerError
from .._lifetime import Lifetime
from .._nursery import open_hidden_nursery
from .._tar.limits import Limits
from .._tree.unpacked import Unpacked
from .._version import __version__
from .arrival_state import Abandoned, Recalled, Snapshot, WorkerLost
from .build import Arrival
from .lending import Lending, Loan, follow_in_thread
from .program import (
    ANSWER,
    BEAT,
    BEAT_FIELDS,
    FRAME,
    JOB,
    SNAPSHOT,
    SNAPSHOT_FIELDS,
    Beat,
    Job,
    frame,
)

__all__ = ["Worker", "Workers", "open_workers", "start_worker"]

logger = logging.getLogger(__name__)

# Limits on the number of processes; more processes than cores would wait for each other.
_MIN_PROCESSES: Final = 2
_MAX_PROCESSES: Final = 8

# The size of a blob that is worth a second thread, if nothing else needs the core.
_READ_AHEAD_SIZE: Final = 16 << 20

# Seconds in which a worker must start, because the executable may not be an interpreter.
_START_LIMIT: Final = 30

# Seconds in which a worker must stop its work. A worker in the middle of a system call, or of a
# block that expands to gigabytes, is killed.
_STOP_LIMIT: Final = 0.05

# The same limit for a recall. No cancelled task waits for a recall, so the limit is longer.
_RECALL_LIMIT: Final = 1.0

# A worker counts as stopped after `_SILENCES` periods of `_SILENCE` seconds without a beat. One
# period is not enough, because this process itself may have been stopped; the beats are then
# waiting in the pipe.
_SILENCE: Final = 5.0
_SILENCES: Final = 2

# Seconds in which a worker that sends beats and does not wait for bytes must finish a chunk or an
# entry. An overloaded disk can delay a single write for long.
_HANG_LIMIT: Final = 30.0

# Seconds to wait for the end of a killed process. A process that hangs in the kernel ends only
# when the kernel returns.
_REAP_LIMIT: Final = 1.0

# Seconds until the next attempt to start a worker: after the first failure, and the maximum.
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 60.0

# Errors that another attempt to start a worker cannot change.
_PERMANENT: Final = frozenset(
    {
        errno.EACCES,
        errno.ELIBBAD,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOEXEC,
        errno.ENOSYS,
        errno.ENOTDIR,
        errno.EPERM,
    }
)

# The modules that a worker loads and that are not part of Python.
_LIBRARIES: Final = ("attr", "isal", "backports.zstd")

_PACKAGE: Final = os.path.abspath(Path(__file__).parents[1])

# The worker loads the package without its __init__, which would load all modules.
_PROGRAM: Final = """
import sys, types
sys.path[:] = sys.argv[2:]
package = sys.modules["trio_layers"] = types.ModuleType("trio_layers")
package.__path__ = [sys.argv[1]]
from trio_layers._workers import program
program.main()
"""


@asynccontextmanager
async def open_workers(limits: Limits) -> AsyncIterator[Workers]:
    """Open workers for the block.

    Worker processes start when the first jobs are expected, and stay until the block ends. Leaving
    the block ends the running `Workers.follow` calls of all tasks with `StoreClosed`.

    Cancellation: leaving kills the processes, and waits a limited time for their ends.
    """
    lifetime = Lifetime(lambda: StoreClosed("the store is closed: open it again to unpack layers"))
    idle: list[Worker] = []
    try:
        async with open_hidden_nursery() as nursery:
            workers = Workers(limits, nursery, idle, lifetime, _command())
            try:
                yield workers
            finally:
                await lifetime.close()
                nursery.cancel_scope.cancel()
    finally:
        await kill_all(idle)


@final
class Workers:
    """A `Builder` that uses processes.

    The limiter's tokens bound the number of processes. If no process can be started, threads do
    the work, and a later call tries to start a process again.
    """

    def __init__(
        self,
        limits: Limits,
        nursery: trio.Nursery,
        idle: list[Worker],
        lifetime: Lifetime,
        command: list[str],
    ) -> None:
        number = min(max(_MIN_PROCESSES, len(os.sched_getaffinity(0))), _MAX_PROCESSES)
        self.limiter: trio.CapacityLimiter = trio.CapacityLimiter(number)
        self._lending = Lending(self.limiter)
        self._threads = trio.CapacityLimiter(math.inf)
        self._limits = limits
        self._nursery = nursery
        self._lifetime = lifetime
        self._command = command
        self._idle = idle
        self._number = 0
        self._changed = trio.Event()
        # Python may be embedded in another program, which must not be started again.
        self._can_start = bool(sys.executable) and not getattr(sys, "frozen", False)
        self._pause = _FIRST_PAUSE
        self._try_at = -math.inf

    def __repr__(self) -> str:
        return (
            f"<Workers: {self._number} processes, {len(self._idle)} idle, {self.waiting} waiting>"
        )

    @property
    def waiting(self) -> int:
        return self._lending.waiting

    def prepare(self) -> None:
        """Start one more worker for a job that will come soon, if none is idle."""
        if not self._idle and self._number < self.limiter.total_tokens and self._may_start():
            self._start_one()

    async def follow(self, arrival: Arrival) -> Unpacked:
        """See `Builder`.

        Raises:
            StoreClosed: if the block of the workers ended before or during the call.
        """
        async with self._lifetime.use(), self._lending.lend(arrival) as loan:
            worker = await self._take_worker()
            if worker is not None:
                return await self._run_job(worker, loan)
            if arrival.restarts.lost:
                # The layer may have killed the worker, and must not end this program, too.
                error = WorkerError(
                    "its worker process was lost, and no other can be started: try again"
                )
                error.layer = arrival.blob.digest
                raise error
            return await follow_in_thread(loan, self._limits, self._threads)

    def _may_start(self) -> bool:
        return self._can_start and self._lifetime.is_open and trio.current_time() >= self._try_at

    async def _take_worker(self) -> Worker | None:
        """Return an idle worker; ``None`` if none can be started now."""
        while True:
            while self._idle:
                worker = self._idle.pop()
                if worker.alive:
                    return worker
                # It was killed while idle, perhaps because memory was short.
                self._number -= 1
                await worker.kill()
            if self._number < self.limiter.borrowed_tokens:
                if not self._may_start():
                    return None
                self._start_one()
            await self._changed.wait()

    def _start_one(self) -> None:
        self._number += 1
        self._nursery.start_soon(self._start)

    async def _start(self) -> None:
        try:
            self._idle.append(await start_worker(self._command))
            self._pause = _FIRST_PAUSE
        except Exception as error:  # after any error, threads can do the work
            self._number -= 1
            # The program may have dropped its right to run Python or to read the library.
            again = not (isinstance(error, OSError) and error.errno in _PERMANENT)
            if self._can_start and self._pause == _FIRST_PAUSE:
                logger.warning(
                    "cannot start %s, so threads unpack layers, which is slower: %s%s",
                    self._command[0],
                    error,
                    "; a process is tried again later" if again else "",
                )
            self._can_start = self._can_start and again
            self._try_at = trio.current_time() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._notify_waiters()

    def _notify_waiters(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _run_job(self, worker: Worker, loan: Loan) -> Unpacked:
        arrival = loan.arrival
        state, blob = arrival.state, arrival.blob
        try:
            answer = await self._receive_answer(worker, loan)
        except WorkerError as error:
            arrival.restarts.lost += 1
            if arrival.restarts.lost == 1:
                logger.warning("layer %s: %s; another process starts over", blob.digest, error)
                raise WorkerLost from error
            error.layer = blob.digest
            raise
        finally:
            state.set_listener(None)
            loan.set_stop(None)
            if worker.busy:
                self._number -= 1
                await worker.kill()
            else:
                self._idle.append(worker)
            self._notify_waiters()
        if isinstance(answer, Abandoned) and loan.recalled and not state.snapshot.abandoned:
            raise Recalled
        if isinstance(answer, BaseException):
            raise answer
        return cast(Unpacked, answer)

    async def _receive_answer(self, worker: Worker, loan: Loan) -> object:
        """Send the job and receive its result; `Abandoned` after a recall."""
        arrival = loan.arrival
        state, blob = arrival.state, arrival.blob
        job = Job(
            path=os.fsencode(arrival.path),
            media_type=blob.media_type,
            digest=blob.digest,
            size=blob.size,
            target=os.fsencode(arrival.target),
            limits=attrs.asdict(self._limits),
            read_ahead=arrival.alone and blob.size >= _READ_AHEAD_SIZE,
        )
        worker.send(JOB, pickle.dumps(tuple(job)))
        state.set_listener(worker.send_snapshot)
        loan.is_waiting = lambda: worker.beat.waiting
        with trio.CancelScope() as recalled:
            loan.set_stop(recalled.cancel)
            try:
                return await worker.receive(loan.note_position)
            except trio.Cancelled:
                if not loan.recalled:
                    _stop_job(worker, arrival)
                    with trio.move_on_after(_STOP_LIMIT, shield=True), suppress(WorkerError):
                        await worker.receive(loan.note_position)
                raise
        _stop_job(worker, arrival)
        with trio.move_on_after(_RECALL_LIMIT):
            return await worker.receive(loan.note_position)
        return Abandoned()


def _stop_job(worker: Worker, arrival: Arrival) -> None:
    """Tell one worker to stop its job."""
    arrival.state.set_listener(None)
    worker.send_snapshot(arrival.state.snapshot._replace(abandoned=True))


def _command() -> list[str]:
    """Return a worker's command, independent of the later working directory."""
    flags = ["-I", "-S", *(["-B"] if sys.dont_write_bytecode else [])]
    executable = os.path.abspath(sys.executable) if sys.executable else ""
    return [executable, *flags, "-c", _PROGRAM, _PACKAGE, *_search_path()]


def _search_path() -> list[str]:
    """Return a worker's module path: ours without the working directory.

    An empty entry stands for the current working directory, which may contain modules of other
    users. If this process found its libraries there, the directory comes last in the worker's
    path, so that no file in it can replace a module of Python.
    """
    path: dict[str, None] = {}
    for entry in sys.path:
        if entry:
            path[_absolute(os.fsdecode(entry))] = None
    for name in _LIBRARIES:
        origin = getattr(sys.modules.get(name), "__file__", None)
        if origin:
            path[str(Path(os.path.abspath(origin)).parents[name.count(".") + 1])] = None
    return list(path)


def _absolute(entry: str) -> str:
    """Return a ``sys.path`` entry as Python resolved it on first use."""
    found = getattr(sys.path_importer_cache.get(entry), "path", None)
    return found if isinstance(found, str) and os.path.isabs(found) else os.path.abspath(entry)


async def kill_all(workers: list[Worker]) -> None:
    """End processes concurrently, and wait for their ends with a time limit."""
    with trio.CancelScope(shield=True):
        async with trio.open_nursery() as nursery:
            for worker in workers:
                nursery.start_soon(worker.kill)


async def start_worker(command: list[str] | None = None) -> Worker:
    """Start a worker, and wait until it is ready.

    It runs in a session of its own, so that no key on the terminal interrupts it.

    Cancellation: the process is killed.

    Raises:
        OSError, WorkerError: if the worker cannot start.
    """
    theirs, ours = os.pipe()
    try:
        process = await trio.lowlevel.open_process(
            command or _command(),
            stdin=theirs,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    # A write must never wait; see `Worker.send`.
    os.set_blocking(ours, False)
    worker = Worker(process, ours)
    try:
        with trio.move_on_after(_START_LIMIT):
            version = await worker.receive(lambda _: None, silences=math.inf)
            if version == __version__:
                return worker
            raise WorkerError(
                f"worker has version {version} of trio_layers, expected {__version__}"
            )
        raise WorkerError(f"worker did not answer within {_START_LIMIT} seconds")
    except BaseException:
        await worker.kill()
        raise


@final
class Worker:
    """A worker process, and the two pipes to it.

    Attributes:
        busy: Whether an answer is due: to a job, or to the start.
        beat: The progress in the worker's last message.
    """

    def __init__(self, process: trio.Process, messages: int) -> None:
        self.busy = True
        self.beat = Beat(0, 0, waiting=False)
        self._process = process
        assert process.stdout is not None
        self._answers = process.stdout
        self._received = bytearray()
        self._messages = messages

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    def send_snapshot(self, snapshot: Snapshot) -> None:
        """Send the state of the job's blob, from any thread."""
        self.send(SNAPSHOT, SNAPSHOT_FIELDS.pack(*snapshot))

    def send(self, kind: int, payload: bytes) -> None:
        """Send a message, without waiting: the pipe has room for thousands."""
        if kind == JOB:
            self.busy = True
            self.beat = Beat(0, 0, waiting=False)
        message = frame(kind, payload)
        try:
            if os.write(self._messages, message) < len(message):
                self._process.kill()
        except BlockingIOError:
            # The worker has not read its pipe during gigabytes of the blob.
            self._process.kill()
        except BrokenPipeError:
            pass  # the worker has died; `receive` raises for that

    async def receive(
        self, report: Callable[[int], object], *, silences: float = _SILENCES
    ) -> object:
        """Wait for the answer, and report progress until then.

        Cancellation: the worker keeps its job, and a later call can receive the answer.

        Args:
            report: Called with the number of bytes of the blob that the worker has read.
            silences: Number of times that `_SILENCE` seconds may pass without a message.

        Raises:
            WorkerError: if the worker dies, runs out of memory, or makes no more progress.
        """
        heard_at = moved_at = trio.current_time()
        silent = 0
        while True:
            message: tuple[int, bytes] | None = None
            with trio.move_on_after(_SILENCE):
                message = await self._next_message()
            now = trio.current_time()
            if message is None:
                silent += 1
                if silent >= silences:
                    raise WorkerError(
                        f"the worker process has not answered for {now - heard_at:.0f} seconds, "
                        "because it was stopped or the machine is overloaded: pull again"
                    )
                continue
            silent, heard_at = 0, now
            kind, payload = message
            if kind == ANSWER:
                answer = _unpickle_answer(payload)
                self.busy = False
                return answer
            if kind != BEAT or len(payload) != BEAT_FIELDS.size:
                raise WorkerError("the worker process sent an unknown message: pull again")
            beat = Beat(*BEAT_FIELDS.unpack(payload))
            if beat.waiting or beat[:2] != self.beat[:2]:
                moved_at = now
            elif now - moved_at > _HANG_LIMIT:
                raise WorkerError(
                    f"the worker process has hung in the kernel for {now - moved_at:.0f} seconds: "
                    "check the disk and its file system, and pull again"
                )
            self.beat = beat
            report(beat.position)

    async def kill(self) -> None:
        """End the process, and wait with a time limit; shielded from cancellation."""
        self._process.kill()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(_REAP_LIMIT):
                await self._process.wait()
            if self._process.returncode is None:
                logger.warning("killed process %d hangs in the kernel", self._process.pid)
            os.close(self._messages)
            await self._answers.aclose()

    async def _next_message(self) -> tuple[int, bytes]:
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
                raise WorkerError(_describe_exit(await self._process.wait()))
            received += data


def _unpickle_answer(payload: bytes) -> object:
    try:
        # Unpickling is safe here: the bytes come from our own program.
        answer: object = pickle.loads(payload)
    except Exception as error:  # any error means an invalid answer
        raise WorkerError(
            f"the worker process sent an invalid answer ({error}): pull again"
        ) from error
    if isinstance(answer, MemoryError):
        raise WorkerError("the worker process ran out of memory: free memory and pull again")
    if isinstance(answer, WorkerError):
        raise answer
    return answer


def _describe_exit(status: int) -> str:
    if status == -signal.SIGKILL:
        return (
            "the worker process was killed by signal 9, which the kernel sends when memory is "
            "short: free memory and try again"
        )
    if status < 0:
        return f"the worker process was killed by signal {-status}: try again"
    return f"the worker process ended with status {status}: try again"
