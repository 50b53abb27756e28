"""Platforms: parsing, normalising, and choosing the best match.

The rules are containerd's (``containerd/platforms``: ``platforms.go``, ``database.go``,
``compare.go``), whose specifiers are known from ``docker pull --platform``.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Final
from urllib.parse import unquote

import attrs

from ._arguments import check_type
from ._errors import PlatformError

__all__ = [
    "DEFAULT_OS",
    "Platform",
    "choose",
    "host_platform",
    "order",
    "parse_platform",
    "specifier",
]

# Layers are unpacked for Linux, on any system.
DEFAULT_OS: Final = "linux"

_OPTION = r"(?:[A-Za-z0-9_.-]|%[0-9A-Fa-f]{2})"
_OS_PART = re.compile(rf"([A-Za-z0-9_-]+)(?:\(({_OPTION}*)((?:\+{_OPTION}+)*)\))?\Z")
_PART = re.compile(r"[A-Za-z0-9_.-]+\Z")
_VERSION = re.compile(r"v?([0-9]{1,2})\Z")

_KNOWN_OS = re.compile(
    "aix|android|darwin|dragonfly|freebsd|hurd|illumos|ios|js|linux|nacl|netbsd|openbsd|plan9"
    "|solaris|windows|zos"
)
_KNOWN_ARCHITECTURE = re.compile(
    "386|amd64|amd64p32|arm|armbe|arm64|arm64be|ppc64|ppc64le|loong64|mips|mipsle|mips64|mips64le"
    "|mips64p32|mips64p32le|ppc|riscv|riscv64|s390|s390x|sparc|sparc64|wasm"
)

# From Windows Server 2022 on, a host runs containers of every version from that one to its own.
_STABLE_WINDOWS_BUILD: Final = 20348


@attrs.frozen
class Platform:
    """An operating system on a processor (OCI image specification, ``image-index.md``).

    Attributes:
        os: Go's name of the operating system, such as ``linux``.
        architecture: Go's name of the architecture, such as ``amd64`` or ``arm64``.
        variant: The variant of the architecture, such as ``v7`` of ``arm``; empty for the usual
            one.
        os_version: The version of the operating system, mostly for Windows.
        os_features: The required features of the system, sorted once normalised.
    """

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""
    os_features: tuple[str, ...] = ()

    def normalized(self) -> Platform:
        """The same platform under its usual names: ``linux/aarch64/v8`` is ``linux/arm64``."""
        architecture, variant = _normalize_architecture(self.architecture, self.variant)
        return Platform(
            _normalize_os(self.os),
            architecture,
            variant,
            self.os_version,
            tuple(sorted(set(self.os_features))),
        )

    def __str__(self) -> str:
        """The specifier, which `parse_platform` reads."""
        if not self.os:
            return "unknown"
        options = _quote(self.os_version)
        options += "".join(f"+{_quote(feature)}" for feature in sorted(self.os_features))
        system = f"{self.os}({options})" if options else self.os
        return "/".join(filter(None, (system, self.architecture, self.variant)))


def parse_platform(specifier: str) -> Platform:
    """Parse ``OS``, ``ARCH`` or ``OS[(VERSION)]/ARCH[/VARIANT]``.

    A missing part is Linux, or the host's architecture. Other names of an architecture are
    understood (``x86_64``, ``aarch64``, ``armhf``).

    Raises:
        PlatformError: if the text is malformed, or a single word that names neither a known
            operating system nor a known architecture.
    """
    check_type("platform", specifier, str, "a string such as 'linux/arm64', or a Platform")
    system, *rest = specifier.split("/")
    match = _OS_PART.match(system)
    if match is None or len(rest) > 2 or not all(map(_PART.match, rest)):
        raise PlatformError(
            f"invalid platform {specifier!r}: expected OS, ARCH or OS/ARCH[/VARIANT], "
            "such as linux/arm64"
        )
    os_name, version, features = _normalize_os(match[1]), match[2] or "", match[3] or ""
    if rest:
        architecture, variant = _normalize_architecture(*rest)
        if len(rest) == 2 and (architecture, variant) == ("arm64", ""):
            variant = "v8"  # the user wrote it, so the error shows it
    elif _KNOWN_OS.fullmatch(os_name):
        host = host_platform()
        architecture, variant = host.architecture, host.variant
    else:
        os_name = DEFAULT_OS
        architecture, variant = _normalize_architecture(system)
        if not _KNOWN_ARCHITECTURE.fullmatch(architecture):
            raise PlatformError(
                f"invalid platform {specifier!r}: neither an operating system nor an "
                "architecture that is known; write OS/ARCH if it is meant"
            )
    if len(rest) < 2 and (architecture, variant) == ("arm", "v7"):
        variant = ""
    return Platform(
        os_name,
        architecture,
        variant,
        unquote(version),
        tuple(map(unquote, features.split("+")[1:])),
    )


def host_platform() -> Platform:
    """Return the platform of this machine's images: Linux on its processor."""
    machine = os.uname().machine.lower()
    if machine.startswith("armv"):
        return Platform(DEFAULT_OS, "arm", machine[3:5])  # armv6l, armv7l
    if machine.startswith("mips") and sys.byteorder == "little":
        return Platform(DEFAULT_OS, f"{machine.removesuffix('el')}le")
    names = {"i486": "386", "i586": "386", "i686": "386", "loongarch64": "loong64"}
    return Platform(DEFAULT_OS, names.get(machine, machine)).normalized()


def choose(requested: Platform, platforms: Sequence[Platform | None]) -> int | None:
    """Return the index of the best platform for ``requested``; ``None`` if none fits.

    See `order`.
    """
    return next(iter(order(requested, platforms)), None)


def order(requested: Platform, platforms: Sequence[Platform | None]) -> list[int]:
    """Return the indices of all platforms that ``requested`` can run, the best first.

    The exact one comes first, then lesser variants and other architectures of the processor
    (``386`` on ``amd64``, ``arm`` on ``arm64``). Among equals, the platform with the most of the
    requested OS features wins, then the first listed. ``None`` stands for an image that does not
    name its platform: it may be for any, and comes last.
    """
    wanted = [platform.normalized() for platform in _compatible(requested.normalized())]
    ranked: list[tuple[int, int, int]] = []
    for index, platform in enumerate(platforms):
        if platform is None:
            ranked.append((len(wanted), 0, index))
            continue
        offered = platform.normalized()
        for rank, candidate in enumerate(wanted):
            if _matches(candidate, offered):
                ranked.append((rank, -len(offered.os_features), index))
                break
    return [index for _, _, index in sorted(ranked)]


def _compatible(platform: Platform) -> Iterator[Platform]:
    """Return ``platform`` and the platforms that it can run, best first."""
    yield platform
    if platform.architecture == "amd64":
        for version in range(_version(platform.variant) - 1, 0, -1):
            yield attrs.evolve(platform, variant=f"v{version}")
        yield attrs.evolve(platform, architecture="386", variant="")
    elif platform.architecture == "arm":
        for version in range(_version(platform.variant) - 1, 4, -1):
            yield attrs.evolve(platform, variant=f"v{version}")
    elif platform.architecture == "arm64":
        variant = platform.variant or "v8"
        number, _, rest = variant.partition(".")
        major = _version(number)
        if major >= 8:
            # A minor version counts only in a variant as long as "v8.5".
            minor = _version(rest) if len(variant) == len("v8.5") else 0
            for lesser in _lesser_arm64(major, minor):
                yield attrs.evolve(platform, variant=lesser)
        if variant.startswith(("v8.", "v9.")):
            variant = "v8"
        yield from _compatible(attrs.evolve(platform, architecture="arm", variant=variant))


def _lesser_arm64(major: int, minor: int) -> Iterator[str]:
    def below(major: int, minor: int) -> Iterator[str]:
        for lesser in range(minor - 1, -1, -1):
            yield f"v{major}.{lesser}" if lesser else f"v{major}"

    yield from below(major, minor)
    if major == 9:  # v9.0 was derived from v8.5, so v9.x runs programs for v8.(x+5)
        yield f"v8.{minor + 5}"
        yield from below(8, minor + 5)


def _matches(wanted: Platform, offered: Platform) -> bool:
    return (
        (wanted.os, wanted.architecture, wanted.variant)
        == (offered.os, offered.architecture, offered.variant)
        and set(offered.os_features) <= set(wanted.os_features)
        and (wanted.os != "windows" or _windows_runs(wanted.os_version, offered.os_version))
    )


def _windows_runs(host: str, container: str) -> bool:
    host_version = _windows_version(host)
    if host_version == (0, 0, 0) or not container:
        return True
    version = _windows_version(container)
    if version[:2] != host_version[:2]:
        return False
    if host_version[2] < _STABLE_WINDOWS_BUILD:
        return version == host_version
    return _STABLE_WINDOWS_BUILD <= version[2] <= host_version[2]


def _windows_version(text: str) -> tuple[int, int, int]:
    """Return major, minor and build, of 8, 8 and 16 bits; all 0 for an invalid version."""
    parts = text.split(".")[:3]
    if len(parts) < 3 or not all(part.isascii() and part.isdecimal() for part in parts):
        return 0, 0, 0
    major, minor, build = (int(part.lstrip("0")[:6] or 0) for part in parts)
    return (major, minor, build) if max(major, minor) < 2**8 and build < 2**16 else (0, 0, 0)


def _version(variant: str) -> int:
    match = _VERSION.match(variant)
    return int(match[1]) if match else 0


def _normalize_os(name: str) -> str:
    name = name.lower() or DEFAULT_OS
    return "darwin" if name == "macos" else name


def _normalize_architecture(architecture: str, variant: str = "") -> tuple[str, str]:
    architecture, variant = architecture.lower(), variant.lower()
    match architecture:
        case "i386":
            return "386", ""
        case "x86_64" | "x86-64" | "amd64":
            return "amd64", "" if variant == "v1" else variant
        case "aarch64" | "arm64":
            if variant in ("8", "v8", "8.0", "v8.0"):
                return "arm64", ""
            return "arm64", "v9" if variant in ("9", "9.0", "v9.0") else variant
        case "armhf":
            return "arm", "v7"
        case "armel":
            return "arm", "v6"
        case "arm":
            if variant in ("5", "6", "7", "8"):
                variant = f"v{variant}"
            return "arm", variant or "v7"
        case _:
            return architecture, variant


def _quote(option: str) -> str:
    """Quote the characters of the specifier's syntax; ``%`` first, or it would be quoted twice."""
    for character in "%+()/":
        option = option.replace(character, f"%{ord(character):02X}")
    return option


def specifier(platform: str | Platform | None) -> str | None:
    """Return a platform as ``os/architecture/variant``; ``None`` stays ``None``.

    Raises:
        PlatformError: if ``platform`` is invalid.
    """
    if isinstance(platform, str):
        platform = parse_platform(platform)
    return None if platform is None else str(platform)
