"""Challenges of registries, and the responses to them.

A registry that wants credentials answers 401 with challenges (RFC 9110, 11.6.1). The response to
Basic is the credentials themselves. The response to Bearer is a token from the server that the
challenge names (see `tokens`), requested with the credentials, or without any for public
repositories.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final, TypeAlias, final

import attrs
import trio

from .._errors import AuthenticationError, CredentialsError
from .._reference import Reference
from .._single_flight import SingleFlight
from .credentials import Credentials, CredentialsFor
from .hosts import domain_of, origin_of
from .http import URL
from .response import RegistryResponse
from .tokens import FIT_FOR_A_HEADER, Grant, Tokens
from .transport import Transport

__all__ = ["Access", "Authenticator", "Challenge", "RedirectedAccess", "parse_challenges"]

# Characters. Real fields have a few hundred; this many are parsed within 100 ms.
MAX_FIELD_SIZE: Final = 16 * 1024
# The maximum number of refusals of one request. Without it, tasks that renew each other's
# credentials might never end.
MAX_REFUSALS: Final = 3
MAX_REPOSITORIES: Final = 1000


@attrs.frozen
class Challenge:
    """One way to authenticate that a server offers.

    Attributes:
        scheme: In lower case.
        parameters: By their names in lower case.
    """

    scheme: str
    # Only the names of the challenges are shown, not their parameters.
    parameters: Mapping[str, str] = attrs.field(
        factory=dict, hash=False, repr=lambda names: f"{sorted(names)}"
    )


_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# RFC 9110, 5.6.3 allows spaces and tabs only, but some servers send other white space.
_SCHEME = re.compile(rf"({_TOKEN})(\s*)")
# The last alternatives are a quoted string without an end, and nothing: they count as empty.
_PARAMETER = re.compile(rf'({_TOKEN})(?:\s*=\s*(?:({_TOKEN})|"((?:[^"\\]|\\.)*)")|=".*\Z|=)')
# Nothing but another challenge may follow.
_TOKEN68 = re.compile(rf"[A-Za-z0-9._~+/-]+=*\s*(?=,|\Z)(?![\s,]+{_TOKEN}\s*=)")
_SEPARATORS = re.compile(r"\s*(?:,\s*)+|\s*\Z")
_LEADING = re.compile(r"[\s,]*")


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """Return the challenges of a response's WWW-Authenticate fields, in their order.

    A field may hold several (RFC 9110, 11.6.1). If one breaks the grammar, the rest of that field
    is left out, and the challenges before it stay. Text beyond `MAX_FIELD_SIZE` is left out, too.
    """
    return [challenge for header in headers for challenge in _parse_field(header[:MAX_FIELD_SIZE])]


def _parse_field(text: str) -> list[Challenge]:
    challenges: list[tuple[str, dict[str, str]]] = []
    takes_parameters = False
    position = _end(_LEADING.match(text))
    while position < len(text):
        match = _PARAMETER.match(text, position) if takes_parameters else None
        if match is None:
            # Comma-separated challenges have comma-separated parameters: text other than
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
    """The known challenges and credentials of one repository."""

    challenge: Challenge | None = None
    # An anonymous request has succeeded, so a 404 does not mean that the repository is hidden.
    is_public: bool = False
    login: SingleFlight[Credentials] = attrs.field(factory=SingleFlight[Credentials])


@final
class Authenticator:
    """Remembers each repository's challenges, credentials and tokens."""

    def __init__(self, transport: Transport, credentials: CredentialsFor | None) -> None:
        self.tokens = Tokens(transport)
        self._credentials = credentials
        self._repositories: dict[tuple[str, str], _Repository] = {}

    def __repr__(self) -> str:
        return f"<Authenticator: {len(self.tokens)} tokens>"

    def access(self, reference: Reference) -> Access:
        """Begin a request for something of the reference's repository."""
        key = reference.domain, reference.path
        known = self._repositories.get(key)
        if known is None:
            if len(self._repositories) >= MAX_REPOSITORIES:
                # Forgetting a challenge costs one more request.
                del self._repositories[next(iter(self._repositories))]
            known = self._repositories[key] = _Repository()
        return Access(self, reference, known)

    def knows(self, reference: Reference) -> bool:
        """Return whether the reference's repository has sent a challenge."""
        known = self._repositories.get((reference.domain, reference.path))
        return known is not None and known.challenge is not None

    async def login(
        self, reference: Reference, known: _Repository, refused: Credentials | None = None
    ) -> Credentials:
        """Return the credentials for a repository; empty means anonymous.

        Tasks that need them at the same time wait for the one that looks them up.

        Args:
            reference: The reference of the repository.
            known: The knowledge about the repository, which keeps the result.
            refused: Credentials that the registry refused, so that new ones are looked up.
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
    """The authorization of one request, and the reaction to a refusal.

    The exchange ends: refused credentials are renewed once, and after `MAX_REFUSALS` refusals the
    registry's answer is final.
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
        self._asked_root = False

    async def authorization(self) -> str | None:
        """Return the Authorization field; ``None`` if none is known to be needed.

        The call waits for credentials and a token if they are needed.

        Raises:
            AuthenticationError: if the token server refuses.
            RegistryError: if there is no token for another reason.
            CredentialsError: if the source of the credentials fails.
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

    async def refused(self, answer: RegistryResponse) -> bool:
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
        challenge = _usable(challenges)
        if challenge is not None and challenge.scheme == "bearer":
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
        if challenge is None:
            await trio.lowlevel.checkpoint()
            return False
        self._known.challenge = challenge
        self._credentials = await self._authenticator.login(self._reference, self._known)
        value = self._credentials.basic()
        if value is None or value != self._sent:
            return value is not None
        return await self._renew() and self._credentials.basic() is not None

    def granted(self) -> None:
        """Note a success: without an Authorization field, the repository is public."""
        if self._sent is None:
            self._known.is_public = True

    async def hidden(self, answer: RegistryResponse, ask_root: AskRoot) -> bool:
        """Look for a login after a refusal; return whether to ask again.

        Some registries send challenges at ``/v2/`` alone, and hide private repositories from
        anonymous requests. ``/v2/`` is requested only if there are credentials for the registry.

        Args:
            answer: The refusal: a 401, 403 or 404. It may be closed.
            ask_root: Returns the challenges of ``/v2/``.

        Raises:
            CredentialsError: as for `authorization`.
        """
        known = self._known
        anonymous = self._sent is None and not self._asked_root
        if not anonymous or (answer.status == 404 and known.is_public):
            await trio.lowlevel.checkpoint()
            return False
        self._asked_root = True
        self._credentials = await self._authenticator.login(self._reference, known)
        if not self._credentials:
            return False
        here = _usable(parse_challenges(answer.headers.get_list("WWW-Authenticate")))
        challenge = known.challenge or here or _usable(await ask_root())
        if challenge is None or (challenge.scheme == "basic" and not self._credentials.basic()):
            return False
        if known.challenge is None:
            if here is None:
                # Drop the scope of /v2/, because it is not this repository's (GitHub's is an
                # example). The repository's own scope takes its place.
                parameters = {**challenge.parameters, "scope": ""}
                challenge = attrs.evolve(challenge, parameters=parameters)
            known.challenge = challenge
        return True

    def failed(self) -> None:
        """Forget the challenge if a login that `hidden` suggested was refused.

        An anonymous request may succeed where these credentials do not.
        """
        if self._asked_root:
            self._known.challenge = None

    async def _token(self, challenge: Challenge) -> str:
        registry_token = self._credentials.registry_token
        if registry_token:
            if FIT_FOR_A_HEADER.match(registry_token) is None:
                # A later error of httpx would quote the secret.
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
        """Look for other credentials in place of refused ones; return whether there are any."""
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


@final
class RedirectedAccess:
    """Answers the challenges of hosts to which one request is redirected.

    Each host gets the login that is configured for its own name, or an anonymous token. It never
    gets the login of the registry that redirects there, because that registry has chosen the host.

    Args:
        authenticator: The authenticator for redirect targets. It has no login that is meant for
            any host.
        reference: The repository that the registry was asked for.
        url: The URL that the registry was asked for. Its origin has an `Access` of its own.
    """

    def __init__(self, authenticator: Authenticator, reference: Reference, url: URL) -> None:
        self._authenticator = authenticator
        self._reference = reference
        self._origin = origin_of(url)
        self._accesses: dict[tuple[str, str], Access] = {}
        self._refusals = 0

    async def authorization(self, url: URL) -> str | None:
        """Return the Authorization field for a redirect's target, if it needs one.

        ``None``: the target has sent no challenge so far, or is the registry itself.

        Raises:
            LayersError: as for `Access.authorization`.
        """
        there = self._there(url)
        if origin_of(url) == self._origin or not self._authenticator.knows(there):
            await trio.lowlevel.checkpoint()
            return None
        return await self._access(there).authorization()

    async def refused(self, answer: RegistryResponse) -> bool:
        """Answer a 401 of a redirect's target; return whether to ask again.

        Raises:
            CredentialsError: as for `Access.authorization`.
        """
        self._refusals += 1
        url = answer.url
        if url is None or origin_of(url) == self._origin or self._refusals > MAX_REFUSALS:
            await trio.lowlevel.checkpoint()
            return False
        return await self._access(self._there(url)).refused(answer)

    def _access(self, there: Reference) -> Access:
        key = there.domain, there.path
        if key not in self._accesses:
            self._accesses[key] = self._authenticator.access(there)
        return self._accesses[key]

    def _there(self, url: URL) -> Reference:
        match = _REPOSITORY.match(url.path)
        path = self._reference.path if match is None else match[1]
        domain = domain_of(url.netloc.decode("ascii", "replace"))
        return attrs.evolve(self._reference, domain=domain, path=path)


AskRoot: TypeAlias = Callable[[], Awaitable[Sequence[Challenge]]]

# Finds the repository in the path of a distribution API URL.
_REPOSITORY = re.compile(r"(?:/.*)?/v2/([^?#]{1,255})/(?:manifests|blobs|tags|referrers)/")


def _usable(challenges: Iterable[Challenge]) -> Challenge | None:
    """Choose the challenge to answer: Bearer before Basic."""
    challenges = list(challenges)
    bearer = (each for each in challenges if each.scheme == "bearer" and "realm" in each.parameters)
    basic = (each for each in challenges if each.scheme == "basic")
    return next(bearer, None) or next(basic, None)


_NOBODY: Final = Credentials()
