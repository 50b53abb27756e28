"""Authentication of the embedded registry: Basic, and bearer tokens.

It follows RFC 7617, RFC 6750, and the token protocol of ``distribution/docs/spec/auth``.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterable
from typing import TypeAlias, final
from urllib.parse import parse_qs

import attrs

from ._http import Answer, Blob, Request, error_answer

__all__ = ["Auth", "BasicAuth", "Gate", "TokenAuth"]

TOKEN_PATH = "/token"
SERVICE = "trio-layers-testing"


@attrs.frozen
class BasicAuth:
    """Requires this user name and password for every request."""

    username: str
    password: str = attrs.field(repr=False)


@attrs.frozen
class TokenAuth:
    """Requires a token from ``/token`` of the same registry for every request.

    Attributes:
        username: The user name for getting a token; ``None`` gives a token to any client.
        password: The password for getting a token.
        expires_in: The lifetime of a token, in seconds of trio's time.
    """

    username: str | None = None
    password: str | None = attrs.field(default=None, repr=False)
    expires_in: int = attrs.field(default=300, kw_only=True)


Auth: TypeAlias = BasicAuth | TokenAuth


@attrs.frozen
class _Grant:
    scopes: frozenset[str]
    expires_at: float


@final
class Gate:
    """Checks the credentials of requests, and issues tokens.

    Attributes:
        tokens_issued: The number of issued tokens.
    """

    def __init__(self, auth: Auth | None) -> None:
        self._auth = auth
        self._grants: dict[str, _Grant] = {}
        self._refresh_tokens: set[str] = set()
        self.tokens_issued = 0

    def revoke_tokens(self) -> None:
        """Make all issued tokens invalid."""
        self._grants.clear()
        self._refresh_tokens.clear()

    def check(self, request: Request, repository: str | None, now: float) -> Answer | None:
        """Return the answer that refuses a request; ``None`` if it is allowed.

        Args:
            request: The request.
            repository: The repository to pull from, if any.
            now: The time, in trio's time.
        """
        match self._auth:
            case None:
                return None
            case BasicAuth(username, password):
                if _basic_credentials(request) == (username, password):
                    return None
                return _unauthorized('Basic realm="trio-layers-testing"')
            case TokenAuth():
                return self._check_token(request, repository, now)

    def _check_token(self, request: Request, repository: str | None, now: float) -> Answer | None:
        scope = f"repository:{repository}:pull" if repository else None
        challenge = f'Bearer realm="{request.origin}{TOKEN_PATH}",service="{SERVICE}"'
        if scope:
            challenge += f',scope="{scope}"'
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            return _unauthorized(challenge)
        grant = self._grants.get(token)
        if grant is None or now >= grant.expires_at:
            return _unauthorized(challenge + ',error="invalid_token"')
        if scope and scope not in grant.scopes:
            return _unauthorized(challenge + ',error="insufficient_scope"')
        return None

    def issue(self, request: Request, now: float) -> Answer | None:
        """Answer a request for a token: GET, or POST as in OAuth2.

        Returns:
            The answer; ``None`` if this registry has no tokens.
        """
        auth = self._auth
        if not isinstance(auth, TokenAuth):
            return None
        if request.method == "POST":
            form = parse_qs(request.body.decode("utf-8", "replace"))
            credentials = (form.get("username", [""])[0], form.get("password", [""])[0])
            allowed = auth.username is None or credentials == (auth.username, auth.password)
            if form.get("grant_type") == ["refresh_token"]:
                allowed = form.get("refresh_token", [""])[0] in self._refresh_tokens
            offline = form.get("access_type") == ["offline"]
        else:
            form = parse_qs(request.query)
            given = _basic_credentials(request)
            allowed = auth.username is None or given == (auth.username, auth.password)
            offline = form.get("offline_token") == ["true"]
        if not allowed:
            return error_answer(401, "UNAUTHORIZED", "incorrect username or password")
        scopes = frozenset(_single_actions(" ".join(form.get("scope", [])).split()))
        token = secrets.token_urlsafe(16)
        self._grants[token] = _Grant(scopes, now + auth.expires_in)
        self.tokens_issued += 1
        document: dict[str, str | int] = {
            "token": token,
            "access_token": token,
            "expires_in": auth.expires_in,
        }
        if offline:
            document["refresh_token"] = secrets.token_urlsafe(16)
            self._refresh_tokens.add(str(document["refresh_token"]))
        body = json.dumps(document).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        return Answer(status=200, headers=headers, blob=Blob(body, len(body)), stop=len(body))


def _unauthorized(challenge: str) -> Answer:
    headers = {"WWW-Authenticate": challenge}
    return error_answer(401, "UNAUTHORIZED", "authentication required", headers)


def _basic_credentials(request: Request) -> tuple[str, str] | None:
    kind, _, encoded = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return None
    try:
        username, _, password = base64.b64decode(encoded).decode().partition(":")
    except ValueError:  # the header is not base64, or not UTF-8 inside
        return None
    return username, password


def _single_actions(scopes: Iterable[str]) -> Iterable[str]:
    """Split ``repository:demo:pull,push`` into one scope for each action."""
    for scope in scopes:
        resource, _, actions = scope.rpartition(":")
        for action in actions.split(","):
            yield f"{resource}:{action}"
