"""From a reference to an image's manifest and config."""

from __future__ import annotations

import base64
import json
import ssl
import threading
from functools import partial

import httpx
import pytest
import trio
from _tools.canaries import Canaries
from registry.fakes import (
    OCI_INDEX,
    OCI_MANIFEST,
    Body,
    FakeRegistry,
    MemorySink,
    Network,
    Report,
    as_json,
    describe,
    is_final,
)
from trio.testing import MockClock

from trio_layers._errors import (
    AuthenticationError,
    InvalidDigest,
    InvalidReference,
    ManifestError,
    NetworkSettingError,
    NotFound,
    PlatformError,
    RateLimited,
    RegistryError,
    VerificationError,
)
from trio_layers._platform import Platform, host_platform
from trio_layers._reference import parse_reference
from trio_layers._registry.client import open_registry_client
from trio_layers._registry.pagination import decode_tags
from trio_layers._registry.resolving import ResolvedImage

HOST = "https://registry.example"
APP = parse_reference("registry.example/team/app")
ARM = Platform("linux", "arm64")


async def resolve(
    network: Network, text: str = str(APP), platform: Platform | None = None, **options: bool
) -> ResolvedImage:
    async with (
        network.client() as http,
        open_registry_client(client=http, retry_tick=0.001, **options) as client,
    ):
        return await client.resolve_image(parse_reference(text), platform=platform)


async def test_image_by_tag() -> None:
    """For a tag of a manifest, the client requests the manifest and the config, and
    nothing else.
    """
    registry = FakeRegistry()
    descriptor = registry.add_image(tag="latest", architecture="s390x")
    network = Network(**{HOST: registry})
    image = await resolve(network)
    assert image.descriptor == descriptor
    assert image.manifest_bytes == registry.manifests["latest"][1]
    assert image.config_bytes == registry.blobs[image.manifest.config.digest]
    assert image.config.platform == Platform("linux", "s390x")
    assert [layer.size for layer in image.layers] == [3, 3]
    assert len(image.diff_ids) == 2
    assert (image.index, image.index_bytes) == (None, None)
    assert network.asked == [
        f"{HOST}/v2/team/app/manifests/latest",
        f"{HOST}/v2/team/app/blobs/{image.manifest.config.digest}",
    ]
    accepted = network.requests[0].headers["Accept"]
    assert OCI_MANIFEST in accepted
    assert OCI_INDEX in accepted
    assert {request.headers["Accept-Encoding"] for request in network.requests} == {"identity"}


async def test_content_that_a_descriptor_holds() -> None:
    """Embedded content saves the request; wrong embedded content is ignored."""
    registry = FakeRegistry()
    registry.add_image(tag="latest", layers=[b"one", b"two"])
    media_type, data = registry.manifests["latest"]
    document = json.loads(data)
    document["layers"][0]["data"] = base64.b64encode(b"one").decode()
    document["layers"][1]["data"] = base64.b64encode(b"six").decode()
    content = registry.blobs[document["config"]["digest"]]
    document["config"]["data"] = base64.b64encode(content).decode()
    registry.add_manifest(document, f"{media_type}; charset=utf-8", tag="latest")
    network = Network(**{HOST: registry})
    async with network.client() as http, open_registry_client(client=http) as client:
        image = await client.resolve_image(APP)
        assert image.config_bytes == content
        for layer, there, report in zip(
            image.layers, (b"one", b"two"), (Report(), Report()), strict=True
        ):
            sink = MemorySink(b"o")
            await client.fetch_blob(APP, layer, sink, progress=report)
            assert sink.data == there
            assert report.events[-1][0] == "Download complete"
    asked = [url.rpartition("/")[2] for url in network.asked]
    assert asked[0] == "latest"
    assert set(asked[1:]) == {image.layers[1].digest}


async def test_index_leads_to_the_platform() -> None:
    """The client takes the index's image for the platform, by default for the host's."""
    registry = FakeRegistry()
    arm = registry.add_image(architecture="arm64")
    host = registry.add_image(
        architecture=host_platform().architecture, created="2024-01-01T00:00:00Z"
    )
    entries = [
        as_json(arm, platform={"os": "linux", "architecture": "arm64", "variant": "v8"}),
        as_json(host, platform={"os": "linux", "architecture": host_platform().architecture}),
    ]
    index = registry.add_index(entries, tag="latest")
    image = await resolve(Network(**{HOST: registry}), platform=ARM)
    assert image.descriptor.digest == arm.digest
    assert image.index == index
    assert image.index_bytes == registry.manifests["latest"][1]
    image = await resolve(Network(**{HOST: registry}))
    assert image.config.platform.architecture == host_platform().architecture


async def test_index_in_an_index() -> None:
    """An index may lead to another index, within a limit. The reported digest is
    the first one's.
    """
    registry = FakeRegistry()
    entry = registry.add_image(architecture="arm64")
    descriptors = [entry]
    for _ in range(5):
        descriptors.append(registry.add_index([as_json(descriptors[-1])]))
    image = await resolve(
        Network(**{HOST: registry}), f"{APP.name}@{descriptors[4].digest}", platform=ARM
    )
    assert image.descriptor == entry
    assert image.index == descriptors[4]
    with pytest.raises(ManifestError, match="more than 4 indexes"):
        await resolve(
            Network(**{HOST: registry}), f"{APP.name}@{descriptors[5].digest}", platform=ARM
        )


async def test_no_image_for_the_platform() -> None:
    """The error lists the platforms of the index."""
    registry = FakeRegistry()
    image = registry.add_image()
    registry.add_index(
        [as_json(image, platform={"os": "linux", "architecture": "amd64"})], tag="latest"
    )
    registry.add_image(tag="alone")
    message = "app:latest has no image for linux/arm64, but for linux/amd64"
    with pytest.raises(PlatformError, match=message):
        await resolve(Network(**{HOST: registry}), platform=ARM)
    with pytest.raises(PlatformError, match="app:alone has no image for linux/arm64"):
        await resolve(Network(**{HOST: registry}), f"{APP.name}:alone", platform=ARM)


async def test_an_entry_that_does_not_say_its_platform() -> None:
    """The platform comes from the config, and must match, even if only the host's is wanted."""
    registry = FakeRegistry()
    registry.add_index([as_json(registry.add_image(architecture="plan9"))], tag="latest")
    with pytest.raises(PlatformError, match="but for linux/plan9"):
        await resolve(Network(**{HOST: registry}))


async def test_docker_hub() -> None:
    """Docker Hub's registry has another host name than its images."""
    registry = FakeRegistry("library/debian")
    registry.add_image(tag="12")
    network = Network(**{"https://registry-1.docker.io": registry})
    image = await resolve(network, "debian:12")
    assert str(image.reference) == "docker.io/library/debian:12"


async def test_digest_of_the_reference() -> None:
    """A document by digest must match this digest. The registry's media type and digest do not
    matter.
    """
    registry = FakeRegistry()
    descriptor = registry.add_image()
    other = registry.add_image(created="2025-01-01T00:00:00Z")
    text = f"{APP.name}@{descriptor.digest}"
    assert (await resolve(Network(**{HOST: registry}), text)).descriptor == descriptor
    registry.manifests[descriptor.digest] = registry.manifests[other.digest]
    with pytest.raises(VerificationError, match="which should be") as caught:
        await resolve(Network(**{HOST: registry}), text)
    assert caught.value.digest == descriptor.digest


async def test_digest_that_the_registry_promised() -> None:
    """A document by tag must match Docker-Content-Digest."""
    registry = FakeRegistry()
    registry.add_image(tag="latest")

    def lying(request: httpx.Request) -> httpx.Response:
        response = registry(request)
        response.headers["Docker-Content-Digest"] = "sha256:" + "0" * 64
        return response

    with pytest.raises(VerificationError, match=r"registry\.example sent sha256"):
        await resolve(Network(**{HOST: lying}))


async def test_a_promise_that_would_rewrite_a_terminal() -> None:
    """Header fields may contain escape sequences, but errors do not."""

    def lying(request: httpx.Request) -> httpx.Response:
        headers = {"Docker-Content-Digest": "sha256:\x1b[2J"}
        return httpx.Response(200, headers=headers, content=b"{}")

    with pytest.raises(VerificationError, match=r"which should be sha256: \[2J$"):
        await resolve(Network(**{HOST: lying}))


async def test_platforms_in_an_error_are_bounded() -> None:
    """An index may contain any media type."""
    registry = FakeRegistry()
    platform = {"os": "linux", "architecture": "a" * 5000}
    registry.add_index([as_json(registry.add_image(), platform=platform)], tag="latest")
    with pytest.raises(PlatformError, match="but for linux/aaaa") as caught:
        await resolve(Network(**{HOST: registry}), platform=ARM)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("change", [b" ", b""])
async def test_documents_found_by_descriptor(change: bytes) -> None:
    """A manifest in an index, and a config, must match their descriptors."""
    registry = FakeRegistry()
    image = registry.add_image(architecture="arm64")
    registry.add_index([as_json(image)], tag="latest")
    good = await resolve(Network(**{HOST: registry}), platform=ARM)
    data = good.manifest_bytes
    registry.manifests[image.digest] = (OCI_MANIFEST, data + change if change else data[:-1])
    with pytest.raises(VerificationError, match="the digest or size differs"):
        await resolve(Network(**{HOST: registry}), platform=ARM)
    registry.manifests[image.digest] = (OCI_MANIFEST, data)
    digest, config = good.manifest.config.digest, good.config_bytes
    registry.blobs[digest] = config + change if change else config[:-1] + b" "
    with pytest.raises(VerificationError, match="the digest or size differs") as caught:
        await resolve(Network(**{HOST: registry}), platform=ARM)
    assert caught.value.digest == digest


async def test_documents_are_bounded() -> None:
    """An endless manifest is not read beyond 4 MiB, and a larger descriptor is not requested."""
    body = Body([b" " * 2**20] * 100)

    def endless(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"Content-Type": OCI_MANIFEST}, stream=body)

    with pytest.raises(ManifestError, match="app:latest: the manifest is larger"):
        await resolve(Network(**{HOST: endless}))
    assert body.read == 5
    assert body.closed

    registry = FakeRegistry()
    huge = as_json(describe(b"", OCI_MANIFEST)) | {"size": 2**23}
    registry.add_index([huge], tag="latest")
    network = Network(**{HOST: registry})
    with pytest.raises(ManifestError, match="more than 4194304"):
        await resolve(network)
    assert len(network.requests) == 1


async def test_a_large_document_is_decoded_off_the_loop() -> None:
    """A document that would block the event loop is decoded in a thread, with the same result."""
    registry = FakeRegistry()
    registry.add_image(tag="latest", comment="x" * 100_000)
    threads: list[int] = []

    class Instrument(trio.abc.Instrument):
        def task_scheduled(self, task: trio.lowlevel.Task) -> None:
            threads.append(trio.to_thread.current_default_thread_limiter().borrowed_tokens)

    instrument = Instrument()
    trio.lowlevel.add_instrument(instrument)
    image = await resolve(Network(**{HOST: registry}))
    trio.lowlevel.remove_instrument(instrument)
    assert len(image.config_bytes) > 100_000
    assert 1 in threads


async def test_a_long_list_of_tags_is_put_together_off_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tags = [f"{number:x}" for number in range(40_000)]
    body = json.dumps({"tags": tags}, separators=(",", ":")).encode()
    network = Network(**{"https://registry.example": lambda _: httpx.Response(200, content=body)})
    threads: set[int] = set()

    def decode(data: bytes, host: str) -> list[str]:
        threads.add(threading.get_ident())
        return list(decode_tags(data, host))

    monkeypatch.setattr("trio_layers._registry.listing.decode_tags", decode)
    async with network.client() as http, open_registry_client(client=http) as client:
        assert await client.tags(APP) == tuple(tags)
    assert threads
    assert threading.get_ident() not in threads


async def test_a_reference_by_another_algorithm() -> None:
    """The grammar allows SHA-512 references, but the client sends no request for them."""
    network = Network()
    with pytest.raises(InvalidDigest):
        await resolve(network, f"{APP.name}@sha512:{'ab' * 64}")
    assert network.requests == []


@pytest.mark.parametrize(
    "domain", ["[:::]", "example.com:99999", "xn--a.example", "my_host.example"]
)
async def test_a_domain_that_is_no_host(domain: str) -> None:
    """The reference grammar allows this domain, but it is no host name."""
    with pytest.raises(InvalidReference, match="is no host"):
        await resolve(Network(), f"{domain}/app")


@pytest.mark.parametrize(
    ("status", "kind", "final"),
    [
        (400, RegistryError, True),
        (401, AuthenticationError, True),
        (403, AuthenticationError, True),
        (404, NotFound, True),
        (408, RegistryError, False),
        (429, RateLimited, False),
        (500, RegistryError, False),
        (503, RegistryError, False),
    ],
)
async def test_statuses(status: int, kind: type[RegistryError], final: bool) -> None:
    """An error names the host, the requested thing, and the registry's reason.

    A permanent error is caused by `DoNotRetry`.
    """
    error = {"errors": [{"code": "SOME_CODE", "message": "some\x1b[31m message"}]}
    network = Network(**{HOST: lambda request: httpx.Response(status, json=error)})
    async with (
        network.client() as http,
        open_registry_client(client=http, retry_tick=0.001) as client,
    ):
        with pytest.raises(RegistryError) as caught:
            await client.resolve_image(APP)
        blob = describe(b"blob")
        with pytest.raises(RegistryError) as caught_blob:
            await client.fetch_blob(APP, blob, MemorySink(), progress=Report())
    assert type(caught.value) is kind
    assert (caught.value.host, caught.value.status) == ("registry.example", status)
    assert str(caught.value).startswith(
        f"registry.example answered {status} for the manifest of registry.example/team/app:latest: "
        "SOME_CODE: some [31m message"
    )
    assert blob.digest in str(caught_blob.value)
    assert is_final(caught_blob.value) is final


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        (
            {
                "Retry-After": "Wed, 21 Oct 2015 07:30:00 GMT",
                "Date": "Wed, 21 Oct 2015 07:28:00 GMT",
            },
            120.0,
        ),
        ({"Retry-After": "soon"}, None),
        (
            {
                "Retry-After": "Wed, 21 Oct 2015 07:30:00 +99999999999999",
                "Date": "Wed, 21 Oct 2015 07:28:00 GMT",
            },
            None,
        ),
        ({}, None),
    ],
)
async def test_retry_after(
    autojump_clock: MockClock, headers: dict[str, str], seconds: float | None
) -> None:
    """The field has seconds, or a date by the registry's own clock."""
    network = Network(**{HOST: lambda request: httpx.Response(429, headers=headers)})
    with pytest.raises(RateLimited) as caught:
        await resolve(network)
    assert caught.value.retry_after == seconds


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"errors": [7]}', b"[" * 20_000])
async def test_an_error_without_a_reason(body: bytes) -> None:
    """The error does not quote a proxy's HTML page."""
    network = Network(**{HOST: lambda request: httpx.Response(500, content=body)})
    with pytest.raises(RegistryError) as caught:
        await resolve(network)
    assert str(caught.value).endswith("the manifest of registry.example/team/app:latest")


async def test_nobody_there() -> None:
    """The error names a host that refuses connections, and is transient."""
    async with Network().client() as http, open_registry_client(client=http) as client:
        message = r"^registry\.example could not be asked for blob sha256:.*: connection refused"
        with pytest.raises(RegistryError, match=message) as caught:
            await client.fetch_blob(APP, describe(b"x"), MemorySink(), progress=Report())
    assert caught.value.status is None
    assert not is_final(caught.value)
    assert isinstance(caught.value.__cause__, httpx.ConnectError)


@pytest.mark.parametrize("domain", ["localhost:5000", "127.0.0.9:5000", "[::1]:5000", "localhost"])
async def test_loopback_may_be_plain(domain: str) -> None:
    """A registry on loopback is asked over HTTPS, then over plain HTTP, and the client remembers
    that.
    """
    registry = FakeRegistry()
    registry.add_image(tag="latest")
    network = Network(**{f"http://{domain}": registry})
    await resolve(network, f"{domain}/team/app")
    assert [request.url.scheme for request in network.requests] == ["https", "http", "http"]


async def test_loopback_with_tls() -> None:
    """Plain HTTP is not used where HTTPS answers, even if its certificate is not trusted."""
    registry = FakeRegistry()
    registry.add_image(tag="latest")
    network = Network(**{"https://localhost:5000": registry, "http://localhost:5000": registry})
    await resolve(network, "localhost:5000/team/app")
    assert {request.url.scheme for request in network.requests} == {"https"}

    def untrusted(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("self-signed") from ssl.SSLCertVerificationError("self-signed")

    network = Network(**{"https://localhost:5000": untrusted, "http://localhost:5000": registry})
    with pytest.raises(RegistryError, match="self-signed"):
        await resolve(network, "localhost:5000/team/app")
    assert {request.url.scheme for request in network.requests} == {"https"}


async def test_plain_http_only_where_it_is_allowed() -> None:
    """A registry on another machine is asked over plain HTTP only with ``plain_http``."""
    registry = FakeRegistry()
    registry.add_image(tag="latest")
    network = Network(**{"http://registry.example": registry})
    with pytest.raises(RegistryError):
        await resolve(network)
    assert {request.url.scheme for request in network.requests} == {"https"}
    assert (await resolve(network, plain_http=True)).reference == APP


async def test_contradictory_options() -> None:
    """A given client has its own settings for certificates, and zero connections make no sense."""
    with pytest.raises(ValueError, match="max_connections is 0"):
        async with open_registry_client(max_connections=0):
            pass  # pragma: no cover
    async with Network().client() as http:
        with pytest.raises(ValueError, match="verify=False"):
            async with open_registry_client(client=http, tls_verify=False):
                pass  # pragma: no cover


@pytest.mark.parametrize(
    "url",
    [
        "http://someone:canary-pr0xy/x@proxy.example:3128",
        "http://someone:canary-pr0xy@proxy.example:port",
        "other://canary-pr0xy@proxy.example",
    ],
)
async def test_the_password_of_a_proxy_whose_url_is_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, url: str
) -> None:
    """A slash in a password ends the host for a URL parser, which then takes the password for the
    port.

    The parser's error quotes that text, and must not be shown.
    """
    canaries = Canaries(caplog, "someone:canary-pr0xy")
    monkeypatch.setenv("HTTPS_PROXY", url)
    async with open_registry_client() as client:
        with pytest.raises(NetworkSettingError, match=r"HTTPS_PROXY=.* cannot be used: ") as caught:
            await client.get_manifest("registry.example/app")
    canaries.check(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
async def test_no_proxy_for_this_machine(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """As with Docker, requests to this machine do not use the proxy."""
    asked: list[str] = []

    async def proxy(stream: trio.SocketStream) -> None:
        asked.append((await stream.receive_some()).decode())
        await stream.send_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, proxy, 0, host="127.0.0.1"))
        port = listener.socket.getsockname()[1]
        for name in ("HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        async with open_registry_client(retry_tick=0.001) as client:
            for name in (f"{host}:1", "registry.example"):
                with pytest.raises(RegistryError):
                    await client.resolve_image(parse_reference(f"{name}/app"))
        nursery.cancel_scope.cancel()
    assert {request.partition("\r\n")[0] for request in asked} == {
        "CONNECT registry.example:443 HTTP/1.1"
    }


async def test_own_client() -> None:
    """Without a given client, the registry client makes its own. Its repr and statistics show the
    activity.
    """
    async with open_registry_client(max_connections=7) as client:
        assert client.statistics().max_connections == 7
        assert repr(client) == ("<RegistryClient: 0 of 7 connections active, 0 requests waiting>")
