"""Tests that any layer store must pass, to run on your own store.

`StoreSuite` tests the promises of `trio_layers.abc.LayerStore`, and `StagingStoreSuite` also those
of `~trio_layers.abc.StagingStore`. Write a subclass that opens your store; its methods are tests
for pytest-trio (in its trio mode, or marked ``trio``):

    class TestMyStore(StagingStoreSuite[MyStore]):
        def open_store(self):
            return open_my_store()

For anyio's pytest plugin, mark the class ``anyio``, and let the fixture ``anyio_backend`` return
``"trio"``. A fixture of the class can give each test a directory:

        @pytest.fixture(autouse=True)
        def _directory(self, tmp_path):
            self.directory = tmp_path

The suite does not need pytest. Without it:

    for name, check in TestMyStore().checks():
        trio.run(check)

A check that fails raises `AssertionError`, or the store's unexpected error. A check that takes
longer than `StoreSuite.patience` raises `trio.TooSlowError`. The suite tests the visible behavior
of a store. It cannot test the effects of a crash or a full disk.
"""

from .._util import export_as_public
from ._layer_suite import StoreSuite
from ._staging_suite import StagingStoreSuite

__all__ = ["StagingStoreSuite", "StoreSuite"]

export_as_public(globals(), __name__)
del export_as_public


def __dir__() -> list[str]:
    return __all__
