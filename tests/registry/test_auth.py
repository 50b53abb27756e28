"""Credentials and tokens: their receivers, their lifetimes, and the tasks that fetch them."""

from __future__ import annotations

import base64
import json

import httpx
import pytest
import trio
from _tools.canaries import Canaries
from registry.fakes import Body, FakeRegistry, MemorySink, Network, Report, describe, is_final
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_layers._errors import (
    AuthenticationError,
    CredentialsError,
    NotFound,
    RateLimited,
    RegistryError,
)
from trio_layers._reference import parse_reference
from trio_layers._registry import tokens
from trio_layers._registry.auth import parse_challenges
from trio_layers._registry.client import RegistryClient, open_registry_client
from trio_layers._registry.credentials import Credentials, CredentialsFor

HOST = "https://registry.example"
TOKENS = "https://tokens.example"
APP = parse_reference("registry.example/team/app")
CONTENT = b"content"
BLOB = describe(CONTENT)
USER = Credentials("user", "s3cret")
USER_BASIC = "Basic " + base64.b64encode(b"user:s3cret").decode()


class TokenRegistry:
    """A registry that requires a Bearer token, and its token server."""

    def __init__(self, **answer: object) -> None:
        self.answer: dict[str, object] = {"expires_in": 300, **answer}
        self.given = 0
        self.good: set[str] = set()
        self.challenge = f'Bearer realm="{TOKENS}/token?x=1",service="registry.example"'
        self.network = Network(**{HOST: self.registry, TOKENS: self.tokens})

    def registry(self, request: httpx.Request) -> httpx.Response:
        if request.headers.get("Authorization", "").removeprefix("Bearer ") not in self.good:
            return httpx.Response(401, headers={"WWW-Authenticate": self.challenge})
        return httpx.Response(200, stream=Body([CONTENT]))

    def tokens(self, request: httpx.Request) -> httpx.Response:
        self.given += 1
        token = f"t{self.given}"
        self.good.add(token)
        return httpx.Response(200, json={"token": token, **self.answer})

    def token_requests(self) -> list[httpx.Request]:
        return [each for each in self.network.requests if each.url.host == "tokens.example"]


async def fetch(client: RegistryClient, text: str = str(APP)) -> None:
    await client.fetch_blob(parse_reference(text), BLOB, MemorySink(), progress=Report())


async def fetch_once(network: Network, credentials: CredentialsFor | None = None) -> None:
    async with (
        network.client() as http,
        open_registry_client(client=http, credentials=credentials) as client,
    ):
        await fetch(client)


async def test_anonymous_token() -> None:
    """The server in the challenge issues a token for the needed scope, and the token is used."""
    server = TokenRegistry()
    await fetch_once(server.network)
    [request] = server.token_requests()
    assert dict(request.url.params) == {
        "x": "1",
        "service": "registry.example",
        "scope": "repository:team/app:pull",
    }
    assert "Authorization" not in request.headers
    assert server.network.secrets("registry.example") == [None, "Bearer t1"]


async def test_token_with_credentials() -> None:
    """The credentials go to the token server, the token to the registry."""
    server = TokenRegistry()
    server.challenge += ',scope="repository:team/app:pull other:x:y"'
    await fetch_once(server.network, {"registry.example": USER, "other.example": USER})
    assert server.network.secrets("tokens.example") == [USER_BASIC]
    assert server.network.secrets("registry.example") == [None, "Bearer t1"]
    [request] = server.token_requests()
    assert request.url.params.get_list("scope") == ["repository:team/app:pull", "other:x:y"]


async def test_credentials_of_another_registry() -> None:
    """Credentials for one domain are not used for another."""
    server = TokenRegistry()
    await fetch_once(server.network, {"other.example": USER})
    assert server.network.secrets("tokens.example") == [None]


async def test_access_token() -> None:
    """A token may also have OAuth2's name ``access_token``."""
    server = TokenRegistry(token=None, access_token="t1")
    await fetch_once(server.network)
    assert server.network.secrets("registry.example")[-1] == "Bearer t1"


async def test_tokens_are_kept_until_they_expire(autojump_clock: MockClock) -> None:
    """All requests of a repository share one token, which is renewed before it expires."""
    server = TokenRegistry(expires_in=300)
    async with server.network.client() as http, open_registry_client(client=http) as client:
        for _ in range(3):
            await fetch(client)
        await trio.sleep(290)
        await fetch(client)
        assert server.given == 1
        await trio.sleep(10)
        await fetch(client)
        assert server.given == 2
        await fetch(client, "registry.example/team/other")
        assert server.given == 3
    assert server.network.secrets("registry.example").count(None) == 2


@pytest.mark.parametrize("lifetime", [None, 1, "soon", -5])
async def test_the_least_lifetime(autojump_clock: MockClock, lifetime: object) -> None:
    """A token lives at least a minute, as the specification says."""
    server = TokenRegistry(expires_in=lifetime)
    async with server.network.client() as http, open_registry_client(client=http) as client:
        await fetch(client)
        await trio.sleep(50)
        await fetch(client)
        assert server.given == 1
        await trio.sleep(10)
        await fetch(client)
        assert server.given == 2


@pytest.mark.parametrize("lifetime", [pytest.param(10**400, id="huge"), float("inf"), 10**9])
async def test_the_greatest_lifetime(autojump_clock: MockClock, lifetime: float) -> None:
    """A token is fetched again after a day, even if it is valid for longer."""
    server = TokenRegistry()
    answer = json.dumps({"token": "t", "expires_in": lifetime}).encode()

    def tokens(request: httpx.Request) -> httpx.Response:
        server.good.add("t")
        return httpx.Response(200, content=answer)

    server.network.hosts[TOKENS] = tokens
    async with server.network.client() as http, open_registry_client(client=http) as client:
        for _ in range(2):
            await fetch(client)
        assert len(server.token_requests()) == 1
        await trio.sleep(24 * 60 * 60)
        await fetch(client)
        assert len(server.token_requests()) == 2


async def test_a_lifetime_that_is_no_number(autojump_clock: MockClock) -> None:
    """Python's decoder accepts NaN and Infinity, which JSON forbids. They count as the least
    lifetime.
    """
    server = TokenRegistry()

    def tokens(request: httpx.Request) -> httpx.Response:
        server.good.add("t")
        return httpx.Response(200, content=b'{"token": "t", "expires_in": NaN}')

    server.network.hosts[TOKENS] = tokens
    async with server.network.client() as http, open_registry_client(client=http) as client:
        for _ in range(2):
            await fetch(client)
    assert len(server.token_requests()) == 1


async def test_a_token_that_is_revoked() -> None:
    """After a 401 for an unexpired token, the client gets another one, once."""
    server = TokenRegistry()
    async with server.network.client() as http, open_registry_client(client=http) as client:
        await fetch(client)
        server.good.clear()
        await fetch(client)
        assert server.given == 2

        server.network.hosts[HOST] = lambda request: httpx.Response(
            401, headers={"WWW-Authenticate": server.challenge}
        )
        with pytest.raises(AuthenticationError) as caught:
            await fetch(client)
        assert server.given == 3
        assert is_final(caught.value)


async def test_one_refresh_for_all() -> None:
    """Tasks that need a token wait for the task that fetches it.

    If that task is cancelled, the next one fetches the token.
    """
    server = TokenRegistry()
    release = trio.Event()

    async def slow(request: httpx.Request) -> httpx.Response:
        await release.wait()
        return server.tokens(request)

    server.network.hosts[TOKENS] = slow
    async with (
        server.network.client() as http,
        open_registry_client(client=http) as client,
        trio.open_nursery() as nursery,
    ):
        scopes = [trio.CancelScope() for _ in range(5)]

        async def cancellable(scope: trio.CancelScope) -> None:
            with scope:
                await fetch(client)

        nursery.start_soon(cancellable, scopes[0])
        await wait_all_tasks_blocked()
        for scope in scopes[1:]:
            nursery.start_soon(cancellable, scope)
        await wait_all_tasks_blocked()
        assert len(server.token_requests()) == 1
        scopes[0].cancel()
        await wait_all_tasks_blocked()
        assert len(server.token_requests()) == 2
        release.set()
    assert [scope.cancelled_caught for scope in scopes] == [True, False, False, False, False]
    assert server.given == 1
    assert len(server.token_requests()) == 2


async def test_one_failure_for_all() -> None:
    """A failing token server is asked once for all waiting tasks.

    Each task gets an error of its own, and later tasks ask again.
    """
    server = TokenRegistry()
    release = trio.Event()

    async def failing(request: httpx.Request) -> httpx.Response:
        await release.wait()
        return httpx.Response(500)

    server.network.hosts[TOKENS] = failing
    errors: list[RegistryError] = []
    async with server.network.client() as http, open_registry_client(client=http) as client:

        async def expect_failure() -> None:
            with pytest.raises(RegistryError, match="answered 500") as caught:
                await fetch(client)
            errors.append(caught.value)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(expect_failure)
            await wait_all_tasks_blocked()
            release.set()
        assert len(server.token_requests()) == 1
        assert len({id(error) for error in errors}) == 5
        assert {error.status for error in errors} == {500}
        server.network.hosts[TOKENS] = server.tokens
        await fetch(client)


async def test_a_token_takes_no_second_slot() -> None:
    """With one connection, a token can be fetched between two requests."""
    server = TokenRegistry()
    async with (
        server.network.client() as http,
        open_registry_client(client=http, max_connections=1) as client,
    ):
        await fetch(client)


async def test_basic() -> None:
    """The registry itself gets the credentials, after it has asked for them."""
    server = TokenRegistry()
    server.challenge = 'Basic realm="here"'
    server.network.hosts[HOST] = lambda request: (
        httpx.Response(200, stream=Body([CONTENT]))
        if request.headers.get("Authorization") == USER_BASIC
        else httpx.Response(401, headers={"WWW-Authenticate": server.challenge})
    )
    async with (
        server.network.client() as http,
        open_registry_client(client=http, credentials=USER) as client,
    ):
        await fetch(client)
        await fetch(client)
    assert server.network.secrets("registry.example") == [None, USER_BASIC, USER_BASIC]


@pytest.mark.parametrize("credentials", [None, Credentials("user", "wrong")])
async def test_wrong_credentials(credentials: Credentials | None) -> None:
    """With wrong credentials or none, the error gives advice, and no useless request is sent."""
    network = Network(
        **{HOST: lambda request: httpx.Response(401, headers={"WWW-Authenticate": "Basic"})}
    )
    with pytest.raises(AuthenticationError, match="may want a login") as caught:
        await fetch_once(network, credentials)
    assert is_final(caught.value)
    assert len(network.requests) == (1 if credentials is None else 2)
    assert "wrong" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "kind", "final"),
    [
        (401, AuthenticationError, True),
        (404, NotFound, True),
        (429, RateLimited, False),
        (500, RegistryError, False),
    ],
)
async def test_a_token_server_that_refuses(
    status: int, kind: type[RegistryError], final: bool
) -> None:
    """The error is of the same kind as for a registry, and names the token server."""
    server = TokenRegistry()
    server.network.hosts[TOKENS] = lambda request: httpx.Response(status)
    with pytest.raises(RegistryError, match=rf"^tokens\.example answered {status}") as caught:
        await fetch_once(server.network, USER)
    assert type(caught.value) is kind
    assert is_final(caught.value) is final


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"token": ""}',
        b'{"token": "two words"}',
        b'{"token": "line\\nbreak"}',
        b'{"token": 7}',
        b'{"token": "' + b"x" * 2**21 + b'"}',
    ],
)
async def test_no_valid_token(body: bytes) -> None:
    """A secret that cannot be sent is neither sent nor shown."""
    server = TokenRegistry()
    server.network.hosts[TOKENS] = lambda request: httpx.Response(200, content=body)
    with pytest.raises(RegistryError) as caught:
        await fetch_once(server.network)
    assert (
        str(caught.value) == "tokens.example gave no valid token to pull registry.example/team/app"
    )


async def test_a_scope_that_no_url_can_hold() -> None:
    server = TokenRegistry()
    server.challenge = f'Bearer realm="{TOKENS}/token",scope="{"ä" * 15_000}"'.encode()
    with pytest.raises(AuthenticationError, match="more than a URL can hold") as caught:
        await fetch_once(server.network)
    assert is_final(caught.value)


@pytest.mark.parametrize(
    "realm",
    [
        "",
        "token",
        "http://tokens.example/",
        "ftp://x/",
        "https://a:x",
        "https://xn--a/",
        "http://127.0.0.1:1/",
    ],
)
async def test_realms_that_are_not_asked(realm: str) -> None:
    """No credentials or tokens are sent without TLS, unless plain HTTP is allowed."""
    server = TokenRegistry()
    server.challenge = f'Bearer realm="{realm}"'
    with pytest.raises(AuthenticationError, match="which is no HTTPS URL"):
        await fetch_once(server.network, USER)
    assert len(server.network.requests) == 1


async def test_bearer_is_preferred() -> None:
    """If a challenge offers several schemes, only the token server gets the password."""
    server = TokenRegistry()
    server.challenge = f'Negotiate, Basic realm="x", {server.challenge}'
    await fetch_once(server.network, USER)
    assert server.network.secrets("registry.example") == [None, "Bearer t1"]


async def test_a_redirect_of_the_token_server() -> None:
    """The redirect's target does not get the credentials."""
    server = TokenRegistry()
    server.network.hosts[TOKENS] = lambda request: httpx.Response(
        307, headers={"Location": "https://evil.example/"}
    )
    server.network.hosts["https://evil.example"] = server.tokens
    await fetch_once(server.network, USER)
    assert server.network.secrets("evil.example") == [None]


async def test_no_secret_is_shown() -> None:
    """Secrets appear neither in reprs nor in errors."""
    assert repr(USER) == "Credentials(username='user')"
    server = TokenRegistry()
    async with (
        server.network.client() as http,
        open_registry_client(client=http, credentials=USER) as client,
    ):
        await fetch(client)
        authenticator = client._endpoints._authenticator
        shown = repr((client, authenticator, list(authenticator.tokens._tokens.items())))
        assert "s3cret" not in shown
        assert "t1" not in shown


async def test_tokens_are_bounded(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If there are many tokens, expired ones are dropped."""
    monkeypatch.setattr(tokens, "MAX_TOKENS", 10)
    server = TokenRegistry()
    async with server.network.client() as http, open_registry_client(client=http) as client:
        for number in range(10):
            await fetch(client, f"registry.example/team/{number}")
        await trio.sleep(400)
        await fetch(client)
        assert repr(client._endpoints._authenticator) == "<Authenticator: 1 tokens>"


async def test_manifests_need_tokens_too() -> None:
    """A pull's first request needs a token, too."""
    server, registry = TokenRegistry(), FakeRegistry()
    registry.add_image(tag="latest")

    def guarded(request: httpx.Request) -> httpx.Response:
        answer = server.registry(request)
        return answer if answer.status_code == 401 else registry(request)

    server.network.hosts[HOST] = guarded
    async with server.network.client() as http, open_registry_client(client=http) as client:
        await client.resolve_image(APP)
    assert server.given == 1


@pytest.mark.parametrize("blank", ["", " ", "   ", "\t", " \t ", "\x0b", "\x0c", "\xa0"])
def test_white_space_in_challenges(blank: str) -> None:
    """White space may surround parameters, "=" and "," in challenges."""
    begin = blank or " "
    text = f'{blank}Bearer{begin}realm{blank}={blank}"https://t"{blank},{blank}service=s{blank}'
    [challenge] = parse_challenges([text])
    assert challenge.scheme == "bearer"
    assert dict(challenge.parameters) == {"realm": "https://t", "service": "s"}
    first, second = parse_challenges([f"{text},{blank}Basic{begin}realm=x"])
    assert first == challenge
    assert (second.scheme, dict(second.parameters)) == ("basic", {"realm": "x"})


def test_challenges_are_read_in_linear_time() -> None:
    """A hostile header takes little time."""
    for text in (
        'Bearer a="' + "\\" * 100_000,
        "a," * 50_000,
        "Bearer " + "a=b," * 50_000,
        "=" * 99,
        "Bearer a=b" + " " * 100_000 + "x",
        "Bearer a" + "\t" * 100_000 + ", b" + " " * 100_000,
        " ," * 50_000,
    ):
        assert len(parse_challenges([text])) <= 50_000


# Credentials from a function, and credentials other than passwords.


class Asked:
    """A source of credentials that returns its last credentials for ever."""

    def __init__(self, *answers: Credentials | None) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[str, Credentials | None]] = []

    async def __call__(self, repository: str, refused: Credentials | None) -> Credentials | None:
        self.calls.append((repository, refused))
        await trio.lowlevel.checkpoint()
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class BasicRegistry:
    """A registry that accepts some passwords of ``user``."""

    def __init__(self, *passwords: str) -> None:
        self.good = {Credentials("user", password).basic() for password in passwords}
        self.network = Network(**{HOST: self})

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.headers.get("Authorization") not in self.good:
            return httpx.Response(401, headers={"WWW-Authenticate": "Basic"})
        return httpx.Response(200, stream=Body([CONTENT]))


async def test_credentials_are_asked_for_when_they_are_wanted() -> None:
    """The source is called once for all waiting requests of a repository, and never without a
    challenge.
    """
    source = Asked(USER)
    server = BasicRegistry("s3cret")
    network = server.network
    network.hosts["https://open.example"] = lambda request: httpx.Response(
        200, stream=Body([CONTENT])
    )
    async with (
        network.client() as http,
        open_registry_client(client=http, credentials=source) as client,
    ):
        await fetch(client, "open.example/app")
        assert source.calls == []
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(fetch, client)
        await fetch(client)
        assert source.calls == [("registry.example/team/app", None)]
        await fetch(client, "registry.example/other")
        assert source.calls[1:] == [("registry.example/other", None)]


async def test_credentials_that_expire() -> None:
    """Refused tasks ask for other credentials once, and pass the refused ones."""
    new = Credentials("user", "new")
    source = Asked(USER, new)
    server = BasicRegistry("s3cret")
    async with (
        server.network.client() as http,
        open_registry_client(client=http, credentials=source) as client,
    ):
        await fetch(client)
        server.good = {new.basic()}
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(fetch, client)
        assert source.calls == [(str(APP.name), None), (str(APP.name), USER)]


@pytest.mark.parametrize(
    ("answers", "asked", "sent"),
    [
        ([None], 1, [None]),
        ([Credentials()], 1, [None]),
        ([Credentials(identity_token="t")], 1, [None]),
        ([Credentials("user", "old")], 2, [None, "old"]),
        ([Credentials("user", "old"), None], 2, [None, "old"]),
        ([Credentials("user", str(n)) for n in range(5)], 2, [None, "0", "1"]),
    ],
)
async def test_credentials_that_never_do(
    answers: list[Credentials | None], asked: int, sent: list[str | None]
) -> None:
    """After a few refused credentials, the registry's error is raised."""
    source = Asked(*answers)
    server = BasicRegistry("s3cret")
    with pytest.raises(AuthenticationError, match="may want a login"):
        await fetch_once(server.network, source)
    assert len(source.calls) == asked
    assert server.network.secrets("registry.example") == [
        each and Credentials("user", each).basic() for each in sent
    ]


async def test_what_a_source_raises() -> None:
    """The source's error is raised unchanged, and no connection stays in use."""

    async def source(repository: str, refused: Credentials | None) -> Credentials | None:
        assert client.statistics().active == 0
        raise OSError("the vault is locked")

    server = BasicRegistry()
    async with (
        server.network.client() as http,
        open_registry_client(client=http, credentials=source) as client,
    ):
        for _ in range(2):
            with pytest.raises(OSError, match="the vault is locked"):
                await fetch(client)


class OAuthRegistry(TokenRegistry):
    """A registry whose token server accepts refresh tokens. It issues another one with each token.

    Attributes:
        post: The status of a POST, in place of the usual one.
        refresh: The accepted refresh token.
    """

    def __init__(self, refresh: str = "r0") -> None:
        super().__init__()
        self.post: httpx.Response | None = None
        self.refresh = refresh

    def tokens(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            if request.headers.get("Authorization") != USER_BASIC:
                return httpx.Response(401)
            return super().tokens(request)
        if self.post is not None:
            return self.post
        if form_of(request)["refresh_token"] != self.refresh:
            return httpx.Response(400, json={"error": "invalid_grant"})
        self.refresh = f"r{self.given + 1}"
        self.answer = {"expires_in": 300, "refresh_token": self.refresh}
        return super().tokens(request)

    def asked(self) -> list[str]:
        return [
            form_of(each)["refresh_token"]
            if each.method == "POST"
            else each.headers.get("Authorization", "")
            for each in self.token_requests()
        ]


def form_of(request: httpx.Request) -> dict[str, str]:
    assert request.headers["Content-Type"] == "application/x-www-form-urlencoded"
    return dict(httpx.QueryParams(request.content.decode()))


async def test_an_identity_token() -> None:
    """The request is a form with all scopes in one field (distribution's
    ``spec/auth/oauth.md``).
    """
    server = OAuthRegistry("r+0&x=é")
    server.challenge += ',scope="repository:team/app:pull other:x:y"'
    await fetch_once(server.network, Credentials("user", identity_token="r+0&x=é"))
    [request] = server.token_requests()
    assert form_of(request) == {
        "grant_type": "refresh_token",
        "service": "registry.example",
        "client_id": "trio-layers",
        "scope": "repository:team/app:pull other:x:y",
        "refresh_token": "r+0&x=é",
    }
    assert dict(request.url.params) == {"x": "1"}
    assert "Authorization" not in request.headers
    assert server.network.secrets("registry.example") == [None, "Bearer t1"]


async def test_refresh_tokens_that_are_good_once(autojump_clock: MockClock) -> None:
    """All repositories use the newest refresh token. A task that still has an older, used one
    repeats its request with the newest.
    """
    server = OAuthRegistry()
    proceed = trio.Event()

    async def slow(request: httpx.Request) -> httpx.Response:
        if b"other" in request.content and not proceed.is_set():
            await proceed.wait()
        return server.tokens(request)

    credentials = Credentials(identity_token="r0")
    async with (
        server.network.client() as http,
        open_registry_client(client=http, credentials=credentials) as client,
    ):
        await fetch(client)
        await trio.sleep(400)
        server.network.hosts[TOKENS] = slow
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, client, "registry.example/other")
            await wait_all_tasks_blocked()
            await fetch(client)
            proceed.set()
    assert server.asked() == ["r0", "r1", "r1", "r2"]
    assert server.given == 3


async def test_a_refresh_token_that_is_refused(autojump_clock: MockClock) -> None:
    """Then the login's identity token is tried again, and after it other credentials."""
    server = OAuthRegistry()
    credentials = Credentials("user", "s3cret", identity_token="r0")
    async with (
        server.network.client() as http,
        open_registry_client(client=http, credentials=credentials) as client,
    ):
        await fetch(client)
        server.refresh = "r0"
        await trio.sleep(400)
        await fetch(client)
        assert server.asked() == ["r0", "r1", "r0"]
        server.refresh = "nothing"
        await trio.sleep(400)
        await fetch(client)
        assert server.asked()[3:] == ["r2", "r0", USER_BASIC]


async def test_a_refresh_token_that_comes_with_a_token(autojump_clock: MockClock) -> None:
    """The refresh token replaces the password from then on. Refresh tokens for anonymous requests
    are ignored.
    """
    for credentials, expected in ((USER, [USER_BASIC, "r0"]), (None, ["", ""])):
        server = OAuthRegistry()
        answer = {"expires_in": 300, "refresh_token": "r0"}

        def tokens(
            request: httpx.Request,
            server: OAuthRegistry = server,
            answer: dict[str, object] = answer,
        ) -> httpx.Response:
            server.answer = answer
            return TokenRegistry.tokens(server, request)

        server.network.hosts[TOKENS] = tokens
        async with (
            server.network.client() as http,
            open_registry_client(client=http, credentials=credentials) as client,
        ):
            await fetch(client)
            await trio.sleep(400)
            await fetch(client)
        assert server.asked() == expected


@pytest.mark.parametrize(
    ("credentials", "basic"),
    [
        (Credentials(identity_token="r0"), Credentials("", "r0").basic()),
        (Credentials("guid", identity_token="r0"), Credentials("guid", "r0").basic()),
        (Credentials("user", "s3cret", identity_token="r0"), USER_BASIC),
    ],
)
@pytest.mark.parametrize("status", [400, 401, 404, 405])
async def test_token_servers_that_know_no_post(
    status: int, credentials: Credentials, basic: str
) -> None:
    """Such servers are asked by GET, with the password, or with the identity token in its place."""
    server = OAuthRegistry()
    server.post = httpx.Response(status)
    server.network.hosts[TOKENS] = lambda request: (
        server.tokens(request)
        if request.method == "POST"
        else TokenRegistry.tokens(server, request)
    )
    await fetch_once(server.network, credentials)
    assert server.asked() == ["r0", basic]


@pytest.mark.parametrize("status", [403, 429, 500])
async def test_token_servers_that_fail_a_post(status: int) -> None:
    """Any other status is the result: the secret is not sent a second time."""
    server = OAuthRegistry()
    server.post = httpx.Response(status)
    with pytest.raises(RegistryError, match=f"answered {status}"):
        await fetch_once(server.network, Credentials(identity_token="r0"))
    assert server.asked() == ["r0"]


@pytest.mark.parametrize("status", [301, 303, 307, 308])
@pytest.mark.parametrize("target", ["https://evil.example/", f"{TOKENS}/elsewhere"])
async def test_a_post_is_not_redirected(status: int, target: str) -> None:
    """Only the requested server gets a refresh token."""
    server = OAuthRegistry()
    server.post = httpx.Response(status, headers={"Location": target})
    server.network.hosts["https://evil.example"] = server.tokens
    with pytest.raises(RegistryError, match=r"redirects to .* which is not followed"):
        await fetch_once(server.network, Credentials(identity_token="r0"))
    assert len(server.token_requests()) == 1
    assert [each.url.host for each in server.network.requests].count("evil.example") == 0


async def test_a_token_server_that_refuses_what_a_helper_gave(autojump_clock: MockClock) -> None:
    """The helper is called once more for all repositories, and its new credentials
    bring the token.
    """
    server = OAuthRegistry()

    async def slow(request: httpx.Request) -> httpx.Response:
        await wait_all_tasks_blocked()
        return server.tokens(request)

    server.network.hosts[TOKENS] = slow
    source = Asked(Credentials("user", "old"), USER)
    async with (
        server.network.client() as http,
        open_registry_client(client=http, credentials=source) as client,
    ):
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(fetch, client)
        assert [refused for _, refused in source.calls] == [None, Credentials("user", "old")]
        assert server.asked() == [Credentials("user", "old").basic(), USER_BASIC]
        await trio.sleep(400)
        await fetch(client)
        assert server.asked()[2:] == [USER_BASIC]
        assert len(source.calls) == 2


async def test_a_registry_token() -> None:
    """The token is sent as it is, only to the registry, and the token server is not asked. When it
    expires, the source of credentials is called again.
    """
    server = TokenRegistry()
    server.good = {"first"}
    source = Asked(Credentials(registry_token="first"), Credentials(registry_token="second"))
    async with (
        server.network.client() as http,
        open_registry_client(client=http, credentials=source) as client,
    ):
        await fetch(client)
        server.good = {"second"}
        await fetch(client)
        server.good = set()
        with pytest.raises(AuthenticationError):
            await fetch(client)
    assert server.token_requests() == []
    assert server.network.secrets("registry.example") == [
        None,
        "Bearer first",
        "Bearer first",
        "Bearer second",
        "Bearer second",
    ]


CANARY = "canary-5ecret"
KINDS = {
    "password": Credentials("user", CANARY),
    "identity": Credentials("user", identity_token=CANARY),
    "registry": Credentials(registry_token=CANARY),
    "unfit": Credentials(registry_token=f"{CANARY}\r\nX: y"),
}
TROUBLE = (
    "none",
    "401",
    "tokens-401",
    "tokens-500",
    "tokens-echo",
    "tokens-redirect",
    "realm-elsewhere",
    "realm-plain",
    "blob-redirect",
    "refused-connection",
    "basic",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trouble", TROUBLE)
async def test_canaries(kind: str, trouble: str, caplog: pytest.LogCaptureFixture) -> None:
    """No secret appears in a log, an error or a repr, or reaches a host that it is not for."""
    canaries = Canaries(caplog, f"user:{CANARY}", f":{CANARY}", "canary-token")
    elsewhere = ["evil.example", "storage.example"]

    def registry(request: httpx.Request) -> httpx.Response:
        realm = {"realm-elsewhere": "https://evil.example", "realm-plain": "http://tokens.example"}
        challenge = f'Bearer realm="{realm.get(trouble, TOKENS)}",service="s"'
        if trouble == "basic":
            challenge = "Basic"
        if trouble == "401" or "Authorization" not in request.headers:
            return httpx.Response(401, headers={"WWW-Authenticate": challenge})
        if trouble == "blob-redirect":
            return httpx.Response(307, headers={"Location": "https://storage.example/blob"})
        return httpx.Response(200, stream=Body([CONTENT]))

    def token_server(request: httpx.Request) -> httpx.Response:
        if trouble == "tokens-redirect":
            return httpx.Response(308, headers={"Location": "https://evil.example/"})
        if trouble == "tokens-echo":
            # A truncated response, with a secret in an odd place.
            return httpx.Response(200, content=b'{"token": "canary-token')
        if trouble.startswith("tokens-"):
            return httpx.Response(int(trouble.removeprefix("tokens-")))
        return httpx.Response(200, json={"token": "canary-token"})

    network = Network(
        **{
            HOST: registry,
            TOKENS: token_server,
            "https://evil.example": token_server,
            "https://storage.example": lambda request: httpx.Response(200, stream=Body([CONTENT])),
        }
    )
    if trouble == "refused-connection":
        del network.hosts[TOKENS]
    if trouble == "realm-elsewhere":
        # As in docker, a token server gets the credentials of the registry that names it, but no
        # token of another registry.
        elsewhere.remove("evil.example")
    error: BaseException | None = None
    async with (
        network.client() as http,
        open_registry_client(client=http, credentials=Asked(KINDS[kind])) as client,
    ):
        try:
            await fetch(client)
        except Exception as caught:
            error = caught
        authenticator = client._endpoints._authenticator
        things = [client, authenticator, authenticator.tokens, dict(authenticator.tokens._tokens)]
        canaries.check(*things, authenticator._repositories, *filter(None, [error]))
    requests = network.requests
    canaries.check_requests(each for each in requests if each.url.host in elsewhere)
    canaries.check_requests(each for each in requests if each.url.scheme == "http")
    if trouble in ("none", "blob-redirect") and kind != "unfit":
        assert error is None
        assert canaries.seen(repr([each.headers.raw for each in requests]))
    if kind == "unfit" and trouble != "basic":
        assert isinstance(error, CredentialsError)
