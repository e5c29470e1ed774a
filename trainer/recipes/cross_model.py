"""One critic, several references with the same tokenizer: what guidance by a critic is worth to models it never saw.

The first reference is the one that the critic was trained with. A critic that borrows its token embeddings from the
reference would read others with every other reference, so it gets a copy of those it was trained with; with
`embeddings = "borrowed"` it does not, which measures what that costs.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from matplotlib.figure import Figure
from pydantic import Field
from rich.console import Console

from qsharp_core.critic.checkpoint import read_card
from trainer.evaluate import evaluate
from trainer.evaluate_plot import draw, table
from trainer.recipes.fields import EvaluationFields, Fields, Sampled
from trainer.recipes.files import RecipeError
from trainer.recipes.quantise import Quantise, with_own_embeddings, write_quantised
from trainer.recipes.serving import opened
from trainer.rewards.verifiers import Judge, TaskRef
from trainer.tasks.registry import find_task
from trainer.training.model import local_folder


class Reference(Fields):
    """A model that is guided.

    Attributes:
        name: for people, and of its folder.
        model: a folder, a hub id or the name of an embedded model; None is the first one's, of the first reference the
            default model.
        quantise: round its weights.
        embeddings: the critic's: those it was trained with, or those of this reference.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    model: str | None = None
    quantise: Quantise | None = None
    embeddings: Literal["own", "borrowed"] = "own"


class CrossModel(Sampled):
    """What is done.

    Attributes:
        critic: its folder; None is the one that comes with the first reference.
        references: the first is the one that the critic was trained with.
    """

    FREE: ClassVar[dict[str, Any]] = {
        "server": True, "evaluate": {"etas": True, "methods": True, "limit": True}
    }  # fmt: skip

    kind: Literal["cross_model"]
    critic: Path | None = None
    references: tuple[Reference, ...] = Field(min_length=2)
    evaluate: EvaluationFields = EvaluationFields()


async def run(recipe: CrossModel, folder: Path, console: Console) -> dict[str, Any]:
    """Runs it; goes on where it was stopped."""
    first, *others = recipe.references
    if first.quantise is not None:
        raise RecipeError("references.0.quantise: the first reference is the one that the critic was trained with")
    task = TaskRef(find_task(recipe.task), recipe.task)
    evaluated: list[dict[str, Any]] = []
    about: list[dict[str, Any]] = []
    flags = [] if recipe.critic is None else ["--critic", str(recipe.critic)]
    async with recipe.judge() as judge:
        root, critic, found = await _measured(recipe, first, first.model, flags, task, judge, folder, console)
        evaluated.append(found)
        about.append({"reference": first.name, "model": root})
        for reference in others:
            model, error = reference.model or root, None
            if reference.quantise is not None:
                target = folder / "models" / reference.name
                target.parent.mkdir(parents=True, exist_ok=True)
                error = write_quantised(local_folder(model), target, reference.quantise)
                model = str(target)
            own = reference.embeddings == "own" and bool(read_card(critic).borrow)
            path = with_own_embeddings(critic, local_folder(root), folder / "critic") if own else critic
            _, _, found = await _measured(
                recipe, reference, model, ["--critic", str(path)], task, judge, folder, console
            )
            evaluated.append(found)
            about.append({"reference": reference.name, "model": model, "relative_error": error, "own_embeddings": own})
    for reference, found in zip(recipe.references, evaluated, strict=True):
        shown = table(found)
        shown.title = reference.name
        console.print(shown)
    _plot(folder / "report.png", recipe, evaluated)
    return {
        "references": [{**one, "results": found["results"]} for one, found in zip(about, evaluated, strict=True)],
        "failures": [failure for found in evaluated for failure in found["failures"]],
    }


async def _measured(
    recipe: CrossModel, reference: Reference, model: str | None, critic: list[str], task: TaskRef, judge: Judge,
    folder: Path, console: Console,
) -> tuple[str, Path, dict[str, Any]]:  # fmt: skip
    """Serves a reference and measures it: its folder or hub id, the critic's folder, the report."""
    own = folder / reference.name
    own.mkdir(parents=True, exist_ok=True)
    async with opened(model, recipe.server, own, console, critic=critic) as served:
        loaded = await served.client.critic(None)
        if loaded is None:
            raise RecipeError("critic: name one, there is none that comes with the first reference")
        evaluation = recipe.evaluate.of(recipe, served.model, loaded["id"], task.task)
        found = await evaluate(
            served.client, judge, task, evaluation, own / "evaluation", concurrency=recipe.server.concurrency
        )
        return served.root, Path(loaded["path"]), found


def _plot(path: Path, recipe: CrossModel, evaluated: list[dict[str, Any]]) -> None:
    """Accuracy against KL, a panel for each reference."""
    figure = Figure(figsize=(4.8 * len(evaluated), 4.4), dpi=140, layout="constrained")
    panels = figure.subplots(1, len(evaluated), sharex=True, sharey=True)
    for axes, reference, found in zip(panels, recipe.references, evaluated, strict=True):
        draw(axes, found)
        axes.set_title(reference.name, fontsize=10)
        axes.set_xlabel("KL to this reference, nats")
    problems, samples = evaluated[0]["results"][0]["problems"], recipe.evaluate.samples
    figure.suptitle(f"{recipe.task}: one critic, {problems} problems × {samples} samples (± one standard error)")
    figure.savefig(path)
