"""The paper's Figure 4: value against eta on a tree whose optimal policy is known, for Q♯ and Controlled Decoding.

The tree is a language model (`model`) behind the real server. Its critic is learned from rollouts that the server
logged. Then completions are sampled at every eta, and what they earn is laid over the closed form.
"""

import math
import statistics
from pathlib import Path
from typing import Any, ClassVar, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from qsharp_core.wire.guidance import METHODS, MethodName
from trainer.evaluation.plot import COLOURS, GREY
from trainer.evaluation.settings import REFERENCE
from trainer.evaluation.table import NAMES
from trainer.experiments.fields import RecipeFields, RolloutFields, SampledFields, ServerFields, loop_settings
from trainer.experiments.logged import logged
from trainer.experiments.report import Outcome
from trainer.experiments.served import Served, opened
from trainer.experiments.trained import trained
from trainer.experiments.tree_mdp.model import reward_of, write_model
from trainer.loop.activation import ServedCritic
from trainer.reports import ReportPart
from trainer.rewards.verifiers import TaskRef
from trainer.rollouts.journal import Journal
from trainer.tasks.tree_mdp import FIGURE_4, TASK, guided
from trainer.training.settings import TrainSettings

CRITIC = "tree"
CHUNK = 100  # completions of a request
# Tokens that are no children of a node have a chance of 1e-17 in float32, and exp(1 / eta) reaches 1e21: only children
# are weighed. Nobody knows what another token would earn, least of all the critic.
GUIDANCE = {"min_prob": 1e-6}
FLAGS = (
    "--served-model-name", "tree", "--dtype", "float32", "--enforce-eager", "--max-model-len", "32",
    "--kv-cache-memory-bytes", "50000000",
)  # fmt: skip


class TreeRecipe(RecipeFields):
    """The fields of the recipe.

    Attributes:
        rollouts: the number of the reference's rollouts that are learned from.
        samples: completions at each eta.
        etas, methods: what is measured.
        epochs, learning_rate: of the critic's training. All rollouts are one step, and the critic is trained until it
            has converged.
        server: the server that is sampled through.
        seed: another seed makes other samples.
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


class TreeSamples(BaseModel):
    """What completions under one setting earned, and their KL in nats: an entry of the journal.

    Attributes:
        method, eta: the setting; eta is None for the reference.
        samples: the number of completions.
        rewards, kls: of each completion.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: str
    eta: float | None
    samples: int
    rewards: list[float]
    kls: list[float]

    def point(self) -> "TreePoint":
        """The samples' means beside the closed form, which has the tree's own probabilities."""
        unguided = self.eta is None
        exact = guided(FIGURE_4, math.inf if self.eta is None else self.eta, "cd" if unguided else self.method)
        n = len(self.rewards)
        return TreePoint(
            method=self.method,
            eta=self.eta,
            n=n,
            value=statistics.fmean(self.rewards),
            value_se=statistics.pstdev(self.rewards) / math.sqrt(n),
            value_exact=exact.value,
            kl=statistics.fmean(self.kls),
            kl_se=statistics.pstdev(self.kls) / math.sqrt(n),
            kl_exact=exact.kl,
        )


class TreePoint(ReportPart):
    """One setting: mean reward and KL in nats with standard errors, and what they are by the closed form."""

    method: str
    eta: float | None
    n: int
    value: float
    value_se: float
    value_exact: float
    kl: float
    kl_se: float
    kl_exact: float


class TreeOutcome(Outcome):
    """The version that guided, and a point for each setting; the reference first."""

    critic: str
    results: list[TreePoint]


async def run(recipe: TreeRecipe, folder: Path, console: Console) -> TreeOutcome:
    """Runs the experiment, or goes on with it where it was stopped."""
    model = folder / "model"
    if not (model / "tokenizer_config.json").is_file():
        write_model(model)
    server = recipe.server.model_copy(update={"flags": (*FLAGS, *recipe.server.flags)})
    sampled = SampledFields(task="tree_mdp", server=server, seed=recipe.seed)
    critic = TrainSettings(
        base=str(model), name=CRITIC, atoms=tuple(sorted(FIGURE_4.outcomes())), held_out=0.0, epochs=recipe.epochs,
        learning_rate=recipe.learning_rate, batch_tokens=100 * recipe.rollouts, weight_decay=0.0, clip=10.0,
    )  # fmt: skip
    async with opened(str(model), server, folder, console) as served, sampled.judge() as judge:
        settings = loop_settings(
            sampled,
            RolloutFields(samples=(recipe.rollouts,)),
            TaskRef(TASK, "tree_mdp"),
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
    return TreeOutcome(critic=version.key, results=results)


async def _measured(recipe: TreeRecipe, served: Served, critic: str, folder: Path) -> list[TreePoint]:
    """Samples completions under every setting, and compares them with the closed form."""
    settings: list[tuple[str, float | None]] = [(REFERENCE, None)]
    settings += [(method, eta) for method in recipe.methods for eta in recipe.etas]
    points = []
    with (
        Journal(folder / "samples.jsonl", {"format": 1, "critic": critic, "seed": recipe.seed, **GUIDANCE}) as journal,
        tqdm(total=len(settings), unit="setting", desc="evaluate") as bar,
    ):
        entries = [TreeSamples.model_validate(entry) for entry in journal.entries]
        done = {(entry.method, entry.eta): entry for entry in entries if entry.samples == recipe.samples}
        for method, eta in settings:
            entry = done.get((method, eta))
            if entry is None:
                entry = await _sampled(recipe, served, critic, method, eta)
                journal.add(entry.model_dump(mode="json"))
            points.append(entry.point())
            bar.update()
    return points


async def _sampled(recipe: TreeRecipe, served: Served, critic: str, method: str, eta: float | None) -> TreeSamples:
    rewards, kls = [], []
    for first in range(0, recipe.samples, CHUNK):
        body: dict[str, Any] = {
            "model": served.model, "prompt": FIGURE_4.name, "n": min(CHUNK, recipe.samples - first), "max_tokens": 4,
            "eta": eta, "seed": 1_000_003 * recipe.seed + first, "return_token_ids": True,
        }  # fmt: skip
        if eta is not None:
            body["guidance"] = {"critic": critic, "method": method, **GUIDANCE}
        for choice in (await served.client.post("/v1/completions", body))["choices"]:
            reward = reward_of(FIGURE_4, choice["token_ids"])
            assert reward is not None, choice  # every path ends in a leaf
            rewards.append(reward)
            kls.append(choice["guidance"]["kl"])
    return TreeSamples(method=method, eta=eta, samples=recipe.samples, rewards=rewards, kls=kls)


def _table(points: list[TreePoint]) -> Table:
    table = Table("method", "eta", "value", "closed form", "KL, nats", "closed form", "n")
    for column in table.columns[1:]:
        column.justify = "right"
    for p in points:
        table.add_row(
            NAMES.get(p.method, p.method),
            "–" if p.eta is None else f"{p.eta:g}",
            f"{p.value:.3f} ± {p.value_se:.3f}",
            f"{p.value_exact:.3f}",
            f"{p.kl:.3f} ± {p.kl_se:.3f}",
            f"{p.kl_exact:.3f}",
            str(p.n),
        )
    return table


def _plot(path: Path, recipe: TreeRecipe, results: list[TreePoint]) -> None:
    """Draws value over eta, and over KL: lines are the closed form, points are measured."""
    figure = Figure(figsize=(10.4, 4.4), dpi=140, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    low, high = min(recipe.etas) / 1.2, max(recipe.etas) * 1.2
    grid = [low * (high / low) ** (i / 200) for i in range(201)]
    for method in recipe.methods:
        exact = [guided(FIGURE_4, eta, method) for eta in grid]
        measured = [p for p in results if p.method == method and p.eta is not None]
        values, errors = [p.value for p in measured], [p.value_se for p in measured]
        _curve(left, method, grid, [e.value for e in exact])
        _points(left, method, [p.eta or 0.0 for p in measured], values, errors, None)
        _curve(right, method, [e.kl for e in exact], [e.value for e in exact])
        _points(right, method, [p.kl for p in measured], values, errors, [p.kl_se for p in measured])
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
