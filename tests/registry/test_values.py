"""References, platforms, manifests and configs, beyond the recorded tables."""

from __future__ import annotations

import json
import os

import pytest
from registry.fakes import OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, as_json, describe

from trio_layers._errors import InvalidReference, ManifestError, PlatformError
from trio_layers._manifest import (
    MAX_DOCUMENT_SIZE,
    Index,
    Manifest,
    check_image,
    check_layer_count,
    decode_config,
    decode_manifest,
)
from trio_layers._platform import Platform, choose, host_platform, parse_platform
from trio_layers._reference import parse_reference

DIGEST = "sha256:" + "ab" * 32


def manifest(**members: object) -> bytes:
    document = {"schemaVersion": 2, "config": as_json(describe(b"{}", OCI_CONFIG)), "layers": []}
    return json.dumps({**document, **members}).encode()


def config(**members: object) -> bytes:
    document = {
        "os": "linux",
        "architecture": "arm64",
        "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
    }
    return json.dumps({**document, **members}).encode()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a@sha256:" + "ab" * 16, "digest-length"),
        ("a:t@SHA256:" + "ab" * 32, "digest-format"),
        ("a@SHA256:" + "ab" * 32, "uppercase"),
        ("a@blake3:" + "ab" * 32, "digest-unsupported"),
        ("ubuntu\n", "invalid-format"),
    ],
)
def test_reasons(text: str, reason: str) -> None:
    """The error names the violated rule."""
    with pytest.raises(InvalidReference) as caught:
        parse_reference(text)
    assert caught.value.reason == reason


def test_a_long_reference_is_read_in_no_time() -> None:
    """The grammar does not backtrack; with backtracking this would take years."""
    for text in ("a-" * 50_000, "a." * 50_000 + "!/x", "x/" + "a__" * 50_000, "-" * 100_000):
        with pytest.raises(InvalidReference):
            parse_reference(text)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("x86_64", "linux/amd64"),
        ("aarch64", "linux/arm64"),
        ("armv7l", "linux/arm/v7"),
        ("armv6l", "linux/arm/v6"),
        ("i686", "linux/386"),
        ("ppc64le", "linux/ppc64le"),
        ("loongarch64", "linux/loong64"),
        ("riscv64", "linux/riscv64"),
    ],
)
def test_host_platform(monkeypatch: pytest.MonkeyPatch, machine: str, expected: str) -> None:
    """The kernel's name for the processor is converted to Go's."""
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "h", "6", "1", machine)))
    assert str(host_platform()) == expected


def test_os_options_survive_quoting() -> None:
    """Characters of the specifier's syntax are quoted."""
    platform = Platform("windows", "amd64", "", "10.0 (a/b)+100%", ("win32k", "x+y"))
    quoted = str(platform).replace(" ", "%20")
    assert parse_platform(quoted) == platform


@pytest.mark.parametrize("specifier", ["linux(1%zz)/amd64", "linux/amd64\n", "/amd64"])
def test_malformed_specifiers(specifier: str) -> None:
    """The error shows the specifier and the right form."""
    with pytest.raises(PlatformError, match=r"^invalid platform .*expected OS, ARCH"):
        parse_platform(specifier)


def test_newer_arm64_variants_run_older_ones() -> None:
    """v9.x was derived from v8.(x+5), and runs the nearest variant first."""
    wanted = Platform("linux", "arm64", "v9.1")
    offers = ["v8", "v8.7", "v8.6", "v9", "v9.2"]
    platforms = [Platform("linux", "arm64", variant) for variant in offers]
    left: list[Platform | None] = list(platforms)
    chosen = []
    while (index := choose(wanted, left)) is not None:
        chosen.append(platforms[index].variant)
        left[index] = Platform("plan9", "386")
    assert chosen == ["v9", "v8.6", "v8"]


@pytest.mark.parametrize(
    ("specifier", "expected"),
    [
        ("linux/arm64/9", "linux/arm64/v9"),
        ("linux/arm64/9.0", "linux/arm64/v9"),
        ("linux/aarch64/V9.0", "linux/arm64/v9"),
        ("linux/arm64/v9.1", "linux/arm64/v9.1"),
        ("linux/arm64/8", "linux/arm64"),
        ("linux/arm64/v8.0", "linux/arm64"),
        ("linux/arm/8", "linux/arm/v8"),
    ],
)
def test_variants_by_other_names(specifier: str, expected: str) -> None:
    """Variants such as ``8`` and ``v8`` are equal."""
    wanted = parse_platform(specifier)
    assert str(wanted.normalized()) == expected
    system, architecture, variant = specifier.split("/")
    there = Platform(system, architecture, variant)
    assert choose(parse_platform(expected), [there]) == 0
    assert choose(wanted, [parse_platform(expected)]) == 0


def test_features_that_were_asked_for_are_preferred() -> None:
    """Among equal platforms, the one with the most requested features wins.

    A better architecture or variant takes precedence.
    """
    plain, one, both = (
        Platform("linux", "amd64", os_features=features) for features in ((), ("a",), ("b", "a"))
    )
    wanted = Platform("linux", "amd64", os_features=("a", "b", "c"))
    assert choose(wanted, [plain, one, both]) == 2
    assert choose(wanted, [None, plain, one]) == 2
    assert choose(Platform("linux", "amd64", os_features=("a",)), [plain, one, both]) == 1
    assert choose(Platform("linux", "amd64"), [one, plain]) == 1
    lesser = Platform("linux", "386", os_features=("a", "b"))
    assert choose(wanted, [lesser, plain]) == 1
    assert choose(wanted, [one, Platform("linux", "amd64", os_features=("a", "a"))]) == 0


def test_os_features_must_be_offered() -> None:
    """An image that needs an unnamed feature does not fit."""
    needs = Platform("linux", "amd64", os_features=("a", "b"))
    assert choose(Platform("linux", "amd64", os_features=("b", "a", "c")), [needs]) == 0
    assert choose(Platform("linux", "amd64", os_features=("a",)), [needs]) is None


def test_manifest_members() -> None:
    """An optional member of a descriptor may be missing, null, or present."""
    layer = as_json(describe(b"x"), urls=["https://a.example/x"], annotations={"k": "v"})
    document = decode_manifest(
        manifest(layers=[layer, as_json(describe(b"y"), urls=None)], annotations={"n": "w"}),
        OCI_MANIFEST,
    )
    assert isinstance(document, Manifest)
    first, second = document.layers
    assert (first.urls, first.annotations) == (("https://a.example/x",), {"k": "v"})
    assert (second.urls, second.annotations, second.media_type) == ((), {}, OCI_LAYER)
    assert document.annotations == {"n": "w"}


def test_content_in_a_descriptor() -> None:
    """Embedded content is ignored unless its digest and size match."""
    good = as_json(describe(b"x"), data="eA==")
    for wrong in ("eQ==", "eHg=", ""):
        other = as_json(describe(b"x"), data=wrong)
        longer = as_json(describe(b"xx"), data="eA==") | {"size": 1}
        document = decode_manifest(manifest(layers=[good, other, longer]), OCI_MANIFEST)
        assert isinstance(document, Manifest)
        assert [layer.data for layer in document.layers] == [b"x", None, None]
    assert "data" not in repr(document.layers[0])


def test_parameters_of_media_types() -> None:
    """Media types are compared without parameters and case."""
    written = "Application/vnd.oci.image.Manifest.v1+json ; charset=utf-8"
    layer = as_json(describe(b"x")) | {"mediaType": OCI_LAYER.upper() + ";a=b"}
    settings = as_json(describe(b"{}", f"{OCI_CONFIG};charset=utf-8"))
    data = manifest(mediaType=written, layers=[layer], config=settings)
    for served in (OCI_MANIFEST, written):
        document = decode_manifest(data, served)
        assert isinstance(document, Manifest)
        check_image(document)
        assert document.media_type == OCI_MANIFEST
        assert document.layers[0].media_type == OCI_LAYER
        assert document.config.media_type == OCI_CONFIG
    entry = as_json(describe(data, written))
    index = decode_manifest(
        json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(), OCI_INDEX + "; a"
    )
    assert isinstance(index, Index)
    assert [each.media_type for each in index.images] == [OCI_MANIFEST]
    other = as_json(describe(b"x", "application/vnd.Other; version=2"))
    document = decode_manifest(manifest(layers=[other]), OCI_MANIFEST)
    assert isinstance(document, Manifest)
    assert document.layers[0].media_type == "application/vnd.Other; version=2"
    with pytest.raises(ManifestError, match="but its mediaType is"):
        decode_manifest(manifest(mediaType=OCI_INDEX + ";x"), OCI_MANIFEST)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[]", "manifest is list, not an object"),
        (b"\xff", "not JSON"),
        (b'{"schemaVersion": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b" " * (MAX_DOCUMENT_SIZE + 1), "larger than"),
        (manifest(schemaVersion=1), "schemaVersion is 1, not 2"),
        (manifest(layers=["x"]), r"layers\[0\] is 'x', not an object"),
        (manifest(layers=[{"digest": DIGEST, "size": 1}]), "mediaType is missing"),
        (manifest(layers=[as_json(describe(b"")) | {"size": True}]), "size is True"),
        (manifest(layers=[as_json(describe(b"")) | {"size": 2**63}]), "not a number of bytes"),
        (manifest(annotations=[]), "annotations is list, not an object"),
        (manifest(annotations={"a": 1}), "annotations is 1, not a string"),
        (manifest(fsLayers=[]), "ambiguous, since it has 'fsLayers' as well"),
    ],
)
def test_invalid_manifests(data: bytes, message: str) -> None:
    """The error names the wrong member and its value."""
    with pytest.raises(ManifestError, match=message):
        decode_manifest(data, OCI_MANIFEST)


def test_a_value_in_an_error_is_cut() -> None:
    """An error does not quote megabytes of input."""
    with pytest.raises(ManifestError) as caught:
        decode_manifest(manifest(mediaType="x" * 100_000), OCI_MANIFEST)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("media_type", "message"),
    [
        ("application/vnd.docker.distribution.manifest.v1+prettyjws", "schema 1.*push it again"),
        ("text/html", "'text/html' is neither"),
        ("", "'' is neither"),
    ],
)
def test_unsupported_media_types(media_type: str, message: str) -> None:
    """The media type from the registry decides the kind of a document."""
    with pytest.raises(ManifestError, match=message):
        decode_manifest(manifest(), media_type)


@pytest.mark.parametrize(
    ("layer_type", "message"),
    [
        ("application/vnd.in-toto+json", "attestation"),
        (f"{OCI_LAYER}+encrypted", "encrypted: decrypt the image first"),
        ("application/x-tar", "unsupported type, 'application/x-tar'"),
    ],
)
def test_layers_that_cannot_be_unpacked(layer_type: str, message: str) -> None:
    """Errors that need different help have different texts."""
    data = manifest(layers=[as_json(describe(b"", layer_type))])
    document = decode_manifest(data, OCI_MANIFEST)
    assert isinstance(document, Manifest)
    with pytest.raises(ManifestError, match=message):
        check_image(document)


def test_index_leaves_out_what_is_no_image() -> None:
    """Attestations, and manifests of unknown types, are not chosen."""
    image = as_json(describe(b"image", OCI_MANIFEST), platform={"os": "linux", "architecture": "s"})
    annotations = {"vnd.docker.reference.type": "attestation-manifest"}
    attestation = as_json(describe(b"said", OCI_MANIFEST), annotations=annotations)
    unknown = as_json(describe(b"wasm", "application/vnd.wasm.v9+json"))
    data = {"schemaVersion": 2, "manifests": [attestation, unknown, image]}
    index = decode_manifest(json.dumps(data).encode(), OCI_INDEX)
    assert isinstance(index, Index)
    assert len(index.manifests) == 3
    assert [each.platform for each in index.images] == [Platform("linux", "s")]


def test_config_members() -> None:
    """The values for running the image have attributes, and ``raw`` has everything."""
    data = config(
        variant="v8",
        created="2024-01-01T00:00:00.123456789Z",
        config={
            "Env": ["A=b"],
            "Entrypoint": ["/bin/sh"],
            "Cmd": None,
            "WorkingDir": "/w",
            "User": "1:2",
            "Labels": {"k": "v"},
            "ExposedPorts": {"80/tcp": {}},
            "Volumes": {"/data": {}},
            "StopSignal": "SIGINT",
        },
    )
    decoded = decode_config(data)
    assert decoded.platform == Platform("linux", "arm64", "v8")
    assert decoded.created == "2024-01-01T00:00:00.123456789Z"
    assert (decoded.env, decoded.entrypoint, decoded.cmd) == (("A=b",), ("/bin/sh",), ())
    assert (decoded.working_dir, decoded.user, decoded.stop_signal) == ("/w", "1:2", "SIGINT")
    assert (decoded.labels, decoded.exposed_ports) == ({"k": "v"}, ("80/tcp",))
    assert decoded.volumes == ("/data",)
    assert decoded.diff_ids == (DIGEST,)
    assert decoded.raw == data
    assert "raw" not in repr(decoded)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (config(rootfs={"type": "other", "diff_ids": []}), "rootfs.type is 'other'"),
        (config(rootfs={"type": "layers", "diff_ids": ["x"]}), "invalid digest 'x'"),
        (config(os=1), "image config.os is 1, not a string"),
        (config(rootfs={"type": "layers", "diff_ids": ""}), "diff_ids is '', not an array"),
        (config(rootfs={"type": "layers", "diff_ids": 0}), "diff_ids is 0, not an array"),
        (config(os="linux\x1b[2J"), "image config: the platform 'linux.x1b.* cannot be shown"),
        (config(variant="\u202e"), "cannot be shown"),
        (config(config={"Env": "A=b"}), "Env is 'A=b', not an array"),
        (config(config={"Cmd": [1]}), "Cmd is 1, not a string"),
    ],
)
def test_invalid_configs(data: bytes, message: str) -> None:
    """The error names the invalid member."""
    with pytest.raises(ManifestError, match=message):
        decode_config(data)


@pytest.mark.parametrize(
    ("members", "listed", "expected"),
    [
        ({"architecture": ""}, Platform("linux", "s390x"), Platform("linux", "s390x")),
        ({"os": None}, Platform("linux", "arm64"), Platform("linux", "arm64")),
        ({"os": "", "architecture": None}, Platform("a", "arm", "v6"), Platform("a", "arm", "v6")),
        (
            {"os": "windows", "architecture": ""},
            Platform("linux", "arm"),
            Platform("windows", "arm"),
        ),
        ({"architecture": "arm", "os": ""}, None, Platform("linux", "arm")),
        ({"architecture": ""}, None, host_platform()),
        ({"architecture": "", "os": ""}, Platform("linux", ""), host_platform()),
        ({"architecture": ""}, Platform("", ""), host_platform()),
    ],
)
def test_a_config_that_does_not_say_what_it_is_for(
    members: dict[str, object], listed: Platform | None, expected: Platform
) -> None:
    """The index's entry, or else the host, completes a config's platform."""
    assert decode_config(config(**members), listed).platform == expected


@pytest.mark.parametrize("rootfs", [{"type": "layers"}, {"type": "layers", "diff_ids": None}])
def test_a_config_without_diff_ids_has_no_layers(rootfs: dict[str, object]) -> None:
    """Docker omits an empty list, and Go writes nil as null."""
    assert decode_config(config(rootfs=rootfs)).diff_ids == ()


def test_layer_counts_differ() -> None:
    """The error has both numbers."""
    document = decode_manifest(manifest(), OCI_MANIFEST)
    assert isinstance(document, Manifest)
    with pytest.raises(ManifestError, match="0 layers, but the image config has 1 diff IDs"):
        check_layer_count(document, decode_config(config()))
