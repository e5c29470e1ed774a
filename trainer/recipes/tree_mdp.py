"""The paper's Figure 4: value against eta on a tree whose optimal policy is known, for Q♯ and Controlled Decoding.

The tree is a language model (`trainer.tree_mdp`) behind the real server. Its critic is learned from rollouts that the
server logged; then completions are sampled at every eta, and what they earn is laid over the closed form.
"""

import math
import statistics
from pathlib import Path
from typing import Any, ClassVar, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field, PositiveFloat, PositiveInt
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from qsharp_core.wire.guidance import METHODS, MethodName
from trainer import tree_mdp
from trainer.evaluate_plot import COLOURS, GREY, NAMES
from trainer.journal import Journal
from trainer.loop.activation import ServedCritic
from trainer.recipes.fields import Fields, RolloutFields, Sampled, ServerFields, loop_settings
from trainer.recipes.rollouts import logged
from trainer.recipes.serving import Served, opened
from trainer.recipes.versions import trained
from trainer.rewards.verifiers import TaskRef
from trainer.training.settings import TrainSettings
from trainer.tree_mdp import FIGURE_4

CRITIC = "tree"
CHUNK = 100  # completions of a request
# Tokens that are no children of a node have a chance of 1e-17 in float32, and exp(1 / eta) reaches 1e21: only children
# are weighed. Nobody knows what another token would earn, least of all the critic.
GUIDANCE = {"min_prob": 1e-6}
FLAGS = (
    "--served-model-name", "tree", "--dtype", "float32", "--enforce-eager", "--max-model-len", "32",
    "--kv-cache-memory-bytes", "50000000",
)  # fmt: skip


class TreeRecipe(Fields):
    """What is done.

    Attributes:
        rollouts: of the reference, to learn from.
        samples: completions at each eta.
        epochs, learning_rate: of the critic. All rollouts are one step, and it is fitted until it has converged.
    """

    FREE: ClassVar[dict[str, bool]] = {"server": True, "etas": True, "methods": True}

    kind: Literal["tree_mdp"]
    rollouts: PositiveInt = 3000
    samples: PositiveInt = 1000
    etas: tuple[PositiveFloat, ...] = Field(default=(0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0), min_length=1)
    methods: tuple[MethodName, ...] = METHODS
    epochs: PositiveInt = 600
    learning_rate: PositiveFloat = 0.02
    server: ServerFields = ServerFields()
    seed: int = 0


async def run(recipe: TreeRecipe, folder: Path, console: Console) -> dict[str, Any]:
    """Runs it; goes on where it was stopped."""
    model = folder / "model"
    if not (model / "tokenizer_config.json").is_file():
        tree_mdp.write_model(model)
    server = recipe.server.model_copy(update={"flags": (*FLAGS, *recipe.server.flags)})
    sampled = Sampled(task="tree_mdp", server=server, seed=recipe.seed)
    critic = TrainSettings(
        base=str(model), name=CRITIC, atoms=tuple(sorted(FIGURE_4.outcomes())), held_out=0.0, epochs=recipe.epochs,
        learning_rate=recipe.learning_rate, batch_tokens=100 * recipe.rollouts, weight_decay=0.0, clip=10.0,
    )  # fmt: skip
    async with opened(str(model), server, folder, console) as served, sampled.judge() as judge:
        settings = loop_settings(
            sampled,
            RolloutFields(samples=(recipe.rollouts,)),
            TaskRef(tree_mdp.TASK, "tree_mdp"),
            served.model,
            critic,
            folder / "critics",
        )
        data = await logged(served.client, judge, settings, folder)
        version, _ = await trained(settings.recipe, folder, [data])
        await ServedCritic(served.client, CRITIC, settings.recipe.out).activate(version)
        results = await _measured(recipe, served, version.key, folder)
    console.print(_table(results))
    _plot(folder / "report.png", recipe, results)
    return {"critic": version.key, "results": results}


async def _measured(recipe: TreeRecipe, served: Served, critic: str, folder: Path) -> list[dict[str, Any]]:
    """At every eta and method: what completions earn, beside what they would by the closed form."""
    points: list[tuple[str, float | None]] = [("reference", None)]
    points += [(method, eta) for method in recipe.methods for eta in recipe.etas]
    results = []
    with (
        Journal(folder / "samples.jsonl", {"format": 1, "critic": critic, "seed": recipe.seed, **GUIDANCE}) as journal,
        tqdm(total=len(points), unit="setting", desc="evaluate") as bar,
    ):
        done = {(e["method"], e["eta"]): e for e in journal.entries if e["samples"] == recipe.samples}
        for method, eta in points:
            entry = done.get((method, eta))
            if entry is None:
                rewards, kls = await _sampled(recipe, served, critic, method, eta)
                entry = {"method": method, "eta": eta, "samples": recipe.samples, "rewards": rewards, "kls": kls}
                journal.add(entry)
            results.append(_result(entry))
            bar.update()
    return results


async def _sampled(
    recipe: TreeRecipe, served: Served, critic: str, method: str, eta: float | None
) -> tuple[list[float], list[float]]:
    rewards, kls = [], []
    for first in range(0, recipe.samples, CHUNK):
        body: dict[str, Any] = {
            "model": served.model, "prompt": FIGURE_4.name, "n": min(CHUNK, recipe.samples - first), "max_tokens": 4,
            "eta": eta, "seed": 1_000_003 * recipe.seed + first, "return_token_ids": True,
        }  # fmt: skip
        if eta is not None:
            body["guidance"] = {"critic": critic, "method": method, **GUIDANCE}
        for choice in (await served.client.post("/v1/completions", body))["choices"]:
            reward = tree_mdp.reward_of(FIGURE_4, choice["token_ids"])
            assert reward is not None, choice  # every path ends in a leaf
            rewards.append(reward)
            kls.append(choice["guidance"]["kl"])
    return rewards, kls


def _result(entry: dict[str, Any]) -> dict[str, Any]:
    """A row of the report; `exact` is the closed form with the tree's own probabilities."""
    method, eta, rewards, kls = (entry[name] for name in ("method", "eta", "rewards", "kls"))
    exact = tree_mdp.guided(FIGURE_4, math.inf if eta is None else eta, "cd" if eta is None else method)
    n = len(rewards)
    return {
        "method": method, "eta": eta, "n": n,
        "value": statistics.fmean(rewards), "value_se": statistics.pstdev(rewards) / math.sqrt(n),
        "value_exact": exact.value,
        "kl": statistics.fmean(kls), "kl_se": statistics.pstdev(kls) / math.sqrt(n), "kl_exact": exact.kl,
    }  # fmt: skip


def _table(results: list[dict[str, Any]]) -> Table:
    shown = Table("method", "eta", "value", "closed form", "KL, nats", "closed form", "n")
    for column in shown.columns[1:]:
        column.justify = "right"
    for r in results:
        shown.add_row(
            NAMES.get(r["method"], r["method"]),
            "–" if r["eta"] is None else f"{r['eta']:g}",
            f"{r['value']:.3f} ± {r['value_se']:.3f}",
            f"{r['value_exact']:.3f}",
            f"{r['kl']:.3f} ± {r['kl_se']:.3f}",
            f"{r['kl_exact']:.3f}",
            str(r["n"]),
        )
    return shown


def _plot(path: Path, recipe: TreeRecipe, results: list[dict[str, Any]]) -> None:
    """Value over eta, and over KL: lines are the closed form, points are measured."""
    figure = Figure(figsize=(10.4, 4.4), dpi=140, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    low, high = min(recipe.etas) / 1.2, max(recipe.etas) * 1.2
    grid = [low * (high / low) ** (i / 200) for i in range(201)]
    for method in recipe.methods:
        exact = [tree_mdp.guided(FIGURE_4, eta, method) for eta in grid]
        measured = [r for r in results if r["method"] == method]
        values, errors = [r["value"] for r in measured], [r["value_se"] for r in measured]
        _curve(left, method, grid, [e.value for e in exact])
        _points(left, method, [r["eta"] for r in measured], values, errors, None)
        _curve(right, method, [e.kl for e in exact], [e.value for e in exact])
        _points(right, method, [r["kl"] for r in measured], values, errors, [r["kl_se"] for r in measured])
    for axes in (left, right):
        axes.axhline(FIGURE_4.mean(), color=GREY, linewidth=1.2, linestyle="--", label="reference, exact")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e9ec", linewidth=0.8)
        axes.set_axisbelow(True)
    left.set_xscale("log")
    left.set_xticks(recipe.etas, [f"{eta:g}" for eta in recipe.etas])
    left.minorticks_off()
    left.invert_xaxis()
    left.set(xlabel="η (smaller is stronger)", ylabel="value: expected reward")
    right.set(xlabel="KL to the reference, nats")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(
        f"The tree of the paper's Figure 4: critic from {recipe.rollouts} logged rollouts, "
        f"{recipe.samples} completions a point (± one standard error)",
        fontsize=11,
    )
    figure.savefig(path)


def _curve(axes: Axes, method: str, x: list[float], y: list[float]) -> None:
    axes.plot(x, y, color=COLOURS[method], linewidth=1.4, label=f"{NAMES[method]}, closed form")


def _points(
    axes: Axes, method: str, x: list[float], y: list[float], y_error: list[float], x_error: list[float] | None
) -> None:
    axes.errorbar(
        x, y, yerr=y_error, xerr=x_error, color=COLOURS[method], marker="o", markersize=5, capsize=2.5, linestyle="",
        label=f"{NAMES[method]}, measured",
    )  # fmt: skip
