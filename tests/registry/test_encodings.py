"""Bodies with an unrequested ``Content-Encoding``, true or false."""

from __future__ import annotations

import gzip
import json
import random
import sys
import threading
import zlib
from collections.abc import Callable

import httpx
import pytest
from registry.fakes import (
    OCI_INDEX,
    Body,
    FakeRegistry,
    MemorySink,
    Network,
    Report,
    describe,
    is_final,
)

from trio_layers._digest import digest_of
from trio_layers._errors import RegistryError, VerificationError
from trio_layers._manifest import MAX_DOCUMENT_SIZE
from trio_layers._reference import parse_reference
from trio_layers._registry.client import RegistryClient, open_registry_client

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

HOST = "https://registry.example"
APP = parse_reference("registry.example/team/app:1")
CONTENT = random.Random(1).randbytes(20_000) + bytes(20_000)
BLOB = describe(CONTENT)


def bare_deflate(data: bytes) -> bytes:
    codec = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return codec.compress(data) + codec.flush()


CODINGS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("X-GZIP", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "bare deflate": ("deflate", bare_deflate),
    "zstd": ("zstd", zstd.compress),
    "members": ("gzip", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])),
    "called so": ("gzip", lambda data: data),
    "identity": ("identity", lambda data: data),
    "unknown": ("aws-chunked", lambda data: data),
}


class Encoding:
    """A registry that encodes its responses."""

    def __init__(self, coding: str, *, length: bool) -> None:
        self.name, self.encode = CODINGS[coding]
        self.length = length
        self.registry = FakeRegistry()
        self.image = self.registry.add_image(tag="1", layers=[CONTENT])
        self.requests: list[httpx.Request] = []

    def plain(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == "/token":
            return httpx.Response(200, json={"token": "t"})
        if "Authorization" not in request.headers:
            challenge = f'Bearer realm="{HOST}/token"'
            return httpx.Response(401, headers={"WWW-Authenticate": challenge})
        if path.endswith("/tags/list"):
            return httpx.Response(200, json={"tags": ["1", "2"]})
        if "/referrers/" in path:
            index = {"schemaVersion": 2, "manifests": []}
            return httpx.Response(200, headers={"Content-Type": OCI_INDEX}, json=index)
        return self.registry(request)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.plain(request)
        body = self.encode(answer.content)
        fields = {"Content-Encoding": self.name, "Content-Length": str(len(body))}
        for name, value in answer.headers.items():
            if name not in ("content-length", "transfer-encoding"):
                fields[name] = value
        if not self.length:
            del fields["Content-Length"]
        if request.method == "HEAD":
            body = b""
        chunks = [body[start : start + 5_000] for start in range(0, len(body), 5_000)]
        return httpx.Response(answer.status_code, headers=fields, stream=Body(chunks))


@pytest.mark.parametrize("length", [True, False], ids=["length", "chunked"])
@pytest.mark.parametrize("coding", CODINGS)
async def test_all_of_it(coding: str, length: bool) -> None:
    """Tokens, manifests, configs, lists and blobs are read correctly.

    The server encodes their bodies, or only labels them as encoded.
    """
    server = Encoding(coding, length=length)
    network = Network(**{HOST: server})
    async with network.client() as http, open_registry_client(client=http) as client:
        assert await client.resolve(APP) == server.image
        resolved = await client.resolve_image(APP)
        assert resolved.descriptor == server.image
        assert await client.tags(APP) == ("1", "2")
        assert await client.referrers(f"{APP.name}@{BLOB.digest}") == ()
        assert await client.get_blob(APP, BLOB) == CONTENT
        sink = MemorySink()
        await client.fetch_blob(APP, BLOB, sink, progress=Report())
        assert sink.data == CONTENT
        # The sink's bytes are resumed, or dropped.
        sink = MemorySink(CONTENT[:777])
        await client.fetch_blob(APP, BLOB, sink, progress=Report())
        assert sink.data == CONTENT
        # A stream cannot be restarted. So open_blob() believes Content-Encoding if no
        # Content-Length shows whether the body is the plain blob.
        if length or coding != "called so":
            async with client.open_blob(APP, BLOB) as chunks:
                assert b"".join([chunk async for chunk in chunks]) == CONTENT
        else:
            await refused(client, "gzip")


async def refused(client: RegistryClient, encoding: str) -> None:
    with pytest.raises(VerificationError, match=f"with Content-Encoding {encoding}"):
        async with client.open_blob(APP, BLOB) as chunks:
            async for _ in chunks:
                pass


async def test_hashes_are_computed_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()

    def compute(data: bytes, *like: str) -> str:
        threads.add(threading.get_ident())
        return digest_of(data, *like)

    monkeypatch.setattr("trio_layers._registry.documents.digest_of", compute)
    network = Network(**{HOST: Encoding("gzip", length=True)})
    async with network.client() as http, open_registry_client(client=http) as client:
        assert await client.get_blob(APP, BLOB) == CONTENT
    assert threads
    assert threading.get_ident() not in threads


async def test_a_manifest_without_a_digest() -> None:
    """Without a digest, only a body that starts like JSON is accepted."""
    server = Encoding("gzip", length=False)

    def serve(request: httpx.Request) -> httpx.Response:
        answer = server(request)
        answer.headers.pop("Docker-Content-Digest", None)
        return answer

    async with (
        Network(**{HOST: serve}).client() as http,
        open_registry_client(client=http) as client,
    ):
        descriptor, data = await client.get_manifest(APP)
    assert descriptor == server.image
    assert json.loads(data)["schemaVersion"] == 2


@pytest.mark.parametrize("length", [True, False], ids=["length", "chunked"])
@pytest.mark.parametrize(
    ("said", "encode"),
    [
        ("br", lambda data: data[::-1]),
        ("gzip", lambda data: gzip.compress(data)[:-4]),
        ("gzip", lambda data: gzip.compress(data[::-1])),
        ("gzip", lambda data: gzip.compress(data + b"x")),
        ("gzip", lambda data: gzip.compress(data[:-1])),
        ("gzip", lambda data: b"no such thing"),
        ("deflate", lambda data: zlib.compress(data)[:-4]),
        ("zstd", lambda data: zstd.compress(data)[:-4]),
        ("gzip, br", gzip.compress),
    ],
)
async def test_wrong_all_the_same(
    said: str, encode: Callable[[bytes], bytes], length: bool
) -> None:
    """The error names the encoding and the host; the number of requests is bounded."""
    server = Encoding("gzip", length=length)
    plain = server.plain
    server.name = said
    server.encode = lambda data: encode(data) if data == CONTENT else data
    assert plain is not None
    network = Network(**{HOST: server})
    async with (
        network.client() as http,
        open_registry_client(client=http, retry_tick=0.001) as client,
    ):
        sink = MemorySink()
        with pytest.raises((VerificationError, RegistryError)) as caught:
            await client.fetch_blob(APP, BLOB, sink, progress=Report())
        assert f"with Content-Encoding {said}" in str(caught.value)
        assert "registry.example" in str(caught.value)
        if isinstance(caught.value, VerificationError):
            assert is_final(caught.value)
            assert sink.data == b""
        assert len([each for each in network.requests if "/blobs/" in each.url.path]) <= 5
        with pytest.raises(VerificationError, match=f"with Content-Encoding {said}"):
            await client.get_blob(APP, BLOB)
        await refused(client, said)


@pytest.mark.parametrize("length", [True, False], ids=["length", "chunked"])
@pytest.mark.parametrize("empty", [True, False], ids=["members", "zeros"])
async def test_a_bomb(empty: bool, length: bool) -> None:
    """The client soon stops reading gzip bombs and endless empty members."""
    member = gzip.compress(b"") if empty else gzip.compress(bytes(5_000_000))
    count = 400_000 // len(member) if empty else 50
    bodies: list[Body] = []

    def serve(request: httpx.Request) -> httpx.Response:
        headers = {"Content-Encoding": "gzip"}
        if length:
            headers["Content-Length"] = str(len(member) * count)
        step = max(1, 20_000 // len(member))
        bodies.append(Body([member * step] * (count // step)))
        return httpx.Response(200, headers=headers, stream=bodies[-1])

    async with (
        Network(**{HOST: serve}).client() as http,
        open_registry_client(client=http) as client,
    ):
        for ask in (
            lambda: client.fetch_blob(APP, BLOB, MemorySink(), progress=Report()),
            lambda: client.get_blob(APP, BLOB),
            lambda: client.get_blob(APP, BLOB.digest, max_size=MAX_DOCUMENT_SIZE),
        ):
            with pytest.raises(VerificationError, match="with Content-Encoding gzip"):
                await ask()
        await refused(client, "gzip")
    assert all(body.closed for body in bodies)
