"""Worker processes: their results, their deaths, and threads in place of them."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import trio
from _tools.processes import list_children
from store.stores import Blob, arriving, chain_of, layer_of, visible
from store.test_staging import MIB, NOISE, ignore, stage
from store.test_unpack_errors import FAMILIES, LIMITS, blob_of, tar
from trio.testing import wait_all_tasks_blocked

import trio_layers
from trio_layers import Limits, UnpackError, WorkerError, open_store
from trio_layers._compression import zstd
from trio_layers._store.directory import DirectoryStore
from trio_layers._tree.unpack import unpack
from trio_layers._workers import pool

LARGE = layer_of(big=NOISE, more=b"more")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def children() -> set[int]:
    """Return the IDs of our worker processes."""
    found = set()
    for pid in list_children(os.getpid()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if b"program.main()" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found


def bomb() -> Blob:
    """Make a small blob that takes a minute to unpack, of zeros."""
    pieces = [zstd.compress(tar({"name": "zeros", "size": 64 << 30})[:512])]
    pieces += [zstd.compress(bytes(64 * MIB))] * 1024
    return blob_of(b"".join(pieces))


async def test_a_layer_is_the_same_as_from_a_thread(tmp_path: Path) -> None:
    """Modes are exact with any umask here, because a worker has its own."""
    blob = blob_of(
        tar(
            {"name": "d", "type": "dir", "mode": "0777"},
            {"name": "d/f", "text": "f", "mode": "0666"},
            {"name": "d/s", "text": "s", "mode": "4777"},
        )
    )
    before = os.umask(0o077)
    try:
        async with open_store(tmp_path / "store") as store:
            layer = await stage(store, blob)
    finally:
        os.umask(before)
    (tmp_path / "thread").mkdir()
    unpack(io.BytesIO(blob.data).read, tmp_path / "thread")
    assert (layer.tree / "entries").read_bytes() == (tmp_path / "thread/entries").read_bytes()
    assert (layer.tree / "entries").stat().st_mode & 0o777 == 0o600
    for path, mode in (("d", 0o777), ("d/f", 0o666), ("d/s", 0o4777)):
        assert (layer.tree / "fs" / path).stat().st_mode & 0o7777 == mode


@pytest.mark.parametrize("family", FAMILIES)
async def test_errors_come_as_from_a_thread(family: str, tmp_path: Path) -> None:
    data, kind, text = FAMILIES[family]
    blob = blob_of(data)
    async with open_store(tmp_path, limits=LIMITS) as store:
        with pytest.raises(kind, match=rf"^layer {blob.digest}: .*{text}") as caught:
            await stage(store, blob)
        assert type(caught.value) is kind
        assert caught.value.layer == blob.digest
        # At most the blob is stored, for another try on the layers below.
        assert not [name for name in visible(tmp_path) if name.startswith("trees/")]
        assert (await stage(store, layer_of(other="other"))).tree.is_dir()


async def test_workers_start_with_the_first_layer(tmp_path: Path) -> None:
    """Each worker starts once, and ends with the store."""
    async with open_store(tmp_path) as store:
        assert children() == set()
        await stage(store, layer_of(a="a"))
        first = children()
        assert first
        for name in "bcd":
            await stage(store, layer_of(**{name: name}))
        assert children() >= first
    assert children() == set()


async def at_work(store: DirectoryStore, *, but: int = 0) -> int:
    """Return the only process, except ``but``, with an open file of the store."""
    with trio.fail_after(20):
        while True:
            found = [pid for pid in children() if pid != but and is_at_work(pid, store.path)]
            if found:
                return found[0]
            await trio.sleep(0.01)


async def test_a_worker_that_is_killed_is_replaced_once(tmp_path: Path) -> None:
    """If the second worker dies of the same layer, this layer fails, and no other one."""
    async with open_store(tmp_path) as store:
        await stage(store, layer_of(first="first"))
        before = visible(tmp_path)
        async with store.stage(LARGE.descriptor) as staged:
            await staged.write(LARGE.data[: 2 * MIB])
            worker = 0
            for _ in range(2):
                worker = await at_work(store, but=worker)
                assert store.statistics().unpacking == 1
                os.kill(worker, signal.SIGKILL)
            with trio.fail_after(20):
                error = await staged.wait_failed()
            assert isinstance(error, WorkerError)
            assert str(error) == (
                f"layer {LARGE.digest}: the worker process was killed by signal 9, which the "
                "kernel sends when memory is short: free memory and try again"
            )
            await staged.write(LARGE.data[2 * MIB :])
            await staged.finish(ignore)
            with pytest.raises(WorkerError):
                await staged.commit(None)
        assert visible(tmp_path) == before
        layer = await stage(store, LARGE)
        assert layer.chain_id == chain_of(LARGE)
    assert arriving(tmp_path) == []


@pytest.mark.parametrize("how", ["killed", "stopped", "no memory", "nonsense"])
async def test_a_worker_that_is_lost_once_does_no_harm(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer is complete, and its reported progress never decreases."""
    monkeypatch.setattr(pool, "_SILENCE", 1.0)
    async with open_store(tmp_path) as store:
        await stage(store, layer_of(first="first"))
        told: list[int] = []
        async with store.stage(LARGE.descriptor) as staged:
            await staged.write(LARGE.data[: 2 * MIB])
            lost = await at_work(store)
            if how == "killed":
                os.kill(lost, signal.SIGKILL)
            elif how == "stopped":
                os.kill(lost, signal.SIGSTOP)
            elif how == "no memory":
                resource.prlimit(lost, resource.RLIMIT_AS, (1 << 20, 1 << 20))
            else:
                answer_nonsense(lost)
            await staged.write(LARGE.data[2 * MIB :])
            await staged.finish(told.append)
            with trio.fail_after(30):
                layer = await staged.commit(None)
        assert (layer.tree / "fs" / "big").read_bytes() == NOISE
        assert told == sorted(told)
        assert lost not in children() or how == "no memory"
    assert children() == set()


def is_at_work(pid: int, store: Path) -> bool:
    """Return whether a process has an open file of the store."""
    try:
        links = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
    except FileNotFoundError:
        return False
    return any(link.startswith(os.fspath(store)) for link in links)


def answer_nonsense(pid: int) -> None:
    """Write to a worker's answer pipe, the first pipe after the standard streams."""
    numbers = sorted(int(each.name) for each in Path(f"/proc/{pid}/fd").iterdir())
    pipes = [n for n in numbers if n > 2 and os.readlink(f"/proc/{pid}/fd/{n}").startswith("pipe:")]
    Path(f"/proc/{pid}/fd/{pipes[0]}").write_bytes(b"\x07\x00\x00\x00\x00")


@pytest.mark.parametrize("waits", [False, True])
async def test_attempts_are_never_mixed(waits: bool, tmp_path: Path) -> None:
    """A worker never mixes attempts, even if it is about to begin."""
    other = layer_of(other=NOISE[::-1])
    async with open_store(tmp_path) as store:
        async with store.stage(LARGE.descriptor) as staged:
            for length in (MIB, 2 * MIB, MIB + 17):
                await staged.write(other.data[:length])
                if waits:
                    await wait_all_tasks_blocked()
                await staged.restart()
            await staged.write(LARGE.data)
            await staged.finish(ignore)
            layer = await staged.commit(None)
        assert sorted(os.listdir(layer.tree / "fs")) == ["big", "more"]
        assert (layer.tree / "fs" / "big").read_bytes() == NOISE


@pytest.mark.parametrize("expands", [False, True])
async def test_cancelling_a_layer_stops_its_worker(expands: bool, tmp_path: Path) -> None:
    """Neither a worker that waits for bytes nor one with a bomb goes on.

    The worker can be used again.
    """
    blob = bomb() if expands else LARGE
    async with open_store(tmp_path) as store:
        await stage(store, layer_of(first="first"))
        before = children()
        async with store.stage(blob.descriptor) as staged:
            await staged.write(blob.data if expands else blob.data[: 2 * MIB])
            if expands:
                await staged.finish(ignore)
            with trio.fail_after(60):
                # The stage first waits for a thread, which no task shows.
                while store.statistics().unpacking == 0:
                    await wait_all_tasks_blocked(0.001)
        assert store.statistics().unpacking == 0
        left = [name for name in arriving(tmp_path) if not name.endswith(".trash")]
        assert left == [f"{blob.file_name}.partial"]
        await stage(store, layer_of(last="last"))
        assert children() & before


async def test_without_an_interpreter_threads_unpack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Threads do the work, also if an interpreter cannot read the library."""
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    for number, path in enumerate((str(tmp_path / "none"), str(broken), "", sys.executable)):
        caplog.clear()
        monkeypatch.setattr(sys, "executable", path)
        # The last one is a program with an embedded Python.
        monkeypatch.setattr(sys, "frozen", number == 3, raising=False)
        with caplog.at_level(logging.WARNING):
            async with open_store(tmp_path / f"{number}") as store:
                async with trio.open_nursery() as nursery:
                    for name in "abcdef":
                        nursery.start_soon(stage, store, layer_of(**{name: name}))
                assert children() == set()
        assert len(visible(tmp_path / f"{number}")) == 12
        assert [record.message.partition(":")[0] for record in caplog.records] == (
            [f"cannot start {path}, so threads unpack layers, which is slower"]
            if number < 2
            else []
        )


@pytest.mark.parametrize("failure", [errno.EAGAIN, errno.ENOMEM, signal.SIGKILL])
async def test_a_start_that_fails_is_tried_again(
    failure: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The store starts workers again after a pause, during which threads unpack.

    A shortage of processes may be brief.
    """
    real, failed = trio.lowlevel.open_process, 0

    async def sometimes(*args: Any, **options: Any) -> trio.Process:
        nonlocal failed
        failed += 1
        if failed > 2:
            return await real(*args, **options)
        if failure != signal.SIGKILL:
            raise OSError(failure, os.strerror(failure))
        return await real(["/bin/sh", "-c", "kill -9 $$"], **options)

    monkeypatch.setattr(trio.lowlevel, "open_process", sometimes)
    async with open_store(tmp_path) as store:
        with trio.fail_after(20):
            await stage(store, layer_of(first="first"))
            assert children() == set()
            number = 0
            while not children():
                number += 1
                await stage(store, layer_of(number=f"{number}"))
    assert failed == 3
    assert len([each for each in caplog.records if "threads unpack" in each.message]) == 1


def run_python(code: str, *options: str, directory: Path, **environment: str) -> str:
    """Run a program from the command line, and return its output."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=directory,
        env={**ENVIRONMENT, **environment},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


STAGE_ELSEWHERE = """
import os, sys, trio
from trio_layers import open_store
from workers.test_pool import children, layer_of, stage

async def main():
    async with open_store("store") as store:
        os.chdir("elsewhere")
        await stage(store, layer_of(a="a"))
        print(len(children()))

trio.run(main)
"""


@pytest.mark.parametrize("entry", ["", "."])
def test_a_worker_runs_nothing_of_the_directory_it_starts_in(entry: str, tmp_path: Path) -> None:
    """The directory may contain an exported file system with foreign programs.

    ``python -c`` adds an empty entry to ``sys.path``; any program may add a relative one.
    """
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("queue", "pickle", "attr", "isal"):
        (elsewhere / f"{name}.py").write_text(f"open({str(tmp_path)!r} + '/ran', 'w')")
    insert = f"import sys; sys.path.insert(0, {entry!r})\n"
    assert run_python(insert + STAGE_ELSEWHERE, directory=tmp_path) == "1\n"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("how", ["archive", "working directory"])
def test_a_worker_finds_the_library_where_the_program_did(how: str, tmp_path: Path) -> None:
    """The library may be anywhere, with or without other libraries beside it."""
    package = Path(trio_layers.__file__).parent
    (tmp_path / "elsewhere").mkdir()
    path = ENVIRONMENT["PYTHONPATH"]
    if how == "archive":
        with zipfile.ZipFile(tmp_path / "library.zip", "w") as archive:
            for file in package.rglob("*.py"):
                archive.write(file, file.relative_to(package.parent))
        path = f"library.zip:{path}"
    else:
        shutil.copytree(package, tmp_path / "trio_layers")
        for name in ("attr", "attrs", "isal"):
            shutil.copytree(Path(sys.modules[name].__path__[0]), tmp_path / name)
    code = STAGE_ELSEWHERE + "\nimport trio_layers; print(trio_layers.__file__)"
    count, found = run_python(code, directory=tmp_path, PYTHONPATH=path).split()
    assert count == "1"
    assert found.startswith(os.fspath(tmp_path))


SCRIPT = """
import json, os, sys
print("here", flush=True)
import trio
from trio_layers import open_store
from trio.testing import wait_all_tasks_blocked
from workers.test_pool import LARGE, MIB, children, layer_of, stage

async def main():
    async with open_store(sys.argv[1]) as store:
        if sys.argv[2] == "stage":
            await stage(store, LARGE)
            return
        await stage(store, layer_of(first="first"))
        async with store.stage(LARGE.descriptor) as staged:
            await staged.write(LARGE.data[:2 * MIB])
            await wait_all_tasks_blocked()
            print(json.dumps(list(children())), flush=True)
            await trio.sleep_forever()

trio.run(main)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    # The program has no guard, so importing it would run it.
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_the_program_is_not_run_again(tmp_path: Path, script: Path) -> None:
    command = [sys.executable, script, tmp_path / "store", "stage"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "here\n", "")


def test_workers_die_with_their_program(tmp_path: Path, script: Path) -> None:
    """After any death of the program, no worker writes into the store."""
    command = [sys.executable, script, tmp_path / "store", "wait"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "here\n"
        pids = json.loads(process.stdout.readline())
        assert pids
        workers = [os.pidfd_open(pid) for pid in pids]
        process.kill()
        # The workers hold its standard error, which closes just before the last of them ends.
        assert process.stderr.read() == ""
    for worker in workers:
        assert select.select([worker], [], [], 60)[0]
        os.close(worker)


@pytest.mark.parametrize("size", [0, 1, 300_000, len(LARGE.data)])
def test_reading_ahead_gives_the_same_tree(size: int, tmp_path: Path) -> None:
    """Trees are the same, and so are errors of streams that end early."""
    outcomes = []
    for ahead in (False, True):
        target = tmp_path / f"{ahead}"
        target.mkdir()
        rest = memoryview(LARGE.data)[:size]

        def read(wanted: int) -> bytes:
            nonlocal rest
            data, rest = rest[:wanted], rest[wanted:]
            return bytes(data)

        try:
            outcomes.append(str(unpack(read, target, read_ahead=ahead)))
        except UnpackError as error:
            outcomes.append(str(error))
        outcomes.append((target / "entries").read_bytes() if size in (0, len(LARGE.data)) else b"")
    assert outcomes[:2] == outcomes[2:]


def test_reading_ahead_ends_with_unpacking(tmp_path: Path) -> None:
    """The reading thread stops, and its error is raised."""
    limits = Limits(max_entries=1)
    data = tar({"name": "a"}, {"name": "b", "text": "b" * MIB})
    reads = 0

    def read(size: int) -> bytes:
        nonlocal reads
        reads += 1
        return data[:size] if reads == 1 else bytes(size)

    with pytest.raises(trio_layers.LimitExceeded, match="max_entries"):
        unpack(read, tmp_path, limits=limits, read_ahead=True)
    ended = reads
    assert reads < 100

    def fail(size: int) -> bytes:
        raise ConnectionError("the cable")

    (tmp_path / "other").mkdir()
    with pytest.raises(ConnectionError, match="the cable"):
        unpack(fail, tmp_path / "other", read_ahead=True)
    assert reads == ended


async def test_only_a_layer_that_is_alone_gets_two_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = []
    job = pool.Job

    def note(**fields):  # type: ignore[no-untyped-def]
        jobs.append(fields["read_ahead"])
        return job(**fields)

    monkeypatch.setattr(pool, "Job", note)
    monkeypatch.setattr(pool, "_READ_AHEAD_SIZE", MIB)
    async with open_store(tmp_path) as store:
        await stage(store, LARGE)
        await stage(store, layer_of(small="small"))
        async with trio.open_nursery() as nursery:
            for name in "ab":
                blob = layer_of(**{name: NOISE})
                nursery.start_soon(stage, store, blob)
    assert jobs == [True, False, False, False]
