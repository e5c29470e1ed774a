"""The benchmark of calibration: the temperature that it finds, and the critic that it makes of it."""

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.calibration.__main__ import calibrated
from benchmarks.calibration.fitting import bootstrapped, cross_fitted, fit
from benchmarks.calibration.guided import Asked, compared, measured
from benchmarks.calibration.outputs import LabelOutputs, outputs
from benchmarks.calibration.report import page
from benchmarks.calibration.scaled import write_scaled
from qsharp_core.cli import main
from qsharp_core.critic import checkpoint, native_checkpoint
from qsharp_core.errors import CriticError
from qsharp_core.returns import Bernoulli, Categorical
from tests.conftest import Server
from tests.support import models
from tests.support import trainer_data as world
from trainer.evaluation.of_problems import OfProblems
from trainer.evaluation.settings import Setting
from trainer.tasks.base import Problem, SamplingDefaults, Task
from trainer.training import data
from trainer.training.heldout import Predictions
from trainer.training.reliability import reliability
from trainer.training.rollouts import LabelledRollout, Rollouts, SamplingPolicy, kept

TASK = Task(
    name="first",
    splits=("held_out",),
    problems=lambda split: [Problem(id=str(n), prompt=f"What is {n}?") for n in range(5)],
    sampling=SamplingDefaults(max_tokens=6),
    reward=lambda problem, text: float(sum(map(ord, text)) % 2),
)
CATEGORICAL = {"kind": "categorical", "atoms": [0.0, 0.5, 1.0]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("place")
    models.write_reference(root / "base", sharpness=1.0)
    world.write(root / "data.parquet", world.rollouts(prompts=40, each=6))
    return root


def made(rewards: np.ndarray) -> Rollouts:
    """Two rollouts of each prompt, of one token each."""
    token = np.array([70], np.int32)
    return kept(
        LabelledRollout(str(i), np.array([i // 2], np.int32), token, 0, float(r), SamplingPolicy(), f"{i // 2:064x}")
        for i, r in enumerate(rewards)
    )


@pytest.mark.parametrize("categorical", [False, True])
def test_the_temperature_is_found(categorical: bool) -> None:
    """Rewards are drawn by the law of the outputs divided by a temperature."""
    dice = np.random.default_rng()
    temperature, number = float(np.exp(dice.uniform(-1, 1))), 6000
    returns = Categorical((0.0, 0.5, 1.0), (0.0, 1.0)) if categorical else Bernoulli()
    scores = torch.from_numpy(dice.normal(size=(number, returns.n_out))) * 3 * temperature
    if categorical:
        masses = (scores / temperature).softmax(-1).numpy()
        rewards = np.array([dice.choice([0.0, 0.5, 1.0], p=p / p.sum()) for p in masses])
    else:
        rewards = (dice.uniform(size=number) < torch.sigmoid(scores[:, 0] / temperature).numpy()).astype(float)
    rollouts = made(rewards)
    found = LabelOutputs(returns, rollouts, np.arange(number), np.zeros(number, np.int64), scores.float())
    assert fit(found) == pytest.approx(temperature, rel=0.15)
    (first, second), of_labels = cross_fitted(found)
    assert first == pytest.approx(second, rel=0.3)
    assert sorted({round(t, 6) for t in of_labels.flatten().tolist()}) == sorted(round(t, 6) for t in (first, second))
    assert (of_labels[0::2] == of_labels[1::2]).all()  # a prompt is in one half
    low, high = bootstrapped(replace(found, outputs=found.outputs), seed=1)
    assert low < fit(found) < high
    assert float(found.losses(fit(found)).mean()) <= float(found.losses().mean())


@pytest.mark.parametrize("kind", ["V", "Q", "native"])
@pytest.mark.parametrize("categorical", [False, True])
def test_the_scaled_critic_has_the_outputs_divided(place: Path, tmp_path: Path, kind: str, categorical: bool) -> None:
    """By the project's own readers: a server has nothing else to know."""
    law = CATEGORICAL if categorical else None
    base, critic = place / "base", tmp_path / "critic"
    if kind == "native":
        models.write_native_critic(critic, base, distribution=law)
    else:
        models.write_critic(critic, head=kind, distribution=law, mlp=16 if kind == "V" else None)
    temperature = float(np.random.default_rng().uniform(0.3, 3))
    write_scaled(critic, tmp_path / "scaled", temperature)
    _, held_out = data.split(data.read([place / "data.parquet"]).rollouts, 0.3)
    before, after = (outputs(folder, base, held_out, tmp_path / "features") for folder in (critic, tmp_path / "scaled"))
    torch.testing.assert_close(after.outputs, before.outputs / temperature, atol=1e-4, rtol=1e-4)
    load = checkpoint.load if kind != "native" else lambda folder: native_checkpoint.load(folder, base)
    cards = [load(folder)[0] for folder in (critic, tmp_path / "scaled")]
    assert cards[1].version == f"{cards[0].version}.scaled"
    with pytest.raises(FileExistsError):
        write_scaled(critic, tmp_path / "scaled", temperature)
    with pytest.raises(CriticError):
        write_scaled(tmp_path, tmp_path / "nothing", temperature)


@pytest.mark.parametrize("backbone", ["own", "reference"])
def test_figures_are_those_of_the_training(place: Path, tmp_path: Path, backbone: str) -> None:
    """And the whole of it at small sizes, without a server."""
    given = ["train", "--data", str(place / "data.parquet"), "--out", str(tmp_path), "--base", str(place / "base")]
    given += [
        "--backbone",
        backbone,
        "--held-out",
        "0.4",
        "--publish-anyway",
        "--epochs",
        "2",
        "--precision",
        "float32",
    ]
    assert main([*given, *(["--mlp", "16"] if backbone == "reference" else ["--layers", "1"])]) == 0
    folder, out = tmp_path / "critic" / "1", tmp_path / "calibration"
    out.mkdir()
    report = calibrated(folder, place / "base", [place / "data.parquet"], None, out)
    trained = json.loads((tmp_path / ".runs" / "critic" / "metrics.json").read_text())["held_out"]
    whole = report["positions"][-1]
    assert (whole["part"], whole["n"], whole["rollouts"]) == (
        "all",
        trained["overall"]["n"],
        trained["overall"]["rollouts"],
    )
    # The reference's states may be of another precision here.
    assert whole["raw"]["log_loss"] == pytest.approx(trained["overall"]["log_loss"], abs=5e-3)
    assert len(report["positions"]) == 6
    assert whole["raw"]["log_loss"] - whole["scaled"]["log_loss"] == pytest.approx(
        report["gain"]["improvement"], abs=1e-3
    )
    assert (out / "reliability.png").read_bytes()[:4] == b"\x89PNG"
    assert checkpoint.read_card(Path(report["scaled"])).key == "critic@1.scaled"
    text = page(report | {"command": "c", "date": "d"})
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 2 + 6
    assert calibrated(folder, place / "base", [place / "data.parquet"], None, out) == report  # it goes on
    card = Path(report["scaled"]) / "critic.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"temperature": 1.1 * report["temperature"]}))
    with pytest.raises(SystemExit, match="another temperature"):
        calibrated(folder, place / "base", [place / "data.parquet"], None, out)


def test_bins_have_equal_weight_and_errors_over_rollouts() -> None:
    dice = np.random.default_rng()
    rollout = np.repeat(np.arange(100), 3)
    rewards = np.repeat((dice.uniform(size=100) < 0.5).astype(float), 3)
    flags = np.zeros(300, bool)
    one = Predictions(
        rollout, np.zeros(300, np.int64), flags, flags, dice.uniform(size=300), np.zeros(300), rewards,
        np.full(300, 1 / 3),
    )  # fmt: skip
    bins = reliability(one)
    assert len(bins) == 10
    assert [b.predicted for b in bins] == sorted(b.predicted for b in bins)
    order = np.argsort(one.predicted)
    assert bins[0].earned == pytest.approx(rewards[order[:29]].mean(), abs=0.06)
    everything = reliability(one, bins=1)[0]
    assert everything.earned == pytest.approx(rewards.mean())
    assert everything.error == pytest.approx(rewards[::3].std(ddof=1) / 10)


def test_changes_are_paired_by_problem() -> None:
    setting = Setting("qsharp", 0.1)
    raw = {Setting(): OfProblems({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}),
           setting: OfProblems({"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 3.0})}  # fmt: skip
    scaled = {setting: OfProblems({"a": 0.5, "b": 1.0}, {"a": 2.0, "b": 4.0})}
    reference, row = compared(raw, scaled, [0.1])
    assert reference["eta"] is None
    assert row["change"]["accuracy"] == {"mean": 0.25, "se": pytest.approx(math.sqrt(0.125) / math.sqrt(2))}
    assert row["change"]["kl"] == {"mean": 1.0, "se": 0.0}
    assert row["raw"]["accuracy"]["mean"] == 0.5


def test_both_are_measured_through_a_server(server: Server, tmp_path: Path) -> None:
    asked = Asked("tests.benchmarks.test_calibration:TASK", [0.1], samples=2, limit=2, candidates=4)
    found = asyncio.run(measured(server.url, asked, "native", tmp_path))
    assert list(found) == [Setting(), Setting("qsharp", 0.1)]
    assert all(len(one.kl) == 2 for one in found.values())
    assert all(kl > 0 for kl in found[Setting("qsharp", 0.1)].kl.values())
