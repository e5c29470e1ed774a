"""The general experiment: a model learns a task by the loop, and guidance is measured over eta.

Rounds of rollouts become versions of a critic (`trainer.loop`); the last one guides, by Q♯ and by Controlled Decoding,
on problems that nobody trained on, beside the reference and what majorities and best-of-k make of its samples.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_validator
from rich.console import Console

from trainer.evaluate import evaluate
from trainer.evaluate_plot import plot, table
from trainer.loop.activation import ServedCritic, Version
from trainer.loop.rounds import run_loop
from trainer.loop.settings import Budget
from trainer.recipes.fields import (
    SERVED,
    EvaluationFields,
    Published,
    RolloutFields,
    Sampled,
    loop_settings,
    with_base,
)
from trainer.recipes.serving import opened
from trainer.rewards.verifiers import TaskRef
from trainer.tasks.registry import find_task
from trainer.training.settings import TrainSettings


class Experiment(Sampled):
    """What is done.

    Attributes:
        model: the reference, a folder or a hub id; None is the default model.
        critic: as `qsharp train` has it; its base is the served model unless it names another.
        rollouts: rounds of them.
        published: numbers to put beside the measured ones.
    """

    # More may be measured later, on another server.
    FREE: ClassVar[dict[str, Any]] = {
        "server": True, "published": True, "evaluate": {"etas": True, "methods": True, "limit": True}
    }  # fmt: skip

    kind: Literal["experiment"]
    model: str | None = None
    critic: TrainSettings = TrainSettings(base=SERVED)
    rollouts: RolloutFields = RolloutFields()
    evaluate: EvaluationFields = EvaluationFields()
    published: Published | None = None

    @field_validator("critic", mode="before")
    @classmethod
    def _start(cls, value: Any) -> Any:
        return {"base": SERVED, **value} if isinstance(value, dict) else value


async def run(recipe: Experiment, folder: Path, console: Console) -> dict[str, Any]:
    """Runs it; goes on where it was stopped."""
    task = TaskRef(find_task(recipe.task), recipe.task)
    out = folder / "critics"
    async with opened(recipe.model, recipe.server, folder, console) as served, recipe.judge() as judge:
        critic = with_base(recipe.critic, served.root)
        settings = loop_settings(recipe, recipe.rollouts, task, served.model, critic, out)
        versions = ServedCritic(served.client, critic.name, out)
        budget = Budget(rounds=len(recipe.rollouts.samples))
        loop = await run_loop(served.client, versions, judge, settings, budget, folder / "loop", console)
        # Without one that is better than none, the last one is measured: that is a result, too.
        last = Version.of(loop["critic"] or loop["rounds"][-1]["train"]["critic"], out)
        assert last is not None
        await versions.activate(last)  # this server may be a later one than the loop's
        console.print("[bold]evaluation[/bold]", highlight=False)
        evaluation = recipe.evaluate.of(recipe, served.model, last.key, task.task)
        evaluated = await evaluate(
            served.client, judge, task, evaluation, folder / "evaluation", concurrency=settings.concurrency
        )
    console.print(table(evaluated, recipe.published.rows() if recipe.published else None))
    if recipe.published:
        console.print(f"published: {recipe.published.others()}", highlight=False)
    plot(folder / "report.png", evaluated, levels=True)
    return {
        "critic": last.key,
        "activated": loop["critic"] == last.key,
        "rounds": [round_of(entry) for entry in loop["rounds"]],
        "results": evaluated["results"],
        "failures": evaluated["failures"],
        "seconds": {"loop": loop["seconds"], "evaluate": evaluated["seconds"]},
    }


def round_of(entry: dict[str, Any]) -> dict[str, Any]:
    """What a round came to, from its entry in the loop's report."""
    trained, activated = entry["train"], entry["activate"]
    return {
        "round": entry["round"],
        "guided_by": entry["collect"]["guided_by"],
        "rollouts": entry["collect"]["wanted"],
        "critic": trained["critic"],
        "steps": trained["steps"],
        "held_out": trained["held_out"]["overall"],
        "against_parent": (trained["parent"] or {}).get("comparison"),
        "activated": activated["activated"],
        "why": activated["why"],
        "seconds": entry["seconds"],
    }
