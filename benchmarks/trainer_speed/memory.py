"""How much memory something takes at most, measured in a process of its own."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def alone(function: Callable[..., T], *arguments: object) -> T:
    """What a function returns in a process that is started for it. The process imports the function by its name."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class Peak:
    """The most memory (RSS) that this process has had since this was made.

    Attributes:
        before: MiB that it had then.
    """

    def __init__(self) -> None:
        FORGET.write_text("5")  # the peak begins at what there is now
        self.before = _mib("VmRSS")

    @property
    def most(self) -> float:
        """MiB."""
        return _mib("VmHWM")


def _mib(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024
