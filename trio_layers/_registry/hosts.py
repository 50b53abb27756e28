"""The hosts of registries: their URLs, and settings for requests to them."""

from __future__ import annotations

import ipaddress

import attrs

from .._errors import InvalidReference
from .._reference import Reference
from .http import URL, InvalidURL
from .tls import TLSConfig

__all__ = [
    "HostSettings",
    "base_urls",
    "domain_of",
    "is_loopback",
    "origin_of",
    "parse_url",
    "registry_of",
]

# Docker Hub's registry does not answer under the name that its images have.
_REGISTRY_OF = {"docker.io": "registry-1.docker.io"}


def registry_of(domain: str) -> str:
    """Return the host, with its port, of the registry for a domain in references."""
    return _REGISTRY_OF.get(domain, domain)


def domain_of(host: str) -> str:
    """Return the domain in references to the registry at this host."""
    return next((domain for domain, there in _REGISTRY_OF.items() if there == host), host)


def base_urls(reference: Reference, *, plain_http: bool) -> tuple[URL, ...]:
    """Return the base URLs of the reference's registry, in the order in which to try them.

    HTTPS is first. Plain HTTP follows for this machine, as in Docker, whose daemon takes all of
    127.0.0.0/8 and ``::1`` for insecure registries; for other hosts only with ``plain_http``.

    Raises:
        InvalidReference: if the reference's domain cannot be a host with a port.
    """
    domain = registry_of(reference.domain)
    if not domain:
        name = reference.path.partition("/")[0]
        message = f"{name!r} is no host, as it has a '_' in it"
        raise InvalidReference(str(reference), "invalid-format", message)
    try:
        https = parse_url(f"https://{domain}/v2/")
    except InvalidURL as error:
        message = f"{domain!r} is no host: {error}"
        raise InvalidReference(str(reference), "invalid-format", message) from error
    if plain_http or is_loopback(https):
        return https, https.copy_with(scheme="http")
    return (https,)


def parse_url(text: str) -> URL:
    """Parse a URL, and check its host and port, which httpx checks only when it uses them.

    Raises:
        InvalidURL: if the URL is invalid.
    """
    url = URL(text)
    try:
        host = url.host  # decodes a name that begins with "xn--"
    except UnicodeError as error:
        raise InvalidURL(str(error)) from error
    if host and (url.port or 0) > 65535:
        raise InvalidURL("a port is 65535 at most")
    return url


def is_loopback(url: URL) -> bool:
    """Return whether the URL's host is this machine, by its name or address."""
    if url.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return False


def origin_of(url: URL) -> tuple[str, str, int | None]:
    """Return the origin of a URL, to which credentials are bound.

    httpx leaves out the scheme's default port.
    """
    return url.scheme, url.host, url.port


@attrs.frozen
class HostSettings:
    """Settings for requests to one host.

    They are dropped once another host has redirected a request, even back to this host.

    Attributes:
        origins: The host's origins: scheme, host and port, perhaps with several schemes.
        headers: Header fields for each request.
        tls: The trusted and the client certificates; ``None``: the usual ones. Other hosts to
            which this one refers, for a token or a blob, are verified by the same authorities,
            but get no client certificate.
        connect_limit: Seconds for connecting to the host; ``None``: the usual limit.
    """

    origins: frozenset[tuple[str, str, int | None]]
    headers: tuple[tuple[bytes, bytes], ...] = attrs.field(default=(), repr=False)
    tls: TLSConfig | None = None
    connect_limit: float | None = None
