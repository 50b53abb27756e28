"""Credential helpers: programs with a registry's credentials.

A helper is called ``docker-credential-NAME``, gets ``get`` as its only argument and a server on
stdin, and answers in JSON on stdout (docker/docker-credential-helpers). Its stderr is for the user,
and is that of this process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import partial
from typing import Final

import trio

from .._errors import CredentialsError
from .._nursery import open_hidden_nursery
from .._printable import printable_line
from .._registry.credentials import Credentials
from .documents import decode_text, parse_json

__all__ = ["ask_helper"]

# Seconds. The helper may have to ask its user.
HELPER_TIMEOUT: Final = 120.0
# Bytes. Tokens have a few thousand.
MAX_ANSWER_SIZE: Final = 1024 * 1024

_NOT_FOUND: Final = "credentials not found in native keychain"
_TOKEN: Final = "<token>"


async def ask_helper(name: str, server: str) -> Credentials:
    """Return a server's credentials from a helper; empty ones if it has none.

    Cancellation: the helper is terminated, and killed if it does not end.

    Raises:
        CredentialsError: if it is not installed, fails, or answers in no way that is known.
            There is nothing in it of an answer that may be a secret.
    """
    program = f"docker-credential-{name}"
    path = await trio.to_thread.run_sync(_installed, program)
    if path is None:
        raise _error(program, "is not installed: it is in no directory of PATH")
    try:
        with trio.fail_after(HELPER_TIMEOUT):
            status, output = await _run(program, path, server)
    except trio.TooSlowError:
        raise _error(program, f"did not answer within {HELPER_TIMEOUT:g} seconds") from None
    except OSError as error:
        raise _error(program, f"cannot be run: {error.strerror or error}") from error
    if status == 0:
        return _decode(program, output)
    text = output.decode("utf-8", "replace").strip()
    if text == _NOT_FOUND:
        return Credentials()
    # The output gives the reason in words. JSON, which may have secrets, is not shown.
    words = printable_line(text) if "{" not in text else ""
    raise _error(program, f"failed for {server} (status {status}){words and ': '}{words}")


def _installed(program: str) -> str | None:
    # The name is part of a file name, not a path to another directory. A program is not run because
    # of this process's working directory.
    path = None if "/" in program or "\0" in program else shutil.which(program)
    return path if path is not None and os.path.isabs(path) else None


async def _run(program: str, path: str, server: str) -> tuple[int, bytes]:
    async with open_hidden_nursery() as nursery:
        run = partial(
            trio.run_process,
            [path, "get"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            check=False,
        )
        process: trio.Process = await nursery.start(run)
        assert process.stdin is not None
        assert process.stdout is not None
        async with process.stdin, process.stdout:
            try:
                await process.stdin.send_all(server.encode())
            except trio.BrokenResourceError:
                pass  # the helper does not read its input
            await process.stdin.aclose()
            output = bytearray()
            async for chunk in process.stdout:
                output += chunk
                if len(output) > MAX_ANSWER_SIZE:
                    raise _error(program, f"answered more than {MAX_ANSWER_SIZE} bytes")
    assert process.returncode is not None
    return process.returncode, bytes(output)


def _decode(program: str, output: bytes) -> Credentials:
    username = password = None
    try:
        answer = parse_json(output)
        _, username, password = (
            decode_text(answer.find(name), name) for name in ("ServerURL", "Username", "Secret")
        )
    except ValueError:
        pass  # raised outside the except block, so that its context lacks the helper's output
    if username is None or password is None or not output.strip():
        raise _error(program, "gave no valid answer")
    if username == _TOKEN:
        return Credentials(identity_token=password)
    return Credentials(username, password)


def _error(program: str, text: str) -> CredentialsError:
    return CredentialsError(f"the credential helper {program} {text}", source=program)
