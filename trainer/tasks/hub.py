"""Data sets of the Hugging Face library `datasets` as tasks; the package is optional.

A row is a problem as in a file of JSON lines (`files`): TRL's data sets have `prompt` columns, too. The splits are the
data set's own.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from trainer.tasks.base import Problem, Task, TaskError, no_vote
from trainer.tasks.files import problem_of, rows_task


def dataset_task(name: str) -> Task:
    """The task of a data set.

    Args:
        name: on the hub, `ORGANISATION/NAME` or `ORGANISATION/NAME:CONFIGURATION`; or a folder of data files.

    Raises:
        TaskError: the package is missing, or there is no such data set.
    """
    path, _, config = name.partition(":")
    try:
        from datasets import get_dataset_split_names, load_dataset  # optional
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as error:
        raise TaskError(
            f"{name} is no file; if it is a data set of the hub, it is read with the package datasets: "
            "pip install datasets"
        ) from error
    unreadable = (OSError, ValueError, httpx.HTTPError, DatasetNotFoundError)
    try:
        splits = tuple(get_dataset_split_names(path, config or None))
    except unreadable as error:
        raise TaskError(f"{name} is neither a file nor a data set that can be read: {error}") from error

    @cache
    def problems(split: str) -> Sequence[Problem]:
        try:
            rows = load_dataset(path, config or None, split=split)
        except unreadable as error:
            raise TaskError(f"{name} cannot be read: {error}") from error
        return _problems(rows, f"{name}, {split}, row")

    return Task(name=Path(path).name, problems=problems, splits=splits, vote=no_vote)


def loaded_task(data: Any, name: str) -> Task:
    """The task of a `Dataset` in memory, or of a `DatasetDict` with its splits."""
    if isinstance(data, Mapping):
        made = {split: _problems(rows, f"{name}, {split}, row") for split, rows in data.items()}
        return Task(name=name, problems=made.__getitem__, splits=tuple(made), vote=no_vote)
    return rows_task(name, enumerate(data, 1), f"{name}, row")


def _problems(rows: Any, place: str) -> list[Problem]:
    columns = list(rows.column_names)
    if not {"prompt", "messages"} & set(columns):
        raise TaskError(
            f"{place}: there is neither a column prompt nor messages, but {', '.join(columns)}: rename the right one"
        )
    return [problem_of(row, number, place)[0] for number, row in enumerate(rows, 1)]
