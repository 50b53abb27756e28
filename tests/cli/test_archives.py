"""The commands import and export, as processes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import trio
from archives.layouts import (
    NAME,
    docker_members,
    entry_of,
    oci_image,
    oci_members,
    small_image,
    tar_of,
)

from trio_layers import _cli

IMAGE = small_image()
TRIO_LAYERS = [sys.executable, "-P", "-m", "trio_layers"]


async def run(
    *arguments: str | Path, store: Path, **options: object
) -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(
        [*TRIO_LAYERS, *map(str, arguments)],
        env={**os.environ, "TRIO_LAYERS_STORE": str(store), "PYTHONWARNINGS": "error"},
        capture_stdout="stdout" not in options,
        capture_stderr=True,
        check=False,
        **{"stdin": subprocess.DEVNULL, **options},
    )


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


async def test_in_and_out(tmp_path: Path) -> None:
    """Results go to stdout, and progress to stderr."""
    store, other = tmp_path / "store", tmp_path / "other"
    archive = write(tmp_path / "archive", tar_of(docker_members(IMAGE, "demo:1", "demo:2")))
    done = await run("import", archive, store=store)
    lines = done.stdout.decode().splitlines()
    assert lines == [f"{NAME[:-1]}{n} linux/amd64 {IMAGE.digest}" for n in (1, 2)]
    assert done.stderr.decode().splitlines()[-1].endswith("Pull complete")
    target = tmp_path / "target"
    done = await run(
        "export", "demo:1", "demo:2", target, "--format", "docker-archive", store=store
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = await run("import", target, "--reference", "new:1", "--json", "-q", store=other)
    assert json.loads(done.stdout) == {
        "reference": "docker.io/library/new:1",
        "digest": IMAGE.digest,
        "platform": "linux/amd64",
        "config": IMAGE.config_descriptor.digest,
    }
    assert done.stderr == b""
    done = await run("cat", "new:1", "/etc/motd", "-q", store=other)
    assert done.stdout == b"hello"


async def test_by_stdout_and_stdin(tmp_path: Path) -> None:
    """The archive goes through a pipe, or through a file as stdout and stdin."""
    store, other = tmp_path / "store", tmp_path / "other"
    done = await run("import", "-", "-q", store=store, stdin=tar_of(oci_image(IMAGE)))
    assert done.stdout.decode() == f"{NAME} linux/amd64 {IMAGE.digest}\n"
    piped = await run("export", NAME, "-", store=store)
    assert piped.returncode == 0
    with (tmp_path / "file").open("wb") as file:
        await run("export", NAME, "-", store=store, stdout=file)
    assert (tmp_path / "file").read_bytes() == piped.stdout
    with tarfile.open(tmp_path / "file") as tar:
        assert "index.json" in tar.getnames()
    with (tmp_path / "file").open("rb") as file:
        again = await run("import", "-", "-q", store=other, stdin=file)
    assert again.stdout == done.stdout


def test_images_without_names(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Import unnamed images by digest or --all, and use their generated names."""
    other = small_image("other")
    members = oci_members([entry_of(IMAGE), entry_of(other)], IMAGE, other)
    archive = write(tmp_path / "archive", tar_of(members))
    name, first = (f"localhost/unnamed@{image.digest}" for image in (other, IMAGE))

    def run(command: str, *arguments: object, store: str = "store") -> tuple[int, list[str], str]:
        code = _cli.main([command, *map(str, arguments), "--store", str(tmp_path / store)])
        shown = capfd.readouterr()
        return code, shown.out.splitlines(), shown.err

    code, out, err = run("import", archive, "-q")
    assert (code, out) == (1, [])
    assert "without a name" in err
    assert IMAGE.digest in err
    assert run("import", archive, "-q", "--digest", other.digest[:19]) == (
        0,
        [f"{name} linux/amd64 {other.digest}"],
        "",
    )
    code, out, _ = run("import", archive, "-q", "--digest", other.digest, "--reference", "demo:1")
    assert out == [f"{NAME} linux/amd64 {other.digest}"]
    code, out, _ = run("import", archive, "-q", "--all")
    assert [line.split()[0] for line in out] == [first, name]
    assert {line.split()[0] for line in run("images")[1]} == {NAME, first, name}
    assert run("cat", name, "/etc/motd", "-q") == (0, ["other"], "")
    assert run("rootfs", name, tmp_path / "rootfs", "-q")[0] == 0
    assert (tmp_path / "rootfs/etc/motd").read_bytes() == b"other"
    assert run("export", other.digest, tmp_path / "target") == (0, [], "")
    code, out, _ = run("import", tmp_path / "target", "-q", store="third")
    assert {line.split()[0] for line in out} == {NAME, name}
    assert run("rm", first) == (0, [], "")
    code, out, err = run("import", archive, "--all", "--digest", other.digest)
    assert (code, out) == (1, [])
    assert "leave out --reference and --digest" in err


async def test_no_terminal(tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    try:
        done = await run("import", "-", store=tmp_path / "store", stdin=terminal)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr == (
            b"trio-layers: stdin is a terminal: redirect it from the file or pipe that has the "
            b"archive\n"
        )
        done = await run("export", "x", "-", store=tmp_path / "store", stdout=terminal)
        assert done.returncode == 1
        expected = (
            b"trio-layers: stdout is a terminal: redirect it to a file or a pipe, since a tar is "
            b"binary\n"
        )
        assert done.stderr == expected
    finally:
        os.close(controller)
        os.close(terminal)
    assert not (tmp_path / "store").exists()


def test_what_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A failure is one line and exit code 1; wrong usage is exit code 2."""
    store = ["--store", str(tmp_path / "store")]
    there, archive = tmp_path / "there", tmp_path / "archive"
    there.write_bytes(b"mine")
    archive.write_bytes(tar_of(oci_image(IMAGE)))
    assert _cli.main(["import", str(archive), "-q", *store]) == 0
    capfd.readouterr()
    for arguments, text in {
        ("import", tmp_path / "nowhere"): "nowhere: No such file or directory",
        ("import", there): "there is not an image archive, or is damaged",
        ("import", archive, "--platform", "linux/s390x"): "has no image for",
        ("import", archive, "--reference", "Demo"): "must be lower-case",
        ("export", "none:1", tmp_path / "target"): "none:1 is not in the store: pull",
        ("export", NAME, there): "file exists: remove it, or choose another name",
        (
            "export",
            NAME,
            "-",
            "--format",
            "oci",
        ): "--format oci writes a directory, not to stdout: use --format oci-archive",
    }.items():
        assert _cli.main([*map(str, arguments), *store]) == 1
        shown = capfd.readouterr()
        assert shown.out == ""
        [line] = shown.err.splitlines()
        assert line.startswith("trio-layers: ")
        assert text in line
    assert there.read_bytes() == b"mine"
    for wrong in (["import"], ["export", "x"], ["export", "x", "y", "--format", "zip"]):
        with pytest.raises(SystemExit) as exit:
            _cli.main(wrong)
        assert exit.value.code == 2
