"""Clients of an embedded registry, over a socket and in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from trio_layers.testing import (
    Registry,
    open_registry,
    sample_image,
)

IMAGE = sample_image()
LARGE = max(IMAGE.blobs.values(), key=len)
DATA = bytes(range(256)) * 1024
NAME = "library/demo"


@asynccontextmanager
async def socket_client(auth=None) -> AsyncIterator[tuple[Registry, httpx.AsyncClient]]:
    async with open_registry(auth=auth) as registry:
        async with httpx.AsyncClient(base_url=registry.url) as client:
            yield registry, client


@asynccontextmanager
async def memory_client(auth=None) -> AsyncIterator[tuple[Registry, httpx.AsyncClient]]:
    registry = Registry(auth=auth)
    async with httpx.AsyncClient(base_url=registry.url, transport=registry.transport()) as client:
        yield registry, client
