"""The commands images and rm, which run without trio."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import attrs
import pytest
from cli.test_stuck import SIGNALS, command
from store.stores import layer_of, opened, put_sample_image
from store.test_opening import VERSION_1, edit_catalog, rows_of
from store.test_waiting import held_by_another_process

from trio_layers import _cli
from trio_layers._store import names

ONE, TWO = "docker.io/library/one:1", "docker.io/library/two:1"


@pytest.fixture
async def store(tmp_path: Path) -> Path:
    """The path of a store with one image under two names."""
    async with opened(tmp_path / "store") as store:
        for name in (TWO, ONE):
            await put_sample_image(store, name, layer_of(a="a"))
    return tmp_path / "store"


def run(*arguments: object, store: Path) -> int:
    return _cli.main([str(arguments[0]), "--store", str(store), *map(str, arguments[1:])])


def listed(path: Path) -> list[str]:
    """Return the names that other tools find in the layout."""
    index = json.loads((path / "index.json").read_bytes())
    return [each["annotations"]["org.opencontainers.image.ref.name"] for each in index["manifests"]]


async def test_images(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect(store / "catalog.sqlite")) as connection:
        connection.execute("UPDATE image_references SET platform = '' WHERE reference = ?", (TWO,))
        connection.commit()
    assert run("images", store=store) == 0
    first, second = capsys.readouterr().out.splitlines()
    digest = first.rpartition(" ")[2]
    assert (first, second) == (f"{ONE} linux/amd64 {digest}", f"{TWO} - {digest}")
    async with opened(store) as there:
        sizes = (await there.usage()).images[digest]
    assert run("images", "--size", store=store) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{first} {sizes.size} {sizes.exclusive}"


async def test_images_of_an_open_store(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another process writes the catalog, and the list shows the last durable state."""
    async with held_by_another_process(store):
        assert run("images", store=store) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


async def test_rm_updates_the_layout(store: Path) -> None:
    assert run("rm", "one:1", store=store) == 0
    assert listed(store) == [TWO]
    assert run("rm", "two:1", "--platform", "linux/arm64", store=store) == 1
    async with opened(store) as there:
        [image] = await there.images()
        assert image.reference == TWO
    assert run("rm", image.manifest.digest, store=store) == 0
    assert listed(store) == []
    assert (os.listdir(store / "ingest"), os.listdir(store / "leases")) == ([], [])


async def test_rm_says_what_is_wrong(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong name does not keep the others from being removed."""
    assert run("rm", "UPPER", "sha256:1", "none:1", "one:1", store=store) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["UPPER", "sha256:1", "none:1"]
    assert listed(store) == [TWO]


async def test_rm_waits_for_another_process(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(names, "_PATIENCE", 0.1)
    async with held_by_another_process(store):
        assert run("rm", "one:1", store=store) == 1
    assert "was held by another process for too long" in capsys.readouterr().err
    assert len(listed(store)) == 2


async def test_a_newer_store_is_left_alone(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect(store / "catalog.sqlite")) as connection:
        connection.execute("PRAGMA user_version = 99")
    for name in ("images", "rm"):
        assert run(name, *["one:1"][: name == "rm"], store=store) == 1
        assert "has version 99" in capsys.readouterr().err


@pytest.mark.parametrize("line", [["images"], ["images", "--size"], ["rm", "one:1"]])
async def test_an_older_store_is_migrated(line: list[str], store: Path) -> None:
    edit_catalog(store, *VERSION_1.split(";"))
    assert run(*line, store=store) == 0
    assert rows_of(store, "PRAGMA user_version") == [(2,)]


async def test_verbose_changes_nothing_else(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("images", "-v", store=store) == 0
    assert capsys.readouterr().err == ""


@SIGNALS
async def test_a_reader_that_stops(number: signal.Signals, tmp_path: Path) -> None:
    """The list is larger than a pipe's buffer, so the command blocks until a signal."""
    async with opened(tmp_path) as there:
        await put_sample_image(there, ONE, layer_of(a="a"))
        [image] = await there.images()
        names = [f"example.com/{'x' * 100}-{each}:1" for each in range(700)]
        await there.put_images([attrs.evolve(image, reference=name) for name in names])
    async with command("images", "--store", str(tmp_path)) as process:
        assert await process.stdout.receive_some(1)
        process.send_signal(number)
        assert await process.wait() == 128 + number


async def test_a_reader_that_leaves(store: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        async with command("images", "--store", str(store), stdout=writer) as process:
            assert await process.wait() == 1
    finally:
        os.close(writer)
