"""Writes rollouts to Parquet files and reads them again, checked; `qsharp_core.wire.columns` has the columns.

`datasets`, pandas and pyarrow read these files, and files that such tools wrote are read here.

A file that comes from elsewhere may say one thing and hold another. How much it becomes in memory is limited before
its columns are read, by what its footer says, and again batch by batch, before texts that it holds once and refers to
often are spread out.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qsharp_core.errors import RolloutError
from qsharp_core.rollouts.records import UNNAMED, Reward, Rollout, Sampling
from qsharp_core.rollouts.text import to_json
from qsharp_core.wire.columns import JSON, OWNER, SAMPLING, SCHEMA

BATCH = 1000  # rollouts in a row group
MOST_ROWS = 1_000_000  # of a file that is read
MOST_BYTES = 8 * 2**30  # that it may become
MOST_RATIO = 100  # times its own size
LEAST_BYTES = 64 * 2**20  # that any file may become, however small it is
_WORD = 8  # bytes that a value takes, whatever it is
MEDIA_TYPE = "application/vnd.apache.parquet"
Row = dict[str, Any]  # by the name of the column; lists and JSON as Python has them


def write(batches: Iterable[list[Rollout]]) -> Iterator[bytes]:
    """The bytes of one Parquet file, in pieces. The file is complete only when the iterator has ended."""
    sink = BytesIO()
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        for batch in batches:
            writer.write_table(pa.Table.from_pylist([_to_row(rollout) for rollout in batch], SCHEMA))
            yield _drained(sink)
    yield _drained(sink)


def rows(path: Path) -> int:
    """How many rollouts a file of ours has."""
    number: int = pq.read_metadata(path).num_rows
    return number


def read(source: Path | IO[bytes], owner: str = UNNAMED, *, most: int | None = None) -> Iterator[list[Rollout]]:
    """The rollouts of a Parquet file, checked, in batches.

    A damaged file may end the process; `foreign` reads files that are not our own.

    Args:
        source: the file.
        owner: of rollouts for which the file names none.
        most: bytes that the file may become; None: by its size (`MOST_RATIO`).

    Raises:
        RolloutError: this is not a Parquet file, it is too large, or a column is missing or holds something else; names
            the column.
    """
    try:
        yield from _read(source, owner, _allowed(source) if most is None else most)
    except RolloutError:
        raise
    # What pyarrow raises where bytes are not what they should be; UnicodeDecodeError is a ValueError.
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise RolloutError(f"this is not a Parquet file, or a damaged one: {error!s:.300}") from error


def _read(source: Path | IO[bytes], owner: str, most: int) -> Iterator[list[Rollout]]:
    footer = pq.read_metadata(source)
    present = set(footer.schema.to_arrow_schema().names)
    for wanted in SCHEMA:
        if wanted.name not in present and not wanted.nullable:
            raise RolloutError(f"column {wanted.name} is missing", wanted.name)
    _check_footer(footer, most)
    names = [field.name for field in SCHEMA if field.name in present]
    leaves = [footer.schema.column(i) for i in range(footer.num_columns)]
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and leaf.path.split(".")[0] in names]
    # A text that a file has once and refers to often stays in one place until it is counted.
    with pq.ParquetFile(source, metadata=footer, read_dictionary=texts, page_checksum_verification=True) as file:
        total = 0
        for group in range(file.num_row_groups):  # each has dictionaries of its own
            for batch in file.iter_batches(BATCH, row_groups=[group], columns=names):
                total += sum(_spread(column) for column in batch.columns)
                if total > most:
                    raise _too_large(most)
                yield _checked(pa.Table.from_batches([batch]), owner)


def _allowed(source: Path | IO[bytes]) -> int:
    """The bytes that a file may become in memory: some times its own size."""
    if isinstance(source, Path):
        size = source.stat().st_size if source.exists() else 0  # what opens it says what is wrong
    else:
        size = source.seek(0, 2)
        source.seek(0)
    return min(MOST_BYTES, max(LEAST_BYTES, MOST_RATIO * size))


def _check_footer(footer: pq.FileMetaData, most: int) -> None:
    if footer.num_rows > MOST_ROWS:
        raise RolloutError(f"the file has {footer.num_rows} rows: at most {MOST_ROWS} can be read at once")
    total = 0
    for i in range(footer.num_row_groups):
        group = footer.row_group(i)
        for chunk in (group.column(j) for j in range(group.num_columns)):
            total += max(chunk.total_uncompressed_size, 4 * chunk.num_values)
    if total > most:
        raise _too_large(most)


def _too_large(most: int) -> RolloutError:
    return RolloutError(f"the file becomes more than {most >> 20} MiB when it is read: send it in parts")


def _spread(column: pa.Array) -> int:
    """The bytes of a column once each of its texts stands by itself."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(column.dictionary)
        return _WORD * len(column) + (pc.sum(lengths.take(column.indices)).as_py() or 0)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _WORD * len(column) + _spread(column.flatten())
    if pa.types.is_struct(kind):
        return sum(_spread(inner) for inner in column.flatten())
    return max(_WORD * len(column), column.nbytes)


def _checked(table: pa.Table, owner: str) -> list[Rollout]:
    columns: dict[str, list[Any]] = {}
    for wanted in SCHEMA:
        if wanted.name not in table.column_names:
            columns[wanted.name] = [None] * len(table)
            continue
        column = table[wanted.name]
        try:
            # Other tools write wider integers and large strings, and lists with other names inside.
            columns[wanted.name] = column.cast(wanted.type).to_pylist()
        except (pa.ArrowException, ValueError) as error:
            raise RolloutError(f"column {wanted.name} must hold {wanted.type}: {error!s:.300}", wanted.name) from error
        if not wanted.nullable and column.null_count:
            raise RolloutError(f"column {wanted.name} must not have nulls", wanted.name)
    columns[OWNER] = [owner if name is None else name for name in columns[OWNER]]
    rollouts = [_from_row(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    for rollout in rollouts:
        rollout.check()
    return rollouts


def _to_row(rollout: Rollout) -> Row:
    row: Row = {name: getattr(rollout, name) for name in SCHEMA.names if hasattr(rollout, name)}
    row |= {name: getattr(rollout.sampling, name) for name in SAMPLING}
    row["sampling_other"] = rollout.sampling.other
    row |= {name: None if row[name] is None else to_json(row[name]) for name in JSON}
    row["rewards"] = [asdict(entry) for entry in rollout.rewards]
    return row


def _from_row(row: Row) -> Rollout:
    for name in JSON:
        if row[name] is not None:
            row[name] = _parsed(row, name)
    for name in ("prompt_token_ids", "completion_token_ids", "rewards"):
        if None in row[name]:
            raise RolloutError(f"rollout {row['id']!r:.100}: {name} must not have nulls inside", name)
    sampling = Sampling(**{name: row.pop(name) for name in SAMPLING}, other=row.pop("sampling_other"))
    rewards = tuple(Reward(**entry) for entry in row.pop("rewards"))
    return Rollout(**row, sampling=sampling, rewards=rewards)


def _parsed(row: Row, name: str) -> Any:
    try:
        parsed = json.loads(row[name])
        to_json(parsed)  # Python reads NaN and numbers beyond all bounds, and JSON has none
    except (ValueError, RecursionError) as error:
        raise RolloutError(f"rollout {row['id']!r:.100}: {name} must be JSON: {error!s:.300}", name) from error
    return parsed


def _drained(sink: BytesIO) -> bytes:
    # The writer counts its offsets itself, so what was taken away does not confuse it.
    data = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return data
