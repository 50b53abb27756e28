"""Retries: which errors allow another attempt, after which time, and the visible countdown."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import attrs
import trio

from .._arguments import check_seconds, check_whole
from .._errors import is_final, text_of
from .._progress import retrying
from .foreign import log
from .transfer import CONTEXT_CANCELED, Transfer

__all__ = ["RetryPolicy"]

T = TypeVar("T")


@attrs.frozen
class RetryPolicy:
    """The rules for retrying a failed download.

    Attributes:
        max_attempts: Maximum number of attempts at a download.
        tick: Seconds between two steps of the countdown.
    """

    max_attempts: int
    tick: float

    def __attrs_post_init__(self) -> None:
        check_whole("max_download_attempts", self.max_attempts, least=1)
        check_seconds("retry_tick", self.tick)

    async def run(self, attempt_once: Callable[[], Awaitable[T]], transfer: Transfer) -> T:
        """Call ``attempt_once`` until it succeeds.

        The slot is kept meanwhile, which protects a registry in trouble from more requests.
        """
        attempt = 1
        while True:
            transfer.if_cancelled = CONTEXT_CANCELED
            # A slot may come in the same tick as a cancellation. Then no attempt starts.
            await trio.lowlevel.checkpoint_if_cancelled()
            try:
                return await attempt_once()
            except Exception as error:
                if transfer.scope.cancel_called:
                    raise
                if attempt >= self.max_attempts or is_final(error):
                    log(
                        logging.INFO,
                        "download failed after %d attempts: %s",
                        attempt,
                        text_of(error),
                    )
                    raise
                log(
                    logging.INFO,
                    "download failed, retrying (%d/%d): %s",
                    attempt,
                    self.max_attempts,
                    text_of(error),
                )
            transfer.if_cancelled = "download cancelled during retry delay"
            # A stopped attempt may have raised because it was stopped.
            await trio.lowlevel.checkpoint_if_cancelled()
            for ticks_left in range(attempt * 5, 0, -1):
                transfer.report(retrying(ticks_left))
                await trio.sleep(self.tick)
            attempt += 1
