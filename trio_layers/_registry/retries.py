"""Retries requests after transient failures."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeAlias, final

import attrs
import trio

from .._errors import LayersError, RateLimited, RegistryError, is_final
from .._progress import retrying
from .error_responses import PATIENCE

__all__ = ["MAX_ATTEMPTS", "Announce", "Retries", "is_transient"]

log = logging.getLogger("trio_layers.registry")

MAX_ATTEMPTS: Final = 5
"""The number of attempts at one request, including the first."""
FIRST_DELAY: Final = 0.5
"""The longest pause before the second attempt, in seconds. Each further pause may be twice as
long."""

Announce: TypeAlias = Callable[[str], Awaitable[object]]
"""Shows the text of a countdown to the caller."""


def is_transient(error: LayersError) -> bool:
    """Return whether the failed request may succeed a moment later."""
    return isinstance(error, RegistryError) and error.transient and not is_final(error)


@final
@attrs.define(eq=False)
class Retries:
    """Counts the attempts at one request, and pauses between them.

    The pause before attempt n is a random time of at most ``0.5 * 2 ** (n - 2)`` seconds ("full
    jitter"), so that many clients that fail at once do not retry at once. A ``Retry-After`` is
    obeyed instead, while all of one request's waits together are no longer than a minute.

    Args:
        announce: Shows each countdown. ``None``: no countdown is shown.
        tick: Scales the random pauses: their seconds last this many real seconds.
        only_if_asked: Whether to retry only if a host sends ``Retry-After``. This is for a layer's
            blob, which the download manager retries with Docker's countdown.
    """

    announce: Announce | None = None
    tick: float = attrs.field(default=1.0, kw_only=True)
    only_if_asked: bool = attrs.field(default=False, kw_only=True)
    _failures: int = attrs.field(default=0, init=False)
    _patience: float = attrs.field(default=PATIENCE, init=False)

    def reset(self) -> None:
        """Restart the count, because a request succeeded and another one follows."""
        self._failures = 0
        self._patience = PATIENCE

    async def wait(self, errors: Sequence[LayersError]) -> bool:
        """Wait for the next attempt.

        Args:
            errors: The transient failures of this attempt, one for each host that failed so.

        Returns:
            ``True`` after the pause; ``False``, without a pause, if no other attempt is due.
        """
        waits = [each.retry_after for each in errors if isinstance(each, RateLimited)]
        asked = max((wait for wait in waits if wait is not None), default=None)
        self._failures += 1
        if not errors or self._failures >= MAX_ATTEMPTS or (self.only_if_asked and asked is None):
            return False
        delay = random.uniform(0, FIRST_DELAY * 2 ** (self._failures - 1)) * self.tick
        if asked is not None:
            self._patience -= asked
            if self._patience < 0:
                return False
            # The first retry follows Retry-After exactly, even if that is 0. Later retries wait at
            # least for the random pause.
            delay = asked if self._failures == 1 else max(asked, delay)
        log.info("attempt %d in %.1f seconds: %s", self._failures + 1, delay, errors[-1])
        await self._count_down(delay)
        return True

    async def _count_down(self, delay: float) -> None:
        if self.announce is None:
            await trio.sleep(delay)
            return
        end = trio.current_time() + delay
        for left in range(max(1, math.ceil(delay)), 0, -1):
            await self.announce(retrying(left))
            await trio.sleep_until(end - left + 1)
