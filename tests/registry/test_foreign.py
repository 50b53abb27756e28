"""Foreign layers: their URLs come before the registry, and get none of its secrets."""

from __future__ import annotations

import base64
from pathlib import Path

import attrs
import httpx
import pytest
from _tools.canaries import Canaries
from registry.fakes import Body, MemorySink, Network, Report, describe, is_final

from trio_layers._errors import NotFound, RegistryError, VerificationError
from trio_layers._manifest import Descriptor
from trio_layers._reference import parse_reference
from trio_layers._registry.client import RegistryClient, open_registry_client
from trio_layers._registry.credentials import Credentials
from trio_layers._registry.foreign_urls import MAX_URLS

HOST = "https://registry.example"
APP = parse_reference("registry.example/team/app")
CONTENT = bytes(range(256)) * 4
FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
FIRST, SECOND = "https://one.example", "https://two.example"
PASSWORD = "canary-5ecret"


def foreign(*urls: str, media_type: str = FOREIGN) -> Descriptor:
    return attrs.evolve(describe(CONTENT, media_type), urls=urls)


def sends(content: bytes = CONTENT, error: Exception | None = None):
    return lambda request: httpx.Response(200, stream=Body([content], error))


def lacks(request: httpx.Request) -> httpx.Response:
    return httpx.Response(404)


def resumes(request: httpx.Request) -> httpx.Response:
    first = int(request.headers["Range"].removeprefix("bytes=").partition("-")[0])
    headers = {"Content-Range": f"bytes {first}-1023/1024"}
    return httpx.Response(206, headers=headers, stream=Body([CONTENT[first:]]))


async def fetch(
    network: Network,
    layer: Descriptor,
    sink: MemorySink | None = None,
    *,
    reference: str = str(APP),
    plain_http: bool = False,
    hosts_dir: Path | None = None,
) -> MemorySink:
    sink = sink or MemorySink()
    credentials = Credentials("user", PASSWORD)
    async with (
        network.client() as http,
        open_registry_client(
            client=http, credentials=credentials, plain_http=plain_http, hosts_dir=hosts_dir
        ) as client,
    ):
        await client.fetch_blob(parse_reference(reference), layer, sink, progress=Report())
    return sink


@pytest.mark.parametrize(
    "media_type",
    [
        *(
            f"application/vnd.oci.image.layer.nondistributable.v1.tar{compression}"
            for compression in ("", "+gzip", "+zstd")
        ),
        *(
            f"application/vnd.docker.image.rootfs.foreign.diff.tar{compression}"
            for compression in ("", ".gzip", ".zstd")
        ),
    ],
)
async def test_urls_come_before_the_registry(media_type: str) -> None:
    """URLs are tried in order, once each. If one has the layer, the registry is not asked."""
    network = Network(**{FIRST: lacks, SECOND: sends(), HOST: sends()})
    urls = (f"{FIRST}/a?signature=s", f"{FIRST}/a?signature=s", f"{SECOND}/b", f"{FIRST}/c")
    sink = await fetch(network, foreign(*urls, media_type=media_type))
    assert sink.data == CONTENT
    assert network.asked == [f"{FIRST}/a?signature=s", f"{SECOND}/b"]


async def test_as_bytes_and_piece_by_piece() -> None:
    network = Network(**{FIRST: lacks, SECOND: sends(), HOST: lacks})
    layer = foreign(FIRST, SECOND)
    async with network.client() as http, open_registry_client(client=http) as client:
        assert await client.get_blob(APP, layer) == CONTENT
        async with client.open_blob(APP, layer) as chunks:
            assert b"".join([chunk async for chunk in chunks]) == CONTENT
        with pytest.raises(NotFound):  # requested by its digest alone, it is a blob like any other
            await client.get_blob(APP, layer.digest)
    assert network.asked[:4] == [FIRST, SECOND] * 2


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.oci.image.config.v1+json",
    ],
)
async def test_no_other_blob_is_asked_for_elsewhere(media_type: str) -> None:
    """URLs of other blobs are ignored, since a manifest must not choose our hosts."""
    network = Network(**{FIRST: sends(), HOST: lacks})
    with pytest.raises(NotFound):
        await fetch(network, foreign(FIRST, media_type=media_type))
    # Only the registry gets requests. The one for /v2/ is made because there are credentials.
    assert {request.url.host for request in network.requests} == {"registry.example"}


async def test_the_registry_may_have_it_all_the_same() -> None:
    """The registry is asked after the URLs, or if there are none."""
    network = Network(**{FIRST: lacks, HOST: sends()})
    assert (await fetch(network, foreign(FIRST))).data == CONTENT
    assert (await fetch(network, foreign())).data == CONTENT
    blob = f"{HOST}/v2/team/app/blobs/{describe(CONTENT).digest}"
    assert network.asked == [FIRST, blob, blob]


async def test_nobody_has_it() -> None:
    """The error is the registry's, and names all hosts. It is final if all errors are final."""
    network = Network(**{FIRST: lacks, HOST: lacks})
    with pytest.raises(NotFound) as caught:
        await fetch(
            network, foreign(FIRST, f"{FIRST}:8443", "gopher://three.example/x", "https://a:b:c")
        )
    assert str(caught.value).startswith("registry.example answered 404 for blob sha256:")
    for part in (
        "one.example answered 404",
        "one.example:8443 could not be asked",
        "three.example, in the manifest, is not asked",
        "a URL, in the manifest, is not asked",
    ):
        assert str(caught.value).count(part) == 1
    assert not is_final(caught.value)
    with pytest.raises(NotFound) as caught:
        await fetch(network, foreign(FIRST))
    assert is_final(caught.value)


async def test_urls_are_bounded() -> None:
    """A manifest cannot make the client send a thousand requests."""
    network = Network(**{HOST: sends()})
    await fetch(network, foreign(*(f"https://{n}.example/" for n in range(1000))))
    assert len(network.requests) == MAX_URLS + 1


@pytest.mark.parametrize(
    "url",
    ["ftp://one.example/x", "/v2/x", "", "https://", "https://xn--a/", "https://one.example:99999"],
)
async def test_urls_that_are_none(url: str) -> None:
    """Invalid URLs are skipped, and the registry's error mentions them."""
    network = Network(**{HOST: lacks})
    with pytest.raises(NotFound, match="in the manifest, is not asked for blob"):
        await fetch(network, foreign(url))
    assert {request.url.host for request in network.requests} == {"registry.example"}


# Hosts to which a manifest may lead the client.


@pytest.mark.parametrize(
    ("url", "reference", "plain_http", "asked"),
    [
        ("http://one.example/x", str(APP), False, False),
        ("http://one.example/x", str(APP), True, True),
        ("http://one.example/x", "localhost:5000/app", False, False),
        ("http://127.0.0.1:80/x", str(APP), False, False),
        ("http://localhost/x", str(APP), False, False),
        ("http://127.0.0.1:8000/x", "localhost:5000/app", False, True),
    ],
)
async def test_plain_http(url: str, reference: str, plain_http: bool, asked: bool) -> None:
    """Plain HTTP is used where it is allowed, and on this machine for a registry on it.

    Authors of other images could reach servers on this machine otherwise.
    """
    other = httpx.URL(url)
    network = Network(
        **{
            f"{other.scheme}://{other.netloc.decode()}": sends(),
            HOST: sends(),
            "https://localhost:5000": sends(),
        }
    )
    await fetch(network, foreign(url), reference=reference, plain_http=plain_http)
    assert (str(other) in network.asked) is asked


@pytest.mark.parametrize("reference", [str(APP), "localhost:5000/app"])
async def test_redirects_of_a_url(reference: str) -> None:
    """A redirect leads to plain HTTP on this machine only from this machine."""
    local = "http://127.0.0.1:8000"
    network = Network(
        **{
            FIRST: lambda request: httpx.Response(307, headers={"Location": f"{local}/secret"}),
            local: sends(),
            HOST: sends(),
            "https://localhost:5000": sends(),
        }
    )
    await fetch(network, foreign(FIRST), reference=reference)
    assert f"{local}/secret" not in network.asked
    network.hosts[local.replace("8000", "1")] = network.hosts[FIRST]
    await fetch(network, foreign(f"{local.replace('8000', '1')}/a"), reference=reference)
    assert (f"{local}/secret" in network.asked) is (reference != str(APP))


# The header fields of requests to URLs.


async def test_what_a_url_is_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A URL's host gets none of the registry's credentials or header fields, and no login of the
    URL.

    The header fields are those that are configured for the registry.
    """
    canaries = Canaries(caplog, f"user:{PASSWORD}", "other:canary-0ther")
    place = tmp_path / "registry.example"
    place.mkdir()
    toml = f'server = "{HOST}"\nheader = {{ X-Key = "canary-h3ader" }}\n'
    (place / "hosts.toml").write_text(toml)
    encoded = base64.b64encode(f"user:{PASSWORD}".encode()).decode()

    def registry(request: httpx.Request) -> httpx.Response:
        assert request.headers["X-Key"] == "canary-h3ader"
        if request.headers.get("Authorization") != f"Basic {encoded}":
            return httpx.Response(401, headers={"WWW-Authenticate": "Basic"})
        return httpx.Response(404)

    def one(request: httpx.Request) -> httpx.Response:
        return httpx.Response(401, headers={"WWW-Authenticate": "Basic"})

    def same(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/layer":
            assert "X-Key" not in request.headers
            return one(request)
        return registry(request)

    network = Network(**{FIRST: one, HOST: same})
    layer = foreign("https://other:canary-0ther@one.example/x", f"{HOST}/layer")
    with pytest.raises(NotFound) as caught:
        await fetch(network, layer, hosts_dir=tmp_path)
    asked = [request for request in network.requests if "/v2/" not in request.url.path]
    assert [str(request.url) for request in asked] == [f"{FIRST}/x", f"{HOST}/layer"]
    canaries.add("canary-h3ader")
    canaries.check_requests(asked)
    canaries.check(caught.value)
    assert network.secrets("registry.example")[-1] == f"Basic {encoded}"


# Received bytes are verified and kept.


async def test_a_url_that_lies() -> None:
    """Wrong bytes of one URL are dropped, and the next URL is asked."""
    wrong = CONTENT[:-1] + b"x"
    network = Network(**{FIRST: sends(wrong), SECOND: sends(CONTENT * 2), HOST: sends()})
    sink = await fetch(network, foreign(FIRST, SECOND))
    assert (sink.data, sink.restarts) == (CONTENT, 2)
    network.hosts[HOST] = lacks
    sink = MemorySink()
    with pytest.raises(NotFound, match="layer verification failed"):
        await fetch(network, foreign(FIRST, SECOND), sink)
    assert sink.data == b""
    network.hosts[HOST] = sends(wrong)
    with pytest.raises(VerificationError):
        await fetch(network, foreign(FIRST, SECOND), sink)
    assert sink.data == b""


async def test_one_goes_on_where_the_other_ended() -> None:
    """The next URL, and then the registry, continue by Range."""

    def more(request: httpx.Request) -> httpx.Response:
        assert request.headers["Range"] == "bytes=300-1023"
        headers = {"Content-Range": "bytes 300-1023/1024"}
        return httpx.Response(206, headers=headers, stream=Body([CONTENT[300:500]]))

    broken = sends(CONTENT[:300], httpx.ReadError("reset"))
    network = Network(**{FIRST: broken, SECOND: more, HOST: resumes})
    sink = await fetch(network, foreign(FIRST, SECOND))
    assert (sink.data, sink.restarts) == (CONTENT, 0)
    assert [request.headers.get("Range") for request in network.requests] == [
        None,
        "bytes=300-1023",
        "bytes=500-1023",
    ]


async def test_another_attempt() -> None:
    """Each URL is asked again after any failure. It gets its own entity tag only."""

    def tagged(tag: str):
        def answer(request: httpx.Request) -> httpx.Response:
            first = int(request.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
            headers = {"ETag": tag, "Content-Range": f"bytes {first}-1023/1024"}
            status = 206 if first else 200
            piece = CONTENT[first : first + 100]
            return httpx.Response(status, headers=headers, stream=Body([piece]))

        return answer

    network = Network(**{FIRST: tagged('"1"'), SECOND: tagged('"2"')})
    layer, sink = foreign(FIRST, SECOND), MemorySink()

    async def attempt(client: RegistryClient) -> None:
        with pytest.raises(RegistryError) as caught:
            await client.fetch_blob(APP, layer, sink, progress=Report())
        assert not is_final(caught.value)

    async with network.client() as http, open_registry_client(client=http) as client:
        await attempt(client)
        del network.hosts[FIRST]
        await attempt(client)
        network.hosts[FIRST] = resumes
        await client.fetch_blob(APP, layer, sink, progress=Report())
        assert len(client._endpoints._elsewhere) == 2
    assert sink.data == CONTENT
    asked = [each for each in network.requests if each.url.host != "registry.example"]
    assert [
        (each.url.host, each.headers.get("Range"), each.headers.get("If-Range")) for each in asked
    ] == [
        ("one.example", None, None),
        ("two.example", "bytes=100-1023", None),
        ("one.example", "bytes=200-1023", '"1"'),
        ("two.example", "bytes=200-1023", '"2"'),
        ("one.example", "bytes=300-1023", '"1"'),
    ]


async def test_a_registry_that_rests_is_asked_all_the_same() -> None:
    """An unreachable registry is asked again, since the layer may be only there."""
    network = Network(**{FIRST: lacks})
    async with network.client() as http, open_registry_client(client=http) as client:
        with pytest.raises(RegistryError):
            await client.fetch_blob(APP, foreign(FIRST), MemorySink(), progress=Report())
        network.hosts[HOST] = sends()
        sink = MemorySink()
        await client.fetch_blob(APP, foreign(FIRST), sink, progress=Report())
    assert sink.data == CONTENT


async def test_what_is_remembered_of_urls_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_layers._registry.endpoints.MAX_ELSEWHERE", 3)
    network = Network(**{HOST: sends()})
    async with network.client() as http, open_registry_client(client=http) as client:
        for number in range(5):
            layer = foreign(*(f"https://{number}.{each}.example" for each in range(2)))
            await client.fetch_blob(APP, layer, MemorySink(), progress=Report())
        assert len(client._endpoints._elsewhere) == 3
        assert repr(next(iter(client._endpoints._elsewhere.values()))) == "<ForeignURL 3.1.example>"
