"""Runs the tests of modules with ``BOTH_WAYS = True`` twice: with streaming sources, and with
sources that can be staged. Tests that are about streams are marked ``streamed``.
"""

from __future__ import annotations

import pytest
from engine.fakes import FakeSource


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    both_ways = getattr(metafunc.module, "BOTH_WAYS", None) is True
    if both_ways and not metafunc.definition.get_closest_marker("streamed"):
        metafunc.parametrize("_staged", [False, True], ids=["streamed", "staged"], indirect=True)


@pytest.fixture(autouse=True)
def _staged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeSource, "staged", getattr(request, "param", False))
