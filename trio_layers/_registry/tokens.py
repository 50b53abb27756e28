"""Tokens: their servers, purposes and lifetimes.

A Bearer challenge names a server. A GET to it carries a name and a password, or nothing
(distribution's ``spec/auth/token.md``). A POST carries a refresh token (``spec/auth/oauth.md``),
which docker's login files call an identity token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Final, TypeGuard, final

import attrs
import trio

from .._errors import AuthenticationError, RegistryError
from .._json import parse_json
from .._printable import printable_line, without_login
from .._reference import Reference
from .._single_flight import SingleFlight
from .credentials import Credentials
from .encoding import looks_like_json, read_fitting
from .error_responses import mark_final, read_error
from .hosts import base_urls, parse_url
from .http import URL, InvalidURL
from .transport import Transport

__all__ = ["FIT_FOR_A_HEADER", "Grant", "Tokens"]

MAX_TOKEN_SIZE: Final = 1024 * 1024
# Larger answers are decoded in a thread, to keep the event loop responsive.
INLINE_SIZE: Final = 16 * 1024
# The specification's default. For the sake of old clients, it is also the least that servers may
# give.
MIN_TOKEN_LIFETIME: Final = 60.0
# A token with a longer lifetime is still renewed after this time.
MAX_TOKEN_LIFETIME: Final = 24 * 60 * 60.0
# A token that expires while a request is on its way is useless.
EXPIRY_MARGIN: Final = 5.0
MAX_TOKENS: Final = 1000
CLIENT_ID: Final = "trio-layers"

FIT_FOR_A_HEADER: Final = re.compile(r"[\x21-\x7e]+\Z")

_NO_OAUTH: Final = (400, 401, 404, 405)
"""The statuses of servers without POST; containerd has found each of them."""


@attrs.frozen
class Grant:
    """The purpose of a token; one token is kept for each purpose.

    Attributes:
        realm: The URL of the server that issues it.
        service: The service that accepts it.
        scope: The permission: one or several, with spaces between.
        credentials: The credentials of the user; empty means anonymous.
    """

    realm: str = attrs.field(repr=without_login)
    service: str
    scope: str
    credentials: Credentials


@attrs.frozen
class _Token:
    value: str = attrs.field(repr=False)
    expires: float
    refresh: str | None = attrs.field(default=None, repr=False)

    def valid(self) -> bool:
        return trio.current_time() < self.expires


@final
class Tokens:
    """Gets tokens, and keeps them until they expire."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._tokens: dict[Grant, SingleFlight[_Token]] = {}
        # The key is realm, service and credentials, since a refresh token is valid for any scope.
        self._refresh: dict[Grant, str] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    async def get(self, grant: Grant, reference: Reference) -> str:
        """Return a token that is valid for some seconds at least.

        One request serves all tasks that wait meanwhile, also if it fails.

        Args:
            grant: The purpose of the token.
            reference: The reference, for errors, and to decide whether the server must speak TLS.

        Raises:
            AuthenticationError: if the server refuses.
            RegistryError: if there is no token for another reason.
        """
        fetch = partial(self._fetch, grant, reference)
        token = await self._kept(grant).get(_Token.valid, fetch)
        return token.value

    def drop(self, grant: Grant, value: str) -> None:
        """Forget a token that was refused."""
        kept = self._kept(grant)
        # Another task may have replaced it already.
        if kept.value is not None and kept.value.value == value:
            kept.value = None

    def url(self, realm: str, reference: Reference) -> URL:
        """Return the server's URL.

        Credentials and tokens travel there, so it must be HTTPS if the registry's must be.

        Raises:
            AuthenticationError: if it is not.
        """
        # Only the host is shown, because a server may repeat secrets of the request.
        shown = "a URL that is none"
        try:
            url = parse_url(realm)
            if url.host:
                shown = f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}"
            # httpx would send this login in place of our credentials.
            url = url.copy_with(username=None, password=None)
        except InvalidURL:
            url = URL()
        registry = base_urls(reference, plain_http=False)[0]
        if not url.host or not self._transport.allows(url, registry):
            raise mark_final(
                AuthenticationError(
                    f"{reference.domain} wants a token from {printable_line(shown)!r}, which is no "
                    "HTTPS URL",
                    host=reference.domain,
                    status=401,
                )
            )
        return url

    def _kept(self, grant: Grant) -> SingleFlight[_Token]:
        # This block has no await, so that a new token is not dropped before its use.
        kept = self._tokens.get(grant)
        if kept is None:
            if len(self._tokens) >= MAX_TOKENS:
                self._tokens = {
                    grant: kept
                    for grant, kept in self._tokens.items()
                    if kept.busy or (kept.value is not None and kept.value.valid())
                }
            kept = self._tokens[grant] = SingleFlight()
        return kept

    async def _fetch(self, grant: Grant, reference: Reference) -> _Token:
        anywhere = attrs.evolve(grant, scope="")
        tried: set[str] = set()
        while True:
            refresh = self._refresh.get(anywhere) or grant.credentials.identity_token
            if not refresh or refresh in tried:
                token = await self._ask(grant, reference)
                break
            tried.add(refresh)
            try:
                token = await self._ask(grant, reference, refresh)
                break
            except RegistryError as error:
                if error.status not in _NO_OAUTH:
                    raise
            # A refresh token may be valid once only. Then another task has the next one.
            if self._refresh.get(anywhere) == refresh:
                del self._refresh[anywhere]
        if token.refresh is not None and grant.credentials:
            if len(self._refresh) >= MAX_TOKENS:
                self._refresh.clear()
            self._refresh[anywhere] = token.refresh
        return token

    async def _ask(self, grant: Grant, reference: Reference, refresh: str | None = None) -> _Token:
        url = self.url(grant.realm, reference)
        subject = f"a token to pull {reference.name}"
        service = {"service": grant.service} if grant.service else {}
        scopes = grant.scope.split()
        if refresh is None:
            parameters = [*url.params.multi_items(), *service.items()]
            parameters += [("scope", scope) for scope in scopes]
            try:
                url = url.copy_with(params=parameters)
            except InvalidURL:
                error = mark_final(
                    AuthenticationError(
                        f"{reference.domain} wants a token for more than a URL can hold",
                        host=reference.domain,
                        status=401,
                    )
                )
                raise error from error.__cause__
            asking = self._transport.get(url, subject, authorization=_basic(grant.credentials))
        else:
            form = {
                "grant_type": "refresh_token",
                "client_id": CLIENT_ID,
                **service,
                "scope": " ".join(scopes),
                "refresh_token": refresh,
            }
            asking = self._transport.post(url, subject, form=form)
        began = trio.current_time()
        async with asking as answer:
            if answer.status != 200:
                raise await read_error(answer, subject)
            body = await read_fitting(answer, MAX_TOKEN_SIZE, looks_like_json)
        if len(body) <= INLINE_SIZE:
            token = _decode_token(body, began)
        else:
            token = await trio.to_thread.run_sync(_decode_token, body, began)
        if token is None:
            # Nothing of the response is shown: it may be a part of a token.
            raise RegistryError(
                f"{answer.host} gave no valid token to pull {reference.name}",
                host=answer.host,
                status=200,
            )
        return token


def _basic(credentials: Credentials) -> str | None:
    """Return the Authorization field of a GET.

    Servers without POST accept an identity token as a password.
    """
    if credentials.identity_token and not credentials.password:
        return Credentials(credentials.username, credentials.identity_token).basic()
    return credentials.basic()


def _decode_token(body: bytes, began: float) -> _Token | None:
    document: object = None
    if len(body) <= MAX_TOKEN_SIZE:
        try:
            document = parse_json(body, nonfinite=True)
        except ValueError:
            pass
    if not isinstance(document, Mapping):
        return None
    token = document.get("token") or document.get("access_token")
    refresh = document.get("refresh_token")
    lifetime = document.get("expires_in")
    # "not x > y" also catches NaN, because comparisons with NaN are false.
    if not isinstance(lifetime, int | float) or not lifetime > MIN_TOKEN_LIFETIME:
        lifetime = MIN_TOKEN_LIFETIME
    if not _fit(token):
        return None
    expires = began + float(min(lifetime, MAX_TOKEN_LIFETIME)) - EXPIRY_MARGIN
    return _Token(token, expires, refresh if _fit(refresh) else None)


def _fit(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and FIT_FOR_A_HEADER.match(value) is not None
