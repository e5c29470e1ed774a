"""What `qsharp train` does when it is told next to nothing: it learns, or it says that it has not."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qsharp_core.cli import main
from qsharp_core.critic.checkpoint import read_card
from qsharp_core.returns import Bernoulli, Categorical
from tests.support import fake_server, models
from tests.support import trainer_data as world
from tests.support.fake_server import FakeServer
from trainer.training.constant import against_constant, learned_nothing
from trainer.training.heldout import predictions, report
from trainer.training.plan import Clock, Plan, plan_of
from trainer.training.report import HeldOutReport, Measures
from trainer.training.rollouts import LabelledRollout, SamplingPolicy, kept
from trainer.training.settings import TrainSettings
from trainer.training.threads import free_cores


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rollouts, and the same rollouts with rewards by chance."""
    root = tmp_path_factory.mktemp("place")
    models.write_reference(root / "base", "qwen2", sharpness=1.0)
    rows = world.rollouts(prompts=40, each=12)
    world.write(root / "data.parquet", rows)
    dice = random.Random(0)
    world.write(root / "chance.parquet", [{**row, "reward": float(dice.random() < 0.5)} for row in rows])
    return root


@pytest.fixture
def fake(tmp_path: Path, place: Path) -> Iterator[FakeServer]:
    with fake_server.running(f"sqlite:///{tmp_path / 'rollouts.db'}") as server:
        server.root = str(place / "base")
        yield server


def train(place: Path, out: Path, *flags: str, data: str = "data") -> int:
    features = ["--features", str(place / "features")]
    return main(["train", "--data", str(place / f"{data}.parquet"), "--out", str(out), *features, *flags])


def measured(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / ".runs" / "critic" / "metrics.json").read_text())
    return found


def metrics(out: Path) -> list[str]:
    return (out / ".runs" / "critic" / "metrics.jsonl").read_text().splitlines()


def test_without_flags_a_native_critic_learns(place: Path, tmp_path: Path, fake: FakeServer) -> None:
    """The model is the served one; by name, by folder and unnamed it is the same."""
    for more in (["--url", fake.url], ["--url", fake.url, "--base", "fake"], ["--base", str(place / "base")]):
        assert train(place, tmp_path, *more) == 0
    cards = [read_card(tmp_path / "critic" / version) for version in ("1", "2", "3")]
    assert [card.backbone for card in cards] == ["reference"] * 3
    assert cards[0].made_for == cards[1].made_for == cards[2].made_for
    overall = measured(tmp_path)["held_out"]["overall"]
    assert overall["log_loss"] < overall["log_loss_constant"] - 0.05
    # Each version's report is kept.
    for version in ("1", "2"):
        kept = json.loads((tmp_path / ".runs" / "critic" / version / "metrics.json").read_text())
        assert kept["critic"] == f"critic@{version}"
    assert measured(tmp_path)["critic"] == "critic@3"


def test_without_a_model_and_without_a_server_it_says_what_to_name(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(place, tmp_path, "--url", "http://127.0.0.1:9") == 1
    assert "say which model the rollouts are of: --base" in capsys.readouterr().err


def test_a_few_layers_with_nothing_said_of_steps_learn(place: Path, tmp_path: Path) -> None:
    assert train(place, tmp_path, "--base", str(place / "base"), "--layers", "2") == 0
    assert read_card(tmp_path / "critic" / "1").backbone is None
    overall = measured(tmp_path)["held_out"]["overall"]
    assert overall["log_loss"] < overall["log_loss_constant"] - 0.05


def test_categorical_critics_are_measured_beside_a_constant_and_learn(place: Path, tmp_path: Path) -> None:
    flags = ["--distribution", "categorical", "--atoms", "0", "0.5", "1"]
    assert train(place, tmp_path, "--base", str(place / "base"), *flags) == 0
    overall = measured(tmp_path)["held_out"]["overall"]
    assert overall["log_loss"] < overall["log_loss_constant"] - 0.05


def test_what_has_learned_nothing_is_not_published(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    flags = ["--base", str(place / "base"), "--steps", "200", "--select", "last", "--lr", "1e-2"]
    assert train(place, tmp_path, *flags, data="chance") == 1
    said = capsys.readouterr()
    assert "has learned nothing: held-out log loss" in said.err
    assert "--publish-anyway" in said.err
    assert "log-loss (constant)" in said.out
    assert "Brier (constant)" in said.out
    assert all(len(line) <= 80 for line in said.out.splitlines() if "│" in line or "0.69" in line)
    assert not (tmp_path / "critic").exists()
    # The folder is free for another try, and nothing has to be deleted.
    assert train(place, tmp_path, *flags, "--publish-anyway", data="chance") == 0
    assert read_card(tmp_path / "critic" / "1").backbone == "reference"


def test_training_ends_when_held_out_rollouts_gain_nothing(place: Path, tmp_path: Path) -> None:
    """Rewards by chance are learned by heart: the first measurements are the best."""
    assert train(place, tmp_path, "--base", str(place / "base"), "--publish-anyway", data="chance") == 0
    found = measured(tmp_path)
    lines = metrics(tmp_path)
    measurements = sum("held_out" in line for line in lines)
    assert measurements == found["best_epoch"] + 3 < 10
    assert found["steps"] == max(json.loads(line)["step"] for line in lines)


def test_a_budget_of_seconds_ends_a_training(place: Path, tmp_path: Path) -> None:
    flags = ["--base", str(place / "base"), "--epochs", "2000", "--max-seconds", "3", "--lr", "3e-3"]
    assert train(place, tmp_path, *flags) == 0
    rates = [json.loads(x)["lr"] for x in metrics(tmp_path) if "lr" in x]
    assert max(rates) > 2e-3
    assert rates[-1] < 1e-4  # it has fallen with the time
    overall = measured(tmp_path)["held_out"]["overall"]
    assert overall["log_loss"] < overall["log_loss_constant"]


def test_plans_follow_the_amount_of_data() -> None:
    def plan(amount: int, **fields: Any) -> Plan:
        return plan_of(TrainSettings.model_validate({"base": "m", **fields}), amount)

    few = plan(70_000, layers=3)  # of the run that made 18 steps
    assert few.batch * 32 <= 70_000
    assert few.steps >= 400
    assert plan(10_000_000, layers=3).batch == 16384
    assert plan(10_000_000, layers=3).epochs == 3
    assert plan(100, layers=3).epochs == 20  # of one step each
    native = plan(20_000, backbone="reference")
    assert native.steps == 25 * 32
    assert native.learning_rate < plan(200_000, backbone="reference").learning_rate == 1e-3
    named = plan(20_000, backbone="reference", epochs=2, batch_tokens=100, learning_rate=0.5)
    assert (named.steps, named.batch, named.learning_rate, named.patience) == (400, 100, 0.5, None)
    assert native.is_over(5, 2)
    assert not native.is_over(4, 2)
    assert not native.is_over(9, None)
    assert not named.is_over(9, 1)


def test_a_rate_without_a_limit_of_time_is_that_of_the_steps() -> None:
    rate = Clock(None).schedule(100, 0.1)
    assert rate(10, 2.0) == 2.0
    assert rate(100, 2.0) < 0.01
    over = Clock(1e-9)
    assert over.is_over()
    assert over.schedule(100, 0.1)(1, 2.0) == rate(100, 2.0)


def test_free_cores_are_those_that_were_idle() -> None:
    before = "cpu  0 0 0 0 0\ncpu0 100 0 0 100 0\ncpu1 0 0 50 100 5\ncpu2 0 0 0 500 0\nintr 7\n"
    after = "cpu  0 0 0 0 0\ncpu0 148 0 0 102 0\ncpu1 0 0 53 142 10\ncpu2 0 0 0 550 0\nintr 9\n"
    assert free_cores(before, after, frozenset({0, 1, 2})) == 2
    assert free_cores(before, after, frozenset({0, 1})) == 1
    assert free_cores(before, after, frozenset({0})) == 1  # one at least
    assert free_cores(before, after, frozenset({2})) == 1


def test_a_constants_log_loss_is_what_the_distribution_itself_says() -> None:
    rewards = np.array([0.0, 0.25, 1.0, 1.0, 0.75])
    policy = SamplingPolicy()
    rollouts = kept(
        LabelledRollout(str(i), np.array([5], np.int32), np.array([6], np.int32), 0, float(r), policy, f"{i:x}")
        for i, r in enumerate(rewards)
    )
    for returns in (Categorical((0.0, 0.5, 1.0), (0.0, 1.0)), Bernoulli()):
        # The constant by descent on the distribution's own loss.
        logits = torch.zeros(returns.n_out, dtype=torch.float64, requires_grad=True)
        best = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

        def loss(returns: Any = returns, logits: torch.Tensor = logits, best: Any = best) -> torch.Tensor:
            best.zero_grad()
            value: torch.Tensor = returns.loss(logits.expand(5, -1), torch.from_numpy(rewards)).mean()
            value.backward()
            return value

        best.step(loss)
        index = np.arange(5)
        found = report(predictions(index, index * 0, rewards, np.full(5, 0.1), rollouts), rollouts, returns)
        assert against_constant(found).constant == pytest.approx(loss().item(), abs=1e-6)
        assert against_constant(found).better


def test_what_ranks_and_is_too_sure_is_told_so() -> None:
    """Its loss is that of a critic that learned nothing, and it may guide all the same."""
    sure = Measures(
        n=10, rollouts=10, reward_mean=0.1, auc=0.65, ece=0.1, brier=0.2, brier_constant=0.09,
        log_loss=0.40, log_loss_constant=0.33,
    )  # fmt: skip
    for area, word in ((0.65, "may rank"), (0.52, "learned nothing"), (None, "learned nothing")):
        overall = sure.model_copy(update={"auc": area})
        held_out = HeldOutReport(overall=overall, by_position=[], last_token=overall, branches=None, prompts=3)
        said = learned_nothing(held_out, 100)
        assert word in said
        assert "held-out log loss 0.40000, 0.33000 for a constant" in said
        assert "--publish-anyway" in said
