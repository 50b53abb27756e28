"""``nox`` runs everything, ``nox -s lint`` one part of it. See ``nox -l``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import nox

ALL = ["3.13", "3.12", "3.11"]
# The whole suite runs on nox's own Python, and comes last: its result is the last line.
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
"""What the other Pythons run: nothing in it needs Debian's packages."""

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = False  # said, not fatal


def _find_pyenv_pythons() -> None:
    """Put the Pythons that pyenv has on PATH: its shims answer for the selected one only."""
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
    """The path of the wheel, built once: what users install is what is tested."""
    directory = Path("dist")
    shutil.rmtree(directory, ignore_errors=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*build, str(directory), "."], check=True)
    [wheel] = directory.glob("*.whl")
    return str(wheel)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format."""
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types: two checkers on the code, and whether all that is public has them."""
    session.install(f"{_wheel()}[dev]")
    session.run("mypy")
    session.run("pyright")
    session.run("pyright", "--verifytypes", "trio_layers", "--ignoreexternal")


@nox.session
def examples(session: nox.Session) -> None:
    """Each example, as users run it."""
    session.install(f"{_wheel()}[cli]")
    for example in sorted(Path("examples").glob("*.py")):
        session.run("python", str(example))


@nox.session(python=[*OTHERS, WHOLE])
def tests(session: nox.Session) -> None:
    """The tests, on the wheel: all of them on one Python, on the others what may differ there.

    Arguments after ``--`` go to pytest.
    """
    session.install(f"{_wheel()}[dev]")
    paths: list[str] = []
    if session.python != WHOLE:
        paths = [str(path) for pattern in PARTIAL for path in sorted(Path().glob(pattern))]
        # What the kernel grants, and what chance finds, is the same for all Pythons.
        paths += ["-k", "not (test_cases and (unprivileged or userns))"]
        paths += [
            f"--ignore=tests/{name}.py"
            for name in ("tree/test_fuzz", "tree/test_random", "rootfs/test_export")
        ]
    no_skips = ["-p", "_no_skips"] if os.environ.get("TRIO_LAYERS_REQUIRE_ALL") else []
    # Not "python -m pytest", which would put the source tree before the wheel.
    session.run("pytest", *no_skips, *(session.posargs or paths), env={"PYTHONPATH": "tests"})
