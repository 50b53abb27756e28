"""Wrong uses of the public functions: each error shows the right use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from trio_layers import (
    MemoryStore,
    open_display,
    open_download_manager,
    open_puller,
    open_registry_client,
    open_store,
)
from trio_layers._blocks import opens_block
from trio_layers._engine.download import DownloadManager
from trio_layers._pull import Puller

ENTRIES: dict[str, Callable] = {
    "open_store": lambda path: open_store(path),
    "open_puller": lambda path: open_puller(path),
    "open_registry_client": lambda path: open_registry_client(),
    "open_download_manager": lambda path: open_download_manager(MemoryStore()),
    "open_display": lambda path: open_display("none"),
}
EACH = pytest.mark.parametrize("name", ENTRIES)


@EACH
def test_under_asyncio(name: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with ENTRIES[name](tmp_path / "store"):
            raise AssertionError("not to be entered")

    with pytest.raises(RuntimeError, match=r"needs trio: run the program with trio\.run"):
        asyncio.run(main())
    assert not (tmp_path / "store").exists()


@EACH
async def test_awaited(name: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"{name} opens a block: write 'async with {name}\("):
        await ENTRIES[name](tmp_path / "store")
    assert not (tmp_path / "store").exists()


@EACH
def test_entered_without_async(name: str, tmp_path: Path) -> None:
    with (
        pytest.raises(TypeError, match=rf"{name} opens a block: write 'async with {name}\("),
        ENTRIES[name](tmp_path / "store"),
    ):
        raise AssertionError("not to be entered")


@pytest.mark.parametrize(
    "method", [Puller.pull, DownloadManager.download], ids=["pull", "download"]
)
async def test_methods_awaited(method: Callable) -> None:
    name = method.__qualname__
    with pytest.raises(TypeError, match=rf"{name} opens a block: write 'async with {name}\("):
        await method(object(), "debian:12")


def test_group_with_an_interruption() -> None:
    """Entering and leaving raise the interruption alone, unlike the caller's body."""

    @opens_block
    async def block(at: str):
        if at == "entry":
            raise BaseExceptionGroup("", [KeyboardInterrupt(), OSError("beside")])
        try:
            yield
        finally:
            if at == "exit":
                raise BaseExceptionGroup("", [OSError("beside"), KeyboardInterrupt()])

    async def main(at: str, body: BaseException | None = None) -> None:
        async with block(at):
            if body is not None:
                raise body

    for at in ("entry", "exit"):
        with pytest.raises(KeyboardInterrupt) as caught:
            trio.run(main, at)
        assert isinstance(caught.value.__context__, OSError)
    group = BaseExceptionGroup("the caller's", [KeyboardInterrupt()])
    with pytest.raises(BaseExceptionGroup) as kept:
        trio.run(main, "", group)
    assert kept.value is group


# Arguments.


async def enter(block) -> None:
    async with block:
        raise AssertionError("not to be entered")


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda d: open_store(None), TypeError, "path=None cannot be used: pass the path of a"),
        (lambda d: open_store(3), TypeError, "path=3 cannot be used"),
        (lambda d: open_store(""), ValueError, "path='' is empty"),
        (lambda d: open_puller(None), TypeError, "store=None cannot be used: pass a directory's"),
        (lambda d: open_puller(MemoryStore()), TypeError, "store=<MemoryStore: 0 layers> cannot"),
        (lambda d: open_puller(open_store(d)), TypeError, "store=<block of open_store> cannot be"),
        (
            lambda d: open_puller(d, max_concurrent_downloads="3"),
            TypeError,
            "max_concurrent_downloads='3' is no whole number: pass an int",
        ),
        (lambda d: open_puller(d, max_download_attempts=2.5), TypeError, "=2.5 is no whole number"),
        (lambda d: open_puller(d, max_download_attempts=0), ValueError, "must be at least 1, not"),
        (lambda d: open_puller(d, max_concurrent_downloads=-1), ValueError, "at least 0, not -1"),
        (lambda d: open_puller(d, retry_tick="1"), TypeError, "retry_tick='1' is no number"),
        (lambda d: open_puller(d, retry_tick=float("nan")), ValueError, "more than 0 seconds, not"),
        (lambda d: open_download_manager(None), TypeError, r"the store None lacks get\(\), reg"),
        (lambda d: open_download_manager(open_store(d)), TypeError, "<block of open_store> lacks"),
        (
            lambda d: open_download_manager(MemoryStore(), max_concurrent_downloads="3"),
            TypeError,
            "max_concurrent_downloads='3' is no whole number",
        ),
        (
            lambda d: open_download_manager(MemoryStore(), max_download_attempts=True),
            TypeError,
            "max_download_attempts=True is no whole number",
        ),
    ],
)
async def test_arguments_of_what_opens(
    make: Callable, error: type[Exception], text: str, tmp_path: Path
) -> None:
    """A call with wrong arguments creates no store."""
    with pytest.raises(error, match=text):
        await enter(make(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"policy": "ifnotpresent"},
            ValueError,
            "policy='ifnotpresent' is unknown: use one of always, missing, never",
        ),
        ({"policy": None}, ValueError, "policy=None is unknown"),
        ({"policy": "Always"}, ValueError, "policy='Always' is unknown"),
        ({"platform": 3}, TypeError, "platform=3 cannot be used: pass a string such as"),
        ({"platform": ["linux"]}, TypeError, "platform=.* cannot be used"),
        ({"reference": None}, TypeError, "reference=None cannot be used: pass a string such as"),
        ({"reference": b"debian"}, TypeError, "reference=b'debian' cannot be used"),
        ({"progress": 3}, TypeError, "progress=3 cannot be called: pass an async function"),
        (
            {"progress": open_display("none")},
            TypeError,
            "progress=<block of open_display> cannot be called",
        ),
    ],
    ids=lambda each: "-".join(each) if isinstance(each, dict) else None,
)
async def test_arguments_of_a_pull(
    options: dict, error: type[Exception], text: str, tmp_path: Path
) -> None:
    """A pull with wrong arguments fails before any request."""
    reference = options.pop("reference", "127.0.0.1:1/nowhere:1")
    async with open_puller(tmp_path) as puller:
        with pytest.raises(error, match=text):
            await enter(puller.pull(reference, **options))
        if not {"policy", "progress"} & options.keys():
            with pytest.raises(error, match=text):
                await puller.resolve(reference, **options)


async def test_sources_that_lack_something() -> None:
    class Half:
        key = id = "a"

        def diff_id(self) -> None: ...

    async with open_download_manager(MemoryStore()) as manager:
        with pytest.raises(TypeError, match=r"Half object at .* lacks download\(\), close\(\):"):
            await enter(manager.download([Half()]))
        with pytest.raises(TypeError, match=r"the source 'd' lacks diff_id\(\)"):
            await enter(manager.download("debian"))
        with pytest.raises(TypeError, match="progress=3 cannot be called"):
            await enter(manager.download([], progress=3))
        assert manager.statistics().pulls == 0


async def test_limit_that_is_no_number() -> None:
    async with open_download_manager(MemoryStore()) as manager:
        for limit in ("3", 2.0, None, True):
            with pytest.raises(TypeError, match=r"max_concurrent_downloads=.* is no whole number"):
                manager.max_concurrent_downloads = limit
        assert manager.max_concurrent_downloads == 3
