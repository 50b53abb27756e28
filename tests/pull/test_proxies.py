"""Proxies and certificates from the environment, or from the caller's own httpx client. The
registries have names that only a resolver of the test knows, and real sockets.
"""

from __future__ import annotations

import random
import ssl
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import attrs
import httpx
import pytest
import trio
import trustme
from _tools.canaries import Canaries
from _tools.proxy import Proxy, run_proxy
from _tools.socks import run_socks_proxy

from trio_layers import (
    Credentials,
    NetworkSettingError,
    RegistryError,
    open_puller,
    open_registry_client,
)
from trio_layers.testing import BasicAuth, BuiltImage, File, Registry, build_image, open_registry

LOGIN = "someone:canary-pr0xy"
CREDENTIALS = Credentials("us", "canary-5ecret")
BIG = random.Random(3).randbytes(200_000)


class Resolver(trio.abc.HostnameResolver):
    """Resolves all names below ``.test`` to this machine."""

    async def getaddrinfo(self, host, port, family=0, type=0, proto=0, flags=0):
        assert host.endswith(b".test"), host
        return await trio.socket.getaddrinfo("127.0.0.1", port, family, type, proto, flags)

    async def getnameinfo(self, sockaddr, flags):
        raise NotImplementedError


@pytest.fixture(scope="module")
def built() -> BuiltImage:
    return build_image([[File("big", BIG)], [File("small", b"small")]])


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"):
        monkeypatch.delenv(name, raising=False)


@attrs.frozen
class World:
    """A named registry that requires a login, and a proxy that requires another login."""

    registry: Registry
    host: str
    proxy: Proxy
    directory: Path
    ca: Path
    canaries: Canaries

    @property
    def reference(self) -> str:
        return f"{self.host}/team/app:1"

    async def pull(self, **options) -> None:
        async with (
            open_puller(
                self.directory / "store", credentials=CREDENTIALS, retry_tick=0.01, **options
            ) as puller,
            puller.pull(self.reference) as image,
        ):
            assert await image.rootfs.read_bytes("big") == BIG
        self.check()

    async def fail_again(self) -> RegistryError:
        """Resolve the image, which needs a request even after a pull."""
        with pytest.raises(RegistryError) as caught:
            async with open_puller(self.directory / "store", credentials=CREDENTIALS) as puller:
                await puller.resolve(self.reference)
        self.check(caught.value)
        return caught.value

    async def fail(self, **options) -> RegistryError:
        with pytest.raises(RegistryError) as caught:
            await self.pull(**options)
        self.check(caught.value)
        return caught.value

    def check(self, *things: object) -> None:
        """Check the secrets of each host.

        The registry gets nothing of the proxy. The proxy gets nothing for the registry, except
        through plain requests. No other host gets anything.
        """
        self.canaries.check(*things)
        assert not any("proxy-authorization" in each.headers for each in self.registry.requests)
        assert not any(self.canaries.seen(head.partition("\r\n")[0]) for head in self.proxy.heads)


@pytest.fixture(params=["https"])
async def world(
    request: pytest.FixtureRequest,
    built: BuiltImage,
    authority: trustme.CA,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[World]:
    canaries = Canaries(caplog, LOGIN, f"{CREDENTIALS.username}:{CREDENTIALS.password}")
    context = None
    if request.param == "https":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("registry.test").configure_cert(context)
    auth = BasicAuth(CREDENTIALS.username, CREDENTIALS.password)
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    trio.socket.set_custom_hostname_resolver(Resolver())  # in this process only
    async with (
        open_registry(auth=auth, ssl_context=context) as registry,
        run_proxy(login=LOGIN) as proxy,
    ):
        registry.add(built, "team/app:1")
        host = f"registry.test:{registry.host.rpartition(':')[2]}"
        yield World(registry, host, proxy, tmp_path, ca, canaries)


plain = pytest.mark.parametrize("world", ["http"], indirect=True)


# Settings from the environment.


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
async def test_a_proxy_by_the_environment(
    variable: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All requests go through tunnels, with the certificates of SSL_CERT_FILE.

    The password in the proxy's URL is for the proxy alone, which sees nothing inside the tunnels.
    """
    monkeypatch.setenv(variable, world.proxy.url)
    monkeypatch.setenv("SSL_CERT_FILE", str(world.ca))
    await world.pull()
    assert set(world.proxy.asked) == {f"CONNECT {world.host}"}
    assert not any("\r\nAuthorization" in head for head in world.proxy.heads)
    assert all("\r\nProxy-Authorization: Basic " in head for head in world.proxy.heads)


@plain
async def test_a_proxy_for_plain_http(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY is for plain HTTP only. The check whether the registry uses TLS does not use this
    proxy.
    """
    monkeypatch.setenv("HTTP_PROXY", world.proxy.url)
    await world.pull(plain_http=True)
    url = f"http://{world.host}/v2/team/app"
    assert f"GET {url}/manifests/1" in world.proxy.asked
    assert all(each.startswith(f"GET {url}/") for each in world.proxy.asked)
    assert len(world.proxy.asked) == len([each for each in world.registry.requests if each.status])


@pytest.mark.parametrize("names", ["registry.test", "*.test", "other.test, registry.test", "*"])
async def test_no_proxy(names: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts in NO_PROXY are asked directly, and others through the proxy."""
    monkeypatch.setenv("HTTPS_PROXY", world.proxy.url)
    monkeypatch.setenv("NO_PROXY", names)
    monkeypatch.setenv("SSL_CERT_FILE", str(world.ca))
    await world.pull()
    assert world.proxy.heads == []
    monkeypatch.setenv("NO_PROXY", "other.test")
    async with open_puller(world.directory / "store", credentials=CREDENTIALS) as puller:
        await puller.resolve(world.reference)
    assert world.proxy.asked == [f"CONNECT {world.host}"]


async def test_a_certificate_that_the_environment_does_not_know(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy does not make the hosts behind it trusted."""
    monkeypatch.setenv("HTTPS_PROXY", world.proxy.url)
    error = await world.fail()
    assert f"through the proxy {world.proxy.host}: " in str(error)
    assert "certificate verify failed" in str(error)
    assert world.registry.requests == []


# Proxies that refuse.


@pytest.mark.parametrize("world", ["https", "http"], indirect=True)
async def test_a_proxy_that_wants_another_login(
    world: World, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the proxy, without the password that was sent to it. The registry gets no
    request.
    """
    scheme = request.node.callspec.params["world"]
    world.canaries.add("someone:canary-wr0ng")
    monkeypatch.setenv("ALL_PROXY", f"http://someone:canary-wr0ng@{world.proxy.host}")
    error = await world.fail(plain_http=scheme == "http")
    assert f"through the proxy {world.proxy.host}: 407 Proxy Authentication" in str(error)
    assert error.host == world.host
    assert world.registry.requests == []


@pytest.mark.parametrize("world", ["https", "http"], indirect=True)
async def test_a_proxy_that_is_gone(
    world: World, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request is sent without the proxy."""
    scheme = request.node.callspec.params["world"]
    async with run_proxy(login=LOGIN) as gone:
        pass
    monkeypatch.setenv("ALL_PROXY", gone.url)
    error = await world.fail(plain_http=scheme == "http")
    assert f"{world.host} could not be asked for the manifest" in str(error)
    assert f"through the proxy {gone.host}: " in str(error)
    assert world.registry.requests == []


async def test_a_proxy_that_cannot_reach_the_registry(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like some real proxies, it closes the connection in place of an answer."""

    async def hangs_up(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, hangs_up, 0, host="127.0.0.1"))
        host = f"127.0.0.1:{listener.socket.getsockname()[1]}"
        monkeypatch.setenv("HTTPS_PROXY", host)
        error = await world.fail()
        nursery.cancel_scope.cancel()
    assert f"through the proxy {host}: " in str(error)


# The caller's own client.


async def test_a_client_with_a_proxy_of_its_own(
    world: World, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is used with its proxy and certificates, and stays open. The environment's proxy
    is not used.
    """
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with run_proxy() as other:
        monkeypatch.setenv("HTTPS_PROXY", other.url)
        name, _, password = LOGIN.partition(":")
        proxy = httpx.Proxy(f"http://{world.proxy.host}", auth=(name, password))
        async with httpx.AsyncClient(proxy=proxy, verify=context) as client:
            await world.pull(client=client)
            assert not client.is_closed
            response = await client.get(f"https://{world.host}/v2/")
            assert response.status_code == 401
        assert other.heads == []
    assert set(world.proxy.asked) == {f"CONNECT {world.host}"}


async def test_a_client_whose_proxy_refuses(world: World, authority: trustme.CA) -> None:
    """The error names the client's proxy, too."""
    async with httpx.AsyncClient(proxy=f"http://{world.proxy.host}") as client:
        error = await world.fail(client=client)
    assert f"through the proxy {world.proxy.host}: 407 Proxy Authentication" in str(error)


# Hosts with certificates of their own.


@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
async def test_certificates_of_hosts_toml(
    given: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host with certificates is asked by another client, through the environment's proxy.

    This also holds if a client was given, whose proxy is unknown.
    """
    place = world.directory / "certs.d" / world.host
    place.mkdir(parents=True)
    (place / "hosts.toml").write_text(f'server = "https://{world.host}"\nca = "{world.ca}"\n')
    monkeypatch.setenv("HTTPS_PROXY", world.proxy.url)
    options = {"hosts_dir": world.directory / "certs.d"}
    async with run_proxy() as other, httpx.AsyncClient(proxy=other.url) as client:
        await world.pull(**options, client=client if given else None)
        assert other.heads == []
    assert set(world.proxy.asked) == {f"CONNECT {world.host}"}


# SOCKS.


@pytest.mark.parametrize("login", [None, "someone:canary-5ocks"])
@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "all_proxy"])
async def test_a_socks_proxy(
    variable: str, login: str | None, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy gets host names, because perhaps only the proxy resolves these."""
    monkeypatch.setenv("SSL_CERT_FILE", str(world.ca))
    async with run_socks_proxy(login=login) as proxy:
        if login is not None:
            world.canaries.add(login)
        monkeypatch.setenv(variable, proxy.url)
        await world.pull()
        assert set(proxy.asked) == {world.host}
    error = await world.fail_again()
    assert f"through the proxy {proxy.host}: " in str(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"login": "someone:canary-5ocks"}, "got NO ACCEPTABLE METHODS"),
        ({"refuses": 5}, "Connection refused"),
        ({"garbage": b""}, "sent an invalid reply"),
        ({"garbage": b"HTTP/1.1 400 Bad Request\r\n\r\n"}, "sent an invalid reply"),
        ({"garbage": b"\x05"}, "sent an invalid reply"),
        ({"garbage": b"\x05\x00\x05"}, "sent an invalid reply"),
    ],
)
async def test_a_socks_proxy_that_refuses(
    options: dict, message: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_socks_proxy(**options) as proxy:
        monkeypatch.setenv("ALL_PROXY", f"socks5h://{proxy.host}")
        error = await world.fail()
    assert f"through the proxy {proxy.host}: " in str(error)
    assert message in str(error)


async def test_a_socks_proxy_without_the_extra(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the extra, and no request bypasses the proxy."""
    monkeypatch.setattr("trio_layers._registry.proxies.find_spec", lambda name: None)
    monkeypatch.setenv("ALL_PROXY", f"socks5://{LOGIN}@127.0.0.1:1080")
    with pytest.raises(NetworkSettingError) as caught:
        await world.pull()
    world.canaries.check(caught.value)
    assert "ALL_PROXY='socks5://…@127.0.0.1:1080' cannot be used" in str(caught.value)
    assert "install trio-layers[socks]" in str(caught.value)
    assert world.registry.requests == []


# Settings that cannot be used.


BROKEN = [
    ("ALL_PROXY", "socks4://someone:canary-pr0xy@127.0.0.1:1080"),
    ("HTTPS_PROXY", "http://"),
    ("https_proxy", "http://someone:canary-pr0xy@proxy.test:port"),
    ("HTTPS_PROXY", "someone:canary-pr0xy"),
    ("SSL_CERT_FILE", "/nowhere/certificates"),
    ("SSL_CERT_FILE", "/dev/null"),
    ("SSL_CERT_FILE", "/"),
    ("SSL_CERT_DIR", "/nowhere/certificates"),
    ("SSL_CERT_DIR", "/etc/passwd:/nowhere"),
    ("SSLKEYLOGFILE", "/nowhere/keys"),
]


@pytest.mark.parametrize(("variable", "value"), BROKEN)
async def test_a_setting_that_cannot_be_used(
    variable: str, value: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the setting, and the client sends no request.

    Calls that need no request, and requests to this machine, still work.
    """
    monkeypatch.setenv(variable, value)
    async with open_puller(world.directory / "store", credentials=CREDENTIALS) as puller:
        assert await puller.store.images() == []
    with pytest.raises(NetworkSettingError) as caught:
        await world.pull()
    assert caught.value.variable == variable
    assert f"{variable}='" in str(caught.value)
    assert value.rpartition("@")[2].partition(":")[0] in str(caught.value)
    world.canaries.check(caught.value)
    assert world.registry.requests == world.proxy.heads == []


@pytest.mark.parametrize(("variable", "value"), BROKEN)
async def test_a_setting_that_cannot_be_used_and_this_machine(
    variable: str, value: str, built: BuiltImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    async with open_registry() as registry:
        registry.add(built, "team/app:1")
        async with (
            open_puller(tmp_path / "store") as puller,
            puller.pull(f"{registry.host}/team/app:1") as image,
        ):
            assert await image.rootfs.read_bytes("small") == b"small"


async def test_certificates_that_cannot_be_used_and_tls_on_this_machine(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the variable, as TLS to this machine needs certificates.

    The client sends no request without TLS.
    """
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/certificates")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    async with open_registry(ssl_context=context) as registry, open_registry_client() as client:
        with pytest.raises(NetworkSettingError, match="SSL_CERT_FILE"):
            await client.get_manifest(f"{registry.host}/team/app:1")
        assert registry.requests == []


async def test_settings_count_when_a_request_needs_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A setting that is corrected while the puller is open takes effect."""
    monkeypatch.setenv("SSL_CERT_FILE", str(world.directory / "late.pem"))
    monkeypatch.setenv("HTTPS_PROXY", world.proxy.url)
    async with open_puller(world.directory / "store", credentials=CREDENTIALS) as puller:
        with pytest.raises(NetworkSettingError):
            await puller.resolve(world.reference)
        (world.directory / "late.pem").write_bytes(world.ca.read_bytes())
        await puller.resolve(world.reference)
