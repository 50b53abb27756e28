"""Small things for the whole package."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import NewType

__all__ = ["export_as_public"]


def export_as_public(namespace: Mapping[str, object], module_name: str) -> None:
    """Let public names say that they come from the module in which users find them.

    Tracebacks, reprs and documentation then show ``trio_layers.NotFound``, where it really is
    ``trio_layers._errors.NotFound``: the private modules can change. It is called at the end of
    a public module.

    Args:
        namespace: The module's ``globals()``. What is private in it, or not ours, is left as
            it is, and so is what another public module exports.
        module_name: The module's ``__name__``.
    """
    package = module_name.partition(".")[0]
    for name, value in namespace.items():
        if name.startswith("_") or not isinstance(value, type | FunctionType | NewType):
            continue
        root, *rest = value.__module__.split(".")
        if root == package and any(part.startswith("_") for part in rest):
            value.__module__ = module_name
