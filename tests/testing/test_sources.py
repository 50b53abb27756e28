"""The scripted source, alone and with the engine."""

from __future__ import annotations

import pytest
import trio

from trio_layers._digest import ChainID
from trio_layers._engine.download import open_download_manager
from trio_layers._errors import DoNotRetry, StoreError
from trio_layers.testing import Attempt, MemoryStore, ScriptedSource, build_layer

TAR = build_layer([], compression="none").content


async def test_attempts_are_played_in_order_and_the_last_again(autojump_clock) -> None:
    error = RuntimeError("no")
    source = ScriptedSource(
        b"data",
        attempts=[
            Attempt(seconds=2, progress=((1, "Downloading", 3, 4),), error=error),
            Attempt(body=b"other", size=0),
        ],
    )
    events = []

    def progress(action: str, current: int = 0, total: int = 0) -> None:
        events.append((trio.current_time() - start, action, current, total))

    start = trio.current_time()
    with pytest.raises(RuntimeError) as caught:
        await source.download(progress)
    assert caught.value is error
    assert trio.current_time() - start == pytest.approx(2)
    assert events == [(pytest.approx(1), "Downloading", 3, 4)]
    for _ in range(2):
        stream, size = await source.download(progress)
        assert (await stream.receive_some(), size) == (b"other", 0)
    assert source.calls == 3
    assert repr(source) == f"<ScriptedSource {source.id}: 3 attempts, 0 closes>"


async def test_attempts_are_played_into_a_sink(autojump_clock) -> None:
    """Pieces come evenly, before reports of the same moment; bytes in the sink stay."""
    source = ScriptedSource(
        b"0123456789",
        attempts=[
            Attempt(seconds=4, pieces=2, arrives=4, error=OSError("cut")),
            Attempt(seconds=3, pieces=3, progress=((2, "Downloading", 8, 10),)),
            Attempt(body=b"other", resumes=False),
            Attempt(arrives=0, error=OSError("nothing")),
        ],
    )
    store = MemoryStore()
    seen: list[tuple[float, object]] = []
    start = trio.current_time()

    def note(what: object) -> None:
        seen.append((round(trio.current_time() - start, 6), what))

    async with store.stage(source.descriptor) as stage:
        write = stage.write

        async def noting(data: bytes) -> None:
            note(data)
            await write(data)

        stage.write = noting
        with pytest.raises(OSError, match="cut"):
            await source.download_into(stage, lambda *event: note(event))
        assert seen == [(2, b"01"), (4, b"23")]
        seen.clear()
        await source.download_into(stage, lambda *event: note(event))
        event = ("Downloading", 8, 10)
        assert seen == [(5, b"45"), (6, b"67"), (6, event), (7, b"89")]
        assert stage.digest == source.descriptor.digest
        await source.download_into(stage, lambda *event: note(event))
        assert seen[-1] == (7, b"other")
        assert stage.offset == 5
        with pytest.raises(OSError, match="nothing"):
            await source.download_into(stage, lambda *event: note(event))
        assert repr(stage) == f"<MemoryStage {source.descriptor.digest}: 5 bytes>"
        await stage.finish(lambda count: None)
        assert repr(stage) == f"<MemoryStage {source.descriptor.digest}: complete>"
        with pytest.raises(StoreError, match="no layer"):
            await stage.commit(ChainID(source.descriptor.digest))
        layer = await stage.commit(None)
        assert layer.data == b"other"
    async with store.stage(source.descriptor) as stage:
        assert (stage.offset, stage.complete) == (0, False)


async def test_the_engine_uses_a_scripted_source(autojump_clock) -> None:
    """With the engine, the source is retried once, gets its diff ID, and is closed once."""
    source = ScriptedSource(TAR, attempts=[Attempt(error=RuntimeError("once")), Attempt()])
    store = MemoryStore()
    async with open_download_manager(store) as manager:
        async with manager.download([source]) as rootfs:
            assert rootfs.diff_ids == (source.key,)
            assert store.layers
    assert (source.calls, source.closes, source.diff_ids) == (2, 1, [source.key])
    assert not store.layers


async def test_a_known_source_is_not_downloaded_twice(autojump_clock) -> None:
    first, second = ScriptedSource(TAR, known=True), ScriptedSource(TAR, known=True)
    async with open_download_manager(MemoryStore()) as manager:
        async with manager.download([first]), manager.download([second]):
            assert (first.calls, second.calls) == (1, 0)


async def test_errors_of_a_scripted_source_reach_the_pull(autojump_clock) -> None:
    source = ScriptedSource(TAR, attempts=[Attempt(error=DoNotRetry("gone"))])
    async with open_download_manager(MemoryStore()) as manager:
        with pytest.raises(DoNotRetry, match="gone"):
            async with manager.download([source]):
                pass
    assert source.calls == 1


def test_a_scripted_source_needs_an_attempt() -> None:
    with pytest.raises(ValueError, match="at least one"):
        ScriptedSource(b"", attempts=())
