"""An in-memory network, a registry in it, and a sink, all without sockets and threads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import attrs
import httpx
import trio

from trio_layers._digest import Digest, Verifier
from trio_layers._errors import is_final as is_final
from trio_layers._manifest import Descriptor

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def digest_of(data: bytes) -> Digest:
    return Digest(f"sha256:{hashlib.sha256(data).hexdigest()}")


def describe(data: bytes, media_type: str = OCI_LAYER) -> Descriptor:
    return Descriptor(media_type, digest_of(data), len(data))


class Body(httpx.AsyncByteStream):
    """A response's body in chunks, followed by an optional error."""

    def __init__(self, chunks: Sequence[bytes], error: Exception | None = None) -> None:
        self.chunks = chunks
        self.error = error
        self.read = 0
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            await trio.lowlevel.checkpoint()
            self.read += 1
            yield chunk
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error

    async def aclose(self) -> None:
        self.closed = True


Handler = Callable[[httpx.Request], httpx.Response | Awaitable[httpx.Response]]


class Network(httpx.AsyncBaseTransport):
    """All hosts. A host without a server refuses connections."""

    def __init__(self, **hosts: Handler) -> None:
        self.hosts: dict[str, Handler] = dict(hosts)
        self.requests: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await trio.lowlevel.checkpoint()
        self.requests.append(request)
        origin = f"{request.url.scheme}://{request.url.netloc.decode()}"
        if origin not in self.hosts:
            raise httpx.ConnectError("connection refused", request=request)
        response = self.hosts[origin](request)
        return response if isinstance(response, httpx.Response) else await response

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=self)

    @property
    def asked(self) -> list[str]:
        """Return the requests' URLs, without their common part."""
        return [str(request.url) for request in self.requests]

    def secrets(self, host: str) -> list[str | None]:
        """Return the Authorization fields that a host received."""
        return [
            request.headers.get("Authorization")
            for request in self.requests
            if request.url.host == host
        ]


@attrs.define(eq=False)
class FakeRegistry:
    """A simple registry with the manifests and blobs of one repository."""

    path: str = "team/app"
    manifests: dict[str, tuple[str, bytes]] = attrs.field(factory=dict)
    blobs: dict[str, bytes] = attrs.field(factory=dict)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        root = f"/v2/{self.path}/"
        if not request.url.path.startswith(root):
            return httpx.Response(404 if request.url.path != "/v2/" else 200)
        kind, _, name = request.url.path.removeprefix(root).partition("/")
        if kind == "manifests" and name in self.manifests:
            media_type, data = self.manifests[name]
            headers = {"Content-Type": media_type, "Docker-Content-Digest": digest_of(data)}
            return httpx.Response(200, headers=headers, content=data)
        if kind == "blobs" and name in self.blobs:
            return httpx.Response(200, content=self.blobs[name])
        error = {"errors": [{"code": f"{kind[:-1].upper()}_UNKNOWN", "message": "not here"}]}
        return httpx.Response(404, json=error)

    def add_image(
        self, *, tag: str | None = None, layers: Sequence[bytes] = (b"one", b"two"), **config: str
    ) -> Descriptor:
        """Add an image with these layers. Other arguments are members of its config."""
        diff_ids = [digest_of(b"tar of " + layer) for layer in layers]
        document = {"os": "linux", "architecture": "amd64", **config}
        document["rootfs"] = {"type": "layers", "diff_ids": diff_ids}
        config_bytes = json.dumps(document).encode()
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": as_json(describe(config_bytes, OCI_CONFIG)),
            "layers": [as_json(describe(layer)) for layer in layers],
        }
        for blob in (config_bytes, *layers):
            self.blobs[digest_of(blob)] = blob
        return self.add_manifest(manifest, OCI_MANIFEST, tag=tag)

    def add_index(self, entries: Sequence[object], *, tag: str | None = None) -> Descriptor:
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
        return self.add_manifest(index, OCI_INDEX, tag=tag)

    def add_manifest(
        self, document: object, media_type: str, *, tag: str | None = None
    ) -> Descriptor:
        data = json.dumps(document).encode()
        descriptor = describe(data, media_type)
        for name in (descriptor.digest, *([tag] if tag else [])):
            self.manifests[name] = (media_type, data)
        return descriptor


def as_json(descriptor: Descriptor, **more: object) -> dict[str, object]:
    return {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
        **more,
    }


class MemorySink:
    """A `trio_layers.abc.BlobSink` in memory."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data
        self.restarts = 0

    @property
    def offset(self) -> int:
        return len(self.data)

    @property
    def digest(self) -> Digest:
        verifier = Verifier()
        verifier.update(self.data)
        return verifier.digest

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.data += data

    async def restart(self) -> None:
        await trio.lowlevel.checkpoint()
        self.data = b""
        self.restarts += 1


class Report:
    """A `trio_layers.abc.ReportProgress` that records its calls."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, int]] = []

    def __call__(self, action: str, current: int = 0, total: int = 0) -> None:
        self.events.append((str(action), current, total))

    @property
    def actions(self) -> list[str]:
        return list(dict.fromkeys(action for action, _, _ in self.events))
