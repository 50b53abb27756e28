"""Pull container image layers inside trio applications: no daemon, a library first.

`open_puller` gets whole images from registries into a store on disk. `open_download_manager` is
the engine below it, for layer sources and stores of your own (see `trio_layers.abc`).
`open_registry_client` asks registries for tags, manifests, blobs and referrers.
"""

from . import abc
from ._archives.exporting import ArchiveFormat, export_images
from ._archives.importing import import_images
from ._catalog.rows import StoredImage
from ._digest import ChainID, DiffID, Digest, RootFS
from ._display import DisplayKind, open_display
from ._engine.download import DownloadManager, DownloadStatistics, open_download_manager
from ._entries import Entry, EntryType, ExportReport
from ._errors import (
    ArchiveError,
    AuthenticationError,
    ClientClosed,
    CredentialsError,
    DecompressionError,
    DisplayClosed,
    DoNotRetry,
    ExportError,
    HostsError,
    InvalidDigest,
    InvalidReference,
    LayersError,
    LimitExceeded,
    ManagerClosed,
    ManifestError,
    MountError,
    NetworkSettingError,
    NotFound,
    PlatformError,
    RateLimited,
    RegistrationError,
    RegistryError,
    StoreBusy,
    StoreClosed,
    StoreError,
    StoreFull,
    StoreNotFound,
    StoreReadOnly,
    TransferCancelled,
    TransferError,
    UnpackError,
    UnsupportedStore,
    VerificationError,
    WorkerError,
)
from ._image import ImageLayer
from ._logins.lookup import LoginFiles
from ._manifest import Descriptor, ImageConfig, Index, Manifest
from ._memory import MemoryLayer, MemoryStage, MemoryStore, MemoryStream
from ._platform import Platform, host_platform, parse_platform
from ._progress import Progress, Status
from ._pull import Image, Puller, PullerStatistics, PullPolicy, open_puller
from ._reference import Reference, parse_reference
from ._registry.blobs import BlobChunks
from ._registry.client import RegistryClient, RegistryStatistics, open_registry_client
from ._registry.credentials import Credentials, CredentialsFor, CredentialsSource
from ._registry.error_responses import RateLimit
from ._registry.resolving import ResolvedImage
from ._rootfs.view import RootfsView
from ._store.batch import Batch
from ._store.check import CheckReport, Problem
from ._store.collect import Collected, MountedTree
from ._store.content import BlobStream
from ._store.directory import DirectoryStore, StoreStatistics, open_store
from ._store.ingest import Ingest
from ._store.layers import DirectoryLayer
from ._store.leases import Lease
from ._store.staging import DirectoryStage
from ._store.usage import ImageUsage, StoreUsage
from ._tar.limits import Limits
from ._util import export_as_public
from ._version import __version__

__all__ = [
    "ArchiveError",
    "ArchiveFormat",
    "AuthenticationError",
    "Batch",
    "BlobChunks",
    "BlobStream",
    "ChainID",
    "CheckReport",
    "ClientClosed",
    "Collected",
    "Credentials",
    "CredentialsError",
    "CredentialsFor",
    "CredentialsSource",
    "DecompressionError",
    "Descriptor",
    "DiffID",
    "Digest",
    "DirectoryLayer",
    "DirectoryStage",
    "DirectoryStore",
    "DisplayClosed",
    "DisplayKind",
    "DoNotRetry",
    "DownloadManager",
    "DownloadStatistics",
    "Entry",
    "EntryType",
    "ExportError",
    "ExportReport",
    "HostsError",
    "Image",
    "ImageConfig",
    "ImageLayer",
    "ImageUsage",
    "Index",
    "Ingest",
    "InvalidDigest",
    "InvalidReference",
    "LayersError",
    "Lease",
    "LimitExceeded",
    "Limits",
    "LoginFiles",
    "ManagerClosed",
    "Manifest",
    "ManifestError",
    "MemoryLayer",
    "MemoryStage",
    "MemoryStore",
    "MemoryStream",
    "MountError",
    "MountedTree",
    "NetworkSettingError",
    "NotFound",
    "Platform",
    "PlatformError",
    "Problem",
    "Progress",
    "PullPolicy",
    "Puller",
    "PullerStatistics",
    "RateLimit",
    "RateLimited",
    "Reference",
    "RegistrationError",
    "RegistryClient",
    "RegistryError",
    "RegistryStatistics",
    "ResolvedImage",
    "RootFS",
    "RootfsView",
    "Status",
    "StoreBusy",
    "StoreClosed",
    "StoreError",
    "StoreFull",
    "StoreNotFound",
    "StoreReadOnly",
    "StoreStatistics",
    "StoreUsage",
    "StoredImage",
    "TransferCancelled",
    "TransferError",
    "UnpackError",
    "UnsupportedStore",
    "VerificationError",
    "WorkerError",
    "__version__",
    "abc",
    "export_images",
    "host_platform",
    "import_images",
    "open_display",
    "open_download_manager",
    "open_puller",
    "open_registry_client",
    "open_store",
    "parse_platform",
    "parse_reference",
]

export_as_public(globals(), __name__)
del export_as_public


def __dir__() -> list[str]:
    return __all__
