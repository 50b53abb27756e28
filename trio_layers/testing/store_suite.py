"""What any layer store must do, as tests to run on yours.

`StoreSuite` checks what `trio_layers.abc.LayerStore` promises, `StagingStoreSuite` that and what
`~trio_layers.abc.StagingStore` does. Say how to open a store, and the methods are tests, for
pytest-trio (in its trio mode, or marked ``trio``):

    class TestMyStore(StagingStoreSuite[MyStore]):
        def open_store(self):
            return open_my_store()

For anyio's pytest plugin mark the class ``anyio``, and let the fixture ``anyio_backend`` be
``"trio"``. A directory for each test comes by a fixture of the class:

        @pytest.fixture(autouse=True)
        def _directory(self, tmp_path):
            self.directory = tmp_path

Nothing here needs pytest. Without it:

    for name, check in TestMyStore().checks():
        trio.run(check)

A check that fails raises `AssertionError`, or what the store raised where it must not; one that
takes longer than `StoreSuite.patience` raises `trio.TooSlowError`. The suite shows what is wrong
with a store that others see. It cannot show what a crash or a full disk does to it.
"""

from .._util import export_as_public
from ._layer_suite import StoreSuite as StoreSuite
from ._staging_suite import StagingStoreSuite as StagingStoreSuite

__all__ = ["StagingStoreSuite", "StoreSuite"]

export_as_public(globals(), __name__)
