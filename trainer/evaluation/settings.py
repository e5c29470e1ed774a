"""What an evaluation measures."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from qsharp_core.errors import QSharpError
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
        kl_total, kl_token: budgets of KL divergence, in nats.
        search: how each of them is searched for, as `trainer.evaluation.searches` spells it.
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
        return self.method if self.eta is None else f"{way_of(self.method, self)}, eta {self.eta:g}"

    def identity(self) -> dict[str, Any]:
        """What tells this setting from others, as JSON's data."""
        later = ("kl_total", "kl_token", "search")  # which older evaluations do not have
        fields = asdict(self)
        return {name: value for name, value in fields.items() if name not in later or value is not None}

    def guidance(self) -> dict[str, Any]:
        """The options of the request's `guidance` that are this setting's own."""
        budgets = {"kl_total": self.kl_total, "kl_token": self.kl_token}
        options: dict[str, Any] = {name: value for name, value in budgets.items() if value is not None}
        return options if self.search is None else {**options, "search": search_of(self.search)}


class Limited(Protocol):
    """What has budgets and a search; see `Setting`."""

    @property
    def kl_total(self) -> float | None: ...
    @property
    def kl_token(self) -> float | None: ...
    @property
    def search(self) -> str | None: ...


def way_of(method: str, setting: Limited) -> str:
    """The method as people read it, with its search and its budgets."""
    parts = [
        setting.search,
        None if setting.kl_total is None else f"kl_total={setting.kl_total:g}",
        None if setting.kl_token is None else f"kl_token={setting.kl_token:g}",
    ]
    return " ".join([method, *filter(None, parts)])


def settings_of(
    methods: Iterable[str],
    etas: Iterable[float],
    searches: Iterable[str] = (),
    kl_totals: Iterable[float] = (),
    kl_tokens: Iterable[float] = (),
) -> tuple[Setting, ...]:
    """Every method at every eta: by itself, with each search, and with each budget."""
    listed = tuple(dict.fromkeys(etas))
    ways = [
        Setting(),
        *(Setting(search=search) for search in searches),
        *(Setting(kl_total=nats) for nats in kl_totals),
        *(Setting(kl_token=nats) for nats in kl_tokens),
    ]
    return tuple(
        replace(way, method=method, eta=eta)
        for method in dict.fromkeys(methods)
        for way in dict.fromkeys(ways)
        for eta in listed
    )


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
