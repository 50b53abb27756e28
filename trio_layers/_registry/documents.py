"""Small documents of registries: manifests, indexes and configs, verified."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, TypeVar, TypeVarTuple, Unpack

import trio

from .._digest import Digest, digest_of, parse_digest
from .._errors import InvalidDigest, ManifestError, VerificationError
from .._manifest import INDEX_TYPES, MANIFEST_TYPES, MAX_DOCUMENT_SIZE, Descriptor
from .._offload import run_large
from .._reference import Reference
from .encoding import coding_of, looks_like_json, named_encoding, read_fitting
from .endpoints import Endpoint
from .error_responses import mark_final
from .foreign_urls import ForeignURL
from .response import RegistryResponse

__all__ = [
    "BLOBS",
    "MANIFESTS",
    "capabilities_for",
    "decode_large",
    "descriptor_of",
    "fetch_manifest",
    "read_verified",
]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# Larger documents are decoded in a thread, because 16 KiB of JSON already take a millisecond.
INLINE_SIZE: Final = 16 * 1024
LARGE_SIZE: Final = 256 * 1024

# "*/*" is there because some servers answer 406 if they know a document by another media type than
# those listed (RFC 9110, 12.5.1).
MANIFESTS: Final = {"Accept": ", ".join((*MANIFEST_TYPES, *INDEX_TYPES, "*/*"))}
BLOBS: Final = {"Accept": "*/*"}

_SIZE = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)


def capabilities_for(reference: Reference) -> tuple[str, ...]:
    """Return the capabilities that a host needs to resolve a reference."""
    return ("pull",) if reference.digest is not None else ("pull", "resolve")


def descriptor_of(answer: RegistryResponse) -> Descriptor | None:
    """Return the descriptor in a response's header; ``None`` if a part of it is missing."""
    size = answer.headers.get("Content-Length", "")
    try:
        digest = parse_digest(answer.headers.get("Docker-Content-Digest", ""))
    except InvalidDigest:  # also one of another algorithm
        return None
    if coding_of(answer) is not None:  # Content-Length is the encoded body's
        return None
    if not answer.media_type or answer.media_type.startswith("text/") or not _SIZE.fullmatch(size):
        return None
    return Descriptor(answer.media_type, digest, int(size))


async def fetch_manifest(endpoint: Endpoint, reference: Reference) -> tuple[Descriptor, bytes]:
    """Fetch the manifest or index of a reference, and verify its digest if one is known."""
    subject = f"the manifest of {reference}"
    path = f"manifests/{reference.fetched_by}"
    async with endpoint.ask(reference, path, subject, MANIFESTS) as answer:
        promised = reference.digest or answer.headers.get("Docker-Content-Digest")
        if promised is not None and not promised.startswith("sha256:"):
            promised = None  # only SHA-256 can be checked

        def fits(data: bytes) -> bool:
            return looks_like_json(data) if promised is None else digest_of(data) == promised

        data = await read_fitting(answer, MAX_DOCUMENT_SIZE, fits)
    if answer.media_type.startswith("text/"):
        # Some servers have such a page at every path, so another host may still have the manifest.
        raise ManifestError(f"{answer.host} sent a page of text in place of a manifest")
    if len(data) > MAX_DOCUMENT_SIZE:
        raise ManifestError(f"the manifest is larger than {MAX_DOCUMENT_SIZE} bytes")
    digest = await decode_large(digest_of, data)
    if promised is not None and promised.startswith("sha256:") and promised != digest:
        promised = answer.printable_line(promised)
        error = VerificationError(
            f"{answer.host} sent {digest} as {subject}, which should be {promised}"
            f"{named_encoding(answer)}",
            digest=promised,
        )
        raise mark_final(error)
    return Descriptor(answer.media_type, digest, len(data)), data


async def read_verified(
    endpoint: Endpoint | ForeignURL,
    reference: Reference,
    path: str,
    subject: str,
    headers: Mapping[str, str],
    digest: Digest,
    size: int | None,
    max_size: int,
) -> bytes:
    """Fetch the bytes with this digest, and with this size if it is known."""
    async with endpoint.ask(reference, path, subject, headers) as answer:
        data = await read_fitting(
            answer,
            max_size if size is None else size,
            lambda data: size in (None, len(data)) and digest_of(data, digest) == digest,
        )
    if size is None and len(data) > max_size:
        text = f"{subject} has more than {max_size} bytes{named_encoding(answer)}"
        raise mark_final(VerificationError(text, digest=digest))
    if size not in (None, len(data)) or await decode_large(digest_of, data, digest) != digest:
        text = (
            f"{answer.host} sent other bytes than {subject}: the digest or size differs"
            f"{named_encoding(answer)}"
        )
        raise mark_final(VerificationError(text, digest=digest))
    return data


async def decode_large(decode: Callable[[bytes, Unpack[Ts]], T], data: bytes, *args: *Ts) -> T:
    """Call a decoder, in a thread if its input is so large that it takes over a millisecond."""
    if len(data) <= INLINE_SIZE:
        return decode(data, *args)
    if len(data) <= LARGE_SIZE:
        return await trio.to_thread.run_sync(decode, data, *args)
    return await run_large(partial(decode, data, *args))
