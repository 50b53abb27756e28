"""Root file systems on the command line, as a process, against the embedded registry."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from pull.mounting import unmount_below

from trio_layers import ExportReport, _cli, open_puller
from trio_layers._commands import pulling
from trio_layers.testing import (
    BuiltImage,
    Directory,
    File,
    Stall,
    Symlink,
    build_image,
    open_registry,
    sample_image,
)

SAMPLE = sample_image()
LARGE = bytes(range(256)) * 40_000

TRIO_LAYERS = [sys.executable, "-P", "-m", "trio_layers"]


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    yield
    assert not unmount_below(tmp_path)


def environment(store: Path) -> dict[str, str]:
    return {**os.environ, "TRIO_LAYERS_STORE": str(store), "PYTHONWARNINGS": "error"}


async def run(
    *arguments: str | bytes | Path, store: Path, **options: object
) -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(
        [*TRIO_LAYERS, *arguments],
        env=environment(store),
        capture_stdout="stdout" not in options,
        capture_stderr=True,
        check=False,
        **{"stdin": subprocess.DEVNULL, **options},
    )


@asynccontextmanager
async def pulled(store: Path, image: BuiltImage = SAMPLE) -> AsyncIterator[str]:
    """The reference of a stored image whose registry no longer runs."""
    async with open_registry() as registry:
        reference = registry.add(image, "demo:1")
        async with open_puller(store) as puller, puller.pull(reference):
            pass
    yield reference


async def test_what_is_not_there_is_pulled_once(tmp_path: Path) -> None:
    """The first ``cat`` pulls the image with progress, and prints only the file to stdout. The
    second one asks no registry.
    """
    async with open_registry() as registry:
        reference = registry.add(SAMPLE, "demo:1")
        done = await run("cat", reference, "/etc/os-release", store=tmp_path)
        assert done.stderr.decode().splitlines()[-1].endswith(": Pull complete")
        assert done.returncode == 0
        release = done.stdout
        asked = len(registry.requests)
        assert asked
        done = await run("cat", reference, "usr/lib/os-release", store=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, release, b"")
        assert len(registry.requests) == asked
    done = await run("cat", reference, "/etc/os-release", store=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, release, b"")
    other = await run("cat", "--platform", "linux/riscv64", reference, "x", store=tmp_path)
    assert other.returncode == 1
    assert other.stdout == b""


async def test_cat_gives_bytes(tmp_path: Path) -> None:
    """Contents and names are any bytes, and links are followed only inside the image."""
    entries = [File("large", data=LARGE), Symlink("out", "../../../large"), File("\udcff\n")]
    async with pulled(tmp_path / "store", build_image([entries])) as reference:
        for name in ("large", "/out"):
            done = await run("cat", reference, name, store=tmp_path / "store")
            assert (done.returncode, done.stderr) == (0, b"")
            assert done.stdout == LARGE
        done = await run("cat", reference, b"\xff\n", store=tmp_path / "store")
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/no\x1bsuch", b"trio-layers: /no\xef\xbf\xbdsuch: No such file or directory\n"),
        ("/etc", b"trio-layers: /etc: Is a directory\n"),
        ("/etc/os-release/x", b"trio-layers: /etc/os-release/x: Not a directory\n"),
    ],
)
async def test_cat_of_what_is_no_file(path: str, said: bytes, tmp_path: Path) -> None:
    async with pulled(tmp_path) as reference:
        done = await run("cat", reference, path, store=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (1, b"", said)


async def test_rootfs_into_a_directory(tmp_path: Path) -> None:
    """The second call fails, since the directory is not empty."""
    store, target = tmp_path / "store", tmp_path / "root"
    async with pulled(store) as reference:
        done = await run("rootfs", reference, target, store=store)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        release = (target / "usr/lib/os-release").read_bytes()
        assert release
        assert os.readlink(target / "etc/os-release") == "../usr/lib/os-release"
        done = await run("rootfs", reference, target, store=store)
        assert done.returncode == 1
        [line] = done.stderr.decode().splitlines()
        assert line.startswith(f"trio-layers: cannot export to {target}: directory is not empty")
        assert (target / "usr/lib/os-release").read_bytes() == release


@pytest.mark.parametrize("told", [False, True])
async def test_rootfs_changes_the_directory_only_if_told(told: bool, tmp_path: Path) -> None:
    target = tmp_path / "private"
    target.mkdir(0o700)
    image = build_image([[Directory("./", mode=0o777, uid=3, gid=4), File("f")]])
    async with pulled(tmp_path / "store", image) as reference:
        flags = ["--root-metadata"] if told else []
        done = await run("rootfs", *flags, reference, target, store=tmp_path / "store")
    assert (done.returncode, done.stderr) == (0, b"")
    assert (target.stat().st_mode & 0o7777) == (0o777 if told else 0o700)
    assert target.stat().st_uid == (3 if told and os.geteuid() == 0 else os.geteuid())


async def test_rootfs_to_stdout(tmp_path: Path) -> None:
    """A pipe and a file get the same tar."""
    async with pulled(tmp_path / "store") as reference:
        done = await run("rootfs", reference, "-", store=tmp_path / "store")
        assert (done.returncode, done.stderr) == (0, b"")
        async with await trio.open_file(tmp_path / "file", "wb") as file:
            descriptor = file.fileno()
            again = await run("rootfs", reference, "-", store=tmp_path / "store", stdout=descriptor)
        assert (again.returncode, again.stderr) == (0, b"")
    assert (tmp_path / "file").read_bytes() == done.stdout
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as reader:
        names = reader.getnames()
        assert reader.extractfile("usr/lib/os-release").read()
    assert names == sorted(names, key=lambda name: b"" if name == "." else os.fsencode(name))


async def test_no_tar_to_a_terminal(tmp_path: Path) -> None:
    """The bytes of a tar could control the terminal."""
    main, terminal = pty.openpty()
    try:
        done = await run("rootfs", "demo", "-", store=tmp_path, stdout=terminal)
    finally:
        os.close(main)
        os.close(terminal)
    assert done.returncode == 1
    assert b"terminal" in done.stderr


@pytest.mark.parametrize("command", [("rootfs", "-"), ("cat", "large")])
async def test_a_reader_that_leaves(command: tuple[str, str], tmp_path: Path) -> None:
    image = build_image([[File("large", data=LARGE)]])
    async with pulled(tmp_path, image) as reference:
        process = await trio.lowlevel.open_process(
            [*TRIO_LAYERS, command[0], reference, command[1]],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        await process.stdout.receive_some(10)
        await process.stdout.aclose()
        assert await process.wait() == 1
        assert await process.stderr.receive_some() == b""
        await process.stderr.aclose()


async def test_stdout_that_is_closed(tmp_path: Path) -> None:
    """A file that gets the number of the closed stdout stays unchanged."""
    async with pulled(tmp_path) as reference:
        done = await run(
            "cat",
            reference,
            "/etc/os-release",
            store=tmp_path,
            stdout=None,
            preexec_fn=close_stdout,
        )
        assert (done.returncode, done.stderr) == (1, b"trio-layers: stdout: the stream is closed\n")


def close_stdout() -> None:
    os.close(1)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
@pytest.mark.parametrize("command", [("rootfs", "-"), ("cat", "large")])
async def test_interrupted_while_nobody_reads(
    command: tuple[str, str], number: signal.Signals, code: int, tmp_path: Path
) -> None:
    """A full pipe does not delay the end of the command."""
    image = build_image([[File("large", data=LARGE)]])
    async with pulled(tmp_path, image) as reference, trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [*TRIO_LAYERS, command[0], reference, command[1]],
                env=environment(tmp_path),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                check=False,
            )
        )
        assert process.stdout is not None
        assert process.stderr is not None
        await process.stdout.receive_some(10)
        process.send_signal(number)
        assert await process.wait() == code
        assert await process.stderr.receive_some() == b""
        await process.stdout.aclose()
        await process.stderr.aclose()


async def test_interrupted_in_the_pull(tmp_path: Path) -> None:
    """An interrupted pull creates no directory."""
    [*_, largest] = sorted(SAMPLE.layers, key=lambda layer: layer.descriptor.size)
    async with open_registry() as registry, trio.open_nursery() as nursery:
        reference = registry.add(SAMPLE, "demo:1")
        registry.inject(f"/v2/*/blobs/{largest.descriptor.digest}", Stall(after=1))
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [*TRIO_LAYERS, "rootfs", "--progress", "json", reference, tmp_path / "out"],
                env=environment(tmp_path / "store"),
                stderr=subprocess.PIPE,
                check=False,
            )
        )
        assert process.stderr is not None
        output, sent = b"", False
        async with process.stderr:
            async for chunk in process.stderr:
                output += chunk
                if not sent and b'"Downloading"' in output:
                    process.send_signal(signal.SIGINT)
                    sent = True
        assert await process.wait() == 130
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("own", [True, False], ids=["own", "given"])
async def test_mount(own: bool, number: signal.Signals, tmp_path: Path) -> None:
    """The mount lasts until a signal, and the command unmounts it."""
    store, target = tmp_path / "store", tmp_path / "target"
    target.mkdir()
    arguments = () if own else (str(target),)
    async with pulled(store) as reference, trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [*TRIO_LAYERS, "mount", reference, *arguments],
                env=environment(store),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                check=False,
            )
        )
        assert process.stdout is not None
        assert process.stderr is not None
        async with process.stdout, process.stderr:
            said = b""
            while not said.endswith(b"\n"):
                said += await process.stdout.receive_some()
            path = Path(said.decode().removesuffix("\n"))
            assert own or path == target
            assert (path / "etc/os-release").read_bytes()
            assert is_mount(path)
            with pytest.raises(OSError, match="Read-only"):
                (path / "new").write_bytes(b"")
            process.send_signal(number)
            assert await process.wait() == 0
            assert await process.stderr.receive_some() == b""
    assert os.listdir(target) == []
    assert not is_mount(path)


def is_mount(path: Path) -> bool:
    return path.is_mount()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
async def test_mount_with_any_name(tmp_path: Path) -> None:
    """A path is bytes, and does not depend on stdout's encoding."""
    target = tmp_path / "\udcff"
    target.mkdir()
    async with pulled(tmp_path / "store") as reference, trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [*TRIO_LAYERS, "mount", reference, target],
                env={**environment(tmp_path / "store"), "PYTHONIOENCODING": "utf-8:strict"},
                stdout=subprocess.PIPE,
            )
        )
        assert process.stdout is not None
        async with process.stdout:
            assert await process.stdout.receive_some() == bytes(target) + b"\n"
        process.terminate()
        assert await process.wait() == 0


async def test_mount_that_fails(tmp_path: Path) -> None:
    async with pulled(tmp_path / "store") as reference:
        done = await run("mount", reference, tmp_path / "gone", store=tmp_path / "store")
    assert (done.returncode, done.stdout) == (1, b"")
    [line] = done.stderr.decode().splitlines()
    assert str(tmp_path / "gone") in line


@pytest.mark.parametrize(
    "arguments",
    [("rootfs", "demo"), ("cat", "demo"), ("cat",), ("mount",), ("mount", "a", "b", "c")],
)
async def test_usage_error(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = await run(*arguments, store=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")


class FakePuller:
    """A puller with one image, whose export is incomplete; also the function that opens it."""

    @asynccontextmanager
    async def __call__(self, store: object, **options: object) -> AsyncIterator[FakePuller]:
        yield self

    @asynccontextmanager
    async def pull(
        self, reference: str, *, policy: str, **options: object
    ) -> AsyncIterator[SimpleNamespace]:
        assert (reference, policy) == ("demo", "missing")
        yield SimpleNamespace(rootfs=self)

    async def export(self, directory: str, *, root_metadata: bool) -> ExportReport:
        assert (directory, root_metadata) == ("out", False)
        return ExportReport(entries=5, owners=4, set_ids=1)


def test_what_could_not_be_set_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Metadata that needs more privilege causes a warning, not a failure."""
    monkeypatch.setattr(pulling, "open_puller", FakePuller())
    assert _cli.main(["rootfs", "demo", "out"]) == 0
    assert capsys.readouterr() == (
        "",
        "trio-layers: not set, for lack of privilege: 4 owners, 1 set-ids\n",
    )
