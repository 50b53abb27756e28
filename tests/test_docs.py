"""The files and functions that the documentation names exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The change log names files of older versions.
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")} - {ROOT / "CHANGELOG.md"})

PYTHON = re.compile(r"`((?:\w+/)*\w+\.py)(?::([\w.]+))?`")
"""A Python file, perhaps with the name of a function or class in it."""

PLACE = re.compile(r"`((?:tests|docs|examples|benchmarks|trio_layers)/[\w/.-]*)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


@cache
def names_in(path: Path) -> frozenset[str]:
    """Return the names of a file's functions, classes and methods, with dots."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{prefix}{node.name}.")

    return frozenset(walk(ast.parse(path.read_text()).body, ""))


def problems(text: str, page: Path) -> list[str]:
    """Return the names in a page that do not exist."""
    found = []
    for file, name in PYTHON.findall(text):
        places = [base / file for base in (ROOT, ROOT / "trio_layers")]
        path = next((place for place in places if place.is_file()), None)
        if path is None or (name and name not in names_in(path)):
            found.append(f"{file}:{name}".rstrip(":"))
    found += [place for place in PLACE.findall(text) if not (ROOT / place).exists()]
    found += [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page: Path) -> None:
    assert problems(page.read_text(), page) == []


def test_missing_names_are_found() -> None:
    text = "`_pull.py:Puller.gone` `gone.py` `tests/gone.py` `tests/gone` [x](gone.md) `_pull.py`"
    assert problems(text, ROOT / "README.md") == [
        "_pull.py:Puller.gone",
        "gone.py",
        "tests/gone.py",
        "tests/gone.py",
        "tests/gone",
        "gone.md",
    ]


def test_the_walk_names_functions() -> None:
    walk = (ROOT / "docs" / "architecture.md").read_text()
    assert len([name for _, name in PYTHON.findall(walk) if name]) >= 30
