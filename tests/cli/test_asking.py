"""The commands that only ask registries, and use no store: digest, tags, referrers."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from cli.test_pull import run

from trio_layers._cli import main
from trio_layers.testing import BasicAuth, Registry, build_artifact, build_image, open_registry

IMAGE = build_image([[]])
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


def fill(registry: Registry) -> tuple[str, str]:
    """Put an image and its referrers into the registry. One type has control characters."""
    reference = registry.add(IMAGE, "team/app:1")
    registry.add(IMAGE, "team/app:2")
    sbom = build_artifact(b"{}", f"sbom{HOSTILE}", subject=IMAGE.descriptor)
    registry.add(sbom, "team/app")
    return reference, sbom.digest


async def test_what_a_registry_has(tmp_path: Path) -> None:
    async with open_registry(auth=BasicAuth("user", "password")) as registry:
        reference, referrer = fill(registry)
        login = ("--creds", "user:password", reference)
        done = await run("digest", *login, store=tmp_path)
        assert (done.stdout.decode(), done.stderr, done.returncode) == (f"{IMAGE.digest}\n", b"", 0)
        done = await run("tags", *login, store=tmp_path)
        assert (done.stdout, done.stderr, done.returncode) == (b"1\n2\n", b"", 0)
        done = await run("referrers", *login, store=tmp_path)
        [line] = done.stdout.decode().splitlines()
        assert line.startswith(f"{referrer} sbom")
        assert line.isprintable()
        done = await run("referrers", "--artifact-type", "other", *login, store=tmp_path)
        assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 0)
    assert not list(await trio.Path(tmp_path).iterdir())  # the commands make no store


@pytest.mark.parametrize("command", ["digest", "tags", "referrers"])
async def test_a_refusal_is_one_line(command: str, tmp_path: Path) -> None:
    async with open_registry(auth=BasicAuth("user", "password")) as registry:
        reference, _ = fill(registry)
        done = await run(command, "--creds", "user:canary", reference, store=tmp_path)
    [line] = done.stderr.decode().splitlines()
    assert line.startswith(f"trio-layers: {registry.host} answered 401 for ")
    assert "canary" not in line
    assert (done.stdout, done.returncode) == (b"", 1)


@pytest.mark.parametrize("command", ["digest", "tags", "referrers"])
def test_there_is_no_store_to_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([command, "--store", "directory", "debian"])
    assert "unrecognized arguments: --store" in capsys.readouterr().err
