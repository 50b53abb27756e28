"""Mirrors, in memory: the hosts of each request, their order, and the secrets they get."""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import trio
import trustme
from _tools.logins import Home
from registry.fakes import (
    Body,
    FakeRegistry,
    Handler,
    MemorySink,
    Network,
    Report,
    describe,
    is_final,
)
from trio.testing import MockClock

from trio_layers._errors import (
    AuthenticationError,
    CredentialsError,
    HostsError,
    InvalidReference,
    ManifestError,
    NotFound,
    RegistryError,
    VerificationError,
)
from trio_layers._gocompat import parse_duration
from trio_layers._hosts_toml import read_configuration
from trio_layers._logins.lookup import LoginFiles
from trio_layers._platform import parse_platform
from trio_layers._reference import parse_reference
from trio_layers._registry.client import RegistryClient, open_registry_client
from trio_layers._registry.credentials import Credentials, CredentialsFor
from trio_layers._registry.endpoints import COOLDOWN, Endpoint
from trio_layers._registry.tls import TLSConfig, make_context
from trio_layers.testing import Redirect, Reply, build_image, open_registry

APP = parse_reference("registry.example/team/app:1")
UPSTREAM, M1, M2 = "https://registry.example", "https://m1.example", "https://m2.example:5000"
AMD64 = parse_platform("linux/amd64")
CONTENT = bytes(range(100))
BLOB = describe(CONTENT)
TWO = f'[host."{M1}"]\n[host."{M2}"]\n'


@pytest.fixture
def network() -> Network:
    """Return a network with an image at the registry and at both mirrors."""
    registry = FakeRegistry()
    registry.add_image(tag="1", layers=[CONTENT])
    return Network(**{UPSTREAM: registry, M1: registry, M2: registry})


@asynccontextmanager
async def opened(
    network: Network, directory: Path, toml: str, credentials: CredentialsFor | None = None
) -> AsyncIterator[RegistryClient]:
    place = directory / APP.domain
    place.mkdir(exist_ok=True)
    (place / "hosts.toml").write_text(toml)
    async with (
        network.client() as http,
        open_registry_client(client=http, credentials=credentials, hosts_dir=directory) as client,
    ):
        yield client


async def fetch(client: RegistryClient, sink: MemorySink | None = None) -> MemorySink:
    sink = sink or MemorySink()
    await client.fetch_blob(APP, BLOB, sink, progress=Report())
    return sink


def hosts(network: Network) -> list[str]:
    return [request.url.host.partition(".")[0] for request in network.requests]


def answering(status: int, **headers: str) -> Handler:
    return lambda request: httpx.Response(status, headers=headers, stream=Body([b"no"]))


def breaking_after(count: int, data: bytes = CONTENT) -> Handler:
    """Return a server that sends this many bytes, from the start or the requested place, and then
    closes the connection.
    """

    def respond(request: httpx.Request) -> httpx.Response:
        start = int(request.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        error = httpx.ReadError("connection reset")
        body = Body([data[start : start + count]], error)
        if not start:
            return httpx.Response(200, headers={"ETag": '"theirs"'}, stream=body)
        fields = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        return httpx.Response(206, headers=fields, stream=body)

    return respond


async def test_mirrors_come_first_and_are_told_for_whom(network: Network, tmp_path: Path) -> None:
    """The whole image comes from the first mirror. Its requests contain ``ns``, and the registry is
    never asked.
    """
    async with opened(network, tmp_path, TWO) as client:
        image = await client.resolve_image(APP, platform=AMD64)
        assert (await fetch(client)).data == CONTENT
    root = f"{M1}/v2/team/app"
    assert network.asked == [
        f"{root}/manifests/1?ns=registry.example",
        f"{root}/blobs/{image.manifest.config.digest}?ns=registry.example",
        f"{root}/blobs/{BLOB.digest}?ns=registry.example",
    ]


async def test_a_tag_is_resolved_by_those_who_may(network: Network, tmp_path: Path) -> None:
    """Content by digest still comes from a mirror. Requests to the registry itself
    have no ``ns``.
    """
    toml = f'[host."{M1}"]\ncapabilities = ["pull"]\n'
    async with opened(network, tmp_path, toml) as client:
        image = await client.resolve_image(APP, platform=AMD64)
        by_digest = parse_reference(f"{APP.name}@{image.descriptor.digest}")
        assert (
            await client.resolve_image(by_digest, platform=AMD64)
        ).descriptor == image.descriptor
    assert hosts(network) == ["registry", "m1", "m1", "m1"]
    assert network.asked[0] == f"{UPSTREAM}/v2/team/app/manifests/1"


async def test_nobody_is_able(network: Network, tmp_path: Path) -> None:
    toml = f'server = "{M1}"\ncapabilities = ["push"]\n'
    async with opened(network, tmp_path, toml) as client:
        with pytest.raises(HostsError, match=r"none of the hosts for .* has 'pull'"):
            await fetch(client)
    assert network.asked == []


async def test_docker_hub_is_itself_under_both_its_names(tmp_path: Path) -> None:
    """Docker Hub under either name gets no ``ns``, and its own credentials."""
    registry = FakeRegistry("library/debian", blobs={BLOB.digest: CONTENT})
    network = Network(**{"https://registry-1.docker.io": with_basic(registry, "Hub")})
    (tmp_path / "docker.io").mkdir()
    (tmp_path / "docker.io" / "hosts.toml").write_text('server = "https://registry-1.docker.io"')
    credentials = {"docker.io": Credentials("Hub", "pw")}
    async with (
        network.client() as http,
        open_registry_client(client=http, credentials=credentials, hosts_dir=tmp_path) as client,
    ):
        await client.fetch_blob(parse_reference("debian"), BLOB, MemorySink(), progress=Report())
    assert "ns=" not in network.asked[-1]


@pytest.mark.parametrize(
    ("toml", "url"),
    [
        ('[host."https://m1.example/a/b"]\noverride_path = true', "/a/b/team/app/blobs/"),
        ('[host."https://m1.example/a/b/"]', "/a/b/v2/team/app/blobs/"),
        ('[host."https://m1.example/"]', "/v2/team/app/blobs/"),
        ('[host."https://m1.example/a%20b%25"]', "/a%20b%25/v2/team/app/blobs/"),
        ('[host."https://m1.example"]\noverride_path = true', "/team/app/blobs/"),
    ],
)
async def test_paths(toml: str, url: str, tmp_path: Path) -> None:
    network = Network(**{M1: lambda request: httpx.Response(200, stream=Body([CONTENT]))})
    async with opened(network, tmp_path, toml) as client:
        await fetch(client)
    assert network.asked == [f"{M1}{url}{BLOB.digest}?ns=registry.example"]


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 416, 429, 500, 503, None])
@pytest.mark.parametrize("what", ["tag", "blob"])
async def test_whatever_is_wrong_the_next_is_asked(
    status: int | None, what: str, network: Network, tmp_path: Path
) -> None:
    """As in containerd, any unsuccessful status and a missing response lead to the next host."""
    if status is None:
        del network.hosts[M1]
    else:
        network.hosts[M1] = answering(status)
    async with opened(network, tmp_path, TWO) as client:
        if what == "blob":
            assert (await fetch(client)).data == CONTENT
        else:
            await client.resolve_image(APP, platform=AMD64)
    assert hosts(network)[:2] == ["m1", "m2"]
    assert "registry" not in hosts(network)


async def test_who_cannot_be_reached_has_a_rest(
    network: Network, tmp_path: Path, mock_clock: MockClock
) -> None:
    """An unreachable host is skipped for a while, and then asked again."""
    there = network.hosts.pop(M1)
    async with opened(network, tmp_path, TWO) as client:
        await fetch(client)
        await fetch(client)
        assert hosts(network) == ["m1", "m2", "m2"]
        mock_clock.jump(COOLDOWN - 1)
        await fetch(client)
        assert hosts(network)[3:] == ["m2"]
        mock_clock.jump(2)
        network.hosts[M1] = there
        await fetch(client)
        await fetch(client)
        assert hosts(network)[4:] == ["m1", "m1"]


async def test_who_does_not_have_it_has_no_rest(network: Network, tmp_path: Path) -> None:
    """A host that lacks one blob may have the next."""
    network.hosts[M1] = answering(404)
    async with opened(network, tmp_path, TWO) as client:
        await fetch(client)
        await fetch(client)
    assert hosts(network) == ["m1", "m2", "m1", "m2"]


async def test_who_has_a_rest_is_better_than_nobody(network: Network, tmp_path: Path) -> None:
    """If all other hosts fail, the skipped host is asked, too."""
    there = network.hosts.pop(M1)
    async with opened(network, tmp_path, f'[host."{M1}"]') as client:
        await fetch(client)
        network.hosts[M1] = there
        network.hosts[UPSTREAM] = answering(503)
        await fetch(client)
    assert hosts(network) == ["m1", "registry", "registry", "m1"]


async def test_all_fail(network: Network, tmp_path: Path) -> None:
    """The last host's error is raised, with the texts of the others.

    Another attempt may succeed, since one host was not reached.
    """
    del network.hosts[M1]
    network.hosts |= {M2: answering(403), UPSTREAM: answering(404)}
    async with opened(network, tmp_path, TWO) as client:
        for _ in range(2):
            with pytest.raises(NotFound) as caught:
                await fetch(client)
            assert not is_final(caught.value)
            assert (caught.value.host, caught.value.status) == ("registry.example", 404)
            first, *others = str(caught.value).split("; before that, ")
            assert first.startswith("registry.example answered 404 for blob sha256:")
            assert [text.split(" ")[0] for text in others] == ["m1.example", "m2.example:5000"]
            assert "connection refused" in others[0]
    # The second time, the unreachable host is known.
    assert hosts(network) == ["m1", "m2", "registry", "m2", "registry"]


async def test_all_refuse(network: Network, tmp_path: Path) -> None:
    """The error is final, since another attempt would fail, too."""
    network.hosts |= {M1: answering(404), M2: answering(404), UPSTREAM: answering(401)}
    async with opened(network, tmp_path, TWO) as client:
        with pytest.raises(AuthenticationError) as caught:
            await client.resolve_image(APP)
    assert is_final(caught.value)


async def test_a_page_that_is_no_manifest(network: Network, tmp_path: Path) -> None:
    """A mirror that has become a login page resolves nothing."""
    network.hosts[M1] = lambda request: httpx.Response(200, html="<html>", request=request)
    async with opened(network, tmp_path, f'[host."{M1}"]') as client:
        image = await client.resolve_image(APP, platform=AMD64)
    assert image.manifest.layers[0].digest == BLOB.digest
    network.hosts[UPSTREAM] = network.hosts[M1]
    async with opened(network, tmp_path, f'[host."{M1}"]') as client:
        with pytest.raises(ManifestError, match=r"registry\.example/team/app:1: .*; before that"):
            await client.resolve_image(APP, platform=AMD64)


async def test_a_lie_costs_a_request(network: Network, tmp_path: Path) -> None:
    """Wrong bytes of a document or blob by digest are never used."""
    lie = FakeRegistry()
    lie.add_image(tag="1", layers=[CONTENT])
    lie.blobs = {digest: b"x" * len(data) for digest, data in lie.blobs.items()}
    network.hosts[M1] = lie
    async with opened(network, tmp_path, f'[host."{M1}"]') as client:
        await client.resolve_image(APP, platform=AMD64)
        sink = await fetch(client)
    assert sink.data == CONTENT
    assert sink.restarts == 1
    assert hosts(network) == ["m1", "m1", "registry", "m1", "registry"]


async def test_everybody_lies(network: Network, tmp_path: Path) -> None:
    network.hosts |= dict.fromkeys(
        [M1, UPSTREAM], lambda request: httpx.Response(200, stream=Body([b"x" * 100]))
    )
    async with opened(network, tmp_path, f'[host."{M1}"]') as client:
        with pytest.raises(
            VerificationError, match=r"verification failed .*; before that"
        ) as caught:
            await fetch(client)
    assert is_final(caught.value)


async def test_one_goes_on_where_the_other_stopped(network: Network, tmp_path: Path) -> None:
    """The next host continues by range, without the first host's entity tag, which is not valid
    there.
    """
    network.hosts |= {M1: breaking_after(30), M2: breaking_after(30), UPSTREAM: breaking_after(99)}
    async with opened(network, tmp_path, TWO) as client:
        sink = MemorySink()
        # The connection breaks after the last byte, too, and the client ignores that.
        with pytest.raises(RegistryError, match="broke off"):
            await fetch(client, sink)
        assert sink.data == CONTENT
        await fetch(client, sink)
    assert sink.restarts == 0
    ranges = [request.headers.get("Range") for request in network.requests]
    assert ranges == [None, "bytes=30-99", "bytes=60-99"]
    assert not any("If-Range" in request.headers for request in network.requests)


async def test_a_lie_that_another_went_on_with(network: Network, tmp_path: Path) -> None:
    """The source of the wrong bytes is unknown, so the present host sends the whole blob."""
    network.hosts[M1] = breaking_after(30, b"x" * 100)

    def good(request: httpx.Request) -> httpx.Response:
        start = int(request.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        fields = {"Content-Range": f"bytes {start}-99/100"} if start else {}
        status = 206 if start else 200
        return httpx.Response(status, headers=fields, stream=Body([CONTENT[start:]]))

    network.hosts[UPSTREAM] = good
    async with opened(network, tmp_path, f'[host."{M1}"]') as client:
        sink = await fetch(client)
    assert sink.data == CONTENT
    ranges = [request.headers.get("Range") for request in network.requests]
    assert ranges == [None, "bytes=30-99", None]


async def test_a_cancelled_request_is_not_made_elsewhere(network: Network, tmp_path: Path) -> None:
    async def never(request: httpx.Request) -> httpx.Response:
        scope.cancel()
        await trio.sleep_forever()
        raise AssertionError

    network.hosts[M1] = never
    async with opened(network, tmp_path, TWO) as client:
        with trio.CancelScope() as scope:
            await fetch(client)
        assert scope.cancelled_caught
        assert client.statistics().active == 0
    assert hosts(network) == ["m1"]


# Secrets.


def with_basic(registry: Handler, user: str) -> Handler:
    def respond(request: httpx.Request) -> httpx.Response | object:
        if request.headers.get("Authorization") != Credentials(user, "pw").basic():
            return httpx.Response(401, headers={"WWW-Authenticate": "Basic realm=r"})
        return registry(request)

    return respond


async def test_the_registrys_credentials_are_not_for_mirrors(
    network: Network, tmp_path: Path
) -> None:
    """This holds for credentials with the registry's name, and for those without a name."""
    us = Credentials("us", "pw")
    network.hosts |= {
        M1: with_basic(network.hosts[M1], "us"),
        UPSTREAM: with_basic(network.hosts[UPSTREAM], "us"),
    }
    choices: list[CredentialsFor] = [us, {"registry.example": us}]
    for credentials in choices:
        async with opened(network, tmp_path, f'[host."{M1}"]', credentials) as client:
            await fetch(client)
    assert network.secrets("m1.example") == [None] * 2
    assert network.secrets("registry.example") == [None, us.basic()] * 2


async def test_a_mirrors_own_credentials(network: Network, tmp_path: Path) -> None:
    """They are given under the mirror's name, with its port, and reach no other host."""
    network.hosts |= {
        M1: answering(401, **{"WWW-Authenticate": "Basic realm=r"}),
        M2: with_basic(network.hosts[M2], "mirror"),
    }
    credentials = {"m2.example:5000": Credentials("mirror", "pw"), "m1": Credentials("m", "pw")}
    async with opened(network, tmp_path, TWO, credentials) as client:
        await fetch(client)
    assert network.secrets("m1.example") == [None]
    assert network.secrets("m2.example") == [None, Credentials("mirror", "pw").basic()]


async def test_logins_of_docker(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``config.json`` has a login for a mirror and one for the registry. Each host gets its own
    login. The first mirror accepts it but lacks the image, and the other mirror gets none.
    """
    home = Home(tmp_path / "home", monkeypatch)
    mirror, us = Credentials("mirror", "pw"), Credentials("us", "pw")
    pairs = {"m2.example:5000": "mirror:pw", "registry.example": "us:pw"}
    auths = {
        name: {"auth": base64.b64encode(pair.encode()).decode()} for name, pair in pairs.items()
    }
    home.docker_config.write_text(json.dumps({"auths": auths}))
    network.hosts |= {
        M1: with_basic(network.hosts[M1], "us"),
        M2: with_basic(answering(404), "mirror"),
        UPSTREAM: with_basic(network.hosts[UPSTREAM], "us"),
    }
    async with opened(network, tmp_path, TWO, LoginFiles()) as client:
        assert (await fetch(client)).data == CONTENT
    assert network.secrets("m1.example") == [None]
    assert network.secrets("m2.example") == [None, mirror.basic()]
    assert network.secrets("registry.example") == [None, us.basic()]


async def test_a_source_is_asked_as_the_mirror_has_it(network: Network, tmp_path: Path) -> None:
    """A mirror's credentials are found by its name and the repository's path there.

    Refused credentials are renewed under the same name, and no other host gets them.
    """
    stale, fresh, us = (Credentials(name, "pw") for name in ("stale", "fresh", "us"))
    asked: list[tuple[str, Credentials | None]] = []

    async def source(repository: str, refused: Credentials | None) -> Credentials | None:
        asked.append((repository, refused))
        if repository.startswith("m2"):
            return stale if refused is None else fresh
        return us

    inside = FakeRegistry("hub/team/app", blobs={BLOB.digest: CONTENT})
    network.hosts |= {
        M2: with_basic(inside, "fresh"),
        UPSTREAM: with_basic(network.hosts[UPSTREAM], "us"),
    }
    toml = f'[host."{M2}/v2/hub"]\noverride_path = true\n'
    async with opened(network, tmp_path, toml, source) as client:
        assert (await fetch(client)).data == CONTENT
        assert hosts(network) == ["m2"] * 3
        del inside.blobs[BLOB.digest]
        assert (await fetch(client)).data == CONTENT
    name = "m2.example:5000/hub/team/app"
    assert asked == [(name, None), (name, stale), ("registry.example/team/app", None)]
    assert network.secrets("m2.example") == [None, stale.basic(), *[fresh.basic()] * 2]
    assert network.secrets("registry.example") == [None, us.basic()]


async def test_an_identity_token_of_a_mirror(network: Network, tmp_path: Path) -> None:
    """A refresh token is posted to the server that the mirror names.

    The request has no header fields of the mirror, and the token goes to the mirror.
    """
    forms: list[bytes] = []

    async def token_server(request: httpx.Request) -> httpx.Response:
        forms.append(await request.aread())
        assert request.method == "POST"
        assert "X-Door" not in request.headers
        return httpx.Response(200, json={"access_token": "t"})

    def respond(request: httpx.Request) -> httpx.Response:
        if request.headers.get("Authorization") == "Bearer t":
            return httpx.Response(200, stream=Body([CONTENT]))
        challenge = 'Bearer realm="https://auth.example/token",service="s"'
        return httpx.Response(401, headers={"WWW-Authenticate": challenge})

    network.hosts |= {M1: respond, "https://auth.example": token_server}
    toml = f'[host."{M1}"]\n[host."{M1}".header]\nX-Door = "open"\n'
    credentials = {"m1.example": Credentials(identity_token="refresh")}
    async with opened(network, tmp_path, toml, credentials) as client:
        assert (await fetch(client)).data == CONTENT
    [form] = forms
    assert b"refresh_token=refresh" in form
    assert b"scope=repository%3Ateam%2Fapp%3Apull" in form
    assert hosts(network) == ["m1", "auth", "m1"]


async def test_a_helper_that_fails_is_an_error(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is raised, although another host might not need credentials."""
    home = Home(tmp_path / "home", monkeypatch)
    home.docker_config.write_text(json.dumps({"credHelpers": {"m1.example": "desk"}}))
    home.add_helper("desk", {"!error": "it is locked"})
    network.hosts[M1] = with_basic(network.hosts[M1], "us")
    async with opened(network, tmp_path, TWO, LoginFiles()) as client:
        with pytest.raises(CredentialsError, match="it is locked"):
            await fetch(client)
        assert client.statistics().active == 0
    assert hosts(network) == ["m1"]
    assert home.asked() == [("desk", "m1.example")]


async def test_tokens_are_for_one_host(network: Network, tmp_path: Path) -> None:
    """A mirror that names the registry's token server gets an anonymous token from there, not the
    token for our credentials.
    """
    tokens = iter(("for-mirror", "for-registry"))

    def token_server(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"token": next(tokens)})

    def wanting_token(registry: Handler) -> Handler:
        def respond(request: httpx.Request) -> httpx.Response | object:
            if "Authorization" not in request.headers:
                challenge = 'Bearer realm="https://auth.example/token",service="s",scope="all"'
                return httpx.Response(401, headers={"WWW-Authenticate": challenge})
            return registry(request)

        return respond

    network.hosts |= {
        M1: wanting_token(answering(404)),
        UPSTREAM: wanting_token(network.hosts[UPSTREAM]),
        "https://auth.example": token_server,
    }
    us = Credentials("us", "pw")
    async with opened(network, tmp_path, f'[host."{M1}"]', us) as client:
        await fetch(client)
        await fetch(client)
    assert network.secrets("auth.example") == [None, us.basic()]
    assert network.secrets("m1.example") == [None, *["Bearer for-mirror"] * 2]
    assert network.secrets("registry.example") == [None, *["Bearer for-registry"] * 2]


async def test_a_token_server_without_tls(network: Network, tmp_path: Path) -> None:
    """Only a host that the file allows over plain HTTP may name such a token server."""

    def respond(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/token":
            return httpx.Response(200, json={"token": "t"})
        if "Authorization" in request.headers:
            return httpx.Response(200, stream=Body([CONTENT]))
        challenge = 'Bearer realm="http://plain.example/token"'
        return httpx.Response(401, headers={"WWW-Authenticate": challenge})

    network = Network(**{"http://plain.example": respond, M1: respond})
    async with opened(network, tmp_path, 'server = "http://plain.example"') as client:
        assert (await fetch(client)).data == CONTENT
    async with opened(network, tmp_path, f'server = "{M1}"') as client:
        with pytest.raises(AuthenticationError, match=r"m1\.example wants a token .* no HTTPS"):
            await fetch(client)


async def test_a_registry_on_this_machine_that_no_file_names(tmp_path: Path) -> None:
    """The registry is asked without TLS, as without ``hosts_dir``. It cannot lead to plain HTTP
    elsewhere.
    """
    async with open_registry() as registry, open_registry_client(hosts_dir=tmp_path) as client:
        (tmp_path / registry.host).mkdir()
        reference = parse_reference(registry.add(build_image([[]]), "team/app:1"))
        challenge = {"WWW-Authenticate": 'Bearer realm="http://plain.invalid/token"'}
        registry.inject("/v2/team/*", Reply(401, headers=challenge))
        # HEAD and GET each get one redirect.
        registry.inject("/v2/team/*", Redirect("http://plain.invalid"), times=2)
        for said in ("wants a token .* no HTTPS", "redirects to http://plain.invalid"):
            with pytest.raises(RegistryError, match=said):
                await client.resolve(reference)
            client._endpoints._endpoints.clear()  # the registry has not answered 401 yet
        await client.resolve(reference)


async def test_header_fields_are_for_one_host(network: Network, tmp_path: Path) -> None:
    """The file's header fields go only to their host, not to the next host or a
    redirect's target.
    """
    toml = f"""
        [host."{M1}"]
          [host."{M1}".header]
            X-Door = "open"
            X-Many = ["a", "ü"]
            Authorization = "Basic door"
            Accept-Encoding = "gzip"
    """
    network.hosts[M1] = answering(307, Location=f"{M2}/elsewhere")
    network.hosts[M2] = answering(404)
    async with opened(network, tmp_path, toml) as client:
        await fetch(client)
    first, second, third = network.requests
    assert (b"X-Door", b"open") in first.headers.raw
    assert [value for name, value in first.headers.raw if name == b"X-Many"] == [b"a", "ü".encode()]
    assert first.headers["Authorization"] == "Basic door"
    assert first.headers["Accept-Encoding"] == "identity"
    for request in (second, third):
        assert not {"x-door", "x-many", "authorization"} & set(request.headers)
    assert third.url.host == "registry.example"
    assert "open" not in repr(client._endpoints._endpoints)


# Errors in the files.


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("server = ", "it is no TOML: Invalid value"),
        ('[host."https://m1"]\ncapabilities = ["fly"]', "has an unknown one, 'fly'"),
        ('[host."httpd"]', "'://httpd/v2' is no URL of a host"),
        ('server = "httpx://m1"', "'httpx://m1/v2' is no URL of a host"),
        ('server = "https://m1:99999"', "cannot be asked: a port is 65535 at most"),
        ('[header]\n"X:" = "1"', "'X:' cannot be a header field"),
        ('[header]\nhost = "else"', "'host' cannot be a header field"),
        ('[header]\nX = "secret\\n"', "the header field X has control characters"),
        ('dial_timeout = "3"', "it needs a unit"),
    ],
)
async def test_a_broken_file_is_named(
    network: Network, tmp_path: Path, toml: str, message: str
) -> None:
    """No host is asked. After the file is corrected, requests succeed."""
    async with opened(network, tmp_path, toml) as client:
        file = tmp_path / "registry.example" / "hosts.toml"
        with pytest.raises(HostsError, match=message) as caught:
            await fetch(client)
        assert caught.value.path == str(file)
        assert "secret" not in str(caught.value)
        assert network.asked == []
        file.write_text("")
        assert (await fetch(client)).data == CONTENT


async def test_files_that_cannot_be_read(network: Network, tmp_path: Path) -> None:
    """The error names the file for any mistake."""
    with pytest.raises(HostsError, match="it is no directory"):
        async with open_registry_client(hosts_dir=tmp_path / "gone"):
            pass
    async with (
        network.client() as http,
        open_registry_client(client=http, hosts_dir=tmp_path) as client,
    ):
        place = tmp_path / "registry.example"
        place.write_text("a file")
        with pytest.raises(HostsError, match="Not a directory"):
            await fetch(client)
        place.unlink()
        (place / "hosts.toml").mkdir(parents=True)
        with pytest.raises(HostsError, match=r"hosts\.toml cannot be used: Is a directory"):
            await fetch(client)
        (place / "hosts.toml").rmdir()
        (place / "hosts.toml").write_bytes(b"#" * (2**20 + 1))
        with pytest.raises(HostsError, match="larger than 1048576 bytes"):
            await fetch(client)


async def test_what_has_no_host_has_no_configuration(network: Network, tmp_path: Path) -> None:
    """A name without a host uses neither files in the root of ``hosts_dir`` nor ``_default``."""
    for place in (tmp_path, tmp_path / "_default"):
        place.mkdir(exist_ok=True)
        (place / "hosts.toml").write_text('server = "https://registry.example"\n')
    async with (
        network.client() as http,
        open_registry_client(client=http, hosts_dir=tmp_path) as client,
    ):
        with pytest.raises(InvalidReference, match=r"'my_host\.example' is no host"):
            await client.resolve("my_host.example/app")
    assert network.requests == []


def test_certificates_that_cannot_be_used(tmp_path: Path) -> None:
    """The error names the file, and the program does not ask for a key's password."""
    authority = trustme.CA()
    issued = authority.issue_cert("client.example")
    certificate, key = tmp_path / "client.cert", tmp_path / "client.key"
    certificate.write_bytes(issued.cert_chain_pems[0].bytes())
    issued.private_key_pem.write_to_path(key)
    empty, other, gone = tmp_path / "empty", tmp_path / "other", tmp_path / "gone"
    empty.touch()
    trustme.CA().issue_cert("x.example").private_key_pem.write_to_path(other)
    locked = tmp_path / "locked"
    locked.write_text(
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n"
        "DEK-Info: AES-128-CBC,00000000000000000000000000000000\n\nAAAA\n"
        "-----END RSA PRIVATE KEY-----\n"
    )

    def complaint(trust: TLSConfig) -> str:
        with pytest.raises(HostsError) as caught:
            make_context(trust)
        return str(caught.value).removeprefix(f"{tmp_path}/")

    good = str(certificate)
    assert complaint(TLSConfig(ca=(str(gone),))).startswith("gone cannot be used: it should hold")
    assert "No such file" in complaint(TLSConfig(ca=(str(gone),)))
    assert complaint(TLSConfig(ca=(str(empty),))).startswith("empty cannot")
    assert "gone cannot" in complaint(TLSConfig(client=((good, str(gone)),)))
    assert complaint(TLSConfig(client=((good, None),))).startswith("client.cert cannot")
    assert complaint(TLSConfig(client=((good, str(other)),))).startswith("client.cert cannot")
    assert "is encrypted" in complaint(TLSConfig(client=((good, str(locked)),)))
    context = make_context(TLSConfig(client=((good, str(key)), (good, str(key)))))
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert make_context(TLSConfig(verify=False)).verify_mode is ssl.CERT_NONE


def test_who_is_referred_to_learns_less() -> None:
    trust = TLSConfig(ca=("ca",), client=(("cert", None),))
    assert trust.of_others() == TLSConfig(ca=("ca",))
    assert TLSConfig(client=(("cert", None),)).of_others() is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3s", 3),
        ("1h2m3.5s", 3723.5),
        ("300ms", 0.3),
        ("100us", 0.0001),
        ("1.", None),
        (".5m", 30),
        ("1.s", 1),
        ("-2s", -2),
        ("0", 0),
        ("1d", None),
        ("3", None),
        ("", None),
        ("9999999h", None),
        ("1" * 10_000 + "s", None),
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    """Durations have Go's syntax."""
    assert parse_duration(text) == seconds


def host_names(directory: Path, toml: str) -> list[str]:
    place = directory / "registry.example"
    place.mkdir(exist_ok=True)
    (place / "hosts.toml").write_text(toml)
    return [host.host for host in read_configuration(directory, "registry.example").hosts[:-1]]


def test_headers_of_tables(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Hosts come in the order of their headers, also if other text looks like a header."""
    toml = '''
        text = """
[host."no1"]
"""
        other = \'\'\'
[host."no2"]\'\'\'
        list = [
            ["a"],
            [ "[host.no3]" ], # [host.no4]
        ]
        inline = { a = [
[1]] }
        [ host . "b" ] # [host.no5]
          [host."b".header]
            x = "1"
        [host.'a']
        [[hosts]]
        [unrelated]
          [host.b.more]
    '''
    assert host_names(tmp_path, toml) == ["b", "a", "b"]
    assert caplog.messages == []
    assert host_names(tmp_path, 'host = { "c" = {} }') == []
    assert "host 'c' has no [host] header, and is not asked" in caplog.text


@pytest.mark.parametrize(
    "toml",
    [
        "server = 1",
        "host = 1",
        "host.x = 1",
        'capabilities = "pull"',
        "capabilities = [1]",
        'skip_verify = "yes"',
        "override_path = 1",
        "header = 1",
        "[header]\nx = 1",
        "[header]\nx = [1]",
        "ca = 1",
        "ca = [1]",
        "client = 1",
        "client = [1]",
        'client = [["a"]]',
        'client = [["a", 1]]',
        "dial_timeout = 3",
        'server = "https://a b"',
        'server = "https://a:b"',
        'server = "https://[::1"',
        'server = "https://::1/"',
        'server = "https://a/%zz"',
        'server = "https://a\\u0007"',
        'server = "http_x:1"',
        "x = 1\nx = 2",
        "\x00",
    ],
)
def test_values_that_are_none(toml: str, tmp_path: Path) -> None:
    with pytest.raises(HostsError, match=r"hosts\.toml cannot be used: "):
        host_names(tmp_path, toml)


def test_the_repr_of_a_host_needs_no_run_of_trio() -> None:
    async def hosts() -> list[Endpoint]:
        async with open_registry_client() as client:
            return await client._endpoints.find(APP, "pull")

    assert [repr(site) for site in trio.run(hosts)] == [f"<Endpoint {APP.domain} for itself>"]
