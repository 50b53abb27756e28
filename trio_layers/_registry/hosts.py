"""Which host is asked for an image, and how."""

from __future__ import annotations

import ipaddress

import httpx

from .._errors import InvalidReference
from .._reference import Reference

__all__ = ["base_urls", "is_loopback"]

# Docker Hub's registry does not answer under the name that its images have.
_REGISTRY_OF = {"docker.io": "registry-1.docker.io"}


def base_urls(reference: Reference, *, plain_http: bool) -> tuple[httpx.URL, ...]:
    """Where the reference's registry may be, in the order in which to try.

    HTTPS is first. Plain HTTP follows for this machine, as in Docker, whose daemon takes all of
    127.0.0.0/8 and ``::1`` for insecure registries; for others only with ``plain_http``.

    Raises:
        InvalidReference: if the reference's domain cannot be a host with a port.
    """
    domain = _REGISTRY_OF.get(reference.domain, reference.domain)
    try:
        https = httpx.URL(f"https://{domain}/v2/")
        if (https.port or 0) > 65535:
            raise httpx.InvalidURL("a port is 65535 at most")
    except httpx.InvalidURL as error:
        message = f"{domain!r} is no host: {error}"
        raise InvalidReference(str(reference), "invalid-format", message) from error
    if plain_http or is_loopback(https):
        return https, https.copy_with(scheme="http")
    return (https,)


def is_loopback(url: httpx.URL) -> bool:
    """Whether the URL's host is this machine, and says so."""
    if url.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return False
