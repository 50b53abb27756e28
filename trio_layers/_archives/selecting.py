"""The choice among the images of an archive or layout."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

import trio

from .._digest import Digest
from .._errors import ArchiveError, InvalidDigest
from .._printable import printable_value
from .._reference import Reference
from .candidates import MAX_NAMES, Candidate, Listing

__all__ = ["digest_prefix", "select"]

_SHOWN: Final = 10


def digest_prefix(text: str) -> str:
    """Normalise a digest or the beginning of one.

    Args:
        text: 1 to 64 hex digits, with or without ``sha256:`` before them.

    Raises:
        InvalidDigest: if the text is anything else.
    """
    digits = text.removeprefix("sha256:")
    if not 1 <= len(digits) <= 64 or set(digits) - set("0123456789abcdef"):
        raise InvalidDigest(text)
    return f"sha256:{digits}"


async def select(
    source: str,
    listing: Listing,
    *,
    reference: Reference | None,
    prefix: str | None,
    everything: bool,
    manifest_digest: Callable[[Candidate], Awaitable[Digest | None]],
) -> list[tuple[Candidate, tuple[Reference, ...]]]:
    """Choose images, and the names under which the store gets them.

    Args:
        source: The name of the source, for messages.
        listing: The images to choose from.
        reference: The name of one image, in the source or in the store.
        prefix: The beginning of a digest of one image.
        everything: Whether to choose images without names as well.
        manifest_digest: Computes the digest of the manifest that the import makes for an image of
            a docker-archive.

    Returns:
        The images with their names. The caller names an image without names by its digest.

    Raises:
        ArchiveError: if no image matches, or the choice is ambiguous.
    """
    candidates = listing.candidates
    if not candidates:
        raise ArchiveError(f"{source} has no image")
    pinned = None if reference is None or prefix is not None else reference.digest
    if pinned is not None and (len(candidates) > 1 or _matching(candidates, pinned)):
        prefix = pinned
    if prefix is not None:
        meant = _matching(candidates, prefix)
        if not meant:
            for each in (*candidates, *listing.artifacts):
                if any(digest.startswith(prefix) for digest in each.contents.artifacts):
                    raise ArchiveError(
                        f"{source}: {prefix} is no image, but an artifact such as a signature: "
                        f"choose an image: {'; '.join(map(str, candidates[:_SHOWN]))}"
                    )
            # A docker-archive has no manifests, so their digests are computed.
            made = [(each, await manifest_digest(each)) for each in candidates if each.docker]
            meant = [each for each, digest in made if digest and digest.startswith(prefix)]
        if reference is not None and len(meant) > 1:
            meant = [each for each in meant if reference in each.names] or meant
        _check_one(source, listing, meant, str(reference) if pinned is not None else prefix)
        if reference is None:
            await trio.to_thread.run_sync(_check_names, source, meant)
        return [(meant[0], (reference,) if reference is not None else tuple(meant[0].names))]
    if reference is not None:
        meant = list(candidates)
        if len(meant) > 1:
            meant = [each for each in candidates if reference in each.names]
            meant = meant or [each for each in candidates if each.tag and each.tag == reference.tag]
        _check_one(source, listing, meant, str(reference))
        return [(meant[0], (reference,))]
    nameless = [each for each in candidates if not each.names]
    if nameless and not everything:
        tag = f" with the tag {printable_value(nameless[0].tag)}, but" if nameless[0].tag else ""
        more = f", and {len(nameless) - 1} more" if len(nameless) > 1 else ""
        raise ArchiveError(
            f"{source} has an image{tag} without a name{more}: name it (reference), choose one by "
            f"its digest (digest), or import all, by their digests where they have no names (all): "
            + "; ".join(map(str, nameless[:_SHOWN]))
        )
    await trio.to_thread.run_sync(_check_names, source, candidates)
    return [(candidate, tuple(candidate.names)) for candidate in candidates]


def _check_names(source: str, candidates: Iterable[Candidate]) -> None:
    holders: dict[Reference, Candidate] = {}
    for candidate in candidates:
        for name in candidate.names:
            other = holders.setdefault(name, candidate)
            if other is not candidate:
                raise ArchiveError(
                    f"{source} has two images of one name: {name} is {other.identity} in "
                    f"{other.source}, and {candidate.identity} in {candidate.source}: "
                    "choose one by its digest (digest)"
                )
    if len(holders) > MAX_NAMES:
        raise ArchiveError(f"{source} has more than {MAX_NAMES} names for images")


def _matching(candidates: Iterable[Candidate], prefix: str) -> list[Candidate]:
    """Find the images with a digest that begins with the prefix."""
    chosen: dict[object, Candidate] = {}
    for candidate in candidates:
        for digest in candidate.digests():
            if digest.startswith(prefix):
                part = candidate.part(digest)
                key = tuple(root.digest for root in part.roots) or part.config
                # An image's own entry is preferred to the same image inside an index.
                if key not in chosen or part.roots == candidate.roots:
                    chosen[key] = part
    return list(chosen.values())


def _check_one(source: str, listing: Listing, meant: Sequence[Candidate], text: str) -> None:
    if len(meant) == 1:
        return
    if meant:
        raise ArchiveError(
            f"{source} has {len(meant)} images that {text} may mean: choose one by its digest: "
            + "; ".join(f"{each.identity} in {each.source}" for each in meant[:_SHOWN])
        )
    there = "; ".join(map(str, listing.candidates[:_SHOWN]))
    count = len(listing.candidates)
    what = "an image, and it is not" if count == 1 else f"{count} images, and none of them is"
    raise ArchiveError(
        f"{source} has {what} {text}: choose one by its name (reference) or digest (digest): "
        f"{there}"
    )
