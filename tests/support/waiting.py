"""Waits for what a server does by itself."""

import time
from collections.abc import Callable


def within(seconds: float, holds: Callable[[], bool]) -> None:
    """Waits until it holds; fails after so many seconds."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)
