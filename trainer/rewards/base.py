"""What a verifier gets and gives.

A verifier is a plain callable, sync or async:

    def long_enough(case: Case) -> float | None:
        return float(len(case.completion) > 100)

A reward function of TRL's, `reward_func(prompts, completions, **columns)`, is taken as well (`signatures`).

It returns a reward, or None if it cannot judge this completion: there is no answer to compare with, or the prompt is of
another kind. Raising, hanging or crashing is a *failure*: the rollout then gets no reward from any verifier, because
what it earned is unknown.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qsharp_core.errors import QSharpError
from trainer.tasks.base import Problem


class VerifierError(QSharpError):
    """A verifier cannot be found or used; or, while judging, it failed on one completion."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A completion to be judged.

    Attributes:
        completion: its text.
        problem: the problem that it answers; None if that is not known.
        prompt: the text that the model read; None if it is not known.
        messages: of the request, if it was a chat.
        rollout: everything that is stored of it, as `GET /v1/rollouts/{id}` shows it; of an answer that is not stored,
            what the server said of it.
    """

    completion: str
    problem: Problem | None = None
    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    rollout: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_choice(cls, problem: Problem, choice: Mapping[str, Any]) -> "Case":
        """A choice of a completion or a chat that answers a problem."""
        return cls(
            completion=choice["text"] if "text" in choice else choice["message"].get("content") or "",
            problem=problem,
            prompt=problem.prompt if isinstance(problem.prompt, str) else None,
            messages=problem.messages,
            rollout={"finish_reason": choice.get("finish_reason")},
        )

    @property
    def finish_reason(self) -> str | None:
        """`stop` if the model ended it, or a stop string; `length` if it was cut off; None if that is not known."""
        return self.rollout.get("finish_reason")

    @property
    def answer(self) -> Any:
        """The reference answer: the problem's, else `answer` in the rollout's metadata; None if there is none."""
        if self.problem is not None and self.problem.answer is not None:
            return self.problem.answer
        return (self.rollout.get("metadata") or {}).get("answer")

    @property
    def question(self) -> str | None:
        """The text of the prompt, or of a chat's last message; None if it is not known."""
        if not self.messages:
            return self.prompt
        content = self.messages[-1].get("content")
        if isinstance(content, list):
            return "".join(part.get("text") or "" for part in content)
        return content


Verifier = Callable[[Case], float | Awaitable[float | None] | None]
