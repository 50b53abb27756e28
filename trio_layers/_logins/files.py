"""The contents of login files, and the search for a repository, without input and output.

Docker's ``config.json`` and podman's ``auth.json`` have one format and two ways of searching.
Docker's is that of docker/cli (``cli/config``), which knows registries only. Podman's is that of
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
    """The contents of a login file.

    Attributes:
        entries: Credentials by registry, or other keys in ``auths``, in their order.
        helpers: Names of credential helpers by registry.
        store: The helper of all other registries; empty: there is none.
    """

    entries: Mapping[str, Credentials] = attrs.field(factory=dict)
    helpers: Mapping[str, str] = attrs.field(factory=dict)
    store: str = ""


_EMPTY: Final = LoginFile()


@attrs.frozen
class Login:
    """The result of a search for a repository.

    Attributes:
        key: The key of the entry; empty if there is none.
        credentials: The credentials of the entry.
        helper: The helper to ask for credentials; empty: none. With a helper, the entry's
            credentials do not count, except a registry token, which helpers do not have.
        server: The server to ask the helper for.
    """

    key: str = ""
    credentials: Credentials = attrs.field(factory=Credentials)
    helper: str = ""
    server: str = ""


def parse_login_file(data: bytes) -> LoginFile:
    """Parse a file. As in docker, a file with any error is not used at all.

    Raises:
        ValueError: if the file is invalid. The error quotes nothing of it.
    """
    document = parse_json(data)
    entries = decode_mapping(document.find("auths"), "auths", _decode_entry)
    return LoginFile(
        {key: _credentials(entry) for key, entry in entries.items()},
        decode_mapping(document.find("credHelpers"), "credHelpers", _decode_helper),
        decode_text(document.find("credsStore"), "credsStore"),
    )


def parse_environment(text: str) -> LoginFile:
    """Parse ``DOCKER_AUTH_CONFIG``, which may have only ``auths`` with their ``auth``.

    Raises:
        ValueError: as for `parse_login_file`.
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
    """Search like docker: the entry of the registry, by its name or by a URL with it.

    If there is a helper, only the helper is asked. An entry of `parse_environment` comes first, by
    the exact name of the registry.
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
    """Search like podman: the registry's helper, then the most specific entry.

    If there is no entry, or one without content, ``credsStore`` is asked. Podman itself ignores it,
    but the file may be docker's.
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
    """Return name and password of ``auth``.

    Bytes that are not UTF-8 are kept like those in file names, so that they are sent unchanged.
    """
    try:
        decoded = decode_base64(text)
    except ValueError:
        decoded = b""
    name, colon, password = decoded.decode("utf-8", "surrogateescape").partition(":")
    if not (name and colon):
        raise ValueError(f"auth of {_ENTRY} is not name:password in base64")
    return name, password.strip("\0")
