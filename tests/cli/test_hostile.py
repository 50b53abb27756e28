"""The command line with a registry that puts control characters into every text."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from trio_layers import _cli
from trio_layers._commands import asking, logs, messages, storing
from trio_layers._registry import failures, response, tokens, transport
from trio_layers.testing import (
    Fault,
    File,
    Raw,
    Registry,
    build_image,
    open_registry,
)

# A window title, clear screen, C1's CSI, right-to-left text, an isolate, line ends, NUL, delete, a
# combining mark and a line separator.
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\u2066\r\n\0\x7f\u200f\u2028end"
# Characters that a header field may contain, and characters that it must not contain.
C1, BIDI, ESC = b"\x9b2J\x85", "\u202egnp\u2069".encode(), b"\x1b[2J\x07"
OCI = "application/vnd.oci.image"
NOWHERE = b"127.0.0.1:1"


# A pull requests the config first, so its blob comes before the layer's.
LAYER = ("layer", "blobs", 1)


def head(status: bytes, *fields: bytes, body: bytes = b"") -> Raw:
    length = b"Content-Length: %d" % len(body)
    return Raw(b"\r\n".join((b"HTTP/1.1 " + status, *fields, length, b"", body)))


ERROR = json.dumps({"errors": [{"code": EVIL, "message": EVIL, "detail": EVIL}]}).encode()
ODD_ERROR = b'{"errors": [{"code": "\\ud800\\u009b", "message": "\\udfff\\u001b[2J"}]}'
ANSWERS: dict[str, Fault] = {
    "error": head(b"404 Not Found", body=ERROR),
    "surrogates": head(b"403 Forbidden", body=ODD_ERROR),
    "status": head(b"500 " + C1 + BIDI, body=ERROR),
    "status-line": head(b"404 " + ESC),
    "status-code": head(ESC),
    "field": head(b"200 OK", b"Content-Type: " + ESC),
    "field-name": head(b"200 OK", ESC + b": x"),
    "garbage": Raw(EVIL.encode()),
    "type": head(b"200 OK", b"Content-Type: " + C1 + BIDI, body=b"{}"),
    "digest": head(b"200 OK", b"Docker-Content-Digest: sha256:" + C1 + BIDI, body=b"{}"),
    "patience": head(
        b"429 Slow",
        b"Retry-After: " + C1,
        b"RateLimit-Limit: 100;w=1",
        b"RateLimit-Remaining: 0",
        b"Docker-RateLimit-Source: " + C1 + BIDI,
        body=ERROR,
    ),
    "basic": head(b"401 No", b'WWW-Authenticate: Basic realm="' + C1 + BIDI + b'"', body=ERROR),
    "realm": head(b"401 No", b'WWW-Authenticate: Bearer realm="http://' + C1 + BIDI + b'"'),
    "realm-escape": head(b"401 No", b'WWW-Authenticate: Bearer realm="%1b\\\x9b\\' + BIDI + b'"'),
    "realm-nowhere": head(
        b"401 No",
        b'WWW-Authenticate: Bearer realm="https://' + NOWHERE + b"/" + BIDI + b'",scope="\x9b"',
    ),
    **{
        f"location-{number}": head(b"307 There", b"Location: " + location)
        for number, location in enumerate(
            (
                b"http://" + BIDI + b".example/",
                b"https://" + C1 + b".example/",
                b"https://" + NOWHERE + b"/%1b%5b2J%c2%9b",
                b"https://user:" + C1 + b"@" + NOWHERE,
                C1 + b"://x",
                b"ftp://%1b%9b/",
                b"https://" + ESC,
                b"https://x:" + BIDI,
                b"https://xn--" + C1,
                b"//" + BIDI + b"/",
            )
        )
    },
}


def documents() -> Iterator[tuple[str, dict[str, object], dict[str, object]]]:
    """Return manifests and configs that have one odd place each."""
    digest = f"sha256:{'0' * 64}"
    descriptor = {"mediaType": f"{OCI}.config.v1+json", "digest": digest, "size": 2}
    layer = {"mediaType": f"{OCI}.layer.v1.tar", "digest": digest, "size": 2}
    fine: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": f"{OCI}.manifest.v1+json",
        "config": descriptor,
        "layers": [layer],
    }
    for changed in (
        {"schemaVersion": EVIL},
        {"mediaType": EVIL},
        {"artifactType": EVIL, "config": {**descriptor, "mediaType": EVIL}},
        {"config": {**descriptor, "mediaType": EVIL}},
        {"config": {**descriptor, "digest": EVIL}},
        {"config": {**descriptor, "size": EVIL}},
        {"config": EVIL},
        {"layers": EVIL},
        {"layers": [{**layer, "mediaType": EVIL}]},
        {"layers": [{**layer, "mediaType": EVIL + "+encrypted"}]},
        {"layers": [{**layer, "digest": f"sha256:{EVIL}"}]},
        {"annotations": {EVIL: 1}},
        {"annotations": EVIL},
    ):
        yield "manifest", {**fine, **changed}, {}
    platforms: list[object] = [
        {"os": EVIL, "architecture": "amd64"},
        {"os": "linux", "architecture": EVIL},
        {"os": "windows", "architecture": "amd64", "os.version": EVIL},
        {"os": "\u202exunil", "architecture": "amd64"},
        EVIL,
    ]
    for platform in platforms:
        entry = {**descriptor, "mediaType": f"{OCI}.manifest.v1+json", "platform": platform}
        yield "index", {"schemaVersion": 2, "manifests": [entry]}, {}
    config: dict[str, object] = {
        "os": "linux",
        "architecture": "amd64",
        "rootfs": {"type": "layers", "diff_ids": [digest]},
    }
    changes: list[dict[str, object]] = [
        {"os": EVIL},
        {"architecture": EVIL},
        {"variant": EVIL},
        {"created": {EVIL: EVIL}},
        {"rootfs": {"type": EVIL}},
        {"rootfs": {"type": "layers", "diff_ids": [EVIL]}},
        {"config": {"Labels": {EVIL: 1}}},
        {"config": {"Env": [EVIL, 1]}},
        {"config": EVIL},
    ]
    for change in changes:
        yield "manifest", fine, {**config, **change}


def tars() -> Iterator[bytes]:
    """Return layers that cannot be unpacked, by the reason."""
    for kind, name, target in (
        (tarfile.REGTYPE, f"../{EVIL}", ""),
        (tarfile.REGTYPE, f"a/.wh.{EVIL}/b", ""),
        (tarfile.LNKTYPE, f"a{EVIL}", f"../{EVIL}"),
        (tarfile.LNKTYPE, f"a{EVIL}", f"not/{EVIL}"),
        (b"Z", f"a{EVIL}", ""),
    ):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
            member = tarfile.TarInfo(name.replace("\0", ""))
            member.type, member.linkname = kind, target.replace("\0", "")
            tar.addfile(member)
        yield out.getvalue()
    yield b"\x1b[2J" * 512


def fill(registry: Registry, other: Registry) -> tuple[list[str], list[str]]:
    """Return the references of images that can be pulled, and of images that cannot.

    They are in two registries: a registry that cuts connections also cuts those that the next
    request is sent on.
    """
    fine, broken = [], []

    def named(name: str) -> str:
        broken.append(f"{registry.host}/{name}:1")
        return name

    for name, fault in ANSWERS.items():
        for place, kind, skip in (("manifest", "manifests", 0), ("config", "blobs", 0), LAYER):
            # Each image has layers of its own, since images share the download of a common layer.
            image = build_image([[File("file", data=f"{place} {name}".encode())]])
            broken.append(registry.add(image, f"{place}/{name}:1"))
            registry.inject(f"/v2/{place}/{name}/{kind}/*", fault, skip=skip, times=None)
    registry.inject("/token", head(b"400 Bad", body=ERROR), times=None)
    field = f'WWW-Authenticate: Bearer realm="{registry.url}/token",service="s"'.encode()
    broken.append(registry.add(build_image([[File("file")]]), "token:1"))
    registry.inject("/v2/token/*", head(b"401 No", field), times=None)
    for number, (kind, manifest, config) in enumerate(documents()):
        name = named(f"document-{number}")
        if config:
            data = json.dumps(config).encode()
            digest = registry.add_blob(name, data)
            descriptor = {"mediaType": f"{OCI}.config.v1+json", "digest": digest, "size": len(data)}
            manifest = {**manifest, "config": descriptor}
        registry.add_manifest(
            name, json.dumps(manifest).encode(), media_type=f"{OCI}.{kind}.v1+json", tag="1"
        )
    for number, tar in enumerate(tars()):
        image = build_image([tar], compression="none")
        broken.append(registry.add(image, f"tar-{number}:1"))
    words = {"env": {EVIL: EVIL}, "labels": {EVIL: EVIL}, "annotations": {EVIL: EVIL}}
    image = build_image(
        [[File(f"a{EVIL}".replace("\0", ""))]],
        **words,
        entrypoint=[EVIL],
        cmd=[EVIL],
        user=EVIL,
        working_dir=EVIL,
    )
    fine.append(other.add(image, "fine:1"))
    return fine, broken


@pytest.fixture(scope="module")
def hostile() -> Iterator[tuple[list[str], list[str]]]:
    """References to a registry in another thread, since the command runs in the main thread."""
    ready = threading.Event()
    found: list[tuple[list[str], list[str]]] = []
    stop: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []

    async def serve() -> None:
        with trio.CancelScope() as scope:
            async with open_registry() as registry, open_registry() as other:
                found.append(fill(registry, other))
                stop.append((trio.lowlevel.current_trio_token(), scope))
                ready.set()
                await trio.sleep_forever()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert ready.wait(60)
    yield found[0]
    [(token, scope)] = stop
    token.run_sync_soon(scope.cancel)
    thread.join()


def unfit(output: bytes) -> set[str]:
    """Return the characters that do not belong into a line of text."""
    return {c for c in output.decode() if c != "\n" and not c.isprintable()}


def arguments(store: Path, references: tuple[list[str], list[str]]) -> list[str]:
    fine, broken = references
    return ["--store", str(store), "--max-download-attempts", "1", *fine, *broken]


def check(out: bytes, err: bytes, references: tuple[list[str], list[str]]) -> None:
    """Check that the output is lines of text, one for each image and one for each failure."""
    fine, broken = references
    assert unfit(out) == set()
    assert unfit(err) == set()
    assert len(out.splitlines()) == len(fine)
    complaints = [line for line in err.decode().split("\n") if line.startswith("trio-layers: ")]
    assert {line.split(": ")[1] for line in complaints} == set(broken)
    assert len(complaints) == len(broken)


@pytest.mark.parametrize("options", [["-v"], ["--progress", "json", "--json"]])
def test_a_hostile_registry(
    options: list[str], hostile: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    """No text controls the terminal, and every image has its line."""
    command = [sys.executable, "-P", "-m", "trio_layers"]
    done = subprocess.run(
        [*command, "pull", *options, *arguments(tmp_path, hostile)],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 1
    check(done.stdout, done.stderr, hostile)


def test_what_is_stored_of_it(
    hostile: tuple[list[str], list[str]], tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Later commands print nothing harmful about the image either."""
    fine, _ = hostile
    store = ["--store", str(tmp_path)]
    assert _cli.main(["pull", "-v", *store, *fine]) == 0
    [file] = (tmp_path / "trees").rglob("*gnp.exe*")
    file.write_bytes(b"damaged")
    assert _cli.main(["check", *store]) == 1
    assert _cli.main(["images", "--size", *store]) == 0
    assert _cli.main(["rootfs", *store, *fine, str(tmp_path / "root")]) == 0
    assert _cli.main(["cat", *store, *fine, f"/{EVIL[:5]}"]) == 1
    out, err = capfdbinary.readouterr()
    assert b"gnp.exe" in out
    assert unfit(out + err) == set()


def test_errors_are_fit_to_be_shown(
    hostile: tuple[list[str], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Programs that print an error, or log it, need not escape its text."""
    for module in (asking, logs, messages, storing):
        monkeypatch.setattr(module, "printable", str)
    caplog.set_level(logging.INFO, "httpx")
    assert _cli.main(["pull", "-v", *arguments(tmp_path, hostile)]) == 1
    check(*capfdbinary.readouterr(), hostile)
    assert any(record.name == "httpx" for record in caplog.records)
    assert [text for text in caplog.messages if not text.isprintable()] == []


def test_that_this_is_seen(
    hostile: tuple[list[str], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    """Without the two functions that replace characters, all of these texts would reach the
    terminal.
    """
    for module in (asking, logs, messages, storing):
        monkeypatch.setattr(module, "printable", str)
    for module in (tokens, transport, response, failures):
        monkeypatch.setattr(module, "printable_line", str)
    _cli.main(["pull", "-v", *arguments(tmp_path, hostile)])
    out, err = capfdbinary.readouterr()
    assert unfit(out + err.replace(b"\xed", b"")) >= {"\x1b", "\x9b", "\u202e"}
