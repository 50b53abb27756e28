"""The lookup of logins: order of sources, number of calls, and errors of files and helpers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import trio
from _tools.canaries import Canaries
from _tools.logins import Home

from trio_layers import Credentials, CredentialsError, DoNotRetry, LoginFiles
from trio_layers._logins import helpers, lookup

R = "r.example/team/app"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    return Home(tmp_path / "home", monkeypatch)


@pytest.fixture
def canaries(caplog: pytest.LogCaptureFixture) -> Canaries:
    return Canaries(caplog, "user:canary-5ecret")


def write(path: Path, username: str, key: str = "r.example") -> None:
    path.write_text(
        json.dumps({"auths": {key: {"username": username, "password": "canary-5ecret"}}})
    )


def store(home: Home, name: str = "desk") -> None:
    home.docker_config.write_text(json.dumps({"credsStore": name}))


async def username(logins: LoginFiles) -> str | None:
    found = await logins(R)
    return None if found is None else found.username


async def test_the_order(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of many logins counts. Each source is added in turn."""
    assert await username(LoginFiles()) is None
    paths = [home.auth[1], home.auth[0], home.docker_config]
    for number, path in enumerate(paths):
        write(path, str(number))
        assert await username(LoginFiles()) == str(number)
    monkeypatch.setenv("DOCKER_AUTH_CONFIG", '{"auths": {"r.example": {"auth": "ZW52OnA="}}}')
    assert await username(LoginFiles()) == "env"
    named = tmp_path / "named"
    write(named, "named", "r.example/team")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(named))
    assert await username(LoginFiles()) == "named"
    given = tmp_path / "given"
    write(given, "given")
    assert await username(LoginFiles(given)) == "given"
    write(given, "other", "other.example")
    assert await username(LoginFiles(given)) is None


async def test_variables_that_name_directories(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, name in (
        ("XDG_CONFIG_HOME", "containers/auth.json"),
        ("XDG_RUNTIME_DIR", "containers/auth.json"),
        ("DOCKER_CONFIG", "config.json"),
    ):
        directory = tmp_path / variable
        path = directory / name
        path.parent.mkdir(parents=True)
        write(path, variable)
        monkeypatch.setenv(variable, str(directory))
        assert await username(LoginFiles()) == variable
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert f"/run/containers/{os.getuid()}/auth.json" in repr(LoginFiles())


async def test_an_entry_of_another_registry_does_not_end_the_search(home: Home) -> None:
    write(home.docker_config, "docker", "other.example")
    write(home.auth[1], "podman")
    assert await username(LoginFiles()) == "podman"


async def test_a_wrong_variable(
    home: Home,
    canaries: Canaries,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Docker ignores a malformed variable and reads its file; a malformed file is
    always an error.
    """
    write(home.docker_config, "docker")
    monkeypatch.setenv(
        "DOCKER_AUTH_CONFIG", '{"auths": {"r.example": {"password": "canary-5ecret"}}}'
    )
    assert await username(LoginFiles()) == "docker"
    assert "DOCKER_AUTH_CONFIG is not used" in caplog.text
    home.docker_config.write_text("canary-5ecret")
    monkeypatch.setenv("DOCKER_AUTH_CONFIG", '{"auths": {"r.example": {"auth": "ZW52OnA="}}}')
    with pytest.raises(CredentialsError) as caught:
        await username(LoginFiles())
    assert str(home.docker_config) in str(caught.value)
    assert caught.value.source == str(home.docker_config)
    canaries.check(caught.value)


async def test_files_that_cannot_be_read(
    home: Home, tmp_path: Path, canaries: Canaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names them, and another attempt would end the same way."""
    monkeypatch.setattr(lookup, "MAX_FILE_SIZE", 1000)
    absent, large, directory = tmp_path / "absent", tmp_path / "large", tmp_path / "directory"
    write(large, "x" * 1000)
    directory.mkdir()
    for path, problem in (
        (absent, "it is not there"),
        (large, "more than 1000 bytes"),
        (directory, "Is a directory"),
    ):
        with pytest.raises(CredentialsError, match=problem) as caught:
            await LoginFiles(path)(R)
        assert caught.value.source == str(path)
        assert isinstance(caught.value, DoNotRetry)
        canaries.check(caught.value)


async def test_a_file_is_read_once(home: Home) -> None:
    """After a refusal the file is read once more, since the credentials may have expired."""
    write(home.docker_config, "first")
    logins = LoginFiles()
    first = await logins(R)
    write(home.docker_config, "second")
    assert await logins(R) == first
    second = await logins(R, first)
    assert second == Credentials("second", "canary-5ecret")
    assert await logins("r.example/other") == second
    home.docker_config.unlink()
    assert await logins(R, second) is None


async def test_a_pipe_that_nobody_writes_to(tmp_path: Path) -> None:
    """A shell may pass a pipe as the file. A cancellation ends the wait for it."""
    os.mkfifo(tmp_path / "pipe")
    with trio.move_on_after(0.05) as scope:
        await LoginFiles(tmp_path / "pipe")(R)
    assert scope.cancelled_caught
    os.close(os.open(tmp_path / "pipe", os.O_RDWR))  # the abandoned thread


async def test_a_helper_is_asked_once(home: Home) -> None:
    """Many repositories share one call of the helper; refused credentials cause another call."""
    store(home)
    home.add_helper("desk", {"r.example": ["user", "one"]})
    logins = LoginFiles()
    found: list[Credentials | None] = []

    async def look(repository: str, refused: Credentials | None = None) -> None:
        found.append(await logins(repository, refused))

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(look, f"r.example/{number}")
    one = Credentials("user", "one")
    assert found == [one] * 20
    assert home.asked() == [("desk", "r.example")]

    found.clear()
    home.add_helper("desk", {"r.example": ["user", "two"]})
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(look, f"r.example/{number}", one)
    assert found == [Credentials("user", "two")] * 20
    assert len(home.asked()) == 2


async def test_what_a_helper_does_not_know(home: Home) -> None:
    """The helper's "not found" is remembered, and podman's files are read."""
    store(home)
    home.add_helper("desk", {})
    write(home.auth[0], "podman")
    logins = LoginFiles()
    assert await username(logins) == "podman"
    assert await username(logins) == "podman"
    assert len(home.asked()) == 1


async def test_a_registry_token_beside_a_helper(home: Home) -> None:
    """Helpers cannot return registry tokens, so docker uses the file's."""
    home.docker_config.write_text(
        json.dumps({"credsStore": "desk", "auths": {"r.example": {"registrytoken": "t"}}})
    )
    home.add_helper("desk", {"r.example": ["user", "one"]})
    assert await LoginFiles()(R) == Credentials("user", "one", registry_token="t")


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo canary-5ecret", "gave no valid answer"),
        ("true", "gave no valid answer"),
        ("echo '[\"canary-5ecret\"]'", "gave no valid answer"),
        ('echo \'{"Username": 1, "Secret": "canary-5ecret"}\'', "gave no valid answer"),
        ('echo \'{"Secret": "canary-5ecret"}\'; exit 3', r"failed for r\.example \(status 3\)$"),
        ("echo the vault is locked; exit 1", r"\(status 1\): the vault is locked$"),
        ("kill -9 $$", r"\(status -9\)$"),
        ("yes canary-5ecret", "answered more than 1048576 bytes"),
        ("exec 0<&-; exit 4", "status 4"),
    ],
)
async def test_helpers_that_fail(home: Home, canaries: Canaries, script: str, problem: str) -> None:
    """No output of a helper shows a secret, and the file does not replace the helper."""
    home.docker_config.write_text(
        json.dumps({"credsStore": "desk", "auths": {"r.example": {"password": "canary-5ecret"}}})
    )
    home.add_program("docker-credential-desk", f"#!/bin/sh\n{script}\n")
    with pytest.raises(CredentialsError, match=problem) as caught:
        await LoginFiles()(R)
    assert caught.value.source == "docker-credential-desk"
    canaries.check(caught.value)


async def test_one_failure_for_all(home: Home) -> None:
    """A failed helper does not run again for each waiting task."""
    store(home)
    home.add_helper("desk", {"!error": "the vault is locked"})
    logins = LoginFiles()
    errors: list[CredentialsError] = []

    async def look(number: int) -> None:
        with pytest.raises(CredentialsError, match="locked") as caught:
            await logins(f"r.example/{number}")
        errors.append(caught.value)

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(look, number)
    assert len({id(error) for error in errors}) == 10
    assert len(home.asked()) == 1
    home.add_helper("desk", {"r.example": ["user", "one"]})
    assert await username(logins) == "user"


async def test_helpers_that_cannot_be_run(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A helper's name cannot be a path, and no program is taken from the working directory."""
    home.add_program("docker-credential-none", "no program")
    (tmp_path / "docker-credential-here").write_text("#!/bin/sh\n")
    (tmp_path / "docker-credential-here").chmod(0o755)
    (tmp_path / "docker-credential-").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f":.:{os.environ['PATH']}")
    for name, problem in (
        ("none", "cannot be run: Exec format error"),
        ("absent", "is not installed"),
        ("here", "is not installed"),
        ("/../docker-credential-here", "is not installed"),
        ("a\0b", "is not installed"),
    ):
        store(home, name)
        with pytest.raises(CredentialsError, match=problem):
            await LoginFiles()(R)


async def test_a_helper_that_does_not_answer(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper has a time limit."""
    monkeypatch.setattr(helpers, "HELPER_TIMEOUT", 0.1)
    store(home)
    home.add_program("docker-credential-desk", "#!/bin/sh\nexec sleep 1000\n")
    with pytest.raises(CredentialsError, match=r"did not answer within 0\.1 seconds"):
        await LoginFiles()(R)


async def test_a_helper_that_nobody_waits_for(home: Home, tmp_path: Path) -> None:
    """The helper has ended before the cancelled call returns."""
    store(home)
    started = tmp_path / "started"
    os.mkfifo(started)
    script = f"#!/bin/sh\necho $$ > {started}\nexec sleep 1000\n"
    home.add_program("docker-credential-desk", script)
    with trio.CancelScope() as scope:

        async def leave_when_it_runs() -> None:
            number = int(await trio.to_thread.run_sync(started.read_text))
            pids.append(number)
            os.kill(number, 0)
            scope.cancel()

        pids: list[int] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave_when_it_runs)
            await LoginFiles()(R)
    assert scope.cancelled_caught
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
