"""The ablation, from rollouts to the report."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.of_problems import OfProblems, of_problems
from trainer.evaluation.settings import Setting
from trainer.experiments.ablation.choice import chosen
from trainer.experiments.ablation.plot import plot
from trainer.experiments.ablation.report import AblationOutcome, VariantOutcome, compared, table
from trainer.experiments.ablation.settings import Ablation, Variant
from trainer.experiments.ablation.unchanged import refuse_changed
from trainer.experiments.fields import loop_settings, with_base
from trainer.experiments.logged import logged
from trainer.experiments.served import Served, opened
from trainer.experiments.trained import trained
from trainer.loop.activation import ServedCritic
from trainer.loop.settings import LoopSettings
from trainer.loop.versions import Version
from trainer.rewards.verifiers import Judge

EVALUATION = "evaluation"
CHOSEN = "chosen.rollouts"
"""No variant has this name: they have no dot in it, and seeds are numbers."""


@dataclass(frozen=True)
class _Work:
    """What all variants are trained and measured with."""

    recipe: Ablation
    served: Served
    judge: Judge
    settings: LoopSettings
    data: list[Path]
    folder: Path


async def run(recipe: Ablation, folder: Path, console: Console) -> AblationOutcome:
    """Runs the ablation, or goes on with it where it was stopped."""
    task = recipe.problems()
    outcomes: list[list[VariantOutcome]] = []
    problems: list[list[Mapping[Setting, OfProblems]]] = []
    async with opened(recipe.model, recipe.server, folder, console) as served, recipe.judge() as judge:
        common = with_base(recipe.critic, served.root)
        settings = loop_settings(recipe, recipe.rollouts, task, served.model, common, folder / "critics")
        data = list(recipe.data) or [await logged(served.client, judge, settings, folder)]
        work = _Work(recipe, served, judge, settings, data, folder)
        for variant in recipe.variants:
            outcomes.append([])
            problems.append([])
            for seed in recipe.every_seed:
                console.print(f"[bold]{recipe.critic_name(variant, seed)}[/bold]", highlight=False)
                outcome, of_one = await _measured(work, variant, seed)
                outcomes[-1].append(outcome)
                problems[-1].append(of_one)
    variants, every = compared(outcomes, problems), [one for some in outcomes for one in some]
    console.print(table(variants, every, recipe.evaluate.samples))
    plot(folder / "report.png", recipe, variants, every)
    return AblationOutcome(data=[str(path) for path in data], results=every, over_seeds=variants)


async def _measured(work: _Work, variant: Variant, seed: int) -> tuple[VariantOutcome, dict[Setting, OfProblems]]:
    """Trains a variant with a seed, and measures what guidance by it gains: in all, and on each problem."""
    recipe, served, settings = work.recipe, work.served, work.settings
    name = recipe.critic_name(variant, seed)
    place = work.folder / name
    critic = with_base(recipe.settings(variant, seed), served.root)
    data = chosen(work.data, variant.rollouts, critic, work.folder / CHOSEN)
    refuse_changed(place, critic, data)
    critic_recipe = replace(settings.recipe, settings=critic, continues=False)
    version, report = await trained(critic_recipe, place, data)
    versions = ServedCritic(served.client, name, critic_recipe.out)
    await versions.activate(version)
    evaluation = recipe.evaluate.of(recipe, served.model, version.key, settings.task.task)
    evaluated = await evaluate(
        served.client, work.judge, settings.task, evaluation, place / EVALUATION, concurrency=settings.concurrency
    )
    await _unload(served, version)
    outcome = VariantOutcome(
        variant=variant.model_dump(mode="json", exclude_unset=True),
        seed=seed,
        critic=version.key,
        steps=report.steps,
        held_out=report.held_out.overall if report.held_out else None,
        results=evaluated.report.results,
    )
    return outcome, of_problems(evaluated.samples)


async def _unload(served: Served, version: Version) -> None:
    """Frees the memory of a version whose turn is over."""
    name, _, number = version.key.rpartition("@")
    await served.client.delete(f"/v1/critics/{name}/{number}")
