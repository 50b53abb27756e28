"""The credentials of a registry from the user's logins."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, TypeAlias, final

import attrs
import trio

from .._errors import CredentialsError
from .._registry.credentials import Credentials
from .._single_flight import SingleFlight
from .files import (
    Login,
    LoginFile,
    find_as_docker,
    find_as_podman,
    parse_environment,
    parse_login_file,
)
from .helpers import ask_helper

__all__ = ["LoginFiles"]

log = logging.getLogger("trio_layers.logins")

# Bytes, enough for tens of thousands of logins.
MAX_FILE_SIZE: Final = 4 * 1024 * 1024

_Find: TypeAlias = Callable[[LoginFile, str], Login]


@final
@attrs.define(eq=False)
class _Source:
    """A login file.

    Attributes:
        path: The file's path.
        find: Finds a login in the parsed file.
        required: Whether a missing file is an error.
    """

    path: str
    find: _Find
    required: bool = False
    content: SingleFlight[LoginFile] = attrs.field(factory=SingleFlight[LoginFile], init=False)

    async def read(self) -> LoginFile:
        # Reading may hang, for example from a network file system or a named pipe.
        return await trio.to_thread.run_sync(self._read, abandon_on_cancel=True)

    def _read(self) -> LoginFile:
        try:
            with open(self.path, "rb") as file:
                data = file.read(MAX_FILE_SIZE + 1)
            if len(data) > MAX_FILE_SIZE:
                raise ValueError(f"it has more than {MAX_FILE_SIZE} bytes")
            return parse_login_file(data)
        except (FileNotFoundError, NotADirectoryError):
            if not self.required:
                return LoginFile()
            problem = "it is not there"
        except OSError as error:
            problem = error.strerror or str(error)
        except ValueError as error:
            problem = str(error)
        raise CredentialsError(
            f"the login file {self.path} cannot be used: {problem}", source=self.path
        )


@final
class LoginFiles:
    """The credentials of the user's own programs: for ``open_puller(credentials=...)``.

    The object is called when a registry wants credentials. The first of these places with an entry
    for the repository counts:

    * ``authfile``, or the file that ``REGISTRY_AUTH_FILE`` names, in podman's format; the other
      places are ignored then;
    * ``DOCKER_AUTH_CONFIG``, then docker's ``config.json``, in the directory ``DOCKER_CONFIG`` or
      in ``~/.docker``, with its credential helpers;
    * podman's ``auth.json``, in ``$XDG_RUNTIME_DIR/containers`` or ``/run/containers/UID``, then in
      ``$XDG_CONFIG_HOME/containers`` or ``~/.config/containers``.

    Files are read once, and helpers asked once for each registry. When a registry refuses
    credentials, which may have expired, this happens again. The environment is that of the object's
    construction.

    If a needed file or helper cannot be used, the call raises `CredentialsError`, so that no
    request is anonymous by mistake.

    Args:
        authfile: A file to use in place of all others.
    """

    def __init__(self, authfile: str | os.PathLike[str] | None = None) -> None:
        self.authfile: str | None = None if authfile is None else os.fspath(authfile)
        self._sources = list(_sources(self.authfile))
        self._answers: dict[tuple[str, str], SingleFlight[Credentials]] = {}

    def __repr__(self) -> str:
        return f"<LoginFiles: {', '.join(source.path for source in self._sources)}>"

    async def __call__(
        self, repository: str, refused: Credentials | None = None
    ) -> Credentials | None:
        """Return the credentials for a repository, such as ``docker.io/library/debian``.

        Cancellation: nothing is left behind.

        Args:
            repository: The repository with its registry's domain.
            refused: Earlier credentials that the registry refused. They are not returned again
                without a new look for others.

        Raises:
            CredentialsError: if a file or a helper cannot be used.
        """
        for source in self._sources:

            def good(file: LoginFile, find: _Find = source.find) -> bool:
                login = find(file, repository)
                return refused is None or bool(login.helper) or login.credentials != refused

            file = await source.content.get(good, source.read)
            credentials = await self._credentials(source.find(file, repository), refused)
            if credentials:
                log.debug("credentials for %s: as in %s", repository, source.path)
                return credentials
        log.debug("credentials for %s: none", repository)
        return None

    async def _credentials(self, login: Login, refused: Credentials | None) -> Credentials:
        if not login.helper:
            return login.credentials
        registry_token = login.credentials.registry_token

        def complete(answer: Credentials) -> Credentials:
            return attrs.evolve(answer, registry_token=registry_token)

        async def ask() -> Credentials:
            return await ask_helper(login.helper, login.server)

        answer = self._answers.setdefault((login.helper, login.server), SingleFlight[Credentials]())
        return complete(await answer.get(lambda value: complete(value) != refused, ask))


def _sources(authfile: str | None) -> Iterator[_Source]:
    # Like podman, and unlike skopeo, fail if the named file does not exist.
    named = authfile or os.environ.get("REGISTRY_AUTH_FILE")
    if named:
        yield _Source(named, find_as_podman, required=True)
        return
    docker = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    find = partial(find_as_docker, environment=_environment())
    yield _Source(os.path.join(docker, "config.json"), find)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    for directory in (
        os.path.join(runtime, "containers") if runtime else f"/run/containers/{os.getuid()}",
        os.path.join(config, "containers"),
    ):
        yield _Source(os.path.join(directory, "auth.json"), find_as_podman)


def _environment() -> LoginFile:
    text = os.environ.get("DOCKER_AUTH_CONFIG")
    try:
        return parse_environment(text) if text else LoginFile()
    except ValueError as error:
        # Docker warns and continues.
        log.warning("DOCKER_AUTH_CONFIG is not used: %s", error)
        return LoginFile()
