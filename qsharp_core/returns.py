"""Distributions of the reward-to-go: what a critic's outputs mean.

A critic predicts, for a prefix `x` and a next token `y`, the distribution `Z(x, y)` of the reward that the *reference*
policy earns if it goes on from there (docs/method.md, "Definitions"). There are two parametrisations, both trained by
maximum likelihood (arXiv 2502.20548, section 3.3):

- `Bernoulli`: rewards in {0, 1}; one output, the score `s`, with `P(z = 1) = sigmoid(s)`.
- `Categorical`: `n` atoms; `n` outputs, logits over the atoms.

Shapes: outputs are `[..., n_out]`, everything derived from them `[...]`. All functions keep the dtype of the outputs.

Tilts are computed *relative* to the greatest reward. `A = ln E[exp(z / eta)]` reaches 1e6 at `eta = 1e-6`, where
float32 resolves only 0.06, but a policy depends on differences of `A` alone. `A - r_max / eta`, which is never
positive, keeps them.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class ReturnDistribution(Protocol):
    """A parametrised distribution of the reward-to-go: what the policy, the trainer and the checkpoint need of it."""

    @property
    def reward_range(self) -> tuple[float, float]:
        """Least and greatest reward that there can be."""

    @property
    def n_out(self) -> int:
        """Number of outputs of the critic's head per prefix and token."""

    def relative_tilt(self, outputs: Tensor, eta: Tensor | float) -> Tensor:
        """The relative tilt `ln E[exp((z - r_max) / eta)]`, at most 0; `eta` broadcasts against `[...]`."""

    def mean(self, outputs: Tensor) -> Tensor:
        """The expectation `E[z]`, in units of reward."""

    def loss(self, outputs: Tensor, rewards: Tensor) -> Tensor:
        """Negative log-likelihood of the rewards `[...]`, in nats."""


@dataclass(frozen=True)
class Bernoulli:
    """Rewards in {0, 1}; one output, the score `s`, with `P(z = 1) = sigmoid(s)`."""

    reward_range: tuple[float, float] = (0.0, 1.0)

    @property
    def n_out(self) -> int:
        return 1

    def relative_tilt(self, outputs: Tensor, eta: Tensor | float) -> Tensor:
        score = outputs[..., 0]
        inverse = torch.as_tensor(1.0 / eta, dtype=score.dtype, device=score.device)
        return torch.logaddexp(F.logsigmoid(score), F.logsigmoid(-score) - inverse)

    def mean(self, outputs: Tensor) -> Tensor:
        return torch.sigmoid(outputs[..., 0])

    def loss(self, outputs: Tensor, rewards: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs[..., 0], rewards.to(outputs.dtype), reduction="none")


@dataclass(frozen=True)
class Categorical:
    """Rewards on atoms; as many outputs, the logits over the atoms.

    Attributes:
        atoms: rewards, ascending.
        reward_range: least and greatest reward that there can be. It may be wider than the atoms.
    """

    atoms: tuple[float, ...]
    reward_range: tuple[float, float]

    def __post_init__(self) -> None:
        assert len(self.atoms) >= 2, self.atoms
        assert list(self.atoms) == sorted(set(self.atoms)), self.atoms
        low, high = self.reward_range
        assert low <= self.atoms[0], (self.atoms, self.reward_range)
        assert self.atoms[-1] <= high, (self.atoms, self.reward_range)

    @property
    def n_out(self) -> int:
        return len(self.atoms)

    def _support(self, outputs: Tensor) -> Tensor:
        return torch.tensor(self.atoms, dtype=outputs.dtype, device=outputs.device)

    def relative_tilt(self, outputs: Tensor, eta: Tensor | float) -> Tensor:
        below_best = self._support(outputs) - self.reward_range[1]
        inverse = torch.as_tensor(1.0 / eta, dtype=outputs.dtype, device=outputs.device)
        return torch.logsumexp(outputs.log_softmax(-1) + below_best * inverse[..., None], dim=-1)

    def mean(self, outputs: Tensor) -> Tensor:
        return (outputs.softmax(-1) * self._support(outputs)).sum(-1)

    def loss(self, outputs: Tensor, rewards: Tensor) -> Tensor:
        return -(self.two_hot(rewards.to(outputs.dtype)) * outputs.log_softmax(-1)).sum(-1)

    def two_hot(self, rewards: Tensor) -> Tensor:
        """Probabilities of the two atoms around each reward, whose mean is the reward: `[...] -> [..., n_out]`.

        A reward outside the atoms gets the nearest atom.
        """
        atoms = self._support(rewards)
        rewards = rewards.clamp(atoms[0], atoms[-1])
        upper = torch.searchsorted(atoms, rewards.contiguous()).clamp(1, len(self.atoms) - 1)
        low, high = atoms[upper - 1], atoms[upper]
        weight = ((rewards - low) / (high - low))[..., None]
        return F.one_hot(upper, self.n_out) * weight + F.one_hot(upper - 1, self.n_out) * (1 - weight)


def relative_expected_tilt(distribution: ReturnDistribution, outputs: Tensor, eta: Tensor | float) -> Tensor:
    """The relative tilt of Controlled Decoding (arXiv 2310.17022), `(E[z] - r_max) / eta`: `[..., n_out] -> [...]`."""
    return (distribution.mean(outputs) - distribution.reward_range[1]) / eta


def tilt(distribution: ReturnDistribution, outputs: Tensor, eta: Tensor | float) -> Tensor:
    """The tilt `A = ln E[exp(z / eta)]`, so that `eta * A = Q*` (Theorem 2.2): `[..., n_out] -> [...]`."""
    return distribution.relative_tilt(outputs, eta) + distribution.reward_range[1] / eta
