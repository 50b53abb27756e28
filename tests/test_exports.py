"""The public names: complete, documented, and no others."""

from __future__ import annotations

import importlib
import inspect
import sys
import typing
from collections.abc import Iterator
from types import FunctionType, ModuleType

import pytest

import trio_layers
import trio_layers.abc
import trio_layers.testing
import trio_layers.testing.store_suite
from trio_layers import (
    DirectoryStore,
    DownloadManager,
    Lease,
    Puller,
    RegistryClient,
    RootfsView,
)
from trio_layers._util import construct, export_as_public, made_by

PUBLIC = [trio_layers, trio_layers.abc, trio_layers.testing, trio_layers.testing.store_suite]
EXPORTS = [(module.__name__, name) for module in PUBLIC for name in module.__all__]
OBJECTS = {
    name: getattr(importlib.import_module(module), name)
    for module, name in EXPORTS
    if not name.startswith("__")
}
CLASSES = [each for each in OBJECTS.values() if isinstance(each, type)]
PROTOCOLS = {
    name
    for each in vars(trio_layers.abc).values()
    if isinstance(each, type)
    for name in vars(each)
    if not name.startswith("_")
}
"""Methods with the signatures of `trio_layers.abc`, which users implement."""

MANY_SUBJECTS = {
    "export_images": "a store, images and a target are the three subjects of a copy",
    "RegistryClient.fetch_blob": "a reference, a blob and a sink are the three subjects of a copy",
    "layers_from_directory": "a source, a number of parts and an output are those of a split",
}


def functions() -> Iterator[tuple[str, FunctionType]]:
    """Yield the public functions and methods without their decorators."""
    for name, each in OBJECTS.items():
        if isinstance(each, FunctionType):
            yield name, inspect.unwrap(each)
        elif isinstance(each, type):
            for key, member in vars(each).items():
                if isinstance(member, property):
                    member = member.fget
                if isinstance(member, classmethod | staticmethod):
                    member = member.__func__
                if not key.startswith("_") and isinstance(member, FunctionType):
                    yield f"{name}.{key}", inspect.unwrap(member)


FUNCTIONS = dict(functions())


def source_of(each: type) -> dict[str, object]:
    """Return the names of the modules that have a class, for its annotations."""
    names: dict[str, object] = {}
    for name, module in tuple(sys.modules.items()):
        if name.startswith("trio_layers") and vars(module).get(each.__name__) is each:
            names |= vars(module)
    return names


def private_types(hints: dict[str, object]) -> set[str]:
    """Return the types in annotations that users cannot import."""
    found: set[str] = set()
    rest: list[object] = list(hints.values())
    while rest:
        each = rest.pop()
        if isinstance(each, list | tuple):
            rest += each
            continue
        rest += [*typing.get_args(each), *filter(None, [typing.get_origin(each)])]
        module = getattr(each, "__module__", "")
        private = module.startswith("trio_layers") and "._" in module
        if private and isinstance(each, type | typing.NewType):
            found.add(f"{module}.{each.__name__}")
    return found


@pytest.mark.parametrize(("module_name", "name"), EXPORTS)
def test_a_public_name_is_documented_and_names_its_module(module_name: str, name: str) -> None:
    value = getattr(importlib.import_module(module_name), name)
    if isinstance(value, type | FunctionType):
        assert value.__module__ in (module_name, "trio_layers")
        assert value.__doc__


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_only_public_names_are_shown(module: ModuleType) -> None:
    assert dir(module) == sorted(module.__all__)
    visible = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("trio_layers")
    }
    assert visible <= {name for each in PUBLIC for name in each.__all__}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_types_in_public_signatures_are_public(name: str) -> None:
    function = FUNCTIONS[name]
    # A module may import public types for type checkers only.
    names = {**OBJECTS, **function.__globals__}
    assert private_types(typing.get_type_hints(function, names)) == set()


@pytest.mark.parametrize("each", CLASSES, ids=lambda each: each.__name__)
def test_types_of_public_attributes_are_public(each: type) -> None:
    hints = typing.get_type_hints(each, {**vars(typing), **source_of(each)})
    shown = {name: hint for name, hint in hints.items() if not name.startswith("_")}
    assert private_types(shown) == set()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_after_the_subject_are_keyword_only(name: str) -> None:
    parameters = list(inspect.signature(FUNCTIONS[name]).parameters.values())
    if "." in name and name.rpartition(".")[2] in PROTOCOLS:
        return
    positional = [
        each
        for each in parameters[("." in name) :]
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    assert len(positional) <= (3 if name in MANY_SUBJECTS else 2)
    assert all(each.default is each.empty for each in positional[1:])


@pytest.mark.parametrize(
    "each",
    [DownloadManager, Puller, DirectoryStore, RegistryClient, RootfsView, Lease],
    ids=lambda each: each.__name__,
)
def test_objects_of_a_factory_cannot_be_constructed(each: type) -> None:
    with pytest.raises(TypeError, match=rf"{each.__name__} has no public constructor: use \w+"):
        each()


AWAITING = [
    name
    for name, each in FUNCTIONS.items()
    if (inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each))
    # The suite's methods are tests for other stores.
    and not name.startswith(("StoreSuite.", "StagingStoreSuite."))
]


@pytest.mark.parametrize("name", AWAITING)
def test_awaiting_functions_describe_cancellation(name: str) -> None:
    """A docstring says which state a cancellation leaves.

    It is that of the function, its class, or the method of `trio_layers.abc` that it implements.
    """
    texts = [FUNCTIONS[name].__doc__ or ""]
    if "." in name:
        owner, _, method = name.partition(".")
        texts.append(OBJECTS[owner].__doc__ or "")
        for each in vars(trio_layers.abc).values():
            texts.append(getattr(getattr(each, method, None), "__doc__", None) or "")
    assert any("ancel" in text for text in texts)


def test_construct() -> None:
    @made_by("open_thing")
    class Thing:
        def __init__(self, number: int, *, text: str = "") -> None:
            self.number, self.text = number, text

    thing = construct(Thing, 3, text="x")
    assert (thing.number, thing.text) == (3, "x")
    with pytest.raises(TypeError, match="use open_thing"):
        Thing(3)


def test_export_as_public_touches_only_private_modules_of_the_package() -> None:
    private = type("Private", (), {"__module__": "trio_layers._memory"})
    elsewhere = type("Elsewhere", (), {"__module__": "trio_layers.abc"})
    namespace = {"Private": private, "Elsewhere": elsewhere, "dict": dict, "number": 3}
    export_as_public(namespace, "trio_layers")
    assert private.__module__ == "trio_layers"
    assert elsewhere.__module__ == "trio_layers.abc"
    assert dict.__module__ == "builtins"


def test_export_as_public_leaves_private_names() -> None:
    helper = type("_Helper", (), {"__module__": "trio_layers._memory"})
    export_as_public({"_Helper": helper}, "trio_layers")
    assert helper.__module__ == "trio_layers._memory"
