"""The commands that only ask registries: digest, tags and referrers."""

from __future__ import annotations

import argparse
from contextlib import AbstractAsyncContextManager

from .._logins.lookup import LoginFiles
from .._printable import printable
from .._registry.client import RegistryClient, open_registry_client
from .messages import join_line
from .stdio import print_line, print_lines

__all__ = ["run_digest", "run_referrers", "run_tags"]


async def run_digest(arguments: argparse.Namespace) -> int:
    async with _open_client(arguments) as client:
        await print_line((await client.resolve(arguments.reference)).digest)
    return 0


async def run_tags(arguments: argparse.Namespace) -> int:
    async with _open_client(arguments) as client:
        tags = await client.tags(arguments.repository)
    await print_lines(tags)
    return 0


async def run_referrers(arguments: argparse.Namespace) -> int:
    async with _open_client(arguments) as client:
        found = await client.referrers(arguments.reference, artifact_type=arguments.artifact_type)
    await print_lines(
        [
            join_line(each.digest, printable(each.artifact_type or each.media_type), each.size)
            for each in found
        ]
    )
    return 0


def _open_client(arguments: argparse.Namespace) -> AbstractAsyncContextManager[RegistryClient]:
    return open_registry_client(
        credentials=arguments.creds or LoginFiles(arguments.authfile),
        plain_http=arguments.plain_http,
        tls_verify=not arguments.no_tls_verify,
        hosts_dir=arguments.hosts_dir,
    )
