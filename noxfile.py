"""Run ``nox`` for everything, or ``nox -s lint`` for one part; ``nox -l`` lists the parts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import nox

ALL = ["3.13", "3.12", "3.11"]
# The whole suite runs on the Python of nox, and comes last: its result is the last line.
WHOLE = f"{sys.version_info.major}.{sys.version_info.minor}"
OTHERS = [version for version in ALL if version != WHOLE]

PARTIAL = [
    "tests/engine",
    "tests/registry",
    "tests/tar",
    "tests/tree",
    "tests/rootfs",
    "tests/display",
    "tests/test_*.py",
]
"""The tests that other Pythons run, too: none of them needs Debian's packages."""

SAME_EVERYWHERE = [
    "tests/engine/test_many_layers.py",
    "tests/engine/test_random.py",
    "tests/tree/test_cases.py",
    "tests/tree/test_unprivileged.py",
    "tests/tree/test_fuzz.py",
    "tests/tree/test_random.py",
    "tests/rootfs/test_export.py",
    "tests/rootfs/test_export_targets.py",
    "tests/test_words.py",
    "tests/test_layering.py",
]
"""Of these, the tests whose results depend on chance, the kernel or the source text only, and the
cases of whole layers, whose parts the other tests of `tests/tar` and `tests/tree` cover."""

PYPROJECT = nox.project.load_toml("pyproject.toml")

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = False  # a warning is enough


def _find_pyenv_pythons() -> None:
    """Put the Pythons of pyenv on PATH, since its shims find the selected Python only."""
    pyenv = shutil.which("pyenv")
    if pyenv is None:
        return
    root = subprocess.run([pyenv, "root"], capture_output=True, text=True, check=True).stdout
    for version in OTHERS:
        for directory in sorted(Path(root.strip(), "versions").glob(f"{version}.*/bin")):
            os.environ["PATH"] = f"{directory}{os.pathsep}{os.environ['PATH']}"


_find_pyenv_pythons()


@cache
def _wheel() -> str:
    """Build the wheel once, and return its path: the tests run on the package that users get."""
    directory = Path("dist")
    shutil.rmtree(directory, ignore_errors=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*build, str(directory), "."], check=True)
    [wheel] = directory.glob("*.whl")
    return str(wheel)


def _group(name: str) -> list[str]:
    return list(nox.project.dependency_groups(PYPROJECT, name))


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format of Python and Markdown."""
    session.install(*_group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run(
        "mdformat",
        "--check",
        "--compact-tables",
        *map(str, [*Path().glob("*.md"), *Path("docs").glob("*.md")]),
    )


@nox.session
def types(session: nox.Session) -> None:
    """The examples with the packages that users have, then two type checkers."""
    session.install(f"{_wheel()}[cli]")
    for example in sorted(Path("examples").glob("*.py")):
        session.run("python", str(example))
    session.install(f"{_wheel()}[cli,socks]", *_group("types"), *_group("test"))
    session.run("mypy")
    session.run("pyright")
    session.run("pyright", "--verifytypes", "trio_layers", "--ignoreexternal")


@nox.session(python=[*OTHERS, WHOLE])
def tests(session: nox.Session) -> None:
    """The tests on the wheel: all of them on one Python, the differing ones on the others.

    Arguments after ``--`` go to pytest.
    """
    session.install(f"{_wheel()}[cli,socks]", *_group("test"))
    arguments = list(session.posargs)
    if not arguments:
        # Files in their order: the long ones of tests/crashes and tests/pull come early enough.
        arguments = ["--numprocesses=2", "--dist=loadfile", "--no-loadscope-reorder"]
        if session.python != WHOLE:
            arguments += [str(path) for pattern in PARTIAL for path in sorted(Path().glob(pattern))]
            arguments += [f"--ignore={path}" for path in SAME_EVERYWHERE]
    if os.environ.get("TRIO_LAYERS_REQUIRE_ALL"):
        arguments += ["-p", "_no_skips"]
    # Not "python -m pytest", which would put the source tree before the wheel.
    session.run("pytest", *arguments, env={"PYTHONPATH": "tests"})
