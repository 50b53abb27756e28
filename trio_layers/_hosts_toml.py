"""Reads containerd's configuration of hosts: ``hosts.toml``, and Docker's certificate names.

A directory has one directory for each registry, by its host. The files in it name mirrors, and the
settings for requests to them. They are read as containerd 2.3 reads them (``docs/hosts.md``, and
``core/remotes/docker/config/hosts.go``), with one difference: containerd ignores an unusable file,
and here it is an error, because its author would not get the wanted settings.

This module uses no network, and does not load certificates.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NoReturn, TypeAlias

import attrs

from ._errors import HostsError
from ._gocompat import clean_path, parse_duration, split_url
from ._printable import without_login

__all__ = ["Configuration", "Host", "read_configuration"]

log = logging.getLogger("trio_layers.registry")

FILE_NAME: Final = "hosts.toml"
MAX_FILE_SIZE: Final = 1024 * 1024

CAPABILITIES: Final = frozenset({"pull", "resolve", "push", "referrers"})

Table: TypeAlias = Mapping[str, object]


@attrs.frozen
class Host:
    """A host that serves the images of a registry.

    Attributes:
        scheme: ``https`` or ``http``.
        host: Host and port, as they are written.
        path: The prefix of its API's path, not quoted, without a slash at the end.
        capabilities: The supported ones of ``pull`` (content by its digest), ``resolve`` (tags),
            ``push`` and ``referrers``.
        ca: Files of certificates that are trusted besides the system's.
        client: Files of a client's certificate and its key. An empty second name is the same file.
        skip_verify: Whether its certificate may be invalid; ``None`` if the file does not say.
        header: Header fields for each request to it.
        dial_timeout: Seconds for connecting to it; ``None`` if the file does not say.
        http_fallback: Whether plain HTTP is tried if the host does not speak HTTPS.
        verify: Whether its certificate is checked, all settings considered.
        implied: Whether this is the registry itself, which no file names.
    """

    scheme: str
    host: str
    path: str
    capabilities: frozenset[str] = CAPABILITIES
    ca: tuple[str, ...] | None = None
    client: tuple[tuple[str, str], ...] | None = None
    skip_verify: bool | None = None
    # The header fields may have secrets.
    header: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict, repr=False, hash=False)
    dial_timeout: float | None = None
    http_fallback: bool = False
    verify: bool = True
    implied: bool = False


@attrs.frozen
class Configuration:
    """The configuration for a registry.

    Attributes:
        directory: The directory of the registry; ``None`` if there is none.
        hosts: The hosts, in the order in which to ask them.
        source: The file or directory for error messages.
    """

    directory: Path | None
    hosts: tuple[Host, ...]
    source: str = ""


def read_configuration(root: Path, registry: str) -> Configuration:
    """Read the hosts for a registry. Blocks while files are read.

    Args:
        root: The directory of all configurations.
        registry: The registry's host, with its port if references have one.

    Raises:
        HostsError: if a file cannot be read or is invalid.
    """
    directory = _find_directory(root, registry)
    if directory is None:
        return Configuration(None, (_with_fallback(_completed(None, registry)),))
    file = directory / FILE_NAME
    data = _read(file)
    hosts = _parse(data, file) if data else [_from_certificates(directory)]
    hosts[-1] = _completed(hosts[-1], registry)
    source = str(file if data else directory)
    return Configuration(directory, tuple(map(_with_fallback, hosts)), source)


def _find_directory(root: Path, registry: str) -> Path | None:
    host, colon, port = registry.rpartition(":")
    names = [registry, "_default"]
    if host and colon:
        names.insert(0, f"{host}_{port}_")  # for file systems without colons in names
    for name in names:
        path = root / name
        try:
            path.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _unreadable(path, error) from error
        return path
    return None


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE_SIZE + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise _unreadable(file, error) from error
    if len(data) > MAX_FILE_SIZE:
        raise HostsError(str(file), f"it is larger than {MAX_FILE_SIZE} bytes")
    return data


def _unreadable(path: Path, error: OSError) -> HostsError:
    return HostsError(str(path), error.strerror or str(error))


def _from_certificates(directory: Path) -> Host:
    """Return the registry itself, with the certificates that lie there under Docker's names."""
    ca: list[str] = []
    client: list[tuple[str, str]] = []
    try:
        for path in sorted(directory.iterdir(), key=lambda path: path.name):
            if path.is_dir() and not path.is_symlink():
                continue
            if path.name.endswith(".crt"):
                ca.append(str(path))
            elif path.name.endswith(".cert"):
                key = path.with_name(f"{path.name.removesuffix('.cert')}.key")
                client.append((str(path), str(key) if key.exists() else ""))
    except OSError as error:
        raise _unreadable(directory, error) from error
    return Host("", "", "", ca=tuple(ca) or None, client=tuple(client) or None)


def _completed(host: Host | None, registry: str) -> Host:
    """Add the registry itself as the last host, if the file names no other."""
    if host is None:
        host = Host("", "", "")
    if host.host:
        return host
    scheme, skips = "https", False
    if registry == "docker.io":
        name = "registry-1.docker.io"
    else:
        name = registry
        if _is_loopback(name):
            port = _port_of(name)
            scheme = "https" if port in ("", "443") else "http"
            skips = port != "80"
    return attrs.evolve(
        host,
        scheme=scheme,
        host=name,
        path="/v2",
        capabilities=CAPABILITIES,
        verify=not (skips or host.skip_verify),
        # Kept apart from the value in the file, since it makes HTTPS worth a try in any case.
        http_fallback=skips and scheme == "http",
        implied=True,
    )


def _with_fallback(host: Host) -> Host:
    """Try HTTPS first for a host with ``http`` and certificate settings."""
    tls = host.ca is not None or host.client is not None or host.skip_verify is not None
    if host.scheme == "http" and (tls or host.http_fallback) and _port_of(host.host) != "80":
        return attrs.evolve(host, scheme="https", http_fallback=True)
    return host


def _is_loopback(host: str) -> bool:
    if _port_of(host) or host.endswith(":"):
        host = host.rpartition(":")[0].removeprefix("[").removesuffix("]")
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _port_of(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return port if colon and (":" not in name or name.endswith("]")) else ""


# hosts.toml


def _parse(data: bytes, file: Path) -> list[Host]:
    reader = _Reader(file)
    text, problem = "", ""
    document: dict[str, object] = {}
    try:
        text = data.decode()
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        problem = str(error)
    if problem:
        # Not in the except block, because the handled error has the text.
        reader.refuse(f"it is no TOML: {problem}")
    top = _fields(document)
    configured: dict[str, Table] = {}
    for name, value in document.items():
        if name.lower() == "host":
            for key, table in reader.table(value, name).items():
                configured[key] = reader.table(table, _place(key))
    for key, table in configured.items():
        reader.check_types(_fields(table), f"{_place(key)}.")
    reader.check_types(top, "")
    server = reader.text(top.get("server", ""), "server")
    order = list(_hosts_in_order(text))
    for key in configured.keys() - set(order):
        log.warning("%s: host %r has no [host] header, and is not asked", file, without_login(key))
    hosts = [reader.host(key, _fields(configured.get(key, {})), f"{_place(key)}.") for key in order]
    return [*hosts, reader.host(server, top, "")]


def _place(key: str) -> str:
    return f"host.{without_login(key)!r}"


def _fields(table: Table) -> dict[str, object]:
    """Return the fields by lower-case names, since containerd's decoder (go-toml) ignores case."""
    return {name.lower(): value for name, value in table.items()}


@attrs.frozen
class _Reader:
    """Turns the values of a file into hosts, and raises errors for invalid values."""

    file: Path

    def refuse(self, text: str) -> NoReturn:
        raise HostsError(str(self.file), text)

    def table(self, value: object, name: str) -> Table:
        if not isinstance(value, dict):
            self.refuse(f"{name} is no table")
        return value

    def text(self, value: object, name: str) -> str:
        if not isinstance(value, str):
            self.refuse(f"{name} is no string")
        return value

    def texts(self, value: object, name: str) -> list[str]:
        if not isinstance(value, list):
            self.refuse(f"{name} is no list of strings")
        return [self.text(each, f"an item of {name}") for each in value]

    def check_types(self, fields: Table, where: str) -> None:
        """Raise errors for values that are invalid in any host."""
        self.texts(fields.get("capabilities", []), f"{where}capabilities")
        self.table(fields.get("header", {}), f"{where}header")
        self.text(fields.get("dial_timeout", ""), f"{where}dial_timeout")
        for name in ("skip_verify", "override_path"):
            if not isinstance(fields.get(name, False), bool):
                self.refuse(f"{where}{name} is neither true nor false")

    def host(self, url: str, fields: Table, where: str) -> Host:
        skip_verify = fields.get("skip_verify")
        assert skip_verify is None or isinstance(skip_verify, bool)
        scheme = host = path = ""
        if url:
            scheme, host, path = self._address(url)
            path = _api_path(path, override=fields.get("override_path") is True)
        timeout = self.text(fields.get("dial_timeout", ""), "")
        return Host(
            scheme,
            host,
            path,
            capabilities=self._capabilities(fields, where),
            ca=self._ca(fields.get("ca"), where),
            client=self._client(fields.get("client"), where),
            skip_verify=skip_verify,
            verify=not skip_verify,
            header=self._header(fields, where),
            dial_timeout=self._duration(timeout, where) if timeout else None,
        )

    def _address(self, url: str) -> tuple[str, str, str]:
        try:
            return split_url(url if url.startswith("http") else f"https://{url}")
        except ValueError as error:
            self.refuse(f"{without_login(url)!r} is no URL of a host: {error}")

    def _capabilities(self, fields: Table, where: str) -> frozenset[str]:
        name = f"{where}capabilities"
        said = [each.lower() for each in self.texts(fields.get("capabilities", []), name)]
        for each in said:
            if each not in CAPABILITIES:
                known = ", ".join(sorted(CAPABILITIES))
                self.refuse(f"{name} has an unknown one, {each!r}: there are {known}")
        return frozenset(said) or CAPABILITIES

    def _ca(self, value: object, where: str) -> tuple[str, ...] | None:
        if value is None:
            return None
        if isinstance(value, str):
            value = [value]
        return tuple(map(self._absolute, self.texts(value, f"{where}ca")))

    def _client(self, value: object, where: str) -> tuple[tuple[str, str], ...] | None:
        if isinstance(value, str):
            value = [value]
        if value is None or value == []:
            return None
        name = f"{where}client"
        if not isinstance(value, list):
            self.refuse(f"{name} is neither a string nor a list")
        pairs = []
        for each in value:
            if isinstance(each, str):
                pairs.append((self._absolute(each), ""))
                continue
            files = self.texts(each, f"an item of {name}")
            if len(files) != 2:
                self.refuse(f"an item of {name} is no pair of a certificate and its key")
            pairs.append((self._absolute(files[0]), self._absolute(files[1])))
        return tuple(pairs)

    def _header(self, fields: Table, where: str) -> dict[str, tuple[str, ...]]:
        header = {}
        for name, value in self.table(fields.get("header", {}), "").items():
            values = [value] if isinstance(value, str) else value
            header[name] = tuple(self.texts(values, f"{where}header.{name}"))
        return header

    def _duration(self, text: str, where: str) -> float:
        seconds = parse_duration(text)
        if seconds is None:
            self.refuse(f"{where}dial_timeout is {text!r}: it needs a unit, as in 3s or 500ms")
        return seconds

    def _absolute(self, path: str) -> str:
        if path.startswith("/"):
            return path
        return clean_path(f"{self.file.parent}/{path}")


def _api_path(path: str, *, override: bool) -> str:
    path = clean_path(path) if path else ""
    if override or (path and path.endswith("/v2")):
        return path
    return f"{path}/v2"


# The parts of TOML that cannot contain a table's header.
_TOKEN = re.compile(
    r'''(?P<space>[ \t]+)
    |(?P<end>\r?\n)
    |(?P<comment>\#[^\n]*)
    |(?P<text>"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*')
    |(?P<open>[\[{])
    |(?P<close>[\]}])
    |(?P<other>.)''',
    re.VERBOSE | re.DOTALL,
)


def _hosts_in_order(text: str) -> Iterator[str]:
    """Return the hosts of a valid file, in the order of the headers of their tables.

    This is containerd's order. A host without a header, written on a line of another table, does
    not count. A table that is continued after another one counts again.
    """
    last = ""  # a host without a name has no place in this order
    for header in _table_headers(text):
        keys = _keys_of(header)
        if len(keys) > 1 and keys[0] == "host" and keys[1] != last:
            last = keys[1]
            yield last


def _table_headers(text: str) -> Iterator[str]:
    depth = 0
    fresh = True  # no part of a statement has occurred on this line
    start: int | None = None
    for token in _TOKEN.finditer(text):
        match token.lastgroup:
            case "open":
                if fresh and depth == 0:
                    start = token.start()
                depth += 1
                fresh = False
            case "close":
                depth -= 1
                if depth == 0 and start is not None:
                    header = text[start : token.end()]
                    start = None
                    if not header.startswith("[["):
                        yield header
            case "end":
                fresh = fresh or depth == 0
            case "text" | "other":
                fresh = False


def _keys_of(header: str) -> list[str]:
    keys = []
    table: object = tomllib.loads(header)
    while isinstance(table, dict) and table:
        [(key, table)] = table.items()
        keys.append(key)
    return keys
