"""Which host is asked for an image, and how."""

from __future__ import annotations

import ipaddress

from .._errors import InvalidReference
from .._reference import Reference
from .http import URL, InvalidURL

__all__ = ["base_urls", "domain_of", "is_loopback", "origin_of", "parse_url", "registry_of"]

# Docker Hub's registry does not answer under the name that its images have.
_REGISTRY_OF = {"docker.io": "registry-1.docker.io"}


def registry_of(domain: str) -> str:
    """The host, with its port, of the registry of images that are named so."""
    return _REGISTRY_OF.get(domain, domain)


def domain_of(host: str) -> str:
    """Return the domain in references to the registry at this host."""
    return next((domain for domain, there in _REGISTRY_OF.items() if there == host), host)


def base_urls(reference: Reference, *, plain_http: bool) -> tuple[URL, ...]:
    """Where the reference's registry may be, in the order in which to try.

    HTTPS is first. Plain HTTP follows for this machine, as in Docker, whose daemon takes all of
    127.0.0.0/8 and ``::1`` for insecure registries; for others only with ``plain_http``.

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
    """A URL whose host and port can be asked: httpx looks at some of it when it is used only.

    Raises:
        InvalidURL: if it is none.
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
    """Whether the URL's host is this machine, and says so."""
    if url.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return False


def origin_of(url: URL) -> tuple[str, str, int | None]:
    """What credentials are bound to. httpx leaves out the scheme's own port."""
    return url.scheme, url.host, url.port
