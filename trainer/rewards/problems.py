"""Which problem a stored rollout answers: by the task's name, the problem's id and a hash of what it asks.

A file of prompts may have been renamed since, or its lines changed. A problem of another content is not taken for the
one that was asked, whatever its id; one of the same content is, whatever its file is called now.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qsharp_core.wire.metadata import CONTENT, PROBLEM, SPLIT, TASK
from trainer.rewards.verifiers import TaskRef
from trainer.rollouts.collection import content_of
from trainer.tasks import registry
from trainer.tasks.base import Problem, TaskError


class Problems:
    """Finds the problem of a stored rollout, by what `qsharp collect` put into its metadata.

    Args:
        tasks: tasks beyond the registered ones. A name that comes with a rollout is never imported.
    """

    def __init__(self, tasks: Sequence[TaskRef] = ()) -> None:
        self._given = list(tasks)
        self._registered: dict[str, TaskRef | None] = {}
        self._problems: dict[tuple[int, str], _Known] = {}

    def of(self, rollout: Mapping[str, Any]) -> tuple[TaskRef | None, Problem | None]:
        """The task and the problem of a rollout; each is None if it is not known."""
        metadata = rollout["metadata"]
        name, problem_id = metadata.get(TASK), metadata.get(PROBLEM, "")
        if name is None:
            return None, None
        named = [task for task in self._given if task.task.name == name]
        # Without a hash, as rollouts from before have none, a task of another name may be another task.
        others = [task for task in self._given if task not in named] if CONTENT in metadata else []
        for task in [*named, *filter(None, [self._built_in(name)]), *others]:
            found = self._of_split(task, metadata.get(SPLIT, "")).find(problem_id, metadata.get(CONTENT))
            if found is not None:
                return task, found
        return (named[0] if named else self._built_in(name)), None

    def _built_in(self, name: str) -> TaskRef | None:
        if name not in self._registered:
            known = registry.is_registered(name)
            self._registered[name] = TaskRef(registry.find_task(name), name) if known else None
        return self._registered[name]

    def _of_split(self, task: TaskRef, split: str) -> "_Known":
        key = id(task), split
        if key not in self._problems:
            try:
                problems = task.task.of_split(split)
            except TaskError:
                problems = []
            self._problems[key] = _Known(problems)
        return self._problems[key]


class _Known:
    """The problems of a split."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._by_id = {problem.id: problem for problem in problems}
        self._contents = {problem.id: content_of(problem) for problem in problems}
        self._by_content = {content: self._by_id[name] for name, content in self._contents.items()}

    def find(self, name: str, content: str | None) -> Problem | None:
        """The problem of that id and content; of the content alone if the id means another one now."""
        if content is None or self._contents.get(name) == content:
            return self._by_id.get(name)
        return self._by_content.get(content)


def unknown(rollout: Mapping[str, Any]) -> str:
    """What is said of a rollout whose problem is not known, if it was collected for one."""
    metadata = rollout["metadata"]
    if TASK not in metadata:
        return ""
    return (
        f"problem {metadata.get(PROBLEM)!r} of task {metadata[TASK]!r} is in none of the tasks that were given: name "
        "its file with --prompts, or its module with --task"
    )
