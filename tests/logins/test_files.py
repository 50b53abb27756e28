"""The contents of login files, and their precedence, beyond the recorded cases."""

from __future__ import annotations

import base64
import json

import pytest

from trio_layers._logins.files import (
    Login,
    LoginFile,
    find_as_docker,
    find_as_podman,
    parse_environment,
    parse_login_file,
)
from trio_layers._registry.credentials import Credentials

SECRET = "canary-5ecret"


def auth(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def one(auth: str) -> str:
    return json.dumps({"auths": {"r": {"auth": auth}}}, ensure_ascii=False)


def file(*keys: str, **members: object) -> LoginFile:
    """Return a login file in which each entry's user name is its key."""
    entries = {key: {"username": key, "password": "p"} for key in keys}
    return parse_login_file(json.dumps({"auths": entries, **members}).encode())


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "7",
        f'"{SECRET}"',
        "nonsense " + SECRET,
        "\ufeff{}",
        '{"auths": {"r": {"auth": "canary-5ecret"}},}',
        '{"auths": "canary-5ecret"}',
        '{"auths": {"canary-5ecret": []}}',
        '{"auths": {"r": {"auth": 7}}}',
        '{"auths": {"r": {"auth": "canary-5ecret"}}}',
        one(auth(SECRET)),
        one(auth(":" + SECRET)),
        one(auth("a:" + SECRET) + "é"),
        '{"auths": {"r": {"password": ["canary-5ecret"]}}}',
        '{"auths": {"r": {"identitytoken": {"canary-5ecret": 1}}}}',
        '{"credsStore": true}',
        '{"credHelpers": ["canary-5ecret"]}',
        '{"credHelpers": {"canary-5ecret": 1}}',
        '{"x": NaN}',
        '{"x": ' + "[" * 100_000,
    ],
)
def test_a_file_that_is_wrong(text: str) -> None:
    """The error names the mistake, and quotes nothing of the file."""
    with pytest.raises(ValueError, match=r" is no") as caught:
        parse_login_file(text.encode())
    assert SECRET not in repr(caught.value)
    assert auth(SECRET)[:10] not in repr(caught.value)
    # The decoder's own error contains the whole text of the file.
    assert not hasattr(caught.value.__context__, "doc")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        (" \n", {}),
        ("null", {}),
        ('{"auths": {"r": null}}', {"r": Credentials()}),
        ('{"Auths": {"r": {"USERNAME": "u", "Password": "p"}}}', {"r": Credentials("u", "p")}),
        ('{"auths": {"r": {"auth": "dTpw\\n"}}} more', {"r": Credentials("u", "p")}),
        ('{"auths": {"r": {"auth": "dTpwAA=="}}}', {"r": Credentials("u", "p")}),
        ('{"auths": {"r": {"auth": "dTpw", "username": "x"}}}', {"r": Credentials("u", "p")}),
        ('{"auths": {"r": {"password": "\\ud800"}}}', {"r": Credentials("", "\ufffd")}),
        ('{"auths": {}, "x": ' + "9" * 5000 + "}", {}),
    ],
)
def test_files_that_docker_takes(text: str, expected: dict[str, Credentials]) -> None:
    """Docker reads these files, since Go's JSON reader accepts them."""
    assert parse_login_file(text.encode()).entries == expected


def test_names_need_not_be_utf8() -> None:
    """A user name's bytes are sent as they are in the file."""
    text = base64.b64encode(b"j\xfcrgen:\xff").decode()
    parsed = parse_login_file(json.dumps({"auths": {"r": {"auth": text}}}).encode())
    assert parsed.entries["r"].basic() == f"Basic {text}"


@pytest.mark.parametrize(
    ("key", "host"),
    [
        ("https://r.example:5000", "r.example:5000"),
        ("https://user@r.example/v1/", "r.example"),
        ("ftp://r.example", "r.example"),
        ("https://r.example?x", "r.example"),
        ("https://[2001:db8::5]:5000/v2", "[2001:db8::5]:5000"),
        ("r.example?x/y", "r.example?x"),
        ("https:///r.example", None),
        ("https://:5000", None),
    ],
)
def test_hosts_of_keys(key: str, host: str | None) -> None:
    """A key may be a URL of any kind."""
    assert find_as_docker(file(key), host or "r.example").key == ("" if host is None else key)


@pytest.mark.parametrize(
    ("keys", "repository", "found"),
    [
        # containers/image, pkg/docker/config: authKeysForKey
        (["r.io", "r.io/a", "r.io/a/b"], "r.io/a/b", "r.io/a/b"),
        (["r.io/a/b/c", "r.io/a", "r.io"], "r.io/a/b", "r.io/a"),
        (["r.io/a", "r.io"], "r.io/ab", "r.io"),
        (["r.io/a"], "r.io/b", ""),
        (["r.io/a"], "r.io", ""),
        (["r.io:5000/a", "r.io/a"], "r.io:5000/a", "r.io:5000/a"),
        (["docker.io/library"], "docker.io/library/debian", "docker.io/library"),
        # normalizeAuthFileKey
        (
            ["https://index.docker.io/v1/"],
            "docker.io/library/debian",
            "https://index.docker.io/v1/",
        ),
        (["https://index.docker.io/v1/", "docker.io"], "docker.io/x", "docker.io"),
        (["https://r.io/v1/"], "r.io/a", "https://r.io/v1/"),
        (["http://r.io", "r.io"], "r.io/a", "r.io"),
        (["ftp://r.io"], "r.io/a", ""),
        (["registry-1.docker.io"], "docker.io/x", "registry-1.docker.io"),
    ],
)
def test_podmans_keys(keys: list[str], repository: str, found: str) -> None:
    """A key may be a part of a registry, and the most specific one counts."""
    login = find_as_podman(file(*keys), repository)
    assert (login.key, login.credentials.username) == (found, found)


def test_helpers_in_podmans_file() -> None:
    """A registry's own helper comes first, and ``credsStore`` last."""
    helpers = file("r.io/a", credHelpers={"r.io": "h"}, credsStore="s")
    assert find_as_podman(helpers, "r.io/a") == Login(helper="h", server="r.io")
    stores = parse_login_file(
        b'{"auths": {"r.io": {}, "x.io": {"auth": "dTpw"}}, "credsStore": "s"}'
    )
    assert find_as_podman(stores, "r.io/a") == Login("r.io", Credentials(), "s", "r.io")
    assert find_as_podman(stores, "x.io/a").helper == ""
    hub = find_as_podman(stores, "docker.io/library/debian")
    assert (hub.helper, hub.server) == ("s", "https://index.docker.io/v1/")


def test_a_registry_without_helper() -> None:
    """An empty name excepts a registry from the store."""
    login = find_as_docker(file("r.io", credHelpers={"r.io": ""}, credsStore="s"), "r.io")
    assert (login.helper, login.key) == ("", "r.io")


def test_the_environment() -> None:
    """DOCKER_AUTH_CONFIG comes before the file, and counts for exact names only."""
    environment = parse_environment('{"auths": {"r.io": {"auth": "dTpw"}}}')
    assert find_as_docker(file("r.io"), "r.io", environment).credentials == Credentials("u", "p")
    assert find_as_docker(file("r.io:5000"), "r.io:5000", environment).key == "r.io:5000"
    assert find_as_docker(LoginFile(store="s"), "r.io", environment).helper == ""


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{} {}",
        '{"credsStore": "x"}',
        '{"auths": {"r": {}}}',
        '{"auths": {"r": {"auth": ""}}}',
        '{"auths": {"r": {"auth": "dTpw", "email": "x"}}}',
        one(auth(SECRET)),
    ],
)
def test_an_environment_that_is_wrong(text: str) -> None:
    """Docker accepts fewer members in the variable than in a file."""
    with pytest.raises(ValueError, match=r"it (is|has|may)|of auths") as caught:
        parse_environment(text)
    assert SECRET not in repr(caught.value)
