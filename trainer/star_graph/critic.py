"""Training of the critic: the reference's layers with a V head, plain BCE on the reference's own rollouts."""

import copy
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qsharp_core.critic.model import Critic, Head, HeadShape
from qsharp_core.returns import Bernoulli
from trainer.star_graph.graphs import Graph, as_text
from trainer.star_graph.optimizer import Optimizer, OptimizerSpec
from trainer.star_graph.rows import PROMPT, Rows, rows_of


@dataclass(frozen=True)
class Rollouts:
    """The rollouts of one graph: its prompt's token ids, the completions' and what these earned."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    rewards: Sequence[float]


class Buffer:
    """The latest rollouts, so that each is trained on several times: fresh graphs alone are soon the bottleneck."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self._kept: deque[Rollouts] = deque(maxlen=size)
        self._rng = random.Random(seed)

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, rollouts: Sequence[Rollouts]) -> None:
        """New ones, which push out the oldest."""
        self._kept.extend(rollouts)

    def draw(self, count: int) -> list[Rollouts]:
        """Some, with repetition."""
        return self._rng.choices(self._kept, k=count)


def fresh_critic(model: Any) -> Critic:
    """A copy of the reference's layers with a V head that does not steer yet."""
    backbone = copy.deepcopy(model.base_model)
    backbone.requires_grad_(True)
    vocab, hidden = backbone.get_input_embeddings().weight.shape
    return Critic(backbone, Head(HeadShape(kind="V", hidden=hidden, n_out=1, vocab=vocab)), Bernoulli())


class Learner:
    """Trains a critic in place.

    Args:
        critic: it.
        spec: the optimizer.
        steps: how many there will be.
    """

    def __init__(self, critic: Critic, spec: OptimizerSpec, steps: int, device: torch.device) -> None:
        self.critic = critic.to(device).train()
        self._device = device
        self._optimizer = Optimizer(critic.backbone, [critic], spec, steps)

    def step(self, batch: Sequence[Rollouts]) -> float:
        """One step; the mean loss in nats, over a rollout's positions and then over rollouts."""
        loss = self.loss(batch)
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def loss(self, batch: Sequence[Rollouts]) -> Tensor:
        """Negative log-likelihood of the rewards at every position of the completions: all are the reference's own."""
        rows = rows_of([r.prompt for r in batch], [r.completions for r in batch], self._device)
        judged = rows.branch > PROMPT
        outputs = outputs_of(self.critic, rows)[judged]
        rewards, weights = [], []
        count = sum(len(r.completions) for r in batch)
        for rollouts in batch:
            for tokens, reward in zip(rollouts.completions, rollouts.rewards, strict=True):
                rewards += [reward] * len(tokens)
                weights += [1 / (len(tokens) * count)] * len(tokens)
        losses = self.critic.distribution.loss(outputs, torch.tensor(rewards, device=self._device))
        return (losses * torch.tensor(weights, device=self._device)).sum()


def outputs_of(critic: Critic, rows: Rows) -> Tensor:
    """The head's outputs `[B, S, n_out]` at every token."""
    hidden = critic.backbone(**rows.inputs(), use_cache=False).last_hidden_state
    return critic.head.at_tokens(hidden)


@torch.no_grad()
def arm_scores(critic: Critic, tokens: Any, graphs: Sequence[Graph], device: torch.device) -> Tensor:
    """Scores `[B, d]` of the first node of every arm, graphs of one shape: what the whole task hangs on."""
    prompts = tokens([graph.prompt for graph in graphs])["input_ids"]
    firsts = [tokens([as_text(arm[:2]) for arm in graph.arms])["input_ids"] for graph in graphs]
    rows = rows_of(prompts, firsts, device)
    ends = [
        [len(prompt) + end - 1 for end in accumulate(map(len, own))]
        for prompt, own in zip(prompts, firsts, strict=True)
    ]
    training = critic.training
    scores = outputs_of(critic.eval(), rows)[..., 0].gather(1, torch.tensor(ends, device=device))
    critic.train(training)
    return scores


def right_arm(critic: Critic, tokens: Any, graphs: Sequence[Graph], device: torch.device) -> float:
    """In which part of the graphs the right arm's first node scores highest."""
    wanted = torch.tensor([g.right for g in graphs], device=device)
    return (arm_scores(critic, tokens, graphs, device).argmax(1) == wanted).float().mean().item()
