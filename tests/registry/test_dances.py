"""A registry that answers 401 to all credentials.

Each request ends after a few refusals, with the registry's error.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count

import attrs
import httpx
import pytest
import trio
from registry.fakes import MemorySink, Network, Report, describe, is_final
from trio.testing import MockClock

from trio_layers._errors import AuthenticationError, RegistryError
from trio_layers._reference import parse_reference
from trio_layers._registry.client import RegistryClient, open_registry_client
from trio_layers._registry.credentials import Credentials, CredentialsFor

HOST = "https://registry.example"
TOKENS = "https://tokens.example"
APP = parse_reference("registry.example/team/app")
BLOB = describe(b"content")
BEARER = f'Bearer realm="{TOKENS}/",service="registry.example"'
BASIC = 'Basic realm="here"'
USER = Credentials("user", "s3cret")

# Maximum number of requests to a refusing registry in one call.
MOST = 3


async def fetch(client: RegistryClient) -> None:
    await client.fetch_blob(APP, BLOB, MemorySink(), progress=Report())


def wanting(challenge: Callable[[str, int], str]) -> Callable[[httpx.Request], httpx.Response]:
    """A registry that refuses every request. The challenge depends on the credentials and the
    number of the request.
    """
    numbers = count()

    def answer(request: httpx.Request) -> httpx.Response:
        scheme = request.headers.get("Authorization", "").partition(" ")[0]
        text = challenge(scheme, next(numbers))
        return httpx.Response(401, headers={"WWW-Authenticate": text} if text else {})

    return answer


def giving(status: int = 200, post: int = 200, **more: str) -> Callable[..., httpx.Response]:
    """A token server that never issues the same token twice."""
    numbers = count()

    def answer(request: httpx.Request) -> httpx.Response:
        said = status if request.method == "GET" else post
        number = next(numbers)
        tokens = {
            "token": f"t{number}",
            **{name: f"{value}{number}" for name, value in more.items()},
        }
        return httpx.Response(said, json=tokens if said == 200 else {})

    return answer


def renewed(**fields: str) -> CredentialsFor:
    """Return other credentials each time."""
    numbers = count()

    async def source(repository: str, refused: Credentials | None) -> Credentials:
        await trio.lowlevel.checkpoint()
        number = next(numbers)
        return Credentials(**{name: f"{value}{number}" for name, value in fields.items()})

    return source


@attrs.frozen
class Dance:
    """Attributes:
    challenge: The registry's challenge.
    first: Numbers of requests to the registry and the token server for a first call.
    second: The same numbers for a second call, when the challenge is known.
    """

    challenge: Callable[[str, int], str]
    first: tuple[int, int]
    second: tuple[int, int]
    credentials: Callable[[], CredentialsFor | None] = lambda: None
    tokens: Callable[[], Callable[..., httpx.Response]] = giving


def user() -> Credentials:
    return USER


DANCES = {
    "no challenge": Dance(lambda sent, n: "", (2, 0), (1, 0), user),
    "unknown": Dance(lambda sent, n: "Negotiate", (2, 0), (1, 0), user),
    "basic": Dance(lambda sent, n: BASIC, (1, 0), (1, 0)),
    "basic, with a password": Dance(lambda sent, n: BASIC, (2, 0), (1, 0), user),
    "basic, with another one each time": Dance(
        lambda sent, n: BASIC,
        (3, 0),
        (2, 0),
        lambda: renewed(username="user", password="p"),
    ),
    "bearer": Dance(lambda sent, n: BEARER, (2, 1), (2, 2)),
    "bearer, with a password": Dance(lambda sent, n: BEARER, (2, 1), (2, 2), user),
    "bearer, with an identity token": Dance(
        lambda sent, n: BEARER,
        (2, 1),
        (2, 2),
        lambda: Credentials(identity_token="i"),
    ),
    "bearer, with a registry token": Dance(
        lambda sent, n: BEARER, (2, 0), (1, 0), lambda: Credentials(registry_token="r")
    ),
    "bearer, with another registry token each time": Dance(
        lambda sent, n: BEARER, (3, 0), (2, 0), lambda: renewed(registry_token="r")
    ),
    "another scope each time": Dance(
        lambda sent, n: f'{BEARER},scope="repository:team/app:pull x:{n}:y"', (2, 1), (2, 2)
    ),
    "another realm each time": Dance(
        lambda sent, n: f'Bearer realm="{TOKENS}/{n}"', (2, 1), (2, 2)
    ),
    "no token": Dance(lambda sent, n: BEARER, (1, 1), (0, 1), user, lambda: giving(401)),
    "no token, with another password each time": Dance(
        lambda sent, n: BEARER,
        (1, 2),
        (0, 2),
        lambda: renewed(username="user", password="p"),
        lambda: giving(401),
    ),
    "no token, with another identity token each time": Dance(
        lambda sent, n: BEARER,
        (1, 4),
        (0, 4),
        lambda: renewed(identity_token="i"),
        lambda: giving(401, 401),
    ),
    "refresh tokens that are good for nothing": Dance(
        lambda sent, n: BEARER, (2, 1), (2, 4), user, lambda: giving(200, 401, refresh_token="r")
    ),
    "bearer, then basic, and so on": Dance(
        lambda sent, n: BASIC if sent == "Bearer" else BEARER, (3, 1), (3, 0), user
    ),
    "basic, then bearer, and so on": Dance(
        lambda sent, n: BEARER if sent == "Basic" else BASIC, (3, 1), (3, 0), user
    ),
    "both, in turn": Dance(lambda sent, n: (BASIC, BEARER)[n % 2], (3, 1), (3, 1), user),
}


@pytest.mark.parametrize("name", DANCES)
async def test_a_dance(name: str) -> None:
    """The call ends with one final error."""
    dance = DANCES[name]
    network = Network(**{HOST: wanting(dance.challenge), TOKENS: dance.tokens()})
    async with (
        network.client() as http,
        open_registry_client(client=http, credentials=dance.credentials()) as client,
    ):
        for expected in (dance.first, dance.second):
            network.requests.clear()
            with pytest.raises(AuthenticationError, match="answered 401") as caught:
                await fetch(client)
            assert is_final(caught.value)
            hosts = [request.url.host for request in network.requests]
            asked = hosts.count("registry.example"), hosts.count("tokens.example")
            assert asked == expected
            assert asked[0] <= MOST


async def test_who_wanted_something_else_at_first() -> None:
    """The registry first asks for Basic, and then for a token. The client gets the token."""
    network = Network(**{HOST: wanting(lambda sent, n: BEARER if n else BASIC), TOKENS: giving()})
    refuse = network.hosts[HOST]
    network.hosts[HOST] = lambda request: (
        httpx.Response(200, content=b"content")
        if request.headers.get("Authorization", "").startswith("Bearer ")
        else refuse(request)
    )
    async with (
        network.client() as http,
        open_registry_client(client=http, credentials=USER) as client,
    ):
        await fetch(client)
    assert [text and text.split()[0] for text in network.secrets("registry.example")] == [
        None,
        "Basic",
        "Bearer",
    ]


async def test_many_that_renew_for_one_another(autojump_clock: MockClock) -> None:
    """A task tries credentials that another task has renewed, but not each time."""
    delays = random.Random(1)

    async def answer(request: httpx.Request) -> httpx.Response:
        await trio.sleep(delays.random())
        return httpx.Response(401, headers={"WWW-Authenticate": BASIC})

    network = Network(**{HOST: answer})
    source = renewed(username="user", password="p")
    tasks = 100

    async def refused() -> None:
        with pytest.raises(AuthenticationError):
            await fetch(client)

    async with (
        network.client() as http,
        open_registry_client(client=http, credentials=source, max_connections=tasks) as client,
        trio.open_nursery() as nursery,
    ):
        for _ in range(tasks):
            nursery.start_soon(refused)
    assert len(network.requests) <= MOST * tasks


async def test_who_asks_to_wait_in_between(autojump_clock: MockClock) -> None:
    """A wait does not reset the count of refusals, and a refusal does not reset the time waited."""
    numbers = count()

    def answer(request: httpx.Request) -> httpx.Response:
        if next(numbers) % 2:
            return httpx.Response(429, headers={"Retry-After": "0"})
        return httpx.Response(401, headers={"WWW-Authenticate": BEARER})

    network = Network(**{HOST: answer, TOKENS: giving()})
    async with network.client() as http, open_registry_client(client=http) as client:
        with pytest.raises(RegistryError, match="answered 4"):
            await fetch(client)
    assert len(network.requests) <= 2 * (MOST + 6)


async def test_a_storage_that_refuses_and_a_registry_that_leads_back() -> None:
    """Redirects have a limit of their own in each of the few requests."""

    def registry(request: httpx.Request) -> httpx.Response:
        if "Authorization" in request.headers and request.url.path != "/5":
            path = f"/{int(request.url.path[1:]) + 1}" if len(request.url.path) == 2 else "/1"
            return httpx.Response(307, headers={"Location": f"{HOST}{path}"})
        return httpx.Response(401, headers={"WWW-Authenticate": BEARER})

    network = Network(**{HOST: registry, TOKENS: giving()})
    async with network.client() as http, open_registry_client(client=http) as client:
        with pytest.raises(AuthenticationError, match="answered 401") as caught:
            await fetch(client)
    assert is_final(caught.value)
    assert [request.url.path for request in network.requests[2:]] == [
        f"/v2/team/app/blobs/{BLOB.digest}",
        *[f"/{n}" for n in range(1, 6)],
    ]
