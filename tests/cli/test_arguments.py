"""Arguments and exit codes, with a puller that only records its calls."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
from argparse import _SubParsersAction
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_layers import CheckReport, Credentials, LoginFiles, _cli
from trio_layers._commands import opening, pulling
from trio_layers._commands.table import COMMANDS
from trio_layers._errors import InvalidReference, NotFound, StoreFull
from trio_layers._progress import Progress, Status

DIGEST, DIFF_ID = "sha256:" + "1" * 64, "sha256:" + "2" * 64
LAYER = SimpleNamespace(
    descriptor=SimpleNamespace(digest=DIGEST, size=123), diff_id=DIFF_ID, chain_id=DIFF_ID
)


class FakePuller:
    """A puller, its store, and the function that opens either. Pulls of `trouble` fail."""

    def __init__(self) -> None:
        self.opened: list[tuple[object, dict[str, object]]] = []
        self.pulled: list[tuple[str, object]] = []
        self.trouble: dict[str, BaseException] = {}

    @asynccontextmanager
    async def __call__(self, store: object, **options: object) -> AsyncIterator[FakePuller]:
        self.opened.append((store, options))
        if str(store) in self.trouble:
            raise self.trouble[str(store)]
        yield self

    @asynccontextmanager
    async def pull(self, reference, *, platform, progress):
        self.pulled.append((reference, platform))
        logging.getLogger("trio_layers.fake").info("pulling %s", reference)
        await progress(Progress("aaa", Status.PULLING))
        if reference in self.trouble:
            raise self.trouble[reference]
        # The last requested image is pulled first.
        await wait_all_tasks_blocked(0.0001 * (100 - len(self.pulled)))
        await progress(Progress("aaa", Status.PULL_COMPLETE))
        yield SimpleNamespace(
            reference=f"docker.io/{reference}",
            digest=DIGEST,
            platform="linux/amd64",
            layers=(LAYER,),
        )

    async def check(self, *, repair: bool) -> CheckReport:
        return CheckReport(0, 0, 0, 0, ())


@pytest.fixture
def puller(monkeypatch: pytest.MonkeyPatch) -> FakePuller:
    fake = FakePuller()
    monkeypatch.setattr(pulling, "open_puller", fake)
    monkeypatch.setattr(opening, "open_store", fake)
    return fake


def test_pull_passes_everything_on(puller: FakePuller) -> None:
    code = _cli.main(
        [
            "pull",
            "debian:12",
            "--store",
            "S",
            "--platform",
            "linux/arm64/v8",
            "--plain-http",
            "--no-tls-verify",
            "--hosts-dir",
            "/etc/containerd/certs.d",
            "--creds",
            "me:it's:secret",
            "--max-concurrent-downloads",
            "0",
            "--max-download-attempts",
            "1",
            "-q",
        ]
    )
    assert code == 0
    [(store, options)] = puller.opened
    credentials = options.pop("credentials")
    assert store == "S"
    assert credentials == Credentials("me", "it's:secret")
    assert options == {
        "plain_http": True,
        "tls_verify": False,
        "hosts_dir": "/etc/containerd/certs.d",
        "max_concurrent_downloads": 0,
        "max_download_attempts": 1,
    }
    assert puller.pulled == [("debian:12", "linux/arm64/v8")]


def test_pull_has_careful_defaults(puller: FakePuller) -> None:
    assert _cli.main(["pull", "debian:12", "-q"]) == 0
    [(_, options)] = puller.opened
    logins = options.pop("credentials")
    assert isinstance(logins, LoginFiles)
    assert logins.authfile is None
    assert options == {
        "plain_http": False,
        "tls_verify": True,
        "hosts_dir": None,
        "max_concurrent_downloads": 3,
        "max_download_attempts": 5,
    }
    assert puller.pulled == [("debian:12", None)]


def test_a_login_file_is_named(puller: FakePuller) -> None:
    """``--creds`` takes precedence over the login file."""
    assert _cli.main(["pull", "one", "-q", "--authfile", "F"]) == 0
    assert _cli.main(["pull", "one", "-q", "--authfile", "F", "--creds", "me:secret"]) == 0
    [(_, first), (_, second)] = puller.opened
    assert first["credentials"].authfile == "F"
    assert second["credentials"] == Credentials("me", "secret")


def test_result_on_stdout_in_order_and_progress_on_stderr(
    puller: FakePuller, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _cli.main(["pull", "one", "two"]) == 0
    out, err = capsys.readouterr()
    assert out == f"docker.io/one linux/amd64 {DIGEST}\ndocker.io/two linux/amd64 {DIGEST}\n"
    assert err.splitlines()[0] == "aaa: Pulling fs layer"
    assert err.splitlines()[-1] == "aaa: Pull complete"


def test_quiet_shows_no_progress(puller: FakePuller, capsys: pytest.CaptureFixture[str]) -> None:
    assert _cli.main(["pull", "-q", "one"]) == 0
    out, err = capsys.readouterr()
    assert out == f"docker.io/one linux/amd64 {DIGEST}\n"
    assert err == ""


def test_json_result(puller: FakePuller, capsys: pytest.CaptureFixture[str]) -> None:
    assert _cli.main(["pull", "--json", "--progress", "json", "one"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "reference": "docker.io/one",
        "digest": DIGEST,
        "platform": "linux/amd64",
        "layers": [{"digest": DIGEST, "size": 123, "diffId": DIFF_ID, "chainId": DIFF_ID}],
    }
    assert [json.loads(line)["status"] for line in err.splitlines()] == [
        "Pulling fs layer",
        "Pull complete",
    ]


def test_verbose_shows_the_log(puller: FakePuller, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("trio_layers")
    before = logger.level, list(logger.handlers)
    assert _cli.main(["pull", "-v", "one"]) == 0
    assert "trio_layers.fake: pulling one" in capsys.readouterr().err
    assert (logger.level, list(logger.handlers)) == before


def test_the_log_rewrites_no_terminal(
    puller: FakePuller, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _cli.main(["pull", "-v", "one\x1b[2J\r"]) == 0
    assert "trio_layers.fake: pulling one�[2J�\n" in capsys.readouterr().err


def test_one_failure_is_one_line_and_does_not_stop_the_others(
    puller: FakePuller, capsys: pytest.CaptureFixture[str]
) -> None:
    puller.trouble["bad"] = NotFound("manifest\n  unknown\x1b[2J", host="example.com", status=404)
    puller.trouble["full"] = StoreFull("no space is left")
    assert _cli.main(["pull", "bad", "good", "full", "--progress", "none"]) == 1
    out, err = capsys.readouterr()
    assert out == f"docker.io/good linux/amd64 {DIGEST}\n"
    assert sorted(err.splitlines()) == [
        "trio-layers: bad: manifest unknown�[2J",
        "trio-layers: full: no space is left",
    ]


def test_a_store_that_cannot_be_opened(
    puller: FakePuller, capsys: pytest.CaptureFixture[str]
) -> None:
    puller.trouble["S"] = PermissionError(13, "Permission denied", "S/oci-layout")
    assert _cli.main(["check", "--store", "S"]) == 1
    assert capsys.readouterr() == ("", "trio-layers: S/oci-layout: Permission denied\n")


def test_several_errors_at_once_are_a_line_each(
    puller: FakePuller, capsys: pytest.CaptureFixture[str]
) -> None:
    puller.trouble["S"] = ExceptionGroup("", [StoreFull("full"), ExceptionGroup("", [OSError()])])
    assert _cli.main(["check", "--store", "S"]) == 1
    assert capsys.readouterr().err == "trio-layers: full\ntrio-layers: OSError\n"


def test_a_bug_shows_as_one(puller: FakePuller) -> None:
    """An error that is not a LayersError keeps its traceback."""
    puller.trouble["one"] = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        _cli.main(["pull", "-q", "one"])


def test_invalid_reference_is_a_failure(
    puller: FakePuller, capsys: pytest.CaptureFixture[str]
) -> None:
    puller.trouble["X"] = InvalidReference("X", "uppercase", "must be lowercase")
    assert _cli.main(["pull", "-q", "X"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_and_is_the_exit_code(
    number: signal.Signals, puller: FakePuller, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []

    async def check(*, repair: bool) -> None:
        try:
            os.kill(os.getpid(), number)
            await trio.sleep_forever()
        finally:
            left.append(True)

    monkeypatch.setattr(puller, "check", check)
    assert _cli.main(["check"]) == 128 + number
    assert left == [True]


def test_the_second_interrupt_does_not_wait(
    puller: FakePuller, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(*, repair: bool) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                signal.raise_signal(signal.SIGINT)
                await trio.sleep_forever()

    monkeypatch.setattr(puller, "check", check)
    # Shells start background processes with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert _cli.main(["check"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupted_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def parser(words: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_cli, "_parser", parser)
    assert _cli.main([]) == 130


def test_no_stdout(puller: FakePuller, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's stdout is ``None`` where the descriptor is closed."""
    monkeypatch.setattr("sys.stdout", None)
    assert _cli.main(["pull", "-q", "one"]) == 0


def test_no_stderr(
    puller: FakePuller, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Progress and errors are lost, but the result is the same."""
    monkeypatch.setattr("sys.stderr", None)
    assert _cli.main(["pull", "one"]) == 0
    puller.trouble["two"] = NotFound("not here", host="h")
    assert _cli.main(["pull", "one", "two"]) == 1
    assert capsys.readouterr().out == f"docker.io/one linux/amd64 {DIGEST}\n" * 2


def test_nobody_reads_the_result(puller: FakePuller, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    stdout = Gone()
    monkeypatch.setattr("sys.stdout", stdout)
    assert _cli.main(["pull", "-q", "one"]) == 1
    assert stdout.closed


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nosuch",
        "pull",
        "pull a --max-concurrent-downloads -1",
        "pull a --max-download-attempts 0",
        "pull a --max-download-attempts many",
        "pull a --progress loud",
        "pull a --no-tls",  # abbreviations of options would become part of the interface
        "images extra",
    ],
)
def test_usage_errors_leave_with_2(
    line: str, puller: FakePuller, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        _cli.main(line.split())
    assert caught.value.code == 2
    assert "usage: trio-layers" in capsys.readouterr().err
    assert puller.opened == []


def test_help_and_version_leave_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ["--help", "--version", "pull --help", "images --help"]:
        with pytest.raises(SystemExit) as caught:
            _cli.main(line.split())
        assert caught.value.code == 0
    assert _cli.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_each_option_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every argument of every command has a help text without unfilled placeholders."""
    parser = _cli._parser([name])
    [commands] = [each for each in parser._actions if isinstance(each, _SubParsersAction)]
    assert [action.dest for action in commands.choices[name]._actions if not action.help] == []
    with pytest.raises(SystemExit):
        _cli.main([name, "--help"])
    assert "%" not in capsys.readouterr().out


def test_password_is_asked_for(puller: FakePuller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getpass", lambda prompt: f"answer to {prompt}")
    assert _cli.main(["pull", "-q", "one", "--creds", "me"]) == 0
    assert puller.opened[0][1]["credentials"] == Credentials("me", "answer to Password of me: ")


@pytest.mark.parametrize("trouble", [EOFError, AttributeError])
def test_no_password_is_a_usage_error_that_names_no_secret(
    trouble: type[Exception],
    puller: FakePuller,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def getpass(prompt: str) -> str:
        raise trouble

    monkeypatch.setattr("getpass.getpass", getpass)
    with pytest.raises(SystemExit) as caught:
        _cli.main(["pull", "one", "--creds", "topsecret"])
    assert caught.value.code == 2
    assert "topsecret" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "uid", "store"),
    [
        ({"TRIO_LAYERS_STORE": "/s", "XDG_DATA_HOME": "/x"}, 1000, "/s"),
        ({"TRIO_LAYERS_STORE": "/s"}, 0, "/s"),
        ({"TRIO_LAYERS_STORE": "", "XDG_DATA_HOME": "/x"}, 1000, "/x/trio-layers"),
        ({"XDG_DATA_HOME": "relative"}, 1000, "/home/me/.local/share/trio-layers"),
        ({}, 1000, "/home/me/.local/share/trio-layers"),
        ({"XDG_DATA_HOME": "/x"}, 0, "/var/lib/trio-layers"),
    ],
)
def test_default_store(
    environment: dict[str, str],
    uid: int,
    store: str,
    puller: FakePuller,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("TRIO_LAYERS_STORE", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert _cli.main(["check"]) == 0
    assert puller.opened[0][0] == store
