"""Challenges, and what answers them.

A registry that wants to know who asks answers 401 with challenges (RFC 9110, 11.6.1). Basic is
answered with the credentials themselves, Bearer with a token from the server that the challenge
names (see `tokens`), which is asked with the credentials, or without any for what everybody may
read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, final

import attrs
import trio

from .._errors import AuthenticationError, CredentialsError
from .._reference import Reference
from .._sharing import Shared
from .credentials import Credentials, CredentialsFor
from .tokens import FIT_FOR_A_HEADER, Grant, Tokens
from .transport import Answer, Transport

__all__ = ["Access", "Authenticator", "Challenge", "parse_challenges"]

# Characters. Real ones are a few hundred long; this many are parsed within 100 ms.
MAX_FIELD_SIZE: Final = 16 * 1024
# Of one request, whatever it was asked for each time. Tasks that renew for one another would have
# no end, or one each.
MAX_REFUSALS: Final = 3


@attrs.frozen
class Challenge:
    """One way to authenticate that a server offers.

    Attributes:
        scheme: In lower case.
        parameters: By their names in lower case.
    """

    scheme: str
    # Of what the server says in them no more than the names is shown.
    parameters: Mapping[str, str] = attrs.field(
        factory=dict, hash=False, repr=lambda names: f"{sorted(names)}"
    )


_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SCHEME = re.compile(rf"({_TOKEN})([ \t]*)")
# The last alternatives are a quoted string without an end, and nothing: they count as empty.
_PARAMETER = re.compile(rf'({_TOKEN})(?:[ \t]*=[ \t]*(?:({_TOKEN})|"((?:[^"\\]|\\.)*)")|=".*\Z|=)')
# Nothing but another challenge may follow.
_TOKEN68 = re.compile(rf"[A-Za-z0-9._~+/-]+=*[ \t]*(?=,|\Z)(?![ \t,]+{_TOKEN}[ \t]*=)")
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
    takes_parameters = False
    position = _end(_LEADING.match(text))
    while position < len(text):
        match = _PARAMETER.match(text, position) if takes_parameters else None
        if match is None:
            # Comma-separated challenges have comma-separated parameters: what is not
            # name=value begins the next challenge.
            scheme = _SCHEME.match(text, position)
            if scheme is None:
                break
            position = scheme.end()
            takes_parameters = bool(scheme[2])
            ends = position == len(text) or text[position] == ","
            if challenges and not takes_parameters and not ends:
                break
            challenges.append((scheme[1].lower(), {}))
            token68 = _TOKEN68.match(text, position)
            if token68 is not None:
                position = token68.end()
            else:
                match = _PARAMETER.match(text, position)
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


@final
@attrs.define(eq=False)
class _Repository:
    """What is known of a repository: what its registry asks, and who asks it."""

    challenge: Challenge | None = None
    login: Shared[Credentials] = attrs.field(factory=Shared[Credentials])


@final
class Authenticator:
    """Remembers how each repository's registry wants to be asked, by whom, and with what."""

    def __init__(self, transport: Transport, credentials: CredentialsFor | None) -> None:
        self.tokens = Tokens(transport)
        self._credentials = credentials
        self._repositories: dict[tuple[str, str], _Repository] = {}

    def __repr__(self) -> str:
        return f"<Authenticator: {len(self.tokens)} tokens>"

    def access(self, reference: Reference) -> Access:
        """Begin a request for something of the reference's repository."""
        key = reference.domain, reference.path
        known = self._repositories.setdefault(key, _Repository())
        return Access(self, reference, known)

    async def login(
        self, reference: Reference, known: _Repository, refused: Credentials | None = None
    ) -> Credentials:
        """Who asks for a repository; empty: anybody. Those who want to know it at the same time
        wait for the one that finds out.

        Args:
            reference: In whose repository.
            known: What is known of it, which remembers the answer.
            refused: What the registry did not take: a new answer is looked for.
        """
        there = self._credentials
        if there is None or isinstance(there, Credentials):
            await trio.lowlevel.checkpoint()
            return there or _NOBODY
        if isinstance(there, Mapping):
            await trio.lowlevel.checkpoint()
            return there.get(reference.domain, _NOBODY)
        source = there

        async def ask() -> Credentials:
            return await source(reference.name, refused) or _NOBODY

        return await known.login.get(lambda value: value != refused, ask)


@final
class Access:
    """One request's way past its registry: what is sent, and what to do if that is refused.

    It ends: what a registry refuses is renewed once, and after `MAX_REFUSALS` its word stands.
    """

    def __init__(
        self, authenticator: Authenticator, reference: Reference, known: _Repository
    ) -> None:
        self._authenticator = authenticator
        self._reference = reference
        self._known = known
        self._credentials = _NOBODY
        self._sent: str | None = None
        self._refusals = 0
        self._renewed = False

    async def authorization(self) -> str | None:
        """What to send; ``None``: nothing, as far as is known.

        Waits for credentials and a token if they are needed.

        Raises:
            AuthenticationError: if the token server refuses.
            RegistryError: if there is no token for another reason.
            CredentialsError: if the source of the credentials cannot tell.
        """
        challenge = self._known.challenge
        if challenge is None:
            await trio.lowlevel.checkpoint()
            return None
        self._credentials = await self._authenticator.login(self._reference, self._known)
        if challenge.scheme == "basic":
            self._sent = self._credentials.basic()
        else:
            self._sent = f"Bearer {await self._token(challenge)}"
        return self._sent

    async def refused(self, answer: Answer) -> bool:
        """Learn from a 401; whether asking again may help.

        Args:
            answer: The registry's own, not that of a host it redirects to. It may be closed.

        Raises:
            CredentialsError: as for `authorization`.
        """
        self._refusals += 1
        if self._refusals >= MAX_REFUSALS:
            await trio.lowlevel.checkpoint()
            return False
        challenges = parse_challenges(answer.headers.get_list("WWW-Authenticate"))
        bearer = (each for each in challenges if each.scheme == "bearer")
        challenge = next((each for each in bearer if "realm" in each.parameters), None)
        if challenge is not None:
            self._known.challenge = challenge
            scheme, _, sent = (self._sent or "").partition(" ")
            if scheme != "Bearer":
                await trio.lowlevel.checkpoint()
                return True
            if sent == self._credentials.registry_token:
                return await self._renew()
            self._authenticator.tokens.drop(self._grant(challenge), sent)
            await trio.lowlevel.checkpoint()
            return self._refusals == 1
        challenge = next((each for each in challenges if each.scheme == "basic"), None)
        if challenge is None:
            await trio.lowlevel.checkpoint()
            return False
        self._known.challenge = challenge
        self._credentials = await self._authenticator.login(self._reference, self._known)
        value = self._credentials.basic()
        if value is None or value != self._sent:
            return value is not None
        return await self._renew() and self._credentials.basic() is not None

    async def _token(self, challenge: Challenge) -> str:
        registry_token = self._credentials.registry_token
        if registry_token:
            if FIT_FOR_A_HEADER.match(registry_token) is None:
                # What would refuse it otherwise also shows it.
                domain = self._reference.domain
                raise CredentialsError(
                    f"the registry token for {domain} is none: it has characters that cannot be "
                    "sent",
                    source=domain,
                )
            return registry_token
        tokens = self._authenticator.tokens
        tokens.url(challenge.parameters["realm"], self._reference)
        try:
            return await tokens.get(self._grant(challenge), self._reference)
        except AuthenticationError as error:
            if error.status != 401 or not await self._renew():
                raise
        return await self._token(challenge)

    async def _renew(self) -> bool:
        """Ask for other credentials in place of those that were refused; whether there are."""
        refused, renewed = self._credentials, self._renewed
        self._renewed = True
        if not refused or renewed:
            return False
        login = self._authenticator.login
        self._credentials = await login(self._reference, self._known, refused)
        return self._credentials != refused

    def _grant(self, challenge: Challenge) -> Grant:
        parameters = challenge.parameters
        return Grant(
            parameters["realm"],
            parameters.get("service", ""),
            parameters.get("scope") or f"repository:{self._reference.path}:pull",
            self._credentials,
        )


_NOBODY: Final = Credentials()
