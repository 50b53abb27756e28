"""Credentials, challenges and tokens.

A registry that wants to know who asks answers 401 with challenges (RFC 9110, 11.6.1). Basic is
answered with the credentials themselves, Bearer with a token from the server that the challenge
names (distribution's ``spec/auth/token.md``), which is asked with the credentials, or without
any for what everybody may read.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias, final

import attrs
import httpx
import trio

from .._errors import AuthenticationError, LayersError, RegistryError
from .._reference import Reference
from .answers import give_up, read_error, readable
from .hosts import base_urls, is_loopback, parse_url
from .transport import Answer, Transport

__all__ = ["Authenticator", "Challenge", "Credentials", "CredentialsFor", "parse_challenges"]

MAX_TOKEN_SIZE: Final = 1024 * 1024
# The specification's default, and the least that it has servers give, for old clients' sake.
MIN_TOKEN_LIFETIME: Final = 60.0
# One that is good for longer is asked for again all the same.
MAX_TOKEN_LIFETIME: Final = 24 * 60 * 60.0
# A token that would end while a request is on its way is of no use.
EXPIRY_MARGIN: Final = 5.0
MAX_TOKENS: Final = 1000
# Characters. Real ones are a few hundred long; this many are parsed within 100 ms.
MAX_FIELD_SIZE: Final = 16 * 1024


@attrs.frozen
class Credentials:
    """A name and its password, or the access token that a registry takes for one.

    Attributes:
        username: The name.
        password: The secret. It is in no repr.
    """

    username: str
    password: str = attrs.field(repr=False)

    def basic(self) -> str:
        """The value of a header field that proves it (RFC 7617)."""
        pair = f"{self.username}:{self.password}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"


CredentialsFor: TypeAlias = Credentials | Mapping[str, Credentials]
"""Credentials for every registry that is asked, or for each its own: by the domain that the
references name, such as ``docker.io`` or ``registry.example.com:5000``."""


@attrs.frozen
class Challenge:
    """One way to authenticate that a server offers.

    Attributes:
        scheme: In lower case.
        parameters: By their names in lower case.
    """

    scheme: str
    parameters: Mapping[str, str] = attrs.field(factory=dict, hash=False)


_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SCHEME = re.compile(rf"({_TOKEN})(?:[ \t]+|(?=,)|\Z)")
# The last alternative is a quoted string without an end: it counts as empty.
_PARAMETER = re.compile(rf'({_TOKEN})[ \t]*=[ \t]*(?:({_TOKEN})|"((?:[^"\\]|\\.)*)"|".*\Z)')
_TOKEN68 = re.compile(r"[A-Za-z0-9._~+/-]+=*[ \t]*(?=,|\Z)")
_SEPARATORS = re.compile(r"[ \t]*(?:,[ \t]*)+|[ \t]*\Z")
_LEADING = re.compile(r"[ \t,]*")


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """The challenges of a response's WWW-Authenticate fields, in their order.

    A field may hold several (RFC 9110, 11.6.1). Where one breaks the grammar the rest of that
    field is left out, and what came before it stands. So is what exceeds `MAX_FIELD_SIZE`.
    """
    return [challenge for header in headers for challenge in _parse_field(header[:MAX_FIELD_SIZE])]


def _parse_field(text: str) -> list[Challenge]:
    challenges: list[tuple[str, dict[str, str]]] = []
    position = _end(_LEADING.match(text))
    while position < len(text):
        match = _PARAMETER.match(text, position) if challenges else None
        if match is None:
            # Comma-separated challenges have comma-separated parameters: what is not
            # name=value begins the next challenge.
            scheme = _SCHEME.match(text, position)
            if scheme is None:
                break
            challenges.append((scheme[1].lower(), {}))
            position = scheme.end()
            match = _PARAMETER.match(text, position)
            token68 = _TOKEN68.match(text, position)
            if token68 is not None and match is None:
                position = token68.end()
        if match is not None:
            value = match[2] or re.sub(r"\\(.)", r"\1", match[3] or "")
            challenges[-1][1][match[1].lower()] = value
            position = match.end()
        separators = _SEPARATORS.match(text, position)
        if separators is None:
            break
        position = separators.end()
    return [Challenge(scheme, parameters) for scheme, parameters in challenges]


def _end(match: re.Match[str] | None) -> int:
    return 0 if match is None else match.end()


@attrs.frozen
class _Grant:
    """What a Bearer challenge asks for: tokens are kept for each."""

    realm: str
    service: str
    scope: str
    credentials: Credentials | None


@final
@attrs.define(eq=False)
class _Token:
    """A token, once there is one; whoever holds the lock fetches it, the others wait and look."""

    lock: trio.Lock = attrs.field(factory=trio.Lock)
    value: str | None = attrs.field(default=None, repr=False)
    expires: float = 0.0
    failures: int = 0
    error: LayersError | None = None

    def valid(self) -> str | None:
        return self.value if trio.current_time() < self.expires else None


@final
class Authenticator:
    """Remembers how each repository's registry wants to be asked, and the tokens that were got."""

    def __init__(
        self, transport: Transport, credentials: CredentialsFor | None, *, plain_http: bool
    ) -> None:
        self._transport = transport
        self._credentials = credentials
        self._plain_http = plain_http
        self._challenges: dict[tuple[str, str], Challenge] = {}
        self._tokens: dict[_Grant, _Token] = {}

    def __repr__(self) -> str:
        return f"<Authenticator: {len(self._tokens)} tokens>"

    async def authorization(self, reference: Reference) -> str | None:
        """What to send with a request for the reference's repository; ``None``: nothing, as
        far as is known.

        Waits for a token if one is needed. One request serves all who wait meanwhile, also if it
        fails. If the task that makes it is cancelled, another one of them makes it.

        Raises:
            AuthenticationError: if the token server refuses.
            RegistryError: if there is no token for another reason.
        """
        challenge = self._challenges.get(_repository(reference))
        credentials = self._credentials_for(reference)
        if challenge is None:
            await trio.lowlevel.checkpoint()
            return None
        if challenge.scheme == "basic":
            await trio.lowlevel.checkpoint()
            return _basic(credentials)
        grant = self._grant(challenge, reference, credentials)
        token = self._token(grant)
        failures = token.failures
        async with token.lock:
            value = token.valid()
            if value is not None:
                return f"Bearer {value}"
            if token.error is not None and token.failures != failures:
                # Whoever held the lock asked for all who waited for it.
                raise token.error._again() from token.error
            try:
                value, token.expires = await self._fetch(grant, reference)
            except LayersError as error:
                token.failures += 1
                token.error = error
                raise
            token.value, token.error = value, None
            return f"Bearer {value}"

    def refused(self, reference: Reference, answer: Answer, sent: str | None) -> bool:
        """Learn from a 401; whether asking again may help.

        Args:
            reference: What was asked for.
            answer: The registry's own, not that of a host it redirects to.
            sent: What was sent; if it is a token it is not used any more.
        """
        challenges = parse_challenges(answer.headers.get_list("WWW-Authenticate"))
        credentials = self._credentials_for(reference)
        challenge = next(
            (each for each in challenges if each.scheme == "bearer" and "realm" in each.parameters),
            None,
        )
        if challenge is None and credentials is not None and sent != credentials.basic():
            challenge = next((each for each in challenges if each.scheme == "basic"), None)
        if challenge is None:
            return False
        self._challenges[_repository(reference)] = challenge
        if challenge.scheme == "bearer":
            token = self._token(self._grant(challenge, reference, credentials))
            # Another task may have replaced it already.
            if sent == f"Bearer {token.value}":
                token.value, token.expires = None, 0.0
        return True

    def _credentials_for(self, reference: Reference) -> Credentials | None:
        if isinstance(self._credentials, Mapping):
            return self._credentials.get(reference.domain)
        return self._credentials

    def _grant(
        self, challenge: Challenge, reference: Reference, credentials: Credentials | None
    ) -> _Grant:
        parameters = challenge.parameters
        return _Grant(
            parameters["realm"],
            parameters.get("service", ""),
            parameters.get("scope") or f"repository:{reference.path}:pull",
            credentials,
        )

    def _token(self, grant: _Grant) -> _Token:
        # Nothing is awaited here: a token that nobody uses yet must not be dropped.
        token = self._tokens.get(grant)
        if token is None:
            if len(self._tokens) >= MAX_TOKENS:
                self._tokens = {
                    grant: token
                    for grant, token in self._tokens.items()
                    if token.valid() or token.lock.locked()
                }
            token = self._tokens[grant] = _Token()
        return token

    async def _fetch(self, grant: _Grant, reference: Reference) -> tuple[str, float]:
        """A new token, and when it expires, by trio's clock."""
        url = self._realm(grant.realm, reference)
        query = [("service", grant.service)] if grant.service else []
        query += [("scope", scope) for scope in grant.scope.split()]
        url = url.copy_with(params=[*url.params.multi_items(), *query])
        began = trio.current_time()
        what = f"a token to pull {reference.name}"
        async with self._transport.get(
            url, what, authorization=_basic(grant.credentials)
        ) as answer:
            if answer.status != 200:
                raise await read_error(answer, what)
            body = await answer.read(MAX_TOKEN_SIZE)
        value, lifetime = _decode_token(body, answer.host, reference)
        return value, began + lifetime - EXPIRY_MARGIN

    def _realm(self, realm: str, reference: Reference) -> httpx.URL:
        """The token server's URL: credentials and tokens travel there, so it has to be HTTPS
        where the registry has to be."""
        try:
            url = parse_url(realm)
        except httpx.InvalidURL:
            url = httpx.URL()
        # A registry elsewhere has no business with what listens on this machine.
        local = is_loopback(url) and is_loopback(base_urls(reference, plain_http=False)[0])
        plain = url.scheme == "http" and (self._plain_http or local)
        if not url.host or not (url.scheme == "https" or plain):
            raise give_up(
                AuthenticationError(
                    f"{reference.domain} wants a token from {readable(realm)!r}, which is no "
                    "HTTPS URL",
                    host=reference.domain,
                    status=401,
                )
            )
        return url


def _basic(credentials: Credentials | None) -> str | None:
    return None if credentials is None else credentials.basic()


def _repository(reference: Reference) -> tuple[str, str]:
    return reference.domain, reference.path


_FIT_FOR_A_HEADER = re.compile(r"[\x21-\x7e]+\Z")


def _decode_token(body: bytes, host: str, reference: Reference) -> tuple[str, float]:
    """A token, and for how many seconds it is good."""
    document: object = None
    if len(body) <= MAX_TOKEN_SIZE:
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            pass
    if isinstance(document, dict):
        token = document.get("token") or document.get("access_token")
        lifetime = document.get("expires_in")
        # Not a number, which json.loads() takes for one, is not greater either.
        if not isinstance(lifetime, int | float) or not lifetime > MIN_TOKEN_LIFETIME:
            lifetime = MIN_TOKEN_LIFETIME
        if isinstance(token, str) and _FIT_FOR_A_HEADER.match(token):
            return token, float(min(lifetime, MAX_TOKEN_LIFETIME))
    # Not even the beginning of what came is shown: it may be half a token.
    raise RegistryError(
        f"{host} gave no valid token to pull {reference.name}", host=host, status=200
    )
