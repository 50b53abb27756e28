"""Chooses a URL's proxy from the environment.

The variables are curl's: ``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY``. A
variable in lower case takes precedence. ``NO_PROXY`` has the syntax that Go's programs accept
(``golang.org/x/net/http/httpproxy/proxy.go``). A variable is checked only when a URL needs it, so
an unusable proxy breaks neither a command without requests nor a request to this machine.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Final, TypeAlias, final

from .._errors import NetworkSettingError
from .._printable import printable_line, without_login
from .hosts import is_loopback, parse_url
from .http import URL, InvalidURL

__all__ = ["Proxies", "setting_shown"]

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Matcher: TypeAlias = Callable[[str, int], bool]
"""Returns whether a host (in lower case) and port need no proxy."""


@final
class Proxies:
    """Finds proxies in a set of environment variables.

    Args:
        environment: The variables. They are read at each call, so later changes count.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def find(self, url: URL) -> str | None:
        """Return the proxy's URL for a request; ``None`` if none is needed.

        Raises:
            NetworkSettingError: if the variable for this URL names a proxy that cannot be used.
        """
        if is_loopback(url):
            return None
        variable, value = self._value(f"{url.scheme}_proxy")
        if not value:
            variable, value = self._value("all_proxy")
        if not value or self._is_excluded(url):
            return None
        return _checked(variable, value)

    def _value(self, name: str) -> tuple[str, str]:
        upper = name.upper()
        if name in self._environment:
            return name, self._environment[name].strip()
        if name == "http_proxy" and "REQUEST_METHOD" in self._environment:
            # In a CGI program, HTTP_PROXY holds the request's header "Proxy" (CVE-2016-5385).
            return upper, ""
        return upper, self._environment.get(upper, "").strip()

    def _is_excluded(self, url: URL) -> bool:
        _, names = self._value("no_proxy")
        host = url.raw_host.decode("ascii", "replace").lower()
        port = url.port or _DEFAULT_PORTS.get(url.scheme, 0)
        return any(matches(host, port) for matches in map(_matcher, names.lower().split(",")))


def _matcher(text: str) -> Matcher:
    """Compile one entry of ``NO_PROXY``. A malformed entry matches nothing."""
    text = text.strip()
    if text == "*":
        return lambda host, port: True
    network = _network(text)
    if network is not None:
        return lambda host, port: (there := _address(host)) is not None and there in network
    name, wanted = _split_port(text)
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    address = _address(name)
    if address is not None:
        return lambda host, port: _address(host) == address and wanted in ("", str(port))
    name = name.removeprefix("*") if name.startswith("*.") else name
    if not name:
        return lambda host, port: False
    # A name matches itself and its subdomains; a name with a leading dot, the subdomains alone.
    itself = "" if name.startswith(".") else _as_ascii(name)
    below = _as_ascii(name) if name.startswith(".") else f".{itself}"
    return lambda host, port: (host == itself or host.endswith(below)) and wanted in ("", str(port))


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    # ip_network() also accepts a lone address, and a mask in place of a prefix length. Go does not.
    if not re.fullmatch(r"[0-9a-f:.]+/[0-9]{1,3}", text):
        return None
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _address(text: str) -> Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _split_port(text: str) -> tuple[str, str]:
    """Split host and port like Go's ``net.SplitHostPort``; the port may be empty."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    return (host, port) if colon and (":" not in host or bracketed) else (text, "")


def _as_ascii(name: str) -> str:
    if name.isascii():
        return name
    try:
        dot = "." if name.startswith(".") else ""
        return dot + URL(f"http://{name.removeprefix('.')}/").raw_host.decode("ascii")
    except (InvalidURL, UnicodeError):
        return name


def _checked(variable: str, value: str) -> str:
    text = value if "://" in value else f"http://{value}"
    advice = "name it as http://HOST:PORT, or unset the variable"
    try:
        url = parse_url(text)
    except InvalidURL:
        # Do not show InvalidURL's text, because it may quote a password.
        reason = "it is no URL of a proxy"
    else:
        if url.scheme not in ("http", "https", "socks5", "socks5h"):
            reason = "proxies speak http, https or socks5"
        elif not url.host:
            reason = "it names no host"
        elif url.scheme.startswith("socks5") and find_spec("socksio") is None:
            reason = "SOCKS proxies need the package socksio"
            advice = "install trio-layers[socks], or unset the variable"
        else:
            return text
    # Raise outside the except block: the InvalidURL error may quote a password, and must not become
    # the context of this one.
    raise NetworkSettingError(variable, f"{setting_shown(value)} cannot be used: {reason}", advice)


# Text where a port should stand, if it is not a port: the rest of a login without a host.
_NO_PORT = re.compile(r"(?<=[^:/]):(?!//)(?![0-9]{1,5}(?:[/?#]|\Z))[^\[\]]*\Z")


def setting_shown(value: str) -> str:
    """Format a variable's value for a message, without any login in it."""
    shown = without_login(value)
    if "[" not in shown:
        shown = _NO_PORT.sub(":…", shown)
    return f"'{printable_line(shown)}'"
