"""The pulls to break: small images, and stores that already have some parts."""

from __future__ import annotations

import hashlib
import random

import attrs

from trio_layers._platform import host_platform
from trio_layers.testing import (
    Built,
    BuiltImage,
    Directory,
    File,
    HardLink,
    Opaque,
    Symlink,
    Whiteout,
    build_image,
    build_index,
)


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


_BASE = [
    Directory(""),
    Directory("etc"),
    File("etc/name", data=b"base\n"),
    File("etc/motd", data=b"to be removed\n"),
    Directory("srv", uid=1000, gid=1000, mode=0o750),
    Directory("tmp", mode=0o1777),
    Directory("usr"),
    File("usr/tool", data=noise(1, 20_000), mode=0o4755),
    Symlink("tool", "usr/tool"),
]
_MIDDLE = [
    Directory(""),
    Directory("usr"),
    File("usr/library", data=noise(2, 300_000), uid=1000, gid=1000),
    HardLink("usr/same", "usr/library", uid=1000, gid=1000),
    Directory("usr/many"),
    *(File(f"usr/many/{number}", data=noise(number, 2_000)) for number in range(10)),
]
_TOP = [
    Directory(""),
    Directory("etc"),
    Whiteout("etc/motd"),
    File("etc/name", data=b"top\n", xattrs={"user.kind": b"name"}),
    Directory("usr"),
    Directory("usr/many"),
    Opaque("usr/many"),
    File("usr/many/one", data=b"one\n"),
]
_OTHER = [Directory(""), File("other", data=noise(3, 50_000))]
# The link's target is a file in the layer below.
_NEEDY = [Directory(""), Directory("usr"), HardLink("usr/tool2", "usr/tool", mode=0o4755)]
# Its directory srv has no entry, so the layer assumes root as owner and mode 0755.
_IMPLYING = [File("srv/file", data=noise(4, 5_000))]
_LARGE = [Directory(""), File("large", data=noise(5, 2_500_000))]

_PLATFORM = str(host_platform())


def _image(*layers: list) -> BuiltImage:
    return build_image(layers, platform=_PLATFORM)


FIRST = build_index([_image(_BASE, _MIDDLE, _TOP)])
SHARING = _image(_BASE, _MIDDLE, _OTHER)
NEEDY = _image(_BASE, _NEEDY, _IMPLYING)
LARGE = _image(_BASE, _LARGE)

IMAGES: dict[str, tuple[Built, dict[str, bytes]]] = {
    "first:1": (
        FIRST,
        {"etc/name": b"top\n", "usr/many/one": b"one\n", "usr/same": noise(2, 300_000)},
    ),
    "first:2": (FIRST, {"etc/name": b"top\n"}),
    "sharing:1": (SHARING, {"other": noise(3, 50_000), "etc/name": b"base\n"}),
    "needy:1": (NEEDY, {"usr/tool2": noise(1, 20_000), "srv/file": noise(4, 5_000)}),
    "large:1": (LARGE, {"large": noise(5, 2_500_000)}),
}


def wanted(name: str) -> dict[str, str]:
    """Return some files of an image, and their digests."""
    return {path: hashlib.sha256(data).hexdigest() for path, data in IMAGES[name][1].items()}


@attrs.frozen
class Scenario:
    """A pull that breaks.

    Attributes:
        name: The name of the scenario.
        pulls: The names to pull, one after the other. A name with a minus before it is removed
            instead, and the garbage collected.
        before: The names that were pulled before.
        cut: Of the first of ``pulls``, the blob's number of its largest layer came so far, and
            the connection broke.
    """

    name: str
    pulls: tuple[str, ...]
    before: tuple[str, ...] = ()
    cut: int | None = None

    @property
    def removes(self) -> bool:
        return any(name.startswith("-") for name in self.pulls)

    @property
    def all(self) -> tuple[str, ...]:
        """Return the names that can be pulled at the end."""
        return tuple(name for name in (*self.before, *self.pulls) if not name.startswith("-"))


SCENARIOS = (
    Scenario("cold", ("first:1",)),
    Scenario("sharing", ("sharing:1",), before=("first:1",)),
    Scenario("needy", ("needy:1",), before=("first:1",)),
    Scenario("retagged", ("first:2",), before=("first:1",)),
    Scenario("resumed", ("large:1",), before=("first:1",), cut=1_500_000),
    Scenario("collected", ("-needy:1", "-first:1"), before=("needy:1", "first:1", "sharing:1")),
)
