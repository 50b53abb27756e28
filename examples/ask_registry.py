"""Read from a registry without pulling: tags, an image's layers, and its referrers.

    python examples/ask_registry.py [REF]

Without REF, the example starts a registry on loopback with a small image and its SBOM. Logins are
those of docker and podman.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from trio_layers import LoginFiles, open_registry_client
from trio_layers.testing import build_artifact, build_index, open_registry, sample_image


@asynccontextmanager
async def open_sample_registry() -> AsyncIterator[str]:
    index = build_index([sample_image(platform=f"linux/{name}") for name in ("amd64", "arm64")])
    sbom = build_artifact(b"{}", "application/spdx+json", subject=index.descriptor)
    async with open_registry() as registry:
        registry.add(index, "library/demo:1.0")
        registry.add(sbom, "library/demo")
        yield registry.add(index, "library/demo:latest")


async def main(reference: str | None) -> None:
    async with AsyncExitStack() as stack:
        if reference is None:
            reference = await stack.enter_async_context(open_sample_registry())
        client = await stack.enter_async_context(open_registry_client(credentials=LoginFiles()))

        # A tag points to the digest of a manifest, or of an index of manifests by platform.
        found = await client.resolve(reference)
        print(f"{reference}\n{found.digest} ({found.media_type})\n")

        # resolve_image() chooses this machine's platform, and reads manifest and config.
        image = await client.resolve_image(reference)
        size = sum(layer.size for layer in image.layers)
        print(f"for {image.config.platform}: {len(image.layers)} layers, {size} bytes")

        tags = await client.tags(reference)
        print(f"{len(tags)} tags, the first of them {', '.join(tags[:10])}")

        # Referrers are artifacts about an image, such as SBOMs and signatures.
        for referrer in await client.referrers(reference):
            print(f"referrer {referrer.digest}: {referrer.artifact_type!r}")


if __name__ == "__main__":
    trio.run(main, sys.argv[1] if len(sys.argv) > 1 else None)
