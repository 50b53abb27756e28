"""Logins that skopeo and podman wrote, for a docker-registry with a login. Only the token server is
ours, and docker-registry verifies its tokens.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import trio
from _tools.canaries import Canaries
from _tools.docker_registry import DockerRegistry, require, run_docker_registry
from _tools.logins import Home
from _tools.token_server import Signer, TokenServer, run_token_server

from trio_layers import AuthenticationError, Credentials, LoginFiles, open_puller
from trio_layers._reference import parse_reference
from trio_layers._registry.client import open_registry_client
from trio_layers._registry.credentials import CredentialsFor
from trio_layers.testing import sample_image

pytestmark = pytest.mark.integration

USER, PASSWORD, WRONG = "canary", "canary-5ecret", "canary-wrong"
# Hashed by crypt(3): bcrypt with the lowest cost.
HTPASSWD = "canary:$2y$05$abcdefghijklmnopqrstuuacxD6pG5D5/pUUuKTQTOXjjnFrzV11K\n"
SAMPLE = sample_image()


@attrs.frozen
class Guarded:
    """An image in a registry that requires a login."""

    registry: DockerRegistry
    reference: str
    tokens: TokenServer | None = None


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("layout")
    SAMPLE.write_oci_layout(directory)
    return directory


@pytest.fixture(scope="module")
def basic(tmp_path_factory: pytest.TempPathFactory, layout: Path) -> Iterator[Guarded]:
    """A docker-registry that requires a user name and a password."""
    directory = tmp_path_factory.mktemp("htpasswd")
    (directory / "htpasswd").write_text(HTPASSWD)
    auth = f"auth: {{htpasswd: {{realm: here, path: {directory / 'htpasswd'}}}}}\n"
    with run_docker_registry(directory, more=auth) as registry:
        yield Guarded(registry, registry.push(layout, "team/app:1", creds=f"{USER}:{PASSWORD}"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, layout: Path) -> Iterator[Guarded]:
    """A docker-registry that requires a token. skopeo gets one to push the image."""
    directory = tmp_path_factory.mktemp("tokens")
    with run_token_server(**{USER: PASSWORD}) as server:
        auth = server.config(directory / "root.pem")
        with run_docker_registry(directory, more=auth) as registry:
            reference = registry.push(layout, "team/app:1", creds=f"{USER}:{PASSWORD}")
            yield Guarded(registry, reference, server)


@pytest.fixture
def server(tokens: Guarded) -> TokenServer:
    """The token server, without its earlier requests."""
    server = tokens.tokens
    assert server is not None
    server.requests.clear()
    server.refresh_tokens.clear()
    server.post_status = None
    return server


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    return Home(tmp_path / "home", monkeypatch)


@pytest.fixture
def canaries(caplog: pytest.LogCaptureFixture) -> Canaries:
    return Canaries(caplog, f"{USER}:{PASSWORD}")


async def pull(guarded: Guarded, store: Path, credentials: CredentialsFor | None) -> None:
    async with (
        open_puller(store, credentials=credentials) as puller,
        puller.pull(guarded.reference) as image,
    ):
        assert image.digest == SAMPLE.digest
        assert await image.rootfs.exists("/etc")


def log_in(program: str, guarded: Guarded, file: Path) -> None:
    command = [require(program), "login", "--authfile", file, "--tls-verify=false"]
    command += ["--username", USER, "--password-stdin", guarded.registry.host]
    subprocess.run(command, input=PASSWORD.encode(), check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("program", ["skopeo", "podman"])
async def test_a_login_of_another_program(
    program: str, basic: Guarded, home: Home, canaries: Canaries, tmp_path: Path
) -> None:
    """The login is found where the other program writes it by default."""
    log_in(program, basic, home.auth[0])
    logins = LoginFiles()
    await pull(basic, tmp_path / "store", logins)
    canaries.check(logins)


async def test_a_credential_helper(
    basic: Guarded, home: Home, canaries: Canaries, tmp_path: Path
) -> None:
    """The helper is called once in a pull, for the registry with its port."""
    home.docker_config.write_text(json.dumps({"credsStore": "desk"}))
    home.add_helper("desk", {basic.registry.host: [USER, PASSWORD]})
    await pull(basic, tmp_path / "store", LoginFiles())
    assert home.asked() == [("desk", basic.registry.host)]
    canaries.check()


async def test_expired_credentials_of_a_helper(
    basic: Guarded, home: Home, canaries: Canaries
) -> None:
    """The helper is asked once more for refused credentials, but not again and again.

    It is not asked again if it gives the same credentials.
    """
    home.docker_config.write_text(json.dumps({"credsStore": "desk"}))
    expired = {basic.registry.host: [USER, "canary-expired"]}
    canaries.add(f"{USER}:canary-expired")
    home.add_helper("desk", expired)
    reference = parse_reference(basic.reference)
    async with open_registry_client(credentials=LoginFiles()) as client:
        with pytest.raises(AuthenticationError) as caught:
            await client.resolve_image(reference)
        assert len(home.asked()) == 2
        canaries.check(client, caught.value)
        home.add_helper("desk", {basic.registry.host: [USER, PASSWORD]})
        await client.resolve_image(reference)
        assert len(home.asked()) == 3
        await client.resolve_image(
            parse_reference(f"{basic.registry.host}/team/app@{SAMPLE.digest}")
        )
        assert len(home.asked()) == 3
    canaries.check()


async def test_no_login(basic: Guarded, home: Home, tmp_path: Path) -> None:
    """Without a login, or with a login for another registry, the pull asks for one."""
    home.docker_config.write_text(
        json.dumps({"auths": {"127.0.0.1:1": {"username": USER, "password": PASSWORD}}})
    )
    with pytest.raises(AuthenticationError, match="may want a login"):
        await pull(basic, tmp_path / "store", LoginFiles())


async def test_tokens_for_a_password(
    tokens: Guarded, server: TokenServer, home: Home, canaries: Canaries, tmp_path: Path
) -> None:
    """With a password in docker's file, the token server is asked by GET, once for the pull."""
    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    home.docker_config.write_text(
        json.dumps({"auths": {f"https://{tokens.registry.host}/v1/": {"auth": auth}}})
    )
    await pull(tokens, tmp_path / "store", LoginFiles())
    assert server.requests == [("GET", "Basic")]
    canaries.add(*server.given)
    canaries.check()


async def test_tokens_for_an_identity_token(
    tokens: Guarded, server: TokenServer, home: Home, canaries: Canaries
) -> None:
    """A refresh token is exchanged by POST, and the new one is used the next time.

    The new one is also used by a repository that used the same old one at the same time.
    """
    server.refresh_tokens["canary-refresh"] = USER
    canaries.add("canary-refresh")
    home.docker_config.write_text(json.dumps({"credHelpers": {tokens.registry.host: "gcr"}}))
    home.add_helper("gcr", {tokens.registry.host: ["<token>", "canary-refresh"]})
    async with open_registry_client(credentials=LoginFiles()) as client:
        await client.resolve_image(parse_reference(tokens.reference))
        assert server.requests == [("POST", "refresh_token")]
        access = client._endpoints._authenticator
        access.tokens._tokens.clear()
        await client.resolve_image(parse_reference(tokens.reference))
        assert server.requests == [("POST", "refresh_token")] * 2
        canaries.add(*server.given)
        canaries.check(client, access, list(access.tokens._tokens), access.tokens)
    assert list(server.refresh_tokens) == [server.given[-2]]


@pytest.mark.parametrize("status", [404, 405])
async def test_a_token_server_without_post(
    tokens: Guarded, server: TokenServer, canaries: Canaries, tmp_path: Path, status: int
) -> None:
    """The token server takes an identity token as password in a GET, as for containerd."""
    server.post_status = status
    server.refresh_tokens["canary-refresh"] = USER
    canaries.add(":canary-refresh")
    await pull(tokens, tmp_path / "store", Credentials(identity_token="canary-refresh"))
    assert server.requests == [("POST", "refresh_token"), ("GET", "Basic")]
    canaries.check()


async def test_a_registry_token(
    tokens: Guarded, server: TokenServer, home: Home, canaries: Canaries, tmp_path: Path
) -> None:
    """A registry token is sent as it is, and no token server is asked."""
    token = server.signer.token(USER, ["repository:team/app:pull"])
    canaries.add(token)
    file = tmp_path / "auth.json"
    file.write_text(json.dumps({"auths": {tokens.registry.host: {"registrytoken": token}}}))
    await pull(tokens, tmp_path / "store", LoginFiles(file))
    assert server.requests == []
    bad = Credentials(registry_token=Signer().token(USER, ["repository:team/app:pull"]))
    canaries.add(bad.registry_token)
    with pytest.raises(AuthenticationError) as caught:
        await pull(tokens, tmp_path / "other", bad)
    assert server.requests == []
    canaries.check(caught.value)


async def test_wrong_passwords(
    tokens: Guarded, server: TokenServer, canaries: Canaries, tmp_path: Path
) -> None:
    """The error is the token server's refusal, and names the token server."""
    canaries.add(f"{USER}:{WRONG}")
    with pytest.raises(AuthenticationError, match=r"answered 401 .*who are you\?") as caught:
        await pull(tokens, tmp_path / "store", Credentials(USER, WRONG))
    assert server.requests == [("GET", "Basic")]
    canaries.check(caught.value)


async def test_tokens_that_are_not_taken_any_more(layout: Path, tmp_path: Path) -> None:
    """The registry trusts another key from now on, and so refuses an unexpired token. The pull gets
    another token and succeeds.
    """
    credentials = Credentials(USER, PASSWORD)
    with run_token_server(**{USER: PASSWORD}) as server:
        async with open_registry_client(credentials=credentials) as client:
            auth = server.config(tmp_path / "root.pem")
            with run_docker_registry(tmp_path, more=auth) as registry:
                name = registry.push(layout, "app", creds=f"{USER}:{PASSWORD}")
                server.requests.clear()
                await client.resolve_image(parse_reference(name))
                await client.resolve_image(parse_reference(name))
                assert len(server.requests) == 1
            server.signer = Signer()
            auth = server.config(tmp_path / "root.pem")
            with run_docker_registry(tmp_path, more=auth, address=registry.host):
                await client.resolve_image(parse_reference(name))
            assert len(server.requests) == 2


async def test_the_command_line(basic: Guarded, home: Home, tmp_path: Path) -> None:
    """``--authfile`` names a file; without it, the user's own files count; no output shows a
    secret.
    """
    file = tmp_path / "elsewhere.json"
    log_in("skopeo", basic, file)
    done = await run("pull", "-v", "--authfile", str(file), basic.reference)
    assert done.returncode == 0, done.stderr
    assert f"as in {file}".encode() in done.stderr
    assert PASSWORD.encode() not in done.stderr + done.stdout
    file.rename(home.auth[1])
    assert (await run("pull", basic.reference)).returncode == 0
    home.docker_config.write_text(f'{{"auths": "{PASSWORD}"')
    done = await run("pull", basic.reference)
    assert done.returncode == 1
    assert str(home.docker_config).encode() in done.stderr
    assert PASSWORD.encode() not in done.stderr


async def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(
        [sys.executable, "-P", "-m", "trio_layers", *arguments],
        env={**os.environ, "PYTHONWARNINGS": "error"},
        stdin=subprocess.DEVNULL,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
