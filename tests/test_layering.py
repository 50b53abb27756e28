"""Each room imports only rooms below it, and no file is part of a circle.

    _cli ─► _commands ─► _display, _logins, _pull, _archives ─► _registry │ _engine │ _store
    _store ─► _workers ─► _rootfs ─► _tree ─► _tar ─► base ─► values
          └─► _catalog ─► base

`_engine`, `_registry` and `_store` never import one another. Each library belongs to some places:
a room without HTTP cannot start to use it. A module without a place in `LEVELS` is a violation,
because each new place is a decision.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
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
    "_gocompat": 0,
    "_json": 0,
    "_json_members": 0,
    "_reference": 0,
    "_platform": 0,
    "_manifest": 0,
    "_compression": 0,
    "_acl": 0,
    "_entries": 0,
    "_select": 0,
    "_paths": 0,
    "_printable": 0,
    "_arguments": 0,
    # The base: functions and contracts for all rooms.
    "abc": 1,
    "_progress": 1,
    "_lifetime": 1,
    "_nursery": 1,
    "_blocks": 1,
    "_offload": 1,
    "_output": 1,
    "_streams": 1,
    "_single_flight": 1,
    "_util": 1,
    "_hosts_toml": 1,
    "_files": 1,
    "_disk_errors": 1,
    "_damage": 1,
    "_processes": 1,
    "_memory": 1,
    # The rooms.
    "_tar": 2,
    "_tree": 3,
    "_rootfs": 4,
    "_workers": 5,
    "_catalog": 5,
    "_store": 6,
    "_engine": 6,
    "_registry": 6,
    # Modules that tie the rooms together.
    "_image": 7,
    "_logins": 7,
    "_pull": 8,
    "_archives": 8,
    "_display": 8,
    "__init__": 9,
    "_commands": 9,
    "_cli": 10,
    "__main__": 11,
    # The library never imports the tools for tests.
    "testing": 12,
}
VALUES = 0
SIDE_BY_SIDE = (5, 6, 8)
"""Levels whose members do not import one another."""

SEPARATE = frozenset({"_engine", "_registry"})
"""Rooms that import values and base only."""

BASE = 1

EVERYWHERE = frozenset({"attrs", "typing_extensions"})
LIBRARIES: dict[str, frozenset[str]] = {
    # Where a library, or a module of Python's own, may be imported: a place, or one module of it.
    "trio": frozenset(name for name, level in LEVELS.items() if level > VALUES)
    - {"_tar", "_tree", "_disk_errors", "_damage", "_hosts_toml", "_processes"},
    "outcome": frozenset({"_engine"}),
    "httpx": frozenset({"_registry.http", "_registry.http_send", "testing"}),
    "httpcore": frozenset({"_registry.http", "_registry.http_backend", "_registry.http_send"}),
    "pickle": frozenset({"_workers"}),
    "subprocess": frozenset({"_logins", "_workers"}),
    "h11": frozenset({"testing"}),
    "isal": frozenset({"_compression", "testing"}),
    "backports": frozenset({"_compression", "testing"}),
    "compression": frozenset({"_compression", "testing"}),
    "rich": frozenset({"_display"}),
    "argparse": frozenset({"_cli", "_commands"}),
    "getpass": frozenset({"_commands"}),
    "fcntl": frozenset({"_files", "_rootfs", "_store", "_tree"}),
    "sqlite3": frozenset({"_catalog", "_disk_errors", "_files", "_store"}),
    "shutil": frozenset({"_catalog", "_files", "_rootfs", "_logins", "_store", "testing"}),
    "tempfile": frozenset({"_catalog", "_rootfs", "_store", "testing"}),
    "tarfile": frozenset({"testing"}),
    "asyncio": frozenset(),
    "requests": frozenset(),
    "tomllib": frozenset({"_hosts_toml"}),
    "ssl": frozenset({"_registry", "testing"}),
}
FILES = frozenset(
    {
        "_archives",
        "_catalog",
        "_damage",
        "_disk_errors",
        "_files",
        "_hosts_toml",
        "_logins",
        "_streams",
        "_paths",
        "_processes",
        "_rootfs",
        "_store",
        "_tree",
        "_workers",
        "testing",
    }
)
"""Places that may open files, and call any function of `os`."""
HARMLESS_OS = frozenset(
    {"PathLike", "environ", "expanduser", "fspath", "geteuid", "isabs", "join", "path", "uname"}
)


def place_of(module: str) -> str:
    """Return the part of a module's name that has a level, such as ``_store`` of
    ``_store.catalog``.
    """
    return module.partition(".")[0] or "__init__"


def imported(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[str]:
    """Return the full names of all modules that a module imports, at any place in it."""
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
    """Return the violations of a module, named without ``trio_layers.``."""
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
                continue  # a name that the package itself defines
            if there not in LEVELS:
                there = "__init__"
            if there == here:
                continue
            if LEVELS[there] > LEVELS[here]:
                found.append(f"{module}: imports upward, {there}")
            elif LEVELS[there] == LEVELS[here] and LEVELS[here] in SIDE_BY_SIDE:
                found.append(f"{module}: imports its neighbour {there}")
            elif here in SEPARATE and LEVELS[there] > BASE:
                found.append(f"{module}: imports another room, {there}")
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
        ("_engine.slots", "from .._store import leases", "imports its neighbour _store"),
        ("_engine.slots", "from .. import _registry", "imports its neighbour _registry"),
        ("_tar.reader", "from trio_layers._store.content import X", "imports upward, _store"),
        ("_tar.reader", "import trio", "imports trio"),
        ("_rootfs.view", "from .._workers import pool", "imports upward, _workers"),
        ("_catalog.rows", "from .._workers import pool", "imports its neighbour _workers"),
        ("_engine.slots", "from .._tar import reader", "imports another room, _tar"),
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


def name_of(path: Path) -> str:
    """Return a module's dotted name without ``trio_layers.``."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def imports_within_package() -> dict[str, set[str]]:
    """Return for each module of the package the modules that it imports, also those for type
    checking.
    """
    files = {name_of(path): path for path in modules()}
    graph = {}
    for name, path in files.items():
        is_package = path.stem == "__init__"
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            package = [] if name == "__init__" else name.split(".")
            if not is_package:
                package.pop()
            base = package[: len(package) - node.level + 1]
            target = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inner = ".".join(filter(None, [target, alias.name]))
                found.add(inner if inner in files else target or "__init__")
        graph[name] = (found & files.keys()) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import one another, directly or through others."""
    reachable: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        rest = list(graph[start])
        while rest:
            name = rest.pop()
            if name not in seen:
                seen.add(name)
                rest += graph[name]
        reachable[start] = seen
    found = {
        tuple(sorted(other for other in seen | {name} if name in reachable[other]))
        for name, seen in reachable.items()
        if name in seen
    }
    return sorted(map(list, found))


def test_no_modules_form_a_circle() -> None:
    assert circles(imports_within_package()) == []


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(graph) == [["b", "c"]]


def test_a_worker_process_loads_neither_trio_nor_httpx() -> None:
    program = """
import sys, types
package = sys.modules["trio_layers"] = types.ModuleType("trio_layers")
package.__path__ = [sys.argv[1]]
from trio_layers._workers import program
print(sorted({"trio", "httpx", "anyio", "sqlite3", "ssl"} & sys.modules.keys()))
"""
    command = [sys.executable, "-c", program, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


LONGEST_FILE = 600
LONGEST_FUNCTION = 60
LARGEST_ROOM = 0.16
"""Share of the lines of the package that one room may have."""

LONG_FILES: dict[str, str] = {}
"""Files above the limit, with the reason."""

LONG_FUNCTIONS: dict[str, str] = {}
"""Functions above the limit, as ``module:name``, with the reason."""


def length_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    length = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        assert first.end_lineno is not None
        length -= first.end_lineno - first.lineno + 1
    return length


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    name = name_of(path)
    source = path.read_text()
    if name not in LONG_FILES:
        assert len(source.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and f"{name}:{node.name}" not in LONG_FUNCTIONS
        ):
            assert length_without_docstring(node) <= LONGEST_FUNCTION, node.name


def test_no_room_is_too_large() -> None:
    lines: Counter[str] = Counter()
    for path in modules():
        lines[place_of(name_of(path))] += len(path.read_text().splitlines())
    [(room, largest)] = lines.most_common(1)
    assert largest <= LARGEST_ROOM * lines.total(), room
