"""A process that continues to a given point, reports it, and waits to be killed."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import trio
from store.stores import Stream, describe, digest_of, layer_of, opened

from trio_layers._store import commits

DATA = bytes(range(256)) * 16 * 1024  # 4 MiB
LAYER = layer_of(hello="world", big="x" * 100_000)


def ready() -> None:
    print("ready", flush=True)


def stop(path: Path) -> None:
    """Stand in for the step after a rename."""
    ready()
    time.sleep(1000)


async def main(path: Path, what: str) -> None:
    async with opened(path) as store, trio.open_nursery() as nursery:
        if what == "ingest":
            async with store.ingest(describe(DATA)) as sink:
                await sink.write(DATA[: 3 * 1024 * 1024])
                await sink.write(b"this is not on disk yet")
                ready()
                await trio.sleep_forever()
        elif what == "blob-renamed":
            commits.sync_directory = stop
            async with store.ingest(describe(DATA)) as sink:
                await sink.write(DATA)
                await sink.commit()
        elif what == "register":
            stream = Stream(LAYER.data, stop_at=100)
            nursery.start_soon(store.register, stream, None, LAYER.descriptor)
            await stream.stopped.wait()
            ready()
        elif what == "tree-renamed":
            sync, place = commits.sync_directory, path / "trees" / "sha256"
            commits.sync_directory = lambda path: stop(path) if any(place.iterdir()) else sync(path)
            await store.register(Stream(LAYER.data), None, LAYER.descriptor)
        elif what == "use":
            assert await store.blob(digest_of(b"theirs")) is not None
            await store.put_blob(describe(b"ours"), b"ours")
            ready()
        elif what == "lease":
            async with store.lease(LAYER.digest):
                ready()
                await trio.sleep_forever()


if __name__ == "__main__":
    # A shell ignores SIGINT for background jobs, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    trio.run(main, Path(sys.argv[1]), sys.argv[2])
