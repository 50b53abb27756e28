"""Archives with two lists of images, images without names, and artifacts beside images."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import attrs
import pytest
from archives.layouts import (
    INDEX_TYPE,
    NAME,
    OCI_LAYOUT,
    Members,
    Sink,
    as_json,
    blob,
    docker_members,
    entry_of,
    files,
    opened,
    ref_name,
    small_image,
    tar_of,
    with_config,
    write_layout,
)
from store.stores import Stream, visible

from trio_layers import (
    ArchiveError,
    InvalidDigest,
    LayersError,
    ManifestError,
    PlatformError,
    VerificationError,
    export_images,
    import_images,
    open_puller,
    parse_reference,
)
from trio_layers._digest import digest_of
from trio_layers._platform import host_platform
from trio_layers.testing import BuiltImage, build_index

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"

IMAGE = small_image(compression="gzip")
OTHER = small_image("other", compression="gzip")
THIRD = small_image("third", compression="gzip")
ARM = small_image("arm", platform="linux/arm64", compression="gzip")
UNNAMED = "localhost/unnamed@"


def blobs_of(*images: BuiltImage) -> Members:
    members: Members = {}
    for image in images:
        members[blob(image.digest)] = image.manifest
        for digest, content in image.blobs.items():
            assert isinstance(content, bytes)
            members[blob(digest)] = content
    return members


def docker_entry(image: BuiltImage, *tags: str, **changes: object) -> dict[str, object]:
    """An entry of ``manifest.json`` whose paths are blobs of a layout, as in Docker 25."""
    return {
        "Config": blob(image.config_descriptor.digest),
        "RepoTags": list(tags) or None,
        "Layers": [blob(layer.descriptor.digest) for layer in image.layers],
        **changes,
    }


def named(image: BuiltImage, name: str) -> dict[str, object]:
    return entry_of(image, **ref_name(name))


def entry_for(document: bytes, name: str = "", media_type: str = MANIFEST_TYPE) -> object:
    return {
        "mediaType": media_type,
        "digest": digest_of(document),
        "size": len(document),
        "annotations": {"org.opencontainers.image.ref.name": name},
    }


def both(index: object, docker: object, members: Members) -> bytes:
    """Build an archive with two lists.

    Args:
        index: The entries of ``index.json``; ``b"null"``: null; ``None``: no such file.
        docker: ``manifest.json``, to be encoded or as bytes; ``None``: no such file.
        members: The other files of the archive.
    """
    lists: Members = {}
    if index is not None:
        index = None if index == b"null" else index
        document = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": index}
        lists = {"oci-layout": OCI_LAYOUT, "index.json": as_json(document)}
    if docker is not None:
        lists["manifest.json"] = docker if isinstance(docker, bytes) else as_json(docker)
    return tar_of({**members, **lists})


def manifest_with(image: BuiltImage, **changes: object) -> bytes:
    return as_json({**json.loads(image.manifest), **changes})


# test_two_lists combines every state of index.json with every state of manifest.json. A Half is one
# list with its files, and `is_whole` says whether the list suffices for an import.


@attrs.frozen
class Half:
    entries: object = None
    members: Members = attrs.field(factory=dict)
    is_whole: bool = False
    names: tuple[str, ...] = ()


NO_LAYERS = manifest_with(IMAGE, layers=[])
NULL_LAYERS = manifest_with(IMAGE, layers=None)
MISSING_LAYER = manifest_with(
    IMAGE,
    layers=[{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": "sha256:" + "0" * 64,
             "size": 1}] * 2,
)  # fmt: skip
MISSING_CONFIG = manifest_with(
    IMAGE, config={"mediaType": CONFIG_TYPE, "digest": "sha256:" + "0" * 64, "size": 1}
)
NESTED = as_json({"schemaVersion": 2, "manifests": [entry_of(IMAGE, platform="linux/amd64")]})
SPARSE = as_json(
    {
        "schemaVersion": 2,
        "manifests": [
            entry_of(ARM, platform="linux/arm64"),
            entry_of(IMAGE, platform="linux/amd64"),
        ],
    }
)


def broken(manifest: bytes) -> Half:
    return Half([entry_for(manifest, NAME)], {blob(digest_of(manifest)): manifest}, False, (NAME,))


def nested(index: bytes) -> Half:
    entry = entry_for(index, NAME, INDEX_TYPE)
    return Half([entry], {blob(digest_of(index)): index}, True, (NAME,))


INDEX_HALVES = {
    "absent": Half(),
    "null": Half(b"null"),
    "empty": Half([]),
    "named": Half([named(IMAGE, NAME)], {}, True, (NAME,)),
    "another name": Half([named(IMAGE, "x.test/a:1")], {}, True, ("x.test/a:1",)),
    "a tag": Half([named(IMAGE, "1")], {}, True),
    "unnamed": Half([entry_of(IMAGE)], {}, True),
    "nested": nested(NESTED),
    "sparse": nested(SPARSE),
    "no layers": broken(NO_LAYERS),
    "null layers": broken(NULL_LAYERS),
    "a layer is missing": broken(MISSING_LAYER),
    "the config is missing": broken(MISSING_CONFIG),
    "the manifest is missing": Half([named(OTHER, NAME)], {}, False, (NAME,)),
    "the unnamed manifest is missing": Half([entry_of(OTHER)]),
    "no JSON": broken(b"{"),
}
DOCKER_HALVES = {
    "absent": Half(),
    "null": Half(b"null"),
    "empty": Half([]),
    "no JSON": Half(b"["),
    "named": Half([docker_entry(IMAGE, NAME)], {}, True, (NAME,)),
    "another name": Half([docker_entry(IMAGE, "y.test/b:2")], {}, True, ("y.test/b:2",)),
    "two entries": Half(
        [docker_entry(IMAGE, NAME), docker_entry(IMAGE, "y.test/b:2", Layers=[])],
        {},
        True,
        (NAME, "y.test/b:2"),
    ),
    "unnamed": Half([docker_entry(IMAGE)], {}, True),
    "no layers": Half([docker_entry(IMAGE, NAME, Layers=[])], {}, False, (NAME,)),
    "null layers": Half([docker_entry(IMAGE, NAME, Layers=None)], {}, False, (NAME,)),
    "a layer is missing": Half(
        [docker_entry(IMAGE, NAME, Layers=["0/layer.tar", "1/layer.tar"])], {}, False, (NAME,)
    ),
    "the config is missing": Half([docker_entry(IMAGE, NAME, Config="c.json")], {}, False, (NAME,)),
}


USELESS = (
    "the config is missing",
    "the manifest is missing",
    "the unnamed manifest is missing",
    "no JSON",
)
"""States of ``index.json`` from which the importer cannot even tell the image's config."""


@pytest.mark.parametrize("index", INDEX_HALVES)
async def test_two_lists(tmp_path: Path, index: str) -> None:
    """The complete list describes the image, which gets the names from both lists."""
    first = INDEX_HALVES[index]
    async with opened(tmp_path) as store:
        for name, second in DOCKER_HALVES.items():
            data = both(first.entries, second.entries, {**blobs_of(IMAGE), **first.members})

            async def take(data: bytes = data) -> dict[str, str]:
                images = await import_images(store, Stream(data), all=True, platform="linux/amd64")
                for image in images:
                    assert len(await files(store, image)) == 5
                return {image.reference: image.config.digest for image in images}

            if not first.is_whole and not second.is_whole:
                with pytest.raises(LayersError, match="the stream"):
                    await take()
                assert await store.images() == [], name
                continue
            names = {*first.names, *second.names}
            if index in USELESS:
                names = {*second.names}
            if name == "the config is missing":
                names = {*first.names}
            expected = {str(parse_reference(each)) for each in names}
            got = await take()
            assert set(got.values()) == {IMAGE.config_descriptor.digest}, name
            if expected:
                assert set(got) == expected, name
            else:
                [reference] = got
                assert reference.startswith(UNNAMED), name
            for reference in got:
                await store.remove(reference)


async def test_lists_that_contradict_each_other(tmp_path: Path) -> None:
    """One name for two images is an error with both digests, and a digest chooses one."""
    ids = {image: image.config_descriptor.digest for image in (IMAGE, OTHER)}
    cases = {
        "one name": both([named(IMAGE, NAME)], [docker_entry(OTHER, NAME)], blobs_of(IMAGE, OTHER)),
        "the other image is listed under another name": both(
            [named(IMAGE, NAME), named(OTHER, "x.test/b:1")],
            [docker_entry(OTHER, NAME)],
            blobs_of(IMAGE, OTHER),
        ),
        "in one list": both([named(IMAGE, NAME), named(OTHER, NAME)], None, blobs_of(IMAGE, OTHER)),
        "in the other list": both(
            None, [docker_entry(IMAGE, NAME), docker_entry(OTHER, NAME)], blobs_of(IMAGE, OTHER)
        ),
    }
    async with opened(tmp_path) as store:
        for data in cases.values():
            for options in ({}, {"all": True}):
                with pytest.raises(ArchiveError, match=r"demo:1 is sha256:.* in .*, and") as e:
                    await import_images(store, Stream(data), **options)
                assert all(digest in str(e.value) for digest in ids.values())
            with pytest.raises(ArchiveError, match=r"2 images that match .*demo:1") as e:
                await import_images(store, Stream(data), reference=NAME)
            assert all(digest in str(e.value) for digest in ids.values())
            assert await store.images() == []
            for digest in ids.values():
                [image] = await import_images(store, Stream(data), reference=NAME, digest=digest)
                assert (image.reference, image.config.digest) == (NAME, digest)
                await store.remove(NAME)


async def test_images_that_one_list_has(tmp_path: Path) -> None:
    """An image or a name that only one list has is imported."""
    data = both(
        [named(IMAGE, NAME), entry_of(OTHER)],
        [docker_entry(IMAGE, NAME, "demo:2"), docker_entry(THIRD), docker_entry(ARM, "arm:1")],
        blobs_of(IMAGE, OTHER, THIRD, ARM),
    )
    async with opened(tmp_path) as store:
        with pytest.raises(ArchiveError, match="without a name, and 1 more") as caught:
            await import_images(store, Stream(data))
        assert OTHER.digest in str(caught.value)
        assert THIRD.config_descriptor.digest in str(caught.value)
        images = await import_images(store, Stream(data), all=True)
        assert [image.reference for image in images] == [
            NAME,
            "docker.io/library/demo:2",
            f"{UNNAMED}{OTHER.digest}",
            f"{UNNAMED}{images[3].manifest.digest}",
            "docker.io/library/arm:1",
        ]
        expected = [each.config_descriptor.digest for each in (IMAGE, IMAGE, OTHER, THIRD, ARM)]
        assert [image.config.digest for image in images] == expected
        assert not (await store.check()).problems


async def test_a_name_for_one_image_of_an_index(tmp_path: Path) -> None:
    """A name in ``manifest.json`` means one image, not all platforms of its index."""
    index = build_index([IMAGE, ARM])
    members = {**blobs_of(IMAGE, ARM), blob(index.digest): index.manifest}
    data = both(
        [named(index, NAME)], [docker_entry(IMAGE, NAME, "only:amd"), docker_entry(ARM)], members
    )
    async with opened(tmp_path) as store:
        images = await import_images(store, Stream(data), platform="linux/amd64")
        assert [image.reference for image in images] == [NAME, "docker.io/library/only:amd"]
        assert {image.manifest.digest for image in images} == {IMAGE.digest}
        with pytest.raises(PlatformError, match="only:amd has no image for linux/arm64"):
            await import_images(store, Stream(data), platform="linux/arm64")


async def test_the_platform_that_an_archive_lacks(tmp_path: Path) -> None:
    """Docker saves an index with only some of its images: the error names their platforms."""
    index = build_index([IMAGE, ARM])
    for images in ([IMAGE], [ARM]):
        members = {**blobs_of(*images), blob(index.digest): index.manifest}
        data = both([named(index, NAME)], [docker_entry(each, NAME) for each in images], members)
        there, lacking = ("amd64", "arm64") if images == [IMAGE] else ("arm64", "amd64")
        async with opened(tmp_path) as store:
            text = (
                f"demo:1 has an entry for linux/{lacking}.*lacks.*it has images for linux/{there}"
            )
            with pytest.raises(PlatformError, match=text):
                await import_images(store, Stream(data), platform=f"linux/{lacking}")
            [image] = await import_images(store, Stream(data), platform=f"linux/{there}")
            assert image.platform == f"linux/{there}"
            assert image.index is not None


async def test_a_damaged_config_is_no_description(tmp_path: Path) -> None:
    """A config that does not match its blob path is an error if there is an ``index.json``."""
    members = blobs_of(IMAGE)
    config = as_json({**json.loads(IMAGE.config), "author": "edited"})
    members[blob(IMAGE.config_descriptor.digest)] = config
    async with opened(tmp_path) as store:
        data = both([named(IMAGE, NAME)], [docker_entry(IMAGE, NAME)], members)
        with pytest.raises(VerificationError, match="is damaged"):
            await import_images(store, Stream(data))
        # Without index.json the archive is a docker-archive, whose paths promise nothing.
        data = both(None, [docker_entry(IMAGE, NAME)], members)
        [image] = await import_images(store, Stream(data))
        assert image.config.digest == digest_of(config)


async def test_an_edited_config_under_its_old_name(tmp_path: Path) -> None:
    """A docker-archive's config need not match the digest in its file name.

    Tools edit configs in place, and Docker loads them.
    """
    members = docker_members(IMAGE, "demo:1")
    [path] = [name for name in members if name.endswith(".json") and name != "manifest.json"]
    members[path] = as_json({**json.loads(IMAGE.config), "config": {"Cmd": ["edited"]}})
    async with opened(tmp_path) as store:
        [image] = await import_images(store, Stream(tar_of(members)))
        assert image.config.digest == digest_of(members[path])
        assert len(await files(store, image)) == 5


async def test_an_index_without_a_layout_beside_it(tmp_path: Path) -> None:
    """Beside ``manifest.json`` an ``index.json`` counts even without ``oci-layout``."""
    data = both([named(IMAGE, NAME)], [docker_entry(OTHER, "b:1")], blobs_of(IMAGE, OTHER))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(m.name, tar.extractfile(m)) for m in tar if m.name != "oci-layout"]
        data = tar_of([(name, file.read()) for name, file in members if file is not None])
    async with opened(tmp_path) as store:
        images = await import_images(store, Stream(data))
        assert [image.reference for image in images] == [NAME, "docker.io/library/b:1"]


async def test_a_digest_is_no_name(tmp_path: Path) -> None:
    """A name that is only a digest is ignored.

    The reference grammar would parse ``sha256:…`` as a tag of a repository ``sha256``.
    """
    index = [named(IMAGE, IMAGE.digest)]
    docker = [docker_entry(IMAGE, IMAGE.config_descriptor.digest)]
    async with opened(tmp_path) as store:
        for first, second in ((index, None), (None, docker), (index, docker)):
            data = both(first, second, blobs_of(IMAGE))
            with pytest.raises(ArchiveError, match="without a name"):
                await import_images(store, Stream(data))
            [image] = await import_images(store, Stream(data), all=True)
            assert image.reference == f"{UNNAMED}{image.manifest.digest}"


async def test_broken_entries_beside_artifacts(tmp_path: Path) -> None:
    """If ``index.json`` has a missing image and a signature, ``manifest.json`` is used."""
    signature = ARTIFACTS["cosign's signature"]
    members = {**blobs_of(IMAGE), blob(digest_of(signature)): signature}
    index = [named(OTHER, "x.test/a:1"), entry_for(signature, "x.test/a:sig")]
    data = both(index, [docker_entry(IMAGE, NAME)], members)
    async with opened(tmp_path) as store:
        [image] = await import_images(store, Stream(data))
        assert (image.reference, image.config.digest) == (NAME, IMAGE.config_descriptor.digest)


# Images without names.


@attrs.frozen
class Source:
    data: bytes
    digests: dict[str, BuiltImage]
    """The images, by each digest that chooses one of them."""


def two_unnamed() -> dict[str, Source]:
    images = (IMAGE, OTHER)
    manifests = {image.digest: image for image in images}
    configs = {image.config_descriptor.digest: image for image in images}
    docker = [docker_entry(image) for image in images]
    index = [entry_of(image) for image in images]
    return {
        "layout": Source(both(index, None, blobs_of(*images)), {**manifests, **configs}),
        "docker-archive": Source(both(None, docker, blobs_of(*images)), {**manifests, **configs}),
        "both": Source(both(index, docker, blobs_of(*images)), {**manifests, **configs}),
        "one in each": Source(
            both(index[:1], docker[1:], blobs_of(*images)), {**manifests, **configs}
        ),
        "platforms": Source(
            both(
                [entry_of(IMAGE, platform="linux/amd64"), entry_of(ARM, platform="linux/arm64")],
                None,
                blobs_of(IMAGE, ARM),
            ),
            {IMAGE.digest: IMAGE, ARM.digest: ARM},
        ),
    }


UNNAMED_SOURCES = two_unnamed()


@pytest.mark.parametrize("kind", UNNAMED_SOURCES)
async def test_unnamed_images_are_chosen_by_digest(tmp_path: Path, kind: str) -> None:
    """A manifest's or config's digest, or its beginning, chooses an image without a name."""
    source = UNNAMED_SOURCES[kind]
    async with opened(tmp_path) as store:
        for digest, built in source.digests.items():
            digits = digest.removeprefix("sha256:")
            for text in (digits, digest[:19]):
                [image] = await import_images(
                    store, Stream(source.data), digest=text, reference="demo:1"
                )
                assert image.reference == NAME
                assert image.config.digest == built.config_descriptor.digest
            for options in ({"digest": digest}, {"reference": digest}):
                [image] = await import_images(store, Stream(source.data), **options)
                assert image.reference == f"{UNNAMED}{image.manifest.digest}"
                assert image.config.digest == built.config_descriptor.digest
            pinned = f"x.test/a@{digest}"
            [image] = await import_images(store, Stream(source.data), reference=pinned)
            assert image.reference == f"x.test/a@{image.manifest.digest}"
            assert image.config.digest == built.config_descriptor.digest


def twins() -> list[BuiltImage]:
    """Two images whose digests begin with the same hex digit: of 17 images two must."""
    seen: dict[str, BuiltImage] = {}
    for number in range(17):
        image = small_image(str(number))
        first = image.digest[7]
        if first in seen:
            return [seen[first], image]
        seen[first] = image
    raise AssertionError


TWINS = twins()


async def test_digests_that_choose_nothing(tmp_path: Path) -> None:
    data = UNNAMED_SOURCES["both"].data
    async with opened(tmp_path) as store:
        with pytest.raises(ArchiveError, match=f"none of them is sha256:0{{64}}.*{IMAGE.digest}"):
            await import_images(store, Stream(data), digest="sha256:" + "0" * 64)
        with pytest.raises(ArchiveError, match=f"none of them is x.test/a@.*{IMAGE.digest}"):
            await import_images(store, Stream(data), reference="x.test/a@sha256:" + "0" * 64)
        both_begin_so = both([named(i, NAME) for i in TWINS], None, blobs_of(*TWINS))
        with pytest.raises(ArchiveError, match=r"2 images that match sha256:.:"):
            await import_images(store, Stream(both_begin_so), digest=TWINS[0].digest[7])
        for wrong in ("", "sha256:", "sha512:ab", "latest", "A" * 12, "a" * 65):
            with pytest.raises(InvalidDigest):
                await import_images(store, Stream(data), digest=wrong)
        with pytest.raises(ValueError, match="leave out"):
            await import_images(store, Stream(data), digest=IMAGE.digest, all=True)
        with pytest.raises(ValueError, match="leave out"):
            await import_images(store, Stream(data), reference=NAME, all=True)
    same = both(None, [docker_entry(IMAGE, "a:1"), docker_entry(IMAGE, "b:1")], blobs_of(IMAGE))
    async with opened(tmp_path) as store:
        images = await import_images(store, Stream(same), digest=IMAGE.digest[:20])
        assert [each.reference.rpartition("/")[2] for each in images] == ["a:1", "b:1"]


async def test_unnamed_images_afterwards(tmp_path: Path) -> None:
    """The name of an unnamed image works in exports, imports, look-ups and removals."""
    async with opened(tmp_path / "store") as store, opened(tmp_path / "other") as other:
        data = UNNAMED_SOURCES["layout"].data
        images = await import_images(store, Stream(data), all=True)
        assert [image.reference for image in images] == [
            f"{UNNAMED}{each.digest}" for each in (IMAGE, OTHER)
        ]
        for format in ("oci-archive", "oci"):
            target = tmp_path / format
            await export_images(store, [image.reference for image in images], target, format=format)
            assert await import_images(other, target) == images
        assert await store.images(images[0].reference) == [images[0]]
        assert await store.remove(images[0].reference)
        assert await store.images() == images[1:]
        # The store's directory is an OCI layout itself.
        async with opened(tmp_path / "third") as third:
            assert await import_images(third, tmp_path / "store") == images[1:]


async def test_an_unnamed_index(tmp_path: Path) -> None:
    index = build_index([IMAGE, ARM])
    members = {**blobs_of(IMAGE, ARM), blob(index.digest): index.manifest}
    data = both([entry_of(index)], None, members)
    async with opened(tmp_path) as store:
        for platform, built in {"linux/amd64": IMAGE, "linux/arm64": ARM}.items():
            [image] = await import_images(store, Stream(data), all=True, platform=platform)
            assert (image.reference, image.platform) == (f"{UNNAMED}{index.digest}", platform)
            [image] = await import_images(store, Stream(data), digest=built.digest)
            assert image.reference == f"{UNNAMED}{built.digest}"
            [image] = await import_images(
                store, Stream(data), digest=index.digest, platform=platform
            )
            assert image.manifest.digest == built.digest


# Artifacts.


def artifact(**changes: object) -> bytes:
    empty = {
        "mediaType": "application/vnd.oci.empty.v1+json",
        "digest": digest_of(b"{}"),
        "size": 2,
    }
    return as_json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": empty,
            "layers": [],
            "subject": {"mediaType": MANIFEST_TYPE, "digest": IMAGE.digest, "size": 1},
            **changes,
        }
    )


def layer_of(media_type: str) -> list[object]:
    return [{"mediaType": media_type, "digest": digest_of(b"{}"), "size": 2}]


REAL_CONFIG = json.loads(IMAGE.manifest)["config"]
ARTIFACTS = {
    "cosign's signature": artifact(
        config=REAL_CONFIG, layers=layer_of("application/vnd.dev.cosign.simplesigning.v1+json")
    ),
    "cosign's attestation": artifact(
        config=REAL_CONFIG, layers=layer_of("application/vnd.dsse.envelope.v1+json")
    ),
    "in-toto": artifact(config=REAL_CONFIG, layers=layer_of("application/vnd.in-toto+json")),
    "a referrer": artifact(artifactType="application/spdx+json"),
    "a referrer with the config of an image": artifact(
        config=REAL_CONFIG, artifactType="application/spdx+json"
    ),
    "a chart": artifact(
        config={**REAL_CONFIG, "mediaType": "application/vnd.cncf.helm.config.v1+json"}
    ),
}


@pytest.mark.parametrize("kind", ARTIFACTS)
async def test_artifacts_are_no_candidates(tmp_path: Path, kind: str) -> None:
    document = ARTIFACTS[kind]
    members = {
        **blobs_of(IMAGE),
        blob(digest_of(document)): document,
        blob(digest_of(b"{}")): b"{}",
    }
    index = as_json({"schemaVersion": 2, "manifests": [entry_for(document)]})
    members[blob(digest_of(index))] = index
    async with opened(tmp_path) as store:
        beside: dict[str, list[object]] = {
            "by itself": [entry_of(IMAGE), entry_for(document)],
            "with a name": [entry_of(IMAGE), entry_for(document, "x.test/a:sig")],
            "with the image's name": [named(IMAGE, NAME), entry_for(document, NAME)],
            "in an index": [entry_of(IMAGE), entry_for(index, "", INDEX_TYPE)],
        }
        for entries in beside.values():
            data = both(entries, None, members)
            [image] = await import_images(store, Stream(data), reference="demo:1")
            assert image.manifest.digest == IMAGE.digest
            [image] = await import_images(store, Stream(data), all=True)
            assert image.manifest.digest == IMAGE.digest
            with pytest.raises(
                ArchiveError, match="is an artifact such as a signature, not an image"
            ):
                await import_images(store, Stream(data), digest=digest_of(document))
        alone = both([entry_for(document)], None, members)
        with pytest.raises(ManifestError, match=r"not an image|unsupported type|layers, but"):
            await import_images(store, Stream(alone), all=True)


async def test_an_image_that_cannot_be_unpacked_is_a_candidate(tmp_path: Path) -> None:
    """An encrypted image is no artifact, so importing it is an error."""
    encrypted = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"
    document = manifest_with(OTHER, layers=layer_of(encrypted))
    members = {**blobs_of(IMAGE, OTHER), blob(digest_of(document)): document}
    data = both([named(IMAGE, NAME), entry_for(document, "x.test/a:1")], None, members)
    async with opened(tmp_path) as store:
        with pytest.raises(ManifestError, match="encrypted"):
            await import_images(store, Stream(data))
        assert visible(tmp_path) == []
        [image] = await import_images(store, Stream(data), reference=NAME)
        assert image.manifest.digest == IMAGE.digest


# Images without layers, and configs without a platform.


def scratch(**config: object) -> bytes:
    return as_json({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers"}, **config})


@pytest.mark.parametrize("rootfs", [{}, {"diff_ids": None}, {"diff_ids": []}], ids=str)
@pytest.mark.parametrize("layers", [{}, {"layers": None}, {"layers": []}], ids=str)
async def test_no_layers_at_all(
    tmp_path: Path, rootfs: dict[str, object], layers: dict[str, object]
) -> None:
    """An image without layers is imported: Docker and Go omit empty lists or write null."""
    config = scratch(rootfs={"type": "layers", **rootfs})
    entry: dict[str, object] = {"Config": "c.json", "RepoTags": ["demo:1"]}
    if layers:
        entry["Layers"] = layers["layers"]
    manifest = as_json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": digest_of(config), "size": len(config)},
            **layers,
        }
    )
    members = {blob(digest_of(config)): config, blob(digest_of(manifest)): manifest}
    async with opened(tmp_path) as store:
        for data in (
            tar_of({"c.json": config, "manifest.json": as_json([entry])}),
            both([entry_for(manifest, NAME)], None, members),
        ):
            [image] = await import_images(store, Stream(data))
            assert (image.reference, image.chain_id) == (NAME, None)
            assert image.config.digest == digest_of(config)
            assert await files(store, image) == []
            sink = Sink()
            await export_images(store, NAME, sink)
            assert await import_images(store, Stream(bytes(sink.data))) == [image]
            await store.remove(NAME)
        assert not (await store.check()).problems


@pytest.mark.parametrize("lacking", [{"architecture": ""}, {"architecture": None, "os": ""}])
async def test_a_config_without_a_platform(tmp_path: Path, lacking: dict[str, object]) -> None:
    """The platform comes from the index entry, or else is the host's; pack writes such configs."""
    amd, arm = (with_config(image, **lacking) for image in (IMAGE, ARM))
    host = str(host_platform())
    index = build_index([amd, arm])
    members = {**blobs_of(amd, arm), blob(index.digest): index.manifest}
    async with opened(tmp_path) as store:
        for data in (
            both([named(amd, NAME)], None, members),
            both(None, [docker_entry(amd, NAME)], members),
        ):
            for platform in (None, host):
                [image] = await import_images(store, Stream(data), platform=platform)
                assert image.platform == host
            with pytest.raises(PlatformError, match=f"linux/s390x, but for {host}"):
                await import_images(store, Stream(data), platform="linux/s390x")
            await store.remove(NAME)
        flat = [{**entry_of(each), "platform": each_platform(each)} for each in (amd, arm)]
        for entries in ([entry_of(index)], flat):
            data = both(entries, None, members)
            for platform, built in {"linux/amd64": amd, "linux/arm64": arm}.items():
                [image] = await import_images(
                    store, Stream(data), reference=NAME, platform=platform
                )
                assert (image.manifest.digest, image.platform) == (built.digest, platform)
        async with open_puller(store) as puller:
            for platform, built in {"linux/amd64": amd, "linux/arm64": arm}.items():
                async with puller.pull(NAME, platform=platform, policy="never") as pulled:
                    assert pulled.digest == built.digest
                    assert str(pulled.platform) == str(pulled.config.platform) == platform


def each_platform(image: BuiltImage) -> dict[str, str]:
    return dict(zip(("os", "architecture"), image.platform.split("/"), strict=True))


# Sources that are no archives.


async def test_a_directory_of_skopeo(tmp_path: Path) -> None:
    """The error names skopeo's dir: transport and the command that converts it."""
    members = {
        "version": b"Directory Transport Version: 1.1\n",
        "manifest.json": IMAGE.manifest,
        **{digest[7:]: data for digest, data in IMAGE.blobs.items() if isinstance(data, bytes)},
    }
    layout = write_layout(tmp_path / "dir", members)
    async with opened(tmp_path / "store") as store:
        for source in (layout, Stream(tar_of(members))):
            with pytest.raises(ArchiveError, match=r"dir: transport.*skopeo copy dir:"):
                await import_images(store, source)


async def test_a_docker_archive_that_was_unpacked(tmp_path: Path) -> None:
    """Only the paths of a layout's blobs are opened, since others may lead anywhere."""
    outside = tmp_path / "outside.json"
    outside.write_bytes(IMAGE.config)
    entry = docker_entry(IMAGE, NAME, Config="../outside.json")
    layout = write_layout(tmp_path / "layout", docker_members(IMAGE, NAME))
    async with opened(tmp_path / "store") as store:
        with pytest.raises(ArchiveError, match=r"an unpacked docker-archive.*pack it with tar"):
            await import_images(store, layout)
        for number, changes in enumerate(
            [entry, {**docker_entry(IMAGE, NAME), "Layers": ["../x"]}]
        ):
            members = {**blobs_of(IMAGE), "manifest.json": as_json([changes])}
            layout = write_layout(tmp_path / str(number), members)
            with pytest.raises((ArchiveError, ManifestError), match=r"unpacked|1 layers"):
                await import_images(store, layout)
        members = {**blobs_of(IMAGE), "manifest.json": as_json([docker_entry(IMAGE, NAME)])}
        [image] = await import_images(store, write_layout(tmp_path / "docker25", members))
        assert image.config.digest == IMAGE.config_descriptor.digest
