"""How much one key may ask for: requests in a time, and requests at once."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from qsharp_core.errors import ConfigError
from server.errors import TooManyRequestsError

FULL_SECONDS = 1  # after which who has too many requests at once may try again


class Quotas:
    """Counts the requests of each key's holder.

    Args:
        rate: for instance `600/minute`; None for no limit.
        concurrent: most requests of a holder that are on their way; None for no limit.

    Raises:
        ConfigError: `rate` cannot be read.
    """

    def __init__(self, rate: str | None = None, concurrent: int | None = None) -> None:
        self._rate = None if rate is None else parse_rate(rate)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._concurrent = concurrent
        self._running: Counter[str] = Counter()

    @contextmanager
    def request(self, holder: str) -> Iterator[None]:
        """Counts a request of this holder from beginning to end.

        Raises:
            TooManyRequestsError: it is one too many.
        """
        if self._concurrent is not None and self._running[holder] >= self._concurrent:
            raise TooManyRequestsError(
                f"this key has {self._concurrent} requests on their way, and may not have more", FULL_SECONDS
            )
        if self._rate is not None and not self._limiter.hit(self._rate, holder):
            reset = self._limiter.get_window_stats(self._rate, holder).reset_time
            raise TooManyRequestsError(
                f"this key has sent {self._rate}, and may not send more", max(1, math.ceil(reset - time.time()))
            )
        self._running[holder] += 1
        try:
            yield
        finally:
            self._running[holder] -= 1
            if not self._running[holder]:
                del self._running[holder]


def parse_rate(rate: str) -> RateLimitItem:
    """A rate such as `10/second` or `600/minute`.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return parse(rate)
    except ValueError as error:
        raise ConfigError(f"--rate-limit must be a number of requests a time, as 600/minute; got {rate!r}") from error
