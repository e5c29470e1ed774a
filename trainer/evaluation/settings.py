"""What an evaluation measures."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from qsharp_core.errors import QSharpError
from qsharp_core.wire.guidance import BUDGETS
from trainer.evaluation.searches import search_of
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
        search: how each completion is searched for, as `trainer.evaluation.searches` spells it.
    """

    method: str = REFERENCE
    eta: float | None = None
    samples: int | None = None
    kl_total: float | None = None
    kl_token: float | None = None
    search: str | None = None

    @property
    def label(self) -> str:
        """The setting as people read it."""
        eta = "" if self.eta is None else f"eta {self.eta:g}"
        parts = (self.method, eta, budget_text(self.kl_total, self.kl_token), self.search)
        return ", ".join(part for part in parts if part)

    def guidance(self) -> dict[str, Any]:
        """The options of a request's `guidance` that are this setting's own: its budgets and its search."""
        options: dict[str, Any] = {name: nats for name in BUDGETS if (nats := getattr(self, name)) is not None}
        return options if self.search is None else {**options, "search": search_of(self.search)}

    def identity(self) -> dict[str, Any]:
        """What tells this setting from others, as JSON's data."""
        later = (*BUDGETS, "search")  # which older evaluations do not have
        return {name: value for name, value in asdict(self).items() if name not in later or value is not None}


def every_setting(
    methods: Iterable[str],
    etas: Iterable[float],
    kl_totals: Iterable[float | None] = (),
    kl_tokens: Iterable[float | None] = (),
    searches: Iterable[str | None] = (),
) -> tuple[Setting, ...]:
    """A setting for each combination, repeated values once; no budget and no search where none is named."""
    besides = tuple(product(tuple(kl_totals) or (None,), tuple(kl_tokens) or (None,), tuple(searches) or (None,)))
    found = (
        Setting(method, eta, None, total, token, search)
        for method, eta in product(methods, etas)
        for total, token, search in besides
    )
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

    def count(self, setting: Setting) -> int:
        """Samples of each problem under a setting."""
        return setting.samples or self.samples

    def identity(self, task: Task, judge: Judge) -> dict[str, Any]:
        """What tells this evaluation from others, as JSON's data; settings, problems and samples may be added later."""
        fields = asdict(self)
        del fields["settings"], fields["limit"], fields["samples"]
        fields["guidance"] = dict(self.guidance)
        verifiers = {verifier.name: verifier.weight for verifier in judge.verifiers}
        return {"format": 1, "command": "evaluate", "task": task.name, "verifiers": verifiers, **fields}
