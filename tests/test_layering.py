"""The folders show the architecture, and this holds them to it: who may import whom.

    _cli ─► _commands ─► _display, _logins, _pull, _archives ─► _workers ─► _worker
         ─► _registry │ _engine │ _unpack │ _store ─► base ─► values

Imports point down only, and the four rooms never import one another. Some libraries belong to
some places: a room that has no HTTP in it cannot start to speak it. A module without a place in
`LEVELS` is a violation as well: giving it one is a decision.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trio_layers

PACKAGE = "trio_layers"
ROOT = Path(trio_layers.__file__).parent

LEVELS: dict[str, int] = {
    # Plain values.
    "_version": 0,
    "_errors": 0,
    "_digest": 0,
    "_as_go": 0,
    "_json": 0,
    "_reference": 0,
    "_platform": 0,
    "_manifest": 0,
    "_compression": 0,
    "_acl": 0,
    "_entries": 0,
    "_choice": 0,
    "_paths": 0,
    "_arguments": 0,
    # The base: what the rooms agree on.
    "abc": 1,
    "_progress": 1,
    "_lifetime": 1,
    "_nursery": 1,
    "_blocks": 1,
    "_offload": 1,
    "_output": 1,
    "_sharing": 1,
    "_util": 1,
    # The rooms.
    "_engine": 2,
    "_registry": 2,
    "_unpack": 2,
    "_store": 2,
    # What ties them together.
    "_image": 3,
    "_worker": 3,
    "_logins": 3,
    "_workers": 4,
    "_pull": 5,
    "_archives": 5,
    "_display": 5,
    "__init__": 6,
    "_commands": 6,
    "_cli": 7,
    "__main__": 8,
    # Beside them all: nothing in the library may need what tests need.
    "testing": 9,
}
VALUES, ROOMS = 0, 2
SIDE_BY_SIDE = (2, 5)
"""Levels whose members do not import one another."""

EVERYWHERE = frozenset({"attrs", "typing_extensions"})
LIBRARIES: dict[str, frozenset[str]] = {
    # Where a library, or a module of Python's own, may be imported: a place, or one module of it.
    "trio": frozenset(name for name, level in LEVELS.items() if level > VALUES),
    "outcome": frozenset({"_engine"}),
    "httpx": frozenset({"_registry.http", "testing"}),
    "httpcore": frozenset({"_registry.http"}),
    "pickle": frozenset({"_worker", "_workers"}),
    "subprocess": frozenset({"_logins", "_workers"}),
    "h11": frozenset({"testing"}),
    "isal": frozenset({"_compression", "testing"}),
    "backports": frozenset({"_compression", "testing"}),
    "compression": frozenset({"_compression", "testing"}),
    "rich": frozenset({"_display"}),
    "argparse": frozenset({"_cli", "_commands"}),
    "getpass": frozenset({"_commands"}),
    "fcntl": frozenset({"_store", "_unpack"}),
    "sqlite3": frozenset({"_store"}),
    "shutil": frozenset({"_logins", "_store", "_unpack", "testing"}),
    "tempfile": frozenset({"_store", "_unpack", "testing"}),
    "tarfile": frozenset({"testing"}),
    "asyncio": frozenset(),
    "requests": frozenset(),
    "tomllib": frozenset({"_registry"}),
    "ssl": frozenset({"_registry", "testing"}),
}
FILES = frozenset(
    {
        "_archives",
        "_logins",
        "_output",
        "_paths",
        "_store",
        "_unpack",
        "_worker",
        "_workers",
        "testing",
    }
)
"""Who may open files, and call `os` for more than the process's own circumstances."""
HARMLESS_OS = frozenset(
    {"PathLike", "environ", "expanduser", "fspath", "geteuid", "isabs", "join", "path", "uname"}
)


def place_of(module: str) -> str:
    """The part of a module's name that has a level: ``_store.catalog`` is in ``_store``."""
    return module.partition(".")[0] or "__init__"


def imported(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[str]:
    """The full names of all modules that a module imports, wherever in it."""
    package = [PACKAGE, *module.split(".")] if module != "__init__" else [PACKAGE, ""]
    if not is_package or module == "__init__":
        package.pop()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *filter(None, [node.module])])
            if name == PACKAGE:  # "from . import x": each name may be a module
                yield from (f"{PACKAGE}.{alias.name}" for alias in node.names)
            else:
                yield name


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with a module of the package, by its name without ``trio_layers.``."""
    here = place_of(module)
    if here not in LEVELS:
        return [f"{module}: has no place in LEVELS"]
    tree = ast.parse(source)
    found = []
    for name in imported(tree, module, is_package=is_package):
        root, _, rest = name.partition(".")
        if root == PACKAGE:
            there = place_of(rest)
            if there not in LEVELS and here == "__init__":
                continue  # its own names
            if there not in LEVELS:
                there = "__init__"
            if there == here:
                continue
            if LEVELS[there] > LEVELS[here]:
                found.append(f"{module}: imports upward, {there}")
            elif LEVELS[there] == LEVELS[here] and LEVELS[here] in SIDE_BY_SIDE:
                found.append(f"{module}: imports its neighbour {there}")
        elif root in LIBRARIES:
            if LIBRARIES[root].isdisjoint({here, module}):
                found.append(f"{module}: imports {root}")
        elif root not in sys.stdlib_module_names and root not in EVERYWHERE:
            found.append(f"{module}: imports {root}, which has no place in LIBRARIES")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "print":  # print() can block trio's thread
                found.append(f"{module}: prints")
            if node.func.id == "open" and here not in FILES:
                found.append(f"{module}: opens a file")
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
            and node.attr not in HARMLESS_OS
            and here not in FILES
        ):
            found.append(f"{module}: uses os.{node.attr}")
    return found


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_keeps_the_rules(path: Path) -> None:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    is_package = parts[-1] == "__init__"
    if is_package and len(parts) > 1:
        parts.pop()
    assert violations(".".join(parts), path.read_text(), is_package=is_package) == []


@pytest.mark.parametrize(
    ("module", "source", "violation"),
    [
        ("_engine.slots", "import httpx", "imports httpx"),
        ("_engine.slots", "from .._store import memory", "imports its neighbour _store"),
        ("_engine.slots", "from .. import _registry", "imports its neighbour _registry"),
        ("_unpack.tar", "from trio_layers._store.rootfs import X", "neighbour _store"),
        ("_store.directory", "from .._pull import open_puller", "imports upward, _pull"),
        ("_store.directory", "from trio_layers import open_puller", "imports upward, __init__"),
        ("_store.directory", "from ..testing import images", "imports upward, testing"),
        ("_digest", "import trio", "imports trio"),
        ("_digest", "def f():\n    from httpx import get", "imports httpx"),
        ("_digest", "from ._progress import Progress", "imports upward, _progress"),
        ("abc", "from ._engine.download import X", "imports upward, _engine"),
        ("_display", "from ._pull import Image", "imports its neighbour _pull"),
        ("_registry.client", "import httpx", "imports httpx"),
        ("_pull", "from httpx import AsyncClient", "imports httpx"),
        ("_pull", "import argparse", "imports argparse"),
        ("_pull", "import numpy", "imports numpy"),
        ("_pull", "print('done')", "prints"),
        ("_pull", "open('file')", "opens a file"),
        ("_registry.client", "import os\nos.open('file', 0)", "uses os.open"),
        ("_archives.reading", "from .._pull import Image", "imports its neighbour _pull"),
        ("_archives.reading", "import tarfile", "imports tarfile"),
        ("_store.content", "from .._archives import x", "imports upward, _archives"),
        ("_extra", "", "has no place"),
    ],
)
def test_a_violation_is_found(module: str, source: str, violation: str) -> None:
    [text] = violations(module, source)
    assert violation in text


@pytest.mark.parametrize(
    ("module", "is_package", "source"),
    [
        ("_store.directory", False, "from .catalog import X\nfrom ..abc import Y\nimport os"),
        ("_store", True, "from .directory import X\nfrom .. import _digest"),
        ("_registry.http", False, "import httpx"),
        ("_registry.client", False, "import trio\nfrom .._manifest import Manifest"),
        ("__init__", True, "from ._pull import X as X\nfrom . import abc as abc"),
        ("_cli", False, "import argparse\nfrom ._pull import X"),
        ("testing.registry", False, "import httpx\nfrom .. import Digest\nopen('file')"),
        ("_digest", False, "import hashlib, attrs\nfrom ._errors import InvalidDigest"),
    ],
)
def test_what_is_allowed_is_not_found(module: str, is_package: bool, source: str) -> None:
    assert violations(module, source, is_package=is_package) == []
