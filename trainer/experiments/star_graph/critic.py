"""Training of the critic: the reference's layers with a V head, by the likelihood of its own rollouts' rewards."""

import copy
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from qsharp_core.critic.model import Critic, Head, HeadShape
from qsharp_core.returns import Bernoulli
from trainer.experiments.star_graph.optimizer import OptimizerSpec, optimisation, optimizers
from trainer.experiments.star_graph.rows import PROMPT, Rows, rows_of
from trainer.tasks.star_graph import Graph, as_text


@dataclass(frozen=True)
class GraphRollouts:
    """The rollouts of one graph: token ids of the prompt and of the completions, and the completions' rewards."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    rewards: Sequence[float]


class Buffer:
    """The latest rollouts, kept to be trained on several times, because the server cannot sample fast enough."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self._kept: deque[GraphRollouts] = deque(maxlen=size)
        self._rng = random.Random(seed)

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, rollouts: Sequence[GraphRollouts]) -> None:
        """Adds rollouts, which push out the oldest."""
        self._kept.extend(rollouts)

    def draw(self, count: int) -> list[GraphRollouts]:
        """Draws some of the rollouts, with repetition."""
        return self._rng.choices(self._kept, k=count)


def fresh_critic(model: Any) -> Critic:
    """A copy of the reference's layers with a V head that does not steer yet."""
    backbone = copy.deepcopy(model.base_model)
    backbone.requires_grad_(True)
    vocab, hidden = backbone.get_input_embeddings().weight.shape
    return Critic(backbone, Head(HeadShape(kind="V", hidden=hidden, n_out=1, vocab=vocab)), Bernoulli())


class CriticTrainer:
    """Trains a critic in place. To be used as a context manager, which closes the progress bar.

    Args:
        critic: what is trained.
        spec: how steps are made.
        steps: how many there will be.
        device: of the training.

    Attributes:
        critic: what is trained, on its device.
    """

    def __init__(self, critic: Critic, spec: OptimizerSpec, steps: int, device: torch.device) -> None:
        self.critic = critic.to(device).train()
        self._device = device
        self._optimisation = optimisation([critic], optimizers(critic.backbone, [critic], spec), spec, steps, "critic")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._optimisation.__exit__(kind, error, trace)

    @property
    def done(self) -> int:
        """The number of steps made."""
        return self._optimisation.done

    def step(self, batch: Sequence[GraphRollouts]) -> float:
        """Makes a step, and returns the mean loss in nats, over a rollout's positions and then over rollouts.

        Raises:
            TrainingError: the loss is not finite.
        """

        def gradients() -> float:
            loss = self.loss(batch)
            loss.backward()
            return loss.item()

        return self._optimisation.step(gradients).loss

    def show(self, **figures: str) -> None:
        """Shows figures beside the progress bar."""
        self._optimisation.show(**figures)

    def loss(self, batch: Sequence[GraphRollouts]) -> Tensor:
        """The negative log-likelihood of the rewards, over all positions of the completions."""
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
    """The outputs of the critic's head at every token, `[B, S, n_out]`."""
    hidden = critic.backbone(**rows.inputs(), use_cache=False).last_hidden_state
    return critic.head.at_tokens(hidden)


@torch.no_grad()
def arm_scores(critic: Critic, tokens: Any, graphs: Sequence[Graph], device: torch.device) -> Tensor:
    """Scores of the first node of every arm, on which the whole task depends, `[B, d]`; all graphs have one shape."""
    prompts = tokens([graph.prompt for graph in graphs])["input_ids"]
    firsts = [tokens([as_text(arm[:2]) for arm in graph.arms])["input_ids"] for graph in graphs]
    rows = rows_of(prompts, firsts, device)
    ends = [
        [len(prompt) + end - 1 for end in accumulate(map(len, nodes))]
        for prompt, nodes in zip(prompts, firsts, strict=True)
    ]
    training = critic.training
    scores = outputs_of(critic.eval(), rows)[..., 0].gather(1, torch.tensor(ends, device=device))
    critic.train(training)
    return scores


def right_arm(critic: Critic, tokens: Any, graphs: Sequence[Graph], device: torch.device) -> float:
    """The fraction of the graphs in which the first node of the right arm scores highest."""
    wanted = torch.tensor([g.right for g in graphs], device=device)
    return (arm_scores(critic, tokens, graphs, device).argmax(1) == wanted).float().mean().item()
