"""What login files hold, and which of it is for a repository: no input, no output.

Docker's ``config.json`` and podman's ``auth.json`` have one format and two ways to be searched.
Docker's is that of docker/cli (``cli/config``), which knows registries only; podman's is that of
containers/image (``pkg/docker/config``), where a key may be a part of a registry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import attrs

from .._gocompat import decode_base64, split_url
from .._registry.credentials import Credentials
from .documents import Object, as_object, decode_mapping, decode_text, is_name, parse_json

__all__ = [
    "Login",
    "LoginFile",
    "find_as_docker",
    "find_as_podman",
    "parse_environment",
    "parse_login_file",
]

HUB: Final = "https://index.docker.io/v1/"
_NAMES_OF_HUB: Final = ("docker.io", "index.docker.io")
_ENTRY: Final = "an entry of auths"
_FIELDS: Final = (
    "auth",
    "username",
    "password",
    "identitytoken",
    "registrytoken",
    "serveraddress",
)


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
    entries = decode_mapping(document.find("auths"), "auths", _decode_entry)
    return LoginFile(
        {key: _credentials(entry) for key, entry in entries.items()},
        decode_mapping(document.find("credHelpers"), "credHelpers", _decode_helper),
        decode_text(document.find("credsStore"), "credsStore"),
    )


def parse_environment(text: str) -> LoginFile:
    """Read the value of ``DOCKER_AUTH_CONFIG``, for which docker allows ``auths`` with their
    ``auth`` and nothing else.

    Raises:
        ValueError: as `parse_login_file`.
    """
    document = parse_json(text.encode("utf-8", "surrogateescape"), alone=True)
    _check_names(document, "auths")

    def decode(value: object) -> Mapping[str, str]:
        _check_names(as_object(value, _ENTRY), "auth")
        return _decode_entry(value)

    entries = decode_mapping(document.find("auths"), "auths", decode)
    if not all(entry["auth"] for entry in entries.values()):
        raise ValueError(f"{_ENTRY} has no auth")
    return LoginFile({key: _credentials(entry) for key, entry in entries.items()})


def _check_names(document: Object, name: str) -> None:
    if not all(is_name(key, name) for key, _ in document.members):
        raise ValueError("it may hold auths alone, and each of them auth alone")


def _decode_entry(value: object) -> Mapping[str, str]:
    entry = as_object(value, _ENTRY)
    return {name: decode_text(entry.find(name), f"{name} of {_ENTRY}") for name in _FIELDS}


def _decode_helper(value: object) -> str:
    return decode_text([value], "a member of credHelpers")


def _credentials(entry: Mapping[str, str]) -> Credentials:
    username, password = entry["username"], entry["password"]
    if entry["auth"]:
        username, password = _decode_auth(entry["auth"])
    return Credentials(
        username,
        password,
        identity_token=entry["identitytoken"],
        registry_token=entry["registrytoken"],
    )


def find_as_docker(file: LoginFile, repository: str, environment: LoginFile = _EMPTY) -> Login:
    """Docker's way: the entry of the registry, by its name or by a URL that has it; if there is
    a helper, it alone is asked. What `parse_environment` gave comes before all that, by the very
    name of the registry.
    """
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
    may well be docker's.
    """
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
    """The host, and the port, of a key that may be a URL."""
    host = ""
    if "://" in key:
        try:
            _, host, _ = split_url(key)
        except ValueError:
            pass
    # A port alone is no host.
    if host and not host.startswith(":"):
        address = re.fullmatch(r"\[(.*)\]:?", host)
        return address[1] if address else host.removesuffix(":")
    return key.partition("/")[0]


def _plain_key(key: str) -> str:
    rest = key.removeprefix("http://").removeprefix("https://")
    return _plain_name(rest if rest == key else rest.partition("/")[0])


def _plain_name(registry: str) -> str:
    return "index.docker.io" if registry in ("docker.io", "registry-1.docker.io") else registry


def _decode_auth(text: str) -> tuple[str, str]:
    """Name and password of ``auth``. Bytes that are not UTF-8 are kept as Python has them in
    file names: they are sent as they were.
    """
    try:
        decoded = decode_base64(text)
    except ValueError:
        decoded = b""
    name, colon, password = decoded.decode("utf-8", "surrogateescape").partition(":")
    if not (name and colon):
        raise ValueError(f"auth of {_ENTRY} is not name:password in base64")
    return name, password.strip("\0")
