"""One critic, several references with the same tokenizer: what guidance by a critic is worth to models it never saw.

The first reference is the one that the critic was trained with. A critic that borrows its token embeddings from the
reference would read others with every other reference, so it gets a copy of those it was trained with; with
`embeddings = "borrowed"` it does not, which measures what that costs. A native critic reads each reference's own hidden
states and embeddings.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from matplotlib.figure import Figure
from pydantic import Field
from rich.console import Console

from qsharp_core.critic.checkpoint import read_card
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.plot import draw
from trainer.evaluation.report import EvaluationReport, SettingReport
from trainer.evaluation.table import tables
from trainer.experiments.fields import MEASURED, EvaluationFields, RecipeFields, SampledFields
from trainer.experiments.files import RecipeError
from trainer.experiments.other_reference import made_for_another, with_own_embeddings
from trainer.experiments.quantise import Quantise, write_quantised
from trainer.experiments.report import Outcome
from trainer.experiments.served import opened
from trainer.reports import ReportPart
from trainer.rewards.verifiers import Judge, TaskRef
from trainer.training.base import local_folder


class GuidedReference(RecipeFields):
    """A model that is guided.

    Attributes:
        name: for people, and of its folder in the run's.
        model: a folder, a hub id or the name of an embedded model. None is the first reference's model; for the first
            reference itself it is the default model.
        quantise: how its weights are rounded; None if they are not.
        embeddings: whether the critic reads the embeddings that it was trained with, or this reference's.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    model: str | None = None
    quantise: Quantise | None = None
    embeddings: Literal["own", "borrowed"] = "own"


class CrossModel(SampledFields):
    """The fields of the recipe.

    Attributes:
        critic: the critic's folder; None is the critic that comes with the first reference.
        references: the first is the one that the critic was trained with.
        evaluate: what is measured of each reference.
    """

    FREE: ClassVar[dict[str, Any]] = {
        "server": True, "launcher": True, "evaluate": MEASURED
    }  # fmt: skip

    kind: Literal["cross_model"]
    critic: Path | None = None
    references: tuple[GuidedReference, ...] = Field(min_length=2)
    evaluate: EvaluationFields = EvaluationFields()


class ReferenceOutcome(ReportPart):
    """What guidance of one reference came to.

    Attributes:
        reference: its name.
        model: its folder or hub id.
        relative_error: of rounded weights; None if they are not rounded.
        own_embeddings: whether the critic had the embeddings that it was trained with, instead of this reference's;
            None for the first reference, whose embeddings these are.
        results: the evaluation's; the unguided reference first.
    """

    reference: str
    model: str
    relative_error: float | None = None
    own_embeddings: bool | None = None
    results: list[SettingReport]


class CrossModelOutcome(Outcome):
    """What guidance of each reference came to, and the messages of verifiers that failed."""

    references: list[ReferenceOutcome]
    failures: list[str]


async def run(recipe: CrossModel, folder: Path, console: Console) -> CrossModelOutcome:
    """Runs the experiment, or goes on with it where it was stopped."""
    first, *others = recipe.references
    if first.quantise is not None:
        raise RecipeError("references.0.quantise: the first reference is the one that the critic was trained with")
    task = recipe.problems()
    reports: list[EvaluationReport] = []
    outcomes: list[ReferenceOutcome] = []
    flags = [] if recipe.critic is None else ["--critic", str(recipe.critic)]
    async with recipe.judge() as judge:
        root, critic, report = await _measured(recipe, first, first.model, flags, task, judge, folder, console)
        reports.append(report)
        outcomes.append(ReferenceOutcome(reference=first.name, model=root, results=report.results))
        for reference in others:
            model, error = reference.model or root, None
            if reference.quantise is not None:
                target = folder / "models" / reference.name
                target.parent.mkdir(parents=True, exist_ok=True)
                error = write_quantised(local_folder(model), target, reference.quantise)
                model = str(target)
            card = read_card(critic)
            kept, path = reference.embeddings == "own" and bool(card.borrow), critic
            if kept:
                path = with_own_embeddings(critic, local_folder(root), folder / "critic")
            elif card.backbone == "reference":
                place = folder / "critics" / reference.name
                path = made_for_another(critic, local_folder(root), local_folder(model), place)
            _, _, report = await _measured(
                recipe, reference, model, ["--critic", str(path)], task, judge, folder, console
            )
            reports.append(report)
            outcomes.append(
                ReferenceOutcome(
                    reference=reference.name, model=model, relative_error=error, own_embeddings=kept,
                    results=report.results,
                )
            )  # fmt: skip
    for reference, report in zip(recipe.references, reports, strict=True):
        rows, *more = tables(report.samples, report.results, graded=report.graded)
        rows.title = reference.name
        console.print(rows, *more)
    _plot(folder / "report.png", recipe, reports)
    return CrossModelOutcome(references=outcomes, failures=[one for report in reports for one in report.failures])


async def _measured(
    recipe: CrossModel, reference: GuidedReference, model: str | None, critic: list[str], task: TaskRef, judge: Judge,
    folder: Path, console: Console,
) -> tuple[str, Path, EvaluationReport]:  # fmt: skip
    """Serves a reference and measures it. Returns its folder or hub id, the critic's folder, and the report."""
    place = folder / reference.name
    place.mkdir(parents=True, exist_ok=True)
    async with opened(model, recipe.server, place, console, critic=critic) as served:
        loaded = await served.client.critic(None)
        if loaded is None:
            raise RecipeError("critic: name one, there is none that comes with the first reference")
        evaluation = recipe.evaluate.of(recipe, served.model, loaded["id"], task.task)
        evaluated = await evaluate(
            served.client, judge, task, evaluation, place / "evaluation", concurrency=recipe.server.concurrency
        )
        return served.root, Path(loaded["path"]), evaluated.report


def _plot(path: Path, recipe: CrossModel, reports: list[EvaluationReport]) -> None:
    """Draws accuracy against KL, in a panel for each reference."""
    figure = Figure(figsize=(4.8 * len(reports), 4.4), dpi=140, layout="constrained")
    panels = figure.subplots(1, len(reports), sharex=True, sharey=True)
    for axes, reference, report in zip(panels, recipe.references, reports, strict=True):
        draw(axes, report)
        axes.set_title(reference.name, fontsize=10)
        axes.set_xlabel("KL to this reference, nats")
    problems, samples = reports[0].reference.problems, recipe.evaluate.samples
    figure.suptitle(f"{recipe.source}: one critic, {problems} problems × {samples} samples (± one standard error)")
    figure.savefig(path)
