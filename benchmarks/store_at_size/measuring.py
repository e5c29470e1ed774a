"""Times what the store does; a figure is a list of measurements, one of each turn."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import psutil

from benchmarks.store_at_size.queries import Times, counts, lists, pages
from benchmarks.store_at_size.rows import MODEL, OWNERS, template
from qsharp_core.rollouts import parquet
from qsharp_core.rollouts.records import Rollout, new_id
from server.store.filters import Filters
from server.store.rollouts import RolloutStore

MIB = 2**20
NEW_REWARDS = 500
"""So many rewards came since a watch looked the last time."""
PATIENCE = 20.0  # seconds for one list or count, however slow it is


@dataclass
class Figures:
    """Measurements, by what was measured."""

    taken: dict[str, list[float]] = field(default_factory=dict)

    def note(self, name: str, value: float) -> None:
        self.taken.setdefault(name, []).append(value)

    def timed(self, name: str, call: Callable[[], object], times: int) -> None:
        """Milliseconds of a call, many times, but no more often than in `PATIENCE`."""
        begun = time.perf_counter()
        for _ in range(times):
            started = time.perf_counter()
            call()
            self.note(f"{name}, ms", 1e3 * (time.perf_counter() - started))
            if time.perf_counter() - begun > PATIENCE:
                return


class Memory:
    """The greatest memory of this process while it is watched, in bytes beyond what it had at the start."""

    def __init__(self) -> None:
        self.grown = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        process, ended = psutil.Process(), threading.Event()
        before = process.memory_info().rss

        def look() -> None:
            while not ended.wait(0.05):
                self.grown = max(self.grown, process.memory_info().rss - before)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def reads(store: RolloutStore, times: Times, figures: Figures, turns: int) -> None:
    """Lists and counts."""
    for name, filters in lists(times).items():
        for order in ("asc", "desc"):
            for which, call in pages(store, filters, order):
                figures.timed(f"list {name}, {order}, {which} page", call, turns)
    for name, call in counts(store, times, store.last_reward() - NEW_REWARDS).items():
        figures.timed(f"count {name}", call, turns)


def exports(store: RolloutStore, filters: Filters, figures: Figures, turns: int) -> None:
    """Exports of what the filters leave, as the server sends them."""
    for _ in range(turns):
        memory, rows, written = Memory(), 0, 0

        def counted() -> Iterator[list[Rollout]]:
            nonlocal rows
            for batch in store.batches(filters, parquet.BATCH, owner=None):
                rows += len(batch)
                yield batch

        started = time.perf_counter()
        with memory.watched():
            for piece in parquet.write(counted()):
                written += len(piece)
        figures.note("export, rows a second", rows / (time.perf_counter() - started))
        figures.note("export, rows", rows)
        figures.note("export, MiB", written / MIB)
        figures.note("export, memory beyond the start, MiB", memory.grown / MIB)


async def inserts(store: RolloutStore, seconds: float, rate: float, beside: Callable[[], None] | None) -> list[float]:
    """Milliseconds until each commit, of rollouts that come at a fixed rate, whether or not those before are stored.

    Args:
        store: takes them.
        seconds: for so long.
        rate: rollouts a second.
        beside: is called in a thread of its own again and again meanwhile.
    """
    rng = random.Random(7)
    kinds = [template(rng, guided=i % 2 == 1) for i in range(50)]
    waits: list[float] = []
    ended = threading.Event()

    def again() -> None:
        while beside is not None and not ended.is_set():
            beside()

    async def one(due: float) -> None:
        kind = rng.choice(kinds)
        new = replace(
            kind, id=new_id(), owner=rng.choice(OWNERS), request_id=f"cmpl-{new_id()}", created=time.time(),
            model=MODEL, critic="sums@50" if kind.eta is not None else None,
            metadata={"task": "sums", "qsharp_run": "inserted", "qsharp_item": new_id()},
        )  # fmt: skip
        await store.add([new])
        waits.append(1e3 * (time.perf_counter() - due))

    thread = asyncio.create_task(asyncio.to_thread(again))
    tasks, started = [], time.perf_counter()
    for i in range(int(seconds * rate)):
        due = started + i / rate
        if (early := due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        tasks.append(asyncio.create_task(one(due)))
    await asyncio.gather(*tasks)
    ended.set()
    await thread
    return waits


def quantiles(waits: list[float]) -> dict[str, float]:
    """The middle, the tail and the end."""
    ordered = sorted(waits)
    return {
        "p50": ordered[len(ordered) // 2],
        "p99": ordered[len(ordered) * 99 // 100],
        "longest": ordered[-1],
    }


async def pruned(store: RolloutStore, filters: Filters, batch: int, figures: Figures) -> tuple[int, float]:
    """Deletes all that the filters leave, batch after batch, as the command does; how many, and in how many seconds."""
    started, deleted = time.perf_counter(), 0
    more = True
    while more:
        begun = time.perf_counter()
        result = await store.prune(filters, batch, owner=None)
        figures.note("prune, a batch, ms", 1e3 * (time.perf_counter() - begun))
        deleted, more = deleted + result.deleted, result.more
        filters = replace(filters, created_after=result.until)
    return deleted, time.perf_counter() - started
