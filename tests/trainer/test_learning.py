"""Critics that `qsharp train` makes of a world whose every reward-to-go is known exactly."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qsharp_core.critic import checkpoint
from qsharp_core.critic.fetching import local_folder
from tests.support import models
from tests.support import trainer_data as world
from tests.support.trainer_data import LENGTH, A, B
from trainer.training import data
from trainer.training.outputs import Outputs
from trainer.training.settings import TrainSettings
from trainer.training.train import train

PROMPT = world.prompt_of(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_reference(tmp_path_factory.mktemp("base"), sharpness=1.0)


def learn(tmp_path: Path, base: Path, rows: list[dict[str, Any]], **settings: Any) -> tuple[Path, dict[str, Any]]:
    """A version's folder and the run's report."""
    fields = {"base": str(base), "held_out": 0.0, "epochs": 16, "learning_rate": 5e-3, "batch_tokens": 1024}
    file = world.write(tmp_path / "data.parquet", rows)
    outputs = Outputs(out=tmp_path / "out", run=tmp_path / "run")
    folder = train([file], TrainSettings.model_validate(fields | {"weight_decay": 0.0} | settings), outputs)
    return local_folder(folder), json.loads((tmp_path / "run" / "metrics.json").read_text())


@torch.inference_mode()
def outputs_at(folder: Path) -> tuple[Any, dict[tuple[int, ...], torch.Tensor]]:
    """The critic's outputs after every non-empty sequence of letters, by the checkpoint's own forward pass."""
    _, critic = checkpoint.load(folder)
    found: dict[tuple[int, ...], torch.Tensor] = {}
    for letters in itertools.product([A, B], repeat=LENGTH):
        row = critic(torch.tensor([[*PROMPT, *letters]]))[0, len(PROMPT) :]
        found |= {letters[: t + 1]: row[t] for t in range(LENGTH)}
    return critic.distribution, found


def error(folder: Path, length: int | None = None) -> float:
    """Mean distance of the critic's expected reward from the truth, over prefixes of a length (or all)."""
    returns, outputs = outputs_at(folder)
    chosen = [y for y in outputs if length in (None, len(y))]
    return float(np.mean([abs(returns.mean(outputs[y]).item() - world.chance(list(y))) for y in chosen]))


@pytest.mark.parametrize(("head", "share_prefixes"), [("V", True), ("V", False), ("Q", True)])
def test_bernoulli_critics_learn_the_reward_to_go(tmp_path: Path, base: Path, head: str, share_prefixes: bool) -> None:
    rows = world.rollouts(prompts=4, each=500)
    epochs = 16 if share_prefixes else 8
    folder, report = learn(tmp_path, base, rows, head=head, share_prefixes=share_prefixes, epochs=epochs)
    assert error(folder) < 0.03
    assert report["held_out"] is None
    assert report["data"]["train_rollouts"] == 2000


@pytest.mark.parametrize("head", ["V", "Q"])
def test_categorical_critics_learn_the_whole_distribution(tmp_path: Path, base: Path, head: str) -> None:
    rows = world.rollouts(prompts=4, each=500)
    for r in rows:
        r["reward"] = float(r["completion_token_ids"].count(A) - 1)
    atoms = tuple(float(k - 1) for k in range(LENGTH + 1))
    folder, _ = learn(tmp_path, base, rows, head=head, atoms=atoms, reward_range=(-1.0, 4.0), mlp=32, epochs=24)
    card = checkpoint.read_card(folder)
    assert (card.reward_range, card.mlp and card.mlp.width) == ((-1.0, 4.0), 32)
    distances = []
    for letters, outputs in outputs_at(folder)[1].items():
        left, have = LENGTH - len(letters), letters.count(A)
        truth = [math.comb(left, k - have) * 0.5**left if 0 <= k - have <= left else 0.0 for k in range(LENGTH + 1)]
        distances.append((outputs.softmax(-1) - torch.tensor(truth)).abs().sum().item() / 2)
    assert np.mean(distances) < 0.07


def test_squared_error_learns_the_mean(tmp_path: Path, base: Path) -> None:
    folder, _ = learn(tmp_path, base, world.rollouts(prompts=4, each=500), loss="squared")
    assert error(folder) < 0.04
    card = json.loads((folder / "critic.json").read_text())
    assert (card["distribution"]["kind"], card["training"]["loss"]) == ("bernoulli", "squared")
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().split("\n")[0])
    assert first["loss"] == pytest.approx(0.25, abs=0.01)  # of a head that says one half; its log-loss is ln 2


def biased_rows() -> list[dict[str, Any]]:
    """Unguided rollouts, roll-outs after a guided roll-in, and ones that a guide led almost to an a each time.

    Of the guided letters the positions before say nothing about the reference: their labels are far too good.
    """
    dice = np.random.default_rng(1)
    rows = world.rollouts(prompts=4, each=300)
    for i in range(2400):
        guided = LENGTH if i % 3 else int(dice.integers(1, LENGTH))
        odds = [0.95] * guided + [0.5] * (LENGTH - guided)
        letters = [A if dice.uniform() < p else B for p in odds]
        rows.append(
            world.row(
                f"guided-{i}",
                world.prompt_of(i % 4),
                letters,
                world.earns(letters),
                eta=0.1,
                critic="critic@1",
                # The last guided letter itself may be trained on: all after it are the reference's.
                first_valid_position=None if guided == LENGTH else guided - 1,
            )
        )
    return rows


def test_positions_before_guided_letters_are_masked_and_ignoring_that_makes_a_wrong_critic(
    tmp_path: Path, base: Path
) -> None:
    rows = biased_rows()
    (tmp_path / "masked").mkdir()
    (tmp_path / "ignored").mkdir()
    masked, report = learn(tmp_path / "masked", base, rows)
    assert report["data"]["no_valid_position"] == 1600
    assert report["data"]["train_rollouts"] == 2000
    ignored, _ = learn(tmp_path / "ignored", base, [r | {"first_valid_position": 0} for r in rows])
    assert error(masked) < 0.04

    def after_an_a(folder: Path) -> float:
        returns, outputs = outputs_at(folder)
        return float(returns.mean(outputs[(A,)]))

    assert world.chance([A]) == 11 / 16
    assert after_an_a(masked) == pytest.approx(11 / 16, abs=0.05)
    # What the guide made of it, not the reference.
    seemed = float(np.mean([r["reward"] for r in rows if r["completion_token_ids"][0] == A]))
    assert seemed > 0.87
    assert after_an_a(ignored) == pytest.approx(seemed, abs=0.05)


def test_held_out_metrics_are_those_of_the_published_critic(tmp_path: Path, base: Path) -> None:
    """By a plain forward pass of each held-out rollout with the folder that was written."""
    rows = world.rollouts(prompts=40, each=12)
    _, report = learn(tmp_path, base, rows, held_out=0.2, epochs=2, learning_rate=2e-3)
    folder = tmp_path / "out" / "critic" / "1"
    everything = data.read([tmp_path / "data.parquet"]).rollouts
    _, held_out = data.split(everything, 0.2)
    _, critic = checkpoint.load(folder)
    losses, errors = [], []
    by_part: list[list[float]] = [[] for _ in range(5)]
    for r in held_out:
        with torch.inference_mode():
            row = critic(torch.tensor(r.token_ids[None]).long())[0, len(r.prompt) :]
        nats = critic.distribution.loss(row, torch.full((LENGTH,), r.reward))
        losses.append(nats.mean().item())
        errors.append(((critic.distribution.mean(row) - r.reward) ** 2).mean().item())
        for t in range(LENGTH):
            by_part[t].append(nats[t].item())  # five letters: one in each fifth
    measured = report["held_out"]
    assert measured["overall"]["log_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert measured["overall"]["brier"] == pytest.approx(np.mean(errors), abs=1e-5)
    assert measured["overall"]["n"] == len(held_out) * LENGTH
    assert [e["log_loss"] for e in measured["by_position"]] == pytest.approx([np.mean(p) for p in by_part], abs=1e-5)
    assert measured["last_token"]["log_loss"] == pytest.approx(np.mean(by_part[-1]), abs=1e-5)
    assert measured["overall"]["auc"] > 0.6
    assert checkpoint.read_card(folder).metrics == measured  # type: ignore[attr-defined]
    assert (tmp_path / "run" / "calibration.png").read_bytes()[:4] == b"\x89PNG"
