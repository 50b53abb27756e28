"""Modules are loaded when they are first needed, and no earlier."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trio_layers

SLOW = {"trio", "httpx", "anyio", "attr", "sqlite3", "ssl", "asyncio", "rich"}
"""Modules that take longer to import than a short command needs."""


def loaded(program: str, *arguments: str) -> set[str]:
    """Run a program in a new process, and return the modules of `SLOW` that it has loaded."""
    report = f"import sys; print('loaded:', *(sys.modules.keys() & {SLOW!r}), file=sys.stderr)"
    program = f"import atexit; atexit.register(lambda: exec({report!r}))\n{program}"
    command = [sys.executable, "-P", "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("loaded:")]
    return set(line.split()[1:])


def command(*arguments: str) -> set[str]:
    return loaded("import sys\nfrom trio_layers._cli import main\nsys.exit(main())", *arguments)


def test_the_package_loads_nothing_until_a_name_is_used() -> None:
    assert loaded("import trio_layers\ndir(trio_layers)\ntrio_layers.__version__") == set()
    assert loaded("from trio_layers import NotFound") == set()
    assert loaded("from trio_layers import open_store") & {"trio", "httpx"} == {"trio"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["pull", "--help"]])
def test_help_loads_nothing(arguments: list[str]) -> None:
    assert command(*arguments) == set()


def test_commands_load_their_parts(tmp_path: Path) -> None:
    store = ["--store", str(tmp_path)]
    assert command("images", *store) == {"sqlite3"}
    assert command("images", "--size", *store) == {"sqlite3", "attr"}
    assert command("rm", *store, "demo") == {"sqlite3", "attr"}
    assert command("gc", *store) & {"trio", "httpx"} == {"trio"}
    assert command("export", *store, "demo", "-") & {"trio", "httpx"} == {"trio"}
    assert command("tags", "localhost:1/demo") >= {"httpx", "trio"}


def test_the_table_of_names_agrees_with_the_imports_for_type_checkers() -> None:
    source = Path(trio_layers.__file__).read_text()
    [branch, *_] = [each for each in ast.parse(source).body if isinstance(each, ast.If)]
    imports = {
        alias.asname: each.module
        for each in branch.body
        if isinstance(each, ast.ImportFrom)
        for alias in each.names
        if alias.asname == alias.name
    }
    assert imports.pop("abc") is None
    assert imports == trio_layers._MODULE_OF


def test_names_can_be_imported_and_completed() -> None:
    names: dict[str, object] = {}
    exec("from trio_layers import *", names)
    assert {*trio_layers.__all__} <= names.keys()
    assert dir(trio_layers) == trio_layers.__all__
    assert isinstance(trio_layers.NotFound, type)
    with pytest.raises(AttributeError, match="module 'trio_layers' has no attribute 'open_pulle'"):
        trio_layers.open_pulle  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'open_pulle'"):
        exec("from trio_layers import open_pulle")


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("sys.modules['httpx'] = None", "import of httpx halted"),
        ("import attrs; del attrs.frozen", "cannot load trio_layers.open_puller: .*frozen"),
    ],
)
def test_an_error_names_the_part_that_cannot_be_loaded(trouble: str, message: str) -> None:
    program = f"import sys\n{trouble}\nfrom trio_layers import open_puller"
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(message, done.stderr.splitlines()[-1])


def test_an_error_shows_its_public_name() -> None:
    """The name was never used by the program: the error is raised by a part of the library."""
    program = "import trio_layers; trio_layers.parse_reference('UPPER')"
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("trio_layers.InvalidReference: ")
