import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsharp_core.returns import Bernoulli, Categorical, tilt

ETAS = st.floats(1e-6, 1e6)
SCORES = st.floats(-1e4, 1e4)
CATEGORICAL = Categorical((-1.0, 0.0, 0.25, 2.0), (-1.5, 2.0))


def brute(probabilities: list[float], atoms: list[float], eta: float) -> float:
    """`ln Σ p exp(z / eta)` about its largest term."""
    terms = [math.log(p) + z / eta for p, z in zip(probabilities, atoms, strict=True) if p > 0]
    top = max(terms)
    return top + math.log(math.fsum(math.exp(t - top) for t in terms))


@given(score=st.floats(-30, 30), eta=ETAS)
def test_bernoulli_tilt_is_the_log_moment(score: float, eta: float) -> None:
    p = 1 / (1 + math.exp(-score))
    got = tilt(Bernoulli(), torch.tensor([score], dtype=torch.float64), eta).item()
    assert got == pytest.approx(brute([1 / (1 + math.exp(score)), p], [0.0, 1.0], eta), rel=1e-9, abs=1e-9)


@given(logits=st.lists(st.floats(-20, 20), min_size=4, max_size=4), eta=ETAS)
def test_categorical_tilt_is_the_log_moment(logits: list[float], eta: float) -> None:
    outputs = torch.tensor(logits, dtype=torch.float64)
    expected = brute(outputs.softmax(-1).tolist(), list(CATEGORICAL.atoms), eta)
    assert tilt(CATEGORICAL, outputs, eta).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(score=SCORES, eta=ETAS)
def test_tilts_are_finite_in_float32(score: float, eta: float) -> None:
    assert tilt(Bernoulli(), torch.tensor([score], dtype=torch.float32), eta).isfinite()
    assert tilt(CATEGORICAL, torch.tensor([score, -score, 0.0, score / 2]), eta).isfinite()


@given(a=st.floats(-10, 10), b=st.floats(-10, 10))
def test_relative_tilts_keep_differences_at_tiny_eta(a: float, b: float) -> None:
    # At eta = 1e-6 a difference of tilts is a difference of ln P(z = 1); the tilts themselves are near 1e6.
    relative = Bernoulli().relative_tilt(torch.tensor([[a], [b]]), 1e-6)
    expected = math.log1p(math.exp(-b)) - math.log1p(math.exp(-a))
    assert (relative[0] - relative[1]).item() == pytest.approx(expected, abs=1e-5)


def test_large_eta_gives_the_mean_and_small_eta_the_best_reward() -> None:
    outputs = torch.tensor([0.3, -0.2, 0.9, 0.1], dtype=torch.float64)
    assert 1e6 * tilt(CATEGORICAL, outputs, 1e6).item() == pytest.approx(CATEGORICAL.mean(outputs).item(), abs=1e-5)
    assert 1e-6 * tilt(CATEGORICAL, outputs, 1e-6).item() == pytest.approx(2.0, abs=1e-5)


def test_bernoulli_is_the_categorical_of_two_atoms() -> None:
    score = torch.linspace(-8, 8, 33, dtype=torch.float64)
    two = Categorical((0.0, 1.0), (0.0, 1.0))
    logits = torch.stack([torch.zeros_like(score), score], -1)
    eta = torch.logspace(-3, 3, 33, dtype=torch.float64)
    torch.testing.assert_close(Bernoulli().relative_tilt(score[:, None], eta), two.relative_tilt(logits, eta))
    torch.testing.assert_close(Bernoulli().mean(score[:, None]), two.mean(logits))
    rewards = (score > 0).double()
    torch.testing.assert_close(Bernoulli().loss(score[:, None], rewards), two.loss(logits, rewards))


@given(reward=st.floats(-1, 2))
def test_two_hot_has_the_reward_as_its_mean(reward: float) -> None:
    weights = CATEGORICAL.two_hot(torch.tensor([reward], dtype=torch.float64))[0]
    assert weights.sum().item() == pytest.approx(1)
    assert (weights > 0).sum() <= 2
    assert (weights * torch.tensor(CATEGORICAL.atoms, dtype=torch.float64)).sum().item() == pytest.approx(reward)


def test_loss_is_least_at_the_rewards_frequencies() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    scores = torch.linspace(-3, 3, 601)
    losses = torch.stack([Bernoulli().loss(s.expand(4, 1), rewards).mean() for s in scores])
    assert torch.sigmoid(scores[losses.argmin()]).item() == pytest.approx(0.25, abs=0.01)
