"""Fills an empty store past its writer: with COPY in PostgreSQL, with plain inserts in SQLite."""

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Engine, insert, text
from sqlalchemy.schema import CreateIndex, DropIndex
from tqdm import tqdm

from benchmarks.store_at_size.rows import VARYING, Made, made, templates
from qsharp_core.rollouts.text import to_json
from server.store.tables import Parameters, rewards, rollouts

KINDS = 500
CHUNK = 5000
REWARD = ("rollout_id", "reward", "source", "created", "given_by")


def fill(engine: Engine, count: int, seed: int) -> dict[str, float]:
    """Stores rollouts with their rewards, and has the database look at what it has.

    Returns:
        Seconds that it took to copy the rows, and to build each index (PostgreSQL alone).
    """
    rng = random.Random(seed)
    kinds = templates(rng, KINDS)
    rows = tqdm(made(rng, count, KINDS, time.time()), total=count, unit="row", desc="filled", disable=None)
    if engine.dialect.name == "sqlite":
        with engine.begin() as connection:
            for chunk in _chunks(rows, CHUNK):
                connection.execute(insert(rollouts), [kinds[one.template] | one.own for one in chunk])
                connection.execute(insert(rewards), [dict(one.rewarded) for one in chunk if one.rewarded is not None])
            connection.execute(text("ANALYZE"))
        return {}
    return _fill_postgresql(engine, kinds, rows)


def _fill_postgresql(engine: Engine, kinds: list[Parameters], rows: Iterable[Made]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    # The foreign key of rewards needs the one of ids.
    found = [index for table in (rollouts, rewards) for index in table.indexes if index.name != "ix_rollouts_id"]
    indexes = sorted(found, key=lambda index: str(index.name))
    with engine.begin() as connection:
        for index in indexes:
            connection.execute(DropIndex(index))
    started = time.perf_counter()
    with engine.begin() as connection:
        _copy(connection, kinds, rows)
        for table in ("rollouts", "rewards"):
            connection.execute(text(f"SELECT setval('{table}_seq_seq', (SELECT max(seq) FROM {table}))"))
    seconds["copied"] = time.perf_counter() - started
    for index in indexes:
        started = time.perf_counter()
        with engine.begin() as connection:
            connection.execute(CreateIndex(index))
        seconds[f"built {index.name}"] = time.perf_counter() - started
    settle(engine)
    return seconds


def settle(engine: Engine) -> None:
    """Does what PostgreSQL's autovacuum does in time: plans need statistics, scans of an index alone a map of pages."""
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM (ANALYZE) rollouts"))
            connection.execute(text("VACUUM (ANALYZE) rewards"))


def _copy(connection: Connection, kinds: list[Parameters], rows: Iterable[Made]) -> None:
    constant = [name for name in kinds[0] if name not in VARYING]
    tails = ["\t".join(_text(kind[name]) for name in constant) + "\n" for kind in kinds]
    driver: Any = connection.connection.driver_connection
    columns, own = ", ".join((*VARYING, *constant)), ", ".join(REWARD)
    with driver.cursor() as cursor:
        for chunk in _chunks(rows, CHUNK):
            with cursor.copy(f"COPY rollouts ({columns}) FROM STDIN") as copy:
                for one in chunk:
                    copy.write(_line(one.own, VARYING) + "\t" + tails[one.template])
            with cursor.copy(f"COPY rewards ({own}) FROM STDIN") as copy:
                for one in chunk:
                    if one.rewarded is not None:
                        copy.write(_line(dict(one.rewarded), REWARD) + "\n")


def _chunks(rows: Iterable[Made], size: int) -> Iterator[list[Made]]:
    left = iter(rows)
    while chunk := list(islice(left, size)):
        yield chunk


def _line(values: Parameters, columns: Sequence[str]) -> str:
    return "\t".join(_text(values[name]) for name in columns)


def _text(value: Any) -> str:
    """A value as COPY reads it."""
    if value is None:
        return r"\N"
    if isinstance(value, bytes):
        return r"\\x" + value.hex()
    plain = to_json(value) if isinstance(value, dict | list) else str(value)
    return plain.replace("\\", r"\\").replace("\t", r"\t").replace("\n", r"\n").replace("\r", r"\r")
