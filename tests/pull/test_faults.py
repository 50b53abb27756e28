"""Each fault of a registry, at each kind of request.

A pull ends with the right image, or with one error that names the fault, after the right number of
attempts. Nothing wrong is ever stored.

Each fault hits the manifest, the config, the only layer from its first byte, and a layer in the
middle, where a pull goes on from the bytes of an earlier one. It hits once, and for ever.
"""

from __future__ import annotations

import random
from fnmatch import fnmatchcase
from pathlib import Path

import attrs
import pytest
import trio
from store.stores import open_with_threads

from trio_layers import (
    AuthenticationError,
    Credentials,
    LayersError,
    ManifestError,
    NotFound,
    RateLimited,
    RegistryError,
    TransferError,
    VerificationError,
    open_puller,
    open_store,
)
from trio_layers._registry.retries import MAX_ATTEMPTS
from trio_layers._registry.transport import MAX_REDIRECTS
from trio_layers.testing import (
    Challenge,
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
    Shorter,
    Slow,
    SlowHead,
    Stall,
    TokenAuth,
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

DOCUMENTS = ("manifest", "config")
BLOBS = ("blob", "rest")
COOLDOWN = ("rest",)

Wrong = type[LayersError] | tuple[type[LayersError], ...]


@attrs.frozen
class Row:
    """A fault, and the results if it hits once, and if it hits always.

    Attributes:
        fault: The fault.
        once: The error of a pull, if the fault hits a document once; ``None``: no error.
            A layer is tried again, unless the error is in `final`.
        document_attempts: The number of requests for a document, if the fault hits each time.
        always: The error of a pull, if the fault hits each time; ``None``: no error.
        final: The places without another attempt. One exception: a wrong blob that came in one
            piece is requested once more.
        places: The requests that the fault can hit.
        most: Requests in an attempt: one more with credentials, or without a range.
        tokens: Whether the registry wants tokens when all is well.
    """

    fault: Fault
    once: Wrong | None
    always: Wrong | None
    final: tuple[str, ...] = ()
    document_attempts: int = 1
    places: tuple[str, ...] = tuple(PLACES)
    most: int = 2
    tokens: bool = False


def transient(fault: Fault, always: Wrong | None = RegistryError, **more: object) -> Row:
    """Return the row of a fault that a retry overcomes after one hit, also for documents."""
    return Row(fault, None, always, document_attempts=MAX_ATTEMPTS, **more)  # type: ignore[arg-type]


def dance(fault: Fault) -> Row:
    """Return the row of a login dance that must end; if it ends, the pull succeeds."""
    return Row(fault, None, AuthenticationError, final=BLOBS, most=3, tokens=True)


ROWS = {
    "delay": Row(Delay(0.1), None, None),
    "late": transient(Delay(60)),
    "stall": transient(Stall(10)),
    "silence": transient(Stall(0)),
    "drop": transient(Drop()),
    "cut": transient(Cut(10)),
    "reset": transient(Cut(10, reset=True)),
    "reset, halfway": Row(Cut(HALF // 4, reset=True), RegistryError, RegistryError, places=BLOBS),
    "wrong byte": Row(Corrupt(HALF + 5), None, VerificationError, final=("blob",), places=BLOBS),
    "wrong document": Row(
        Corrupt(5), None, VerificationError, document_attempts=2, places=DOCUMENTS
    ),
    "too long": Row(Longer(100), None, VerificationError, document_attempts=2, final=("blob",)),
    "too short": Row(Shorter(100), None, VerificationError, document_attempts=2, places=DOCUMENTS),
    # The download goes on from the earlier bytes.
    "short": Row(Shorter(100), None, None, places=BLOBS),
    "no length": Row(NoLength(), None, None),
    "another range": Row(WrongRange(7), None, None, places=COOLDOWN),
    "an earlier range": Row(WrongRange(-7), None, None, places=COOLDOWN),
    "another total": Row(WrongTotal(7), None, None, places=COOLDOWN),
    "no range": Row(IgnoreRange(), None, None, places=COOLDOWN),
    "refused": Row(Reply(401), AuthenticationError, AuthenticationError, final=BLOBS),
    "forbidden": Row(Reply(403), AuthenticationError, AuthenticationError, final=BLOBS),
    "missing": Row(Reply(404), NotFound, NotFound, final=BLOBS),
    "gone": Row(Reply(410), RegistryError, RegistryError, final=BLOBS),
    "no such range": Row(Reply(416), RegistryError, RegistryError),
    "odd challenge": Row(
        Reply(401, headers={"WWW-Authenticate": 'Bearer realm=,,="\\'}),
        AuthenticationError,
        AuthenticationError,
        final=BLOBS,
    ),
    "refused token": dance(Challenge("Bearer")),
    "refused password": dance(Challenge("Basic")),
    "a token, then a password": dance(Challenge("Bearer", "Basic")),
    "a password, then a token": dance(Challenge("Basic", "Bearer")),
    "too many": transient(Reply(429), RateLimited),
    "too many for long": Row(
        Reply(429, headers={"Retry-After": "100000"}), RateLimited, RateLimited, final=BLOBS
    ),
    "timeout": transient(Reply(408)),
    "bad gateway": transient(Reply(502)),
    # The client obeys a short Retry-After within one attempt, for layers, too.
    "too many for a moment": transient(
        Reply(429, headers={"Retry-After": "0"}), RateLimited, most=MAX_ATTEMPTS
    ),
    "busy for a moment": transient(
        Reply(503, headers={"Retry-After": "0"}), RateLimited, most=MAX_ATTEMPTS
    ),
    "error": transient(Reply(500, body=b"<html>oh</html>")),
    "busy": transient(Reply(503)),
    "nothing": Row(Reply(204), ManifestError, LayersError, places=("manifest", *BLOBS)),
    "no config": Row(Reply(204), None, VerificationError, document_attempts=2, places=("config",)),
    "no protocol": Row(Raw(b"\0\1\2\r\n\r\n"), RegistryError, RegistryError),
    "odd length": Row(
        Raw(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"), RegistryError, RegistryError
    ),
    "huge header": Row(
        Raw(b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 200_000 + b"\r\n\r\n"),
        RegistryError,
        RegistryError,
    ),
    "encoded": Row(Encoded(), None, None),
    "slow": Row(Slow(SIZE / 0.3), None, None, places=BLOBS),
    "slow loris": transient(Slow(20)),
    "slow loris later": Row(Slow(20, after=HALF - 1000), RegistryError, None, places=BLOBS),
    "slow head": transient(SlowHead(20)),
}

GRID = [
    pytest.param(name, row, place, always, id=f"{name}-{place}-{'always' if always else 'once'}")
    for name, row in ROWS.items()
    for place in row.places
    for always in (False, True)
]


def sources(store: Path) -> dict[str, bytes]:
    """Return all visible blobs."""
    return {path.name: path.read_bytes() for path in (store / "blobs" / "sha256").iterdir()}


RIGHT = {
    digest.removeprefix("sha256:"): content
    for digest, content in [
        (BUILT.digest, BUILT.manifest),
        (BUILT.config_descriptor.digest, BUILT.config),
        (LAYER.descriptor.digest, bytes(LAYER.content)),
    ]
}


USER = Credentials("user", "password")


async def attempt(
    path: Path,
    registry: Registry,
    reference: str,
    *,
    processes: bool = False,
    stall_limit: float = 0.3,
) -> Exception | None:
    """Pull once. Layers are unpacked in threads, since starting processes would take longer than
    the rest.
    """
    opened = open_with_threads(path)
    try:
        with trio.fail_after(60):
            async with (
                open_store(path) if processes else opened as store,
                open_puller(
                    store,
                    credentials=USER,
                    retry_tick=0.001,
                    max_download_attempts=ATTEMPTS,
                    stall_limit=stall_limit,
                ) as puller,
            ):
                async with puller.pull(reference) as image:
                    assert await image.rootfs.read_bytes("/file")
                assert (await puller.store.check()).problems == ()
    except LayersError as error:
        return error
    return None


def asked(registry: Registry, place: str) -> int:
    """Return the number of requests at this place."""
    return sum(fnmatchcase(exchange.path, PLACES[place]) for exchange in registry.requests)


async def keep_a_half(path: Path, registry: Registry, reference: str) -> None:
    """Let a failed pull leave half of the layer's bytes."""
    registry.inject(PLACES["rest"], Cut(HALF))
    registry.inject(PLACES["rest"], Drop(), times=None)
    assert isinstance(await attempt(path, registry, reference), RegistryError)
    registry.clear_faults()
    registry.requests.clear()


@pytest.mark.parametrize(("name", "row", "place", "always"), GRID)
async def test_fault(name: str, row: Row, place: str, always: bool, tmp_path: Path) -> None:
    auth = TokenAuth(USER.username, USER.password) if row.tokens else None
    async with open_registry(auth=auth) as registry:
        reference = registry.add(BUILT, "library/demo:latest")
        if place == "rest":
            await keep_a_half(tmp_path, registry, reference)
        registry.inject(PLACES[place], row.fault, times=None if always else 1)
        # The bytes may be dropped while worker processes read them.
        document = place in DOCUMENTS
        error = await attempt(
            tmp_path,
            registry,
            reference,
            processes=place == "rest",
            stall_limit=0.1 if document and always and row.always else 0.3,
        )
        expected = row.always if always else row.once
        if not always and not (document or place in row.final):
            expected = None  # the layer is tried again
        attempts = ATTEMPTS
        if document:
            attempts = row.document_attempts
        elif row.final == ("blob",):
            attempts = 3 if place == "rest" else 2  # the whole blob is requested twice
        elif place in row.final:
            attempts = 1
        assert asked(registry, place) <= row.most * attempts
        if expected is None:
            assert error is None
            assert sources(tmp_path) == RIGHT
            return
        if isinstance(error, TransferError):
            error = error.__cause__
        assert isinstance(error, expected)
        assert registry.host in str(error) or "sha256:" in str(error)
        assert asked(registry, place) >= attempts
        for digest, content in sources(tmp_path).items():
            assert RIGHT[digest] == content
        # Without faults, the pull succeeds.
        registry.clear_faults()
        assert await attempt(tmp_path, registry, reference) is None
        assert sources(tmp_path) == RIGHT


@pytest.mark.parametrize("always", [False, True], ids=["once", "always"])
@pytest.mark.parametrize("place", PLACES)
async def test_redirects_in_a_circle(place: str, always: bool, tmp_path: Path) -> None:
    """The first redirect goes to another path, and the next ones always to the same path."""
    async with open_registry() as registry:
        reference = registry.add(BUILT, "library/demo:latest")
        if place == "rest":
            await keep_a_half(tmp_path, registry, reference)
        registry.inject(PLACES[place], Redirect(registry.url), times=None if always else 1)
        error = await attempt(tmp_path, registry, reference)
        if not always:
            assert error is None
            assert sources(tmp_path) == RIGHT
            assert asked(registry, place) == 2
            return
        assert isinstance(error, RegistryError)
        assert "redirects more than" in str(error)
        attempts = 1 if place in DOCUMENTS else ATTEMPTS
        assert asked(registry, place) == attempts * (MAX_REDIRECTS + 1)
        for digest, content in sources(tmp_path).items():
            assert RIGHT[digest] == content
        registry.clear_faults()
        assert await attempt(tmp_path, registry, reference) is None


@pytest.mark.parametrize("fault", [Reply(500), Reply(503), Drop(), Cut(HALF // 10)], ids=repr)
@pytest.mark.parametrize("place", BLOBS)
async def test_a_run_of_failures(place: str, fault: Fault, tmp_path: Path) -> None:
    """All attempts but the last fail, and the pull succeeds."""
    async with open_registry() as registry:
        reference = registry.add(BUILT, "library/demo:latest")
        if place == "rest":
            await keep_a_half(tmp_path, registry, reference)
        registry.inject(PLACES[place], fault, times=ATTEMPTS - 1)
        assert await attempt(tmp_path, registry, reference) is None
        assert sources(tmp_path) == RIGHT
        assert asked(registry, place) == ATTEMPTS
