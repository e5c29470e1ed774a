import numpy as np
import pytest

from trainer.training import measures


def sample(n: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    dice = np.random.default_rng(0)
    predicted = np.round(dice.uniform(size=n), 2)  # with ties
    rewards = (dice.uniform(size=n) < predicted).astype(float)
    return predicted, rewards, dice.uniform(0.1, 1, n)


def test_brier_and_auc_against_all_pairs() -> None:
    p, r, w = sample()
    assert measures.brier(p, r, w) == pytest.approx(sum(w * (p - r) ** 2) / sum(w))
    wins = total = 0.0
    for i in range(len(p)):
        for j in range(len(p)):
            if r[i] == 1 and r[j] == 0:
                total += w[i] * w[j]
                wins += w[i] * w[j] * ((p[i] > p[j]) + 0.5 * (p[i] == p[j]))
    assert measures.auc(p, r > 0.5, w) == pytest.approx(wins / total)
    assert measures.auc(p, r > 2, w) is None
    assert measures.auc(np.zeros(4), np.array([True, False, True, False]), np.ones(4)) == 0.5


def test_ece_against_bins_by_hand() -> None:
    p, r, w = sample()
    expected = 0.0
    for b in range(15):
        inside = (p >= b / 15) & ((p < (b + 1) / 15) | (b == 14))
        if inside.any():
            gap = np.average(p[inside], weights=w[inside]) - np.average(r[inside], weights=w[inside])
            expected += abs(gap) * w[inside].sum() / w.sum()
    assert measures.ece(p, r, w) == pytest.approx(expected)
    # In units of reward: twice the range, twice the error.
    assert measures.ece(2 * p - 1, 2 * r - 1, w, (-1, 1)) == pytest.approx(2 * expected)
    assert measures.ece(np.full(10, 0.5), np.array([0.0, 1.0] * 5), np.ones(10)) == pytest.approx(0)


def test_the_clustered_error_is_that_of_the_clusters() -> None:
    dice = np.random.default_rng(1)
    values = dice.normal(size=400)
    mean, error = measures.clustered_mean(values, np.arange(400))
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / 20)
    # Ten copies of every draw are no more information.
    assert measures.clustered_mean(np.repeat(values, 10), np.repeat(np.arange(400), 10))[1] == pytest.approx(error)
    assert measures.clustered_mean(values, np.zeros(400, dtype=np.int64))[1] is None
