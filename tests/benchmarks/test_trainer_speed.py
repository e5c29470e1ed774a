"""The benchmark of training: all sides learn the same, and what it computes around them."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.trainer_speed import report
from benchmarks.trainer_speed.data import Shapes, of_files
from benchmarks.trainer_speed.measuring import SIDES, Case, measure, native_turn, peak
from benchmarks.trainer_speed.native import NativeTraining
from benchmarks.trainer_speed.separate import SeparateTraining
from benchmarks.trainer_speed.turns import Pause, Turn, by_turns
from qsharp_core.critic.native import NativeHead, NativeShape
from tests.support import models
from tests.support import trainer_data as world
from trainer.training.prefix_tree import merge
from trainer.training.rollouts import Rollouts
from trainer.training.separate.start import start
from trainer.training.settings import TrainSettings

SEED = random.randrange(2**31)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_reference(tmp_path_factory.mktemp("base"), "qwen2", sharpness=1.0)


def drawn(kind: str) -> Rollouts:
    shapes = Shapes(models.VOCAB, SEED, prompt=8, completion=6)
    return shapes.trees(40) if kind == "trees" else shapes.apart(40)


@pytest.mark.parametrize("kind", ["trees", "apart"])
def test_all_sides_of_a_separate_critic_have_the_same_losses(base: Path, tmp_path: Path, kind: str) -> None:
    """From the same weights, on the same rollouts, step after step."""
    settings = TrainSettings(base=str(base), layers=2, mlp=16, epochs=1, held_out=0.0, batch_tokens=150)
    critic = start(settings).critic
    torch.nn.init.normal_(critic.head.weight, std=0.5)  # a head of zeros says one half of everything
    training = SeparateTraining(settings, drawn(kind), tmp_path, critic)
    assert training.passes.trees == (kind == "trees")
    turns = {side: training.side(side) for side in SIDES}
    seconds = by_turns(turns, len(training.steps))
    ours = turns["qsharp"].losses
    assert len(ours) == len(seconds["plain"]) == len(training.steps) > 2
    assert np.ptp(ours) > 0.01
    for side in SIDES[1:]:
        assert turns[side].losses[0] == pytest.approx(ours[0], abs=1e-6)
        assert turns[side].losses == pytest.approx(ours, abs=1e-4)  # so they were optimised alike


@pytest.mark.parametrize("kind", ["trees", "apart"])
def test_all_sides_of_a_native_critic_have_the_same_losses(base: Path, tmp_path: Path, kind: str) -> None:
    """Where a step has all labels. Hidden states are kept in bfloat16, of trees and rows alike."""
    settings = TrainSettings(
        backbone="reference", base=str(base), mlp=16, steps=4, held_out=0.0, batch_tokens=10**6, dropout=0.0,
        input_dropout=0.0, precision="float32",
    )  # fmt: skip
    torch.manual_seed(SEED)
    head = NativeHead(NativeShape(128, 128, 16, 1))
    torch.nn.init.normal_(head.out.weight)
    training = NativeTraining(settings, drawn(kind), tmp_path, head)
    training = replace(training, settings=settings.model_copy(update={"batch_tokens": training.nodes}))
    known, states = training.read(), training.read_rows()
    assert len(known[0]) == training.nodes <= len(states)
    turns = {"qsharp": training.ours(*known)} | {side: training.peer(side, states) for side in SIDES[1:]}
    by_turns(turns, 4)
    ours = turns["qsharp"].losses
    assert np.ptp(ours) > 1e-4
    for side in SIDES[1:]:
        assert turns[side].losses == pytest.approx(ours, rel=2e-3)
    assert turns["trainer"].losses == pytest.approx(turns["plain"].losses, abs=1e-6)


def test_trees_share_prefixes_and_what_is_apart_does_not(tmp_path: Path) -> None:
    trees, apart = drawn("trees"), drawn("apart")
    assert len(trees) == len(apart) == 40
    assert len(np.unique(trees.prompts)) == 8
    assert len(merge([r.token_ids for r in trees])) < 0.7 * trees.lengths.sum()
    assert len(merge([r.token_ids for r in apart])) > 0.9 * apart.lengths.sum()  # first tokens may be alike
    for prompt in np.unique(trees.prompts):
        whole = [r for r in trees.select(trees.prompts == prompt) if r.first_valid == 0]
        for r in trees.select((trees.prompts == prompt) & (trees.first_valid > 0)):
            cut = r.first_valid
            assert any(r.completion[:cut].tolist() == one.completion[:cut].tolist() for one in whole)
    file = world.write(tmp_path / "data.parquet", world.rollouts(prompts=30, each=4))
    some = of_files([file], 50, seed=SEED)
    assert 50 <= len(some) <= 54
    assert (np.bincount(some.prompts)[np.unique(some.prompts)] == 4).all()


def test_turns_alternate() -> None:
    order: list[str] = []

    def training(name: str, steps: int) -> Turn:
        def train(pause: Pause) -> None:
            for step in range(steps):
                order.append(name)
                pause(float(step))

        return Turn(train)

    turns = {name: training(name, 3) for name in "abc"}
    seconds = by_turns(turns, 3)
    assert order == [*"cba", *"abc", *"cba"]
    assert {name: len(each) for name, each in seconds.items()} == dict.fromkeys("abc", 3)
    assert turns["b"].losses == [0.0, 1.0, 2.0]
    with pytest.raises(AssertionError, match="more steps"):
        by_turns({"a": training("a", 3)}, 2)


def rows_of(found: dict[str, Any]) -> list[list[str]]:
    machine = {"cpu": "?", "cores": 1, "python": "3", "packages": {}}
    made = report.page({"machine": machine, "command": "c", "date": "d", "results": [found]})
    return [line.split(" | ") for line in made.splitlines() if line.startswith("| ")][2:]


def test_a_case_is_measured_and_reported(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is measured in processes of their own."""
    monkeypatch.chdir(tmp_path)
    settings = TrainSettings(base=str(base), layers=1, epochs=1, held_out=0.0, batch_tokens=150)
    found = measure(Case("separate", "trees", settings, count=30, prompt=8, completion=6), turns=2)
    assert len(found["turns"]) == 2
    assert all(each["most"] > each["before"] > 100 for each in found["memory_mib"].values())
    assert [len(row) for row in rows_of(found)] == [8] * 3
    assert not list(tmp_path.glob(".trainer-speed*"))


def test_a_turn_of_a_native_critic_is_reported(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = TrainSettings(
        backbone="reference", base=str(base), mlp=8, epochs=2, held_out=0.0, batch_tokens=32, precision="float32"
    )
    case = Case("native", "trees", settings, count=30, prompt=8, completion=6)
    turns = [native_turn(case.of_turn(turn)) for turn in (0, 1)]
    assert min(turns[0]["pass_seconds"].values()) > 0
    memory = {side: {"before": 1.0, "most": 2.0} for side in SIDES}
    found = {"case": {"kind": "native", "rollouts": "trees"}, "turns": turns, "memory_mib": memory}
    rows = rows_of(found)
    assert [len(row) for row in rows] == [8] * 8
    assert "to" in rows[-1][4]
    assert "to" not in rows_of(found | {"turns": turns[:1]})[-1][4]  # of a single turn
    assert set(peak(case, "qsharp")) == {"before", "most"}


def test_ratios_are_of_neighbours() -> None:
    turns = [
        {"seconds": {"qsharp": [1.0, 2.0], "plain": [2.0, 3.0]}, "pass_seconds": {"qsharp": 1.0, "others": 5.0},
         "labels": 30, "distinct_labels": 10, "batch": 4}
    ]  # fmt: skip
    result = {"case": {"kind": "native"}, "turns": turns}
    assert report.ratios(result, "plain") == [2.0, 1.5]
    assert report.ratios(result, "plain", "pass") == [5.0]
    assert report.ratios(result, "plain", "all") == [10.0 / 4.0]
    assert report.speeds(result, "plain", "pass") == [6.0]
    assert report.speeds(result, "qsharp", "steps") == [2 * 4 * 3 / 3.0]
