"""The embedded registry over a socket and in memory: one set of tests, the same answers."""

from __future__ import annotations

import contextlib
import math
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import trio
import trio.testing
import trustme

from trio_layers.testing import (
    BasicAuth,
    Challenge,
    Corrupt,
    Cut,
    Delay,
    Drop,
    IgnoreRange,
    NoLength,
    Redirect,
    Registry,
    Reply,
    Shorter,
    Slow,
    SlowHead,
    Stall,
    TokenAuth,
    WrongRange,
    build_image,
    build_index,
    open_registry,
    sample_image,
)
from trio_layers.testing._serve import _Connection

IMAGE = sample_image()
LARGE = max(IMAGE.blobs.values(), key=len)
DATA = bytes(range(256)) * 1024
NAME = "library/demo"


@asynccontextmanager
async def socket_client(auth=None) -> AsyncIterator[tuple[Registry, httpx.AsyncClient]]:
    async with open_registry(auth=auth) as registry:
        async with httpx.AsyncClient(base_url=registry.url) as client:
            yield registry, client


@asynccontextmanager
async def memory_client(auth=None) -> AsyncIterator[tuple[Registry, httpx.AsyncClient]]:
    registry = Registry(auth=auth)
    async with httpx.AsyncClient(base_url=registry.url, transport=registry.transport()) as client:
        yield registry, client


@pytest.fixture(params=[socket_client, memory_client], ids=["socket", "memory"])
def connect(request: pytest.FixtureRequest):
    return request.param


async def test_an_image_is_served_by_tag_and_by_digest(connect) -> None:
    async with connect() as (registry, client):
        reference = registry.add(IMAGE, f"{NAME}:v1")
        assert reference == f"{registry.host}/{NAME}:v1"
        assert registry.add(IMAGE, NAME) == f"{registry.host}/{NAME}@{IMAGE.digest}"
        assert (await client.get("/v2/")).status_code == 200
        for name in ("v1", IMAGE.digest):
            got = await client.get(f"/v2/{NAME}/manifests/{name}")
            assert got.content == IMAGE.manifest
            assert got.headers["Content-Type"] == IMAGE.descriptor.media_type
            assert got.headers["Docker-Content-Digest"] == IMAGE.digest
        for digest, content in IMAGE.blobs.items():
            assert (await client.get(f"/v2/{NAME}/blobs/{digest}")).content == content


async def test_head_has_the_headers_and_no_body(connect) -> None:
    async with connect() as (registry, client):
        registry.add(IMAGE, f"{NAME}:v1")
        for path in ("manifests/v1", f"blobs/{IMAGE.config_descriptor.digest}"):
            head = await client.head(f"/v2/{NAME}/{path}")
            got = await client.get(f"/v2/{NAME}/{path}")
            assert head.headers == got.headers
            assert head.content == b""
            assert got.content != b""
        assert [exchange.bytes_sent > 0 for exchange in registry.requests] == [False, True] * 2


async def test_an_index_brings_its_images(connect) -> None:
    index = build_index([sample_image(platform="linux/arm64"), IMAGE])
    async with connect() as (registry, client):
        registry.add(index, f"{NAME}:all")
        assert (await client.get(f"/v2/{NAME}/manifests/all")).content == index.manifest
        for image in index.images:
            got = await client.get(f"/v2/{NAME}/manifests/{image.digest}")
            assert got.content == image.manifest


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v2/nobody/nothing/manifests/latest", "NAME_UNKNOWN"),
        (f"/v2/{NAME}/manifests/none", "MANIFEST_UNKNOWN"),
        (f"/v2/{NAME}/blobs/sha256:{'0' * 64}", "BLOB_UNKNOWN"),
        (f"/v2/{NAME}/tags/what", "NAME_INVALID"),
        ("/v2/UPPER/manifests/latest", "NAME_INVALID"),
        ("/token", "NOT_FOUND"),
    ],
)
async def test_what_is_not_there_is_a_404_with_its_code(connect, path: str, code: str) -> None:
    async with connect() as (registry, client):
        registry.add(IMAGE, f"{NAME}:v1")
        got = await client.get(path)
        assert got.status_code == 404
        assert got.json()["errors"][0]["code"] == code


async def test_pushing_is_not_supported(connect) -> None:
    async with connect() as (_, client):
        got = await client.post(f"/v2/{NAME}/blobs/uploads", content=b"data")
        assert got.status_code == 405
        assert got.json()["errors"][0]["code"] == "UNSUPPORTED"


async def test_tags_come_in_pages(connect) -> None:
    async with connect() as (registry, client):
        for tag in ("c", "a", "b"):
            registry.add(IMAGE, f"{NAME}:{tag}")
        whole = await client.get(f"/v2/{NAME}/tags/list")
        assert whole.json() == {"name": NAME, "tags": ["a", "b", "c"]}
        page = await client.get(f"/v2/{NAME}/tags/list?n=2")
        assert page.json()["tags"] == ["a", "b"]
        rest = await client.get(page.links["next"]["url"])
        assert rest.json()["tags"] == ["c"]
        assert "Link" not in rest.headers
        endless = await client.get(f"/v2/{NAME}/tags/list?n={'9' * 5000}")
        assert endless.json() == whole.json()


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        (f"bytes={len(DATA) - 1}-", len(DATA) - 1, len(DATA)),
        ("bytes=100-99999999", 100, len(DATA)),
        ("bytes=-10", len(DATA) - 10, len(DATA)),
        ("bytes=-99999999", 0, len(DATA)),
    ],
)
async def test_a_range_is_sent_and_named(connect, asked: str, start: int, stop: int) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        got = await client.get(url, headers={"Range": asked})
        assert got.status_code == 206
        assert got.content == DATA[start:stop]
        assert got.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(DATA)}"


@pytest.mark.parametrize(
    "asked", ["bytes=5-4", "bytes=0-1,5-6", "bytes=-", "lines=1-2", f"bytes={'9' * 5000}-"]
)
async def test_an_odd_range_is_ignored(connect, asked: str) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        got = await client.get(url, headers={"Range": asked})
        assert (got.status_code, got.content) == (200, DATA)


@pytest.mark.parametrize("asked", [f"bytes={len(DATA)}-", "bytes=-0"])
async def test_a_range_beyond_the_end_is_a_416(connect, asked: str) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        got = await client.get(url, headers={"Range": asked})
        assert got.status_code == 416
        assert got.headers["Content-Range"] == f"bytes */{len(DATA)}"


async def test_if_range_decides_whether_the_range_counts(connect) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        etag = (await client.head(url)).headers["ETag"]
        for condition, status in ((etag, 206), ('"other"', 200)):
            headers = {"Range": "bytes=1-", "If-Range": condition}
            assert (await client.get(url, headers=headers)).status_code == status


async def test_basic_auth(connect) -> None:
    async with connect(BasicAuth("user", "pass:word")) as (registry, client):
        registry.add(IMAGE, f"{NAME}:v1")
        url = f"/v2/{NAME}/manifests/v1"
        refused = await client.get(url)
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"].startswith("Basic ")
        assert (await client.get(url, auth=("user", "pass"))).status_code == 401
        assert (await client.get(url, headers={"Authorization": "Basic ?"})).status_code == 401
        assert (await client.get(url, auth=("user", "pass:word"))).content == IMAGE.manifest


def challenge_of(response: httpx.Response) -> dict[str, str]:
    assert response.status_code == 401
    kind, _, rest = response.headers["WWW-Authenticate"].partition(" ")
    assert kind == "Bearer"
    pairs = (pair.partition("=") for pair in rest.split(","))
    return {name: value.strip('"') for name, _, value in pairs}


async def test_anonymous_tokens(connect) -> None:
    """The challenge says where tokens are; a token is good for the repository it names."""
    async with connect(TokenAuth()) as (registry, client):
        registry.add(IMAGE, f"{NAME}:v1")
        registry.add(IMAGE, "other/demo:v1")
        challenge = challenge_of(await client.get(f"/v2/{NAME}/manifests/v1"))
        assert challenge["realm"] == f"{registry.url}/token"
        assert challenge["scope"] == f"repository:{NAME}:pull"
        assert "scope" not in challenge_of(await client.get("/v2/"))
        given = await client.get(
            challenge["realm"],
            params={"service": challenge["service"], "scope": f"repository:{NAME}:pull,push"},
        )
        assert given.json()["expires_in"] == 300
        assert registry.tokens_issued == 1
        bearer = {"Authorization": f"Bearer {given.json()['token']}"}
        got = await client.get(f"/v2/{NAME}/manifests/v1", headers=bearer)
        assert got.content == IMAGE.manifest
        elsewhere = await client.get("/v2/other/demo/manifests/v1", headers=bearer)
        assert challenge_of(elsewhere)["error"] == "insufficient_scope"
        registry.revoke_tokens()
        late = await client.get(f"/v2/{NAME}/manifests/v1", headers=bearer)
        assert challenge_of(late)["error"] == "invalid_token"


async def test_tokens_for_a_password(connect) -> None:
    async with connect(TokenAuth("user", "secret")) as (registry, client):
        scope = f"repository:{NAME}:pull"
        assert (await client.get("/token", params={"scope": scope})).status_code == 401
        given = await client.get(
            "/token", params={"scope": scope, "offline_token": "true"}, auth=("user", "secret")
        )
        refresh = {"grant_type": "refresh_token", "refresh_token": given.json()["refresh_token"]}
        again = await client.post("/token", data={**refresh, "scope": scope})
        assert again.json()["access_token"] != given.json()["access_token"]
        password = {"grant_type": "password", "username": "user", "scope": scope}
        wrong = await client.post("/token", data={**password, "password": "?"})
        assert wrong.status_code == 401
        right = await client.post("/token", data={**password, "password": "secret"})
        assert right.status_code == 200
        registry.add(IMAGE, f"{NAME}:v1")
        for token in (given, again, right):
            bearer = {"Authorization": f"Bearer {token.json()['token']}"}
            got = await client.get(f"/v2/{NAME}/manifests/v1", headers=bearer)
            assert got.status_code == 200


async def test_tokens_expire_by_trio_time(autojump_clock) -> None:
    async with memory_client(TokenAuth(expires_in=60)) as (registry, client):
        registry.add(IMAGE, f"{NAME}:v1")
        token = await client.get("/token", params={"scope": f"repository:{NAME}:pull"})
        bearer = {"Authorization": f"Bearer {token.json()['token']}"}
        url = f"/v2/{NAME}/manifests/v1"
        await trio.sleep(59)
        assert (await client.get(url, headers=bearer)).status_code == 200
        await trio.sleep(1)
        assert challenge_of(await client.get(url, headers=bearer))["error"] == "invalid_token"


async def test_reply_hits_as_many_requests_as_it_is_told_to(connect) -> None:
    """`skip`, `times`, the method and the order of the rules, on one path."""
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        busy = Reply(429, headers={"Retry-After": "7"}, body=b"later")
        registry.inject("/v2/*/blobs/*", busy, skip=1, times=2, method="GET")
        registry.inject("*", Reply(503), times=None)
        registry.inject("*", Reply(500))
        await client.head(url)
        statuses = [(await client.get(url)).status_code for _ in range(4)]
        assert statuses == [503, 429, 429, 503]
        assert [exchange.status for exchange in registry.requests[1:]] == statuses
        registry.clear_faults()
        got = await client.get(url)
        assert (got.status_code, got.content) == (200, DATA)
        registry.inject("*", busy, times=None)
        got = await client.get(url)
        assert (got.headers["Retry-After"], got.content) == ("7", b"later")
        head = await client.head(url)
        assert (head.headers["Content-Length"], head.content) == ("5", b"")


async def test_a_removed_blob_is_missing(connect) -> None:
    async with connect() as (registry, client):
        registry.add(IMAGE, f"{NAME}:v1")
        for digest in (IMAGE.config_descriptor.digest, IMAGE.digest):
            registry.remove(NAME, digest)
            kind = "manifests" if digest == IMAGE.digest else "blobs"
            assert (await client.get(f"/v2/{NAME}/{kind}/{digest}")).status_code == 404
        assert (await client.get(f"/v2/{NAME}/manifests/v1")).status_code == 404


@pytest.mark.parametrize("after", [0, 1, 100_000])
async def test_cut_closes_after_so_many_bytes(connect, after: int) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, Cut(after))
        got = bytearray()
        with pytest.raises(httpx.RemoteProtocolError, match="without sending complete"):
            async with client.stream("GET", url) as response:
                async for chunk in response.aiter_raw():
                    got += chunk
        assert got == DATA[:after]
        assert registry.requests[-1].bytes_sent == after
        assert (await client.get(url)).content == DATA


async def test_a_cut_beyond_the_body_is_none(connect) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, Cut(len(DATA)))
        assert (await client.get(url)).content == DATA


async def test_a_reset_is_a_read_error(connect) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, Cut(1000, reset=True))
        with pytest.raises(httpx.ReadError):
            async with client.stream("GET", url) as response:
                async for _ in response.aiter_raw():
                    pass
        assert registry.requests[-1].bytes_sent == 1000
        assert (await client.get(url)).content == DATA


async def test_drop_closes_without_an_answer(connect) -> None:
    async with connect() as (registry, client):
        registry.inject("/v2/", Drop())
        with pytest.raises(httpx.RemoteProtocolError, match="Server disconnected"):
            await client.get("/v2/")
        assert registry.requests[0].status == 0
        assert (await client.get("/v2/")).status_code == 200


async def test_corrupt_changes_one_byte_also_in_a_range(connect) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, Corrupt(70_000), Corrupt(3), times=None)
        got = (await client.get(url)).content
        assert [at for at in range(len(DATA)) if got[at] != DATA[at]] == [3, 70_000]
        part = (await client.get(url, headers={"Range": "bytes=69999-"})).content
        assert part[:1] == DATA[69_999:70_000]
        assert part[1] == got[70_000]
        assert part[2:] == DATA[70_001:]


async def test_ignore_range_sends_the_whole(connect) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, IgnoreRange())
        got = await client.get(url, headers={"Range": "bytes=5-"})
        assert (got.status_code, got.content) == (200, DATA)
        assert "Accept-Ranges" not in got.headers
        assert registry.requests[-1].headers["range"] == "bytes=5-"


async def test_no_length(connect) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, NoLength(), times=None)
        for asked, expected in (({}, DATA), ({"Range": "bytes=9-"}, DATA[9:])):
            got = await client.get(url, headers=asked)
            assert "Content-Length" not in got.headers
            assert got.content == expected
        assert (await client.head(url)).content == b""


async def test_what_befalls_bodies_does_not_befall_head(connect) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, Cut(0), Stall(0), times=None)
        for _ in range(2):
            assert (await client.head(url)).headers["Content-Length"] == str(len(DATA))


@pytest.mark.parametrize(("shift", "start"), [(5, 105), (-100, 0), (-200, 0), (10**9, 262_143)])
async def test_wrong_range_starts_elsewhere_and_says_so(connect, shift: int, start: int) -> None:
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, WrongRange(shift), times=None)
        got = await client.get(url, headers={"Range": "bytes=100-"})
        assert got.headers["Content-Range"] == f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"
        assert got.content == DATA[start:]
        assert (await client.get(url)).status_code == 200


async def test_redirect_leads_to_another_registry(connect) -> None:
    """By socket the other one sees the request; in memory the transport answers for all hosts."""
    async with connect() as (registry, client), open_registry() as other:
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        other.add_blob(NAME, DATA)
        registry.inject(url, Redirect(other.url))
        got = await client.get(f"{url}?a=b")
        assert got.status_code == 307
        assert got.headers["Location"] == f"{other.url}{url}?a=b"
        got = await client.get(got.headers["Location"])
        assert got.content == DATA


async def test_slow_delay_and_stall_take_trio_time(autojump_clock) -> None:
    async with memory_client() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA[:1000])}"
        registry.inject(url, Slow(100), Delay(3), Stall(500, seconds=4))
        start = trio.current_time()
        async with client.stream("GET", url, timeout=None) as response:
            assert trio.current_time() - start == pytest.approx(3)
            async for _ in response.aiter_raw():
                pass
        # 3 + 10: the bytes that were held up come at once, as they do from a congested network.
        assert trio.current_time() - start == pytest.approx(13)


async def test_slow_after_so_many_bytes(autojump_clock) -> None:
    async with memory_client() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA[:1000])}"
        registry.inject(url, Slow(2, after=990), Delay(3))
        start = trio.current_time()
        arrived: list[tuple[float, int]] = []
        async with client.stream("GET", url, timeout=None) as response:
            async for chunk in response.aiter_raw():
                arrived.append((round(trio.current_time() - start, 6), len(chunk)))
        assert arrived == [(3, 990), *[(3 + n / 2, 1) for n in range(1, 11)]]


async def test_a_slow_head_comes_byte_by_byte(autojump_clock) -> None:
    """And the body as ever."""
    registry = Registry()
    registry.inject("/v2/", SlowHead(2))
    client, server = trio.testing.memory_stream_pair()
    arrived: list[tuple[float, bytes]] = []
    start = trio.current_time()
    async with trio.open_nursery() as nursery, client:
        nursery.start_soon(_Connection(server, registry.respond, "http").run)
        await client.send_all(b"GET /v2/ HTTP/1.1\r\nHost: registry.test\r\n\r\n")
        while not arrived or arrived[-1][1] != b"{}":
            data = await client.receive_some()
            arrived.append((trio.current_time() - start, bytes(data)))
    head = b"".join(data for _, data in arrived[:-1])
    assert head.startswith(b"HTTP/1.1 200 \r\n")
    assert head.endswith(b"\r\n\r\n")
    assert [time for time, _ in arrived[:-1]] == [n / 2 for n in range(1, len(head) + 1)]


async def test_a_slow_head_takes_as_long_in_memory(autojump_clock) -> None:
    """And is a read timeout only if one byte is."""
    async with memory_client() as (registry, client):
        registry.inject("/v2/", SlowHead(2), SlowHead(0.1))
        registry.inject("/v2/", SlowHead(1))
        start = trio.current_time()
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/v2/", timeout=5)
        assert trio.current_time() - start == pytest.approx(5)
        assert registry.requests[0].ended
        got = await client.get("/v2/", timeout=5)
        head = len(b"HTTP/1.1 200 \r\n\r\n") + sum(
            len(name) + len(value) + 4 for name, value in got.headers.raw
        )
        assert trio.current_time() - start == pytest.approx(5 + head)


async def test_shorter_says_so(connect) -> None:
    """A whole and a range; what has no more than that is as it was."""
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, Shorter(100), times=None)
        got = await client.get(url)
        assert (got.status_code, got.content) == (200, DATA[:-100])
        got = await client.get(url, headers={"Range": "bytes=1000-1999"})
        assert got.headers["Content-Range"] == f"bytes 1000-1899/{len(DATA)}"
        assert (got.status_code, got.content) == (206, DATA[1000:1900])
        got = await client.get(url, headers={"Range": "bytes=0-99"})
        assert got.content == DATA[:100]


async def test_challenges_go_back_and_forth(connect) -> None:
    async with connect(TokenAuth()) as (registry, client):
        registry.inject("/v2/", Challenge("Basic"), times=2)
        registry.inject("/v2/", Challenge("Basic", "Bearer"), times=None)
        realm = f'Bearer realm="{registry.url}/token"'
        basic = 'Basic realm="here"'
        for sent, wanted in [
            ({}, basic),
            ({"Authorization": "Basic x"}, basic),
            ({}, basic),
            ({"Authorization": "Basic x"}, realm),
            ({"Authorization": "Bearer x"}, basic),
        ]:
            got = await client.get("/v2/", headers=sent)
            assert (got.status_code, got.headers["WWW-Authenticate"]) == (401, wanted)
        assert (await client.get("/token")).json()["token"]


async def test_a_stall_is_a_read_timeout(connect) -> None:
    """In memory as on the socket; what came before it is there."""
    async with connect() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA)}"
        registry.inject(url, Stall(1000))
        got = b""
        with pytest.raises(httpx.ReadTimeout):
            async with client.stream("GET", url, timeout=0.2) as response:
                async for chunk in response.aiter_raw():
                    got += chunk
        assert got == DATA[:1000]
        assert (await client.get(url)).content == DATA


async def test_a_late_answer_is_a_read_timeout(autojump_clock) -> None:
    async with memory_client() as (registry, client):
        registry.inject("*", Delay(math.inf))
        start = trio.current_time()
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/v2/", timeout=5)
        assert trio.current_time() - start == pytest.approx(5)
        assert registry.requests[0].ended


async def test_blobs_come_from_files(connect, tmp_path) -> None:
    """Whole, ranged, cut, corrupted: the same as from memory."""
    (tmp_path / "blob").write_bytes(DATA * 3)
    async with connect() as (registry, client):
        with pytest.raises(ValueError, match="missing digest"):
            registry.add_blob(NAME, tmp_path / "blob")
        digest = registry.add_blob(NAME, DATA * 3)
        registry.add_blob(NAME, tmp_path / "blob", digest=digest)
        url = f"/v2/{NAME}/blobs/{digest}"
        assert (await client.get(url)).content == DATA * 3
        part = await client.get(url, headers={"Range": "bytes=300000-300009"})
        assert part.content == (DATA * 3)[300_000:300_010]
        registry.inject(url, Corrupt(700_000))
        assert (await client.get(url)).content[700_000] == DATA[700_000 % 256] ^ 0xFF
        (tmp_path / "blob").write_bytes(DATA)
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(url)
        assert all(exchange.ended for exchange in registry.requests[:-1])


async def test_a_cancelled_client_ends_its_exchange_and_closes_the_file(connect, tmp_path) -> None:
    (tmp_path / "blob").write_bytes(DATA)
    async with connect() as (registry, client):
        digest = registry.add_blob(NAME, DATA)
        registry.add_blob(NAME, tmp_path / "blob", digest=digest)
        url = f"/v2/{NAME}/blobs/{digest}"
        registry.inject(url, Stall(1000, seconds=0.2), Slow(1_000_000))
        opened = open_files(tmp_path)
        with trio.CancelScope() as scope:
            async with client.stream("GET", url) as response:
                async for _ in response.aiter_raw():
                    assert open_files(tmp_path) == opened + 1
                    scope.cancel()
        assert scope.cancelled_caught
        with trio.fail_after(10):
            await registry.requests[0].wait_ended()
        assert open_files(tmp_path) == opened


def open_files(directory) -> int:
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(os.path.realpath(link).startswith(str(directory)) for link in links)


async def test_hostile_manifests_can_be_served(connect) -> None:
    async with connect() as (registry, client):
        digest = registry.add_manifest(NAME, b"{", media_type="text/html", tag="bad")
        got = await client.get(f"/v2/{NAME}/manifests/bad")
        assert (got.content, got.headers["Content-Type"]) == (b"{", "text/html")
        assert got.headers["ETag"] == f'"{digest}"'


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match="invalid repository name"):
        Registry().add(build_image([]), "Library/demo:latest")


def test_repr_counts() -> None:
    registry = Registry(auth=TokenAuth("user", "secret"))
    registry.add(IMAGE, f"{NAME}:v1")
    assert repr(registry) == (
        "<Registry https://registry.test: 1 repositories, 0 requests, 0 active>"
    )
    assert "secret" not in repr(TokenAuth("user", "secret"))
    assert "secret" not in repr(BasicAuth("user", "secret"))


# What only sockets have.


async def test_a_connection_serves_many_requests() -> None:
    async with socket_client() as (registry, client):
        registry.add(IMAGE, f"{NAME}:v1")
        streams = set()
        for _ in range(3):
            got = await client.get(f"/v2/{NAME}/manifests/v1")
            streams.add(got.extensions["network_stream"])
        assert len(streams) == 1


async def exchange_raw(registry: Registry, data: bytes) -> bytes:
    host, _, port = registry.host.partition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        received = bytearray()
        with contextlib.suppress(trio.BrokenResourceError):  # closed with data not yet read
            await stream.send_all(data)
            async for chunk in stream:
                received += chunk
        return bytes(received)


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with open_registry() as registry:
        registry.add(IMAGE, f"{NAME}:v1")
        requests = b"".join(
            b"%s %s HTTP/1.1\r\nHost: h\r\n%s\r\n" % (method, path, last)
            for method, path, last in (
                (b"HEAD", b"/v2/", b""),
                (b"GET", b"/v2/library/demo/manifests/v1", b""),
                (b"GET", b"/v2/library/demo/tags/list", b"Connection: close\r\n"),
            )
        )
        received = await exchange_raw(registry, requests)
        assert received.count(b"HTTP/1.1 200") == 3
        assert received.index(IMAGE.manifest) < received.index(b'"tags"')
        assert [exchange.method for exchange in registry.requests] == ["HEAD", "GET", "GET"]


async def test_a_client_that_waits_for_100_continue_gets_it() -> None:
    async with open_registry(auth=TokenAuth()) as registry:
        head = b"POST /token HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 1\r\n"
        received = await exchange_raw(registry, head + b"Expect: 100-continue\r\n\r\n" + b"x")
        assert b"HTTP/1.1 200" in received


async def test_a_client_that_speaks_no_http_is_cut_and_harms_nobody() -> None:
    async with socket_client() as (registry, client):
        tls = await exchange_raw(registry, b"\x16\x03\x01\x02\x00" + bytes(600))
        assert tls.startswith(b"HTTP/1.1 400")
        too_long = b"POST /token HTTP/1.1\r\nHost: h\r\nContent-Length: 99999\r\n\r\n"
        await exchange_raw(registry, too_long + bytes(99_999))
        assert not registry.requests
        assert (await client.get("/v2/")).status_code == 200


async def test_credentials_that_are_none_harm_nobody() -> None:
    async with open_registry(auth=BasicAuth("u", "p")) as registry:
        for _ in range(2):
            head = b"GET /v2/ HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"
            received = await exchange_raw(registry, head + b"Authorization: Basic \xe9\r\n\r\n")
            assert received.startswith(b"HTTP/1.1 401")


async def test_a_client_that_leaves_ends_its_request_only() -> None:
    async with socket_client() as (registry, client):
        url = f"/v2/{NAME}/blobs/{registry.add_blob(NAME, DATA * 100)}"
        async with client.stream("GET", url) as response:
            assert response.status_code == 200
        assert registry.requests[0].bytes_sent < len(DATA * 100)
        assert (await client.get(url)).content == DATA * 100


async def test_leaving_the_block_cuts_what_is_being_sent() -> None:
    async with httpx.AsyncClient() as client:
        async with open_registry() as registry:
            digest = registry.add_blob(NAME, DATA)
            registry.inject("*", Stall(10))
            request = client.build_request("GET", f"{registry.url}/v2/{NAME}/blobs/{digest}")
            response = await client.send(request, stream=True)
        with pytest.raises(httpx.RemoteProtocolError):
            await response.aread()
        await response.aclose()


async def test_the_body_s_exception_comes_out_as_it_is() -> None:
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        async with open_registry():
            raise error
    assert caught.value is error


async def test_tls() -> None:
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with open_registry(ssl_context=server, auth=TokenAuth()) as registry:
        async with httpx.AsyncClient(base_url=registry.url, verify=trusting) as client:
            refused = await client.get("/v2/")
            assert challenge_of(refused)["realm"] == f"{registry.url}/token"
            assert registry.url.startswith("https://")
            with pytest.raises(httpx.ConnectError):
                async with httpx.AsyncClient() as strict:
                    await strict.get(f"{registry.url}/v2/")
            assert (await client.get("/v2/")).status_code == 401
