"""The program of a process that makes trees; `trio_layers._workers.pool` starts it and talks to it.

It loads neither trio nor httpx, nor whatever ``__main__`` the other process has. Jobs and how far
their blobs have come arrive on its standard input, answers leave by its standard output. When its
input ends, it ends, whatever it is at: nobody wants it any more.
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
"""What comes before each message: its kind, and how many bytes it has."""

# To the worker: a job's fields in a pickle, the state of a job's state.
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
    """A blob to be unpacked; of plain values, which need no class on the other side.

    Attributes:
        path: Where it arrives.
        media_type, digest, size: Its descriptor.
        target: Where its tree is made.
        limits: The arguments of `Limits`.
        read_ahead: Whether another core may inflate it.
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
    # Files get the mode they are made with; what is compiled would be anybody's to write to.
    sys.dont_write_bytecode = True
    os.umask(0)
    with contextlib.suppress(OSError):
        # Much to do, and nobody who waits for an answer: whoever does goes first.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    # What is loaded stays, and what is done makes few cycles.
    gc.freeze()
    # Whoever prints must not be in the way.
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
                    # Not before it is known which attempt it is.
                    jobs.put((job, state))
                    job = None
    finally:
        # Whatever it is, nothing more can be heard.
        os._exit(1)


def _pickle_answer(answer: object) -> bytes:
    try:
        return pickle.dumps(answer)
    except Exception as error:  # of an exception's own fields
        text = f"its answer cannot be sent ({type(error).__name__}: {error}): {answer!r}"
        return pickle.dumps(WorkerError(text))


def _run_job(job: Job, state: ArrivalState, heartbeat: _Heartbeat) -> object:
    """What becomes of a job, an exception included."""
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
            # To load it takes longer than to unpack a small layer.
            import traceback

            error.add_note("".join(traceback.format_exception(error)))
        # Its traceback stays here, and so does what caused it.
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
        # Nobody wants to know: see `_receive_jobs`, which may be about to find out, too.
        os._exit(0)
