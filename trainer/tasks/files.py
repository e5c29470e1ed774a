"""Rows as a task: a file of JSON lines, or a list. A row is `{"id", "prompt" | "messages", "answer"?, "split"?, …}`.

If `id` is left out, it is the row's number. A prompt is text, token ids, or a chat's messages, which may also stand
under `messages`. A row without `split` is in every split, and if no row has one, any name of a split will do. Other
fields become the problem's `data`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from qsharp_core.answers import Vote
from trainer.tasks.base import Problem, Task, TaskError, no_vote


class Line(BaseModel):
    """A row."""

    model_config = ConfigDict(extra="allow")
    id: str | int | None = None
    prompt: str | list[int] | list[dict[str, Any]] | None = None
    messages: list[dict[str, Any]] | None = None
    answer: Any = None
    split: str | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> "Line":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages must be given")
        return self

    def problem(self, number: int) -> Problem:
        """The problem; `number` is its id if it has none."""
        chat = isinstance(self.prompt, list) and bool(self.prompt) and isinstance(self.prompt[0], dict)
        return Problem(
            id=str(number if self.id is None else self.id),
            prompt=None if chat else cast(str | list[int] | None, self.prompt),
            messages=cast(list[dict[str, Any]], self.prompt) if chat else self.messages,  # as TRL's data sets have it
            answer=self.answer,
            data=self.model_extra or {},
        )


def file_task(path: Path, vote: Vote = no_vote) -> Task:
    """The task that a file of JSON lines describes; it has no reward of its own.

    Args:
        path: the file.
        vote: see `Task.vote`.

    Raises:
        TaskError: it cannot be read; names the line.
    """
    return rows_task(path.stem, _parsed(path), f"{path}, line", vote)


def rows_task(name: str, rows: Iterable[tuple[int, Mapping[str, Any]]], place: str, vote: Vote = no_vote) -> Task:
    """The task of some rows; it has no reward of its own.

    Args:
        name: of the task.
        rows: each with its number.
        place: what a row's number is of, for messages.
        vote: see `Task.vote`.

    Raises:
        TaskError: a row is no problem; names it.
    """
    known = [problem_of(row, number, place) for number, row in rows]
    splits = tuple(dict.fromkeys(split for _, split in known if split is not None))

    def problems(split: str) -> Sequence[Problem]:
        return [problem for problem, its_split in known if its_split is None or its_split == split]

    return Task(name=name, problems=problems, splits=splits, vote=vote)


def problem_of(row: Mapping[str, Any], number: int, place: str) -> tuple[Problem, str | None]:
    """The problem of a row, and the split that it names.

    Raises:
        TaskError: it is no problem.
    """
    try:
        line = Line.model_validate(row)
    except ValidationError as error:
        raise TaskError(f"{place} {number}: {error.errors()[0]['msg']}") from error
    return line.problem(number), line.split


def _parsed(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        texts = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read: {error}") from error
    for number, text in enumerate(texts, 1):
        if text.strip():
            try:
                yield number, json.loads(text)
            except ValueError as error:
                raise TaskError(f"{path}, line {number}: {error}") from error
