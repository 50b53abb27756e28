"""Pull container image layers inside trio applications: no daemon, a library first.

`open_puller` gets whole images from registries into a store on disk. `open_download_manager` is
the engine below it, for layer sources and stores of your own (see `trio_layers.abc`).
`open_registry_client` asks registries for tags, manifests, blobs and referrers.
"""

import sys as _sys
from importlib import import_module as _import_module

from ._version import __version__ as __version__

# Importing typing would take half the time of this module. Type checkers know this name, too.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from . import (
        abc as abc,
    )
    from ._archives.exporting import (
        ArchiveFormat as ArchiveFormat,
        export_images as export_images,
    )
    from ._archives.importing import (
        import_images as import_images,
    )
    from ._catalog.rows import (
        StoredImage as StoredImage,
    )
    from ._digest import (
        ChainID as ChainID,
        DiffID as DiffID,
        Digest as Digest,
        RootFS as RootFS,
    )
    from ._display import (
        DisplayKind as DisplayKind,
        open_display as open_display,
    )
    from ._engine.download import (
        DownloadManager as DownloadManager,
        DownloadStatistics as DownloadStatistics,
        open_download_manager as open_download_manager,
    )
    from ._entries import (
        Entry as Entry,
        EntryType as EntryType,
        ExportReport as ExportReport,
    )
    from ._errors import (
        ArchiveError as ArchiveError,
        AuthenticationError as AuthenticationError,
        ClientClosed as ClientClosed,
        CredentialsError as CredentialsError,
        DecompressionError as DecompressionError,
        DisplayClosed as DisplayClosed,
        DoNotRetry as DoNotRetry,
        ExportError as ExportError,
        HostsError as HostsError,
        InvalidDigest as InvalidDigest,
        InvalidReference as InvalidReference,
        LayersError as LayersError,
        LimitExceeded as LimitExceeded,
        ManagerClosed as ManagerClosed,
        ManifestError as ManifestError,
        MountError as MountError,
        NetworkSettingError as NetworkSettingError,
        NotFound as NotFound,
        PlatformError as PlatformError,
        RateLimited as RateLimited,
        RegistrationError as RegistrationError,
        RegistryError as RegistryError,
        StoreBusy as StoreBusy,
        StoreClosed as StoreClosed,
        StoreError as StoreError,
        StoreFull as StoreFull,
        StoreNotFound as StoreNotFound,
        StoreReadOnly as StoreReadOnly,
        TransferCancelled as TransferCancelled,
        TransferError as TransferError,
        UnpackError as UnpackError,
        UnsupportedStore as UnsupportedStore,
        VerificationError as VerificationError,
        WorkerError as WorkerError,
    )
    from ._image import (
        ImageLayer as ImageLayer,
    )
    from ._logins.lookup import (
        LoginFiles as LoginFiles,
    )
    from ._manifest import (
        Descriptor as Descriptor,
        ImageConfig as ImageConfig,
        Index as Index,
        Manifest as Manifest,
    )
    from ._memory import (
        MemoryLayer as MemoryLayer,
        MemoryStage as MemoryStage,
        MemoryStore as MemoryStore,
        MemoryStream as MemoryStream,
    )
    from ._platform import (
        Platform as Platform,
        host_platform as host_platform,
        parse_platform as parse_platform,
    )
    from ._progress import (
        Progress as Progress,
        Status as Status,
    )
    from ._pull import (
        Image as Image,
        Puller as Puller,
        PullerStatistics as PullerStatistics,
        PullPolicy as PullPolicy,
        open_puller as open_puller,
    )
    from ._reference import (
        Reference as Reference,
        parse_reference as parse_reference,
    )
    from ._registry.blobs import (
        BlobChunks as BlobChunks,
    )
    from ._registry.client import (
        RegistryClient as RegistryClient,
        RegistryStatistics as RegistryStatistics,
        open_registry_client as open_registry_client,
    )
    from ._registry.credentials import (
        Credentials as Credentials,
        CredentialsFor as CredentialsFor,
        CredentialsSource as CredentialsSource,
    )
    from ._registry.error_responses import (
        RateLimit as RateLimit,
    )
    from ._registry.resolving import (
        ResolvedImage as ResolvedImage,
    )
    from ._rootfs.view import (
        RootfsView as RootfsView,
    )
    from ._store.batch import (
        Batch as Batch,
    )
    from ._store.check import (
        CheckReport as CheckReport,
        Problem as Problem,
    )
    from ._store.collect import (
        Collected as Collected,
        MountedTree as MountedTree,
    )
    from ._store.content import (
        BlobStream as BlobStream,
    )
    from ._store.directory import (
        DirectoryStore as DirectoryStore,
        open_store as open_store,
    )
    from ._store.ingest import (
        Ingest as Ingest,
    )
    from ._store.layers import (
        DirectoryLayer as DirectoryLayer,
    )
    from ._store.leases import (
        Lease as Lease,
    )
    from ._store.staging import (
        DirectoryStage as DirectoryStage,
    )
    from ._store.statistics import StoreStatistics as StoreStatistics
    from ._store.usage import (
        ImageUsage as ImageUsage,
        StoreUsage as StoreUsage,
    )
    from ._tar.limits import (
        Limits as Limits,
    )

# The public names by the modules that define them, as in the imports above.
_SOURCES = {
    "_archives.exporting": ("ArchiveFormat", "export_images"),
    "_archives.importing": ("import_images",),
    "_catalog.rows": ("StoredImage",),
    "_digest": ("ChainID", "DiffID", "Digest", "RootFS"),
    "_display": ("DisplayKind", "open_display"),
    "_engine.download": ("DownloadManager", "DownloadStatistics", "open_download_manager"),
    "_entries": ("Entry", "EntryType", "ExportReport"),
    "_errors": (
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
    ),
    "_image": ("ImageLayer",),
    "_logins.lookup": ("LoginFiles",),
    "_manifest": ("Descriptor", "ImageConfig", "Index", "Manifest"),
    "_memory": ("MemoryLayer", "MemoryStage", "MemoryStore", "MemoryStream"),
    "_platform": ("Platform", "host_platform", "parse_platform"),
    "_progress": ("Progress", "Status"),
    "_pull": ("Image", "Puller", "PullerStatistics", "PullPolicy", "open_puller"),
    "_reference": ("Reference", "parse_reference"),
    "_registry.blobs": ("BlobChunks",),
    "_registry.client": ("RegistryClient", "RegistryStatistics", "open_registry_client"),
    "_registry.credentials": ("Credentials", "CredentialsFor", "CredentialsSource"),
    "_registry.error_responses": ("RateLimit",),
    "_registry.resolving": ("ResolvedImage",),
    "_rootfs.view": ("RootfsView",),
    "_store.batch": ("Batch",),
    "_store.check": ("CheckReport", "Problem"),
    "_store.collect": ("Collected", "MountedTree"),
    "_store.content": ("BlobStream",),
    "_store.directory": ("DirectoryStore", "open_store"),
    "_store.ingest": ("Ingest",),
    "_store.layers": ("DirectoryLayer",),
    "_store.leases": ("Lease",),
    "_store.staging": ("DirectoryStage",),
    "_store.statistics": ("StoreStatistics",),
    "_store.usage": ("ImageUsage", "StoreUsage"),
    "_tar.limits": ("Limits",),
}
_MODULE_OF = {name: module for module, names in _SOURCES.items() for name in names}
_PUBLIC = {"__version__", "abc", *_MODULE_OF}


def _load(name: str) -> object:
    """Import the module of a public name, and return the name's value.

    Raises:
        AttributeError: if there is no such name.
        ImportError: if the module, or a library that it needs, cannot be imported.
    """
    if name == "abc":
        return _import_module(f"{__name__}.abc")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    try:
        value: object = getattr(_import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    except AttributeError as error:
        # Python would take an AttributeError for a missing public name.
        raise ImportError(f"cannot load {__name__}.{name}: {error}") from error
    _mark_public()
    globals()[name] = value
    return value


def _mark_public() -> None:
    """Set the ``__module__`` of the public names in all modules that are loaded by now.

    An error may be raised, and shown, before its public name is used.
    """
    from ._util import export_as_public

    for source, names in _SOURCES.items():
        module = _sys.modules.get(f"{__name__}.{source}")
        found = {name: getattr(module, name, None) for name in names}
        export_as_public(found, __name__)


def __dir__() -> list[str]:
    return sorted(_PUBLIC)


if not TYPE_CHECKING:
    __all__ = sorted(_PUBLIC)
    __getattr__ = _load
