"""Wrong uses of the public functions: each error says the right one."""

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


@pytest.mark.parametrize("method", [Puller.pull, DownloadManager.download], ids=str)
async def test_methods_awaited(method: Callable) -> None:
    name = method.__qualname__
    with pytest.raises(TypeError, match=rf"{name} opens a block: write 'async with {name}\("):
        await method(object(), "debian:12")


def test_group_with_an_interruption() -> None:
    """It comes out alone of what is not the caller's body."""

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
