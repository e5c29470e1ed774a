"""Questions and answers of public benchmarks: from the Hugging Face hub, or from local JSON lines.

`QSHARP_DATA=FOLDER` has them read from `FOLDER/gsm8k_test.jsonl` and the like, lines of `{"question", "answer"}` or of
the fields that a source names. Without it they are downloaded once, by the `datasets` library.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
from pydantic_settings import BaseSettings, SettingsConfigDict

from trainer.tasks.base import Problem, TaskError

INSTRUCTION = "Reason step by step, and put your final answer in \\boxed{}."


class DataSettings(BaseSettings):
    """Settings from the environment: `QSHARP_DATA`."""

    model_config = SettingsConfigDict(env_prefix="QSHARP_")
    data: Path | None = None


@dataclass(frozen=True)
class Source:
    """Where the rows of a split are.

    Attributes:
        file: the file's name in the folder that `QSHARP_DATA` names.
        repository, configs, split: the data set on the hub; the rows of its configurations follow one another. Splits
            are joined as `train+test`.
        fields: the names of the fields that are read.
        hub_fields: their names on the hub, in the same order; empty if they are the same.
    """

    file: str
    repository: str
    split: str
    configs: tuple[str, ...]
    fields: tuple[str, ...] = ("question", "answer")
    hub_fields: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, ...]]:
        """The fields of each row as text, in an order that is always the same.

        Raises:
            TaskError: they cannot be read; the message says what to do.
        """
        folder = DataSettings().data
        return _of_hub(self) if folder is None else _of_file(folder / self.file, self.fields)


def asked(number: int, question: str, answer: str) -> Problem:
    """A problem that asks a question in a chat and expects a mathematical answer."""
    messages = [{"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}]
    return Problem(id=str(number), messages=messages, answer=f"\\boxed{{{answer}}}")


def correct(problem: Problem, text: str) -> float | None:
    """1 if a completion's answer equals the problem's, by `math_verify`; None if the problem's is no mathematics."""
    # Slow to import, and wanted only where completions are judged: in a process that can be killed.
    from trainer.tasks.mathematics import equal

    return None if problem.answer is None else equal(str(problem.answer), text)


@cache
def _of_file(path: Path, fields: tuple[str, ...]) -> list[tuple[str, ...]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}; unset QSHARP_DATA to use the hub") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append(tuple(str(row[field]) for field in fields))
        except (ValueError, KeyError, TypeError) as error:
            form = ", ".join(f'"{field}": …' for field in fields)
            raise TaskError(f"{path}, line {number}: must be {{{form}}}: {error!r}") from error
    return rows


@cache
def _of_hub(source: Source) -> list[tuple[str, ...]]:
    try:
        from datasets import load_dataset  # optional
    except ImportError as error:
        raise TaskError(
            f"{source.repository} is read with the package datasets: pip install datasets; "
            f"or set QSHARP_DATA to a folder that has {source.file}"
        ) from error
    found = []
    for config in source.configs:
        try:
            rows = load_dataset(source.repository, config, split=source.split)
        except (OSError, ValueError, httpx.HTTPError) as error:
            raise TaskError(
                f"{source.repository} could not be loaded from the hub ({type(error).__name__}: {error}); "
                f"QSHARP_DATA may name a folder that has {source.file}"
            ) from error
        found += [tuple(str(row[field]) for field in source.hub_fields or source.fields) for row in rows]
    return found
