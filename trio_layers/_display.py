"""Displays the progress of pulls: bars on a terminal, plain lines, or JSON lines.

A sink puts events into a channel. One task gathers the events of a tenth of a second, keeps the
newest one of each layer's action, and has a thread write them. So a slow or blocked stream only
fills the channel, and does not stop the pull: the engine then skips intermediate states.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from typing import (
    TYPE_CHECKING,
    Final,
    Literal,
    Protocol,
    TextIO,
    TypeAlias,
    cast,
    final,
    get_args,
)

import attrs
import trio

from ._arguments import check_choice
from ._blocks import opens_block
from ._errors import DisplayClosed
from ._lifetime import Lifetime
from ._nursery import open_hidden_nursery
from ._output import Output
from ._progress import Progress, Status
from .abc import ProgressSink

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["DisplayKind", "open_display"]

DisplayKind: TypeAlias = Literal["auto", "tty", "plain", "json", "none"]

logger = logging.getLogger("trio_layers.display")

INTERVAL: Final = 0.1
"""Seconds between two writes."""
PATIENCE: Final = 0.25
"""Seconds for writing the last state after the block has failed."""
BACKLOG: Final = 256
_MOST_ROWS: Final = 1000
"""Maximum number of rows in the last picture of bars.

Drawing so many rows takes about a second.
"""


@opens_block
async def open_display(
    kind: DisplayKind = "auto", *, stream: TextIO | None = None
) -> AsyncIterator[ProgressSink]:
    """Show the progress of the pulls in the block.

    Open the display around the pulls, and pass the sink to each of them. Leaving the block waits
    until the last state is written. After a write error the display writes nothing more, and the
    pulls continue, since an image is worth more than its progress. The sink raises `DisplayClosed`
    for an event after the block, and for an event that still waits when the block is left.

    Cancellation: if the block fails or leaving it is cancelled, the display still tries to write
    the last state, for at most another quarter of a second.

    Args:
        kind: The form of the display. ``tty``: a line with a bar for each layer, redrawn in place;
            without the extra ``cli`` it is the same as ``plain``. ``plain``: a line for each layer
            and action. ``json``: one JSON object per line with the fields of docker's API,
            ``status``, ``id`` and ``progressDetail``. ``none``: nothing. ``auto``: ``tty`` on a
            terminal that can move its cursor, otherwise ``plain``.
        stream: The text stream to write to; ``None``: standard error. It is not closed.

    Yields:
        A sink for any number of pulls. It waits only while the queue is full.
    """
    check_choice("kind", kind, get_args(DisplayKind))
    lifetime = Lifetime(_closed_error)
    stream = stream or sys.stderr
    if kind == "none" or stream is None:  # sys.stderr is None for a closed descriptor

        async def ignore(progress: Progress) -> None:
            async with lifetime.use():
                await trio.lowlevel.checkpoint()

        try:
            yield ignore
        finally:
            await lifetime.close()
        return
    send, receive = trio.open_memory_channel[Progress](BACKLOG)

    async def show(progress: Progress) -> None:
        async with lifetime.use():
            await send.send(progress)

    output = Output(stream)
    # After a cancellation the last state is still written, and above all the cursor is restored.
    shield = trio.CancelScope(shield=True)
    shown = trio.Event()
    try:
        async with open_hidden_nursery() as nursery:
            nursery.start_soon(_show_all, kind, output, receive, shield, shown)
            try:
                yield show
                await _close(lifetime, send)
                await shown.wait()
            except BaseException:
                shield.deadline = trio.current_time() + PATIENCE
                raise
            finally:
                await _close(lifetime, send)
    finally:
        output.leave()


def _closed_error() -> DisplayClosed:
    return DisplayClosed("the display was closed: open it around the pulls that report to it")


async def _close(lifetime: Lifetime, send: trio.MemorySendChannel[Progress]) -> None:
    await lifetime.close()
    send.close()


class _Screen(Protocol):
    """Writes events in one form. A thread calls it, one call at a time."""

    def show(self, events: Sequence[Progress]) -> None: ...

    def close(self) -> None: ...


async def _show_all(
    kind: DisplayKind,
    output: Output,
    receive: trio.MemoryReceiveChannel[Progress],
    shield: trio.CancelScope,
    shown: trio.Event,
) -> None:
    screens: list[_Screen] = []

    def open_screen() -> None:
        screens.append(_make_screen(kind, output))

    with shield:
        try:
            await output.in_thread(open_screen)
            [screen] = screens
            while events := await _gather(receive):
                await output.in_thread(partial(screen.show, events))
            await output.in_thread(screen.close)
        except (OSError, ValueError):  # ValueError: closed, or its encoding lacks a character
            logger.debug("cannot write progress: no more is shown", exc_info=True)
            async for _ in receive:
                pass
    shown.set()


async def _gather(receive: trio.MemoryReceiveChannel[Progress]) -> list[Progress]:
    """Gather the next events to show, in order; an empty list means the end.

    Of events that differ only in their counts, the last one takes the place of the first one.
    """
    events: list[Progress] = []
    newest: dict[str, int] = {}
    scope = trio.CancelScope()
    with scope:
        while True:
            try:
                event = await receive.receive()
            except trio.EndOfChannel:
                break
            if not events:
                scope.deadline = trio.current_time() + INTERVAL
            place = newest.get(event.id)
            if place is not None and events[place].action == event.action:
                events[place] = event
            else:
                newest[event.id] = len(events)
                events.append(event)
    return events


def _make_screen(kind: DisplayKind, stream: Output) -> _Screen:
    if kind == "json":
        return _JsonLines(stream)
    if kind == "tty" or (
        kind == "auto" and stream.isatty() and os.environ.get("TERM") not in (None, "dumb")
    ):
        try:
            return _Bars(stream)
        except ImportError:
            logger.debug("showing plain lines: bars need rich, from the extra 'cli'")
    return _PlainLines(stream)


@final
class _PlainLines:
    """Lines like docker's when its output is not a terminal: no counts, no repetitions."""

    def __init__(self, stream: Output) -> None:
        self._stream = stream
        self._actions: dict[str, str] = {}

    def show(self, events: Sequence[Progress]) -> None:
        lines = []
        for event in events:
            if self._actions.get(event.id) != event.action:
                self._actions[event.id] = event.action
                lines.append(f"{event.id}: {event.action}\n")
        _write(self._stream, lines)

    def close(self) -> None:
        """Do nothing, since every line has been written."""


@final
class _JsonLines:
    """JSON objects like those of the pull endpoint of docker's API.

    As in moby's ``pkg/streamformatter``, ``progressDetail`` has no counts of zero.
    """

    def __init__(self, stream: Output) -> None:
        self._stream = stream

    def show(self, events: Sequence[Progress]) -> None:
        lines = []
        for event in events:
            counts = {"current": event.current, "total": event.total}
            detail = {name: count for name, count in counts.items() if count}
            message = {"status": event.action, "progressDetail": detail, "id": event.id}
            lines.append(json.dumps(message, separators=(",", ":")) + "\n")
        _write(self._stream, lines)

    def close(self) -> None:
        """Do nothing, since every line has been written."""


def _write(stream: Output, lines: Sequence[str]) -> None:
    if lines:
        stream.write("".join(lines))
        stream.flush()


@attrs.define(eq=False)
class _Row:
    """A layer's line: its newest event, and the time and count at the start of its action."""

    event: Progress
    since: float
    start: int

    @property
    def finished(self) -> bool:
        return self.event.action in (Status.PULL_COMPLETE, Status.ALREADY_EXISTS)


@final
class _Bars:
    """A line for each layer, drawn by rich."""

    def __init__(self, stream: Output) -> None:
        from rich.console import Console
        from rich.live import Live

        class Terminal(Console):
            def on_broken_pipe(self) -> None:
                raise  # rich would close stdout and end the process

        self._rows: dict[str, _Row] = {}
        self._console = Terminal(
            file=cast(TextIO, stream),
            force_terminal=True,
            markup=False,
            emoji=False,
            highlight=False,
        )
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def show(self, events: Sequence[Progress]) -> None:
        now = time.monotonic()
        for event in events:
            row = self._rows.get(event.id)
            if row is None or row.event.action != event.action:
                self._rows[event.id] = _Row(event, now, event.current)
            else:
                row.event = event
        if not self._live.is_started:
            self._live.start()
        # rich needs a millisecond for each row, even for rows that don't fit on the terminal.
        self._live.update(self._picture(now, self._console.height), refresh=True)

    def close(self) -> None:
        if self._live.is_started:
            self._live.update(self._picture(time.monotonic(), _MOST_ROWS))
            self._live.stop()

    def _picture(self, now: float, room: int) -> Table:
        """A table that fits in ``room`` lines, without finished rows if needed."""
        rows = list(self._rows.values())
        if len(rows) < room:
            return _table(rows, now)
        shown = [row for row in rows if not row.finished][: max(1, room - 2)]
        table = _table(shown, now)
        if len(shown) < len(rows):
            done = sum(row.finished for row in rows)
            table.add_row("…", f"{done} of {len(rows)} complete")
        return table


def _table(rows: Iterable[_Row], now: float) -> Table:
    from rich.filesize import decimal
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    for _ in range(3):
        table.add_column(no_wrap=True)
    for _ in range(2):
        table.add_column(no_wrap=True, justify="right")
    for row in rows:
        event = row.event
        if not event.current and not event.total:
            table.add_row(f"{event.id}:", event.action)
            continue
        amount = decimal(event.current)
        if event.total:
            amount += f" / {decimal(event.total)}"
        passed = now - row.since
        rate = f"{decimal(int((event.current - row.start) / passed))}/s" if passed > 0 else ""
        bar = ProgressBar(total=event.total or None, completed=event.current, width=28)
        table.add_row(f"{event.id}:", event.action, bar, amount, rate)
    return table
