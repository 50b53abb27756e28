"""Tools for testing code that pulls images, without a network and with any fault.

`open_registry` opens a real registry on a loopback port. `Registry.transport` is the same registry
without sockets, for tests on a mock clock. `Registry.inject` makes it misbehave, with `Cut`,
`Stall`, `Reply` and the other faults.

`build_image`, `build_index` and `build_layer` make images from a few entries (`File`, `Symlink`,
`Whiteout`...), with the same bytes in every run. `sample_image` returns a finished image,
`build_artifact` makes an artifact that refers to an image, and `layers_from_directory` makes large
layers. These functions compress, which takes time: if that matters, call them before the event loop
runs, or in a thread.

`ScriptedSource` replaces a registry in tests of the download manager. `MemoryStore` is a store in
memory that unpacks layers while they arrive. `trio_layers.testing.store_suite` has the tests that
your own store must pass.

    async with open_registry() as registry:
        reference = registry.add(sample_image(), "library/sample:latest")
        registry.inject("/v2/*/blobs/*", Cut(after=1000))
        ...  # pull the reference; registry.requests lists the requests
"""

from .. import MemoryStore
from .._util import export_as_public
from ._auth import BasicAuth, TokenAuth
from ._faults import (
    Challenge,
    Corrupt,
    Cut,
    Delay,
    Drop,
    Encoded,
    Fault,
    IgnoreRange,
    Longer,
    NoLength,
    Raw,
    Redirect,
    Reply,
    Shorter,
    Slow,
    SlowHead,
    Stall,
    WrongRange,
    WrongTotal,
)
from ._http import Answer, Blob, Exchange, Request
from ._images import (
    Built,
    BuiltArtifact,
    BuiltImage,
    BuiltIndex,
    build_artifact,
    build_image,
    build_index,
    sample_image,
)
from ._layers import (
    MTIME,
    BuiltLayer,
    Directory,
    Fifo,
    File,
    Format,
    HardLink,
    LayerEntry,
    Opaque,
    Symlink,
    Whiteout,
    build_layer,
    layers_from_directory,
)
from ._registry import Registry, open_registry
from ._sources import Attempt, ScriptedSource
from ._tar import Compression

__all__ = [
    "MTIME",
    "Answer",
    "Attempt",
    "BasicAuth",
    "Blob",
    "Built",
    "BuiltArtifact",
    "BuiltImage",
    "BuiltIndex",
    "BuiltLayer",
    "Challenge",
    "Compression",
    "Corrupt",
    "Cut",
    "Delay",
    "Directory",
    "Drop",
    "Encoded",
    "Exchange",
    "Fault",
    "Fifo",
    "File",
    "Format",
    "HardLink",
    "IgnoreRange",
    "LayerEntry",
    "Longer",
    "MemoryStore",
    "NoLength",
    "Opaque",
    "Raw",
    "Redirect",
    "Registry",
    "Reply",
    "Request",
    "ScriptedSource",
    "Shorter",
    "Slow",
    "SlowHead",
    "Stall",
    "Symlink",
    "TokenAuth",
    "Whiteout",
    "WrongRange",
    "WrongTotal",
    "build_artifact",
    "build_image",
    "build_index",
    "build_layer",
    "layers_from_directory",
    "open_registry",
    "sample_image",
]

export_as_public(globals(), __name__)
del export_as_public


def __dir__() -> list[str]:
    return __all__
