"""Trees, padded rows, passes and processes give the loss and gradient of one plain forward pass a rollout."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qsharp_core.critic import checkpoint
from qsharp_core.critic.model import Critic
from tests.support import models
from trainer.training.rollouts import LabelledRollout, SamplingPolicy, kept
from trainer.training.separate.batches import Batch, padded, tree
from trainer.training.separate.passes import Passes, saving
from trainer.training.separate.scorer import LabelScorer, outputs_of, summed_loss, understands_trees

CPU = torch.device("cpu")


def rollouts(n: int = 9, few_shot: int = 0) -> list[LabelledRollout]:
    """Two prompts with a common beginning, completions that often agree, one of them twice."""
    dice = np.random.default_rng(0)
    shots = dice.integers(3, 90, few_shot)
    made = []
    for i in range(n):
        prompt = np.concatenate([shots, [10, 11, 20 + i % 2]]).astype(np.int32)
        completion = dice.integers(60, 62, 2 + i % 5).astype(np.int32)
        made.append(LabelledRollout(str(i), prompt, completion, i % 2, float(i % 3 == 0), SamplingPolicy(), str(i % 2)))
    made.append(made[0])
    return made


def critic_of(tmp_path: Path, kind: str, head: str, **kwargs: object) -> Critic:
    critic = checkpoint.load(models.write_critic(tmp_path / f"{kind}-{head}", kind=kind, head=head, **kwargs))[1]  # type: ignore[arg-type]
    return critic.requires_grad_(True)


def plainly(critic: Critic, data: list[LabelledRollout]) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    """The loss summed over rollouts, and each label's outputs, by `Critic.forward` of each rollout alone."""
    total = torch.zeros(())
    outputs: dict[tuple[int, int], Tensor] = {}
    for i, r in enumerate(data):
        row = critic(torch.tensor(r.token_ids[None]).long())[0, len(r.prompt) + r.first_valid :]
        total = total + critic.distribution.loss(row, torch.full((r.valid,), r.reward)).mean()
        outputs |= {(i, r.first_valid + k): row[k] for k in range(r.valid)}
    return total, outputs


def gradient(critic: Critic, loss: Tensor) -> list[Tensor]:
    critic.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in critic.parameters() if p.grad is not None]


@pytest.mark.parametrize("head", ["V", "Q"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "opt", "mistral"])
def test_outputs_loss_and_gradient_are_those_of_plain_forward_passes(tmp_path: Path, kind: str, head: str) -> None:
    critic, data = critic_of(tmp_path, kind, head, mlp=8 if head == "V" else None), rollouts()
    expected_loss, expected = plainly(critic, data)
    expected_gradient = gradient(critic, expected_loss)
    scorer = LabelScorer(critic)
    assert understands_trees(critic, kept(data), CPU)
    for batch in (padded(range(len(data)), data), tree(range(len(data)), data)):
        outputs = outputs_of(scorer, batch)
        for k in range(len(outputs)):
            wanted = expected[int(batch.rollout[k]), int(batch.position[k])]
            torch.testing.assert_close(outputs[k], wanted, atol=1e-4, rtol=1e-4)
        loss = summed_loss(critic.distribution, outputs, batch)
        torch.testing.assert_close(loss, expected_loss, atol=1e-4, rtol=1e-5)
        for ours, theirs in zip(gradient(critic, loss), expected_gradient, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


def test_categorical_rewards_that_share_a_node_are_judged_one_by_one(tmp_path: Path) -> None:
    distribution = {"kind": "categorical", "atoms": [0.0, 0.25, 1.0]}
    critic, data = critic_of(tmp_path, "llama", "V", distribution=distribution), rollouts()
    batch = tree(range(len(data)), data)
    loss = summed_loss(critic.distribution, outputs_of(LabelScorer(critic), batch), batch)
    torch.testing.assert_close(loss, plainly(critic, data)[0], atol=1e-4, rtol=1e-5)
    assert len(batch.at) < len(batch.judged)


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 16])
def test_the_loss_does_not_hang_on_passes_and_processes(tmp_path: Path, trees: bool, processes: int) -> None:
    critic, data = critic_of(tmp_path, "llama", "V"), rollouts()
    expected, _ = plainly(critic, data)
    scorer, total = LabelScorer(critic), 0.0
    for process in range(processes):
        batches = Passes(trees, 20, process, processes).batches(range(len(data)), data)
        assert batches
        total += sum(summed_loss(critic.distribution, outputs_of(scorer, b), b).item() for b in batches)
    assert total == pytest.approx(expected.item(), rel=1e-4)


def test_a_window_shorter_than_the_data_is_no_tree(tmp_path: Path) -> None:
    critic = critic_of(tmp_path, "mistral", "V")  # its window is 24
    assert understands_trees(critic, kept(rollouts(few_shot=10)), CPU)
    assert not understands_trees(critic, kept(rollouts(few_shot=40)), CPU)


def test_a_tree_has_a_node_for_each_distinct_prefix() -> None:
    data = rollouts(few_shot=50)
    batch: Batch = tree(range(len(data)), data)
    distinct = {tuple(r.token_ids[:k]) for r in data for k in range(1, r.length + 1)}
    assert batch.input_ids.numel() == len(distinct)
    tokens = sum(r.length for r in data)
    assert saving([list(range(len(data)))], kept(data), 10_000) == pytest.approx(len(distinct) / tokens)


@pytest.mark.parametrize("trees", [True, False])
def test_processes_that_must_run_equally_many_batches_do_and_count_each_label_once(trees: bool) -> None:
    data = rollouts(n=random.randint(1, 12))
    everything = range(len(data))
    processes, tokens = random.randint(2, 6), random.randint(1, 40)
    whole = Passes(trees, 10_000).batches(everything, data)
    shares = [Passes(trees, tokens, p, processes, level=True).batches(everything, data) for p in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert labels([batch for share in shares for batch in share]) == labels(whole)


def labels(batches: list[Batch]) -> list[tuple[int, int, float]]:
    """Rollout, position and weight of each label that has a weight."""
    return sorted(
        (int(rollout), int(position), float(weight))
        for batch in batches
        for rollout, position, weight in zip(batch.rollout, batch.position, batch.weights, strict=True)
        if weight > 0
    )
