"""What an evaluation measures."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from qsharp_core.errors import QSharpError
from qsharp_core.wire.guidance import BUDGETS
from trainer.rewards.verifiers import Judge
from trainer.rollouts.parameters import SamplingParameters
from trainer.tasks.base import Task

REFERENCE = "reference"
"""The method of completions that are not guided."""


class EvaluateError(QSharpError):
    """The evaluation cannot go on, or has nothing to report."""


@dataclass(frozen=True)
class Setting:
    """How completions are guided; the reference has no `eta`.

    Attributes:
        samples: overrides the evaluation's number.
        kl_total, kl_token: most nats that a completion, or each token, may spend.
    """

    method: str = REFERENCE
    eta: float | None = None
    samples: int | None = None
    kl_total: float | None = None
    kl_token: float | None = None

    @property
    def label(self) -> str:
        """The setting as people read it."""
        eta = "" if self.eta is None else f"eta {self.eta:g}"
        return ", ".join(part for part in (self.method, eta, budget_text(self.kl_total, self.kl_token)) if part)

    @property
    def budget(self) -> dict[str, float]:
        """The options of a request's `guidance` that limit its KL divergence."""
        return {name: nats for name in BUDGETS if (nats := getattr(self, name)) is not None}

    def identity(self) -> dict[str, Any]:
        """What tells this setting from others, as JSON's data."""
        return {name: value for name, value in asdict(self).items() if name not in BUDGETS or value is not None}


def every_setting(
    methods: Iterable[str],
    etas: Iterable[float],
    kl_totals: Iterable[float | None] = (),
    kl_tokens: Iterable[float | None] = (),
) -> tuple[Setting, ...]:
    """A setting for each combination, repeated values once; no budget where none is named."""
    totals, tokens = tuple(kl_totals) or (None,), tuple(kl_tokens) or (None,)
    found = (Setting(*way, None, *budget) for way in product(methods, etas) for budget in product(totals, tokens))
    return tuple(dict.fromkeys(found))


def budget_text(kl_total: float | None, kl_token: float | None) -> str:
    """A budget as people read it; empty where there is none."""
    limits = ((kl_total, "nats"), (kl_token, "a token"))
    return " and ".join(f"≤ {most:g} {of}" for most, of in limits if most is not None)


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
