"""The exception tree: one root, split by the user's next step.

Each class composes its message from its fields, and keeps the fields. Errors of shared transfers
are copied for each waiting pull (see `LayersError.copy_to_raise`), so a class under `LayersError`
must keep all its data in ``args`` and plain attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self, TypeVar

_E = TypeVar("_E", bound="LayersError")

__all__ = [
    "ArchiveError",
    "AuthenticationError",
    "ClientClosed",
    "CredentialsError",
    "DecompressionError",
    "DisplayClosed",
    "DoNotRetry",
    "ExportError",
    "HostsError",
    "InvalidDigest",
    "InvalidReference",
    "LayersError",
    "LimitExceeded",
    "ManagerClosed",
    "ManifestError",
    "MountError",
    "NetworkSettingError",
    "NotFound",
    "PlatformError",
    "RateLimited",
    "RegistrationError",
    "RegistryError",
    "StoreBusy",
    "StoreClosed",
    "StoreError",
    "StoreFull",
    "StoreNotFound",
    "StoreReadOnly",
    "TransferCancelled",
    "TransferError",
    "UnpackError",
    "UnsupportedStore",
    "VerificationError",
    "WorkerError",
    "is_final",
    "text_of",
]


class LayersError(Exception):
    """The root of all errors that trio_layers raises on its own account."""

    def __reduce__(self) -> tuple[object, ...]:
        # The constructor takes other arguments, and may add text, so fields are restored directly.
        return _restored, (type(self), self.args, self.__dict__)

    def copy_to_raise(self) -> Self:
        """Return a copy with a traceback of its own, for one of several waiting tasks."""
        again = _restored(type(self), self.args, self.__dict__)
        if hasattr(self, "__notes__"):
            again.__notes__ = list(self.__notes__)
        return again


def _restored(kind: type[_E], args: tuple[object, ...], fields: dict[str, object]) -> _E:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class DoNotRetry(LayersError):
    """An error that another attempt cannot avoid.

    A layer source raises it, or an error with it as the cause (moby
    ``distribution/xfer/transfer.go``, ``DoNotRetry``).
    """


# Correct the request.


class InvalidReference(LayersError, ValueError):
    """An image reference does not follow the grammar.

    Attributes:
        reference: The text that was given.
        reason: The broken rule, a word of the case tables such as ``uppercase``.
    """

    def __init__(self, reference: str, reason: str, message: str) -> None:
        super().__init__(f"invalid image reference {reference[:256]!r}: {message}")
        self.reference = reference
        self.reason = reason


class InvalidDigest(LayersError, ValueError):
    """A digest is not ``sha256:`` and 64 lower-case hex digits.

    Where nothing is stored, other algorithms that can be verified are valid, too: SHA-384 and
    SHA-512.
    """

    def __init__(self, digest: str) -> None:
        super().__init__(
            f"invalid digest {digest[:128]!r}: expected sha256: and 64 lower-case hex digits"
        )
        self.digest = digest


class PlatformError(LayersError, ValueError):
    """A platform specifier is malformed, or an image has nothing for the platform."""


class ManifestError(LayersError):
    """A manifest, index or config breaks the specification, or is not one of an image.

    The publisher of the image must correct it.
    """


class ArchiveError(LayersError):
    """An image archive or layout is damaged, incomplete or of an unknown kind.

    The error is also raised if several images match, or if an image has no name. The message names
    the archive and the place in it.
    """


# The registry.


class RegistryError(LayersError):
    """A registry could not be reached, or sent an invalid response.

    Attributes:
        host: The host (and port) of the request.
        status: The HTTP status of the response; ``None`` if there was none.
        transient: Whether the same request may succeed a moment later, because the connection
            failed or the server was busy.
    """

    def __init__(
        self, message: str, *, host: str, status: int | None = None, transient: bool = False
    ) -> None:
        super().__init__(message)
        self.host = host
        self.status = status
        self.transient = transient


class AuthenticationError(RegistryError):
    """The registry refuses the credentials, or requires some. Log in."""


class CredentialsError(DoNotRetry):
    """A login file or a credential helper cannot be used.

    Correct it, log in again, or name another one. The message has no secrets and no other contents.

    Attributes:
        source: The file's path, or the helper's program.
    """

    def __init__(self, message: str, *, source: str) -> None:
        super().__init__(message)
        self.source = source


class NetworkSettingError(DoNotRetry):
    """An environment variable names an unusable proxy, certificate or log file.

    Correct or unset the variable.

    Attributes:
        variable: The variable's name, such as ``HTTPS_PROXY`` or ``SSL_CERT_FILE``.
    """

    def __init__(self, variable: str, problem: str, advice: str) -> None:
        super().__init__(f"the environment variable {variable}={problem}; {advice}")
        self.variable = variable


class NotFound(RegistryError):
    """The registry lacks the image or blob, or hides it from this user."""


class RateLimited(RegistryError):
    """The registry asks the client to wait.

    Attributes:
        retry_after: Seconds to wait, counted from the response; ``None`` if the registry named
            none.
    """

    def __init__(
        self, message: str, *, host: str, status: int | None = None, retry_after: float | None
    ) -> None:
        super().__init__(message, host=host, status=status, transient=True)
        self.retry_after = retry_after


class HostsError(LayersError):
    """A directory of hosts has an unusable ``hosts.toml`` or certificate. Correct the file.

    Attributes:
        path: The file, or the directory.
    """

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path} cannot be used: {message}")
        self.path = path


class VerificationError(LayersError):
    """Received bytes differ from the requested ones in digest or size.

    Attributes:
        digest: The digest of the requested bytes.
    """

    def __init__(self, message: str, *, digest: str) -> None:
        super().__init__(message)
        self.digest = digest


# The engine.


class TransferError(LayersError):
    """A transfer failed with an error of other code, which is the ``__cause__``.

    The text is that of the original error.
    """


class TransferCancelled(LayersError):
    """A transfer was cancelled, because no pull needed it any more."""


class RegistrationError(LayersError):
    """A layer arrived, but could not be decompressed, or the store refused it.

    Attributes:
        reason: The error of the decompressor or the store.
    """

    def __init__(self, message: str, *, reason: Exception) -> None:
        super().__init__(message)
        self.reason = reason


class ManagerClosed(LayersError):
    """The download manager's or puller's block ended, before or during the call."""


class ClientClosed(DoNotRetry):
    """The registry client's block ended, before or during the call.

    An httpx client that was passed to the registry client and has been closed raises this, too.
    """


class DisplayClosed(LayersError):
    """A display received an event after its block had ended."""


# The contents of a layer.


class _OfALayer(LayersError):
    layer: str | None = None

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.layer is None else f"layer {self.layer}: {text}"


class DecompressionError(_OfALayer):
    """The beginning of a layer could not be read or is no valid compressed stream.

    Attributes:
        layer: The digest of the layer's blob, with which the message begins; ``None`` if the digest
            is unknown: in an unpacker, and for a stream without a descriptor.
    """


class UnpackError(_OfALayer):
    """A layer's tar is damaged, or has an entry that must not be unpacked.

    The message names the path of the entry.

    Attributes:
        layer: The digest of the layer's blob, as for `DecompressionError`.
    """


class LimitExceeded(UnpackError):
    """A layer exceeds one of its limits. The message names the limit, which can be raised."""


# The disk.


class StoreError(DoNotRetry):
    """The store's directory cannot do the requested work; the message says the next step.

    The engine makes no other attempt at a download then, because no registry can repair a disk.
    """


class StoreBusy(StoreError):
    """Another process locked the store's catalog for too long. Try again."""


class StoreClosed(StoreError):
    """The store's block ended, before or during the call."""


class StoreFull(StoreError):
    """No space, or no quota, is left. Free some space; stored images are intact."""


class StoreReadOnly(StoreError):
    """The store's file system, or its directory, cannot be written."""


class MountError(StoreError):
    """The layers cannot be mounted here, or not so many of them.

    An export does not depend on the kernel.
    """


class StoreNotFound(StoreError):
    """The directory contains no store, and none was to be created.

    Pull or import an image first, or name another directory.
    """


class UnsupportedStore(StoreError):
    """The directory is not a store, is one of a newer version, or was made by another user."""


class WorkerError(_OfALayer):
    """The process that unpacked a layer died or was killed; the message says how.

    Other layers are not affected.

    Attributes:
        layer: The digest of the layer's blob, as for `DecompressionError`.
    """


class ExportError(LayersError):
    """A root file system or an archive could not be written.

    The directory is not empty, the file exists, or the operating system raised the ``__cause__``.
    The store is not affected.

    Attributes:
        path: The target of the export.
    """

    def __init__(self, path: str, reason: str | None) -> None:
        super().__init__(f"cannot export to {path}: {reason}")
        self.path = path


def is_final(error: BaseException) -> bool:
    """Return whether an error is, contains or was caused by a `DoNotRetry`."""
    return any(isinstance(each, DoNotRetry) for each in _all_behind(error))


def _all_behind(error: BaseException) -> Iterator[BaseException]:
    todo, seen = [error], {id(error)}
    while todo:
        this = todo.pop()
        yield this
        # Compare with None: an exception class with __len__() may have false instances.
        cause = this.__cause__
        behind = [this.__context__ if cause is None and not this.__suppress_context__ else cause]
        if isinstance(this, BaseExceptionGroup):
            behind += this.exceptions
        for other in behind:
            if other is not None and id(other) not in seen:
                seen.add(id(other))
                todo.append(other)


def text_of(error: BaseException) -> str:
    """Return an error's text, or its type's name.

    The type's name stands in for a text that is empty, or that cannot be made because ``__str__``
    raises.
    """
    try:
        text = str(error)
    except Exception:
        text = ""
    return text or type(error).__name__
