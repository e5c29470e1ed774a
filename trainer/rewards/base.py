"""What a verifier gets and gives.

A verifier is a plain callable, sync or async:

    def long_enough(case: Case) -> float | None:
        return float(len(case.completion) > 100)

It returns a reward, or None where it does not apply: nothing to compare with, a prompt of another kind. Raising,
hanging or crashing is a *failure*: the rollout then gets no reward from anybody, for nobody knows what it earned.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qsharp_core.errors import QSharpError
from trainer.tasks.base import Problem


class VerifierError(QSharpError):
    """A verifier that cannot be found or used; or, while judging, that failed on one completion."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A completion to be judged.

    Attributes:
        completion: its text.
        problem: what it answers; None if that is not known.
        prompt: what the model read, as text; None if it is not known.
        messages: the request's, of a chat.
        rollout: all that is known of it, as `GET /v1/rollouts/{id}` shows it.
    """

    completion: str
    problem: Problem | None = None
    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    rollout: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> Any:
        """The reference: the problem's, else what the rollout's metadata have as `answer`; None if there is none."""
        if self.problem is not None and self.problem.answer is not None:
            return self.problem.answer
        return (self.rollout.get("metadata") or {}).get("answer")

    @property
    def question(self) -> str | None:
        """The prompt's text, or that of a chat's last message."""
        if not self.messages:
            return self.prompt
        content = self.messages[-1].get("content")
        if isinstance(content, list):
            return "".join(part.get("text") or "" for part in content)
        return content


Verifier = Callable[[Case], float | Awaitable[float | None] | None]
