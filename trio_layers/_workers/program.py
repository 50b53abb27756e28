"""The program of a worker process, which `trio_layers._workers.pool` starts.

It loads neither trio nor httpx, nor the ``__main__`` of the other process. It reads jobs and the
states of their blobs from its standard input, and writes answers to its standard output. It ends at
once when its input ends, because then the other process has closed the pipe or died.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import queue
import struct
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from .._digest import Digest
from .._errors import LayersError, WorkerError
from .._manifest import Descriptor
from .._tar.limits import Limits
from .._version import __version__
from .arrival_state import Abandoned, ArrivalState, Snapshot, StartedOver
from .build import Arrival, follow

if TYPE_CHECKING:
    from queue import SimpleQueue

__all__ = [
    "ANSWER",
    "BEAT",
    "BEAT_FIELDS",
    "FRAME",
    "JOB",
    "SNAPSHOT",
    "SNAPSHOT_FIELDS",
    "Beat",
    "Job",
    "frame",
]

FRAME: Final = struct.Struct("=BI")
"""The header of each message: its kind and its size in bytes."""

# Messages to the worker: a job's fields in a pickle, and the state of its blob.
JOB: Final = 0
SNAPSHOT: Final = 1
# Messages from the worker: its progress during a job, the pickled result or exception of a job,
# and its version once it is ready.
BEAT: Final = 2
ANSWER: Final = 3

SNAPSHOT_FIELDS: Final = struct.Struct("=QQ??")

BEAT_FIELDS: Final = struct.Struct("=QQ?")

# Seconds between two beats, and the number of unchanged beats to leave out before one is sent.
_BEAT_INTERVAL: Final = 0.05
_SKIPPED_BEATS: Final = 20


class Beat(NamedTuple):
    """The progress of a worker in its job.

    Attributes:
        position: Number of bytes of the blob that the worker has read.
        checks: Number of checks for cancellation so far, one at each chunk and entry.
        waiting: Whether the worker waits for bytes that have not arrived.
    """

    position: int
    checks: int
    waiting: bool


class Job(NamedTuple):
    """A blob to unpack, as plain values, which can be pickled without their classes.

    Attributes:
        path: The file in which the blob arrives.
        media_type: The media type of its descriptor.
        digest: The digest of its descriptor.
        size: The size of its descriptor.
        target: The directory for its tree.
        limits: The arguments of `Limits`.
        read_ahead: Whether another core may inflate the blob.
    """

    path: bytes
    media_type: str
    digest: str
    size: int
    target: bytes
    limits: dict[str, int]
    read_ahead: bool


def frame(kind: int, payload: bytes) -> bytes:
    return FRAME.pack(kind, len(payload)) + payload


def main() -> None:
    # With umask 0, files get exactly the mode they are made with. So compiled modules must not be
    # written: all users could change them.
    sys.dont_write_bytecode = True
    os.umask(0)
    with contextlib.suppress(OSError):
        # A long computation should let interactive processes go first.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    from .._tree import unpack  # noqa: F401  needed by the first job, which shall not wait for it

    # The loaded modules stay for ever, and jobs make few reference cycles.
    gc.freeze()
    # A library that prints must not disturb the answers.
    answers = os.dup(1)
    os.dup2(2, 1)
    jobs: SimpleQueue[tuple[Job, ArrivalState]] = queue.SimpleQueue()
    heartbeat = _Heartbeat(answers)
    threading.Thread(target=_receive_jobs, args=(jobs,), daemon=True).start()
    threading.Thread(target=heartbeat.run, daemon=True).start()
    _send(answers, frame(ANSWER, pickle.dumps(__version__)))
    while True:
        job, state = jobs.get()
        heartbeat.begin(state)
        heartbeat.end(_pickle_answer(_run_job(job, state, heartbeat)))


def _receive_jobs(jobs: SimpleQueue[tuple[Job, ArrivalState]]) -> None:
    state = ArrivalState()
    job: Job | None = None
    try:
        with open(0, "rb") as messages:
            while head := messages.read(FRAME.size):
                kind, size = FRAME.unpack(head)
                payload = messages.read(size)
                if kind == JOB:
                    job, state = Job(*pickle.loads(payload)), ArrivalState()
                    continue
                state.copy(Snapshot(*SNAPSHOT_FIELDS.unpack(payload)))
                if job is not None:
                    # A job starts only once the attempt is known.
                    jobs.put((job, state))
                    job = None
    finally:
        # After the end of the input, or an error, no more messages can be read.
        os._exit(1)


def _pickle_answer(answer: object) -> bytes:
    try:
        return pickle.dumps(answer)
    except Exception as error:  # an exception's own fields may not be picklable
        reason = f"{type(error).__name__}: {error}"
        text = f"cannot send the answer of the worker process ({reason}): {answer!r}"
        return pickle.dumps(WorkerError(text))


def _run_job(job: Job, state: ArrivalState, heartbeat: _Heartbeat) -> object:
    """Run a job, and return its result or exception."""
    try:
        arrival = Arrival(
            Path(os.fsdecode(job.path)),
            state,
            Descriptor(job.media_type, Digest(job.digest), job.size),
            Path(os.fsdecode(job.target)),
            heartbeat.note_position,
        )
        limits = Limits(**job.limits)
        return follow(arrival, limits, read_ahead=job.read_ahead, no_umask=True)
    except Exception as error:
        if not isinstance(error, LayersError | StartedOver | Abandoned):
            # Loading traceback takes longer than unpacking a small layer.
            import traceback

            error.add_note("".join(traceback.format_exception(error)))
        # Pickling drops the traceback and the cause.
        return error


class _Heartbeat:
    """Sends beats during a job.

    Beats distinguish a worker that waits for bytes from a stopped worker.
    """

    def __init__(self, answers: int) -> None:
        self._answers = answers
        # The lock ensures that no beat of a job follows its answer.
        self._sending = threading.Lock()
        self._busy = threading.Event()
        self._state = ArrivalState()
        self._position = 0

    def note_position(self, position: int) -> None:
        """Record the number of bytes read, from any thread."""
        self._position = position

    def begin(self, state: ArrivalState) -> None:
        self._position, self._state = 0, state
        self._busy.set()

    def end(self, answer: bytes) -> None:
        with self._sending:
            self._busy.clear()
            _send(self._answers, frame(ANSWER, answer))

    def run(self) -> None:
        last, silent = None, 0
        while True:
            self._busy.wait()
            time.sleep(_BEAT_INTERVAL)
            with self._sending:
                if not self._busy.is_set():
                    continue
                beat = Beat(self._position, self._state.checks, self._state.is_waiting())
                if beat == last and silent < _SKIPPED_BEATS:
                    silent += 1
                    continue
                last, silent = beat, 0
                _send(self._answers, frame(BEAT, BEAT_FIELDS.pack(*beat)))


def _send(answers: int, data: bytes) -> None:
    try:
        while data:
            data = data[os.write(answers, data) :]
    except BrokenPipeError:
        # The other process has closed the pipe. `_receive_jobs` may be about to notice it, too.
        os._exit(0)
