"""Use the transfer engine alone, with your own layer sources: no registry, no disk.

    python examples/engine_only.py

Two pulls share a base layer. Its first download fails, is retried, and serves both pulls.
"""

from __future__ import annotations

import io
import tarfile

import trio

from trio_layers import MemoryStore, MemoryStream, Progress, open_download_manager
from trio_layers.abc import ReportProgress


class TarLayer:
    """A source of a layer with one file, on a slow network that may fail."""

    def __init__(self, name: str, text: str, failures: int = 0) -> None:
        self.key = f"tar:{name}"  # sources with equal keys share one download
        self.id = name  # the ID in progress events
        self._text = text
        self._failures = failures

    def diff_id(self) -> None:
        return None  # the diff ID is not known before the download

    async def download(self, progress: ReportProgress) -> tuple[MemoryStream, int]:
        if self._failures:
            self._failures -= 1
            raise ConnectionError("the network is down")
        data = self._tar()
        for sent in range(0, len(data), 2048):
            progress("Downloading", sent, len(data))
            await trio.sleep(0.05)
        return MemoryStream(data), len(data)

    def _tar(self) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            info = tarfile.TarInfo(f"{self.id}.txt")
            info.size = len(self._text)
            tar.addfile(info, io.BytesIO(self._text.encode()))
        return file.getvalue()

    def close(self) -> None:
        print(f"  {self.id}: source closed")


async def main() -> None:
    store = MemoryStore()
    async with open_download_manager(store, retry_tick=0.1) as manager:

        async def pull(name: str, *sources: TarLayer) -> None:
            async def show(event: Progress) -> None:
                amount = f" {event.current}/{event.total}" if event.total else ""
                print(f"  {name}: {event.id}: {event.action}{amount}")

            # The store keeps the layers as long as this block runs.
            async with manager.download(sources, progress=show) as rootfs:
                print(f"{name} is complete:")
                for diff_id in rootfs.diff_ids:
                    print(f"  {diff_id}")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull, "one", TarLayer("base", "hello", 1), TarLayer("app", "one"))
            nursery.start_soon(pull, "two", TarLayer("base", "hello", 1), TarLayer("lib", "two"))
    print(f"{store!r}: every layer was released when its pull ended")


if __name__ == "__main__":
    trio.run(main)
