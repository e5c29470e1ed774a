"""A head on the reference's hidden states, trained by `qsharp train --backbone reference` as a user runs it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qsharp_core.cli import main
from qsharp_core.critic import checkpoint, native_checkpoint
from qsharp_core.critic.reference import identify
from qsharp_core.returns import Bernoulli, Categorical, ReturnDistribution
from tests.support import models
from tests.support import trainer_data as world
from trainer.training import data
from trainer.training.features.extract import ReferenceModel
from trainer.training.features.store import FeatureStore
from trainer.training.native.fit import node_losses
from trainer.training.native.nodes import Labels, read_labels, read_targets, targets_of
from trainer.training.rollouts import kept
from trainer.training.siblings import weighed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two references and rollouts."""
    root = tmp_path_factory.mktemp("place")
    models.write_reference(root / "base", "qwen2", sharpness=1.0)
    models.write_reference(root / "other", "llama", seed=1)
    world.write(root / "data.parquet", world.rollouts(prompts=60, each=12))
    return root


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    return [
        "train", "--data", str(place / "data.parquet"), "--out", str(out), "--backbone", "reference",
        "--base", str(place / "base"), "--held-out", "0.25", "--steps", "300", "--batch-tokens", "128",
        "--mlp", "64", "--weigh", "nodes", "--features", str(place / "features"), "--publish-anyway", *more,
    ]  # fmt: skip


def report(out: Path, name: str = "critic") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / ".runs" / name / "metrics.json").read_text())
    return found


@pytest.fixture(scope="module")
def unbroken(place: Path) -> Path:
    """A run's output folder."""
    out = place / "unbroken"
    assert main(arguments(place, out)) == 0
    return out


def test_it_learns_what_a_plain_forward_pass_says_that_it_learned(place: Path, unbroken: Path) -> None:
    """The published folder, beside the reference run in full, has the log-loss that the report gives."""
    folder = unbroken / "critic" / "1"
    card, critic = native_checkpoint.load(folder, place / "base")
    assert (card.key, card.backbone, card.head, card.hidden) == ("critic@1", "reference", "Q", "last")
    assert card.made_for == identify(place / "base")
    assert card.tokenizer_fingerprint == checkpoint.fingerprint(models.tokenizer())
    extra = card.model_extra or {}
    assert extra["data"]["train_rollouts"] + extra["data"]["held_out_rollouts"] == 720
    assert str(place) not in card.model_dump_json()  # nothing of the machine
    measured = report(unbroken)["held_out"]["overall"]
    assert measured["log_loss"] < measured["log_loss_constant"] - 0.1
    _, held_out = data.split(data.read([place / "data.parquet"]).rollouts, 0.25)
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    losses, chances, expected = [], [], []
    for r in held_out:
        ids = torch.from_numpy(r.token_ids.astype(np.int64))
        with torch.inference_mode():
            plain = model(input_ids=ids[None], output_hidden_states=True)
        start = len(r.prompt)
        hidden, log_ref = plain.hidden_states[-1][0, start - 1 : -1], plain.logits[0, start - 1 : -1].log_softmax(-1)
        tokens = ids[start:, None]
        outputs = critic.score(hidden, tokens, log_ref.gather(1, tokens))[:, 0]
        losses.append(Bernoulli().loss(outputs, torch.full((len(tokens),), r.reward)).mean())
        chances += Bernoulli().mean(outputs).tolist()
        expected += [world.chance(r.completion[: t + 1].tolist()) for t in range(len(r.completion))]
    assert float(torch.stack(losses).mean()) == pytest.approx(measured["log_loss"], abs=5e-3)
    assert np.corrcoef(chances, expected)[0, 1] > 0.85  # it has the law of the world


def test_another_seed_reads_the_features_that_are_there(
    place: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(place, tmp_path, "--seed", "1", "--steps", "20", "--dtype", "bf16")) == 0
    assert "the reference was run for 0 of them" in capsys.readouterr().out
    stored = load_file(tmp_path / "critic" / "1" / "head.safetensors")
    assert stored["hidden.weight"].dtype == torch.bfloat16
    assert stored["hidden.mean"].dtype == torch.float32  # a mean may be many times its scale


def test_versions_are_compared_and_gone_on_with(place: Path, unbroken: Path, tmp_path: Path) -> None:
    parent = unbroken / "critic" / "1"
    given = arguments(place, tmp_path, "--steps", "50", "--continue", str(parent), "--lr", "1e-4")
    del given[given.index("--backbone") : given.index("--base")]  # a continued critic has its own
    del given[given.index("--mlp") : given.index("--weigh")]
    assert main(given) == 0
    ours = report(tmp_path)
    assert ours["parent"]["critic"] == "critic@1"
    before = report(unbroken)["held_out"]["overall"]["log_loss"]
    assert ours["parent"]["held_out"]["log_loss"] == pytest.approx(before, abs=1e-6)
    comparison = ours["parent"]["comparison"]
    assert comparison["improvement"] == pytest.approx(before - ours["held_out"]["overall"]["log_loss"], abs=1e-6)
    assert ours["held_out"]["overall"]["log_loss"] < before + 0.02  # it began where the other ended
    kept, known = (load_file(folder / "head.safetensors") for folder in (tmp_path / "critic" / "1", parent))
    assert torch.equal(kept["hidden.mean"], known["hidden.mean"])


@pytest.mark.parametrize("distribution", ["bernoulli", "categorical"])
def test_kinds_of_critics_are_compared_with_each_other(place: Path, tmp_path: Path, distribution: str) -> None:
    """A loop may change from one kind to the other under a name."""
    out = ["--out", str(tmp_path), "--features", str(place / "features"), "--data", str(place / "data.parquet")]
    law = ["--distribution", "categorical", "--atoms", "0", "0.5", "1"] if distribution == "categorical" else []
    separate = ["train", *out, "--base", str(place / "base"), "--layers", "1", "--epochs", "1", "--held-out", "0.25"]
    separate += ["--publish-anyway"]
    assert main([*separate, *law]) == 0
    assert main(arguments(place, tmp_path, "--steps", "200", *law)) == 0
    mixed = report(tmp_path)
    first = checkpoint.read_card(tmp_path / "critic" / "1").model_extra["metrics"]["overall"]  # type: ignore[index]
    assert mixed["parent"]["comparison"]["by"] == "log_loss"
    assert mixed["parent"]["held_out"]["log_loss"] == pytest.approx(first["log_loss"], abs=1e-5)
    assert main([*separate, *law]) == 0
    back = report(tmp_path)
    assert back["parent"]["critic"] == "critic@2"
    assert back["parent"]["held_out"]["log_loss"] == pytest.approx(mixed["held_out"]["overall"]["log_loss"], abs=1e-5)


def test_a_parent_of_another_reference_is_not_compared(place: Path, unbroken: Path, tmp_path: Path) -> None:
    given = ["--base", str(place / "other"), "--parent", str(unbroken / "critic" / "1"), "--steps", "10"]
    assert main(arguments(place, tmp_path, *given)) == 0
    assert report(tmp_path)["parent"] == {"critic": "critic@1", "held_out": None, "comparison": None}


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--layers", "2"], "--layers is for critics with a backbone of their own"),
        (["--borrow-embeddings"], "--borrow-embeddings is for critics"),
        (["--head", "V"], "--head Q"),
        (["--features-gb", "0.00001"], "--features-gb allows"),
    ],
)
def test_mistakes_are_named(
    place: Path, tmp_path: Path, more: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(place, tmp_path, "--features", str(tmp_path / "f"), *more)) == 1
    assert complaint in capsys.readouterr().err


def test_steps_are_for_heads_alone(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(place, tmp_path), "--backbone", "own"]) == 1
    assert "--steps is for --backbone reference" in capsys.readouterr().err
    made_for = place / "unbroken" / "critic" / "1"
    given = arguments(place, tmp_path, "--base", str(place / "other"), "--continue", str(made_for))
    del given[given.index("--backbone") : given.index("--backbone") + 2]
    del given[given.index("--mlp") : given.index("--weigh")]
    assert main(given) == 1
    assert "made for another reference" in capsys.readouterr().err


def test_epochs_are_passes_over_the_distinct_prefixes(place: Path, tmp_path: Path) -> None:
    given = arguments(place, tmp_path, "--epochs", "3", "--held-out", "0")
    del given[given.index("--steps") : given.index("--steps") + 2]
    assert main(given) == 0
    prefixes = {
        (tuple(one["prompt_token_ids"]), tuple(one["completion_token_ids"][:cut]))
        for one in world.rollouts(prompts=60, each=12)
        for cut in range(1, len(one["completion_token_ids"]) + 1)
    }
    assert report(tmp_path)["steps"] == math.ceil(3 * len(prefixes) / 128)


def test_a_killed_run_begins_again_and_ends_with_the_same_weights(place: Path, unbroken: Path, tmp_path: Path) -> None:
    given = arguments(place, tmp_path, "--resume")
    run = tmp_path / ".runs" / "critic"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer.training", *given[1:]]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline and not (run / "metrics.jsonl").is_file():
        time.sleep(0.002)
    assert process.poll() is None, "it was over before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "critic").exists()
    assert main(given[:-1]) == 1  # without --resume an unfinished run is not thrown away
    torch.set_num_threads(1)
    assert main(given) == 0
    ours, theirs = (load_file(out / "critic" / "1" / "head.safetensors") for out in (tmp_path, unbroken))
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    steps = [line["step"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "lr" in line]
    assert steps == list(range(1, 301))


@pytest.mark.parametrize("returns", [Bernoulli(), Categorical((0.0, 0.4, 1.0), (0.0, 1.0))])
@pytest.mark.parametrize("kind", ["likelihood", "squared"])
@pytest.mark.parametrize("weigh", ["rollouts", "nodes"])
def test_nodes_have_the_gradient_of_their_rollouts(
    place: Path, returns: ReturnDistribution, kind: str, weigh: str
) -> None:
    """The loss by node, differentiated, is the loss by label, differentiated."""
    rollouts = data.read([place / "data.parquet"]).rollouts.select(np.arange(80))
    if isinstance(returns, Categorical):
        rollouts = kept(replace(r, reward=(i % 11) / 10) for i, r in enumerate(rollouts))
    rollouts = weighed(rollouts) if weigh == "nodes" else rollouts
    _, labelled = data.merge_rollouts(rollouts)
    nodes, judged = np.unique(np.concatenate(labelled), return_inverse=True)
    valid = [r.valid for r in rollouts]
    rewards = np.repeat(np.array([r.reward for r in rollouts], np.float32), valid)
    weights = np.concatenate([np.full(r.valid, 1 / r.valid) if r.weights is None else r.weights for r in rollouts])
    labels = Labels(judged, np.repeat(np.arange(len(rollouts)), valid), judged, rewards, weights)
    targets = targets_of(labels, len(nodes), returns)
    assert float(targets.weights_M.mean()) == pytest.approx(1)
    torch.manual_seed(0)
    outputs = torch.randn(len(nodes), returns.n_out, dtype=torch.float64, requires_grad=True)
    losses = node_losses(returns, outputs, targets.targets_MO, targets.means_M, kind)
    (by_node,) = torch.autograd.grad((losses * targets.weights_M).sum() / targets.weights_M.sum(), outputs)
    of_labels = outputs[judged]
    earned = torch.from_numpy(rewards).double()
    each = (returns.mean(of_labels) - earned) ** 2 if kind == "squared" else returns.loss(of_labels, earned)
    (by_label,) = torch.autograd.grad((each * torch.from_numpy(weights)).sum() / weights.sum(), outputs)
    torch.testing.assert_close(by_node, by_label, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("returns", [Bernoulli(), Categorical((0.0, 0.4, 1.0), (0.0, 1.0))])
def test_targets_do_not_depend_on_how_many_rollouts_are_in_memory(
    place: Path, tmp_path: Path, returns: ReturnDistribution
) -> None:
    """Many small trees have the nodes, labels and targets of the one tree, in its order."""
    chosen = np.sort(np.random.default_rng().choice(720, 60, replace=False))
    rollouts = weighed(data.read([place / "data.parquet"]).rollouts.select(chosen))
    reference = ReferenceModel(place / "base", torch.float32, torch.device("cpu"))

    def read(name: str, together: int) -> tuple[Any, Any, Any]:
        store = FeatureStore(tmp_path / name, reference.digest, reference.identity.hidden_size, 10**9)
        inputs, labels = read_labels(reference, store, rollouts, together)
        _, targets = read_targets(reference, store, rollouts, returns, together)
        return inputs, labels, targets

    (inputs, labels, targets), (cut_inputs, cut_labels, cut_targets) = read("whole", 2**20), read("parts", 40)
    every = torch.arange(len(inputs))
    assert torch.equal(cut_inputs.tokens_M, inputs.tokens_M)
    torch.testing.assert_close(cut_inputs.log_ref_M, inputs.log_ref_M, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cut_inputs.hidden(every), inputs.hidden(every), atol=2e-2, rtol=2e-2)  # bfloat16
    order = np.lexsort((cut_labels.position, cut_labels.rollout))
    assert not (order == np.arange(len(order))).all()  # they were cut
    for name in ("nodes", "rollout", "position", "rewards", "weights"):
        assert getattr(cut_labels, name)[order].tolist() == getattr(labels, name).tolist()
    for name in ("weights_M", "means_M", "targets_MO"):
        assert torch.equal(getattr(cut_targets, name), getattr(targets, name))
