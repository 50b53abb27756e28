"""Helpers for public classes and modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import NewType, NoReturn, ParamSpec, TypeVar, cast

__all__ = ["construct", "export_as_public", "made_by"]

P = ParamSpec("P")
T = TypeVar("T")
ClassT = TypeVar("ClassT", bound=type[object])


def export_as_public(namespace: Mapping[str, object], module_name: str) -> None:
    """Set the ``__module__`` of public names to the module in which users find them.

    Tracebacks, reprs and documentation then show ``trio_layers.NotFound`` in place of
    ``trio_layers._errors.NotFound``, and private modules can change. Call it at the end of a
    public module.

    Args:
        namespace: The module's ``globals()``. Private names in it stay as they are, and so do names
            of other packages and those that another public module exports.
        module_name: The module's ``__name__``.
    """
    package = module_name.partition(".")[0]
    for name, value in namespace.items():
        if name.startswith("_") or not isinstance(value, type | FunctionType | NewType):
            continue
        root, *rest = value.__module__.split(".")
        if root == package and any(part.startswith("_") for part in rest):
            value.__module__ = module_name


def made_by(factory: str) -> Callable[[ClassT], ClassT]:
    """Decorate a class that users must not construct; the package calls `construct`.

    Args:
        factory: The public function or method that gives users an instance.
    """

    def decorate(cls: ClassT) -> ClassT:
        def refuse(self: object, *args: object, **kwargs: object) -> NoReturn:
            raise TypeError(f"{cls.__name__} has no public constructor: use {factory}")

        _INITS[cls] = cast(FunctionType, cls.__init__)
        # Not "cls.__init__ = refuse": type checkers keep the signature for `construct`.
        setattr(cls, "__init__", refuse)  # noqa: B010
        return cls

    return decorate


_INITS: dict[type[object], FunctionType] = {}


def construct(cls: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Construct an instance of a class that `made_by` decorates."""
    made = cast(type[object], cls)
    instance = made.__new__(made)
    _INITS[made](instance, *args, **kwargs)
    return cast(T, instance)
