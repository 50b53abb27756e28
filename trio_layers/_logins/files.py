"""What login files hold, and which of it is for a repository: no input, no output.

Docker's ``config.json`` and podman's ``auth.json`` have one format and two ways to be searched.
Docker's is that of docker/cli (``cli/config``), which knows registries only; podman's is that of
containers/image (``pkg/docker/config``), where a key may be a part of a registry.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import Final

import attrs

from .._registry.credentials import Credentials

__all__ = [
    "Login",
    "LoginFile",
    "find_as_docker",
    "find_as_podman",
    "member",
    "parse_environment",
    "parse_json",
    "parse_login_file",
]

HUB: Final = "https://index.docker.io/v1/"
_NAMES_OF_HUB: Final = ("docker.io", "index.docker.io")
_FIELDS: Final = ("auth", "username", "password", "identitytoken", "registrytoken")


@attrs.frozen
class LoginFile:
    """What a login file says.

    Attributes:
        entries: Credentials by registry, or what else stands in ``auths``, in their order.
        helpers: Names of credential helpers by registry.
        store: The helper of all other registries; empty: there is none.
    """

    entries: Mapping[str, Credentials] = attrs.field(factory=dict)
    helpers: Mapping[str, str] = attrs.field(factory=dict)
    store: str = ""


_EMPTY: Final = LoginFile()


@attrs.frozen
class Login:
    """What a login file has for a repository.

    Attributes:
        key: Of its entry; empty if there is none.
        credentials: The entry's.
        helper: Who is to be asked for credentials; empty: nobody. Those of the entry count for
            nothing then, but for a registry token, which helpers do not know of.
        server: What to ask it for.
    """

    key: str = ""
    credentials: Credentials = attrs.field(factory=Credentials)
    helper: str = ""
    server: str = ""


def parse_login_file(data: bytes) -> LoginFile:
    """Read a file. As in docker, nothing of one that is wrong somewhere is used.

    Raises:
        ValueError: says what is wrong, and nothing of what the file holds.
    """
    document = parse_json(data)
    entries = {}
    for key, entry in _mapping(member(document, "auths"), "auths").items():
        fields = _mapping(entry, "an entry of auths")
        auth, username, password, identity, registry = (
            _string(member(fields, name), f"{name} of an entry of auths") for name in _FIELDS
        )
        if auth:
            username, password = _decode_auth(auth)
        entries[key] = Credentials(
            username, password, identity_token=identity, registry_token=registry
        )
    helpers = _mapping(member(document, "credHelpers"), "credHelpers")
    return LoginFile(
        entries,
        {key: _string(name, "a member of credHelpers") for key, name in helpers.items()},
        _string(member(document, "credsStore"), "credsStore"),
    )


def parse_environment(text: str) -> LoginFile:
    """Read the value of ``DOCKER_AUTH_CONFIG``, for which docker allows ``auths`` with their
    ``auth`` and nothing else.

    Raises:
        ValueError: as `parse_login_file`.
    """
    file = parse_login_file(text.encode("utf-8", "surrogateescape"))
    document = _mapping(parse_json(text.encode("utf-8", "surrogateescape"), alone=True), "it")
    entries = _mapping(member(document, "auths"), "auths").values()
    if any(name.lower() != "auths" for name in document) or any(
        [name.lower() for name in _mapping(entry, "an entry")] != ["auth"] for entry in entries
    ):
        raise ValueError("it may hold auths alone, and each of them auth alone")
    if not all(entry.username for entry in file.entries.values()):
        raise ValueError("an entry of auths has no auth")
    return file


def find_as_docker(file: LoginFile, repository: str, environment: LoginFile = _EMPTY) -> Login:
    """Docker's way: the entry of the registry, by its name or by a URL that has it; if there is
    a helper, it alone is asked. What `parse_environment` gave comes before all that, by the very
    name of the registry."""
    server = _server(_registry(repository))
    if server in environment.entries:
        return Login(server, environment.entries[server])
    key = server
    if server not in file.entries:
        key = next((key for key in file.entries if _host_of(key) == server), "")
    helper = file.helpers.get(server, file.store)
    return Login(key, file.entries.get(key, Credentials()), helper, server)


def find_as_podman(file: LoginFile, repository: str) -> Login:
    """Podman's way: the registry's helper, then the most specific entry. Where there is none,
    or one without content, ``credsStore`` is asked, which podman itself leaves alone: the file
    may well be docker's."""
    registry = _registry(repository)
    server = _server(registry)
    for name in (registry, server):
        helper = file.helpers.get(name)
        if helper:
            return Login(helper=helper, server=name)
    names = [repository]
    while "/" in names[-1]:
        names.append(names[-1].rpartition("/")[0])
    plain = _plain_name(registry)
    names += [key for key in file.entries if _plain_key(key) == plain]
    key = next((name for name in names if name in file.entries), "")
    credentials = file.entries.get(key, Credentials())
    return Login(key, credentials, "" if credentials else file.store, server)


def _registry(repository: str) -> str:
    return repository.partition("/")[0]


def _server(registry: str) -> str:
    return HUB if registry in _NAMES_OF_HUB else registry


def _host_of(key: str) -> str:
    """The host, and the port, of a key that may be a URL, as Go's ``net/url`` has them."""
    _, found, rest = key.partition("://")
    host = re.split("[/?#]", rest, maxsplit=1)[0].rpartition("@")[2]
    # A port alone is no host.
    if found and host and not host.startswith(":"):
        address = re.fullmatch(r"\[(.*)\]:?", host)
        return address[1] if address else host.removesuffix(":")
    return key.partition("/")[0]


def _plain_key(key: str) -> str:
    rest = key.removeprefix("http://").removeprefix("https://")
    return _plain_name(rest if rest == key else rest.partition("/")[0])


def _plain_name(registry: str) -> str:
    return "index.docker.io" if registry in ("docker.io", "registry-1.docker.io") else registry


# JSON as Go's encoding/json takes it: members by names in any case, null for nothing, and what
# follows the first value does not matter.


def parse_json(data: bytes, *, alone: bool = False) -> Mapping[str, object]:
    """The object that begins the text; nothing at all is an empty one.

    Args:
        data: UTF-8; what is not counts as U+FFFD.
        alone: Whether nothing may follow.

    Raises:
        ValueError: if there is none. It has nothing of the text.
    """
    text = data.decode("utf-8", "replace").strip(" \t\r\n")
    problem = "is not valid JSON"
    document: object = None
    if text:
        try:
            document, end = _DECODER.raw_decode(text)
        except json.JSONDecodeError as error:
            problem += f" (line {error.lineno}, column {error.colno})"
        except (ValueError, RecursionError):
            pass
        else:
            problem = "has more than one JSON object" if alone and end < len(text) else ""
        if problem:
            raise ValueError(f"it {problem}")  # out here: the handled error has the text
    return _mapping(document, "it")


def _no_number(text: str) -> float:
    raise ValueError


_DECODER: Final = json.JSONDecoder(parse_int=float, parse_constant=_no_number)
_SURROGATES: Final = re.compile("[\ud800-\udfff]")


def member(document: Mapping[str, object], name: str) -> object:
    """A member by its name in any case, the last one of several; ``None`` if there is none."""
    if document.keys() == {name}:
        return document[name]
    found: object = None
    for key, value in document.items():
        if key.lower() == name.lower():
            found = value
    return found


def _mapping(value: object, what: str) -> Mapping[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object")
    return value


def _string(value: object, what: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{what} is not a string")
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", value)


def _decode_auth(text: str) -> tuple[str, str]:
    """Name and password of ``auth``. Bytes that are not UTF-8 are kept as Python has them in
    file names: they are sent as they were."""
    try:
        decoded = base64.b64decode(text.replace("\r", "").replace("\n", ""), validate=True)
    except ValueError:  # as is binascii.Error
        decoded = b""
    name, colon, password = decoded.decode("utf-8", "surrogateescape").partition(":")
    if not (name and colon):
        raise ValueError("auth of an entry of auths is not name:password in base64")
    return name, password.strip("\0")
