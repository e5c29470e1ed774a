"""What the server's processes hold, looked at again and again."""

import contextlib
from dataclasses import dataclass
from statistics import median

import psutil

FEW = 8
FEWEST = 30  # looks from which growth can be told from settling down


@dataclass(frozen=True)
class Growth:
    """How one quantity went on.

    Attributes:
        early, late: its level in the second and in the last fifth of the time.
        most: which late level is no growth.
    """

    what: str
    early: float
    late: float
    most: float

    @property
    def grown(self) -> bool:
        return self.late > self.most


class Footprint:
    """Resident memory (bytes), threads and open descriptors of all child processes of this one, summed."""

    def __init__(self) -> None:
        self.memory: list[float] = []
        self.threads: list[float] = []
        self.descriptors: list[float] = []

    def look(self) -> float:
        """Notes what is held now, and returns the memory."""
        memory = threads = descriptors = 0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess), process.oneshot():
                memory += process.memory_info().rss
                threads += process.num_threads()
                descriptors += process.num_fds()
        self.memory.append(memory)
        self.threads.append(threads)
        self.descriptors.append(descriptors)
        return float(memory)

    def growth(self) -> list[Growth]:
        """What grew from the second fifth of the time to the last; nothing is said of less than `FEWEST` looks.

        Memory may fluctuate by a fiftieth and 32 MiB. Connections come and go, so of threads and descriptors the least
        of each fifth counts, and may be a few more: thousands of requests that leave one each would be noticed.
        """
        if len(self.memory) < FEWEST:
            return []
        fifth = len(self.memory) // 5
        early, late = slice(fifth, 2 * fifth), slice(-fifth, None)
        memory = [median(self.memory[part]) / 2**20 for part in (early, late)]
        rows = [Growth("memory, MiB", memory[0], memory[1], 1.02 * memory[0] + 32)]
        for what, seen in (("threads", self.threads), ("descriptors", self.descriptors)):
            least = [min(seen[part]) for part in (early, late)]
            rows.append(Growth(what, least[0], least[1], least[0] + FEW))
        return rows
