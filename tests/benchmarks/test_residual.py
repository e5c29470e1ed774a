"""The figures of `benchmarks.bellman_residual`, on answers whose residuals follow a known law."""

import numpy as np
import pytest
from scipy.stats import norm

from benchmarks.bellman_residual import statistics
from benchmarks.bellman_residual.statistics import Answer


def answers(mean: float, right: bool = True) -> list[Answer]:
    """One residual each, normal, with a standard deviation of 0.1."""
    n = 2000
    deltas = np.random.default_rng(0).permutation(norm.ppf((np.arange(n) + 0.5) / n, mean, 0.1))
    return [Answer(str(i // 4), right, deltas[i : i + 1], np.array([0.5]), 0, 1.0, -2.0) for i in range(n)]


def test_answers_to_notice_are_those_of_the_normal_law() -> None:
    before = answers(1.0)
    # A test of 5 % finds a difference of d standard deviations in 95 % of the cases from n = ((1.96 + 1.645) / d)^2.
    assert statistics.answers_to_notice(before, answers(1.1)) == pytest.approx(13.0, abs=2)
    assert statistics.answers_to_notice(before, answers(0.95)) == pytest.approx(52.0, abs=6)


def test_what_cannot_be_told_apart_is_never_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MOST", 50)
    before = answers(1.0)
    assert statistics.answers_to_notice(before, answers(1.0)) is None
    assert statistics.higher(answers(1.0), before) == pytest.approx(0.5, abs=0.03)


def test_the_alert_fires_beyond_its_bounds() -> None:
    before = answers(1.0)
    fired = [statistics.fires(before, answers(mean)) for mean in (0.45, 0.55, 1.0, 1.15, 1.25)]
    assert fired == [1, 0, 0, 0, 1]


def test_an_answer_is_told_by_its_residuals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 50)
    both = answers(1.0, right=False) + answers(0.9)  # P(one is below the other) = Phi(1 / sqrt 2)
    auc, error = statistics.tells(both, statistics.SCORES["less mean of |delta|"])
    assert auc == pytest.approx(0.760, abs=0.02)
    assert 0.002 < error < 0.02


def test_a_line_of_the_answers() -> None:
    """Steps: one that asks, one that does not, one that asks and draws from the tail, one that asks."""
    tokens = [[0.5, -1.0, -0.8], [None, -0.05, -0.05], [0.6, -5.0, -11.0], [0.3, -0.1, -0.2]]
    line = {"problem": "1+1+2", "reward": 1.0, "eta": 0.1, "kl": 0.7, "tokens": tokens}
    answer = statistics.read(line, certain=0.9)
    assert answer.deltas == pytest.approx([0.6 - 0.5 - 0.1 * 0.2])
    assert list(answer.values) == [0.5, 0.6, 0.3]
    assert (answer.right, answer.of_tail, answer.kl) == (True, 1, 0.7)
    assert answer.ref_logprob == pytest.approx(-6.15)
    assert len(statistics.read(line, certain=1.0).deltas) == 0
