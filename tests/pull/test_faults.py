"""Whatever a registry does wrong, at whatever it is asked for: a pull ends with the right image, or
with one error that says what was wrong, after as many attempts as it should; and nothing wrong is
ever stored.

Each fault hits the manifest, the config, the only layer from its first byte, and the layer in the
middle, where a pull goes on from what a pull before it has kept. It hits once, and for ever.
"""

from __future__ import annotations

import random
from pathlib import Path

import attrs
import pytest
import trio

from trio_layers import (
    AuthenticationError,
    LayersError,
    ManifestError,
    NotFound,
    RateLimited,
    RegistryError,
    TransferError,
    VerificationError,
    open_puller,
)
from trio_layers.testing import (
    Corrupt,
    Cut,
    Delay,
    Drop,
    Encoded,
    Fault,
    File,
    IgnoreRange,
    Longer,
    NoLength,
    Raw,
    Redirect,
    Registry,
    Reply,
    Slow,
    Stall,
    WrongRange,
    WrongTotal,
    build_image,
    open_registry,
)

BUILT = build_image([[File("file", random.Random(1).randbytes(300_000))]])
[LAYER] = BUILT.layers
SIZE = LAYER.descriptor.size
HALF = SIZE // 2

PLACES = {
    "manifest": "*/manifests/*",
    "config": f"*/blobs/{BUILT.config_descriptor.digest}",
    "blob": f"*/blobs/{LAYER.descriptor.digest}",
    "rest": f"*/blobs/{LAYER.descriptor.digest}",
}
ATTEMPTS = 3

Wrong = type[LayersError] | tuple[type[LayersError], ...]


@attrs.frozen
class Row:
    """A fault, and what it leads to where it hits once, and where it hits always.

    Attributes:
        fault: What goes wrong.
        once: What a document's pull ends with, if the fault hits once; ``None``: with the image.
            A layer is tried again, unless the error is in `final`.
        always: What a pull ends with if it hits each time; ``None``: it is no fault.
        final: Where no other attempt is made: as moby does it, a blob that came in one piece and
            is wrong will not be right the next time.
        places: Where it makes sense.
    """

    fault: Fault
    once: Wrong | None
    always: Wrong | None
    final: tuple[str, ...] = ()
    places: tuple[str, ...] = tuple(PLACES)


REST = ("rest",)
BLOBS = ("blob", "rest")

ROWS = {
    "delay": Row(Delay(0.1), None, None),
    "late": Row(Delay(60), RegistryError, RegistryError),
    "stall": Row(Stall(10), RegistryError, RegistryError),
    "silence": Row(Stall(0), RegistryError, RegistryError),
    "reset": Row(Drop(), RegistryError, RegistryError),
    "cut": Row(Cut(10), RegistryError, RegistryError),
    "wrong byte": Row(
        Corrupt(HALF + 5), VerificationError, VerificationError, final=("blob",), places=BLOBS
    ),
    "wrong document": Row(
        Corrupt(5),
        (VerificationError, ManifestError),
        (VerificationError, ManifestError),
        places=("manifest", "config"),
    ),
    "too long": Row(
        Longer(100),
        (VerificationError, ManifestError, RegistryError),
        (VerificationError, ManifestError, RegistryError),
        final=("blob",),
    ),
    "no length": Row(NoLength(), None, None),
    "another range": Row(WrongRange(7), None, None, places=REST),
    "an earlier range": Row(WrongRange(-7), None, None, places=REST),
    "another total": Row(WrongTotal(7), None, None, places=REST),
    "no range": Row(IgnoreRange(), None, None, places=REST),
    "refused": Row(Reply(401), AuthenticationError, AuthenticationError, final=BLOBS),
    "forbidden": Row(Reply(403), AuthenticationError, AuthenticationError, final=BLOBS),
    "missing": Row(Reply(404), NotFound, NotFound, final=BLOBS),
    "gone": Row(Reply(410), RegistryError, RegistryError, final=BLOBS),
    "odd challenge": Row(
        Reply(401, headers={"WWW-Authenticate": 'Bearer realm=,,="\\'}),
        AuthenticationError,
        AuthenticationError,
        final=BLOBS,
    ),
    "too many": Row(Reply(429), RateLimited, RateLimited),
    "too many for long": Row(
        Reply(429, headers={"Retry-After": "100000"}), RateLimited, RateLimited, final=BLOBS
    ),
    "too many for a moment": Row(Reply(429, headers={"Retry-After": "0"}), None, RateLimited),
    "busy for a moment": Row(Reply(503, headers={"Retry-After": "0"}), None, RateLimited),
    "error": Row(Reply(500, body=b"<html>oh</html>"), RegistryError, RegistryError),
    "busy": Row(Reply(503), RegistryError, RegistryError),
    "nothing": Row(Reply(204), (RegistryError, VerificationError, ManifestError), LayersError),
    "no protocol": Row(Raw(b"\0\1\2\r\n\r\n"), RegistryError, RegistryError),
    "odd length": Row(
        Raw(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"), RegistryError, RegistryError
    ),
    "huge header": Row(
        Raw(b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 200_000 + b"\r\n\r\n"),
        RegistryError,
        RegistryError,
    ),
    "encoded": Row(
        Encoded(),
        (RegistryError, VerificationError, ManifestError),
        (RegistryError, VerificationError, ManifestError),
        final=("blob",),
    ),
    "slow": Row(Slow(SIZE / 0.3), None, None, places=BLOBS),
}

GRID = [
    pytest.param(name, row, place, always, id=f"{name}-{place}-{'always' if always else 'once'}")
    for name, row in ROWS.items()
    for place in row.places
    for always in (False, True)
]


def sources(store: Path) -> dict[str, bytes]:
    """All blobs that are visible."""
    return {path.name: path.read_bytes() for path in (store / "blobs" / "sha256").iterdir()}


RIGHT = {
    digest.removeprefix("sha256:"): content
    for digest, content in [
        (BUILT.digest, BUILT.manifest),
        (BUILT.config_descriptor.digest, BUILT.config),
        (LAYER.descriptor.digest, bytes(LAYER.content)),
    ]
}


async def attempt(store: Path, registry: Registry, reference: str) -> Exception | None:
    try:
        with trio.fail_after(60):
            async with open_puller(
                store, retry_tick=0.001, max_download_attempts=ATTEMPTS, stall_limit=0.3
            ) as puller:
                async with puller.pull(reference) as image:
                    assert await image.rootfs.read_bytes("/file")
                assert (await puller.store.check()).problems == ()
    except LayersError as error:
        return error
    return None


@pytest.mark.parametrize(("name", "row", "place", "always"), GRID)
async def test_fault(name: str, row: Row, place: str, always: bool, tmp_path: Path) -> None:
    async with open_registry() as registry:
        reference = registry.add(BUILT, "library/demo:latest")
        if place == "rest":
            registry.inject(PLACES[place], Cut(HALF))
            registry.inject(PLACES[place], Drop(), times=None)
            assert isinstance(await attempt(tmp_path, registry, reference), RegistryError)
            registry.clear_faults()
        registry.requests.clear()
        registry.inject(PLACES[place], row.fault, times=None if always else 1)
        error = await attempt(tmp_path, registry, reference)
        document = place in ("manifest", "config")
        expected = row.always if always else row.once
        if not always and not document and place not in row.final:
            expected = None  # it is tried again
        if expected is None:
            assert error is None
            assert sources(tmp_path) == RIGHT
            return
        if isinstance(error, TransferError):
            error = error.__cause__
        assert isinstance(error, expected)
        assert registry.host in str(error) or "sha256:" in str(error)
        asked = [
            exchange
            for exchange in registry.requests
            if exchange.path.endswith(PLACES[place].rpartition("/")[2].strip("*"))
        ]
        attempts = 1 if document or place in row.final else ATTEMPTS
        if place == "rest" and row.final == ("blob",):
            attempts = 2  # the rest, then all of it in one piece
        # One more request in each: with credentials, or without a range; and who asks to wait
        # for no time is asked seven times.
        most = 7 if "for a moment" in name else 2
        assert attempts <= len(asked) <= most * attempts
        for digest, content in sources(tmp_path).items():
            assert RIGHT[digest] == content
        # When all is well again, so is the pull.
        registry.clear_faults()
        assert await attempt(tmp_path, registry, reference) is None
        assert sources(tmp_path) == RIGHT


@pytest.mark.parametrize("place", PLACES)
async def test_redirects_in_a_circle(place: str, tmp_path: Path) -> None:
    async with open_registry() as registry:
        reference = registry.add(BUILT, "library/demo:latest")
        registry.inject(PLACES[place], Redirect(registry.url), times=None)
        error = await attempt(tmp_path, registry, reference)
        assert isinstance(error, RegistryError)
        assert "redirect" in str(error)
