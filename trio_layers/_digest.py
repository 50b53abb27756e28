"""Digests of blobs, of unpacked layers, and of stacks of layers.

A *digest* names a blob: an algorithm, a colon, and lower-case hex digits. Stored blobs have SHA-256
digests; a registry's blob may have another one that can be verified. A *diff ID* is the digest of a
layer's uncompressed tar. A *chain ID* names a layer together with all layers below it. The rules
are those of the OCI image specification, ``descriptor.md`` (digests) and ``config.md`` (layer
DiffID, layer ChainID).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Final, NewType

import attrs

from ._errors import InvalidDigest

__all__ = [
    "HEX_DIGITS",
    "ChainID",
    "DiffID",
    "Digest",
    "RootFS",
    "Verifier",
    "chain_id",
    "digest_of",
    "extend_chain",
    "parse_digest",
    "parse_verifiable",
]

Digest = NewType("Digest", str)
DiffID = NewType("DiffID", Digest)
ChainID = NewType("ChainID", Digest)

# The algorithms of the OCI image specification, descriptor.md, and SHA-384 as in Go's programs.
HEX_DIGITS: Final = {"sha256": 64, "sha384": 96, "sha512": 128}

_VERIFIABLE = re.compile(
    "(?:" + "|".join(f"{name}:[0-9a-f]{{{digits}}}" for name, digits in HEX_DIGITS.items()) + r")\Z"
)


def parse_digest(text: str) -> Digest:
    """Check that ``text`` is a digest that the store accepts, and return it.

    The store accepts SHA-256 only, the one algorithm that every registry and tool supports.

    Raises:
        InvalidDigest: if it is not ``sha256:`` followed by 64 lower-case hex digits.
    """
    if not text.startswith("sha256:"):
        raise InvalidDigest(text)
    return parse_verifiable(text)


def parse_verifiable(text: str) -> Digest:
    """Check that ``text`` is a digest by which content can be verified, and return it.

    Raises:
        InvalidDigest: if it is not ``sha256:``, ``sha384:`` or ``sha512:`` followed by as many
            lower-case hex digits as the algorithm gives.
    """
    if not _VERIFIABLE.match(text):
        raise InvalidDigest(text)
    return Digest(text)


def digest_of(data: bytes, like: Digest | None = None) -> Digest:
    """Return the digest of ``data``. It takes about a millisecond for each MiB.

    Args:
        data: All of the bytes.
        like: A verifiable digest with the wanted algorithm; ``None``: SHA-256.
    """
    verifier = Verifier(like)
    verifier.update(data)
    return verifier.digest


def extend_chain(parent: ChainID | None, diff_id: DiffID) -> ChainID:
    """Return the chain ID of the layer ``diff_id`` on ``parent`` (``None``: on nothing)."""
    if parent is None:
        return ChainID(diff_id)
    return ChainID(digest_of(f"{parent} {diff_id}".encode()))


def chain_id(diff_ids: Iterable[DiffID]) -> ChainID | None:
    """Return the chain ID of a stack of layers, bottom first; ``None`` for an empty one."""
    chain: ChainID | None = None
    for diff_id in diff_ids:
        chain = extend_chain(chain, diff_id)
    return chain


@attrs.frozen
class RootFS:
    """A stack of layers, by their diff IDs, bottom first (OCI ``config.md``, ``rootfs``)."""

    diff_ids: tuple[DiffID, ...] = attrs.field(default=(), converter=tuple[DiffID, ...])

    @property
    def chain_id(self) -> ChainID | None:
        """The chain ID of the top layer; ``None`` if there is no layer."""
        return chain_id(self.diff_ids)


class Verifier:
    """Counts and hashes bytes while they arrive.

    Args:
        like: A verifiable digest of the algorithm wanted; SHA-256 without.

    Attributes:
        size: Number of bytes so far.
    """

    def __init__(self, like: Digest | None = None) -> None:
        self.size = 0
        self._algorithm = "sha256" if like is None else like.partition(":")[0]
        self._hash = hashlib.new(self._algorithm)

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self.size += len(data)
        self._hash.update(data)

    @property
    def digest(self) -> Digest:
        """The digest of all bytes so far."""
        return Digest(f"{self._algorithm}:{self._hash.hexdigest()}")
