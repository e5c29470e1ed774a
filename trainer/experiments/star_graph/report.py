"""What the stages write: how the trainings went, `report.json`, and the table."""

import math
from typing import Literal

from rich.table import Table

from trainer.evaluation.report import EvaluationReport, SettingReport
from trainer.evaluation.table import table as evaluation_table
from trainer.experiments.report import Outcome
from trainer.reports import Report, ReportPart

REPORT = "report.json"


class ReferenceEntry(ReportPart):
    """Mean losses of the last steps of pre-training, in nats per token: of the next token and of later ones."""

    step: int
    next: float
    later: float


class ReferenceLog(Report):
    """How pre-training went: `reference.json`."""

    format: Literal[1] = 1
    seconds: float
    log: list[ReferenceEntry]


class CriticEntry(ReportPart):
    """The mean loss of the last steps in nats, and the fraction of graphs whose right arm scores highest."""

    step: int
    loss: float
    right_arm: float


class CriticLog(Report):
    """How the critic's training went: `critic.json`.

    Attributes:
        seconds: in all.
        seconds_waiting_for_rollouts: those of them in which the training waited for the server.
        rollouts: that were sampled.
        steps: of the optimizer.
    """

    format: Literal[1] = 1
    seconds: float
    seconds_waiting_for_rollouts: float
    rollouts: int
    steps: int
    log: list[CriticEntry]


class Stages(ReportPart):
    """How both trainings went."""

    reference: ReferenceLog
    critic: CriticLog


class BestSetting(ReportPart):
    """The setting of Q♯ with the highest accuracy; of several the one with the least KL."""

    method: str
    eta: float
    accuracy: float
    accuracy_se: float | None
    kl: float
    kl_se: float | None


class StarGraphOutcome(Outcome):
    """What the experiment came to.

    Attributes:
        task, split, samples, critic, seed: what was measured.
        graph: the shape of the graphs, as `G(5,5)`.
        shortcut: how often the shortcut is right.
        least_kl: the KL in nats of always taking the right arm, for a reference that takes each arm alike.
        reference: the reference's accuracy.
        best: of the guided settings; None if Q♯ was not measured.
        results: the evaluation's; the reference first.
        stages: how the trainings went.
        seconds: by stage, and of all of them.
    """

    task: str
    split: str
    samples: int
    critic: str | None
    seed: int
    graph: str
    shortcut: float
    least_kl: float
    reference: float
    best: BestSetting | None
    results: list[SettingReport]
    stages: Stages
    seconds: dict[str, float]


def outcome(graph: str, degree: int, stages: Stages, evaluated: EvaluationReport) -> StarGraphOutcome:
    """The outcome of the stages.

    Args:
        graph: the shape of the graphs, as `G(5,5)`.
        degree: arms of a graph.
        stages: how the trainings went.
        evaluated: the evaluation's report.
    """
    results = evaluated.results
    assert evaluated.reference.accuracy is not None
    guided = [r for r in results if r.method == "qsharp" and r.accuracy is not None and r.kl is not None]
    best = max(guided, key=lambda r: (r.point[1], -r.point[0]), default=None)
    seconds = {
        "reference": stages.reference.seconds, "critic": stages.critic.seconds, "evaluation": evaluated.seconds,
    }  # fmt: skip
    return StarGraphOutcome(
        task=evaluated.task,
        split=evaluated.split,
        samples=evaluated.samples,
        critic=evaluated.critic,
        seed=evaluated.seed,
        graph=graph,
        shortcut=1 / degree,
        least_kl=math.log(degree),
        reference=evaluated.reference.accuracy,
        best=None if best is None else BestSetting(**{name: getattr(best, name) for name in BestSetting.model_fields}),
        results=results,
        stages=stages,
        seconds=seconds | {"all": sum(seconds.values())},
    )


def least_kl(accuracy: float, reference: float) -> float:
    """The least KL, in nats, of any policy with this accuracy to a reference with the accuracy `reference`.

    `KL(Bernoulli(accuracy) ‖ Bernoulli(reference))`, by the data-processing inequality.
    """
    assert 0 < reference < 1
    right = accuracy * math.log(accuracy / reference) if accuracy > 0 else 0.0
    wrong = (1 - accuracy) * math.log((1 - accuracy) / (1 - reference)) if accuracy < 1 else 0.0
    return right + wrong


def table(outcome: StarGraphOutcome) -> Table:
    """A table with a row for each method and eta."""
    rows = evaluation_table(outcome.results)
    rows.title = (
        f"{outcome.graph}, {outcome.results[0].problems} held-out graphs; the shortcut is right "
        f"{outcome.shortcut:.3f} of the time, and always taking the right arm costs {outcome.least_kl:.2f} nats"
    )
    return rows
