"""TLS for one host: whose certificates are trusted, and which are our own."""

from __future__ import annotations

import ssl
from pathlib import Path

import attrs

from .._errors import HostsError
from .http import create_ssl_context

__all__ = ["Trust", "make_context"]


@attrs.frozen
class Trust:
    """By what a host is known, and we are known to it.

    Attributes:
        ca: Files of certificates that are trusted besides the usual ones.
        client: Files of our certificates, each with that of its key, or ``None`` if that is in
            the same. Of several whose keys are of the same kind the first is shown.
        verify: Whether the host's certificate is checked at all.
    """

    ca: tuple[str, ...] = ()
    client: tuple[tuple[str, str | None], ...] = ()
    verify: bool = True

    def of_others(self) -> Trust | None:
        """The same for whoever the host refers to: they do not learn who we are."""
        others = attrs.evolve(self, client=())
        return None if others == Trust() else others


def make_context(trust: Trust) -> ssl.SSLContext:
    """Load the certificates. Blocks while files are read.

    Raises:
        HostsError: if a file cannot be used. It names the file.
    """
    context = create_ssl_context(verify=trust.verify)
    if trust.verify:
        for file in trust.ca:
            try:
                context.load_verify_locations(file)
            except OSError as error:  # ssl.SSLError is one
                raise _unusable(file, "certificates", error) from error
    # A later one takes the place of an earlier one.
    for file, key in reversed(trust.client):
        if key is not None:
            _look_at(key)
        try:
            context.load_cert_chain(file, key, password=_ask_nobody)
        except (OSError, ValueError) as error:
            raise _unusable(file, "a certificate with its key", error) from error
    return context


def _ask_nobody() -> str:
    # OpenSSL would ask at the terminal.
    raise ValueError("its key is encrypted")


def _look_at(file: str) -> None:
    """Have an error name the key: what OpenSSL says of one that is not there names no file."""
    try:
        with Path(file).open("rb"):
            pass
    except OSError as error:
        raise _unusable(file, "a key", error) from error


def _unusable(file: str, what: str, error: Exception) -> HostsError:
    reason = str(error)
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
        reason = error.strerror or reason
    return HostsError(file, f"it should hold {what}: {reason}")
