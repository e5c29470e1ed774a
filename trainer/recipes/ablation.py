"""Critics of different heads and losses, trained on the same rollouts, and what guidance by each of them gains.

The rollouts are the reference's: sampled and logged by this recipe, or Parquet files of others (`qsharp export`; a
loop's `round-*/rollouts.parquet`).
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from matplotlib.figure import Figure
from pydantic import Field, field_validator, model_validator
from rich.console import Console
from rich.table import Table

from trainer.evaluate import REFERENCE, evaluate
from trainer.evaluate_plot import GREY
from trainer.loop.activation import ServedCritic, Version
from trainer.loop.settings import LoopSettings
from trainer.loop.settings import Recipe as Versions
from trainer.recipes.fields import (
    SERVED,
    EvaluationFields,
    Fields,
    RolloutFields,
    Sampled,
    loop_settings,
    with_base,
)
from trainer.recipes.rollouts import logged
from trainer.recipes.serving import Served, opened
from trainer.recipes.versions import trained
from trainer.rewards.verifiers import Judge, TaskRef
from trainer.tasks.registry import find_task
from trainer.training.settings import TrainSettings


class Variant(Fields):
    """A critic; what is None is `critic`'s."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    head: Literal["V", "Q"] | None = None
    atoms: tuple[float, ...] | None = None
    loss: Literal["likelihood", "squared"] | None = None
    mlp: int | None = None
    layers: int | None = None
    weigh: Literal["rollouts", "nodes"] | None = None


class Ablation(Sampled):
    """What is done.

    Attributes:
        model: the reference, a folder or a hub id; None is the default model.
        data: Parquet files of rollouts to learn from; none: `rollouts` are sampled.
        critic: what the variants have in common.
        variants: each a version of a critic of its name.
    """

    # More variants, or measurements, may be added later.
    FREE: ClassVar[dict[str, Any]] = {
        "server": True, "variants": True, "evaluate": {"etas": True, "methods": True, "limit": True}
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
        """Of a variant's training."""
        given = variant.model_dump(exclude_none=True)
        return TrainSettings.model_validate(self.critic.model_dump() | given)


async def run(recipe: Ablation, folder: Path, console: Console) -> dict[str, Any]:
    """Runs it; goes on where it was stopped."""
    task = TaskRef(find_task(recipe.task), recipe.task)
    results: list[dict[str, Any]] = []
    async with opened(recipe.model, recipe.server, folder, console) as served, recipe.judge() as judge:
        common = with_base(recipe.critic, served.root)
        settings = loop_settings(recipe, recipe.rollouts, task, served.model, common, folder / "critics")
        data = list(recipe.data) or [await logged(served.client, judge, settings, folder)]
        for variant in recipe.variants:
            console.print(f"[bold]{variant.name}[/bold]", highlight=False)
            results.append(await _one(recipe, variant, served, judge, settings, data, folder))
    console.print(_table(results, recipe.evaluate.samples))
    _plot(folder / "report.png", recipe, results)
    return {"data": [str(path) for path in data], "results": results}


async def _one(
    recipe: Ablation, variant: Variant, served: Served, judge: Judge, settings: LoopSettings, data: list[Path],
    folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Trains a variant, and measures what it gains."""
    critic = with_base(recipe.settings(variant), served.root)
    recipe_of = Versions(settings=critic, out=settings.recipe.out, eta=recipe.rollouts.eta)
    version, report = await trained(recipe_of, folder / variant.name, data)
    versions = ServedCritic(served.client, variant.name, recipe_of.out)
    await versions.activate(version)
    evaluation = recipe.evaluate.of(recipe, served.model, version.key, settings.task.task)
    evaluated = await evaluate(
        served.client, judge, settings.task, evaluation, folder / variant.name / "evaluation",
        concurrency=settings.concurrency,
    )  # fmt: skip
    await _forget(served, version)
    held_out = report["held_out"] and report["held_out"]["overall"]
    return {
        "variant": variant.model_dump(exclude_none=True),
        "critic": version.key,
        "steps": report["steps"],
        "held_out": held_out,
        "results": evaluated["results"],
    }


async def _forget(served: Served, version: Version) -> None:
    """Frees the memory of a version whose turn is over."""
    name, _, number = version.key.rpartition("@")
    await served.client.delete(f"/v1/critics/{name}/{number}")


def _table(results: list[dict[str, Any]], k: int) -> Table:
    """A row per variant, method and eta."""
    shown = Table(
        "critic", "held-out log-loss", "AUC", "method", "eta", "pass@1", "gain, points", "KL, nats", f"wmaj@{k}",
        f"best of {k}", "n",
    )  # fmt: skip
    for column in shown.columns[1:]:
        column.justify = "right"
    for one in results:
        held_out = one["held_out"] or {}
        for i, r in enumerate(one["results"]):
            guided = r["method"] != REFERENCE
            shown.add_row(
                "" if i else one["critic"],
                "" if i else _figure(held_out, "log_loss", ".4f"),
                "" if i else _figure(held_out, "auc", ".3f"),
                r["method"],
                f"{r['eta']:g}" if guided else "–",
                _estimate(r, "accuracy", 100, ".1f"),
                _estimate(r, "gain", 100, "+.1f") if guided else "",
                _estimate(r, "kl", 1, ".2f"),
                _estimate(r, "weighted_majority", 100, ".1f"),
                _estimate(r, "best_of", 100, ".1f"),
                str(r["n"]),
            )
    return shown


def _figure(values: dict[str, Any], name: str, form: str) -> str:
    value = values.get(name)
    return "" if value is None else format(value, form)


def _estimate(result: dict[str, Any], name: str, scale: float, form: str) -> str:
    value, error = result[name], result[f"{name}_se"]
    if value is None:
        return ""
    return format(scale * value, form) + ("" if error is None else f" ± {format(scale * error, form.lstrip('+'))}")


def _plot(path: Path, recipe: Ablation, results: list[dict[str, Any]]) -> None:
    """Accuracy against KL: a curve per variant, a point per eta, by the first of the methods."""
    method = recipe.evaluate.methods[0]
    figure = Figure(figsize=(7.8, 5.0), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    for i, one in enumerate(results):
        points = sorted((r for r in one["results"] if r["method"] == method), key=lambda r: -r["eta"])
        axes.errorbar(
            [r["kl"] for r in points], [r["accuracy"] for r in points], xerr=[r["kl_se"] or 0.0 for r in points],
            yerr=[r["accuracy_se"] or 0.0 for r in points], color=f"C{i}", marker="os^Dv*"[i % 6], markersize=5,
            capsize=2, linewidth=1.4, elinewidth=0.8, label=one["variant"]["name"],
        )  # fmt: skip
    reference = results[0]["results"][0]
    axes.axhline(reference["accuracy"], color=GREY, linewidth=1.2, linestyle="--", label="reference")
    axes.set(xlabel="KL to the reference per completion, nats", ylabel="accuracy (pass@1)")
    axes.set_title(
        f"{recipe.task}: {reference['problems']} problems × {recipe.evaluate.samples} samples, {method} over eta "
        "(± one standard error)",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)
