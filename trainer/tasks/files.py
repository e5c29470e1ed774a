"""A file of JSON lines as a task; a line is a problem, `{"id", "prompt" | "messages", "answer"?, "split"?, …}`.

If `id` is left out, it is the line's number. A line without `split` is in every split. Other fields become the
problem's `data`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from trainer.tasks.base import Problem, Task, TaskError, Vote, whole_text


class Line(BaseModel):
    """A line of the file."""

    model_config = ConfigDict(extra="allow")
    id: str | int | None = None
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    answer: Any = None
    split: str | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> "Line":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages must be given")
        return self


def file_task(path: Path, vote: Vote = whole_text) -> Task:
    """The task that a file of JSON lines describes; it has no reward of its own.

    Args:
        path: the file.
        vote: see `Task.vote`.

    Raises:
        TaskError: it cannot be read; names the line.
    """
    lines = _lines(path)

    def problems(split: str) -> Sequence[Problem]:
        return [problem for problem, its_split in lines if its_split is None or its_split == split]

    return Task(name=path.stem, problems=problems, splits=(), vote=vote)


def _lines(path: Path) -> list[tuple[Problem, str | None]]:
    try:
        texts = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read: {error}") from error
    problems = []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = Line.model_validate(json.loads(text))
        except (ValueError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise TaskError(f"{path}, line {number}: {reason}") from error
        problem = Problem(
            id=str(number if line.id is None else line.id),
            prompt=line.prompt,
            messages=line.messages,
            answer=line.answer,
            data=line.model_extra or {},
        )
        problems.append((problem, line.split))
    return problems
