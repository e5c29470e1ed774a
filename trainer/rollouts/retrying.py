"""When a failed request is sent again, and when it is given up.

A `TransientError` is tried again, with exponential backoff and jitter, until `patience` seconds are over, so that a
server may be restarted under a running command. A server that has never answered is given up sooner: its address is
wrong, or it was not started. A 500 is tried `INTERNAL_ERRORS_TRIED` times: it may be the request's
own fault (a critic that fails on it), or come from an engine that is about to go down.
"""

import math
import time
from collections.abc import Callable
from typing import Any

from tenacity import RetryCallState, retry_if_exception_type, wait_random_exponential

from trainer.rollouts.errors import LONGEST_WAIT, TransientError, describe

INTERNAL_ERRORS_TRIED = 4
"""Attempts at a request that is answered with a 500."""

PATIENCE = 600.0
"""Seconds after which a request that keeps failing is given up."""
FIRST_PATIENCE = 10.0
"""The same, as long as the server has never answered."""
TELL_EVERY = 2.0
"""Seconds between two messages that requests are tried again."""
QUIET = 30.0
"""Seconds for which a request waits for a busy server before anything is said of it."""

_backoff = wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT)


Tell = Callable[[str], None]
"""Shows people a line of text."""


class Patience:
    """How long the requests to one server are tried, and what is said of it meanwhile.

    Args:
        seconds: after which a request that keeps failing is given up. None is `PATIENCE`, and `FIRST_PATIENCE` until
            the server has answered once.
        tell: is told that requests fail and are tried again: at once, and every few seconds; that a server is busy
            only after a while.

    Attributes:
        reached: whether the server has answered.
        retries: how many attempts were made beyond the first ones.
    """

    def __init__(self, seconds: float | None, tell: Tell = lambda text: None) -> None:
        self.seconds = PATIENCE if seconds is None else seconds
        self.reached = False
        self.retries = 0
        self._first = FIRST_PATIENCE if seconds is None else seconds
        self._tell = tell
        self._told = -math.inf

    def policy(self) -> dict[str, Any]:
        """Arguments of tenacity's `Retrying` and `AsyncRetrying`, for a request that is sent now."""
        patience = self.seconds if self.reached else self._first
        return {**policy(patience), "before_sleep": lambda state: self._again(state, patience)}

    def unreachable(self, url: str, error: Exception) -> TransientError:
        """The error of a server that cannot be connected to."""
        hint = "" if self.reached else "; does a server run there? (--url, QSHARP_URL)"
        return TransientError(f"{url} cannot be reached: {describe(error)}{hint}")

    def _again(self, state: RetryCallState, patience: float) -> None:
        self.retries += 1
        now, spent, error = time.monotonic(), state.seconds_since_start or 0.0, _error_of(state)
        if error is not None and error.busy and spent < QUIET:
            return
        if now - self._told >= TELL_EVERY and state.outcome is not None:
            self._told = now
            self._tell(f"{state.outcome.exception()}: trying again ({spent:.0f} of {patience:.0f} s)")


def policy(patience: float) -> dict[str, Any]:
    """Arguments of tenacity's `Retrying` and `AsyncRetrying`.

    Args:
        patience: seconds, counted from the first attempt, after which no further one is made.
    """
    return {
        "retry": retry_if_exception_type(TransientError), "wait": _wait, "stop": _stop_after(patience), "reraise": True,
    }  # fmt: skip


def _stop_after(patience: float) -> Callable[[RetryCallState], bool]:
    internal_errors = 0

    def stop(state: RetryCallState) -> bool:
        nonlocal internal_errors
        error = _error_of(state)
        internal_errors += error is not None and error.internal
        return internal_errors >= INTERNAL_ERRORS_TRIED or (state.seconds_since_start or 0.0) >= patience

    return stop


def _wait(state: RetryCallState) -> float:
    error = _error_of(state)
    return (error.wait if error is not None else 0.0) + _backoff(state)


def _error_of(state: RetryCallState) -> TransientError | None:
    error = state.outcome.exception() if state.outcome else None
    return error if isinstance(error, TransientError) else None
