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

from .._memory import MemoryStore as MemoryStore
from .._util import export_as_public
from ._auth import BasicAuth as BasicAuth
from ._auth import TokenAuth as TokenAuth
from ._faults import Challenge as Challenge
from ._faults import Corrupt as Corrupt
from ._faults import Cut as Cut
from ._faults import Delay as Delay
from ._faults import Drop as Drop
from ._faults import Encoded as Encoded
from ._faults import Fault as Fault
from ._faults import IgnoreRange as IgnoreRange
from ._faults import Longer as Longer
from ._faults import NoLength as NoLength
from ._faults import Raw as Raw
from ._faults import Redirect as Redirect
from ._faults import Reply as Reply
from ._faults import Shorter as Shorter
from ._faults import Slow as Slow
from ._faults import SlowHead as SlowHead
from ._faults import Stall as Stall
from ._faults import WrongRange as WrongRange
from ._faults import WrongTotal as WrongTotal
from ._http import Answer as Answer
from ._http import Blob as Blob
from ._http import Exchange as Exchange
from ._http import Request as Request
from ._images import Built as Built
from ._images import BuiltArtifact as BuiltArtifact
from ._images import BuiltImage as BuiltImage
from ._images import BuiltIndex as BuiltIndex
from ._images import build_artifact as build_artifact
from ._images import build_image as build_image
from ._images import build_index as build_index
from ._images import sample_image as sample_image
from ._layers import MTIME as MTIME
from ._layers import BuiltLayer as BuiltLayer
from ._layers import Directory as Directory
from ._layers import Entry as Entry
from ._layers import Fifo as Fifo
from ._layers import File as File
from ._layers import Format as Format
from ._layers import HardLink as HardLink
from ._layers import Opaque as Opaque
from ._layers import Symlink as Symlink
from ._layers import Whiteout as Whiteout
from ._layers import build_layer as build_layer
from ._layers import layers_from_directory as layers_from_directory
from ._registry import Registry as Registry
from ._registry import open_registry as open_registry
from ._sources import Attempt as Attempt
from ._sources import ScriptedSource as ScriptedSource
from ._tar import Compression as Compression

export_as_public(globals(), __name__)
