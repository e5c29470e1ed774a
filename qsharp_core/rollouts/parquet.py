"""Rollouts as Parquet, which `datasets`, pandas and pyarrow read.

A column per field of `records.Rollout`. What has no fixed shape (`messages`, `response`, `guidance`, `sampling_other`,
`metadata`) is JSON in a text column. `rewards` is the history, a list of {reward, source, created}.
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

BATCH = 1000  # rollouts in a row group
MEDIA_TYPE = "application/vnd.apache.parquet"

_TOKENS = pa.list_(pa.int32())
_REWARDS = pa.list_(
    pa.struct(
        [pa.field("reward", pa.float64(), False), ("source", pa.string()), pa.field("created", pa.float64(), False)]
    )
)


def _needed(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


SCHEMA = pa.schema(
    [
        _needed("id", pa.string()),
        _needed("request_id", pa.string()),
        _needed("choice", pa.int32()),
        _needed("route", pa.string()),
        _needed("created", pa.float64()),
        _needed("model", pa.string()),
        _needed("prompt_token_ids", _TOKENS),
        _needed("completion_token_ids", _TOKENS),
        ("prompt_text", pa.string()),
        _needed("completion_text", pa.string()),
        ("messages", pa.string()),
        ("response", pa.string()),
        _needed("temperature", pa.float64()),
        _needed("top_p", pa.float64()),
        _needed("top_k", pa.int32()),
        _needed("min_p", pa.float64()),
        ("seed", pa.int64()),
        _needed("sampling_other", pa.string()),
        ("eta", pa.float64()),
        ("method", pa.string()),
        ("critic", pa.string()),
        ("guidance", pa.string()),
        ("first_valid_position", pa.int32()),
        ("parent_id", pa.string()),
        ("cut", pa.int32()),
        _needed("kl", pa.float64()),
        ("value", pa.float64()),
        ("finish_reason", pa.string()),
        _needed("metadata", pa.string()),
        ("reward", pa.float64()),
        _needed("rewards", _REWARDS),
    ]
)
_JSON = ("messages", "response", "guidance", "sampling_other", "metadata")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")


def write(batches: Iterable[list[Rollout]]) -> Iterator[bytes]:
    """The bytes of one Parquet file, as they come; it is whole only when the iterator has ended."""
    sink = BytesIO()
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd") as writer:
        for batch in batches:
            writer.write_table(pa.Table.from_pylist([_to_fields(rollout) for rollout in batch], SCHEMA))
            yield _drained(sink)
    yield _drained(sink)


def read(source: Path | IO[bytes]) -> Iterator[list[Rollout]]:
    """The rollouts of a Parquet file, checked, in batches.

    Raises:
        RolloutError: it is no Parquet file, or not one of rollouts; names the column.
    """
    try:
        file = pq.ParquetFile(source)
    except (pa.ArrowException, OSError) as error:
        raise RolloutError(f"this is not a Parquet file: {error}") from error
    with file:
        found = file.schema_arrow
        for wanted in SCHEMA:
            if wanted.name not in found.names and not wanted.nullable:
                raise RolloutError(f"column {wanted.name} is missing", wanted.name)
        names = [field.name for field in SCHEMA if field.name in found.names]
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
    made = [_from_fields(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    for rollout in made:
        rollout.check()
    return made


def _to_fields(rollout: Rollout) -> dict[str, Any]:
    fields = {name: getattr(rollout, name) for name in SCHEMA.names if hasattr(rollout, name)}
    fields |= {name: getattr(rollout.sampling, name) for name in _SAMPLING}
    fields["sampling_other"] = rollout.sampling.other
    fields |= {name: None if fields[name] is None else to_json(fields[name]) for name in _JSON}
    fields["rewards"] = [{"reward": r.reward, "source": r.source, "created": r.created} for r in rollout.rewards]
    return fields


def _from_fields(fields: dict[str, Any]) -> Rollout:
    for name in _JSON:
        if fields[name] is not None:
            fields[name] = _parsed(fields, name)
    metadata = fields["metadata"]
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise RolloutError(f"rollout {fields['id']!r}: metadata must be an object with strings as values", "metadata")
    for name, kind in (("messages", list), ("response", dict), ("guidance", dict), ("sampling_other", dict)):
        if fields[name] is not None and not isinstance(fields[name], kind):
            raise RolloutError(f"rollout {fields['id']!r}: {name} must be JSON of a {kind.__name__}", name)
    for name in ("prompt_token_ids", "completion_token_ids", "rewards"):
        if None in fields[name]:
            raise RolloutError(f"rollout {fields['id']!r}: {name} must not have nulls inside", name)
    sampling = Sampling(**{name: fields.pop(name) for name in _SAMPLING}, other=fields.pop("sampling_other"))
    rewards = tuple(Reward(**entry) for entry in fields.pop("rewards"))
    return Rollout(**fields, sampling=sampling, rewards=rewards)


def _parsed(fields: dict[str, Any], name: str) -> Any:
    try:
        return json.loads(fields[name])
    except ValueError as error:
        raise RolloutError(f"rollout {fields['id']!r}: {name} must be JSON: {error}", name) from error


def _drained(sink: BytesIO) -> bytes:
    # The writer counts its offsets itself, so what was taken away does not confuse it.
    data = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return data
