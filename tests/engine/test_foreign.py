"""Odd failures of sources, stores, sinks and log handlers: no task hangs."""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import trio
from engine.fakes import FakeSource, after, failing
from engine.seeds import run

import trio_layers
from trio_layers._engine.download import open_download_manager
from trio_layers._errors import DoNotRetry, LayersError, TransferError
from trio_layers._memory import MemoryStore

BOTH_WAYS = True


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no translation loaded")

    __repr__ = __str__


class WordsOfNoType(Exception):
    def __str__(self) -> str:
        return 3  # type: ignore[return-value]


class Empty(Exception):
    """An exception with a false truth value, as in foreign code."""

    def __len__(self) -> int:
        return 0


class Unique(LayersError):
    """A foreign subclass of `LayersError` that cannot be copied."""

    def __new__(cls, *, key: str) -> Unique:
        return super().__new__(cls, "there is one of me")

    def __init__(self, *, key: str) -> None:
        super().__init__("there is one of me")

    def __reduce__(self) -> str:
        raise RuntimeError("not to be copied")


class Frozen(LayersError):
    def __setattr__(self, name: str, value: object) -> None:
        if name == "__cause__":
            raise AttributeError("frozen")
        super().__setattr__(name, value)


class Interrupting(logging.Handler):
    """A log handler that raises an exception."""

    def __init__(self, error: Callable[[], BaseException]) -> None:
        super().__init__()
        self._error = error

    def emit(self, record: logging.LogRecord) -> None:
        raise self._error()


@pytest.fixture(autouse=True)
def _debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "trio_layers.engine")


def bounded(main: Callable) -> object:
    """Run on a virtual clock, with a time limit of one hour."""

    async def watched() -> object:
        async def watch() -> None:
            await trio.sleep(3600)
            raise AssertionError("something waits for ever")

        trio.lowlevel.spawn_system_task(watch)
        return await main()

    return run(watched)


def pull_of(
    *sources: FakeSource,
    store: MemoryStore | None = None,
    until: float = 1800,
    progress: Callable | None = None,
) -> MemoryStore:
    """Pull the sources in a new trio run, and leave the block."""
    store = MemoryStore() if store is None else store

    async def main() -> None:
        async with open_download_manager(store) as manager:
            with trio.move_on_at(until):
                async with manager.download(sources, progress=progress):
                    pass

    bounded(main)
    return store


@pytest.mark.parametrize("place", ["registered", "download", "register"])
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Speechless(), "Speechless"),
        (WordsOfNoType(), "WordsOfNoType"),
        (Empty(), "Empty"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_error_without_words(place: str, error: Exception, text: str) -> None:
    """The pull's error has the type's name in place of the text."""
    source, other = FakeSource("a"), FakeSource("b", after(100))
    store = MemoryStore()

    def fail(*args: object, **options: object) -> None:
        raise error

    if place == "registered":
        source.registered = fail
    elif place == "download":
        source._download = failing(error)
    else:

        class Store(MemoryStore):
            add = fail

        store = Store()
    with pytest.raises(LayersError) as caught:
        pull_of(source, other, store=store)
    assert str(caught.value).removeprefix("failed to register layer: ") == text
    assert (source.closed, other.closed) == (1, 1)
    assert not store.layers


@pytest.mark.parametrize("error", [Unique(key="a"), Frozen("stays as it is")], ids=str)
def test_error_that_cannot_be_copied(error: LayersError) -> None:
    """Each pull still raises an error object of its own."""
    errors: list[TransferError] = []

    async def main() -> None:
        async def pull(manager) -> None:
            with pytest.raises(TransferError, match=str(error)) as caught:
                async with manager.download([FakeSource("a", failing(error, 1))]):
                    pass
            errors.append(caught.value)

        async with (
            open_download_manager(MemoryStore(), max_download_attempts=1) as manager,
            trio.open_nursery() as nursery,
        ):
            for _ in range(2):
                nursery.start_soon(pull, manager)

    bounded(main)
    assert errors[0] is not errors[1]
    assert [each.__cause__ for each in errors] == [error, error]


def test_cause_that_is_false() -> None:
    """The engine follows a cause with a false truth value, too."""
    error = Empty()
    error.__cause__ = DoNotRetry("never")
    outer = OSError("outer")
    outer.__cause__ = error
    source = FakeSource("a", failing(outer))
    with pytest.raises(TransferError, match="outer"):
        pull_of(source)
    assert source.calls == 1


INTERRUPTIONS = [KeyboardInterrupt, SystemExit]


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("error", [*INTERRUPTIONS, None])
@pytest.mark.parametrize("until", [5, 0.5], ids=["succeeds", "cancelled"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_close_that_interrupts(index: int, until: float, error: type[BaseException] | None) -> None:
    """The interruption comes out alone, after all closes and releases."""
    sources = [FakeSource(key, after(1)) for key in "abc"]

    def close() -> None:
        sources[index].closed += 1
        if error is None:
            ctrl_c()
        else:
            raise error

    sources[index].close = close
    store = MemoryStore()
    with pytest.raises(error or KeyboardInterrupt) as caught:
        pull_of(*sources, until=until, store=store)
    assert type(caught.value) is (error or KeyboardInterrupt)
    assert [source.closed for source in sources] == [1, 1, 1]
    assert not store.layers


def test_close_and_id_that_fail() -> None:
    class Nameless(FakeSource):
        @property
        def id(self) -> str:
            if self.closed:
                raise RuntimeError("no name")
            return "a"

        @id.setter
        def id(self, value: str) -> None:
            pass

        def close(self) -> None:
            super().close()
            raise OSError("cannot close")

    sources = [Nameless("a"), FakeSource("b"), Nameless("a")]
    assert not pull_of(*sources).layers
    assert [source.closed for source in sources] == [1, 1, 1]


@pytest.mark.parametrize("error", [OSError, *INTERRUPTIONS])
@pytest.mark.parametrize("until", [1800, 2.5], ids=["succeeds", "cancelled"])
def test_release_that_fails(error: type[BaseException], until: float) -> None:
    """The engine still releases the other layers.

    An error is logged, and an interruption comes out alone.
    """
    released: list[str] = []

    class Store(MemoryStore):
        def release(self, layer) -> None:
            super().release(layer)
            released.append(layer.chain_id)
            if len(released) == 1:
                raise error

    store = Store()
    sources = [FakeSource("a"), FakeSource("b"), FakeSource("c", after(5))]
    if error is OSError:
        pull_of(*sources, store=store, until=until)
    else:
        with pytest.raises(error) as caught:
            pull_of(*sources, store=store, until=until)
        assert type(caught.value) is error
    assert not store.layers
    assert [source.closed for source in sources] == [1, 1, 1]


@contextlib.contextmanager
def handler_that_raises(error: Callable[[], BaseException]) -> Iterator[None]:
    handler = Interrupting(error)
    logger = logging.getLogger("trio_layers")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def test_log_handler_that_fails() -> None:
    """A failing log handler does not change the outcome of a layer."""
    source = FakeSource("a", failing(OSError("gone")))
    with (
        handler_that_raises(lambda: ValueError("cannot log")),
        pytest.raises(TransferError, match="gone"),
    ):
        pull_of(source)
    assert (source.calls, source.closed) == (5, 1)


@pytest.mark.parametrize("error", INTERRUPTIONS)
def test_log_handler_that_interrupts(error: type[BaseException]) -> None:
    sources = [FakeSource("a", after(100)), FakeSource("b", after(100))]
    with handler_that_raises(error), pytest.raises(error) as caught:
        pull_of(*sources, until=0.5)
    assert type(caught.value) is error
    assert [source.closed for source in sources] == [1, 1]


@pytest.mark.parametrize("error", INTERRUPTIONS)
@pytest.mark.parametrize("word", ["Pulling fs layer", "Downloading", "Pull complete"])
def test_sink_that_interrupts(word: str, error: type[BaseException]) -> None:
    async def sink(event) -> None:
        if event.action == word:
            raise error

    async def download(progress) -> None:
        progress("Downloading", 1, 2)
        await trio.sleep(1)

    sources = [FakeSource("a", download), FakeSource("b", after(5))]
    with pytest.raises(error) as caught:
        pull_of(*sources, progress=sink)
    assert type(caught.value) is error
    assert [source.closed for source in sources] == [1, 1]


@pytest.mark.parametrize("error", INTERRUPTIONS)
@pytest.mark.parametrize("place", ["registered", "download", "diff_id"])
def test_source_that_interrupts(place: str, error: type[BaseException]) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    sources = [FakeSource("a"), FakeSource("b", after(5))]
    setattr(sources[0], "_download" if place == "download" else place, fail)
    with pytest.raises(error) as caught:
        pull_of(*sources)
    assert type(caught.value) is error
    assert [source.closed for source in sources] == [1, 1]


def test_sink_can_be_interrupted() -> None:
    """The engine does not defer Ctrl-C in a sink, which may hang."""

    async def sink(event) -> None:
        ctrl_c()
        raise AssertionError("Ctrl-C was to come at once")

    source = FakeSource("a")
    with pytest.raises(KeyboardInterrupt):
        pull_of(source, progress=sink)
    assert source.closed == 1


def test_sink_that_is_not_asynchronous() -> None:
    seen = []
    source = FakeSource("a")
    with pytest.raises(TypeError, match=r"progress=print is not asynchronous: pass an async"):
        pull_of(source, progress=print)
    with pytest.raises(TypeError, match=r"progress=list.append is not asynchronous"):
        pull_of(FakeSource("a"), progress=seen.append)
    assert source.closed == 1


# Ctrl-C at any line.

ENGINE = Path(trio_layers.__file__).parent / "_engine"
PLACES = (
    str(ENGINE),
    *(str(ENGINE.parent / name) for name in ("_nursery.py", "_blocks.py")),
    contextlib.__file__,
)


class CtrlCAtLine:
    """A trace function that raises SIGINT before one line of the engine.

    Args:
        line: The number of the executed line, from 1.

    Only lines inside the program's main function count, not those of trio's start and end.
    """

    def __init__(self, line: int) -> None:
        self.left = line
        self.inside = False

    def __call__(self, frame: FrameType, event: str, arg: object) -> Callable | None:
        if not frame.f_code.co_filename.startswith(PLACES):
            return None
        if event == "line" and self.inside:
            self.left -= 1
            if self.left == 0:
                ctrl_c()
        return self


def interrupted_at(line: int) -> bool:
    """Run pulls that share, repeat and retry layers; return whether Ctrl-C came."""
    store = MemoryStore()
    attempts = iter([failing(OSError("once"))])

    async def download(progress) -> None:
        progress("Downloading", 1, 2)
        await next(attempts, after(1))(progress)

    def sources() -> list[FakeSource]:
        return [FakeSource("a", after(1)), FakeSource("b", download), FakeSource("a")]

    mine, theirs = sources(), sources()

    async def sink(event) -> None:
        await trio.lowlevel.checkpoint()

    async def other(manager) -> None:
        async with manager.download(theirs, progress=sink):
            pass

    async def main() -> None:
        trace.inside = True
        try:
            async with open_download_manager(store, max_concurrent_downloads=1) as manager:
                with trio.move_on_at(3):
                    async with manager.download(mine[:1]):
                        await trio.sleep(1)
                    async with manager.download(mine[1:], progress=sink):
                        pass
                await other(manager)
        finally:
            trace.inside = False

    trace = CtrlCAtLine(line)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        bounded(main)
    except KeyboardInterrupt:
        pass
    else:
        assert trace.left > 0, "Ctrl-C was lost"
    finally:
        sys.settrace(before)
    assert all(source.closed <= 1 for source in mine + theirs)
    # Ctrl-C may arrive before a pull gets its sources. A pull closes only the sources it got.
    assert all(source.closed == 1 for source in mine + theirs if source.calls)
    assert not store.layers, f"at line {line}"
    return trace.left <= 0


def test_ctrl_c_in_any_line() -> None:
    """No task hangs, each source closes once, and no layer stays."""
    lines = 1
    while interrupted_at(lines):
        lines *= 2
    assert lines > 500
    for _ in range(40):
        interrupted_at(random.randrange(1, lines // 2 + 300))
