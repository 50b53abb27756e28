"""A temporary home directory with login files, and credential helpers that are real programs."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

__all__ = ["Home"]

HELPER = """\
#!/bin/sh
read -r server
echo "$1 {name} $server" >> {log}
case "$server" in
{cases}
esac
"""
NOT_FOUND = "credentials not found in native keychain"


class Home:
    """A home directory for login files, in place of the user's own.

    Attributes:
        docker_config: Docker's file.
        auth: Podman's two files, in the order of their lookup.
    """

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("REGISTRY_AUTH_FILE", "DOCKER_AUTH_CONFIG", "DOCKER_CONFIG"):
            monkeypatch.delenv(name, raising=False)
        self._log = directory / "asked"
        self._bin = directory / "bin"
        self.docker_config = directory / ".docker" / "config.json"
        runtime, config = directory / "run", directory / ".config"
        self.auth = tuple(each / "containers" / "auth.json" for each in (runtime, config))
        for path in (self._bin, self.docker_config.parent, *(each.parent for each in self.auth)):
            path.mkdir(parents=True)
        monkeypatch.setenv("HOME", str(directory))
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
        monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
        monkeypatch.setenv("TRIO_LAYERS_STORE", str(directory / "store"))
        monkeypatch.setenv("PATH", f"{self._bin}:{os.environ['PATH']}")

    def add_program(self, name: str, script: str) -> None:
        path = self._bin / name
        path.write_text(script)
        path.chmod(0o755)

    def add_helper(self, name: str, answers: Mapping[str, str | Sequence[str]]) -> None:
        """Add a helper program. ``answers`` has a name and a secret for each server. With
        ``!error`` the helper always fails with this text; with ``!raw`` it always prints this text.
        """
        cases = []
        for server, answer in answers.items():
            if server == "!error":
                cases.append(f"*) {_print(answer)}; exit 1 ;;")
            elif server == "!raw":
                cases.append(f"*) {_print(answer)} ;;")
            else:
                username, secret = answer
                found = {"ServerURL": server, "Username": username, "Secret": secret}
                cases.append(f"{shlex.quote(server)}) {_print(json.dumps(found))} ;;")
        cases.append(f"*) {_print(NOT_FOUND)}; exit 1 ;;")
        script = HELPER.format(name=name, log=shlex.quote(str(self._log)), cases="\n".join(cases))
        self.add_program(f"docker-credential-{name}", script)

    def asked(self) -> list[tuple[str, str]]:
        """Return the name of the helper and the server of each call, in order."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        asked = [tuple(line.split(" ")) for line in lines]
        assert all(action == "get" for action, _, _ in asked)
        return [(name, server) for _, name, server in asked]


def _print(text: object) -> str:
    assert isinstance(text, str)
    return f"printf %s {shlex.quote(text)}"
