"""TLS for one host: the trusted certificates, and the client certificates."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import attrs

from .._errors import HostsError, LayersError, NetworkSettingError
from .._printable import printable_line
from .http import create_ssl_context

__all__ = ["TLSConfig", "make_context", "trust_nobody"]


@attrs.frozen
class TLSConfig:
    """The certificates that verify a host, and our own certificates for it.

    Attributes:
        ca: Files of certificates that are trusted besides the usual ones.
        client: Files of our certificates, each with its key's file, or ``None`` if the key is in
            the same file. Of several with keys of the same kind, the first is shown.
        verify: Whether the host's certificate is checked at all.
    """

    ca: tuple[str, ...] = ()
    client: tuple[tuple[str, str | None], ...] = ()
    verify: bool = True

    def of_others(self) -> TLSConfig | None:
        """Return the settings for other hosts, to which our certificates are not shown."""
        others = attrs.evolve(self, client=())
        return None if others == TLSConfig() else others


def make_context(tls: TLSConfig) -> ssl.SSLContext:
    """Load the certificates. Blocks while files are read.

    Raises:
        HostsError: if a file cannot be used. It names the file.
        NetworkSettingError: if an environment variable names an unusable certificate or log file.
    """
    context = _environments_context(verify=tls.verify)
    if tls.verify:
        for file in tls.ca:
            try:
                context.load_verify_locations(file)
            except OSError as error:  # ssl.SSLError is one
                raise _unusable(file, "certificates", error) from error
    # A later one takes the place of an earlier one.
    for file, key in reversed(tls.client):
        if key is not None:
            _look_at(key)
        try:
            context.load_cert_chain(file, key, password=_ask_nobody)
        except (OSError, ValueError) as error:
            raise _unusable(file, "a certificate with its key", error) from error
    return context


def trust_nobody() -> ssl.SSLContext:
    """Make an SSL context that reads no file and accepts no certificate."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _environments_context(*, verify: bool) -> ssl.SSLContext:
    """Load certifi's certificates, or those that the environment names instead."""
    if not verify:
        return create_ssl_context(verify=False)
    # httpx and Python's ssl read these variables in this order.
    file, directories = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if not file and directories and not any(map(os.path.isdir, directories.split(":"))):
        # OpenSSL treats a missing directory like an empty one, without an error.
        raise _unset("SSL_CERT_DIR", directories, "it is no directory of certificates")
    try:
        return create_ssl_context(verify=True)
    except OSError as error:  # ssl.SSLError is one
        log = os.environ.get("SSLKEYLOGFILE")
        reason = error.strerror or str(error)
        if file and not (log and _is_about(error, log)):
            raise _unset("SSL_CERT_FILE", file, f"no certificates can be read: {reason}") from error
        if log:
            raise _unset("SSLKEYLOGFILE", log, f"it cannot be written: {reason}") from error
        if directories:
            raise _unset("SSL_CERT_DIR", directories, reason) from error
        raise LayersError(f"the certificates of certifi cannot be read: {reason}") from error


def _is_about(error: OSError, file: str) -> bool:
    return error.filename is not None and os.fspath(error.filename) == file


def _unset(variable: str, value: str, reason: str) -> NetworkSettingError:
    advice = "mend it, or unset the variable"
    shown = printable_line(value)
    return NetworkSettingError(
        variable, f"'{shown}' cannot be used: {printable_line(reason)}", advice
    )


def _ask_nobody() -> str:
    # OpenSSL would ask at the terminal.
    raise ValueError("its key is encrypted")


def _look_at(file: str) -> None:
    """Open the key's file, since OpenSSL's error for a missing key names no file."""
    try:
        with Path(file).open("rb"):
            pass
    except OSError as error:
        raise _unusable(file, "a key", error) from error


def _unusable(file: str, subject: str, error: Exception) -> HostsError:
    reason = str(error)
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
        reason = error.strerror or reason
    return HostsError(file, f"it should hold {subject}: {reason}")
