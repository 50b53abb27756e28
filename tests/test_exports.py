"""The public names: that they are there, documented, and say where they come from."""

from __future__ import annotations

import importlib
from types import FunctionType, ModuleType

import pytest

import trio_layers
import trio_layers.abc
import trio_layers.testing
import trio_layers.testing.store_suite
from trio_layers._util import export_as_public

PUBLIC = [trio_layers, trio_layers.abc, trio_layers.testing, trio_layers.testing.store_suite]


def names(module: ModuleType) -> list[str]:
    """What ``__all__`` says; without it, what has been imported ``x as x``."""
    if "__all__" in vars(module):
        return [name for name in module.__all__ if not name.startswith("__")]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    ]


EXPORTS = [(module.__name__, name) for module in PUBLIC for name in names(module)]


@pytest.mark.parametrize(("module_name", "name"), EXPORTS)
def test_a_public_name_is_documented_and_names_its_module(module_name: str, name: str) -> None:
    value = getattr(importlib.import_module(module_name), name)
    if isinstance(value, type | FunctionType):
        assert value.__module__ in (module_name, "trio_layers")
        assert value.__doc__


def test_export_as_public_touches_only_what_is_ours_and_private() -> None:
    private = type("Private", (), {"__module__": "trio_layers._memory"})
    elsewhere = type("ForeignURL", (), {"__module__": "trio_layers.abc"})
    namespace = {"Private": private, "ForeignURL": elsewhere, "dict": dict, "number": 3}
    export_as_public(namespace, "trio_layers")
    assert private.__module__ == "trio_layers"
    assert elsewhere.__module__ == "trio_layers.abc"
    assert dict.__module__ == "builtins"


def test_export_as_public_leaves_private_names() -> None:
    helper = type("_Helper", (), {"__module__": "trio_layers._memory"})
    export_as_public({"_Helper": helper}, "trio_layers")
    assert helper.__module__ == "trio_layers._memory"
