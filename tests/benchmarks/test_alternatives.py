"""What fine-tuning learns from, how its budget ends, what its KL divergence is estimated to be; and the whole, once."""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.alternatives import budget, divergence, examples, tuning
from benchmarks.alternatives.divergence import Completion
from benchmarks.alternatives.examples import IGNORED, Drawn
from benchmarks.alternatives.measuring import Policy, together
from benchmarks.alternatives.report import rows_of
from benchmarks.alternatives.tuning import Tuning
from benchmarks.search_frontier.choosing import Rule, Sample
from qsharp_core.wire.search import BEST
from tests.support import models, trainer_data
from tests.support.trainer_data import A, B
from trainer.training.settings import TrainingError


@pytest.fixture(autouse=True)
def accelerator() -> Iterator[None]:
    """TRL's Accelerator has a precision of its own, and a process has one for all."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


ROOT = Path(__file__).parents[2]


def drawn(dice: random.Random, prompt: list[int], right: bool) -> Drawn:
    completion = [dice.randrange(100) for _ in range(dice.randrange(1, 9))]
    return Drawn(prompt=prompt, completion=completion, own=dice.randrange(len(completion)), right=right)


@pytest.mark.parametrize("seed", range(20))
def test_every_completion_of_a_prompt_with_both_is_in_a_pair(seed: int) -> None:
    dice = random.Random(seed)
    sides = {p: (dice.randrange(6), dice.randrange(6)) for p in range(dice.randrange(1, 7))}
    rollouts = [drawn(dice, [p], bool(side)) for p, of in sides.items() for side in (0, 1) for _ in range(of[side])]
    # Told apart by what they are: tokens may be the same by chance.
    rollouts = [
        Drawn(prompt=r.prompt, completion=[i, *r.completion], own=0, right=r.right) for i, r in enumerate(rollouts)
    ]
    dice.shuffle(rollouts)
    made = examples.pairs(rollouts, seed)
    assert made == examples.pairs(rollouts, seed)
    by_first = {r.completion[0]: r for r in rollouts}
    for p, (wrong, right) in sides.items():
        of_prompt = [pair for pair in made if pair["prompt_ids"] == [p]]
        assert len(of_prompt) == (max(wrong, right) if wrong and right else 0)
        for name, is_right, count in (("chosen_ids", True, right), ("rejected_ids", False, wrong)):
            used = Counter(pair[name][0] for pair in of_prompt)
            assert all(by_first[i].right is is_right and by_first[i].prompt == [p] for i in used)
            if of_prompt:
                assert len(used) == count
                assert max(used.values()) - min(used.values()) <= 1
    assert all(pair["chosen_ids"] == by_first[pair["chosen_ids"][0]].completion for pair in made)


def test_another_seed_pairs_others() -> None:
    dice = random.Random(0)
    rollouts = [drawn(dice, [1], i % 2 == 0) for i in range(20)]
    assert examples.pairs(rollouts, 0) != examples.pairs(rollouts, 1)


def test_what_is_imitated_is_the_models_own(tmp_path: Path) -> None:
    rows = [
        trainer_data.row("whole", [5], [7, 8, 9], 1.0),
        trainer_data.row("branch", [5], [7, 3, 4], 1.0, parent_id="whole", cut=2, first_valid_position=1),
        trainer_data.row("first", [5], [2, 3], 1.0, parent_id="whole", cut=1, first_valid_position=0),
        trainer_data.row("forced alone", [5], [7, 2], 1.0, parent_id="whole", cut=2, first_valid_position=1),
        trainer_data.row("wrong", [5], [6, 6], 0.0),
        trainer_data.row("guided", [5], [1, 1], 1.0, eta=0.1, critic="c@1", first_valid_position=1),
    ]
    found = examples.read_drawn(trainer_data.write(tmp_path / "rollouts.parquet", rows), vocab=100)
    assert len(found) == 5  # without the guided one
    labelled = sorted((one["input_ids"], one["labels"]) for one in examples.examples(found))
    assert labelled == [
        ([5, 2, 3], [IGNORED, IGNORED, 3]),
        ([5, 7, 3, 4], [IGNORED, IGNORED, IGNORED, 4]),
        ([5, 7, 8, 9], [IGNORED, 7, 8, 9]),
    ]
    pairs = examples.pairs(found, 0)
    assert sorted(pair["chosen_ids"] for pair in pairs) == [[2, 3], [7, 2], [7, 3, 4], [7, 8, 9]]
    assert all(pair["rejected_ids"] == [6, 6] for pair in pairs)


def test_rollouts_of_another_law_are_refused(tmp_path: Path) -> None:
    rows = [trainer_data.row("cold", [5], [7], 1.0, temperature=0.5)]
    with pytest.raises(TrainingError, match=r"temperature=0\.5"):
        examples.read_drawn(trainer_data.write(tmp_path / "rollouts.parquet", rows), vocab=100)


VOCAB, END, LONGEST = 6, 1, 4


def small(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    model.save_pretrained(folder)
    return folder


def log_prob(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
    """By a plain pass."""
    with torch.inference_mode():
        logs = torch.log_softmax(model(torch.tensor([[*prompt, *completion]])).logits[0].double(), -1)
    return sum(logs[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion))


@pytest.mark.parametrize("prompts", [((3, 4, 2), (3, 4, 5, 2)), ((2,), (5, 3))])
def test_both_estimates_have_the_divergence_as_their_mean(tmp_path: Path, prompts: tuple[tuple[int, ...], ...]) -> None:
    """Over all completions there are, each as often as it is drawn: of `LONGEST` tokens, or less where one ends."""
    ours_at, theirs_at = (small(tmp_path / f"{seed}", seed) for seed in range(2))
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (ours_at, theirs_at))
    every = [
        one
        for length in range(1, LONGEST + 1)
        for one in product(range(VOCAB), repeat=length)
        if END not in one[:-1] and (one[-1] == END or length == LONGEST)
    ]
    drawn = [(prompt, one) for prompt in prompts for one in every]
    completions = [Completion([*prompt, *one], len(one)) for prompt, one in drawn]
    found = divergence.divergences(ours_at, theirs_at, completions)
    logs = [(log_prob(policy, *one), log_prob(reference, *one)) for one in drawn]
    chances = torch.tensor([log for log, _ in logs], dtype=torch.float64).exp()
    assert chances.sum().item() == pytest.approx(len(prompts), abs=1e-5)
    assert [one.log_ratio for one in found] == pytest.approx([ours - theirs for ours, theirs in logs], abs=1e-4)
    exact = sum(chance * (ours - theirs) for chance, (ours, theirs) in zip(chances.tolist(), logs, strict=True))
    assert exact > 0.1
    for estimates in ([one.log_ratio for one in found], [one.by_step for one in found]):
        assert (chances * torch.tensor(estimates, dtype=torch.float64)).sum().item() == pytest.approx(exact, abs=1e-4)
    assert all(one.by_step >= -1e-6 for one in found)
    assert len({round(one.by_step, 4) for one in found}) > 10


def test_a_model_has_no_divergence_from_itself_nor_a_completion_of_no_tokens(tmp_path: Path) -> None:
    one, other = small(tmp_path / "one", 1), small(tmp_path / "other", 2)
    (same,) = divergence.divergences(one, one, [Completion([3, 4, 5], 2)])
    assert (same.log_ratio, same.by_step) == pytest.approx((0, 0), abs=1e-6)
    empty, _ = divergence.divergences(one, other, [Completion([3, 4], 0), Completion([3, 4, 5], 2)])
    assert (empty.log_ratio, empty.by_step) == (0, 0)


def world() -> list[Drawn]:
    """A completion of five letters is right if it has more a's than b's."""
    return [
        Drawn(
            prompt=row["prompt_token_ids"], completion=(c := row["completion_token_ids"]), own=0, right=c.count(A) > 2
        )
        for row in trainer_data.rollouts(20, 4)
    ]


def test_no_other_token_is_in_the_loss_of_imitation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What TRL reports as the loss is the mean over the model's own tokens, in batches of unequal rollouts, too."""
    base = models.write_reference(tmp_path / "base")
    dice = random.Random()
    every = [
        Drawn(
            prompt=[70, 75][: dice.randrange(1, 3)],
            completion=[dice.choice([A, B]) for _ in range(n)],
            own=own,
            right=True,
        )
        for n, own in ((5, 0), (7, 4), (2, 1), (9, 8))
    ]
    monkeypatch.setattr(tuning, "LOGGED", 1)
    monkeypatch.setattr(budget.Budget, "rate", 0.0)  # the model stays as it is
    how = Tuning(method="rft", lr=1e-3, budget=1e-6, seed=0, batch=4, beta=0.1)
    _, tuned = tuning.tune(how, base, every, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    own = [(one.prompt + one.completion[: one.own], one.completion[one.own :]) for one in every]
    total = sum(log_prob(model, tuple(before), tuple(after)) for before, after in own)
    assert tuned.steps == 1
    assert tuned.loss == pytest.approx(-total / sum(len(after) for _, after in own), rel=0.02 if tuned.bf16 else 1e-4)


@pytest.mark.parametrize("method", ["rft", "dpo"])
def test_a_model_is_tuned_for_its_seconds_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    base = models.write_reference(tmp_path / "base")
    how = Tuning(method=method, lr=1e-3, budget=3.0, seed=0, batch=4, beta=0.1)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(budget, "CHECKPOINT_SECONDS", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "write_json", stopped)
        with pytest.raises(KeyboardInterrupt):
            tuning.tune(how, base, world(), tmp_path)
    checkpoint, spent = budget.last_checkpoint(tmp_path / how.name)
    assert checkpoint is not None
    assert 0.5 <= spent < 4.0  # the clock goes on while a step ends
    model, tuned = tuning.tune(how, base, world(), tmp_path)
    assert tuned.steps > int(checkpoint.name.rpartition("-")[2])
    assert tuned.seconds >= 3.0
    assert tuned.passes == tuned.steps * 4 / tuned.examples
    assert not [*model.parent.glob("checkpoint-*")]
    before, after = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (base, model))
    right, wrong = (A, A, A, A, B), (B, B, B, B, A)
    assert log_prob(after, (70, 75), right) > log_prob(before, (70, 75), right)
    gaps = [log_prob(m, (70, 75), right) - log_prob(m, (70, 75), wrong) for m in (before, after)]
    assert gaps[1] > gaps[0]
    monkeypatch.delattr(tuning, "_train")  # nothing is trained again
    assert tuning.tune(how, base, world(), tmp_path) == (model, tuned)


def test_nothing_to_learn_from_is_said(tmp_path: Path) -> None:
    wrong = [Drawn(prompt=[5], completion=[7], own=0, right=False)]
    for method, lacks in (("rft", "no right completion"), ("dpo", "no prompt with a right and a wrong")):
        how = Tuning(method=method, lr=1e-3, budget=1.0, seed=0, batch=4, beta=0.1)  # type: ignore[arg-type]
        with pytest.raises(TrainingError, match=lacks):
            tuning.tune(how, tmp_path / "nowhere", wrong, tmp_path)


def test_the_learning_rate_rises_and_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = budget.Budget(50.0, 0.0, "clock")
    rates = []
    for now in (100.0, 102.5, 105.0, 127.5, 150.0, 160.0):  # noqa: B007
        rates.append(clock.rate)
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0, 0])
    assert all(later <= earlier for earlier, later in pairwise(rates[2:]))


TASK = """
from trainer.tasks.base import Problem, SamplingDefaults, Task

def problems(split):
    return [Problem(id=letter, prompt=letter + "=") for letter in ("abcdefgh" if split == "train" else "xyz")]

TASK = Task(
    name="letters", problems=problems, splits=("train", "held_out"), sampling=SamplingDefaults(max_tokens=4),
    reward=lambda problem, text: float(sum(map(ord, text)) % 2),
)
"""


def policy(name: str, dice: random.Random, rules: Sequence[Rule], pools: int = 1, size: int = 4) -> Policy:
    """Random answers to three problems."""

    def sample() -> Sample:
        text = f"It is {dice.randrange(2)}"
        return Sample(text=text, reward=float(text[-1]), estimate=dice.random(), tokens=dice.randrange(1, 9))

    return Policy(
        name=name,
        pools={problem: [[sample() for _ in range(size)] for _ in range(pools)] for problem in "xyz"},
        kl={problem: dice.random() for problem in "xyz"},
        seconds=dice.random(),
        rules=rules,
    )


@pytest.mark.parametrize("seed", range(5))
def test_seeds_are_taken_together_and_differences_are_paired(seed: int) -> None:
    dice = random.Random(seed)
    every = [Rule(by=by, vote="number", reward_range=(0.0, 1.0)) for by in BEST]
    reference, guided = policy("reference", dice, every), policy("guided", dice, every)
    seeds = [policy(f"seed {i}", dice, every[1:2]) for i in range(3)]
    tuned = together(seeds, "RFT")
    single, several = tuned.points(4)
    assert (single.answers, several.answers) == (3 * 3 * 4, 3 * 3)
    for i, problem in enumerate("xyz"):
        rewards = [one.reward for some in seeds for one in some.pools[problem][0]]
        assert single.rewards[i] == pytest.approx(sum(rewards) / 12)
        assert tuned.kl[problem] == pytest.approx(sum(some.kl[problem] for some in seeds) / 3)
    assert tuned.seconds == pytest.approx(sum(some.seconds for some in seeds) / 3)
    rows = rows_of([reference, guided, tuned], 4)
    assert [(row.point.method, row.point.samples) for row in rows] == [
        *[("reference", 1), ("reference", 4), ("reference", 4), ("reference", 4)],
        *[("guided", 1), ("guided", 4), ("guided", 4), ("guided", 4)],
        *[("RFT", 1), ("RFT", 4)],
    ]
    alone = reference.points(1)[0].rewards
    for row in rows:
        apart = row.point.rewards - alone
        assert row.above_reference == pytest.approx((apart.mean(), apart.std(ddof=1) / 3**0.5))
        assert (row.above_guided is None) == (row.policy is guided)


@pytest.mark.timeout(1200)  # five servers, one after the other
def test_the_whole_comparison_and_a_second_start_that_adds_to_it(tmp_path: Path) -> None:
    (tmp_path / "letters.py").write_text(TASK)
    reference = models.write_reference(tmp_path / "reference")
    rollouts = trainer_data.write(tmp_path / "rollouts.parquet", trainer_data.rollouts(20, 4))
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

    def run(*more: str) -> dict[tuple[str, int, str], dict[str, Any]]:
        command = [
            sys.executable, "-m", "benchmarks.alternatives", "--rollouts", str(rollouts), "--model", str(reference),
            "--task", "letters:TASK", "--n", "2", "--rft-lr", "1e-3", "--eta", "0.2", "--seconds", "4",
            "--out", "out", *more, "--", "--max-model-len", "64", "--max-num-seqs", "8", "--dtype", "float32",
        ]  # fmt: skip
        here = {**os.environ, "PYTHONPATH": paths}
        subprocess.run(command, check=True, cwd=tmp_path, env=here, stderr=subprocess.PIPE, text=True)
        found = json.loads((tmp_path / "out" / "report.json").read_text())
        return {(row["policy"], row["samples"], row["rule"]): row for row in found["rows"]}

    rows = run("--dpo-lr")  # none
    chosen = {(name, 2, rule) for name in ("reference", "guided", "CD") for rule in BEST} | {("RFT", 2, "majority")}
    assert {key for key in rows if key[1] == 2} == chosen
    single = {name: row for (name, n, _), row in rows.items() if n == 1}
    assert {*single} == {"reference", "guided", "CD", "RFT"}
    assert {(row["problems"], row["answers"]) for row in single.values()} == {(3, 6)}
    assert single["reference"]["kl"]["mean"] == pytest.approx(0, abs=1e-3)
    assert single["guided"]["kl"]["mean"] > 0
    assert single["RFT"]["kl"]["mean"] > 1e-5
    assert 4 <= single["RFT"]["training_seconds"] < 60
    assert single["reference"]["training_seconds"] == 0 < single["guided"]["training_seconds"]
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000
    assert "| RFT | 2 | majority |" in (tmp_path / "out" / "report.md").read_text()
    kept = ["training.json", "critic.json", "*.jsonl", "*.safetensors"]
    made = {path: path.stat().st_mtime_ns for name in kept for path in (tmp_path / "out").rglob(name)}
    again = run("--dpo-lr", "1e-3")
    assert {key: again[key] for key in rows} == rows
    fewer = run("--dpo-lr", "--kl-samples", "1")
    assert fewer["RFT", 1, "majority"]["kl"] != rows["RFT", 1, "majority"]["kl"]
    assert {key: row for key, row in fewer.items() if key[0] != "RFT"} == {
        k: r for k, r in rows.items() if k[0] != "RFT"
    }
    assert {*again} - {*rows} == {("DPO", 1, "majority"), ("DPO", 2, "majority")}
    assert {path: path.stat().st_mtime_ns for path in made} == made
    trainer_data.write(rollouts, trainer_data.rollouts(20, 4, seed=1))
    with pytest.raises(subprocess.CalledProcessError) as refused:
        run()  # what is there was made of other rollouts
    assert re.search(r"inputs\.jsonl was begun with other settings: .*rollouts was", refused.value.stderr)
