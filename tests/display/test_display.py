"""The output of the displays, and their effect on a pull when their stream is bad."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_layers import _display
from trio_layers._display import open_display
from trio_layers._errors import DisplayClosed
from trio_layers._progress import Progress, Status

PULL = [
    Progress("aaa", Status.PULLING),
    Progress("bbb", Status.ALREADY_EXISTS),
    Progress("aaa", Status.DOWNLOADING, 1000, 4000),
    Progress("aaa", Status.DOWNLOADING, 4000, 4000),
    Progress("aaa", Status.PULL_COMPLETE),
]


async def shown(kind: _display.DisplayKind, events: list[Progress]) -> str:
    stream = io.StringIO()
    async with open_display(kind, stream=stream) as sink:
        for event in events:
            await sink(event)
    assert not stream.closed
    return stream.getvalue()


async def test_plain_prints_each_action_once() -> None:
    assert await shown("plain", PULL) == (
        "aaa: Pulling fs layer\nbbb: Already exists\naaa: Downloading\naaa: Pull complete\n"
    )


async def test_plain_prints_an_action_that_comes_back() -> None:
    """The action of a second attempt is printed again."""
    words = ["Downloading", "Retrying in 1 second", "Downloading"]
    lines = await shown("plain", [Progress("a", word) for word in words])
    assert lines.splitlines() == [f"a: {word}" for word in words]


async def test_json_has_dockers_fields_and_the_newest_of_counts_that_came_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_display, "INTERVAL", math.inf)
    messages = [json.loads(line) for line in (await shown("json", PULL)).splitlines()]
    assert messages == [
        {"status": "Pulling fs layer", "progressDetail": {}, "id": "aaa"},
        {"status": "Already exists", "progressDetail": {}, "id": "bbb"},
        {
            "status": "Downloading",
            "progressDetail": {"current": 4000, "total": 4000},
            "id": "aaa",
        },
        {"status": "Pull complete", "progressDetail": {}, "id": "aaa"},
    ]


async def test_none_writes_nothing() -> None:
    assert await shown("none", PULL) == ""


async def test_auto_is_plain_for_what_is_no_terminal() -> None:
    assert await shown("auto", PULL) == await shown("plain", PULL)


async def test_tty_is_plain_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert await shown("tty", PULL) == await shown("plain", PULL)


async def test_nothing_at_all_happens() -> None:
    assert await shown("json", []) == ""
    assert await shown("plain", []) == ""
    assert await shown("tty", []) == ""


class StuckStream(io.StringIO):
    """A terminal that blocks each write until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.entered = threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        self.go.wait()
        return super().write(text)


async def test_a_stuck_stream_holds_nobody_up_and_gets_the_last_state() -> None:
    stream = StuckStream()
    async with open_display("json", stream=stream) as sink:
        await sink(Progress("a", Status.DOWNLOADING, 1, 200))
        await trio.to_thread.run_sync(stream.entered.wait)
        for current in range(2, 201):
            await sink(Progress("a", Status.DOWNLOADING, current, 200))
        await sink(Progress("a", Status.PULL_COMPLETE))
        stream.go.set()
    messages = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert messages[0]["progressDetail"] == {"current": 1, "total": 200}
    assert messages[-2]["progressDetail"] == {"current": 200, "total": 200}
    assert messages[-1]["status"] == "Pull complete"
    assert len(messages) < 20


async def test_a_stuck_stream_makes_the_sink_wait_at_last() -> None:
    """Memory is bounded, and the engine may skip events while a sink waits."""
    stream = StuckStream()
    sent = 0
    async with open_display("plain", stream=stream) as sink, trio.open_nursery() as nursery:
        await sink(Progress("a", "first"))
        await trio.to_thread.run_sync(stream.entered.wait)

        async def flood() -> None:
            nonlocal sent
            while True:
                await sink(Progress("a", str(sent)))
                sent += 1

        nursery.start_soon(flood)
        await wait_all_tasks_blocked()
        assert sent == _display.BACKLOG
        nursery.cancel_scope.cancel()
        stream.go.set()
    assert stream.getvalue().splitlines()[-1] == f"a: {sent - 1}"


async def test_leaving_by_cancellation_gives_a_stuck_stream_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_display, "PATIENCE", 0.01)
    stream = StuckStream()
    with trio.CancelScope() as scope:
        async with open_display("plain", stream=stream) as sink:
            await sink(Progress("a", "first"))
            await trio.to_thread.run_sync(stream.entered.wait)
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    stream.go.set()


async def test_leaving_by_cancellation_still_writes_the_last_state() -> None:
    stream = io.StringIO()
    with trio.CancelScope() as scope:
        async with open_display("plain", stream=stream) as sink:
            await sink(Progress("a", "last words"))
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert stream.getvalue() == "a: last words\n"


@pytest.mark.parametrize("kind", ["auto", "tty", "plain", "json", "none"])
async def test_what_the_block_raises_comes_out_as_it_is(kind: _display.DisplayKind) -> None:
    error = RuntimeError("mine")
    with pytest.raises(RuntimeError) as caught:
        async with open_display(kind, stream=io.StringIO()) as sink:
            await sink(PULL[0])
            raise error
    assert caught.value is error


class BrokenStream(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError("gone")


@pytest.mark.parametrize("kind", ["tty", "plain", "json"])
async def test_a_stream_that_fails_does_not_fail_the_pull(kind: _display.DisplayKind) -> None:
    async with open_display(kind, stream=BrokenStream()) as sink:
        for event in PULL * 200:
            await sink(event)


async def test_a_stream_that_is_closed_does_not_fail_the_pull() -> None:
    stream = io.StringIO()
    stream.close()
    async with open_display("plain", stream=stream) as sink:
        await sink(PULL[0])


class Terminal:
    """A pseudo-terminal. A thread gathers the text written to `stream`."""

    def __init__(self) -> None:
        self._master, slave = os.openpty()
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self._parts: list[bytes] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self._master, 65536)
            except OSError:  # EIO: the other end is closed
                return
            self._parts.append(part)

    def close(self) -> None:
        if not self.stream.closed:
            self.stream.close()
            self._thread.join()
            os.close(self._master)

    def text(self) -> str:
        self.close()
        return b"".join(self._parts).decode()


@contextmanager
def open_terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    try:
        yield terminal
    finally:
        terminal.close()


SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


def lines_at_the_end(text: str) -> list[str]:
    """The last picture: the text below the last movement of the cursor."""
    picture = re.split(r"\x1b\[[0-9]*A|\x1b\[2K", text.replace(SHOW_CURSOR, ""))[-1]
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", picture).splitlines()]


async def test_auto_draws_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with open_terminal() as terminal:
        async with open_display("auto", stream=terminal.stream) as sink:
            await sink(Progress("aaa", Status.PULLING))
            await sink(Progress("bbb", Status.DOWNLOADING, 1_500_000, 4_000_000))
        text = terminal.text()
    assert text.index(HIDE_CURSOR) < text.index(SHOW_CURSOR)
    assert "━" in text
    assert "1.5 MB / 4.0 MB" in text
    assert "aaa: Pulling fs layer" in text


async def test_bars_end_with_all_layers_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "10")
    layers = [f"layer{number:02}" for number in range(30)]
    with open_terminal() as terminal:
        async with open_display("tty", stream=terminal.stream) as sink:
            for layer in layers:
                await sink(Progress(layer, Status.DOWNLOADING, 10, 20))
            for layer in layers:
                await sink(Progress(layer, Status.PULL_COMPLETE))
        text = terminal.text()
    assert [line for line in lines_at_the_end(text) if line] == [
        f"{layer}: Pull complete" for layer in layers
    ]


async def test_bars_of_many_layers_draw_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal's height, not the number of layers, bounds the drawn rows."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "10")
    monkeypatch.setattr(_display, "_MOST_ROWS", 20)
    drawn = []
    real = _display._table

    def table(rows: list, now: float) -> object:
        drawn.append(len(rows))
        return real(rows, now)

    monkeypatch.setattr(_display, "_table", table)
    layers = [f"layer{number:04}" for number in range(3000)]
    with open_terminal() as terminal:
        async with open_display("tty", stream=terminal.stream) as sink:
            for layer in layers:
                await sink(Progress(layer, Status.DOWNLOADING, 10, 20))
            for layer in layers[:-2]:
                await sink(Progress(layer, Status.PULL_COMPLETE))
        text = terminal.text()
    assert max(drawn) < 10
    assert [line.split()[0] for line in lines_at_the_end(text) if line] == [
        "layer2998:",
        "layer2999:",
        "…",
    ]
    assert "2998 of 3000 complete" in text


async def test_bars_take_ids_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """IDs are not read as rich's markup."""
    monkeypatch.setenv("TERM", "xterm")
    with open_terminal() as terminal:
        async with open_display("tty", stream=terminal.stream) as sink:
            await sink(Progress("[red]", "[/]"))
        assert "[red]: [/]" in terminal.text()


async def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with open_terminal() as terminal:
        async with open_display("auto", stream=terminal.stream) as sink:
            await sink(Progress("a", Status.PULLING))
        assert terminal.text() == "a: Pulling fs layer\r\n"


# A stream that blocks.


class FullPipe:
    """An unread pipe, with its writing end as a text stream."""

    def __init__(self) -> None:
        self.reader, writer = os.pipe()
        self.stream = os.fdopen(writer, "w")
        os.set_blocking(writer, False)
        try:
            while True:
                os.write(writer, b"x" * 4096)
        except BlockingIOError:
            os.set_blocking(writer, True)

    def read(self) -> bytes:
        """Read all bytes that are in the pipe now."""
        data = os.read(self.reader, 1 << 20)
        return data.lstrip(b"x")

    def close(self) -> None:
        os.close(self.reader)
        self.stream.close()


@pytest.fixture
def pipe() -> Iterator[FullPipe]:
    pipe = FullPipe()
    yield pipe
    pipe.close()


async def cancel_when_blocked(scope: trio.CancelScope) -> None:
    await wait_all_tasks_blocked(0.2)
    scope.cancel()


@pytest.mark.parametrize("kind", ["tty", "plain", "json"])
async def test_leaving_that_is_cancelled_gives_a_stuck_stream_up(
    kind: _display.DisplayKind, pipe: FullPipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block has succeeded, and its end waits for the blocked stream."""
    monkeypatch.setattr(_display, "PATIENCE", 0.01)
    with trio.fail_after(10), trio.CancelScope() as scope:
        async with open_display(kind, stream=pipe.stream) as sink:
            await sink(Progress("a", "first"))
            trio.lowlevel.spawn_system_task(cancel_when_blocked, scope)
    assert scope.cancelled_caught


async def test_leaving_waits_for_a_slow_reader(pipe: FullPipe) -> None:
    """Without a cancellation, leaving waits until the reader has taken all lines."""
    left = trio.Event()

    async def show() -> None:
        async with open_display("plain", stream=pipe.stream) as sink:
            for number in range(3):
                await sink(Progress("a", str(number)))
        left.set()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(show)
            await wait_all_tasks_blocked(0.2)
            assert not left.is_set()
            seen = pipe.read()
            await left.wait()
        pipe.stream.write("the stream is open\n")
        pipe.stream.flush()
        seen += pipe.read()
    assert seen.splitlines() == [b"a: 0", b"a: 1", b"a: 2", b"the stream is open"]


async def test_what_the_stream_holds_comes_first() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, os.fdopen(reader) as lines:
        stream.write("before\n")
        async with open_display("plain", stream=stream) as sink:
            await sink(Progress("ä", "a"))
        stream.write("after\n")
        stream.flush()
        assert [lines.readline() for _ in range(3)] == ["before\n", "ä: a\n", "after\n"]


def test_stuck_stream_does_not_hold_up_the_exit_of_the_program() -> None:
    """An abandoned thread holds no lock that the interpreter needs at exit."""
    program = """
import sys, trio, trio_layers

async def main():
    with trio.move_on_after(0.1) as scope:
        async with trio_layers.open_display("plain") as sink:
            for number in range(100_000):
                await sink(trio_layers.Progress("a", str(number)))
    assert scope.cancelled_caught

trio.run(main)
sys.exit(7)
"""
    reader, writer = os.pipe()
    try:
        done = subprocess.run([sys.executable, "-c", program], stderr=writer, timeout=20)
    finally:
        os.close(writer)
        os.close(reader)
    assert done.returncode == 7


@pytest.mark.parametrize("kind", ["plain", "none"])
async def test_event_for_a_display_that_was_left(kind: _display.DisplayKind) -> None:
    async with open_display(kind, stream=io.StringIO()) as sink:
        pass
    with pytest.raises(DisplayClosed, match="open it around the pulls"):
        await sink(Progress("a", "too late"))


async def test_event_that_waits_when_the_display_is_left(
    pipe: FullPipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_display, "PATIENCE", 0.01)
    errors = []

    async def flood(sink) -> None:
        with pytest.raises(DisplayClosed) as caught:
            while True:
                await sink(Progress("a", str(len(errors))))
        errors.append(caught.value)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            with pytest.raises(KeyError):
                async with open_display("plain", stream=pipe.stream) as sink:
                    for _ in range(2):
                        nursery.start_soon(flood, sink)
                    await wait_all_tasks_blocked()
                    raise KeyError
    assert len(errors) == 2
    assert errors[0] is not errors[1]


@pytest.mark.parametrize("kind", ["bars", "", None, "PLAIN"])
async def test_unknown_kind(kind: object) -> None:
    with pytest.raises(ValueError, match=r"unknown: use one of auto, tty, plain, json, none"):
        async with open_display(kind):
            pass
