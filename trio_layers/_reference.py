"""Image references: the names of images, and their parts for registries.

The grammar is that of distribution's ``reference`` package (``regexp.go``, ``normalize.go``), which
Docker, containerd and podman share: ``[DOMAIN/]PATH[:TAG][@DIGEST]``. A name without a domain is
one on Docker Hub.
"""

from __future__ import annotations

import re
from typing import Final, NoReturn

import attrs

from ._arguments import check_type
from ._digest import HEX_DIGITS, Digest
from ._errors import InvalidReference

__all__ = ["Reference", "full_name", "parse_reference"]

DEFAULT_DOMAIN: Final = "docker.io"
LEGACY_DEFAULT_DOMAIN: Final = "index.docker.io"
OFFICIAL: Final = "library/"
DEFAULT_TAG: Final = "latest"
MAX_PATH_LENGTH: Final = 255

_HOST_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = rf"(?:{_HOST_LABEL}(?:\.{_HOST_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_ALGORITHM = r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*"
_REFERENCE = re.compile(
    rf"""
    (?: (?P<domain>{_DOMAIN}) / )? (?P<path>{_COMPONENT}(?:/{_COMPONENT})*)
    (?: : (?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}}) )?
    (?: @ (?P<digest>{_ALGORITHM}:[0-9a-fA-F]{{32,}}) )?
    \Z""",
    re.VERBOSE,
)
_HEX_IDENTIFIER = re.compile(r"[a-f0-9]{64}\Z")


@attrs.frozen
class Reference:
    """A complete name of an image, from `parse_reference`.

    Attributes:
        domain: The registry's host, with its port if one was given; ``docker.io`` for Docker Hub.
            It is empty if the first part looks like a host but has a ``_``: Docker accepts such a
            name, but no registry can be asked for it.
        path: The repository.
        tag: The tag, which may point to another image tomorrow; ``None`` if only a digest was
            given.
        digest: The digest that pins the image; the tag beside it is for people only.
    """

    domain: str
    path: str
    tag: str | None = None
    digest: Digest | None = None

    @property
    def name(self) -> str:
        """The repository with its domain, without tag and digest."""
        return f"{self.domain}/{self.path}" if self.domain else self.path

    @property
    def familiar(self) -> str:
        """The short form for people, without the parts that Docker Hub's names may omit."""
        name = self.name
        if self.domain == DEFAULT_DOMAIN:
            name = self.path
            official = name.removeprefix(OFFICIAL)
            if "/" not in official:
                name = official
        return name + self._suffix

    @property
    def fetched_by(self) -> str:
        """The name for requests to the registry: the digest if there is one, else the tag."""
        return self.digest or self.tag or DEFAULT_TAG

    def __str__(self) -> str:
        return self.name + self._suffix

    @property
    def _suffix(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{tag}@{self.digest}" if self.digest else tag


def parse_reference(text: str) -> Reference:
    """Read an image reference as ``docker pull`` does.

    A name without a domain is one on Docker Hub, where a name of one component is an official
    image, in ``library/``. The first component is a domain if it contains a ``.``, a ``:`` or an
    upper-case letter, or is ``localhost``. If it also contains a ``_``, the reference is valid but
    its domain is empty, and a request for it is an error. Without a tag and a digest, the tag is
    ``latest``.

    Raises:
        InvalidReference: if it does not follow the grammar. Its ``reason`` is one of
            ``name-too-long`` (a path of more than 255 characters), ``uppercase``,
            ``hex-identifier`` (64 hex digits could be taken for an image ID),
            ``digest-unsupported``, ``digest-length``, ``digest-format``, ``invalid-format``.
    """
    check_type("reference", text, str, "a string such as 'debian:12', or a Reference")
    if _HEX_IDENTIFIER.match(text):
        _refuse(text, "hex-identifier", "64 hex digits are an ID, not the name of a repository")
    domain, rest = _split_domain(text)
    repository = rest.partition(":")[0]
    if repository != repository.lower():
        _refuse(text, "uppercase", f"the repository name {repository!r} must be lower-case")

    complete = f"{domain}/{rest}"
    match = _REFERENCE.match(complete)
    if match is None:
        if _REFERENCE.match(complete.lower()):
            _refuse(text, "uppercase", "a name that has no host in it must be lower-case")
        _refuse(text, "invalid-format", "expected [DOMAIN/]PATH[:TAG][@DIGEST]")
    path, tag, digest = match["path"], match["tag"], match["digest"]
    if len(path) > MAX_PATH_LENGTH:
        _refuse(text, "name-too-long", f"the path is longer than {MAX_PATH_LENGTH} characters")
    if digest is not None:
        _check_digest(text, digest)
    elif tag is None:
        tag = DEFAULT_TAG
    return Reference(match["domain"] or "", path, tag, Digest(digest) if digest else None)


def full_name(reference: str | Reference) -> str:
    """Return a reference as text with all its parts.

    Raises:
        InvalidReference: if ``reference`` does not follow the grammar.
    """
    return str(reference if isinstance(reference, Reference) else parse_reference(reference))


def _split_domain(text: str) -> tuple[str, str]:
    """Return the domain and the rest, with the omitted parts filled in."""
    first, slash, rest = text.partition("/")
    if not slash:
        # Never a domain, even with a dot in it: "ubuntu:22.04" is not a host with a port.
        return DEFAULT_DOMAIN, OFFICIAL + text
    if first == LEGACY_DEFAULT_DOMAIN:
        first = DEFAULT_DOMAIN
    # Upper case is not allowed in a path, so it must be a domain.
    is_domain = first == "localhost" or "." in first or ":" in first or first != first.lower()
    domain, rest = (first, rest) if is_domain else (DEFAULT_DOMAIN, text)
    if domain == DEFAULT_DOMAIN and "/" not in rest:
        rest = OFFICIAL + rest
    return domain, rest


def _check_digest(text: str, digest: str) -> None:
    """Make the checks of go-digest's ``Digest.Validate``, in its order."""
    algorithm, _, encoded = digest.partition(":")
    length = HEX_DIGITS.get(algorithm)
    if length is None:
        if algorithm != algorithm.lower():
            _refuse(text, "digest-format", "a digest's algorithm is written in lower case")
        _refuse(text, "digest-unsupported", f"unknown digest algorithm {algorithm!r}: use sha256")
    if len(encoded) != length:
        _refuse(text, "digest-length", f"{algorithm} needs {length} hex digits")
    if encoded != encoded.lower():
        _refuse(text, "digest-format", "a digest's hex digits are written in lower case")


def _refuse(text: str, reason: str, message: str) -> NoReturn:
    raise InvalidReference(text, reason, message)
