"""How the store does with millions of rollouts: lists, counts, exports, inserts beside them, the removal of a tenth.

    python -m benchmarks.store_at_size [--rows 10000000] [--folder FOLDER] [--json FILE]

It starts a PostgreSQL of its own and fills it with made rollouts of a hundred days (`rows`), by COPY; ten million take
about 20 GB in --folder. With --url it uses that database instead, and fills it if it is empty. Then it measures, and
looks at the plan of every statement that the store sent for it. Exit status 1 if one of them reads all rollouts, or all
rewards, though few are wanted.
"""

import argparse
import asyncio
import json
import platform
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from sqlalchemy import Engine, func, select, text

from benchmarks.postgres import running_postgres
from benchmarks.store_at_size.filling import fill, settle
from benchmarks.store_at_size.measuring import Figures, exports, inserts, pruned, quantiles, reads
from benchmarks.store_at_size.plans import Statements, whole_reads
from benchmarks.store_at_size.queries import Times
from server.api.queries import DELETED
from server.store.filters import Filters
from server.store.rollouts import RolloutStore
from server.store.tables import rollouts

TUNED = {
    "shared_buffers": "2GB",
    "max_wal_size": "4GB",
    "maintenance_work_mem": "512MB",
    "effective_cache_size": "12GB",
}
"""What a PostgreSQL of this size is given: its defaults are for a machine with a quarter of a gigabyte."""

FIRST = "the first time: "  # such figures stand in the file alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--url", help="a database to use, and to change; default: a new PostgreSQL")
    parser.add_argument("--folder", type=Path, help="where its data go; default: the system's temporary folder")
    parser.add_argument("--turns", type=int, default=20, help="of lists and counts")
    parser.add_argument("--exports", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of inserts")
    parser.add_argument("--rate", type=float, default=1000.0, help="of inserts, a second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the result there")
    given = parser.parse_args()
    with ExitStack() as stack:
        url = given.url or stack.enter_context(running_postgres(TUNED, given.folder)).url
        store = RolloutStore(url)
        stack.callback(store.close)
        figures, whole = measure(given, store)
        size = _size(store._engine)
    _report(given, figures, size)
    for one in dict.fromkeys(whole):
        print(f"\nreads everything: {one}")
    sys.exit(1 if whole else 0)


def measure(given: argparse.Namespace, store: RolloutStore) -> tuple[Figures, list[str]]:
    """Figures, and what reads whole tables."""
    figures, statements, engine = Figures(), Statements(), store._engine
    with engine.connect() as connection:
        newest = connection.scalar(select(func.max(rollouts.c.created)))
    if newest is None:
        for name, seconds in fill(engine, given.rows, given.seed).items():
            figures.note(f"{name}, s", seconds)
        newest = time.time()
    times = Times(newest)
    first = Figures()
    with statements.listening(engine):
        reads(store, times, first, 1)
        exports(store, Filters(metadata={"qsharp_run": "run-7"}), Figures(), 1)
    reads(store, times, figures, given.turns)
    exports(store, times.last_day, figures, given.exports)
    asyncio.run(_writes(given, store, figures, times, statements))
    figures.taken |= {FIRST + name: taken for name, taken in first.taken.items()}
    settle(engine)
    found = whole_reads(engine, statements, ("rollouts", "rewards"))
    return figures, [f"{one.what}\n{one.statement}" for one in found]


async def _writes(
    given: argparse.Namespace, store: RolloutStore, figures: Figures, times: Times, statements: Statements
) -> None:
    beside: dict[str, Callable[[], None] | None] = {
        "alone": None,
        "beside lists and counts": lambda: reads(store, times, Figures(), 1),
        "beside exports": lambda: exports(store, times.last_day, Figures(), 1),
    }
    for name, call in beside.items():
        waits = await inserts(store, given.seconds, given.rate, call)
        for which, wait in quantiles(waits).items():
            figures.note(f"commit {name}, {which}, ms", wait)
    old = replace(times.old, trained=False)
    with statements.listening(store._engine):
        await store.prune(old, DELETED, owner=None)
        await store.prune(replace(old, trained_until=times.now), DELETED, owner=None)
    await _prune(store, old, figures, given.rate)


async def _prune(store: RolloutStore, old: Filters, figures: Figures, rate: float) -> None:
    """Deletes the old ones, while others are stored at a tenth of the rate."""
    going = asyncio.create_task(pruned(store, old, DELETED, figures))
    waits: list[float] = []
    while not going.done():
        waits += await inserts(store, 1.0, rate / 10, None)
    deleted, seconds = await going
    figures.note("prune, rows", deleted)
    figures.note("prune, rows a second", deleted / seconds)
    for which, wait in quantiles(waits).items():
        figures.note(f"commit beside a prune, {which}, ms", wait)


def _size(engine: Engine) -> dict[str, float]:
    """Bytes of the tables and of each index, in PostgreSQL."""
    if engine.dialect.name != "postgresql":
        return {}
    query = text(
        "SELECT relname, CASE WHEN relkind = 'r' THEN pg_table_size(oid) ELSE pg_relation_size(oid) END FROM pg_class "
        "WHERE relname ~ '^(ix_|pk_)?(rollouts|rewards)' AND relkind IN ('r', 'i') ORDER BY 1"
    )
    with engine.connect() as connection:
        return {name: float(size) for name, size in connection.execute(query)}


def _report(given: argparse.Namespace, figures: Figures, size: dict[str, float]) -> None:
    for name, taken in figures.taken.items():
        if name.startswith(FIRST):
            continue
        ordered = sorted(taken)
        spread = f"({ordered[0]:,.4g} to {ordered[-1]:,.4g}; n = {len(taken)})" if len(taken) > 1 else ""
        print(f"{name:70} {ordered[len(ordered) // 2]:12,.4g}   {spread}")
    for name, bytes_ in size.items():
        print(f"{name:70} {bytes_ / 2**20:12,.4g} MiB")
    if given.json:
        settings = {"rows": given.rows, "machine": platform.machine(), "python": platform.python_version()}
        given.json.write_text(
            json.dumps({"settings": settings, "bytes": size, "figures": figures.taken}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
