"""Whole pulls with ``hosts.toml``: several kinds of mirrors, and certificates. A docker-registry is
the cache and the registry, over real sockets.
"""

from __future__ import annotations

import base64
import json
import math
import random
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing
import trustme
from _tools.docker_registry import DockerRegistry, run_docker_registry
from _tools.logins import Home
from registry.fakes import Network

from trio_layers import (
    AuthenticationError,
    HostsError,
    LoginFiles,
    Puller,
    RegistryError,
    open_puller,
)
from trio_layers._reference import parse_reference
from trio_layers._registry.client import open_registry_client
from trio_layers.testing import (
    BuiltImage,
    Corrupt,
    Cut,
    Delay,
    Drop,
    Fault,
    File,
    Redirect,
    Registry,
    Stall,
    TokenAuth,
    build_image,
    open_registry,
)

NAME = "registry.test/team/app:1"
BLOBS = "/v2/team/app/blobs/*"
PASSWORD = "canary-5ecret"
# The same, hashed by bcrypt with the lowest cost.
BCRYPT = "$2y$05$abcdefghijklmnopqrstuuacxD6pG5D5/pUUuKTQTOXjjnFrzV11K"


@pytest.fixture(scope="module")
def built() -> BuiltImage:
    files = [File("big", random.Random(1).randbytes(400_000)), File("small", b"small")]
    return build_image([[file] for file in files])


@pytest.fixture(scope="module")
def layout(built: BuiltImage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layout") / "layout"
    built.write_oci_layout(path)
    return path


@attrs.frozen
class World:
    """The registry itself, one mirror or more, and the directory of the configuration."""

    upstream: Registry
    mirrors: tuple[Registry, ...]
    directory: Path

    def configure(self, *urls: str, domain: str = "registry.test") -> None:
        place = self.directory / "certs.d" / domain
        place.mkdir(parents=True, exist_ok=True)
        toml = f'server = "{self.upstream.url}"\n' + "".join(f'[host."{u}"]\n' for u in urls)
        (place / "hosts.toml").write_text(toml)

    async def pull(self, store: str = "store", **options: float) -> bytes:
        """Pull the image, and return the file in its larger layer."""
        async with self.open(store, **options) as puller, puller.pull(NAME) as image:
            assert await image.rootfs.read_bytes("small") == b"small"
            return await image.rootfs.read_bytes("big")

    @asynccontextmanager
    async def open(self, store: str = "store", **options: float) -> AsyncIterator[Puller]:
        async with open_puller(
            self.directory / store,
            hosts_dir=self.directory / "certs.d",
            retry_tick=0.01,
            **options,
        ) as puller:
            yield puller


@pytest.fixture
async def world(built: BuiltImage, tmp_path: Path) -> AsyncIterator[World]:
    async with open_registry() as upstream, open_registry() as first, open_registry() as second:
        for registry in (upstream, first, second):
            registry.add(built, "team/app:1")
        world = World(upstream, (first, second), tmp_path)
        world.configure(first.url)
        yield world


def blobs_of(registry: Registry) -> list[str]:
    return [
        exchange.path.rpartition("/")[2]
        for exchange in registry.requests
        if "/blobs/" in exchange.path
    ]


def big(built: BuiltImage) -> bytes:
    return random.Random(1).randbytes(400_000)


# A docker-registry as pull-through cache.


async def test_a_pull_through_cache(built: BuiltImage, layout: Path, tmp_path: Path) -> None:
    """The first pull fills the cache, and the cache alone serves the second. We never ask the
    registry itself. Both servers count their requests.
    """
    with ExitStack() as stack:

        def run(name: str, more: str = "") -> DockerRegistry:
            (tmp_path / name).mkdir()
            return stack.enter_context(run_docker_registry(tmp_path / name, quiet=False, more=more))

        upstream = await trio.to_thread.run_sync(run, "upstream")
        await trio.to_thread.run_sync(upstream.push, layout, "team/app:1")
        remote = f"proxy: {{remoteurl: 'http://{upstream.host}'}}"
        cache = await trio.to_thread.run_sync(run, "cache", remote)
        place = tmp_path / "certs.d" / "registry.test"
        place.mkdir(parents=True)
        toml = f'server = "http://{upstream.host}"\n[host."http://{cache.host}"]\n'
        (place / "hosts.toml").write_text(toml)
        pushed = len(upstream.requests())
        asked: list[list[str]] = []
        for number in (1, 2):
            before = len(upstream.requests()), len(cache.requests())
            async with (
                open_puller(tmp_path / f"store{number}", hosts_dir=tmp_path / "certs.d") as puller,
                puller.pull(NAME) as image,
            ):
                assert image.digest == built.digest
                assert await image.rootfs.read_bytes("big") == big(built)
            ours = cache.requests()[before[1] :]
            # The manifest by tag, the config, and two layers, all of them from the cache.
            assert len(ours) == 4
            assert all(request.endswith("?ns=registry.test 200") for request in ours)
            asked.append([each for each in upstream.requests()[before[0] :] if "/blobs/" in each])
        fetched = {each.split()[1] for each in asked[0] if each.startswith("GET")}
        assert len(fetched) == 3
        assert asked[1] == []
        assert pushed > 0


async def test_logins_of_a_mirror_and_of_the_registry(
    built: BuiltImage, layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mirror and registry require different logins, which docker's file lists by host. If the
    mirror's login is missing, the mirror gets none, and the whole image comes from the registry
    with the registry's login.
    """
    home = Home(tmp_path / "home", monkeypatch)
    with ExitStack() as stack:

        def run(user: str) -> DockerRegistry:
            place = tmp_path / user
            place.mkdir()
            (place / "htpasswd").write_text(f"{user}:{BCRYPT}\n")
            auth = f"auth: {{htpasswd: {{realm: here, path: {place}/htpasswd}}}}"
            registry = run_docker_registry(place, quiet=False, more=auth)
            running = stack.enter_context(registry)
            running.push(layout, "team/app:1", creds=f"{user}:{PASSWORD}")
            return running

        registry = await trio.to_thread.run_sync(run, "us")
        mirror = await trio.to_thread.run_sync(run, "guest")
        place = tmp_path / "certs.d" / registry.host
        place.mkdir(parents=True)
        (place / "hosts.toml").write_text(f'[host."http://{mirror.host}"]\n')
        auths = {
            each.host: {"auth": base64.b64encode(f"{user}:{PASSWORD}".encode()).decode()}
            for each, user in ((registry, "us"), (mirror, "guest"))
        }

        async def pull(store: str) -> tuple[list[str], list[str]]:
            """Return the requests at the registry and at the mirror."""
            home.docker_config.write_text(json.dumps({"auths": auths}))
            before = len(registry.requests()), len(mirror.requests())
            async with (
                open_puller(
                    tmp_path / store, hosts_dir=tmp_path / "certs.d", credentials=LoginFiles()
                ) as puller,
                puller.pull(f"{registry.host}/team/app:1") as image,
            ):
                assert image.digest == built.digest
            asked = registry.requests()[before[0] :], mirror.requests()[before[1] :]
            there, here = ([request.split()[-1] for request in each] for each in asked)
            return there, here

        # After the refusal: manifest, config and two layers.
        assert await pull("first") == ([], ["401", *["200"] * 4])
        del auths[mirror.host]
        there, here = await pull("second")
        assert there.count("200") == 4
        assert set(there) == {"401", "200"}
        assert here == ["401"] * 4


# Mirrors with failures.


async def test_a_mirror_does_it_all(world: World, built: BuiltImage) -> None:
    assert await world.pull() == big(built)
    assert world.upstream.requests == []
    assert {exchange.query for exchange in world.mirrors[0].requests} == {"ns=registry.test"}


@pytest.mark.parametrize(
    ("fault", "stays"),
    [(Corrupt(100), False), (Cut(100_000), True), (Stall(100_000), True), (Drop(), False)],
    ids=["lies", "breaks off", "stalls", "drops"],
)
async def test_a_mirror_that_fails_at_blobs(
    fault: Fault, stays: bool, world: World, built: BuiltImage
) -> None:
    """The registry itself continues the blob in the same attempt."""
    mirror = world.mirrors[0]
    layer = built.layers[0].descriptor.digest
    mirror.inject(f"*{layer}", fault, times=None)
    with trio.fail_after(60):
        data = await world.pull(stall_limit=0.5, max_download_attempts=1)
    assert data == big(built)
    [exchange] = [each for each in world.upstream.requests if each.path.endswith(layer)]
    assert ("range" in exchange.headers) is stays
    # The mirror's name differs from the name in the references, so requests contain the registry's
    # name.
    assert exchange.query == "ns=registry.test"


async def test_a_mirror_that_is_gone(world: World, built: BuiltImage) -> None:
    """The mirror is tried once, not for each layer, and then the next mirror is asked."""
    async with open_registry() as gone:
        url = gone.url
    world.configure(url, world.mirrors[1].url)
    assert await world.pull() == big(built)
    assert gone.requests == world.upstream.requests == []
    assert len(world.mirrors[1].requests) == 4


async def test_everyone_is_gone(world: World) -> None:
    """One error names both hosts."""
    async with open_registry() as gone, open_registry() as too:
        urls = gone.host, too.host
    place = world.directory / "certs.d" / "registry.test" / "hosts.toml"
    place.write_text(f'server = "http://{urls[0]}"\n[host."http://{urls[1]}"]\n')
    with pytest.raises(RegistryError, match=f"^{urls[0]} .*; before that, {urls[1]} ") as caught:
        await world.pull()
    assert caught.value.status is None


@pytest.mark.parametrize("who", ["mirror", "registry", "token server"])
@pytest.mark.parametrize("for_ever", [False, True])
async def test_who_stops_answering_in_a_pull(
    who: str, for_ever: bool, built: BuiltImage, tmp_path: Path
) -> None:
    """An attempt ends after the stall limit without a byte.

    After one stall, another attempt succeeds. If the host always stalls, the pull ends with one
    error that names the host.
    """
    async with open_registry(auth=TokenAuth()) as upstream, open_registry() as mirror:
        world = World(upstream, (mirror,), tmp_path)
        for registry in (upstream, mirror):
            registry.add(built, "team/app:1")
        world.configure(*[mirror.url] if who == "mirror" else [])
        layer = built.layers[0].descriptor.digest
        times = None if for_ever else 1
        match who:
            case "mirror":
                mirror.inject(f"*{layer}", Stall(50_000), times=times)
                upstream.inject(f"*{layer}", Stall(50_000), times=times)
            case "registry":
                upstream.inject(f"*{layer}", Stall(50_000), times=times)
            case _:
                upstream.inject("/token", Delay(math.inf), times=times)
        with trio.fail_after(60):
            if not for_ever:
                pull = world.pull(stall_limit=0.3, max_download_attempts=2)
                assert await pull == big(built)
                return
            with pytest.raises(RegistryError, match=f"^{upstream.host} ") as caught:
                await world.pull(stall_limit=0.3, max_download_attempts=2)
        assert caught.value.host == upstream.host
        assert ("; before that, " in str(caught.value)) is (who == "mirror")


# Certificates.


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@attrs.frozen
class Secured:
    """A docker-registry with TLS and an image, and the files to connect to it."""

    registry: DockerRegistry
    ca: Path
    certificate: Path
    key: Path


@pytest.fixture(scope="module", params=[False, True], ids=["TLS", "client certificates"])
def secured(
    request: pytest.FixtureRequest,
    authority: trustme.CA,
    layout: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Secured]:
    directory = tmp_path_factory.mktemp("secured")
    with run_docker_registry(directory) as plain:
        plain.push(layout, "team/app:1")
    for name in ("server", "client"):
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(directory / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(directory / f"{name}.cert")
    authority.cert_pem.write_to_path(directory / "ca.crt")
    tls = f"certificate: {directory}/server.cert, key: {directory}/server.key"
    if request.param:
        tls += f", clientcas: [{directory}/ca.crt]"
    with run_docker_registry(directory, http=f"tls: {{{tls}}}") as registry:
        yield Secured(
            registry, directory / "ca.crt", directory / "client.cert", directory / "client.key"
        )


def by_hosts_toml(secured: Secured, place: Path) -> None:
    """Write a ``hosts.toml`` with the paths of the files."""
    (place / "hosts.toml").write_text(
        f'ca = "{secured.ca}"\nclient = [["{secured.certificate}", "{secured.key}"]]\n'
    )


def by_names(secured: Secured, place: Path) -> None:
    """Link the files under Docker's names, without a ``hosts.toml``."""
    for path in (secured.ca, secured.certificate, secured.key):
        (place / path.name).symlink_to(path)


@pytest.mark.parametrize("configure", [by_hosts_toml, by_names])
async def test_certificates(
    configure: Callable[[Secured, Path], None], secured: Secured, built: BuiltImage, tmp_path: Path
) -> None:
    """A registry has a certificate of a private authority, and may require a client certificate.
    The directory's name has its domain, with an underscore for the colon.
    """
    host = secured.registry.host
    place = tmp_path / "certs.d" / f"{host.replace(':', '_')}_"
    place.mkdir(parents=True)
    configure(secured, place)
    async with (
        open_puller(tmp_path / "store", hosts_dir=tmp_path / "certs.d") as puller,
        puller.pull(f"{host}/team/app:1") as image,
    ):
        assert image.digest == built.digest


@pytest.mark.parametrize("secured", [False], indirect=True)
async def test_certificates_beside_a_client_that_was_given(
    secured: Secured, built: BuiltImage, tmp_path: Path
) -> None:
    """The caller's client does not have the file's certificates, so requests to these hosts use
    another client.
    """
    place = tmp_path / "certs.d" / secured.registry.host
    place.mkdir(parents=True)
    by_names(secured, place)
    network = Network()
    async with (
        network.client() as client,
        open_puller(tmp_path / "store", client=client, hosts_dir=tmp_path / "certs.d") as puller,
    ):
        reference = f"{secured.registry.host}/team/app:1"
        assert (await puller.resolve(reference)).descriptor.digest == built.digest
        with pytest.raises(RegistryError, match="connection refused"):
            await puller.resolve("elsewhere.test/team/app:1")
    assert {request.url.host for request in network.requests} == {"elsewhere.test"}


@pytest.mark.parametrize("secured", [True], indirect=True)
async def test_a_certificate_of_ours_is_missing(secured: Secured, tmp_path: Path) -> None:
    """A missing client certificate is one error, at once."""
    place = tmp_path / "certs.d" / secured.registry.host
    place.mkdir(parents=True)
    toml = place / "hosts.toml"
    # With ``server``, since a registry on loopback without it need not have a valid certificate.
    toml.write_text(f'server = "https://{secured.registry.host}"\nca = "{secured.ca}"\n')
    async with open_puller(tmp_path / "store", hosts_dir=tmp_path / "certs.d") as puller:
        with pytest.raises(RegistryError, match=r"(?i)certificate required|broke|could not"):
            await puller.resolve(f"{secured.registry.host}/team/app:1")
    toml.write_text(toml.read_text() + f'client = "{place}/gone.pem"\n')
    async with open_puller(tmp_path / "store", hosts_dir=tmp_path / "certs.d") as puller:
        with pytest.raises(HostsError, match=r"gone\.pem cannot be used: .*No such file"):
            await puller.resolve(f"{secured.registry.host}/team/app:1")


@pytest.mark.parametrize("skip", [False, True])
async def test_a_certificate_that_nobody_vouches_for(
    skip: bool, world: World, built: BuiltImage
) -> None:
    """An unverified mirror is skipped, unless the file allows it.

    Its blobs are then verified by their digests alone.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    async with open_registry(ssl_context=context) as mirror:
        mirror.add(built, "team/app:1")
        world.configure(mirror.url)
        if skip:
            toml = world.directory / "certs.d" / "registry.test" / "hosts.toml"
            toml.write_text(toml.read_text() + "skip_verify = true\n")
        assert await world.pull() == big(built)
        assert len(mirror.requests) == (4 if skip else 0)
        assert len(world.upstream.requests) == (0 if skip else 4)


async def test_our_certificate_is_for_one_host(
    authority: trustme.CA, world: World, built: BuiltImage
) -> None:
    """A mirror that gets our certificate redirects to another host that wants it.

    That host does not get it, and the blob comes from the registry itself.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    place = world.directory / "certs.d" / "registry.test"
    authority.cert_pem.write_to_path(place / "ca.pem")
    authority.issue_cert("us").private_key_and_cert_chain_pem.write_to_path(place / "us.pem")
    async with (
        open_registry(ssl_context=context) as mirror,
        open_registry(ssl_context=context) as storage,
    ):
        for registry in (mirror, storage):
            registry.add(built, "team/app:1")
        layer = built.layers[0].descriptor.digest
        mirror.inject(f"*{layer}", Redirect(storage.url))
        world.configure(mirror.url)
        toml = place / "hosts.toml"
        toml.write_text(toml.read_text() + 'ca = "ca.pem"\nclient = "us.pem"\n')
        assert await world.pull(max_download_attempts=1) == big(built)
        assert len(mirror.requests) >= 3
        assert storage.requests == []
        assert layer in blobs_of(world.upstream)


async def test_credentials_are_not_for_mirrors(world: World, built: BuiltImage) -> None:
    """A mirror that requires a login gets none of the registry's credentials, and the pull
    continues at the registry.
    """
    async with open_registry(auth=TokenAuth("us", "secret")) as mirror:
        mirror.add(built, "team/app:1")
        world.configure(mirror.url)
        with pytest.raises(AuthenticationError) as caught:
            toml = world.directory / "certs.d" / "registry.test" / "hosts.toml"
            toml.write_text(f'server = "{mirror.url}"\n')
            await world.pull()
        assert caught.value.host == mirror.host
        world.configure(mirror.url)
        assert await world.pull() == big(built)
    assert len(world.upstream.requests) == 4


async def test_one_limit_over_all_clients(
    authority: trustme.CA, world: World, built: BuiltImage
) -> None:
    """Requests by clients with their own certificates share the slots of the other requests."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    async with open_registry(ssl_context=context) as secured:
        secured.add(built, "team/app:1")
        secured.inject("*/manifests/*", Delay(math.inf))
        place = world.directory / "certs.d" / secured.host
        place.mkdir()
        authority.cert_pem.write_to_path(place / "ca.crt")
        references = [
            parse_reference(f"{each.host}/team/app:1") for each in (secured, *world.mirrors)
        ]
        async with (
            open_registry_client(
                hosts_dir=world.directory / "certs.d", max_connections=1
            ) as client,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(client.resolve, references[0])
            with trio.fail_after(20):
                while not secured.requests:
                    await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.start_soon(client.resolve, references[1])
            with trio.fail_after(20):
                while client.statistics().waiting == 0:
                    await trio.testing.wait_all_tasks_blocked(0.01)
            assert client.statistics().active == 1
            assert world.mirrors[0].requests == []
            nursery.cancel_scope.cancel()
        assert client.statistics().active == 0
