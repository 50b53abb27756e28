"""Transient failures are retried, and final ones are not."""

from __future__ import annotations

import random
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import attrs
import httpx
import pytest
import trio
from registry.fakes import (
    OCI_INDEX,
    Body,
    FakeRegistry,
    Handler,
    MemorySink,
    Network,
    Report,
    describe,
    digest_of,
    is_final,
)
from trio.testing import MockClock

from trio_layers._errors import (
    AuthenticationError,
    NotFound,
    RateLimited,
    RegistryError,
    VerificationError,
)
from trio_layers._reference import parse_reference
from trio_layers._registry.client import RegistryClient, open_registry_client
from trio_layers._registry.retries import MAX_ATTEMPTS

HOST, MIRROR, STORAGE = "https://registry.example", "https://mirror.example", "https://s.example"
TOKENS = "https://tokens.example"
APP = parse_reference("registry.example/team/app:1")
CONTENT = bytes(range(256)) * 8
BLOB = describe(CONTENT)


@attrs.define(eq=False)
class Flaky:
    """Fails the first ``times`` requests whose URL contains ``part``."""

    inner: Handler
    failure: Handler
    times: float
    part: str = ""
    challenged: bool = False  # requests without a token do not fail
    failed: list[float] = attrs.field(factory=list)
    answered: list[float] = attrs.field(factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        unauthorized = self.challenged and "Authorization" not in request.headers
        if unauthorized or self.part not in str(request.url):
            return self.inner(request)
        if len(self.failed) < self.times:
            self.failed.append(trio.current_time())
            return self.failure(request)
        self.answered.append(trio.current_time())
        return self.inner(request)


def status(code: int, **headers: str) -> Handler:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request: httpx.Response(code, headers=fields, stream=Body([b"{}"]))


def raises(error: Exception) -> Handler:
    def fail(request: httpx.Request) -> httpx.Response:
        raise error

    return fail


def cut_short(request: httpx.Request) -> httpx.Response:
    said = "peer closed connection without sending complete message body"
    return httpx.Response(200, stream=Body([b"{"], httpx.RemoteProtocolError(said)))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


TRANSIENT: dict[str, Handler] = {
    "refused": raises(httpx.ConnectError("connection refused")),
    "reset": raises(httpx.ReadError("connection reset")),
    "closed": raises(httpx.RemoteProtocolError("Server disconnected without a response.")),
    "no answer": raises(httpx.ReadTimeout("")),
    "no connection": raises(httpx.ConnectTimeout("")),
    "TLS ends": raises(caused(httpx.ConnectError("EOF"), ssl.SSLEOFError())),
    "no name server": raises(
        caused(httpx.ConnectError("later"), socket.gaierror(socket.EAI_AGAIN, "later"))
    ),
    "proxy": raises(httpx.ProxyError("503 Service Unavailable")),
    "cut": cut_short,
    **{str(code): status(code) for code in (408, 429, 500, 502, 503, 504, 599)},
}
FINAL: dict[str, Handler] = {
    **{str(code): status(code) for code in (400, 401, 403, 404, 410, 451)},
    "no such host": raises(
        caused(httpx.ConnectError("unknown"), socket.gaierror(socket.EAI_NONAME, "unknown"))
    ),
    "certificate": raises(
        caused(httpx.ConnectError("certificate"), ssl.SSLCertVerificationError("self-signed"))
    ),
    "no HTTP": raises(httpx.RemoteProtocolError("illegal status line")),
    "proxy refuses": raises(httpx.ProxyError("403 Forbidden")),
}


async def open_and_read(client: RegistryClient) -> None:
    async with client.open_blob(APP, BLOB) as chunks:
        assert b"".join([chunk async for chunk in chunks]) == CONTENT


REQUESTS: dict[str, tuple[str, Callable[[RegistryClient], Awaitable[object]]]] = {
    "manifest": ("/manifests/", lambda client: client.resolve_image(APP)),
    "config": ("/blobs/", lambda client: client.resolve_image(APP)),
    "token": ("/token", lambda client: client.resolve_image(APP)),
    "any manifest": ("/manifests/", lambda client: client.get_manifest(APP)),
    "blob": ("/blobs/", lambda client: client.get_blob(APP, BLOB)),
    "tags": ("/tags/", lambda client: client.tags(APP)),
    "referrers": ("/referrers/", lambda client: client.referrers(f"{APP.name}@{BLOB.digest}")),
}


def serving() -> Handler:
    """Make a registry that requires tokens and is its own token server."""
    registry = FakeRegistry()
    registry.add_image(tag="1", layers=[CONTENT])

    def serve(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/token":
            return httpx.Response(200, json={"token": "t"})
        if "Authorization" not in request.headers:
            challenge = f'Bearer realm="{HOST}/token"'
            return httpx.Response(401, headers={"WWW-Authenticate": challenge})
        if request.url.path.endswith("/tags/list"):
            return httpx.Response(200, json={"tags": ["1"]})
        if "/referrers/" in request.url.path:
            index = {"schemaVersion": 2, "manifests": []}
            return httpx.Response(200, headers={"Content-Type": OCI_INDEX}, json=index)
        return registry(request)

    return serve


@pytest.mark.parametrize("failure", TRANSIENT)
@pytest.mark.parametrize("request_", REQUESTS)
async def test_a_transient_failure(request_: str, failure: str, autojump_clock: MockClock) -> None:
    """A request succeeds after four transient failures."""
    part, ask = REQUESTS[request_]
    flaky = Flaky(
        serving(), TRANSIENT[failure], MAX_ATTEMPTS - 1, part, challenged=request_ != "token"
    )
    async with (
        Network(**{HOST: flaky}).client() as http,
        open_registry_client(client=http) as client,
    ):
        await ask(client)
        assert client.statistics().active == 0
    assert len(flaky.failed) == flaky.times


@pytest.mark.parametrize("failure", FINAL)
@pytest.mark.parametrize("part", ["/manifests/", "/blobs/"])
async def test_any_other_failure(part: str, failure: str, autojump_clock: MockClock) -> None:
    registry = FakeRegistry()
    registry.add_image(tag="1")
    flaky = Flaky(registry, FINAL[failure], 9, part)
    async with (
        Network(**{HOST: flaky}).client() as http,
        open_registry_client(client=http) as client,
    ):
        began = trio.current_time()
        with pytest.raises(RegistryError) as caught:
            await client.resolve_image(APP)
    assert flaky.failed == [began]
    assert not caught.value.transient


async def test_when_it_is_made_again(autojump_clock: MockClock) -> None:
    """Five attempts have random pauses between them.

    Their averages are half of 0.5, 1, 2 and 4 seconds.
    """
    flaky = Flaky(FakeRegistry(), status(503), 99)
    async with (
        Network(**{HOST: flaky}).client() as http,
        open_registry_client(client=http) as client,
    ):
        for seed in range(20):
            flaky.failed.clear()
            random.seed(seed)
            with pytest.raises(RegistryError, match="answered 503") as caught:
                await client.get_manifest(APP)
            assert caught.value.transient
            pauses = [b - a for a, b in zip(flaky.failed, flaky.failed[1:], strict=False)]
            random.seed(seed)
            wanted = [random.uniform(0, longest) for longest in (0.5, 1, 2, 4)]
            assert pauses == pytest.approx(wanted)


@pytest.mark.parametrize("tick", [0.001, 10])
async def test_the_pauses_scale(tick: float, autojump_clock: MockClock) -> None:
    flaky = Flaky(FakeRegistry(), status(503), 99)
    async with (
        Network(**{HOST: flaky}).client() as http,
        open_registry_client(client=http, retry_tick=tick) as client,
    ):
        random.seed(1)
        with pytest.raises(RegistryError):
            await client.get_manifest(APP)
    random.seed(1)
    wanted = [random.uniform(0, longest) * tick for longest in (0.5, 1, 2, 4)]
    assert flaky.failed[-1] - flaky.failed[0] == pytest.approx(sum(wanted))


@pytest.mark.parametrize("tick", [0, -1, float("nan")])
async def test_a_tick_that_is_none(tick: float) -> None:
    with pytest.raises(ValueError, match="retry_tick must be more than 0 seconds"):
        async with open_registry_client(retry_tick=tick):
            pass  # pragma: no cover


@pytest.mark.parametrize("part", ["/token", "/manifests/", "/blobs/"])
@pytest.mark.parametrize("code", [429, 503])
async def test_a_server_that_asks_to_wait(part: str, code: int, autojump_clock: MockClock) -> None:
    """The client waits for ``Retry-After`` of registries and token servers."""
    flaky = Flaky(serving(), status(code, Retry_After="30"), 1, part)
    async with (
        Network(**{HOST: flaky}).client() as http,
        open_registry_client(client=http) as client,
    ):
        if part == "/token":
            await client.fetch_blob(APP, BLOB, MemorySink())  # this response also obeys Retry-After
        else:
            await client.resolve_image(APP)
    assert flaky.answered[0] - flaky.failed[0] == pytest.approx(30)


async def test_a_wait_is_cancelled(autojump_clock: MockClock) -> None:
    """A cancelled wait ends at once and holds no connection."""
    flaky = Flaky(FakeRegistry(), status(503, Retry_After="30"), 99)
    async with (
        Network(**{HOST: flaky}).client() as http,
        open_registry_client(client=http) as client,
    ):
        began = trio.current_time()
        with trio.move_on_after(0.25) as scope:
            await client.get_manifest(APP)
        assert scope.cancelled_caught
        assert trio.current_time() - began == pytest.approx(0.25)
        assert client.statistics().active == 0
    assert len(flaky.failed) == 1


async def test_the_countdown(autojump_clock: MockClock) -> None:
    """Each second is announced, and slow listeners do not prolong the wait.

    The words are docker's.
    """
    flaky = Flaky(serving(), status(503, Retry_After="3"), 1, "/manifests/")
    said: list[tuple[str, float]] = []

    async def announce(action: str) -> None:
        said.append((action, round(trio.current_time() - began, 3)))
        await trio.sleep(0.5)

    async with (
        Network(**{HOST: flaky}).client() as http,
        open_registry_client(client=http) as client,
    ):
        began = trio.current_time()
        await client.resolve_image(APP, announce=announce)
    assert said == [
        ("Retrying in 3 seconds", 0),
        ("Retrying in 2 seconds", 1),
        ("Retrying in 1 second", 2),
    ]


async def test_a_listener_that_fails(autojump_clock: MockClock) -> None:
    flaky = Flaky(serving(), status(503), 9, "/manifests/")
    error = RegistryError("it was the listener", host="x", transient=True)

    async def announce(action: str) -> None:
        raise error

    async with (
        Network(**{HOST: flaky}).client() as http,
        open_registry_client(client=http) as client,
    ):
        with pytest.raises(RegistryError) as caught:
            await client.resolve_image(APP, announce=announce)
    assert caught.value is error


async def test_a_layer_has_the_countdown_of_its_download(autojump_clock: MockClock) -> None:
    """`fetch_blob` does not retry a plain 503: the download manager does."""
    flaky = Flaky(FakeRegistry(), status(503), 9)
    async with (
        Network(**{HOST: flaky}).client() as http,
        open_registry_client(client=http) as client,
    ):
        with pytest.raises(RegistryError) as caught:
            await client.fetch_blob(APP, BLOB, MemorySink(), progress=Report())
    assert not is_final(caught.value)
    assert len(flaky.failed) == 1


# Several hosts.


@pytest.fixture
def mirrored(tmp_path: Path) -> Path:
    (tmp_path / APP.domain).mkdir()
    (tmp_path / APP.domain / "hosts.toml").write_text(f'[host."{MIRROR}"]\n')
    return tmp_path


@pytest.mark.parametrize(
    ("mirror", "registry", "asked", "error"),
    [
        # After a failure, the next host is tried first, and then another round begins.
        (status(503), status(503), ["mirror", "registry"] * MAX_ATTEMPTS, RegistryError),
        # Each host is retried until its error is final.
        (status(404), status(503), ["mirror"] + ["registry"] * MAX_ATTEMPTS, RegistryError),
        (status(503), status(404), ["mirror", "registry"] + ["mirror"] * 4, NotFound),
        (
            status(404),
            raises(httpx.ConnectError("refused")),
            ["mirror"] + ["registry"] * MAX_ATTEMPTS,
            RegistryError,
        ),
        (status(404), status(404), ["mirror", "registry"], NotFound),
        # An unreachable mirror is not retried if the registry's error is final.
        (
            raises(httpx.ConnectError("refused")),
            status(401),
            ["mirror", "registry"],
            AuthenticationError,
        ),
        (
            raises(httpx.ConnectError("refused")),
            raises(httpx.ConnectError("refused")),
            ["mirror", "registry"] * MAX_ATTEMPTS,
            RegistryError,
        ),
        # The registry's Retry-After is too long, so only the mirror is retried.
        (
            status(503),
            status(429, Retry_After="100"),
            ["mirror", "registry"] + ["mirror"] * 4,
            RateLimited,
        ),
    ],
)
async def test_rounds(
    mirror: Handler,
    registry: Handler,
    asked: list[str],
    error: type[RegistryError],
    mirrored: Path,
    autojump_clock: MockClock,
) -> None:
    network = Network(**{HOST: registry, MIRROR: mirror})
    async with (
        network.client() as http,
        open_registry_client(client=http, hosts_dir=mirrored) as client,
    ):
        with pytest.raises(error, match=r"; before that, mirror\.example "):
            await client.get_manifest(APP)
    assert [request.url.host.partition(".")[0] for request in network.requests] == asked


async def test_a_mirror_that_asks_to_wait(mirrored: Path, autojump_clock: MockClock) -> None:
    """The registry's retries are as early and as many as without the mirror."""
    there = FakeRegistry()
    there.add_image(tag="1")
    registry = Flaky(there, status(503), MAX_ATTEMPTS - 1)
    network = Network(**{HOST: registry, MIRROR: status(429, Retry_After="40")})
    async with (
        network.client() as http,
        open_registry_client(client=http, hosts_dir=mirrored) as client,
    ):
        await client.get_manifest(APP)
        assert trio.current_time() < 0.5 + 1 + 2 + 4
        hosts = [request.url.host.partition(".")[0] for request in network.requests]
        assert hosts == ["mirror"] + ["registry"] * MAX_ATTEMPTS
        # There is no other host left, so the client waits.
        network.hosts[HOST] = status(404)
        network.hosts[MIRROR] = Flaky(there, status(429, Retry_After="40"), 1)
        began = trio.current_time()
        await client.get_manifest(APP)
        assert trio.current_time() - began >= 40


async def test_a_round_that_ends_well(mirrored: Path, autojump_clock: MockClock) -> None:
    there = FakeRegistry()
    there.add_image(tag="1")
    network = Network(**{HOST: status(404), MIRROR: Flaky(there, status(500), 2)})
    async with (
        network.client() as http,
        open_registry_client(client=http, hosts_dir=mirrored) as client,
    ):
        await client.get_manifest(APP)
    assert len(network.requests) == 4


# Lists are retried from the failed page on.


@pytest.mark.parametrize("kind", ["tags", "referrers"])
async def test_pages(kind: str, autojump_clock: MockClock) -> None:
    """Each page has its own attempts, and is not requested after a success."""
    failures = {str(page): MAX_ATTEMPTS - 1 for page in range(5)}
    asked: list[str] = []

    def serve(request: httpx.Request) -> httpx.Response:
        page = request.url.params.get("page", "0")
        asked.append(page)
        if failures[page]:
            failures[page] -= 1
            return httpx.Response(503)
        headers = {"Content-Type": OCI_INDEX}
        if page != "4":
            headers["Link"] = f'<?page={int(page) + 1}>; rel="next"'
        manifests = [{"mediaType": OCI_INDEX, "digest": digest_of(page.encode()), "size": 1}]
        document = {"tags": [page], "schemaVersion": 2, "manifests": manifests}
        return httpx.Response(200, headers=headers, json=document)

    async with (
        Network(**{HOST: serve}).client() as http,
        open_registry_client(client=http) as client,
    ):
        if kind == "tags":
            assert await client.tags(APP) == ("0", "1", "2", "3", "4")
        else:
            found = await client.referrers(f"{APP.name}@{BLOB.digest}")
            assert [each.digest for each in found] == [digest_of(b"%d" % n) for n in range(5)]
    assert asked == [page for page in "01234" for _ in range(MAX_ATTEMPTS)]


async def test_no_referrers_api_is_no_failure_that_passes(autojump_clock: MockClock) -> None:
    network = Network(**{HOST: Flaky(FakeRegistry(), status(501), 9, "/referrers/")})
    async with (
        network.client() as http,
        open_registry_client(client=http) as client,
    ):
        assert await client.referrers(f"{APP.name}@{BLOB.digest}") == ()
    assert len(network.requests) == 2


# Redirects.


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
async def test_a_signed_url_that_has_expired(code: int, autojump_clock: MockClock) -> None:
    """The registry is asked for a new URL.

    The error for a storage's 401 suggests no login.
    """
    registry = FakeRegistry()
    registry.add_image(tag="1", layers=[CONTENT])
    signed: list[str] = []

    def redirect(request: httpx.Request) -> httpx.Response:
        if "/blobs/" not in request.url.path:
            return registry(request)
        signed.append(f"{STORAGE}{request.url.path}?signature={len(signed)}")
        return httpx.Response(307, headers={"Location": signed[-1]})

    good = 1

    def storage(request: httpx.Request) -> httpx.Response:
        if int(request.url.params["signature"]) < good:
            return httpx.Response(code, stream=Body([b"<Code>ExpiredToken</Code>"]))
        return registry(request)

    network = Network(**{HOST: redirect, STORAGE: storage})
    async with (
        network.client() as http,
        open_registry_client(client=http) as client,
    ):
        await client.resolve_image(APP)
        assert len(signed) == 2
        sink = MemorySink()
        good = 3
        with pytest.raises(RegistryError, match=f"^s.example answered {code} for") as caught:
            await client.fetch_blob(APP, BLOB, sink, progress=Report())
        assert not is_final(caught.value)
        assert caught.value.transient
        assert "login" not in str(caught.value)
        await client.fetch_blob(APP, BLOB, sink, progress=Report())
        assert sink.data == CONTENT
        # The retries end if every URL has expired.
        signed.clear()
        good = 99
        with pytest.raises(RegistryError, match=f"answered {code}"):
            await client.get_blob(APP, BLOB)
        assert len(signed) == MAX_ATTEMPTS


async def test_a_registry_that_redirects_to_another(autojump_clock: MockClock) -> None:
    """A registry's 404 after a redirect is final, unlike a storage's."""
    network = Network(
        **{
            HOST: lambda request: httpx.Response(
                307, headers={"Location": f"{STORAGE}{request.url.path}"}
            ),
            STORAGE: FakeRegistry(),
        }
    )
    async with (
        network.client() as http,
        open_registry_client(client=http) as client,
    ):
        with pytest.raises(NotFound, match="MANIFEST_UNKNOWN"):
            await client.get_manifest(APP)
    assert len(network.requests) == 2


async def test_a_token_server_that_redirects(autojump_clock: MockClock) -> None:
    """A token server's refusal after a redirect is final."""
    there = f"{TOKENS}/token"

    def serve(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/token":
            return httpx.Response(307, headers={"Location": there})
        return httpx.Response(401, headers={"WWW-Authenticate": f'Bearer realm="{HOST}/token"'})

    network = Network(**{HOST: serve, TOKENS: status(401)})
    async with (
        network.client() as http,
        open_registry_client(client=http) as client,
    ):
        with pytest.raises(AuthenticationError):
            await client.get_manifest(APP)
    assert network.asked.count(there) == 1


# Wrong bytes.


def lying(times: float) -> Flaky:
    registry = FakeRegistry()
    registry.add_image(tag="1", layers=[CONTENT])

    def lie(request: httpx.Request) -> httpx.Response:
        data = registry(request).content
        return httpx.Response(200, stream=Body([data[:-1] + b"\0"]))

    return Flaky(registry, lie, times, "/blobs/")


@pytest.mark.parametrize("kind", ["layer", "blob", "config"])
@pytest.mark.parametrize("times", [1, 2, 9])
async def test_wrong_bytes(kind: str, times: int, autojump_clock: MockClock) -> None:
    """Wrong bytes are fetched once more; the second error is final.

    The error names the host.
    """
    flaky, sink = lying(times), MemorySink()
    ask: dict[str, Callable[[RegistryClient], Awaitable[object]]] = {
        "layer": lambda client: client.fetch_blob(APP, BLOB, sink, progress=Report()),
        "blob": lambda client: client.get_blob(APP, BLOB),
        "config": lambda client: client.resolve_image(APP),
    }
    async with (
        Network(**{HOST: flaky}).client() as http,
        open_registry_client(client=http) as client,
    ):
        began = trio.current_time()
        if times == 1:
            await ask[kind](client)
        else:
            with pytest.raises(VerificationError, match=r"registry\.example sent") as caught:
                await ask[kind](client)
            assert is_final(caught.value)
        assert trio.current_time() == began
    assert len(flaky.failed) == min(times, 2)
    assert sink.data == (CONTENT if kind == "layer" and times == 1 else b"")


@pytest.mark.parametrize("times", [1, 9])
async def test_wrong_bytes_of_one_host(
    times: int, mirrored: Path, autojump_clock: MockClock
) -> None:
    """After wrong bytes, the second attempt goes to the other host."""
    mirror, registry = lying(times), lying(times if times > 1 else 0)
    sink = MemorySink()
    async with (
        Network(**{HOST: registry, MIRROR: mirror}).client() as http,
        open_registry_client(client=http, hosts_dir=mirrored) as client,
    ):
        if times == 1:
            await client.fetch_blob(APP, BLOB, sink, progress=Report())
            assert sink.data == CONTENT
        else:
            with pytest.raises(
                VerificationError, match=r"registry\.example sent.*mirror\.example sent"
            ) as caught:
                await client.fetch_blob(APP, BLOB, sink, progress=Report())
            assert is_final(caught.value)
    assert (len(mirror.failed), len(registry.failed)) == (1, times // 9)


async def test_wrong_bytes_of_the_only_host_that_has_it(
    mirrored: Path, autojump_clock: MockClock
) -> None:
    mirror, sink = lying(1), MemorySink()
    network = Network(**{HOST: status(404), MIRROR: mirror})
    async with (
        network.client() as http,
        open_registry_client(client=http, hosts_dir=mirrored) as client,
    ):
        await client.fetch_blob(APP, BLOB, sink, progress=Report())
    assert sink.data == CONTENT
    assert len(network.requests) == 3


# HEAD.


@pytest.mark.parametrize(
    "failure",
    [
        *("closed", "reset", "no answer", "no HTTP", "another digest"),
        *(name for name in (*TRANSIENT, *FINAL) if name.isdecimal()),
    ],
)
async def test_head_is_refused(failure: str, autojump_clock: MockClock) -> None:
    """After any failed HEAD, GET follows without a pause."""
    registry = FakeRegistry()
    image = registry.add_image(tag="1")
    refuse = {
        **TRANSIENT,
        **FINAL,
        "another digest": lambda request: httpx.Response(
            200,
            headers={
                "Content-Type": image.media_type,
                "Content-Length": "7",
                "Docker-Content-Digest": BLOB.digest,
            },
        ),
    }[failure]

    def serve(request: httpx.Request) -> httpx.Response:
        return refuse(request) if request.method == "HEAD" else registry(request)

    network = Network(**{HOST: serve})
    async with (
        network.client() as http,
        open_registry_client(client=http) as client,
    ):
        began = trio.current_time()
        by_digest = f"{APP.name}@{image.digest}"
        assert await client.resolve(by_digest) == image
        resolved = await client.resolve_image(by_digest, head_first=True)
        assert resolved.descriptor == image
        assert trio.current_time() == began


# Request headers.


async def test_accept() -> None:
    """``Accept`` lists known manifest types before ``*/*``; blobs may have any type."""
    network = Network(**{HOST: serving()})
    async with (
        network.client() as http,
        open_registry_client(client=http) as client,
    ):
        await client.resolve(APP)
        await client.resolve_image(APP)
        await client.get_manifest(APP)
        await client.get_blob(APP, BLOB)
        await client.fetch_blob(APP, BLOB, MemorySink(CONTENT[:9]))
        await open_and_read(client)
    for request in network.requests:
        accepted = request.headers["Accept"].split(", ")
        if "/blobs/" in request.url.path:
            assert accepted == ["*/*"]
        elif "/manifests/" in request.url.path:
            assert accepted[-1] == "*/*"
            assert len(accepted) > 4
    [asked] = [each for each in network.requests if "Range" in each.headers]
    assert asked.headers["Range"] == f"bytes=9-{len(CONTENT) - 1}"
