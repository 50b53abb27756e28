"""Challenges that come from ``/v2/`` alone, or from another host."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import partial

import httpx
import pytest
import trio
from registry.fakes import FakeRegistry, Network
from trio.testing import MockClock

from trio_layers import (
    AuthenticationError,
    Credentials,
    CredentialsError,
    NotFound,
    RegistryClient,
    RegistryError,
    open_registry_client,
)
from trio_layers._registry.credentials import CredentialsFor
from trio_layers._registry.retries import MAX_ATTEMPTS
from trio_layers.testing import BasicAuth, File, build_image, open_registry

HOST, OTHER, TOKENS = "https://r.example", "https://other.example", "https://tokens.example"
APP = "r.example/team/app:1"
USER, FRIEND = Credentials("user", "s3cret"), Credentials("friend", "other-s3cret")


def basic(credentials: Credentials) -> str:
    pair = f"{credentials.username}:{credentials.password}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


class Hiding:
    """A registry that hides its repositories and sends challenges at ``/v2/`` alone."""

    def __init__(self, status: int, challenge: str = 'Basic realm="x"', root: int = 401) -> None:
        self.status, self.challenge, self.root = status, challenge, root
        self.good = {basic(USER), "Bearer token"}
        self.registry = FakeRegistry()
        self.registry.add_image(tag="1")
        self.network = Network(**{HOST: self, TOKENS: self.token})

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.headers.get("Authorization") in self.good:
            return self.registry(request)
        if request.url.path == "/v2/":
            return httpx.Response(self.root, headers={"WWW-Authenticate": self.challenge})
        return httpx.Response(self.status)

    def token(self, request: httpx.Request) -> httpx.Response:
        if request.headers.get("Authorization") != basic(USER):
            return httpx.Response(401)
        return httpx.Response(200, json={"token": "token"})

    def client(self, credentials: CredentialsFor | None):
        return open_client(self.network, credentials)

    def count(self, path: str) -> int:
        return [each.url.path for each in self.network.requests].count(path)


class open_client:
    """Open a registry client on an in-memory network for the block."""

    def __init__(self, network: Network, credentials: CredentialsFor | None, **options) -> None:
        self.http = network.client()
        self.opening = open_registry_client(client=self.http, credentials=credentials, **options)

    async def __aenter__(self) -> RegistryClient:
        return await self.opening.__aenter__()

    async def __aexit__(self, *error) -> None:
        await self.opening.__aexit__(*error)
        await self.http.aclose()


async def source(repository: str, refused: Credentials | None) -> Credentials | None:
    await trio.lowlevel.checkpoint()
    return USER if repository == "r.example/team/app" and refused is None else None


BEARER = f'Bearer realm="{TOKENS}/t",service="s",scope="repository:user/image:pull"'


@pytest.mark.parametrize("credentials", [USER, {"r.example": USER}, source])
@pytest.mark.parametrize("status", [401, 403, 404])
@pytest.mark.parametrize("challenge", ['Basic realm="x"', BEARER])
async def test_a_registry_that_challenges_at_its_root_alone(
    status: int, challenge: str, credentials: CredentialsFor
) -> None:
    """The challenge of ``/v2/`` decides how credentials are sent.

    One request to ``/v2/`` serves all repositories. Its challenge's scope is not used.
    """
    hiding = Hiding(status, challenge)
    hiding.network.requests.clear()
    async with hiding.client(credentials) as client:
        await client.resolve_image(APP)
        assert await client.get_manifest(APP)
        for _ in range(2):
            with pytest.raises((NotFound, AuthenticationError)):
                await client.tags("r.example/team/other")
    assert hiding.count("/v2/") == 1
    for request in hiding.network.requests:
        if request.url.host == "tokens.example" and request.url.params["scope"]:
            assert request.url.params["scope"] != "repository:user/image:pull"
    anonymous = hiding.network.requests[0]
    assert "Authorization" not in anonymous.headers


@pytest.mark.parametrize("credentials", [None, {"other.example": USER}])
async def test_nobody_without_credentials_asks_the_root(credentials: CredentialsFor | None) -> None:
    hiding = Hiding(404)
    async with hiding.client(credentials) as client:
        with pytest.raises(NotFound):
            await client.get_manifest(APP)
    assert [each.url.path for each in hiding.network.requests] == ["/v2/team/app/manifests/1"]


async def test_a_public_repository_costs_no_request_more() -> None:
    """After an anonymous success, a 404 causes no request to ``/v2/``."""
    registry = FakeRegistry()
    registry.add_image(tag="1")
    network = Network(**{HOST: registry})
    async with open_client(network, USER) as client:
        await client.resolve_image(APP)
        asked = len(network.requests)
        for _ in range(3):
            with pytest.raises(NotFound):
                await client.get_manifest("r.example/team/app:2")
    assert len(network.requests) == asked + 3
    assert not any("Authorization" in each.headers for each in network.requests)


@pytest.mark.parametrize("root", [200, 403, 404, 500])
async def test_a_root_without_a_challenge(root: int, autojump_clock: MockClock) -> None:
    """The first refusal is raised. A 403 or 500 is asked again in the next call."""
    hiding = Hiding(404, root=root)
    async with hiding.client(USER) as client:
        for _ in range(2):
            with pytest.raises(NotFound):
                await client.get_manifest(APP)
    assert hiding.count("/v2/") == {403: 2, 500: 2 * MAX_ATTEMPTS}.get(root, 1)
    assert hiding.network.secrets("r.example") == [None] * len(hiding.network.requests)


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_root_that_fails_once(status: int, autojump_clock: MockClock) -> None:
    """The challenge may come with another attempt, so the refusal is not final."""
    hiding = Hiding(status, root=503)

    def recover(request: httpx.Request) -> httpx.Response:
        answer = hiding(request)
        if request.url.path == "/v2/":
            hiding.root = 401
        return answer

    hiding.network.hosts[HOST] = recover
    async with hiding.client(USER) as client:
        await client.resolve_image(APP)
    assert hiding.count("/v2/") == 2


async def test_many_at_once_ask_the_root_once() -> None:
    hiding = Hiding(404)
    async with hiding.client(USER) as client, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(client.get_manifest, APP)
    assert hiding.count("/v2/") == 1


@pytest.mark.parametrize("challenge", ['Basic realm="x"', BEARER])
async def test_wrong_credentials_do_not_shut_out_the_anonymous(challenge: str) -> None:
    """After a refused login, the next request is anonymous again."""
    hiding = Hiding(404, challenge)
    hiding.good.clear()
    async with hiding.client(FRIEND) as client:
        with pytest.raises((AuthenticationError, NotFound)):
            await client.get_manifest(APP)
        hiding.network.hosts[HOST] = hiding.registry
        await client.get_manifest(APP)
    assert hiding.count("/v2/") == 1


async def test_a_source_that_cannot_tell() -> None:
    """The registry's error includes the error of the credentials' source."""

    async def broken(repository: str, refused: Credentials | None) -> Credentials | None:
        await trio.lowlevel.checkpoint()
        raise CredentialsError("the helper is gone", source="helper")

    async with Hiding(404).client(broken) as client:
        with pytest.raises(NotFound, match=r"answered 404.*the helper is gone"):
            await client.get_manifest(APP)


async def test_a_root_that_is_redirected_gets_no_credentials() -> None:
    """A challenge from another host is not answered with this host's credentials."""
    hiding = Hiding(404)

    def away(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v2/":
            return httpx.Response(307, headers={"Location": f"{OTHER}/v2/"})
        return httpx.Response(404)

    def other(request: httpx.Request) -> httpx.Response:
        return httpx.Response(401, headers={"WWW-Authenticate": 'Basic realm="x"'})

    hiding.network.hosts |= {HOST: away, OTHER: other}
    async with hiding.client(USER) as client:
        with pytest.raises(NotFound):
            await client.get_manifest(APP)
    assert not any("Authorization" in each.headers for each in hiding.network.requests)


# Registries that redirect to another registry.


class Leading:
    """A registry that redirects every request to another registry with a login."""

    def __init__(self, challenge: str, good: str, tokens: Mapping[str, str] = {}) -> None:
        self.challenge, self.good, self.tokens = challenge, good, tokens
        self.registry = FakeRegistry()
        self.registry.add_image(tag="1")
        self.network = Network(**{HOST: self.leads, OTHER: self.other, TOKENS: self.token})

    def leads(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(307, headers={"Location": f"{OTHER}{request.url.raw_path.decode()}"})

    def other(self, request: httpx.Request) -> httpx.Response:
        if request.headers.get("Authorization") != self.good:
            return httpx.Response(401, headers={"WWW-Authenticate": self.challenge})
        return self.registry(request)

    def token(self, request: httpx.Request) -> httpx.Response:
        token = self.tokens.get(request.headers.get("Authorization", ""))
        return httpx.Response(200, json={"token": token}) if token else httpx.Response(401)


@pytest.mark.parametrize("credentials", [None, USER, {"r.example": USER}])
@pytest.mark.parametrize("scope", ["", ',scope="repository:team/app:pull"'])
async def test_an_anonymous_token_of_another_host(
    credentials: CredentialsFor | None, scope: str
) -> None:
    """The redirect's target gets an anonymous token, which is kept.

    The login for the first host is sent to no host.
    """
    leading = Leading(f'Bearer realm="{TOKENS}/t"{scope}', "Bearer free", {"": "free"})
    async with open_client(leading.network, credentials) as client:
        for _ in range(2):
            await client.resolve_image(APP)
    assert leading.network.secrets("tokens.example") == [None]
    assert set(leading.network.secrets("r.example")) == {None}
    assert leading.network.secrets("other.example") == [None, *["Bearer free"] * 4]


@pytest.mark.parametrize("bearer", [False, True])
async def test_another_hosts_own_login(bearer: bool) -> None:
    """The login for the redirect's target is sent to no other host."""
    challenge = f'Bearer realm="{TOKENS}/t"' if bearer else "Basic"
    good = "Bearer friends" if bearer else basic(FRIEND)
    leading = Leading(challenge, good, {basic(FRIEND): "friends"})
    credentials = {"r.example": USER, "other.example": FRIEND}
    async with open_client(leading.network, credentials) as client:
        await client.resolve_image(APP)
    everything = [each.headers.get("Authorization") for each in leading.network.requests]
    assert basic(USER) not in everything
    assert set(leading.network.secrets("r.example")) == {None}


@pytest.mark.parametrize("credentials", [None, USER, {"r.example": USER}])
async def test_another_host_that_wants_a_login_that_is_not_there(
    credentials: CredentialsFor | None,
) -> None:
    leading = Leading("Basic", basic(USER))
    async with open_client(leading.network, credentials) as client:
        with pytest.raises(AuthenticationError) as caught:
            await client.get_manifest(APP)
    assert caught.value.host == "other.example"
    assert leading.network.secrets("other.example") == [None]


async def test_both_want_a_login() -> None:
    """Each host gets its own login."""
    leading = Leading("Basic", basic(FRIEND))

    def leads(request: httpx.Request) -> httpx.Response:
        if request.headers.get("Authorization") != basic(USER):
            return httpx.Response(401, headers={"WWW-Authenticate": "Basic"})
        return Leading.leads(leading, request)

    leading.network.hosts[HOST] = leads
    credentials = {"r.example": USER, "other.example": FRIEND}
    async with open_client(leading.network, credentials) as client:
        await client.resolve_image(APP)
    assert set(leading.network.secrets("r.example")) == {None, basic(USER)}
    assert set(leading.network.secrets("other.example")) == {None, basic(FRIEND)}


async def test_docker_hubs_login_where_a_registry_leads_there() -> None:
    """The login for docker.io is sent to Docker Hub's host, registry-1.docker.io."""
    leading = Leading("Basic", basic(FRIEND))
    leading.network.hosts["https://registry-1.docker.io"] = leading.other

    def leads(request: httpx.Request) -> httpx.Response:
        target = f"https://registry-1.docker.io{request.url.path}"
        return httpx.Response(308, headers={"Location": target})

    leading.network.hosts[HOST] = leads
    async with open_client(leading.network, {"docker.io": FRIEND}) as client:
        await client.get_manifest(APP)


async def test_a_chain_of_hosts_that_all_want_something_ends() -> None:
    """A request ends after a few challenges, even from different hosts."""
    network = Network()
    hosts = iter(range(1000))

    def leads(request: httpx.Request) -> httpx.Response:
        name = f"https://h{next(hosts)}.example"
        network.hosts[name] = lambda request: httpx.Response(
            401, headers={"WWW-Authenticate": f'Bearer realm="{TOKENS}/t"'}
        )
        return httpx.Response(307, headers={"Location": f"{name}{request.url.path}"})

    network.hosts |= {
        HOST: leads,
        TOKENS: lambda request: httpx.Response(200, json={"token": "t"}),
    }
    async with open_client(network, None) as client:
        with pytest.raises(RegistryError):
            await client.get_manifest(APP)
    assert len(network.requests) < 12


async def test_a_redirect_over_sockets() -> None:
    """A local server redirects to a local registry, which wants a login."""
    built = build_image([[File("f", b"x")]])
    async with open_registry(auth=BasicAuth("friend", "other-s3cret")) as registry:
        registry.add(built, "team/app:1")

        async def serve(stream: trio.SocketStream) -> None:
            async with stream:
                data = b""
                while chunk := await stream.receive_some():
                    data += chunk
                    if data.startswith(b"\x16"):
                        return  # the client tests whether this server speaks TLS
                    if data.endswith(b"\r\n\r\n"):
                        target = data.split(b" ", 2)[1].decode()
                        head = "HTTP/1.1 307 Moved\r\nContent-Length: 0\r\n"
                        location = f"Location: http://{registry.host}{target}\r\n\r\n"
                        await stream.send_all(f"{head}{location}".encode())
                        assert b"uthorization" not in data
                        data = b""

        async with trio.open_nursery() as nursery:
            [listener] = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
            name = f"127.0.0.1:{listener.socket.getsockname()[1]}"
            credentials = {name: USER, registry.host: FRIEND}
            async with open_registry_client(credentials=credentials) as client:
                image = await client.resolve_image(f"{name}/team/app:1")
                assert image.descriptor.digest == built.descriptor.digest
            nursery.cancel_scope.cancel()
