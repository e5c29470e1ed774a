"""What a task is: problems with prompts and reference data, how answers are sampled, and what they earn.

    TASK = Task(name="sums", splits=("train", "held_out"), problems=problems, reward=reward)

A task is found by its name (`trainer.tasks.registry`), or as `module:object`.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qsharp_core.errors import QSharpError

DEFAULT_MAX_TOKENS = 256


class TaskError(QSharpError):
    """A task that cannot be found, or problems that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing to ask; either `prompt` or `messages` is given.

    Attributes:
        id: unique within the task, the same in every run.
        prompt: text, or token ids.
        messages: of a chat, as OpenAI's API has them.
        answer: the reference that verifiers compare with; None if there is none.
        data: whatever else the task's reward needs, as JSON's data.
    """

    id: str
    prompt: str | list[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    answer: Any = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def request(self) -> tuple[str, dict[str, Any]]:
        """The route that it is asked on, and the field of the request that asks it."""
        if self.messages is not None:
            return "/v1/chat/completions", {"messages": list(self.messages)}
        return "/v1/completions", {"prompt": self.prompt}


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What the task needs unless the user says otherwise."""

    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()


Reward = Callable[[Problem, str], float | Awaitable[float | None] | None]
Vote = Callable[[str], str | None]


def whole_text(text: str) -> str | None:
    """The answer that a completion votes for in a majority: all of it; None if it is empty."""
    return text.strip() or None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task.

    Attributes:
        problems: those of a split, in an order that is always the same.
        splits: the names it knows.
        reward: of a completion's text, None where it cannot be judged; None if the task has no reward of its own.
        vote: the answer that a completion's text stands for, None if it gives none: for majorities.
    """

    name: str
    problems: Callable[[str], Sequence[Problem]]
    splits: tuple[str, ...]
    sampling: SamplingDefaults = SamplingDefaults()
    reward: Reward | None = None
    vote: Vote = whole_text

    def of_split(self, split: str) -> list[Problem]:
        """The problems of a split, checked.

        Raises:
            TaskError: there is no such split, it is empty, or two problems share an id.
        """
        if self.splits and split not in self.splits:
            raise TaskError(f"task {self.name} has the splits {', '.join(self.splits)}; got {split!r}")
        found = list(self.problems(split))
        if not found:
            raise TaskError(f"task {self.name} has no problems in its split {split!r}")
        if len({problem.id for problem in found}) < len(found):
            raise TaskError(f"task {self.name} has problems of the same id in its split {split!r}")
        return found
