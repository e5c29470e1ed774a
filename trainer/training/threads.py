"""The number of threads that a training on CPUs takes: as many as there are cores that nothing else uses.

With a server beside it, more threads than free cores make each step many times slower: every operation waits for the
thread that has no core.
"""

import os
import time
from pathlib import Path

STATISTICS = Path("/proc/stat")
SAMPLE = 0.5
"""Seconds that the cores are watched for."""
NAMED = "OMP_NUM_THREADS"
"""The variable by which people, and accelerate, say the number."""


def free_cores(before: str, after: str, cores: frozenset[int]) -> int:
    """How many of some cores were idle, rounded; at least 1.

    Args:
        before, after: two readings of /proc/stat.
        cores: numbers of the cores that this process may use.
    """
    idle = 0.0
    earlier = _times(before)
    for core, (rest, total) in _times(after).items():
        if core in cores and core in earlier:
            rest_before, total_before = earlier[core]
            idle += (rest - rest_before) / max(total - total_before, 1)
    return max(round(idle), 1)


def chosen_threads() -> int | None:
    """The number of threads to take; None where it is named already, or the system does not tell who uses its cores."""
    if os.environ.get(NAMED) or not STATISTICS.is_file():
        return None
    before = STATISTICS.read_text()
    time.sleep(SAMPLE)
    return free_cores(before, STATISTICS.read_text(), frozenset(os.sched_getaffinity(0)))


def _times(text: str) -> dict[int, tuple[int, int]]:
    """Ticks of each core: those that it was idle or waited for a disk, and all."""
    found = {}
    for line in text.splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name != "cpu":
            ticks = [int(field) for field in fields]
            found[int(name[3:])] = (ticks[3] + ticks[4], sum(ticks))
    return found
