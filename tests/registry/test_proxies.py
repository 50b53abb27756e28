"""Chooses proxies from the environment as Go's httpproxy package does."""

from __future__ import annotations

import pytest

from trio_layers import NetworkSettingError
from trio_layers._registry.http import URL
from trio_layers._registry.proxies import Proxies

PROXY = "http://proxy.example:3128"


@pytest.mark.parametrize(
    ("entry", "excluded", "asked"),
    [
        ("*", ["https://a.example", "http://10.0.0.1"], []),
        (" , *", ["https://a.example"], []),
        ("a.example", ["https://a.example", "https://b.a.example:5000"], ["https://ba.example"]),
        ("A.Example", ["https://a.EXAMPLE"], ["https://example"]),
        (".a.example", ["https://b.a.example", "https://c.b.a.example"], ["https://a.example"]),
        ("*.a.example", ["https://b.a.example"], ["https://a.example", "https://ba.example"]),
        ("a.example:443", ["https://a.example", "https://b.a.example"], ["http://a.example"]),
        ("a.example:80", ["http://a.example"], ["https://a.example", "http://a.example:81"]),
        ("*.a.example:5000", ["https://b.a.example:5000"], ["https://b.a.example"]),
        ("10.0.0.0/8", ["https://10.1.2.3:5000", "http://10.0.0.0"], ["https://11.0.0.1"]),
        ("10.1.2.3/8", ["https://10.9.9.9"], ["https://ten.example"]),
        ("fd00::/8", ["https://[fd12::1]"], ["https://[fe80::1]", "https://10.0.0.1"]),
        ("10.0.0.1", ["https://10.0.0.1:8443"], ["https://10.0.0.2"]),
        ("10.0.0.1:8443", ["https://10.0.0.1:8443"], ["https://10.0.0.1"]),
        ("fd00::1", ["https://[fd00::1]:5000"], ["https://[fd00::2]"]),
        ("[fd00::1]:5000", ["https://[fd00::1]:5000"], ["https://[fd00::1]"]),
        ("[fd00::1]", ["https://[fd00:0::1]"], ["https://[fd00::2]"]),
        ("10.0.0.1", ["https://[::ffff:10.0.0.1]"], []),
        ("bücher.example", ["https://bücher.example", "https://a.bücher.example"], []),
        ("x.example,10.0.0.0/8 , b.example", ["https://b.example", "https://10.0.0.1"], []),
        ("", [], ["https://a.example"]),
        (",:443,10.0.0.0/99,[::zz]/8,[,],/,:,.,*.", [], ["https://a.example", "https://10.0.0.1"]),
        ("a.example b.example", [], ["https://a.example"]),
        ("10.0.0.0/255.0.0.0", [], ["https://10.0.0.1"]),
    ],
)
@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_no_proxy(name: str, entry: str, excluded: list[str], asked: list[str]) -> None:
    """``NO_PROXY`` has names, subdomains, ports, addresses, networks and ``*``."""
    proxies = Proxies({"ALL_PROXY": PROXY, name: entry})
    for url in excluded:
        assert proxies.find(URL(url)) is None, url
    for url in asked:
        assert proxies.find(URL(url)) == PROXY, url


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:5000", "127.0.0.1", "127.9.9.9", "[::1]"])
def test_this_machine_needs_no_proxy(host: str) -> None:
    """For this machine, even invalid variables are ignored."""
    for value in (PROXY, "socks4://nowhere"):
        proxies = Proxies({"HTTP_PROXY": value, "HTTPS_PROXY": value, "NO_PROXY": "a.example"})
        assert proxies.find(URL(f"http://{host}/v2/")) is None
        assert proxies.find(URL(f"https://{host}/v2/")) is None


def test_which_variable_counts() -> None:
    """Lower case precedes upper case, and a scheme's variable precedes ``ALL_PROXY``.

    A CGI program ignores ``HTTP_PROXY``, because a request can set it.
    """
    http, https = URL("http://a.example"), URL("https://a.example")
    assert Proxies({"HTTPS_PROXY": "p1", "https_proxy": "p2"}).find(https) == "http://p2"
    assert Proxies({"HTTPS_PROXY": "p1", "https_proxy": ""}).find(https) is None
    assert Proxies({"HTTPS_PROXY": "p1"}).find(http) is None
    assert Proxies({"HTTPS_PROXY": "p1", "ALL_PROXY": "p2"}).find(https) == "http://p1"
    assert Proxies({"HTTPS_PROXY": "p1", "ALL_PROXY": "p2"}).find(http) == "http://p2"
    assert Proxies({"HTTP_PROXY": "p1", "REQUEST_METHOD": "GET"}).find(http) is None
    assert Proxies({"http_proxy": "p1", "REQUEST_METHOD": "GET"}).find(http) == "http://p1"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("socks4://me:secret@h:1", "socks4://…@h:1"),
        ("socks://h", "socks://h"),
        ("ftp://h", "ftp://h"),
        ("http://", "http://"),
        ("http://me:sec/ret@h:1", "http://…@h:1"),
        ("me:secret", "me:…"),
        ("http://me:secret", "http://me:…"),
        ("http://h:99999", "http://h:99999"),
        ("http://[::zz]", "http://[::zz]"),
        ("http://h\x1b[2J:x", "http://h [2J:x"),
    ],
)
def test_a_proxy_that_cannot_be_used(value: str, shown: str) -> None:
    """The error shows the variable without a login; other URLs still work."""
    proxies = Proxies({"HTTPS_PROXY": value, "NO_PROXY": "b.example"})
    with pytest.raises(NetworkSettingError) as caught:
        proxies.find(URL("https://a.example"))
    assert f"HTTPS_PROXY='{shown}' cannot be used: " in str(caught.value)
    assert "unset the variable" in str(caught.value)
    assert caught.value.variable == "HTTPS_PROXY"
    assert "secret" not in repr(caught.value)
    assert proxies.find(URL("https://b.example")) is None
    assert proxies.find(URL("http://a.example")) is None
