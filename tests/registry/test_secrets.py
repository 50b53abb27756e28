"""Each kind of secret reaches only its own servers, whatever fails, and appears in no log, error or
repr.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs

import attrs
import httpx
import pytest
import trio
from _tools.canaries import Canaries
from _tools.logins import Home
from registry.fakes import Body, MemorySink, Network, Report, describe
from trio.testing import MockClock

from trio_layers._errors import HostsError, LayersError, NetworkSettingError, RegistryError
from trio_layers._hosts_toml import read_configuration
from trio_layers._logins.lookup import LoginFiles
from trio_layers._printable import without_login
from trio_layers._reference import parse_reference
from trio_layers._registry import http_log, http_send, transport
from trio_layers._registry.client import RegistryClient, open_registry_client
from trio_layers._registry.credentials import Credentials, CredentialsFor
from trio_layers._registry.hosts import parse_url
from trio_layers._registry.http import new_client
from trio_layers._registry.redaction import redact_error, secrets_of, without_secrets
from trio_layers._registry.tls import TLSConfig, make_context
from trio_layers._registry.tokens import Tokens
from trio_layers.testing import BasicAuth, Fault, Raw, Reply, open_registry, sample_image

HOST, TOKENS, M1 = "https://registry.example", "https://tokens.example", "https://m1.example"
STORAGE, EVIL = "https://storage.example", "https://evil.example"
APP = parse_reference("registry.example/team/app:1")
CONTENT = b"content"
BLOB = describe(CONTENT)

# With characters that are escaped in URLs and forms.
PASSWORD = "canary-pa55/+&%word"
IDENTITY, REFRESH = "canary-1dentity+/=", "canary-refre5h"
TOKEN, REGISTRY_TOKEN = "canary-t0ken.x-y_z", "canary-reg1stry.token"
SIGNATURE, COOKIE, HEADER = "canary-s1gnature", "canary-c00kie", "canary-h3ader"


@attrs.frozen
class Way:
    """A way in which requests get secrets.

    Attributes:
        credentials: The credentials of the client.
        scheme: The scheme of the registry's challenge.
        origins: The secrets, passwords with the name, and the origins that may get them.
        offline: Whether the token server issues a refresh token.
        mirror: Whether there is a mirror that gets header fields.
    """

    credentials: Callable[[Home], CredentialsFor]
    scheme: str
    origins: dict[str, set[str]]
    offline: bool = False
    mirror: bool = False


def of_auths(file: str) -> Callable[[Home], CredentialsFor]:
    def prepare(home: Home) -> CredentialsFor:
        path = home.docker_config if file == "docker" else home.auth[0]
        auth = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
        path.write_text(json.dumps({"auths": {"registry.example": {"auth": auth}}}))
        return LoginFiles()

    return prepare


def of_helper(user: str, secret: str, **config: object) -> Callable[[Home], CredentialsFor]:
    def prepare(home: Home) -> CredentialsFor:
        home.docker_config.write_text(json.dumps(config))
        home.add_helper("desk", {"registry.example": [user, secret]})
        return LoginFiles()

    return prepare


USER = Credentials("user", PASSWORD)
BY_BASIC = {f"user:{PASSWORD}": {HOST}}
BY_BEARER = {f"user:{PASSWORD}": {TOKENS}, TOKEN: {HOST}}
BY_POST = {IDENTITY: {TOKENS}, TOKEN: {HOST}}
WAYS = {
    "basic": Way(lambda home: USER, "basic", BY_BASIC),
    "bearer": Way(lambda home: USER, "bearer", BY_BEARER),
    "identity": Way(lambda home: Credentials(identity_token=IDENTITY), "bearer", BY_POST),
    "refresh": Way(lambda home: USER, "bearer", {**BY_BEARER, REFRESH: {TOKENS}}, offline=True),
    "registry-token": Way(
        lambda home: Credentials(registry_token=REGISTRY_TOKEN), "bearer", {REGISTRY_TOKEN: {HOST}}
    ),
    "auths": Way(of_auths("docker"), "bearer", BY_BEARER),
    "podman": Way(of_auths("podman"), "basic", BY_BASIC),
    "credsStore": Way(of_helper("<token>", IDENTITY, credsStore="desk"), "bearer", BY_POST),
    "credHelpers": Way(
        of_helper("user", PASSWORD, credHelpers={"registry.example": "desk"}), "basic", BY_BASIC
    ),
    "mirror": Way(lambda home: USER, "basic", {**BY_BASIC, HEADER: {M1}}, mirror=True),
}
# Failures at the registry after the login, or at the token server.
TROUBLE = (
    "none",
    *("401", "403", "404", "429", "500", "503"),
    "cookie",
    *("redirect", "redirect-port", "redirect-login", "redirect-back", "redirect-plain"),
    *("storage-500", "storage-401", "storage-refuses", "storage-breaks", "storage-loop"),
    *("broken-fields", "broken-location"),
)
TOKEN_TROUBLE = (
    *("tokens-401", "tokens-403", "tokens-429", "tokens-500"),
    *("tokens-redirect", "tokens-bad", "tokens-refuse"),
    *("realm-plain", "realm-login", "realm-elsewhere"),
)
FINE = (
    *("none", "cookie", "redirect", "redirect-port", "redirect-login", "redirect-back"),
    *("tokens-redirect", "realm-login"),
)


def redirect(location: str) -> httpx.Response:
    return httpx.Response(307, headers={"Location": location})


def content(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, stream=Body([CONTENT]))


def echo(status: int, request: httpx.Request) -> httpx.Response:
    """Answer with all that the request contained."""
    came = [str(request.url), *request.headers.values(), request.content.decode()]
    came += [value for values in parse_qs(request.content.decode()).values() for value in values]
    _, _, encoded = request.headers.get("Authorization", "").partition("Basic ")
    came.append(base64.b64decode(encoded).decode())
    error = {"code": came[-1].partition(":")[2] or "DENIED", "message": " <- ".join(came)}
    headers = {"Docker-RateLimit-Source": came[-1], "RateLimit-Limit": "1;w=1"}
    headers |= {"RateLimit-Remaining": "1", "Retry-After": "3600"}
    return httpx.Response(status, headers=headers, json={"errors": [error]})


class World(Network):
    """All servers, with the hostile behaviour that `trouble` names."""

    def __init__(self, way: Way, trouble: str) -> None:
        elsewhere = content if trouble in ("redirect", "redirect-login") else self.elsewhere
        super().__init__(
            **{
                HOST: self.registry,
                TOKENS: self.tokens,
                STORAGE: self.storage,
                EVIL: elsewhere,
                f"{HOST}:8443": content,
                M1: lambda request: echo(500, request),
            }
        )
        self.way, self.trouble = way, trouble
        if trouble == "tokens-refuse":
            del self.hosts[TOKENS]
        elif trouble == "storage-refuses":
            del self.hosts[STORAGE]

    def registry(self, request: httpx.Request) -> httpx.Response:
        authorization = request.headers.get("Authorization", "")
        headers = {"Set-Cookie": f"c={COOKIE}; Domain=example; Path=/"}
        if request.url.path == "/chosen":
            return content(request)
        if not authorization or self.trouble == "401":
            realm = {
                "realm-plain": f"http://user:{SIGNATURE}@tokens.example/token",
                "realm-login": f"https://user:{SIGNATURE}@tokens.example/token",
                "realm-elsewhere": "https://registry.example/token",
            }
            field = f'Bearer realm="{realm.get(self.trouble, TOKENS)}",service="s"'
            headers["WWW-Authenticate"] = field if self.way.scheme == "bearer" else "Basic"
            answer = echo(401, request)
            answer.headers.update(headers)
            return answer
        kind, _, what = self.trouble.partition("-")
        if kind.isdecimal():
            return echo(int(kind), request)
        if kind == "cookie":
            return httpx.Response(307, headers={"Location": f"{STORAGE}/blob", **headers})
        signed = f"/blob?X-Signature={SIGNATURE}&x=1"
        match kind, what:
            case "broken", "fields":
                cause = ValueError(f"illegal header line: bytearray(b'Location: {signed}\x00')")
                error = httpx.RemoteProtocolError(str(cause) + authorization, request=request)
                raise error from ValueError(f"{authorization}\x1b")
            case "broken", "location":
                return redirect(f"https://user:{SIGNATURE}/x@storage.example/blob")
            case "storage", _:
                return redirect(f"{STORAGE}{signed}")
            case "redirect", "port":
                return redirect(f"{HOST}:8443/blob")
            case "redirect", "login":
                return redirect(f"https://user:{SIGNATURE}@evil.example/blob")
            case "redirect", "plain":
                return redirect(f"http://registry.example{signed}")
            case "redirect", _:
                return redirect(f"{EVIL}/blob")
        return content(request)

    def tokens(self, request: httpx.Request) -> httpx.Response:
        _, _, what = self.trouble.partition("tokens-")
        if what.isdecimal():
            return echo(int(what), request)
        if what == "redirect":
            return redirect(f"{EVIL}/token")
        answer = {"token": TOKEN, "expires_in": 300}
        if self.way.offline:
            answer["refresh_token"] = REFRESH
        if what == "bad":
            return httpx.Response(200, content=json.dumps(answer)[:-1])
        return httpx.Response(200, json=answer)

    def storage(self, request: httpx.Request) -> httpx.Response:
        match self.trouble:
            case "storage-500":
                return echo(500, request)
            case "storage-401":
                field = f'Bearer realm="{EVIL}/token"'
                return httpx.Response(401, headers={"WWW-Authenticate": field})
            case "storage-breaks":
                error = httpx.ReadError("gone", request=request)
                return httpx.Response(200, stream=Body([CONTENT[:2]], error))
            case "storage-loop":
                return redirect(str(request.url))
        return content(request)

    def elsewhere(self, request: httpx.Request) -> httpx.Response:
        if self.trouble == "redirect-back":
            return redirect(f"{HOST}/chosen")
        return httpx.Response(200, json={"token": "of-somebody-else"})


async def fetch(client: RegistryClient) -> None:
    await client.fetch_blob(APP, BLOB, MemorySink(), progress=Report())


async def play(
    way: Way, trouble: str, home: Home, canaries: Canaries, clock: MockClock, tmp_path: Path
) -> None:
    """Fetch a blob twice, with an expired token the second time; then check all output."""
    canaries.add(*way.origins, f"user:{SIGNATURE}", COOKIE)
    world = World(way, trouble)
    hosts = None
    if way.mirror:
        hosts = tmp_path / "hosts"
        (hosts / APP.domain).mkdir(parents=True)
        fields = f'{{ X-Key = "{HEADER}", Authorization = "Bearer {HEADER}" }}'
        text = f'[host."{M1}"]\nheader = {fields}\n'
        (hosts / APP.domain / "hosts.toml").write_text(text)
    http = world.client()
    if trouble == "cookie":
        http = new_client(make_context(TLSConfig()), max_connections=20)
        http._transport, http._mounts = world, {}
    errors: list[LayersError] = []
    credentials = way.credentials(home)
    async with (
        http,
        open_registry_client(client=http, credentials=credentials, hosts_dir=hosts) as client,
    ):
        for _ in range(2):
            try:
                await fetch(client)
            except LayersError as error:
                errors.append(error)
            clock.jump(400)
        canaries.check(client, client.rate_limits, credentials, *errors)
        if trouble == "none":
            canaries.check_objects()
    # Unlike a GET, a form with a secret does not follow a redirect, so these requests fail.
    fine = trouble in FINE and not (trouble == "tokens-redirect" and IDENTITY in way.origins)
    assert [str(error) for error in errors if fine] == []
    assert len(errors) == (0 if fine else 2)
    origins = {**way.origins, f"user:{SIGNATURE}": {STORAGE}, COOKIE: set[str]()}
    if trouble == "realm-elsewhere":
        # The registry may be its own token server, and gets all secrets for itself.
        origins = {secret: allowed | {HOST} for secret, allowed in origins.items()}
    canaries.check_origins(world.requests, origins)
    back = [request for request in world.requests if request.url.path == "/chosen"]
    assert bool(back) is (trouble == "redirect-back")
    canaries.check_requests(back)
    canaries.check_requests(each for each in world.requests if each.url.scheme == "http")
    if trouble == "none":
        for secret, allowed in way.origins.items():
            assert canaries.reached(world.requests, secret) == allowed


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    return Home(tmp_path / "home", monkeypatch)


@pytest.fixture
def canaries(caplog: pytest.LogCaptureFixture) -> Canaries:
    return Canaries(caplog)


@pytest.mark.parametrize(
    ("way", "trouble"),
    [
        (name, trouble)
        for name, way in WAYS.items()
        for trouble in (*TROUBLE, *(TOKEN_TROUBLE if TOKEN in way.origins else ()))
    ],
)
async def test_secrets(
    way: str, trouble: str, home: Home, canaries: Canaries, mock_clock: MockClock, tmp_path: Path
) -> None:
    """No server gets a secret that is for another one."""
    await play(WAYS[way], trouble, home, canaries, mock_clock, tmp_path)


LEAKS = {
    "what a server repeats": (transport, "secrets_of", lambda *_: frozenset(), "500"),
    "what a mirror repeats": (transport, "secrets_of", lambda *_: frozenset(), "none"),
    "what a token server repeats": (transport, "secrets_of", lambda *_: frozenset(), "tokens-403"),
    "what a broken answer repeats": (transport, "redact_error", lambda *_: None, "broken-fields"),
    "a part of a broken URL": (transport, "redact_error", lambda *_: None, "broken-location"),
    "a signed URL in a log": (http_send, "discreet", contextlib.nullcontext, "storage-500"),
    "a redirect with a secret": (transport, "origin_of", lambda _: "anybody", "redirect"),
    "one that comes back": (transport, "origin_of", lambda _: "anybody", "redirect-back"),
    "a login in a redirect": (
        *(transport.Transport, "_redirected", lambda self, url, target, what: target),
        "redirect-login",
    ),
    "a redirect to plain HTTP": (
        *(transport.Transport, "_redirected", lambda self, url, target, what: target),
        "redirect-plain",
    ),
    "a login in a realm": (Tokens, "url", lambda self, url, _: parse_url(url), "realm-login"),
    "a realm of plain HTTP": (Tokens, "url", lambda self, url, _: parse_url(url), "realm-plain"),
    "a repr": (Credentials, "__repr__", lambda self: self.password, "none"),
}


@pytest.mark.parametrize("leak", LEAKS)
async def test_leaks_are_seen(
    leak: str,
    home: Home,
    canaries: Canaries,
    mock_clock: MockClock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tests above fail for a client that leaks a secret."""
    where, name, value, trouble = LEAKS[leak]
    way = WAYS["mirror" if "mirror" in leak else "bearer"]
    monkeypatch.setattr(where, name, value)
    with pytest.raises(AssertionError):
        await play(way, trouble, home, canaries, mock_clock, tmp_path)


def planted(how: str, canaries: Canaries) -> None:
    """Leak a secret, or make the checks search where it legitimately is."""
    secret = COOKIE
    log = logging.getLogger("anybody")
    error: Exception = ValueError("harmless")
    match how:
        case "message":
            log.debug("a " + secret)
        case "arguments":
            log.debug("%.3s", secret)
        case "encoded":
            log.debug("Basic %s", base64.b64encode(f"user:{secret}".encode()).decode())
        case "exception of a record":
            try:
                raise ValueError(secret)
            except ValueError:
                log.debug("failed", exc_info=True)
        case "note":
            error.add_note(secret)
        case "cause":
            error.__cause__ = ValueError(secret)
        case "hidden context":
            error.__context__ = UnicodeEncodeError("utf-8", secret, 0, 1, "unfit")
            error.__suppress_context__ = True
        case "group":
            error = ExceptionGroup("several", [error, KeyError(secret)])
        case "attribute":
            error = HostsError("/file", "is none")
            error.path = secret
        case "repr":
            canaries.check(Reply(200, body=secret.encode()))
        case "header":
            canaries.check_requests([httpx.Request("GET", HOST, headers={"X": secret})])
        case "query":
            canaries.check_requests([httpx.Request("GET", HOST, params={"x": secret})])
        case "form":
            canaries.check_requests([httpx.Request("POST", HOST, data={"x": secret})])
        case "origin":
            request = httpx.Request("GET", f"{HOST}:1/{secret}")
            canaries.check_origins([request], {secret: {HOST}})
        case "object":
            kept = Reply(200, body=secret.encode())
            canaries.check_objects()
            assert kept
    canaries.check(error)


@pytest.mark.parametrize(
    "how",
    [
        *("message", "arguments", "encoded", "exception of a record"),
        *("note", "cause", "hidden context", "group", "attribute", "repr", "object"),
        *("header", "query", "form", "origin"),
    ],
)
def test_canaries_are_seen(how: str, canaries: Canaries) -> None:
    """The checks find a secret in any place."""
    canaries.add(f"user:{COOKIE}")
    canaries.check(ValueError("harmless"))
    with pytest.raises(AssertionError):
        planted(how, canaries)


def test_what_a_request_keeps_secret() -> None:
    """Return the secrets of a request, in the forms in which a server may repeat them."""
    pair = base64.b64encode(b"me:pa ss").decode()
    found = secrets_of(
        [("Host", "registry"), ("Authorization", f"Basic {pair}"), ("X-Key", "k3y-value")],
        b"service=registry&scope=repository&refresh_token=a%2Fb+c",
        b"X-Amz-Signature=0123&n=1",
    )
    said = f"registry repository: Basic {pair} me:pa ss 'pa ss' pa%20ss pa+ss k3y-value a/b c 0123"
    assert without_secrets(said, found) == (
        "registry repository: [withheld] [withheld] '[withheld]' [withheld] [withheld] "
        "[withheld] [withheld] [withheld]"
    )
    assert without_secrets("Basic !", secrets_of([("Authorization", "Basic !")])) == "[withheld]"
    assert secrets_of([("X", "a"), ("Y", ""), ("Authorization", "")]) == frozenset()
    assert without_secrets("repeated", frozenset()) == "repeated"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:secret@host/path", "https://…@host/path"),
        ("https://user:sec/r?e#t@host", "https://…@host"),
        ("user:s@cret@host", "…@host"),
        ("https://host:1/path?x#y", "https://host:1/path?x#y"),
    ],
)
def test_urls_without_logins(url: str, shown: str) -> None:
    assert without_login(url) == shown


def test_what_is_cut_is_no_half_secret() -> None:
    """Secrets are removed from a long message before it is cut."""
    secret = "s3cret" * 50
    answer = transport.RegistryResponse(
        *("host", 500, httpx.Headers(), False, None),
        chunks=no_chunks(),
        secrets=lambda: frozenset({secret}),
    )
    shown = answer.printable_line("x" * 550 + secret + "y" * 50)
    assert shown == "x" * 300 + "…"
    assert answer.printable_line("x" * 290 + secret) == "x" * 290 + "[withheld]"
    assert repr(answer) == "RegistryResponse(host='host', status=500, redirected=False)"


async def no_chunks() -> AsyncIterator[bytes]:
    for each in ():
        yield each


# Secrets in files, in the environment, and for a proxy.


@pytest.mark.parametrize(
    "text",
    [
        f'[host."https://user:{SIGNATURE}/x@m1.example"]',
        f'[host."user:{SIGNATURE}@m 1.example"]',
        f'[host."https://user:{SIGNATURE}@m1.example"]\nskip_verify = 1',
        f'host."https://user:{SIGNATURE}@m1.example" = 1',
        f'server = "https://user:{SIGNATURE}/x@m1.example"',
        f'[host."{M1}".header]\nX-Key = "{SIGNATURE}\\u0001"',
        f'[host."{M1}".header]\n"X Key" = "{SIGNATURE}"',
        f'[host."{M1}".header]\nX-Key = ["{SIGNATURE}", 1]',
        f'[host."{M1}".header]\nX-Key = "{SIGNATURE}',
        f'[host."{M1}".header]\nX-Key = "{SIGNATURE}\udcff"',
    ],
)
async def test_a_broken_file_of_hosts(text: str, tmp_path: Path, canaries: Canaries) -> None:
    """The error names the mistake, and quotes nothing of the value."""
    canaries.add(SIGNATURE)
    directory = tmp_path / APP.domain
    directory.mkdir()
    (directory / "hosts.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    async with open_registry_client(hosts_dir=tmp_path) as client:
        with pytest.raises(HostsError) as caught:
            await fetch(client)
        canaries.check(caught.value, client)


def test_a_host_without_a_header_of_its_own(tmp_path: Path, canaries: Canaries) -> None:
    """A warning names the host, but not its login."""
    canaries.add(SIGNATURE)
    directory = tmp_path / APP.domain
    directory.mkdir()
    text = f'host."https://user:{SIGNATURE}@m1.example".capabilities = ["pull"]'
    (directory / "hosts.toml").write_text(text)
    canaries.check(read_configuration(tmp_path, APP.domain))


@pytest.mark.parametrize("kind", ["garbage", "encrypted"])
def test_a_key_that_cannot_be_used(kind: str, tmp_path: Path, canaries: Canaries) -> None:
    """The error names the file, and quotes nothing of it."""
    canaries.add(SIGNATURE)
    header = "ENCRYPTED PRIVATE KEY" if kind == "encrypted" else "PRIVATE KEY"
    body = base64.b64encode(SIGNATURE.encode() * 10).decode()
    file = tmp_path / "client.key"
    file.write_text(f"{SIGNATURE}\n-----BEGIN {header}-----\n{body}\n-----END {header}-----\n")
    trust = TLSConfig(client=((str(file), None),))
    with pytest.raises(HostsError, match=r"client\.key") as caught:
        make_context(trust)
    canaries.check(caught.value, trust)


@pytest.mark.parametrize(
    "proxy",
    [
        f"http://user:{SIGNATURE}/x@proxy.example:3128",
        f"http://user:{SIGNATURE}?x@proxy.example:3128",
        f"http://user:{SIGNATURE}#x@proxy.example:3128",
        f"ftp://user:{SIGNATURE}@proxy.example:3128",
        f"http://user:{SIGNATURE}@[::zz]:3128",
        f"socks4://user:{SIGNATURE}@proxy.example",
    ],
)
async def test_a_proxy_that_cannot_be_used(
    proxy: str, monkeypatch: pytest.MonkeyPatch, canaries: Canaries
) -> None:
    """The error shows neither the password nor the part that httpx takes for the port."""
    canaries.add(f"user:{SIGNATURE}")
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    async with open_registry_client() as client:
        with pytest.raises(NetworkSettingError, match="HTTPS_PROXY") as caught:
            await fetch(client)
    canaries.check(caught.value)


async def test_a_proxy_that_refuses(monkeypatch: pytest.MonkeyPatch, canaries: Canaries) -> None:
    """The proxy's password reaches the proxy only."""
    canaries.add(f"user:{SIGNATURE}")
    heard = bytearray()

    async def refuse(stream: trio.SocketStream) -> None:
        async with stream:
            heard.extend(await stream.receive_some())
            await stream.send_all(b"HTTP/1.1 407 Log in\r\nContent-Length: 0\r\n\r\n")

    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, refuse, 0, host="127.0.0.1")
        [listener] = await nursery.start(serve)
        port = listener.socket.getsockname()[1]
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:{SIGNATURE}@127.0.0.1:{port}")
        async with open_registry_client() as client:
            with pytest.raises(RegistryError, match="407 Log in") as caught:
                await fetch(client)
            canaries.check(caught.value, client)
        nursery.cancel_scope.cancel()
    assert base64.b64encode(f"user:{SIGNATURE}".encode()) in heard


@pytest.mark.parametrize("code", [0xD800, 0xDCFF, 0xE9, 0x0A])
async def test_secrets_that_are_no_text(code: int, canaries: Canaries) -> None:
    """JSON and files may have invalid UTF-8. An encoder's error would quote all of it."""
    canaries.add(COOKIE)
    secret = COOKIE + chr(code)
    for credentials in Credentials("user", secret), Credentials(identity_token=secret):
        world = World(WAYS["bearer"], "none")
        async with (
            world.client() as http,
            open_registry_client(client=http, credentials=credentials) as client,
        ):
            await fetch(client)
            canaries.check(client, credentials)
        [request] = [each for each in world.requests if each.url.host == "tokens.example"]
        sent = request.headers.get("Authorization", "") + request.content.decode()
        assert base64.b64encode(f"user:{COOKIE}".encode())[:-4].decode() in sent or COOKIE in sent


# With sockets: logs of h11 and httpcore, and files of a process.


@pytest.mark.parametrize("broken", [False, True])
async def test_real_connections(broken: bool, canaries: Canaries) -> None:
    """Neither sent nor received bytes are logged."""
    canaries.add(f"user:{PASSWORD}", SIGNATURE, COOKIE)
    async with (
        open_registry(auth=BasicAuth("user", PASSWORD)) as registry,
        open_registry() as storage,
        open_registry_client(credentials=USER, retry_tick=0.001) as client,
    ):
        reference = registry.add(sample_image(), "team/app:1")
        signed = f"{storage.url}/{SIGNATURE}?X-Signature={SIGNATURE}"
        headers = {"Location": signed, "Set-Cookie": f"c={COOKIE}", "X-Other": COOKIE}
        fault: Fault = Reply(307, headers=headers)
        if broken:
            fault = Raw(f"HTTP/1.1 307 X\r\nLocation: {signed}\0{COOKIE}\r\n\r\n".encode())
        registry.inject("/v2/team/app/*", fault, skip=1, times=None)
        said = "illegal header line:$" if broken else f"{storage.host} answered 404"
        with pytest.raises(RegistryError, match=said) as caught:
            await client.resolve_image(reference)
        canaries.check(client, caught.value)
        assert registry.requests[-1].headers["authorization"] == USER.basic()
        if broken:
            return
        asked = storage.requests[-1]
        assert SIGNATURE in asked.path
        assert "authorization" not in asked.headers


async def test_what_is_repeated_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    """Secrets in a realm, in a list of tags, and in the frame of a chunk.

    httpcore logs a frame that it cannot parse.
    """
    caplog.set_level(logging.DEBUG)
    canary = USER.basic()
    assert canary is not None

    async def serve(stream: trio.SocketStream) -> None:
        asked = b""
        while chunk := await stream.receive_some():
            asked += chunk
            if not asked.endswith(b"\r\n\r\n"):
                continue
            sent = canary.encode()
            if sent not in asked:
                answer = b"HTTP/1.1 401 no\r\nWWW-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n"
            elif b"/tags/list" in asked:
                body = json.dumps({"tags": [canary]}).encode()
                answer = b"HTTP/1.1 200 ok\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            elif b"/manifests/" in asked:
                answer = (
                    b'HTTP/1.1 401 no\r\nWWW-Authenticate: Bearer realm="http://auth.test/?%s"\r\n'
                    b"Content-Length: 0\r\n\r\n" % sent
                )
            else:
                answer = b"HTTP/1.1 200 ok\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n" % sent
            asked = b""
            await stream.send_all(answer)

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        reference = f"127.0.0.1:{listener.socket.getsockname()[1]}/team/app"
        async with open_registry_client(credentials=USER) as client:
            assert await client.tags(reference) == ()
            with pytest.raises(RegistryError) as caught:
                await client.get_blob(reference, describe(b"content"))
            with pytest.raises(RegistryError, match=r"auth\.test', which is no HTTPS") as refused:
                await client.get_manifest(reference)
        nursery.cancel_scope.cancel()
    said = "\n".join([*caplog.messages, str(caught.value), str(refused.value)])
    assert "receive_response_body" in said
    assert canary.partition(" ")[2] not in said


def test_what_the_system_says_is_hushed(tmp_path: Path) -> None:
    error = OSError(5, f"{SIGNATURE} \x1b[2J")
    redact_error(error, {SIGNATURE})
    assert str(error) == "[Errno 5] [withheld] [2J"


def test_other_requests_keep_their_log(caplog: pytest.LogCaptureFixture) -> None:
    """Log lines of httpcore for other requests stay as they are."""
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("httpcore.http11").debug("receive_response_headers.complete x=1")
        with http_log.discreet():
            logging.getLogger("httpcore.http11").debug("receive_response_headers.complete x=1")
            logging.getLogger("httpcore.connection").debug("connect_tcp.started host='h'")
    assert caplog.messages == [
        "receive_response_headers.complete x=1",
        "receive_response_headers.complete",
        "connect_tcp.started host='h'",
    ]


@pytest.mark.parametrize("how", ["--creds", "--authfile"])
async def test_the_command_line(how: str, home: Home, tmp_path: Path, canaries: Canaries) -> None:
    """Neither the command's log nor its store contains a secret, whether the pull succeeds or
    fails.
    """
    canaries.add(f"user:{PASSWORD}")
    store = tmp_path / "store"
    async with open_registry(auth=BasicAuth("user", PASSWORD)) as registry:
        references = [registry.add(sample_image(), "team/app:1"), f"{registry.host}/team/app:none"]
        auth = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
        file = tmp_path / "auth.json"
        file.write_text(json.dumps({"auths": {registry.host: {"auth": auth}}}))
        value = str(file) if how == "--authfile" else f"user:{PASSWORD}"
        done = await trio.run_process(
            [sys.executable, "-m", "trio_layers", "pull", "-v", how, value, *references],
            capture_stdout=True,
            capture_stderr=True,
            stdin=subprocess.DEVNULL,
            check=False,
            env={**os.environ, "TRIO_LAYERS_STORE": str(store)},
        )
    assert done.returncode == 1
    assert f"{references[0]} ".encode() in done.stdout
    assert b"answered 404" in done.stderr
    assert canaries.seen((done.stdout + done.stderr).decode()) == []
    files = [path for path in store.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 10
    assert [path for path in files if canaries.seen(path.read_bytes().decode("latin-1"))] == []
    assert any(auth.encode() in str(each.headers).encode() for each in registry.requests)
