"""Errors keep all their details in other processes and in other waiting tasks."""

from __future__ import annotations

import pickle

import pytest

import trio_layers
from trio_layers import LayersError

ERRORS = [
    trio_layers.InvalidReference("A", "uppercase", "a capital"),
    trio_layers.InvalidDigest("sha256:x"),
    trio_layers.RegistryError("no", host="h:1", status=500),
    trio_layers.RateLimited("later", host="h", status=429, retry_after=1.5),
    trio_layers.VerificationError("differs", digest="sha256:0"),
    trio_layers.RegistrationError("no", reason=trio_layers.StoreFull("full")),
    trio_layers.ExportError("/x", "is full"),
    trio_layers.UnpackError("'f': damaged"),
    trio_layers.WorkerError("died"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_elsewhere(error: LayersError) -> None:
    if isinstance(error, trio_layers.UnpackError):
        error.layer = "sha256:1"
    error.add_note("a note")
    for other in (pickle.loads(pickle.dumps(error)), error.copy_to_raise()):
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert other.__notes__ == ["a note"]
        assert other.args == error.args
        for name, value in vars(error).items():
            if isinstance(value, Exception):
                assert str(getattr(other, name)) == str(value)
            else:
                assert getattr(other, name) == value
