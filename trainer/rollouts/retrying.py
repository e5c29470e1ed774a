"""When a failed request is sent again, and when it is given up.

A `TransientError` is tried again, with exponential backoff and jitter, until `patience` seconds are over, so that a
server may be restarted under a running command. A 500 is tried `INTERNAL_ERRORS_TRIED` times: it may be the request's
own fault (a critic that fails on it), or come from an engine that is about to go down.
"""

from collections.abc import Callable
from typing import Any

from tenacity import RetryCallState, retry_if_exception_type, wait_random_exponential

from trainer.rollouts.errors import LONGEST_WAIT, TransientError

INTERNAL_ERRORS_TRIED = 4
"""Attempts at a request that is answered with a 500."""

_backoff = wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT)


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
