"""Where prompts come from, in whatever form a person has them: a task, a file, a data set, a list."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.tasks import registry
from trainer.tasks.base import Task, TaskError
from trainer.tasks.files import file_task, rows_task
from trainer.tasks.hub import dataset_task, loaded_task

Source = Task | Path | str | Iterable[str | Mapping[str, Any]]
"""A task or its name, a file of JSON lines, the name of a data set, a `datasets.Dataset`, or prompts or rows."""
HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
"""How a data set of the hub is called."""
OF_FILES = (".jsonl", ".json", ".txt", ".csv", ".parquet")
NAMELESS = "prompts"
"""The name of a task that is made of what is in memory, unless it is given another one."""


def prompts_task(source: str | Path) -> Task:
    """The task of what `--prompts` names: a file of JSON lines, or a data set.

    Raises:
        TaskError
    """
    path = Path(source)
    of_hub = HUB.fullmatch(str(source)) and path.suffix not in OF_FILES and not path.is_file()
    return dataset_task(str(source)) if of_hub or path.is_dir() else file_task(path)


def task_from(source: Source, name: str | None = None) -> tuple[Task, str | None]:
    """The task of a source, and the name or `module:object` that another process finds it by; None if there is none.

    Args:
        source: see `Source`.
        name: of a task that is made of what is in memory. Rollouts are found again by it.

    Raises:
        TaskError: it is nothing of this kind, or cannot be read.
    """
    if isinstance(source, Task):
        return source, None
    if isinstance(source, str) and (registry.is_registered(source) or _is_spec(source)):
        return registry.find_task(source), source
    if isinstance(source, str | Path):
        return prompts_task(source), None
    if hasattr(source, "column_names"):
        return loaded_task(source, name or NAMELESS), None
    if not isinstance(source, Iterable):
        raise TaskError(f"prompts are a task, a file, a data set or a list; got a {type(source).__name__}")
    rows = [{"prompt": one} if isinstance(one, str) else one for one in source]
    return rows_task(name or NAMELESS, enumerate(rows, 1), "row"), None


def task_of(task: str | None, prompts: str | Path | None) -> Task:
    """The task that `--task` or `--prompts` of a command line mean; exactly one of them must be given.

    Raises:
        TaskError
    """
    if (task is None) == (prompts is None):
        raise TaskError("give either --task or --prompts")
    return registry.find_task(task) if task is not None else prompts_task(prompts)  # type: ignore[arg-type]


def _is_spec(text: str) -> bool:
    """Whether a text is `module:object`, and no path or data set with a configuration."""
    module, colon, attribute = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))
