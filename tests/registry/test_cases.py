"""The values and the client, compared with recorded behaviour.

The cases are in `tests/cases/registry`, and in the directory that ``TRIO_LAYERS_CASES`` names.
`FORMAT.md` beside the files describes them.

The cases in ``found_*.json`` come from a comparison of many generated inputs with the sources of
those implementations: inputs with another result here, and similar inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from _tools.logins import Home
from registry.fakes import Body, MemorySink, Network, Report, digest_of, is_final

from trio_layers._errors import (
    CredentialsError,
    HostsError,
    InvalidReference,
    LayersError,
    ManifestError,
    PlatformError,
    VerificationError,
)
from trio_layers._hosts_toml import Host, read_configuration
from trio_layers._logins import lookup
from trio_layers._logins.files import find_as_docker, parse_login_file
from trio_layers._logins.lookup import LoginFiles
from trio_layers._manifest import (
    Descriptor,
    Index,
    Manifest,
    check_image,
    check_layer_count,
    decode_config,
    decode_manifest,
)
from trio_layers._platform import Platform, choose, order, parse_platform
from trio_layers._reference import parse_reference
from trio_layers._registry.auth import parse_challenges
from trio_layers._registry.client import open_registry_client
from trio_layers._registry.credentials import Credentials

HERE = Path(__file__).parents[1] / "cases" / "registry"

Case = dict[str, Any]


def cases(table: str) -> list[object]:
    """Make one pytest item for each case of a table."""
    items: list[object] = []
    paths = [HERE / f"{table}.json", HERE / f"found_{table}.json"]
    more = os.environ.get("TRIO_LAYERS_CASES")
    if more:
        paths.append(Path(more) / "registry" / f"{table}.json")
    for number, path in enumerate(paths):
        if path.exists():
            for case in json.loads(path.read_text()):
                items.append(pytest.param(case, id=f"{number}-{case['name']}"))
    return items


@pytest.mark.parametrize("case", cases("references"))
def test_reference(case: Case) -> None:
    """A reference is accepted as by Docker, or refused for Docker's reason."""
    expected = case["expected"]
    if "error" in expected:
        with pytest.raises(InvalidReference) as caught:
            parse_reference(case["input"])
        assert caught.value.reason == expected["error"]
        return
    reference = parse_reference(case["input"])
    assert {
        "domain": reference.domain,
        "path": reference.path,
        "tag": reference.tag,
        "digest": reference.digest,
        "familiar": reference.familiar,
        "string": str(reference),
        "fetched_by": reference.fetched_by,
    } == {key: value for key, value in expected.items() if key != "docker_ref"}
    assert parse_reference(str(reference)) == reference


@pytest.mark.parametrize("case", cases("platforms"))
def test_platform(case: Case) -> None:
    """Specifiers and choices are equal to containerd's on linux/amd64."""
    expected = case["expected"]
    if case["kind"] == "match":
        requested = platform_of(case["requested"])
        assert requested is not None
        platforms = [platform_of(each) for each in case["platforms"]]
        assert order(requested, platforms) == expected["order"]
        assert choose(requested, platforms) == expected["chosen"]
    elif "error" in expected:
        with pytest.raises(PlatformError):
            parse_platform(case["specifier"])
    else:
        platform = parse_platform(case["specifier"])
        assert members_of(platform) == expected["parsed"]
        assert members_of(platform.normalized()) == expected["normalized"]
        assert str(platform) == expected["format_all"]
        assert parse_platform(str(platform)).normalized() == platform.normalized()


@pytest.fixture(autouse=True)
def amd64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables were recorded on this platform."""
    uname = os.uname_result(("Linux", "host", "6.1", "#1", "x86_64"))
    monkeypatch.setattr(os, "uname", lambda: uname)


def platform_of(entry: Case | None) -> Platform | None:
    if entry is None:
        return None
    return Platform(
        entry.get("os", ""),
        entry.get("architecture", ""),
        entry.get("variant", ""),
        entry.get("os.version", ""),
        tuple(entry.get("os.features", ())),
    )


def members_of(platform: Platform) -> Case:
    return {
        "os": platform.os,
        "architecture": platform.architecture,
        "variant": platform.variant,
        "os_version": platform.os_version,
        "os_features": list(platform.os_features),
    }


@pytest.mark.parametrize("case", cases("manifests"))
def test_manifest(case: Case) -> None:
    """A manifest with its config is accepted or refused as the specification says, or else as by
    containerd.
    """
    verdict = case["expected"].get("spec", {}).get("verdict")
    containerd = case["expected"]["containerd"]
    if verdict is None:
        verdict = "accept" if containerd["error"] is None else "reject"
    if verdict != "accept":
        with pytest.raises(ManifestError):
            read_image(case)
        return
    document = read_image(case)
    if containerd["kind"] == "index":
        assert isinstance(document, Index)
        assert [each.digest for each in document.manifests] == [
            each["digest"] for each in containerd["manifests"]
        ]
    else:
        assert isinstance(document, Manifest)
        assert [
            (each.media_type, each.digest, each.size, list(each.urls)) for each in document.layers
        ] == [
            (each["media_type"], each["digest"], each["size"], each["urls"])
            for each in containerd["layers"]
        ]
        assert document.config.digest == containerd["config_digest"]
        assert list(decode_config(case["config"].encode()).diff_ids) == containerd["diff_ids"]


def read_image(case: Case) -> Manifest | Index:
    document = decode_manifest(case["manifest"].encode(), case["content_type"])
    if isinstance(document, Manifest):
        check_image(document)
        config = (case["config"] or "").encode()
        algorithm, _, digits = document.config.digest.partition(":")
        if hashlib.new(algorithm, config).hexdigest() != digits:
            raise ManifestError("a registry would not have it")
        check_layer_count(document, decode_config(config))
    return document


@pytest.mark.parametrize("case", cases("challenges"))
def test_challenges(case: Case) -> None:
    """Challenges of registries' schemes are parsed by RFC 9110.

    Malformed ones are parsed as containerd does.
    """
    expected = case["expected"].get("rfc9110", case["expected"]["challenges"])
    got = [
        {"scheme": challenge.scheme, "parameters": dict(challenge.parameters)}
        for challenge in parse_challenges(case["headers"])
        if challenge.scheme in ("bearer", "digest", "basic")
    ]
    rank = {"bearer": 0, "digest": 1, "basic": 2}
    assert sorted(got, key=lambda each: rank[each["scheme"]]) == expected


@pytest.mark.parametrize("case", cases("docker_config"))
async def test_docker_config(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials are looked up, and helpers are called, as by docker's command line."""
    home = Home(tmp_path, monkeypatch)
    home.docker_config.write_text(case["config"])
    if case["env_docker_auth_config"]:
        monkeypatch.setenv("DOCKER_AUTH_CONFIG", case["env_docker_auth_config"])
    for name, answers in case["helpers"].items():
        home.add_helper(name, answers)
    expected = case["expected"].get("spec", case["expected"])
    asked = [(expected["helper"], expected["helper_server"])] if expected["helper"] else []

    logins = LoginFiles()
    if expected["error"] is not None:
        with pytest.raises(CredentialsError) as caught:
            await logins(f"{case['registry']}/team/app")
        if expected["error"] == "config":
            assert caught.value.source == str(home.docker_config)
        else:
            assert caught.value.source.startswith("docker-credential-")
        assert home.asked() == asked
        return
    got = await logins(f"{case['registry']}/team/app") or Credentials()
    assert {
        "username": as_go_prints(got.username),
        "password": as_go_prints(got.password),
        "identitytoken": got.identity_token,
        "registrytoken": got.registry_token,
    } == {name: expected[name] for name in ("username", "password", *TOKENS)}
    assert home.asked() == asked
    if not asked:
        login = find_as_docker(
            parse_login_file(case["config"].encode()), case["registry"], lookup._environment()
        )
        assert login.key == expected["matched_key"]


TOKENS = ("identitytoken", "registrytoken")


def as_go_prints(text: str) -> str:
    """Replace each byte that is not UTF-8 with a character, as Go prints it."""
    return re.sub("[\udc80-\udcff]", "\N{REPLACEMENT CHARACTER}", text)


@pytest.mark.parametrize("case", cases("http_ranges"))
async def test_http_range(case: Case) -> None:
    """A blob's download resumes as the specification recommends."""
    content = case["content"].encode()
    descriptor = Descriptor("application/octet-stream", digest_of(content), case["descriptor_size"])
    sink, server = MemorySink(case["have"].encode()), RangeServer(case)
    if case["expected"]["spec"]["action"] == "fail-verification":
        server.repeat = True  # wrong bytes are fetched once more before the error is final
    network = Network(**{"https://registry.example": server})
    reference = parse_reference("registry.example/team/app")
    attempts: list[LayersError | None] = []
    kept: list[int] = []
    async with (
        network.client() as http,
        open_registry_client(client=http) as client,
    ):
        while len(attempts) < 5:
            try:
                await client.fetch_blob(reference, descriptor, sink, progress=Report())
            except LayersError as error:
                attempts.append(error)
                kept.append(sink.offset)
                if is_final(error):
                    break
            else:
                attempts.append(None)
                break

    first, last = attempts[0], attempts[-1]
    ranges = [request.headers.get("Range") for request in network.requests]
    size, have = case["descriptor_size"], len(case["have"])
    # A single bad response is followed by good ones.
    alone = len(case["responses"]) == 1 and not case["repeat_last_response"]
    match case["expected"]["spec"]["action"]:
        case "write-then-verify" | "append-then-verify" | "verify-only":
            assert attempts == [None]
            assert len(ranges) == (len(case["responses"]) if have < size else 0)
        case "restart-from-zero":
            assert first is None or kept[0] == server.sent
            assert sink.restarts == 1 or not alone
            assert sink.restarts >= 1
            assert attempts == [None] or server.sent < size
            assert last is None or not alone
        case "append-then-continue":
            assert attempts == [None]
            assert sink.restarts == 0
            assert ranges[:2] == [range_from(have, size), range_from(have + server.sent, size)]
            assert len(ranges) == 2 or not alone
        case "discard-and-restart":
            assert last is None
            assert first is None or kept[0] == 0
            assert sink.restarts == 1 or not alone or have == 0
            assert sink.restarts >= 1 or have == 0
            assert first is None or not is_final(first)
            assert ranges[-1] is None
        case "keep-and-retry":
            assert first is not None
            assert not is_final(first)
            assert kept[0] == server.sent + (0 if server.whole else have)
            assert attempts[1:] == [None] or not alone
            if kept[0] < size:
                assert ranges[1] == range_from(kept[0], size)
        case "retry":
            assert first is not None
            assert not is_final(first)
            assert last is None or case["repeat_last_response"]
            assert len(attempts) == 2 or len(case["responses"]) > 2 or case["repeat_last_response"]
        case "fail-verification":
            assert isinstance(first, VerificationError)
            assert is_final(first)
            words = f"filesystem layer verification failed for digest {descriptor.digest}: "
            assert str(first).startswith(f"{words}registry.example sent other bytes")
        case "fail-final":
            assert first is not None
            assert is_final(first)
        case action:
            pytest.fail(f"unknown action {action}")
    if last is None:
        assert sink.data == content
    else:
        assert is_final(last) or case["repeat_last_response"]


def range_from(offset: int, size: int) -> str | None:
    return f"bytes={offset}-{size - 1}" if offset else None


class RangeServer:
    """Sends a case's responses, and then those of a correct server.

    Attributes:
        sent: Number of the blob's bytes in the first response.
        whole: Whether these started at the blob's beginning.
    """

    def __init__(self, case: Case) -> None:
        self.content = case["content"].encode()
        self.responses = list(case["responses"])
        self.repeat = case["repeat_last_response"]
        self.sent = 0
        self.whole = False
        self.asked = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        if not self.responses:
            return self.right(request)
        repeated = self.repeat and len(self.responses) == 1
        response = self.responses[0] if repeated else self.responses.pop(0)
        headers = httpx.Headers(response["headers"])
        body = response["body"].encode()
        # An HTTP client reads the announced number of bytes, and notices if fewer come.
        announced = int(headers.get("Content-Length", len(body)))
        error = httpx.RemoteProtocolError("closed early") if len(body) < announced else None
        body = body[:announced]
        if self.asked == 1 and response["status"] < 300:
            self.sent, self.whole = len(body), response["status"] == 200
        chunks = [body[start : start + 16] for start in range(0, len(body), 16)]
        return httpx.Response(response["status"], headers=headers, stream=Body(chunks, error))

    def right(self, request: httpx.Request) -> httpx.Response:
        asked = request.headers.get("Range")
        size = len(self.content)
        if asked is None:
            return httpx.Response(200, stream=Body([self.content]))
        start = int(asked.removeprefix("bytes=").partition("-")[0])
        if start >= size:
            return httpx.Response(416, headers={"Content-Range": f"bytes */{size}"})
        headers = {"Content-Range": f"bytes {start}-{size - 1}/{size}"}
        return httpx.Response(206, headers=headers, stream=Body([self.content[start:]]))


@pytest.mark.parametrize("case", cases("hosts_toml"))
def test_hosts(case: Case, tmp_path: Path) -> None:
    """The hosts, their order and their settings are those of containerd.

    A file that containerd rejects and ignores is an error here, which names the file.
    """
    for name, text in case["files"].items():
        path = tmp_path / name
        if text is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    expected = case["expected"]
    if expected["file_error"] is not None:
        with pytest.raises(HostsError) as caught:
            read_configuration(tmp_path, case["host"])
        assert caught.value.path == str(tmp_path / expected["directory"] / "hosts.toml")
        assert str(caught.value).startswith(f"{caught.value.path} cannot be used: ")
        return
    configuration = read_configuration(tmp_path, case["host"])
    directory = configuration.directory
    assert (directory and directory.name) == expected["directory"]
    assert [as_recorded(host, tmp_path) for host in configuration.hosts] == expected["hosts"]


def as_recorded(host: Host, root: Path) -> Case:
    recorded: Case = {
        "scheme": host.scheme,
        "host": host.host,
        "path": host.path,
        "capabilities": sorted(host.capabilities),
        "ca": [path.replace(str(root), "$ROOT") for path in host.ca or ()],
        "client": [
            [path.replace(str(root), "$ROOT") for path in pair] for pair in host.client or ()
        ],
        "skip_verify": host.skip_verify,
        "header": {name: list(values) for name, values in host.header.items()},
        "dial_timeout_seconds": host.dial_timeout,
        "http_fallback": host.http_fallback,
    }
    if not host.http_fallback:
        recorded["tls_verification_disabled"] = not host.verify
    return recorded
