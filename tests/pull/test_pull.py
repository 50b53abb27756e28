"""Whole pulls, from the embedded registry into a store on disk."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import tarfile
from pathlib import Path

import pytest
import trio
from archives.layouts import small_image, with_config

import trio_layers
from trio_layers import Progress, open_puller, open_store
from trio_layers._platform import host_platform
from trio_layers.testing import (
    BasicAuth,
    Corrupt,
    Cut,
    Drop,
    File,
    IgnoreRange,
    Registry,
    Reply,
    Slow,
    Stall,
    TokenAuth,
    build_image,
    build_index,
    build_layer,
    open_registry,
    sample_image,
)


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


BIG = [File("big", noise(3_000_000))]


def blob_requests(registry: Registry) -> list[tuple[str, int]]:
    return [
        (exchange.path.rsplit("/", 1)[1], exchange.bytes_sent)
        for exchange in registry.requests
        if "/blobs/" in exchange.path
    ]


def visible(store: Path) -> dict[str, list[str]]:
    """Return the visible blobs and trees of a store."""
    return {part: sorted(os.listdir(store / part)) for part in ("blobs/sha256", "trees/sha256")}


async def pull(store: Path, reference: str, **options) -> trio_layers.Image:
    async with (
        open_puller(store, retry_tick=0.01) as puller,
        puller.pull(reference, **options) as image,
    ):
        return image


async def test_sample_image(tmp_path: Path) -> None:
    """Layers, config and merged files are equal to the built image's."""
    built = sample_image()
    events: list[Progress] = []

    async def sink(event: Progress) -> None:
        events.append(event)

    async with open_registry() as registry:
        reference = registry.add(built, "library/demo:latest")
        async with open_puller(tmp_path / "store") as puller:
            async with puller.pull(reference, progress=sink) as image:
                assert image.digest == built.digest
                assert [layer.diff_id for layer in image.layers] == list(built.diff_ids)
                assert str(image.platform) == "linux/amd64"
                release = await image.rootfs.read_bytes("/etc/os-release")
                assert release == await image.rootfs.read_bytes("usr/lib/os-release")
                paths = {entry.path for entry in await image.rootfs.walk()}
    assert b"usr/bin/hello" in paths
    assert not any(b".wh." in path for path in paths)
    by_layer: dict[str, list[str]] = {}
    for event in events:
        by_layer.setdefault(event.id, []).append(event.action)
    assert len(by_layer) == 4
    for actions in by_layer.values():
        assert actions[0] == "Pulling fs layer"
        assert actions[-1] == "Pull complete"


async def test_pulling_again_downloads_nothing(tmp_path: Path) -> None:
    events: list[Progress] = []

    async def sink(event: Progress) -> None:
        events.append(event)

    async with open_registry() as registry:
        reference = registry.add(sample_image(), "library/demo:latest")
        first = await pull(tmp_path, reference)
        before = len(blob_requests(registry))
        again = await pull(tmp_path, reference, progress=sink)
        layers = {layer.descriptor.digest for layer in again.layers}
        asked = {digest for digest, _ in blob_requests(registry)[before:]}
    assert again == first
    assert not asked & layers
    assert [event.action for event in events] == ["Already exists"] * 4


async def test_pulling_again_is_one_request_that_is_not_counted(tmp_path: Path) -> None:
    """The request is a HEAD, which Docker Hub does not count as a pull. A GET follows if the tag
    has moved, or if HEAD fails.
    """
    newer = build_image([[File("new", b"er")]])

    def asked() -> list[str]:
        requests = [f"{each.method} {each.path.split('/')[4]}" for each in registry.requests]
        registry.requests.clear()
        return requests

    async with open_registry() as registry, open_puller(tmp_path) as puller:
        reference = registry.add(sample_image(), "library/demo:latest")

        async def pull_again() -> str:
            async with puller.pull(reference) as image:
                return image.digest

        first = await pull_again()
        assert asked() == ["GET manifests", *["GET blobs"] * 5]
        assert await pull_again() == first
        assert asked() == ["HEAD manifests"]
        registry.inject("*/manifests/*", Reply(405), method="HEAD")
        assert await pull_again() == first
        assert asked() == ["HEAD manifests", "GET manifests"]
        registry.add(newer, "library/demo:latest")
        assert await pull_again() == newer.digest
        assert asked() == ["HEAD manifests", "GET manifests", *["GET blobs"] * 2]


async def test_pulls_at_the_same_time_share(tmp_path: Path) -> None:
    """Four pulls of one image, and one of another image with the same base, download each blob
    once.
    """
    base = build_layer(BIG)
    one = build_image([base, build_layer([File("one", b"1")])])
    two = build_image([base, build_layer([File("two", b"2")])])
    async with open_registry() as registry:
        references = [registry.add(one, "o/one:1")] * 4 + [registry.add(two, "o/two:1")]
        async with (
            open_puller(tmp_path, max_concurrent_downloads=1) as puller,
            trio.open_nursery() as nursery,
        ):

            async def run(reference: str) -> None:
                async with puller.pull(reference) as image:
                    assert await image.rootfs.exists("big")

            for reference in references:
                nursery.start_soon(run, reference)
        layers = {layer.descriptor.digest for layer in (*one.layers, *two.layers)}
        asked = [digest for digest, _ in blob_requests(registry) if digest in layers]
    assert sorted(asked) == sorted(layers)


async def test_index_by_platform(tmp_path: Path) -> None:
    images = [
        build_image([[File("arch", name.encode())]], platform=name)
        for name in ("linux/amd64", "linux/arm64")
    ]
    async with open_registry() as registry:
        reference = registry.add(build_index(images), "library/multi:latest")
        async with open_puller(tmp_path) as puller:
            for name in ("linux/arm64", "linux/amd64"):
                async with puller.pull(reference, platform=name) as image:
                    assert await image.rootfs.read_bytes("arch") == name.encode()
            with pytest.raises(trio_layers.PlatformError, match="s390x"):
                async with puller.pull(reference, platform="linux/s390x"):
                    pass


async def test_policy(tmp_path: Path) -> None:
    """A missing image is pulled. A stored image needs no registry, until a pull asks for the
    newest.
    """
    old, new = (build_image([[File("version", text)]]) for text in (b"old", b"new"))
    async with open_registry() as registry:
        reference = registry.add(old, "library/demo:latest")
        with pytest.raises(trio_layers.StoreError, match=r"demo:latest is not in the store"):
            await pull(tmp_path, reference, policy="never")
        assert not registry.requests
        first = await pull(tmp_path, reference, policy="missing")
        registry.add(new, "library/demo:latest")
        before = len(registry.requests)
        for policy in ("missing", "never"):
            events: list[Progress] = []
            async with open_puller(tmp_path) as puller:
                opened = puller.pull(reference, policy=policy, progress=events.append)
                async with opened as image:
                    assert image == first
                    assert await image.rootfs.read_bytes("version") == b"old"
            assert not events
        assert len(registry.requests) == before
        assert (await pull(tmp_path, reference)).digest == new.digest
    assert (await pull(tmp_path, reference, policy="missing")).digest == new.digest
    with pytest.raises(ZeroDivisionError):
        async with open_puller(tmp_path) as puller, puller.pull(reference, policy="never"):
            raise ZeroDivisionError


async def test_policy_and_platforms(tmp_path: Path) -> None:
    """An image for another platform does not count as stored."""
    host = trio_layers.host_platform()
    other = "linux/s390x" if host.architecture != "s390x" else "linux/riscv64"
    images = [build_image([[File("arch")]], platform=name) for name in (str(host), other)]
    alone = build_image([[File("alone")]], platform=other)
    async with open_registry() as registry:
        reference = registry.add(build_index(images), "library/multi:latest")
        theirs = await pull(tmp_path, reference, platform=other)
        with pytest.raises(trio_layers.StoreError, match="is not in the store"):
            await pull(tmp_path, reference, policy="never")
        ours = await pull(tmp_path, reference, policy="missing")
        assert (ours.digest, theirs.digest) == (images[0].digest, images[1].digest)
        assert await pull(tmp_path, reference, policy="never") == ours
        assert await pull(tmp_path, reference, policy="never", platform=other) == theirs
        # An image in no index matches any platform, unless one is requested.
        single = registry.add(alone, "library/single:latest")
        pulled = await pull(tmp_path, single)
        assert await pull(tmp_path, single, policy="never") == pulled
        with pytest.raises(trio_layers.StoreError, match="linux/mips is not in the store"):
            await pull(tmp_path, single, policy="never", platform="linux/mips")


async def test_policy_and_no_layers(tmp_path: Path) -> None:
    async with open_registry() as registry:
        reference = registry.add(build_image([]), "library/empty:latest")
        pulled = await pull(tmp_path, reference)
    assert await pull(tmp_path, reference, policy="never") == pulled
    assert pulled.layers == ()


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd", "bzip2", "xz"])
@pytest.mark.parametrize("format", ["oci", "docker"])
async def test_every_format(tmp_path: Path, compression: str, format: str) -> None:
    if format == "docker" and compression in ("zstd", "bzip2", "xz"):
        compression = "none"
    built = sample_image(compression=compression, format=format)
    async with open_registry() as registry:
        image = await pull(tmp_path, registry.add(built, "library/demo:latest"))
    assert [layer.diff_id for layer in image.layers] == list(built.diff_ids)


async def test_body_raises_as_it_is(tmp_path: Path) -> None:
    async with open_registry() as registry:
        reference = registry.add(sample_image(), "library/demo:latest")
        with pytest.raises(KeyError, match="mine"):
            async with open_puller(tmp_path) as puller, puller.pull(reference):
                raise KeyError("mine")


@pytest.mark.parametrize(
    "auth", [BasicAuth("me", "secret"), TokenAuth("me", "secret")], ids=["basic", "token"]
)
async def test_credentials(tmp_path: Path, auth) -> None:
    async with open_registry(auth=auth) as registry:
        reference = registry.add(sample_image(), "private/demo:latest")
        with pytest.raises(trio_layers.AuthenticationError, match="private/demo"):
            await pull(tmp_path, reference)
        credentials = trio_layers.Credentials("me", "secret")
        async with (
            open_puller(tmp_path, credentials=credentials) as puller,
            puller.pull(reference) as image,
        ):
            assert await image.rootfs.exists("/etc/hostname")


async def test_anonymous_token(tmp_path: Path) -> None:
    async with open_registry(auth=TokenAuth()) as registry:
        await pull(tmp_path, registry.add(sample_image(), "library/demo:latest"))
        assert registry.tokens_issued == 1


class TestBadDays:
    """Broken connections and servers that cannot resume: no verified byte is downloaded twice."""

    async def test_resumes_where_it_was_cut(self, tmp_path: Path) -> None:
        built = build_image([BIG], compression="none")
        [layer] = built.layers
        digest = layer.descriptor.digest
        async with open_registry() as registry:
            reference = registry.add(built, "library/big:1")
            registry.inject(f"*/blobs/{digest}", Cut(1_500_000))
            await pull(tmp_path, reference)
            sent = [size for name, size in blob_requests(registry) if name == digest]
        assert len(sent) == 2
        assert sum(sent) < layer.descriptor.size + 300_000

    async def test_starts_over_where_the_server_does_not_resume(self, tmp_path: Path) -> None:
        built = build_image([BIG], compression="none")
        [layer] = built.layers
        async with open_registry() as registry:
            reference = registry.add(built, "library/big:1")
            registry.inject(f"*/blobs/{layer.descriptor.digest}", Cut(1_500_000))
            registry.inject(f"*/blobs/{layer.descriptor.digest}", IgnoreRange(), times=None)
            image = await pull(tmp_path, reference)
            assert len(image.layers) == 1

    async def test_bytes_wrong_in_a_resumed_download(self, tmp_path: Path) -> None:
        """The wrong bytes are dropped, and another attempt brings the right ones."""
        built = build_image([BIG], compression="none")
        [layer] = built.layers
        async with open_registry() as registry:
            reference = registry.add(built, "library/big:1")
            registry.inject(f"*/blobs/{layer.descriptor.digest}", Corrupt(100), Cut(1_500_000))
            await pull(tmp_path, reference)

    async def test_resumes_in_another_process(self, tmp_path: Path) -> None:
        """The next opening of the store uses the bytes of a cancelled pull."""
        built = build_image([BIG], compression="none")
        [layer] = built.layers
        digest = layer.descriptor.digest
        async with open_registry() as registry:
            reference = registry.add(built, "library/big:1")
            registry.inject(f"*/blobs/{digest}", Stall(2_000_000))
            downloaded = trio.Event()

            async def sink(event: Progress) -> None:
                if event.action == "Downloading" and event.current >= 1_900_000:
                    downloaded.set()

            async with trio.open_nursery() as nursery:
                with trio.CancelScope() as scope:

                    async def cancel() -> None:
                        await downloaded.wait()
                        scope.cancel()

                    nursery.start_soon(cancel)
                    await pull(tmp_path, reference, progress=sink)
                assert scope.cancelled_caught
            assert digest.removeprefix("sha256:") not in visible(tmp_path)["blobs/sha256"]
            await pull(tmp_path, reference)
            sent = [size for name, size in blob_requests(registry) if name == digest]
        assert sent[-1] < layer.descriptor.size - 1_800_000

    async def test_cancellation_is_quick_while_bytes_arrive(self, tmp_path: Path) -> None:
        built = build_image([BIG], compression="none")
        async with open_registry() as registry:
            reference = registry.add(built, "library/big:1")
            registry.inject("*/blobs/*", Slow(100_000), times=None)
            with trio.fail_after(20), trio.move_on_after(0.5) as scope:
                await pull(tmp_path, reference)
            assert scope.cancelled_caught


class Stored:
    """A store with one image that no failure may change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = visible(path)

    async def refuses(
        self, reference: str, error: type[trio_layers.LayersError], *words: str
    ) -> None:
        with pytest.raises(trio_layers.LayersError) as caught:
            await pull(self.path, reference)
        assert isinstance(caught.value, error), caught.value
        assert "\n" not in str(caught.value)
        for word in words:
            assert word in str(caught.value)
        assert visible(self.path)["trees/sha256"] == self.before["trees/sha256"]
        async with open_store(self.path) as store:
            assert [image.reference.split("/", 1)[1] for image in await store.images()] == [
                "library/demo:latest"
            ]


@pytest.fixture
async def stored(tmp_path: Path) -> Stored:
    async with open_registry() as registry:
        await pull(tmp_path / "store", registry.add(sample_image(), "library/demo:latest"))
    return Stored(tmp_path / "store")


class TestBadInput:
    """Each input is one typed error that names its subject, and the store stays unchanged."""

    @pytest.mark.parametrize("reference", ["UPPER", "a b", "x@sha256:12", "", "http://x/y"])
    async def test_reference(self, stored: Stored, reference: str) -> None:
        await stored.refuses(reference, trio_layers.InvalidReference, repr(reference))
        assert visible(stored.path) == stored.before

    async def test_registry_that_is_not_there(self, stored: Stored) -> None:
        await stored.refuses(
            "127.0.0.1:9/library/demo:latest", trio_layers.RegistryError, "127.0.0.1:9"
        )
        assert visible(stored.path) == stored.before

    async def test_image_that_is_not_there(self, stored: Stored) -> None:
        async with open_registry() as registry:
            await stored.refuses(
                f"{registry.host}/library/nothing:1",
                trio_layers.NotFound,
                f"{registry.host}",
                "nothing",
            )
        assert visible(stored.path) == stored.before

    async def test_digest_that_is_not_there(self, stored: Stored) -> None:
        digest = f"sha256:{'0' * 64}"
        async with open_registry() as registry:
            registry.add(sample_image(), "library/demo:latest")
            await stored.refuses(
                f"{registry.host}/library/demo@{digest}", trio_layers.NotFound, digest
            )

    @pytest.mark.parametrize(
        "manifest", [b"", b"{", b"[]", b"{}", b'{"schemaVersion": 2}', b"\xff" * 10, b"9" * 9000]
    )
    async def test_manifest(self, stored: Stored, manifest: bytes) -> None:
        async with open_registry() as registry:
            media_type = "application/vnd.oci.image.manifest.v1+json"
            registry.add_manifest("library/bad", manifest, media_type=media_type, tag="1")
            await stored.refuses(
                f"{registry.host}/library/bad:1", trio_layers.ManifestError, "library/bad"
            )
        assert visible(stored.path) == stored.before

    @pytest.mark.parametrize("part", ["layer", "config", "diff ID"])
    async def test_digest_of_another_algorithm(self, stored: Stored, part: str) -> None:
        """The error comes before any layer is downloaded."""
        built, repository = build_image([BIG]), "library/bad"
        digest = f"sha512:{hashlib.sha512(built.config).hexdigest()}"
        manifest, config = json.loads(built.manifest), built.config
        if part == "diff ID":
            config = config.replace(built.diff_ids[0].encode(), digest.encode())
        named = digest if part == "config" else f"sha256:{hashlib.sha256(config).hexdigest()}"
        manifest["config"].update(digest=named, size=len(config))
        if part == "layer":
            manifest["layers"][0]["digest"] = digest
        async with open_registry() as registry:
            registry.add(built, f"{repository}:good")
            registry.add_blob(repository, config, digest=trio_layers.Digest(named))
            registry.add_manifest(
                repository,
                json.dumps(manifest).encode(),
                media_type=built.descriptor.media_type,
                tag="1",
            )
            await stored.refuses(
                f"{registry.host}/{repository}:1", trio_layers.ManifestError, digest, "SHA-256"
            )
            assert [asked for asked, _ in blob_requests(registry)] == [named]
        assert visible(stored.path) == stored.before

    async def test_manifest_that_was_changed_on_the_way(self, stored: Stored) -> None:
        async with open_registry() as registry:
            reference = registry.add(sample_image(), "library/demo:latest")
            registry.inject("*/manifests/*", Corrupt(200), times=None)
            await stored.refuses(reference, trio_layers.LayersError, registry.host)

    async def test_config_that_was_changed_on_the_way(self, stored: Stored) -> None:
        built = build_image([BIG])  # not in the store, since stored layers are not requested
        async with open_registry() as registry:
            reference = registry.add(built, "library/demo:latest")
            registry.inject(f"*/blobs/{built.config_descriptor.digest}", Corrupt(20), times=None)
            await stored.refuses(
                reference, trio_layers.VerificationError, built.config_descriptor.digest
            )

    async def test_layer_that_was_changed_on_the_way(self, stored: Stored) -> None:
        """The client requests a corrupt layer exactly once more."""
        built = build_image([BIG], compression="none")
        digest = built.layers[0].descriptor.digest
        async with open_registry() as registry:
            reference = registry.add(built, "library/big:1")
            registry.inject(f"*/blobs/{digest}", Corrupt(100), times=None)
            await stored.refuses(
                reference,
                trio_layers.VerificationError,
                f"filesystem layer verification failed for digest {digest}",
            )
            assert [name for name, _ in blob_requests(registry)].count(digest) == 2

    async def test_layer_that_is_not_there(self, stored: Stored) -> None:
        built = build_image([BIG], compression="none")
        digest = built.layers[0].descriptor.digest
        async with open_registry() as registry:
            reference = registry.add(built, "library/big:1")
            registry.remove("library/big", digest)
            await stored.refuses(reference, trio_layers.NotFound, digest)

    @pytest.mark.parametrize("first", ["right", "lie"])
    async def test_config_that_lies_about_a_layer_it_shares(
        self, tmp_path: Path, first: str
    ) -> None:
        """The wrong config is refused and the right image comes, whichever pull began."""
        right = build_image([BIG], compression="none")
        diff_id = right.diff_ids[0].encode()
        config = right.config.replace(diff_id, b"sha256:" + b"1" * 64)
        lying_config = f"sha256:{hashlib.sha256(config).hexdigest()}"
        manifest = right.manifest.replace(
            right.config_descriptor.digest.encode(), lying_config.encode()
        )
        outcomes: dict[str, str | None] = {}
        async with open_registry() as registry:
            registry.add(right, "library/demo:right")
            registry.add_blob("library/demo", config)
            media_type = right.descriptor.media_type
            registry.add_manifest("library/demo", manifest, media_type=media_type, tag="lie")
            digest = right.layers[0].descriptor.digest
            registry.inject(f"*/blobs/{digest}", Slow(3_000_000), times=None)
            async with open_puller(tmp_path) as puller, trio.open_nursery() as nursery:
                joined = {"right": trio.Event(), "lie": trio.Event()}

                async def run(tag: str) -> None:
                    async def sink(event: Progress) -> None:
                        if event.action == "Downloading":
                            joined[tag].set()

                    reference = f"{registry.host}/library/demo:{tag}"
                    try:
                        async with puller.pull(reference, progress=sink):
                            outcomes[tag] = None
                    except trio_layers.VerificationError as error:
                        outcomes[tag] = str(error)

                nursery.start_soon(run, first)
                await joined[first].wait()
                nursery.start_soon(run, "lie" if first == "right" else "right")
            assert [name for name, _ in blob_requests(registry)].count(digest) == 1
        assert outcomes["right"] is None
        assert outcomes["lie"] is not None
        assert "1" * 64 in outcomes["lie"]
        async with open_store(tmp_path) as store:
            assert [image.reference[-6:] for image in await store.images()] == [":right"]

    async def test_layer_with_another_diff_id_than_the_config_says(self, stored: Stored) -> None:
        right = build_image([[File("a", b"right")]])
        wrong = build_layer([File("a", b"wrong")])
        manifest = right.manifest.replace(
            right.layers[0].descriptor.digest.encode(), wrong.descriptor.digest.encode()
        ).replace(
            b'"size":%d' % right.layers[0].descriptor.size, b'"size":%d' % wrong.descriptor.size
        )
        assert manifest != right.manifest
        async with open_registry() as registry:
            registry.add(right, "library/lie:right")
            registry.add_blob("library/lie", wrong.content)
            media_type = right.descriptor.media_type
            registry.add_manifest("library/lie", manifest, media_type=media_type, tag="1")
            await self.refused_though_unpacked(
                stored, f"{registry.host}/library/lie:1", right.diff_ids[0]
            )

    async def refused_though_unpacked(self, stored: Stored, reference: str, diff_id: str) -> None:
        with pytest.raises(trio_layers.VerificationError, match=diff_id):
            await pull(stored.path, reference)
        async with open_store(stored.path) as store:
            assert len(await store.images()) == 1

    @pytest.mark.parametrize(
        "content", [b"not a tar at all" * 100, b"\x1f\x8b\x08", b"\x1f\x8b\x08" + b"x" * 2000]
    )
    async def test_layer_that_is_no_tar(self, stored: Stored, content: bytes) -> None:
        built = build_image([build_layer(content, compression="none")])
        async with open_registry() as registry:
            reference = registry.add(built, "library/junk:1")
            await stored.refuses(
                reference,
                trio_layers.RegistrationError,
            )

    async def test_layer_that_reaches_outside(self, stored: Stored, tmp_path: Path) -> None:
        """A hostile layer changes nothing outside the tree, refused or not."""
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            link = tarfile.TarInfo("escape")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "outside")
            tar.addfile(link)
            for name in ("escape/file", "../../../../outside/file"):
                info = tarfile.TarInfo(name)
                info.size = 3
                tar.addfile(info, io.BytesIO(b"bad"))
        (tmp_path / "outside").mkdir()
        built = build_image([build_layer(out.getvalue(), compression="none")])
        async with open_registry() as registry:
            reference = registry.add(built, "library/evil:1")
            outcome = None
            try:
                await pull(stored.path, reference)
            except trio_layers.RegistrationError as error:
                outcome = error.reason
        assert outcome is None or isinstance(outcome, trio_layers.UnpackError)
        assert os.listdir(tmp_path / "outside") == []

    async def test_registry_in_trouble(self, stored: Stored) -> None:
        async with open_registry() as registry:
            reference = registry.add(sample_image(), "library/demo:latest")
            registry.inject("*/manifests/*", Reply(503), times=None)
            await stored.refuses(reference, trio_layers.RegistryError, "503", registry.host)
            registry.clear_faults()
            registry.inject("*/manifests/*", Drop(), times=None)
            await stored.refuses(reference, trio_layers.RegistryError, registry.host)
            registry.clear_faults()
            registry.inject("*/manifests/*", Reply(429, headers={"Retry-After": "700"}))
            with pytest.raises(trio_layers.RateLimited) as caught:
                await pull(stored.path, reference)
            assert caught.value.retry_after == 700


async def test_configs_that_leave_things_out(tmp_path: Path) -> None:
    """Configs without a platform or without diff IDs.

    The platform of the index's entry, or else of the host, replaces a missing platform. An image
    without diff IDs has no layers.
    """
    host = str(host_platform())
    amd, arm = (
        with_config(small_image(platform=platform), os="", architecture="")
        for platform in ("linux/amd64", "linux/arm64")
    )
    index = build_index([amd, arm])
    nothing = [
        with_config(build_image([]), rootfs=rootfs)
        for rootfs in ({"type": "layers"}, {"type": "layers", "diff_ids": None})
    ]
    async with open_registry() as registry:
        image = await pull(tmp_path, registry.add(amd, "amd:1"))
        assert str(image.platform) == host
        reference = registry.add(index, "both:1")
        for platform in ("linux/amd64", "linux/arm64"):
            for policy in ("always", "never"):
                image = await pull(tmp_path, reference, platform=platform, policy=policy)
                assert str(image.platform) == str(image.config.platform) == platform
        for number, built in enumerate(nothing):
            image = await pull(tmp_path, registry.add(built, f"nothing:{number}"))
            assert image.layers == ()
