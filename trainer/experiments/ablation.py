"""Critics of different heads and losses, trained on the same rollouts, and what guidance by each of them gains.

The rollouts are the reference's. The recipe samples them, or is given Parquet files (of `qsharp export`, or a loop's
`round-*/rollouts.parquet`).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from matplotlib.figure import Figure
from pydantic import Field, JsonValue, field_validator, model_validator
from rich.console import Console
from rich.table import Table

from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.plot import GREY, by_strength
from trainer.evaluation.report import SettingReport
from trainer.experiments.fields import (
    MEASURED,
    SERVED,
    EvaluationFields,
    RecipeFields,
    RolloutFields,
    SampledFields,
    loop_settings,
    with_base,
)
from trainer.experiments.logged import logged
from trainer.experiments.report import Outcome
from trainer.experiments.served import Served, opened
from trainer.experiments.trained import trained
from trainer.loop.activation import ServedCritic
from trainer.loop.settings import LoopSettings
from trainer.loop.versions import Version
from trainer.reports import ReportPart
from trainer.rewards.verifiers import Judge
from trainer.training.report import Measures
from trainer.training.settings import TrainSettings


class Variant(RecipeFields):
    """A critic of the ablation; what is None is as in the recipe's `critic`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    head: Literal["V", "Q"] | None = None
    atoms: tuple[float, ...] | None = None
    loss: Literal["likelihood", "squared"] | None = None
    mlp: int | None = None
    layers: int | None = None
    weigh: Literal["rollouts", "nodes"] | None = None


class Ablation(SampledFields):
    """The fields of the recipe.

    Attributes:
        model: the reference, a folder or a hub id; None is the default model.
        data: Parquet files of rollouts to learn from; without any, `rollouts` are sampled.
        rollouts: how many rollouts are sampled.
        critic: what the variants have in common.
        variants: each becomes version 1 of a critic of its name.
        evaluate: what is measured of each variant.
    """

    # More variants, or measurements, may be added later.
    FREE: ClassVar[dict[str, Any]] = {
        "server": True, "launcher": True, "variants": True, "evaluate": MEASURED
    }  # fmt: skip

    kind: Literal["ablation"]
    model: str | None = None
    data: tuple[Path, ...] = ()
    rollouts: RolloutFields = RolloutFields()
    critic: TrainSettings = TrainSettings(base=SERVED)
    variants: tuple[Variant, ...] = Field(min_length=1)
    evaluate: EvaluationFields = EvaluationFields(methods=("qsharp",))

    @field_validator("critic", mode="before")
    @classmethod
    def _start(cls, value: Any) -> Any:
        return {"base": SERVED, **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _checked(self) -> "Ablation":
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError("variants must have different names")
        for variant in self.variants:
            self.settings(variant)
        return self

    def settings(self, variant: Variant) -> TrainSettings:
        """The settings of a variant's training."""
        return TrainSettings.model_validate(self.critic.model_dump() | variant.model_dump(exclude_none=True))


class VariantOutcome(ReportPart):
    """What one variant came to.

    Attributes:
        variant: the variant's fields.
        critic: the version that was trained, `name@version`.
        steps: of the optimizer.
        held_out: measures of the version; None if nothing was held out.
        results: the evaluation's; the reference first.
    """

    variant: dict[str, JsonValue]
    critic: str
    steps: int
    held_out: Measures | None
    results: list[SettingReport]


class AblationOutcome(Outcome):
    """What the variants came to, and the Parquet files that they learned from."""

    data: list[str]
    results: list[VariantOutcome]


async def run(recipe: Ablation, folder: Path, console: Console) -> AblationOutcome:
    """Runs the ablation, or goes on with it where it was stopped."""
    task = recipe.problems()
    results: list[VariantOutcome] = []
    async with opened(recipe.model, recipe.server, folder, console) as served, recipe.judge() as judge:
        common = with_base(recipe.critic, served.root)
        settings = loop_settings(recipe, recipe.rollouts, task, served.model, common, folder / "critics")
        data = list(recipe.data) or [await logged(served.client, judge, settings, folder)]
        for variant in recipe.variants:
            console.print(f"[bold]{variant.name}[/bold]", highlight=False)
            results.append(await _measured(recipe, variant, served, judge, settings, data, folder))
    console.print(_table(results, recipe.evaluate.samples))
    _plot(folder / "report.png", recipe, results)
    return AblationOutcome(data=[str(path) for path in data], results=results)


async def _measured(
    recipe: Ablation, variant: Variant, served: Served, judge: Judge, settings: LoopSettings, data: list[Path],
    folder: Path,
) -> VariantOutcome:  # fmt: skip
    """Trains a variant, and measures what guidance by it gains."""
    critic = with_base(recipe.settings(variant), served.root)
    critic_recipe = replace(settings.recipe, settings=critic, continues=False)
    version, report = await trained(critic_recipe, folder / variant.name, data)
    versions = ServedCritic(served.client, variant.name, critic_recipe.out)
    await versions.activate(version)
    evaluation = recipe.evaluate.of(recipe, served.model, version.key, settings.task.task)
    evaluated = await evaluate(
        served.client, judge, settings.task, evaluation, folder / variant.name / "evaluation",
        concurrency=settings.concurrency,
    )  # fmt: skip
    await _unload(served, version)
    return VariantOutcome(
        variant=variant.model_dump(mode="json", exclude_none=True),
        critic=version.key,
        steps=report.steps,
        held_out=report.held_out.overall if report.held_out else None,
        results=evaluated.results,
    )


async def _unload(served: Served, version: Version) -> None:
    """Frees the memory of a version whose turn is over."""
    name, _, number = version.key.rpartition("@")
    await served.client.delete(f"/v1/critics/{name}/{number}")


def _table(results: list[VariantOutcome], k: int) -> Table:
    """A table with a row for each variant, method and eta."""
    table = Table(
        "critic", "held-out log-loss", "AUC", "method", "eta", "pass@1", "gain, points", "KL, nats", f"wmaj@{k}",
        f"best of {k}", "n",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for outcome in results:
        held_out = outcome.held_out
        for i, r in enumerate(outcome.results):
            first = i == 0
            table.add_row(
                outcome.critic if first else "",
                _figure(held_out.log_loss, ".4f") if first and held_out else "",
                _figure(held_out.auc, ".3f") if first and held_out else "",
                r.method,
                f"{r.eta:g}" if r.guided else "–",
                _estimate(r, "accuracy", 100, ".1f"),
                _estimate(r, "gain", 100, "+.1f") if r.guided else "",
                _estimate(r, "kl", 1, ".2f"),
                _estimate(r, "weighted_majority", 100, ".1f"),
                _estimate(r, "best_of", 100, ".1f"),
                str(r.n),
            )
    return table


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _estimate(result: SettingReport, name: str, scale: float, form: str) -> str:
    value, error = result.figure(name)
    if value is None:
        return ""
    return format(scale * value, form) + ("" if error is None else f" ± {format(scale * error, form.lstrip('+'))}")


def _plot(path: Path, recipe: Ablation, results: list[VariantOutcome]) -> None:
    """Draws accuracy against KL: a curve for each variant and a point for each eta, of the first of the methods."""
    method = recipe.evaluate.methods[0]
    figure = Figure(figsize=(7.8, 5.0), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    for i, outcome in enumerate(results):
        points = by_strength(r for r in outcome.results if r.method == method and r.accuracy is not None)
        axes.errorbar(
            [r.point[0] for r in points], [r.point[1] for r in points], xerr=[r.kl_se or 0.0 for r in points],
            yerr=[r.accuracy_se or 0.0 for r in points], color=f"C{i}", marker="os^Dv*"[i % 6], markersize=5,
            capsize=2, linewidth=1.4, elinewidth=0.8, label=str(outcome.variant["name"]),
        )  # fmt: skip
    reference = results[0].results[0]
    if reference.accuracy is not None:
        axes.axhline(reference.accuracy, color=GREY, linewidth=1.2, linestyle="--", label="reference")
    axes.set(xlabel="KL to the reference per completion, nats", ylabel="accuracy (pass@1)")
    axes.set_title(
        f"{recipe.source}: {reference.problems} problems × {recipe.evaluate.samples} samples, {method} over eta "
        "(± one standard error)",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)
