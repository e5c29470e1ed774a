"""What an evaluation measures."""

from dataclasses import asdict, dataclass
from typing import Any

from qsharp_core.errors import QSharpError
from trainer.rewards.verifiers import Judge
from trainer.rollouts.parameters import SamplingParameters
from trainer.tasks.base import Task

REFERENCE = "reference"
"""The method of completions that are not guided."""


class EvaluateError(QSharpError):
    """The evaluation cannot go on, or has nothing to report."""


@dataclass(frozen=True)
class Setting:
    """How completions are guided; the reference has no `eta`. `samples` overrides the evaluation's number."""

    method: str = REFERENCE
    eta: float | None = None
    samples: int | None = None

    @property
    def label(self) -> str:
        """The setting as people read it."""
        return self.method if self.eta is None else f"{self.method}, eta {self.eta:g}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is to be measured.

    Attributes:
        split: the split of the task whose problems are sampled.
        model: the name that the server serves the reference under.
        samples: completions of each problem under each setting.
        sampling: how completions are sampled.
        settings: settings beside the reference, which is always measured.
        critic: exact version of the critic; None where nothing is guided or scored.
        guidance: other options of the requests, by name.
        scored: whether the critic scores each completion, for best-of-k and weighted majorities.
        vote: name of what completions vote for, where it is not the task's own.
        limit: only the first so many problems are measured; None is all of them.
        seed: another seed makes other samples.
    """

    split: str
    model: str
    samples: int
    sampling: SamplingParameters
    settings: tuple[Setting, ...] = ()
    critic: str | None = None
    guidance: tuple[tuple[str, Any], ...] = ()
    scored: bool = True
    vote: str | None = None
    limit: int | None = None
    seed: int = 0

    def identity(self, task: Task, judge: Judge) -> dict[str, Any]:
        """What tells this evaluation from others, as JSON's data; settings and problems may be added to it later."""
        fields = asdict(self)
        del fields["settings"], fields["limit"]
        fields["guidance"] = dict(self.guidance)
        verifiers = {verifier.name: verifier.weight for verifier in judge.verifiers}
        return {"format": 1, "command": "evaluate", "task": task.name, "verifiers": verifiers, **fields}
