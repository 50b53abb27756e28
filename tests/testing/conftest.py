"""Fixtures for the embedded registry."""

from __future__ import annotations

import pytest
from testing.registry_clients import memory_client, socket_client


@pytest.fixture(params=[socket_client, memory_client], ids=["socket", "memory"])
def connect(request: pytest.FixtureRequest):
    return request.param
