"""Pullers and stores are left while pulls run in other tasks.

Each pull ends, and raises typed errors only.
"""

from __future__ import annotations

import itertools
import os
import random
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import pytest
import trio
from _tools.leaving import (
    LIMIT,
    Discard,
    assert_nothing_left,
    leave_at,
    no_descriptor_left,
    no_process_left,
)

from trio_layers import (
    DirectoryStore,
    Image,
    LayersError,
    ManagerClosed,
    Puller,
    StoreClosed,
    StoreError,
    open_puller,
    open_store,
)
from trio_layers.testing import File, Registry, build_image, open_registry

# The tests leave at every STRIDE-th step of a pull. The environment can ask for more steps.
STRIDE: Final = 7 if os.environ.get("TRIO_LAYERS_CANCELLATIONS") == "all" else 61
SECONDS: Final = float(os.environ.get("TRIO_LAYERS_LEAVING", "6"))
"""The duration of `test_random_times`."""

NAME: Final = "library/app:1"
IMAGE: Final = build_image(
    [[File(f"{name}-{n}", random.Random(n).randbytes(40_000)) for n in range(4)] for name in "abc"]
)
OTHER: Final = build_image([[File("d", random.Random(9).randbytes(400_000))]])


async def pull(puller: Puller, reference: str) -> None:
    async with puller.pull(reference) as image:
        await image.rootfs.read_bytes("a-1")


async def test_a_puller_at_moments_of_a_pull(tmp_path: Path) -> None:
    seen = set()
    async with open_registry() as registry:
        reference = registry.add(IMAGE, NAME)
        for at in itertools.count(1, STRIDE):
            path = tmp_path / str(at)
            # After the pull's entry, the image's view raises the store's error.
            more, error = await leave_at(
                open_puller(path), lambda puller: pull(puller, reference), at, LayersError
            )
            assert_nothing_left(path)
            seen.add(error)
            if not more:
                break
    assert {"ManagerClosed", None} <= seen <= {"ManagerClosed", "StoreClosed", None}


async def test_a_store_at_moments_of_a_pull_into_it(tmp_path: Path) -> None:
    seen = set()
    async with open_registry() as registry:
        reference = registry.add(IMAGE, NAME)
        for at in itertools.count(1, STRIDE):
            path = tmp_path / str(at)

            async def pull_into(store: DirectoryStore) -> None:
                async with open_puller(store) as puller:
                    await pull(puller, reference)

            more, error = await leave_at(open_store(path), pull_into, at, StoreClosed)
            assert_nothing_left(path)
            seen.add(error)
            if not more:
                break
    assert seen == {"StoreClosed", None}


async def test_calls_on_what_was_left(tmp_path: Path) -> None:
    async with open_registry() as registry, no_descriptor_left():
        reference = registry.add(IMAGE, NAME)
        async with AsyncExitStack() as late, open_puller(tmp_path) as puller:
            image = await late.enter_async_context(puller.pull(reference))
        registry.requests.clear()
        with pytest.raises(ManagerClosed, match="puller was closed"):
            await pull(puller, reference)
        with pytest.raises(ManagerClosed, match="puller was closed"):
            async with puller.pull(reference, policy="never"):
                pass
        with pytest.raises(ManagerClosed, match="puller was closed"):
            await puller.resolve(reference)
        await check_view(image)
        assert registry.requests == []


async def check_view(image: Image) -> None:
    """Check that each method of the view raises `StoreClosed`."""
    view = image.rootfs
    for call in (view.stat, view.exists, view.readlink, view.read_bytes):
        with pytest.raises(StoreClosed):
            await call("a-1")
    with pytest.raises(StoreClosed):
        await view.walk()
    with pytest.raises(StoreClosed):
        await view.export("nowhere")
    with pytest.raises(StoreClosed):
        async with view.open("a-1"):
            pass
    with pytest.raises(StoreClosed):
        async with view.mount():
            pass


@pytest.mark.parametrize("loaded", [False, True], ids=["not-loaded", "loaded"])
async def test_a_view_of_an_image_that_was_removed(loaded: bool, tmp_path: Path) -> None:
    """The image's files were collected, so methods raise an error.

    The answer "no such file" would be wrong, as the image has the files.
    """
    async with open_registry() as registry, open_puller(tmp_path / "store") as puller:
        async with puller.pull(registry.add(IMAGE, NAME)) as image:
            view = image.rootfs
            if loaded:
                await view.walk()
        await puller.store.remove(image.reference)
        await puller.store.collect()
        with pytest.raises(StoreError, match="pull"):
            await view.read_bytes("a-1")
        with pytest.raises(StoreError, match="pull"):
            async with view.open("a-1"):
                pass
        with pytest.raises(StoreError, match="pull"):
            await view.export(tmp_path / "out")
        with pytest.raises(StoreError, match="pull"):
            await view.export_tar(Discard())
        with pytest.raises(StoreError):
            async with view.mount():
                pass
        if not loaded:
            with pytest.raises(StoreError, match="pull"):
                await view.exists("a-1")


async def test_a_mount_that_outlives_its_store(tmp_path: Path) -> None:
    """Leaving the store unmounts: another process may then remove the layers."""
    async with open_registry() as registry, trio.open_nursery() as outside:
        mounted, go_on = trio.Event(), trio.Event()

        async def use(puller: Puller) -> None:
            async with puller.pull(reference) as image, image.rootfs.mount(tmp_path / "t"):
                assert os.listdir(tmp_path / "t")
                mounted.set()
                await go_on.wait()
                assert os.listdir(tmp_path / "t") == []

        reference = registry.add(IMAGE, NAME)
        (tmp_path / "t").mkdir()
        async with open_puller(tmp_path / "store") as puller:
            outside.start_soon(use, puller)
            await mounted.wait()
        assert_nothing_left(tmp_path / "store")
        go_on.set()


async def test_random_times(tmp_path: Path) -> None:
    """Leave blocks at random times, with real sockets, disk and processes.

    Some pulls share layers, and the puller, its store or a pull's own task leaves first. All pulls
    end within the limit, and leave no files or processes behind.
    """
    rng = random.Random(16)
    end = trio.current_time() + SECONDS
    rounds = errors = 0
    async with open_registry() as registry:
        references = [registry.add(IMAGE, NAME), registry.add(OTHER, "library/other:1")]
        while rounds < 3 or trio.current_time() < end:
            path = tmp_path / str(rounds % 3)
            with no_process_left(), trio.fail_after(LIMIT):
                errors += await leave_at_random(path, registry, references, rng)
            assert_nothing_left(path)
            rounds += 1
    print(f"{rounds} rounds, {errors} pulls ended by a block that was left")
    assert errors


async def leave_at_random(
    path: Path, registry: Registry, references: list[str], rng: random.Random
) -> int:
    errors = 0

    async def pull_again(puller: Puller, scope: trio.CancelScope) -> None:
        nonlocal errors
        with scope:
            for _ in range(50):
                try:
                    await pull_any(puller, rng.choice(references))
                except (ManagerClosed, StoreClosed):
                    errors += 1
                    return

    async def leave_puller_later(store: DirectoryStore, outside: trio.Nursery) -> None:
        async with open_puller(store) as puller:
            for scope in scopes:
                outside.start_soon(pull_again, puller, scope)
            await trio.sleep(rng.random() * 0.4)

    scopes = [trio.CancelScope() for _ in range(4)]
    async with trio.open_nursery() as outside:
        async with open_store(path) as store:
            outside.start_soon(leave_puller_later, store, outside)
            await trio.sleep(rng.random() * 0.2)
            if rng.random() < 0.5:
                rng.choice(scopes).cancel()
            await trio.sleep(rng.random() * 0.2)
            for image in await store.images():
                await store.remove(image.reference)
            await store.collect()
    return errors


async def pull_any(puller: Puller, reference: str) -> None:
    async with puller.pull(reference) as image:
        await image.rootfs.walk()
