"""What a task is: problems with prompts and reference data, how answers are sampled, and what they earn.

    TASK = Task(name="sums", splits=("train", "held_out"), problems=problems, reward=reward)

A task is found by its name (`trainer.tasks.registry`), or as `module:object`.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qsharp_core.answers import Vote, whole_text
from qsharp_core.errors import QSharpError
from qsharp_core.suggestions import did_you_mean

DEFAULT_MAX_TOKENS = 256


class TaskError(QSharpError):
    """A task that cannot be found, or problems that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem of a task; it has either a `prompt` or `messages`.

    Attributes:
        id: unique within the task, the same in every run.
        prompt: text, or token ids.
        messages: of a chat, as OpenAI's API has them.
        answer: the answer that verifiers compare with; None if there is none.
        data: whatever else the task's reward needs, as JSON's data.
    """

    id: str
    prompt: str | list[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    answer: Any = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def request(self) -> tuple[str, dict[str, Any]]:
        """The route that the problem is asked on, and the fields of the request that ask it."""
        if self.messages is not None:
            return "/v1/chat/completions", {"messages": list(self.messages)}
        return "/v1/completions", {"prompt": self.prompt}


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """How a task's problems are sampled unless the user says otherwise."""

    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()


Reward = Callable[[Problem, str], float | Awaitable[float | None] | None]


def no_vote(text: str) -> str | None:
    """No vote: hardly two free texts are the same, so that a majority of them means nothing."""
    return None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task.

    Attributes:
        name: of the task.
        problems: returns the problems of a split, in an order that is always the same.
        splits: the names of its splits; empty if any name will do.
        sampling: how problems are sampled unless the user says otherwise.
        reward: judges a completion's text, and returns None if it cannot; None if the task has no reward of its own.
        vote: the answer that a completion's text gives, for majorities; it returns None if the text gives none.
    """

    name: str
    problems: Callable[[str], Sequence[Problem]]
    splits: tuple[str, ...]
    sampling: SamplingDefaults = SamplingDefaults()
    reward: Reward | None = None
    vote: Vote = whole_text

    def of_split(self, split: str) -> list[Problem]:
        """The problems of a split.

        Raises:
            TaskError: there is no such split, it is empty, or two problems share an id.
        """
        if self.splits and split not in self.splits:
            meant = did_you_mean(split, self.splits)
            raise TaskError(f"task {self.name} has the splits {', '.join(self.splits)}; got {split!r}{meant}")
        problems = list(self.problems(split))
        if not problems:
            raise TaskError(f"task {self.name} has no problems in its split {split!r}")
        if len({problem.id for problem in problems}) < len(problems):
            raise TaskError(f"task {self.name} has problems of the same id in its split {split!r}")
        return problems
