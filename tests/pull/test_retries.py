"""Retries of requests other than those for layers, with a visible countdown."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import trio
from store.stores import open_with_threads

from trio_layers import Progress, RegistryError, VerificationError, open_puller
from trio_layers.testing import (
    Corrupt,
    Cut,
    Drop,
    Fault,
    File,
    Redirect,
    Registry,
    Reply,
    TokenAuth,
    build_image,
    open_registry,
)
from trio_layers.testing._http import Answer, Request

BUILT = build_image([[File("file", b"content")]])
[LAYER] = BUILT.layers
PLACES = {
    "token": "/token",
    "manifest": "*/manifests/*",
    "config": f"*/blobs/{BUILT.config_descriptor.digest}",
}


class Events:
    """A progress sink that records its events."""

    def __init__(self) -> None:
        self.events: list[Progress] = []

    async def __call__(self, event: Progress) -> None:
        await trio.lowlevel.checkpoint()
        self.events.append(event)

    def of(self, reference: str) -> list[str]:
        return [event.action for event in self.events if event.id == reference]


async def pull(store: Path, reference: str, sink: Events | None = None, **options: int) -> None:
    """Pull an image, and unpack its layers in threads.

    Starting worker processes would take longer than the rest of the test.
    """
    with trio.fail_after(30):
        async with (
            open_with_threads(store) as opened,
            open_puller(opened, retry_tick=0.001, stall_limit=0.2, **options) as puller,
            puller.pull(reference, progress=sink) as image,
        ):
            assert await image.rootfs.read_bytes("/file") == b"content"


@pytest.mark.parametrize(
    "fault",
    [
        Reply(503),
        Reply(429, headers={"Retry-After": "0"}),
        Drop(),
        Cut(10, reset=True),
    ],
    ids=repr,
)
@pytest.mark.parametrize("place", PLACES)
async def test_the_countdown_is_shown(place: str, fault: Fault, tmp_path: Path) -> None:
    """The countdown's ID is the reference, and another event follows the countdown."""
    async with open_registry(auth=TokenAuth()) as registry:
        reference = registry.add(BUILT, "team/app:1")
        registry.inject(PLACES[place], fault, times=2)
        events = Events()
        await pull(tmp_path, reference, events)
    shown = events.of(reference)
    # A fault on a kept-alive connection costs no attempt: the request is made again at once.
    assert shown[:-1] in (["Retrying in 1 second"] * 2, ["Retrying in 1 second"])
    assert shown[-1] == "Download complete"


async def test_nothing_is_shown_where_all_is_well(tmp_path: Path) -> None:
    async with open_registry(auth=TokenAuth()) as registry:
        reference = registry.add(BUILT, "team/app:1")
        events = Events()
        await pull(tmp_path, reference, events)
        assert events.of(reference) == []


async def test_a_sink_that_fails_in_a_countdown(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    async def sink(event: Progress) -> None:
        raise Stop

    async with open_registry() as registry, open_puller(tmp_path) as puller:
        reference = registry.add(BUILT, "team/app:1")
        registry.inject(PLACES["manifest"], Reply(503), times=None)
        with pytest.raises(Stop):
            async with puller.pull(reference, progress=sink):
                pass  # pragma: no cover


async def test_a_countdown_is_cancelled(tmp_path: Path) -> None:
    async with open_registry() as registry, open_puller(tmp_path) as puller:
        reference = registry.add(BUILT, "team/app:1")
        registry.inject(PLACES["config"], Reply(503, headers={"Retry-After": "50"}), times=None)

        async def sink(event: Progress) -> None:
            assert event.action == "Retrying in 50 seconds"
            scope.cancel()

        with trio.fail_after(5), trio.CancelScope() as scope:
            async with puller.pull(reference, progress=sink):
                pass  # pragma: no cover
        assert scope.cancelled_caught


@attrs.frozen
class Head(Fault):
    """A fault that hits HEAD requests only."""

    fault: Fault

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return self.fault.change_answer(request, answer) if request.method == "HEAD" else answer


@pytest.mark.parametrize(
    "fault",
    [*map(Reply, (401, 403, 404, 500)), Drop()],
    ids=repr,
)
async def test_the_second_pull_where_head_is_refused(fault: Fault, tmp_path: Path) -> None:
    """The first pull needs no HEAD; the second falls back to GET."""
    async with open_registry() as registry:
        reference = registry.add(BUILT, "team/app:1")
        registry.inject(PLACES["manifest"], Head(fault), times=None)
        for _ in range(2):
            events = Events()
            await pull(tmp_path, reference, events)
            assert events.of(reference) == []
        assert [each.method for each in registry.requests if "/manifests/" in each.path] == [
            "GET",
            "HEAD",
            "GET",
        ]


@pytest.mark.parametrize("redirected", [False, True])
@pytest.mark.parametrize("times", [1, 2])
async def test_a_layer_with_a_wrong_byte(times: int, redirected: bool, tmp_path: Path) -> None:
    """The client requests the layer once more, within the engine's first attempt.

    If the layer is wrong again, the pull fails with an error that names the host that sent it.
    """
    async with open_registry() as registry, open_registry() as storage:
        reference = registry.add(BUILT, "team/app:1")
        storage.add(BUILT, "team/app:1")
        source: Registry = storage if redirected else registry
        if redirected:
            registry.inject(f"*{LAYER.descriptor.digest}", Redirect(storage.url), times=None)
        source.inject(f"*{LAYER.descriptor.digest}", Corrupt(5), times=times)
        if times == 1:
            await pull(tmp_path, reference, max_download_attempts=1)
        else:
            with pytest.raises(VerificationError, match=f"{source.host} sent other bytes"):
                await pull(tmp_path, reference, max_download_attempts=5)
        asked = [each for each in source.requests if each.path.endswith(LAYER.descriptor.digest)]
        assert len(asked) == 2


async def test_a_signed_url_that_has_expired(tmp_path: Path) -> None:
    """The next attempt at a layer asks the registry for another URL."""
    async with open_registry() as registry, open_registry() as storage:
        reference = registry.add(BUILT, "team/app:1")
        storage.add(BUILT, "team/app:1")
        registry.inject("*/blobs/*", Redirect(storage.url), times=None)
        storage.inject("*/blobs/*", Reply(403, body=b"<Code>ExpiredToken</Code>"), times=2)
        await pull(tmp_path, reference)
        storage.inject("*/blobs/*", Reply(400), times=None)
        with pytest.raises(RegistryError, match=f"^{storage.host} answered 400"):
            await pull(tmp_path / "other", reference, max_download_attempts=2)
