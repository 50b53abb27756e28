"""The choice of an image from an index: the same rules for registries and for layouts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Final, NoReturn

from ._errors import ManifestError, PlatformError
from ._manifest import Descriptor, Index
from ._platform import Platform, choose

__all__ = ["MAX_INDEX_DEPTH", "check_platform", "choose_image", "walk_index"]

MAX_INDEX_DEPTH: Final = 4
"""The largest number of nested indexes. The specification sets no limit."""

_SHOWN: Final = 20
_WIDTH: Final = 64


async def walk_index(
    root: Descriptor,
    *,
    is_index: Callable[[Descriptor], Awaitable[bool]],
    entry_of: Callable[[Descriptor], Awaitable[Descriptor]],
) -> tuple[Descriptor, Descriptor | None]:
    """Walk from an index down to the manifest of an image.

    Args:
        root: An index or a manifest.
        is_index: Returns whether a descriptor is that of an index.
        entry_of: Chooses an entry of an index.

    Returns:
        The descriptors of the manifest and of the top index; ``None`` if ``root`` is a manifest.

    Raises:
        ManifestError: if more than `MAX_INDEX_DEPTH` indexes are nested.
        Exception: errors of ``is_index`` and ``entry_of``.
    """
    index: Descriptor | None = None
    descriptor = root
    for _ in range(MAX_INDEX_DEPTH):
        if not await is_index(descriptor):
            return descriptor, index
        if index is None:
            index = descriptor
        descriptor = await entry_of(descriptor)
    if await is_index(descriptor):
        raise ManifestError(f"more than {MAX_INDEX_DEPTH} indexes lead to one another")
    return descriptor, index


def choose_image(name: str, index: Index, wanted: Platform) -> Descriptor:
    """Return the entry of an index that fits a platform best: of an image or of another index.

    Args:
        name: The name of the index, for the message.
        index: The index.
        wanted: The platform; see `choose`.

    Raises:
        PlatformError: if no entry fits. The error lists the platforms of the entries.
    """
    images = index.images
    platforms = [image.platform for image in images]
    chosen = choose(wanted, platforms)
    if chosen is None:
        _refuse(name, wanted, platforms)
    return images[chosen]


def check_platform(name: str, platform: Platform, wanted: Platform) -> None:
    """Check that an image's own platform can run on ``wanted``.

    Raises:
        PlatformError: if it cannot.
    """
    if choose(wanted, [platform]) is None:
        _refuse(name, wanted, [platform])


def _refuse(name: str, wanted: Platform, platforms: Iterable[Platform | None]) -> NoReturn:
    there = sorted({str(platform)[:_WIDTH] for platform in platforms if platform is not None})
    shown = ", ".join(there[:_SHOWN]) + (", …" if len(there) > _SHOWN else "")
    raise PlatformError(
        f"{name} has no image for {wanted}, but for {shown or 'nothing'}: "
        "ask for one of these platforms"
    )
