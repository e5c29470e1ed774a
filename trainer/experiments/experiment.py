"""The general experiment: a critic learns a task by the loop, and guidance by it is measured over eta.

Rounds of rollouts become versions of a critic (`trainer.loop`). The last version guides, by Q♯ and by Controlled
Decoding, on problems that nobody trained on. Beside it stand the reference, and what majorities and best-of-k make of
its samples.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_validator
from rich.console import Console

from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.plot import plot
from trainer.evaluation.report import SettingReport
from trainer.evaluation.table import tables
from trainer.experiments.fields import (
    MEASURED,
    EvaluationFields,
    Published,
    RolloutFields,
    SampledFields,
    loop_settings,
    with_base,
    with_kind,
)
from trainer.experiments.report import Outcome
from trainer.experiments.served import opened
from trainer.loop.activation import ServedCritic
from trainer.loop.report import RoundReport
from trainer.loop.rounds import run_loop
from trainer.loop.settings import Budget
from trainer.loop.versions import Version
from trainer.reports import ReportPart
from trainer.training.report import Comparison, Measures
from trainer.training.settings import TrainSettings


class Experiment(SampledFields):
    """The fields of the recipe.

    Attributes:
        model: the reference, a folder or a hub id; None is the default model.
        critic: settings of `qsharp train`; the base is the served model unless they name another.
        rollouts: the rounds.
        evaluate: what is measured at the end.
        published: numbers to put beside the measured ones.
    """

    # More may be measured later, on another server.
    FREE: ClassVar[dict[str, Any]] = {
        "server": True, "launcher": True, "published": True, "evaluate": MEASURED
    }  # fmt: skip

    kind: Literal["experiment"]
    model: str | None = None
    critic: TrainSettings = TrainSettings(**with_kind({}))
    rollouts: RolloutFields = RolloutFields()
    evaluate: EvaluationFields = EvaluationFields()
    published: Published | None = None

    @field_validator("critic", mode="before")
    @classmethod
    def _start(cls, value: Any) -> Any:
        return with_kind(value) if isinstance(value, dict) else value


class RoundOutcome(ReportPart):
    """What a round of the loop came to.

    Attributes:
        guided_by: the version that guided the roll-ins; None without one.
        rollouts: rollouts of the round.
        critic: the version that was trained.
        steps: of the optimizer.
        held_out: measures of the version; None if nothing was held out.
        against_parent: the comparison with the version before; None if there was none.
        activated, why: whether the version was better, and why.
        seconds: by stage.
    """

    round: int
    guided_by: str | None
    rollouts: int
    critic: str
    steps: int
    held_out: Measures | None
    against_parent: Comparison | None
    activated: bool
    why: str
    seconds: dict[str, float]


class ExperimentOutcome(Outcome):
    """What an experiment came to.

    Attributes:
        critic: the version that was measured.
        activated: whether the loop had activated it.
        rounds: of the loop.
        results: the evaluation's.
        failures: messages of verifiers that failed in the evaluation.
        seconds: of the loop and of the evaluation.
    """

    critic: str
    activated: bool
    rounds: list[RoundOutcome]
    results: list[SettingReport]
    failures: list[str]
    seconds: dict[str, float]


async def run(recipe: Experiment, folder: Path, console: Console) -> ExperimentOutcome:
    """Runs the experiment, or goes on with it where it was stopped."""
    task = recipe.problems()
    out = folder / "critics"
    async with opened(recipe.model, recipe.server, folder, console) as served, recipe.judge() as judge:
        critic = with_base(recipe.critic, served.root)
        settings = loop_settings(recipe, recipe.rollouts, task, served.model, critic, out)
        versions = ServedCritic(served.client, critic.name, out)
        budget = Budget(rounds=len(recipe.rollouts.samples))
        loop = await run_loop(served.client, versions, judge, settings, budget, folder / "loop", console)
        rounds = [_round(entry) for entry in loop.rounds]
        # Without one that is better than none, the last one is measured: that is a result, too.
        measured = Version.of(loop.critic or rounds[-1].critic, out)
        await versions.activate(measured)  # this server may be a later one than the loop's
        console.print("[bold]evaluation[/bold]", highlight=False)
        evaluation = recipe.evaluate.of(recipe, served.model, measured.key, task.task)
        evaluated = await evaluate(
            served.client, judge, task, evaluation, folder / "evaluation", concurrency=settings.concurrency
        )
    report = evaluated.report
    others = recipe.published.rows() if recipe.published else None
    console.print(*tables(report.samples, report.results, others, report.graded))
    if recipe.published:
        console.print(f"published: {recipe.published.others()}", highlight=False)
    plot(folder / "report.png", report, levels=True)
    return ExperimentOutcome(
        critic=measured.key,
        activated=loop.critic == measured.key,
        rounds=rounds,
        results=report.results,
        failures=report.failures,
        seconds={"loop": loop.seconds, "evaluate": report.seconds},
    )


def _round(entry: RoundReport) -> RoundOutcome:
    """What a round came to, from its entry in the loop's report."""
    assert entry.collect is not None
    assert entry.train is not None
    assert entry.activate is not None
    return RoundOutcome(
        round=entry.round,
        guided_by=entry.collect.guided_by,
        rollouts=entry.collect.wanted,
        critic=entry.train.critic,
        steps=entry.train.steps,
        held_out=entry.train.held_out.overall if entry.train.held_out else None,
        against_parent=entry.train.parent.comparison if entry.train.parent else None,
        activated=entry.activate.activated,
        why=entry.activate.why,
        seconds=entry.seconds,
    )
