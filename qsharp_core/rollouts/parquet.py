"""Writes rollouts to Parquet files and reads them again, checked; `qsharp_core.wire.columns` has the columns.

`datasets`, pandas and pyarrow read these files, and files that such tools wrote are read here.
"""

import json
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from qsharp_core.errors import RolloutError
from qsharp_core.rollouts.records import Reward, Rollout, Sampling
from qsharp_core.rollouts.text import to_json
from qsharp_core.wire.columns import JSON, SAMPLING, SCHEMA

BATCH = 1000  # rollouts in a row group
MEDIA_TYPE = "application/vnd.apache.parquet"
Row = dict[str, Any]  # by the name of the column; lists and JSON as Python has them


def write(batches: Iterable[list[Rollout]]) -> Iterator[bytes]:
    """The bytes of one Parquet file, in pieces. The file is complete only when the iterator has ended."""
    sink = BytesIO()
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd") as writer:
        for batch in batches:
            writer.write_table(pa.Table.from_pylist([_to_row(rollout) for rollout in batch], SCHEMA))
            yield _drained(sink)
    yield _drained(sink)


def read(source: Path | IO[bytes]) -> Iterator[list[Rollout]]:
    """The rollouts of a Parquet file, checked, in batches.

    Raises:
        RolloutError: this is not a Parquet file, or a column is missing or holds something else; names the column.
    """
    try:
        file = pq.ParquetFile(source)
    except (pa.ArrowException, OSError) as error:
        raise RolloutError(f"this is not a Parquet file: {error}") from error
    with file:
        present = set(file.schema_arrow.names)
        for wanted in SCHEMA:
            if wanted.name not in present and not wanted.nullable:
                raise RolloutError(f"column {wanted.name} is missing", wanted.name)
        names = [field.name for field in SCHEMA if field.name in present]
        for batch in file.iter_batches(BATCH, columns=names):
            yield _checked(pa.Table.from_batches([batch]))


def _checked(table: pa.Table) -> list[Rollout]:
    columns = {}
    for wanted in SCHEMA:
        if wanted.name not in table.column_names:
            columns[wanted.name] = [None] * len(table)
            continue
        column = table[wanted.name]
        try:
            # Other tools write wider integers and large strings, and lists with other names inside.
            columns[wanted.name] = column.cast(wanted.type).to_pylist()
        except pa.ArrowException as error:
            raise RolloutError(f"column {wanted.name} must hold {wanted.type}: {error}", wanted.name) from error
        if not wanted.nullable and column.null_count:
            raise RolloutError(f"column {wanted.name} must not have nulls", wanted.name)
    rollouts = [_from_row(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    for rollout in rollouts:
        rollout.check()
    return rollouts


def _to_row(rollout: Rollout) -> Row:
    row: Row = {name: getattr(rollout, name) for name in SCHEMA.names if hasattr(rollout, name)}
    row |= {name: getattr(rollout.sampling, name) for name in SAMPLING}
    row["sampling_other"] = rollout.sampling.other
    row |= {name: None if row[name] is None else to_json(row[name]) for name in JSON}
    row["rewards"] = [{"reward": r.reward, "source": r.source, "created": r.created} for r in rollout.rewards]
    return row


def _from_row(row: Row) -> Rollout:
    for name in JSON:
        if row[name] is not None:
            row[name] = _parsed(row, name)
    metadata = row["metadata"]
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise RolloutError(f"rollout {row['id']!r}: metadata must be an object with strings as values", "metadata")
    for name, kind in (("messages", list), ("response", dict), ("guidance", dict), ("sampling_other", dict)):
        if row[name] is not None and not isinstance(row[name], kind):
            raise RolloutError(f"rollout {row['id']!r}: {name} must be JSON of a {kind.__name__}", name)
    for name in ("prompt_token_ids", "completion_token_ids", "rewards"):
        if None in row[name]:
            raise RolloutError(f"rollout {row['id']!r}: {name} must not have nulls inside", name)
    sampling = Sampling(**{name: row.pop(name) for name in SAMPLING}, other=row.pop("sampling_other"))
    rewards = tuple(Reward(**entry) for entry in row.pop("rewards"))
    return Rollout(**row, sampling=sampling, rewards=rewards)


def _parsed(row: Row, name: str) -> Any:
    try:
        return json.loads(row[name])
    except ValueError as error:
        raise RolloutError(f"rollout {row['id']!r}: {name} must be JSON: {error}", name) from error


def _drained(sink: BytesIO) -> bytes:
    # The writer counts its offsets itself, so what was taken away does not confuse it.
    data = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return data
