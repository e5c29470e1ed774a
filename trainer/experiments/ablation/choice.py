"""Which of the rollouts a variant learns from.

What is left out is left out of the training alone: all variants are measured on all rollouts of the held-out prompts.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import PositiveInt

from qsharp_core.disk import whole_file
from qsharp_core.wire.columns import LABELLED
from qsharp_core.wire.metadata import FORCED
from trainer.experiments.fields import RecipeFields
from trainer.rollouts.collection import digest
from trainer.training.data import METADATA, group_of, is_held_out
from trainer.training.settings import TrainingError, TrainSettings

AT_ONCE = 1000
"""Rows that are in memory together."""


class RolloutChoice(RecipeFields):
    """The rollouts of the training prompts that are learned from.

    Attributes:
        which: all of them, those that are `whole`, sampled from the prompt on, or `branches`, which leave another one.
        number: so many of these, drawn at random by the training's seed; None is all.
    """

    which: Literal["all", "whole", "branches"] = "all"
    number: PositiveInt | None = None


def chosen(data: Sequence[Path], choice: RolloutChoice, settings: TrainSettings, folder: Path) -> list[Path]:
    """Files of the rollouts that a variant learns from, and of all that it is measured on.

    Args:
        data: Parquet files, or folders of them.
        choice: which rollouts.
        settings: of the training; they say which prompts are held out.
        folder: gets a file for each choice; one that is there already is taken.

    Raises:
        TrainingError: there are not so many.
    """
    if choice == RolloutChoice():
        return list(data)
    some = "" if choice.number is None else f"-{choice.number}-of-seed-{settings.seed}"
    split = digest([settings.held_out, settings.group_by])[:8]  # variants may hold out others
    path = folder / f"{choice.which}{some}-{split}.parquet"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        files = [file for one in data for file in (sorted(one.glob("*.parquet")) if one.is_dir() else [one])]
        kept = _kept(files, choice, settings)
        schema = pq.read_schema(files[0])
        if other := next((file for file in files if not pq.read_schema(file).equals(schema)), None):
            raise TrainingError(f"rollouts: {other} has other columns than {files[0]}: they cannot be put together")
        with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            before = 0
            for batch in _batches(files):
                here = [row in kept for row in range(before, before + len(batch))]
                writer.write_batch(batch.filter(pa.array(here)))
                before += len(batch)
    return [path]


def _kept(files: Sequence[Path], choice: RolloutChoice, settings: TrainSettings) -> set[int]:
    """The numbers of the rows that are kept."""
    measured: set[int] = set()
    rewarded: dict[str, int] = {}  # of a rollout that is in several files, the last row counts
    for number, row in enumerate(row for batch in _batches(files, rows=True) for row in batch.to_pylist()):
        group = group_of(row["prompt_token_ids"], row.get(METADATA), settings.group_by)
        if is_held_out(group, settings.held_out):
            measured.add(number)
        elif row["reward"] is not None and choice.which in ("all", _kind(row)):
            rewarded[row["id"]] = number
    able = [*rewarded.values()]
    wanted = len(able) if choice.number is None else choice.number
    if not able or wanted > len(able):
        what = "rollouts" if choice.which == "all" else f"rollouts ({choice.which})"
        raise TrainingError(
            f"rollouts: {wanted or 'some'} are wanted, and the training prompts have {len(able)} {what}"
        )
    return measured | set(random.Random(settings.seed).sample(able, wanted))


def _kind(row: dict[str, object]) -> str:
    """`whole`, `branches`, or neither: one that was guided, or goes on from one that was."""
    metadata = row.get(METADATA)
    if isinstance(metadata, str) and FORCED in json.loads(metadata):
        return "branches"
    return "whole" if row.get("parent_id") is None and row.get("eta") is None else ""


def _batches(files: Sequence[Path], rows: bool = False) -> Iterator[pa.RecordBatch]:
    """All rows in order; with `rows` only what decides whether they are kept."""
    for file in files:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            wanted = [name for name in (*LABELLED, METADATA, "parent_id", "eta") if name in names] if rows else None
            yield from parquet.iter_batches(AT_ONCE, columns=wanted)
