"""Which of an index's images is meant: one set of rules for registries and for layouts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NoReturn

from ._errors import PlatformError
from ._manifest import Descriptor, Index
from ._platform import Platform, choose

__all__ = ["MAX_INDEX_DEPTH", "check_platform", "choose_image"]

MAX_INDEX_DEPTH: Final = 4
"""How many indexes may lead to one another. The specification sets no number."""

_SHOWN: Final = 20
_WIDTH: Final = 64


def choose_image(name: str, index: Index, wanted: Platform) -> Descriptor:
    """The entry of an index that fits best (see `choose`): of an image, or of another index.

    Args:
        name: What the index is called, for the message.
        index: Where to choose from.
        wanted: What for.

    Raises:
        PlatformError: if there is none. It lists what there is.
    """
    images = index.images
    platforms = [image.platform for image in images]
    chosen = choose(wanted, platforms)
    if chosen is None:
        _refuse(name, wanted, platforms)
    return images[chosen]


def check_platform(name: str, platform: Platform, wanted: Platform) -> None:
    """Check that an image's own platform is one that ``wanted`` can run.

    Raises:
        PlatformError: if it is not.
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
