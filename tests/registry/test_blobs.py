"""Downloads of blobs: kept bytes, progress and errors."""

from __future__ import annotations

import errno
import gc
from functools import partial

import httpx
import pytest
import trio
from registry.fakes import Body, MemorySink, Network, Report, describe, is_final
from trio.testing import wait_all_tasks_blocked

from trio_layers._errors import RegistryError, VerificationError
from trio_layers._manifest import Descriptor
from trio_layers._reference import parse_reference
from trio_layers._registry.blobs import MAX_SHORT, SHORT
from trio_layers._registry.client import open_registry_client

HOST = "https://registry.example"
APP = parse_reference("registry.example/team/app")
CONTENT = bytes(range(256)) * 4
BLOB = describe(CONTENT)
VERIFICATION_FAILED = f"filesystem layer verification failed for digest {BLOB.digest}"


async def fetch(
    network: Network, sink: MemorySink, descriptor: Descriptor = BLOB, report: Report | None = None
) -> None:
    async with network.client() as http, open_registry_client(client=http) as client:
        await client.fetch_blob(APP, descriptor, sink, progress=report or Report())


def whole(*chunks: bytes, **headers: str) -> Network:
    """Return a registry that sends these chunks for any request."""
    return Network(
        **{HOST: lambda request: httpx.Response(200, headers=headers, stream=Body(chunks))}
    )


async def test_progress() -> None:
    """The reported count includes earlier bytes. After the last chunk the words follow."""
    report = Report()

    def rest(request: httpx.Request) -> httpx.Response:
        headers = {"Content-Range": "bytes 24-1023/1024"}
        chunks = [CONTENT[24:524], CONTENT[524:]]
        return httpx.Response(206, headers=headers, stream=Body(chunks))

    network = Network(**{HOST: rest})
    await fetch(network, MemorySink(CONTENT[:24]), report=report)
    assert report.events == [
        ("Downloading", 524, 1024),
        ("Downloading", 1024, 1024),
        ("Verifying Checksum", 0, 0),
        ("Download complete", 0, 0),
    ]
    assert network.asked == [f"{HOST}/v2/team/app/blobs/{BLOB.digest}"]
    assert network.requests[0].headers["Range"] == "bytes=24-1023"
    assert network.requests[0].headers["Accept-Encoding"] == "identity"


async def test_nothing_to_fetch() -> None:
    """A complete or empty blob is only verified. The call is still a checkpoint."""
    network, report = Network(), Report()
    await fetch(network, MemorySink(CONTENT), report=report)
    await fetch(network, MemorySink(), describe(b""))
    assert network.requests == []
    assert report.actions == ["Verifying Checksum", "Download complete"]
    async with network.client() as http, open_registry_client(client=http) as client:
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.fetch_blob(APP, BLOB, MemorySink(CONTENT), progress=Report())
    assert scope.cancelled_caught


async def test_wrong_bytes_that_were_there_before() -> None:
    """Earlier bytes may be the wrong ones, so the sink is emptied, and another
    attempt is allowed.
    """
    sink = MemorySink(b"x" * 1024)
    with pytest.raises(VerificationError, match=VERIFICATION_FAILED) as caught:
        await fetch(Network(), sink)
    assert not is_final(caught.value)
    assert caught.value.digest == BLOB.digest
    assert sink.data == b""


@pytest.mark.parametrize(
    "chunks",
    [(CONTENT[:-1] + b"x",), (CONTENT, b"more"), (CONTENT + b"more",), (CONTENT[:500], CONTENT)],
)
async def test_wrong_bytes_in_one_answer(chunks: tuple[bytes, ...]) -> None:
    """If all bytes came in one response, or too many, the error is final."""
    sink, report = MemorySink(), Report()
    with pytest.raises(VerificationError, match=VERIFICATION_FAILED) as caught:
        await fetch(whole(*chunks), sink, report=report)
    assert is_final(caught.value)
    assert sink.data == b""
    assert "Download complete" not in report.actions


async def test_too_much_is_not_read() -> None:
    """An endless body is not read beyond the first chunk that exceeds the blob's size."""
    bodies: list[Body] = []

    def endless(request: httpx.Request) -> httpx.Response:
        bodies.append(Body([b"x" * 100] * 1000))
        return httpx.Response(200, stream=bodies[-1])

    with pytest.raises(VerificationError):
        await fetch(Network(**{HOST: endless}), MemorySink())
    assert [(body.read, body.closed) for body in bodies] == [(11, True)] * 2


@pytest.mark.parametrize(
    "content_range",
    ["bytes 24-1023/1024x", "bytes 23-1022/1024", "bytes 24-1024/1024", "bytes 24-23/1024", "x"],
)
async def test_ranges_that_do_not_fit(content_range: str) -> None:
    """A range at another place is not used, and the whole blob is requested."""

    def answer(request: httpx.Request) -> httpx.Response:
        if "Range" not in request.headers:
            return httpx.Response(200, stream=Body([CONTENT]))
        headers = {"Content-Range": content_range}
        return httpx.Response(206, headers=headers, stream=Body([CONTENT[24:]]))

    sink = MemorySink(CONTENT[:24])
    await fetch(Network(**{HOST: answer}), sink)
    assert (sink.data, sink.restarts) == (CONTENT, 1)


async def test_a_registry_that_is_never_done() -> None:
    """A server sends one byte outside the requested range, and then no more. The client starts over
    only once.
    """

    def answer(request: httpx.Request) -> httpx.Response:
        if "Range" in request.headers:
            return httpx.Response(416)
        headers = {"Content-Range": "bytes 0-0/1024"}
        return httpx.Response(206, headers=headers, stream=Body([CONTENT[:1]]))

    network = Network(**{HOST: answer})
    with pytest.raises(RegistryError, match=r"answered 416 .* asked for from byte 1 on"):
        with trio.fail_after(5):
            await fetch(network, MemorySink())
    assert len(network.requests) == 4


@pytest.mark.parametrize("size", [1, 64 * 1024 - 1])
async def test_a_range_for_each_byte(size: int) -> None:
    """An attempt continues short ranges a few times. The received bytes are kept."""
    content = CONTENT * 2048

    def answer(request: httpx.Request) -> httpx.Response:
        start = int(request.headers.get("Range", "bytes=0-")[len("bytes=") :].partition("-")[0])
        stop = start + size
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        return httpx.Response(206, headers=headers, stream=Body([content[start:stop]]))

    network, sink = Network(**{HOST: answer}), MemorySink()
    blob = describe(content)
    for attempt in (1, 2):
        message = f"gives blob {blob.digest} in pieces as small as {size} bytes"
        with pytest.raises(RegistryError, match=message) as caught:
            await fetch(network, sink, blob)
        assert not is_final(caught.value)
        assert sink.data == content[: MAX_SHORT * size * attempt]
        assert len(network.requests) == (MAX_SHORT + 1) * attempt


async def test_ranges_of_some_length() -> None:
    """A server limits the length of ranges. The client repeats the request as often as needed."""
    content = CONTENT * 2048

    def answer(request: httpx.Request) -> httpx.Response:
        start = int(request.headers.get("Range", "bytes=0-")[len("bytes=") :].partition("-")[0])
        stop = min(start + SHORT, len(content))
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        return httpx.Response(206, headers=headers, stream=Body([content[start:stop]]))

    network, sink = Network(**{HOST: answer}), MemorySink()
    await fetch(network, sink, describe(content))
    assert sink.data == content
    assert len(network.requests) == len(content) / SHORT > MAX_SHORT


@pytest.mark.parametrize("status", [204, 206])
async def test_an_answer_that_was_not_asked_for(status: int) -> None:
    """The response is a range although none was requested. The error names the status."""
    network = Network(**{HOST: lambda request: httpx.Response(status)})
    with pytest.raises(RegistryError, match=f"answered {status} for blob {BLOB.digest}") as caught:
        await fetch(network, MemorySink())
    assert caught.value.status == status


async def test_a_body_that_ends_early() -> None:
    """The received bytes are kept, and the error gives their number."""
    sink = MemorySink()
    with pytest.raises(RegistryError, match="after 500 of 1024 bytes") as caught:
        await fetch(whole(CONTENT[:500]), sink)
    assert not is_final(caught.value)
    assert sink.data == CONTENT[:500]


async def test_a_stall() -> None:
    """The limit for a byte goes to httpx, whose timeout error is retryable."""
    body = Body([CONTENT[:500]], httpx.ReadTimeout(""))
    network = Network(**{HOST: lambda request: httpx.Response(200, stream=body)})
    sink = MemorySink()
    message = rf"^registry\.example broke off while it sent blob {BLOB.digest} .*: ReadTimeout$"
    with pytest.raises(RegistryError, match=message) as caught:
        await fetch(network, sink)
    assert not is_final(caught.value)
    assert sink.data == CONTENT[:500]
    timeouts = network.requests[0].extensions["timeout"]
    assert (timeouts["read"], timeouts["pool"]) == (60, None)


@pytest.mark.parametrize(
    ("tag", "sent"), [('"strong"', '"strong"'), ('W/"weak"', None), ("bare", None)]
)
async def test_entity_tags(tag: str, sent: str | None) -> None:
    """A strong tag is sent with the next range, until the blob is complete."""
    answers = [
        httpx.Response(200, headers={"ETag": tag}, stream=Body([CONTENT[:500]])),
        httpx.Response(
            206,
            headers={"ETag": tag, "Content-Range": "bytes 500-1023/1024"},
            stream=Body([CONTENT[500:]]),
        ),
        httpx.Response(200, stream=Body([CONTENT])),
    ]
    network = Network(**{HOST: lambda request: answers.pop(0)})
    sink = MemorySink()
    async with network.client() as http, open_registry_client(client=http) as client:
        with pytest.raises(RegistryError):
            await client.fetch_blob(APP, BLOB, sink, progress=Report())
        await client.fetch_blob(APP, BLOB, sink, progress=Report())
        await client.fetch_blob(APP, BLOB, MemorySink(CONTENT[:1]), progress=Report())
    got = [request.headers.get("If-Range") for request in network.requests]
    assert got == [None, sent, None]


async def test_a_sink_that_fails() -> None:
    """The sink's error is raised unchanged, and the connection is free again."""

    class FullSink(MemorySink):
        async def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "disk full")

    body = Body([b"x"] * 1024)
    network = Network(**{HOST: lambda request: httpx.Response(200, stream=body)})
    with pytest.raises(OSError, match="disk full"):
        await fetch(network, FullSink())
    assert body.closed
    gc.collect()  # an abandoned generator would cause a warning


async def test_cancelled_in_each_wait() -> None:
    """After a cancellation of connecting, reading or writing, the sink keeps its bytes, and the
    slot is free.
    """

    class Stuck(httpx.AsyncByteStream):
        def __aiter__(self) -> Stuck:
            return self

        async def __anext__(self) -> bytes:
            await trio.sleep_forever()
            raise AssertionError

    class StuckSink(MemorySink):
        async def write(self, data: bytes) -> None:
            await trio.sleep_forever()

    async def connecting(request: httpx.Request) -> httpx.Response:
        await trio.sleep_forever()
        raise AssertionError

    def reading(request: httpx.Request) -> httpx.Response:
        headers = {"Content-Range": "bytes 3-1023/1024"}
        return httpx.Response(206, headers=headers, stream=Stuck())

    def writing(request: httpx.Request) -> httpx.Response:
        headers = {"Content-Range": "bytes 3-1023/1024"}
        return httpx.Response(206, headers=headers, stream=Body([CONTENT[3:]]))

    for handler, kind in (
        (connecting, MemorySink),
        (reading, MemorySink),
        (writing, StuckSink),
    ):
        sink = kind(CONTENT[:3])
        network = Network(**{HOST: handler})
        async with network.client() as http, open_registry_client(client=http) as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(client.fetch_blob, APP, BLOB, sink, progress=Report()))
                await wait_all_tasks_blocked()
                assert client.statistics().active == 1
                nursery.cancel_scope.cancel()
            assert client.statistics().active == 0
        assert sink.data == CONTENT[:3]
    gc.collect()
