"""Pull container image layers inside trio applications: no daemon, a library first.

`open_puller` gets whole images from registries into a store on disk; `open_download_manager` is
the engine under it, for layer sources and stores of one's own (see `trio_layers.abc`), and
`open_registry_client` asks registries for whatever they have.
"""

from . import abc as abc
from ._archives.exporting import ArchiveFormat as ArchiveFormat
from ._archives.exporting import export_images as export_images
from ._archives.importing import import_images as import_images
from ._catalog.rows import StoredImage as StoredImage
from ._digest import ChainID as ChainID
from ._digest import DiffID as DiffID
from ._digest import Digest as Digest
from ._digest import RootFS as RootFS
from ._display import DisplayKind as DisplayKind
from ._display import open_display as open_display
from ._engine.download import DownloadManager as DownloadManager
from ._engine.download import DownloadStatistics as DownloadStatistics
from ._engine.download import open_download_manager as open_download_manager
from ._entries import Entry as Entry
from ._entries import ExportReport as ExportReport
from ._errors import ArchiveError as ArchiveError
from ._errors import AuthenticationError as AuthenticationError
from ._errors import ClientClosed as ClientClosed
from ._errors import CredentialsError as CredentialsError
from ._errors import DecompressionError as DecompressionError
from ._errors import DisplayClosed as DisplayClosed
from ._errors import DoNotRetry as DoNotRetry
from ._errors import ExportError as ExportError
from ._errors import HostsError as HostsError
from ._errors import InvalidDigest as InvalidDigest
from ._errors import InvalidReference as InvalidReference
from ._errors import LayersError as LayersError
from ._errors import LimitExceeded as LimitExceeded
from ._errors import ManagerClosed as ManagerClosed
from ._errors import ManifestError as ManifestError
from ._errors import MountError as MountError
from ._errors import NetworkSettingError as NetworkSettingError
from ._errors import NotFound as NotFound
from ._errors import PlatformError as PlatformError
from ._errors import RateLimited as RateLimited
from ._errors import RegistrationError as RegistrationError
from ._errors import RegistryError as RegistryError
from ._errors import StoreBusy as StoreBusy
from ._errors import StoreClosed as StoreClosed
from ._errors import StoreError as StoreError
from ._errors import StoreFull as StoreFull
from ._errors import StoreNotFound as StoreNotFound
from ._errors import StoreReadOnly as StoreReadOnly
from ._errors import TransferCancelled as TransferCancelled
from ._errors import TransferError as TransferError
from ._errors import UnpackError as UnpackError
from ._errors import UnsupportedStore as UnsupportedStore
from ._errors import VerificationError as VerificationError
from ._errors import WorkerError as WorkerError
from ._image import ImageLayer as ImageLayer
from ._logins.lookup import LoginFiles as LoginFiles
from ._manifest import Descriptor as Descriptor
from ._manifest import ImageConfig as ImageConfig
from ._memory import MemoryLayer as MemoryLayer
from ._memory import MemoryStore as MemoryStore
from ._memory import MemoryStream as MemoryStream
from ._platform import Platform as Platform
from ._platform import host_platform as host_platform
from ._platform import parse_platform as parse_platform
from ._progress import Progress as Progress
from ._progress import Status as Status
from ._pull import Image as Image
from ._pull import Puller as Puller
from ._pull import PullPolicy as PullPolicy
from ._pull import open_puller as open_puller
from ._reference import Reference as Reference
from ._reference import parse_reference as parse_reference
from ._registry.blobs import BlobChunks as BlobChunks
from ._registry.client import RegistryClient as RegistryClient
from ._registry.client import RegistryStatistics as RegistryStatistics
from ._registry.client import open_registry_client as open_registry_client
from ._registry.credentials import Credentials as Credentials
from ._registry.credentials import CredentialsSource as CredentialsSource
from ._registry.error_responses import RateLimit as RateLimit
from ._registry.resolving import ResolvedImage as ResolvedImage
from ._rootfs.view import RootfsView as RootfsView
from ._store.check import CheckReport as CheckReport
from ._store.check import Problem as Problem
from ._store.collect import Collected as Collected
from ._store.collect import MountedTree as MountedTree
from ._store.directory import DirectoryStore as DirectoryStore
from ._store.directory import open_store as open_store
from ._store.usage import ImageUsage as ImageUsage
from ._store.usage import StoreUsage as StoreUsage
from ._tar.limits import Limits as Limits
from ._util import export_as_public
from ._version import __version__ as __version__

export_as_public(globals(), __name__)
del export_as_public
