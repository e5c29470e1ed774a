"""Means, gains, majorities and best-of-k against closed forms, and their standard errors against the bootstrap."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product
from statistics import fmean

import numpy as np
import pytest
from scipy.stats import bootstrap

from trainer.evaluation.report import Figures
from trainer.evaluation.statistics import JudgedSample, estimate, expected_best, majority, sizes, summary

RESAMPLES = 4000
"""A bootstrap's standard error of so many resamples is itself off by about 1 / sqrt(2 · 4,000), 1.1 %."""
CLOSE = 0.05
PROBLEMS = 150


def bootstrapped(problems: int, statistic: Callable[[Sequence[int]], float]) -> float:
    """Standard error of a statistic of problems, which are drawn with repetition."""

    def of_rows(indices: np.ndarray, axis: int) -> np.ndarray:
        return np.apply_along_axis(lambda row: statistic(row.tolist()), axis, indices)

    result = bootstrap(
        (np.arange(problems),), of_rows, n_resamples=RESAMPLES, method="basic", rng=np.random.default_rng(0)
    )
    # The bootstrap takes the problems there are for all there are: its variance is smaller by (n - 1) / n.
    return float(result.standard_error) * math.sqrt(problems / (problems - 1))


def draws(seed: int, samples: int, gain: float = 0.0) -> dict[str, list[JudgedSample]]:
    """Samples of problems whose difficulty varies much, and is the same under every seed."""
    difficulty = np.random.default_rng(99).beta(0.6, 0.6, PROBLEMS)
    dice = np.random.default_rng(seed)
    problems = {}
    for number, ability in enumerate(difficulty):
        group = []
        for _ in range(samples):
            won = bool(dice.random() < min(ability + gain, 1.0))
            group.append(
                JudgedSample(
                    reward=float(won),
                    kl=float(dice.exponential(0.5)),
                    tokens=int(dice.integers(5, 50)),
                    vote="right" if won else f"wrong {dice.integers(2)}",
                    score=float(np.clip(0.4 + 0.2 * won + dice.normal(0, 0.2), 0, 1)),
                )
            )
        problems[str(number)] = group
    return problems


def of(rewards: Iterable[float | None], **fields: float) -> list[JudgedSample]:
    return [JudgedSample(reward=reward, kl=fields.get("kl", 0.0), tokens=1) for reward in rewards]


@pytest.mark.parametrize(("wins", "n"), [(1, 2), (3, 10), (60, 141), (141, 141)])
def test_the_error_of_an_accuracy_is_that_of_a_share(wins: int, n: int) -> None:
    found = estimate([1.0] * wins + [0.0] * (n - wins))
    share = wins / n
    assert found is not None
    assert found.mean == pytest.approx(share)
    assert found.se == pytest.approx(math.sqrt(share * (1 - share) / (n - 1)))
    assert found.problems == n


def test_one_problem_has_no_error_and_none_no_mean() -> None:
    single = estimate([0.5])
    assert single is not None
    assert (single.mean, single.se) == (0.5, None)
    assert estimate([]) is None


def test_a_problem_is_one_draw_however_many_samples_it_has() -> None:
    """Problems that are always right or always wrong: more samples of each of them tell nothing new."""
    for samples in (1, 4, 32):
        problems = {str(i): of([float(i % 3 == 0)] * samples) for i in range(30)}
        found = summary(problems, problems, samples)
        assert found.accuracy == pytest.approx(1 / 3)
        assert found.accuracy_se == pytest.approx(math.sqrt((1 / 3) * (2 / 3) / 29))
        assert (found.problems, found.n) == (30, 30 * samples)
        assert (found.gain, found.gain_se) == (0.0, 0.0)


def test_the_error_of_a_gain_is_paired() -> None:
    """Var(a − b) = Var(a) + Var(b) − 2 Cov(a, b), over problems."""
    reference, guided = draws(1, 4), draws(2, 4, gain=0.15)
    found = summary(guided, reference, 4)
    a, b = (
        np.array([fmean(s.reward or 0.0 for s in group) for group in problems.values()])
        for problems in (guided, reference)
    )
    covariance = np.cov(a, b)
    assert found.gain == pytest.approx(a.mean() - b.mean())
    closed = math.sqrt((covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) / PROBLEMS)
    assert found.gain_se == pytest.approx(closed)
    paired = bootstrap(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True, vectorized=True, n_resamples=RESAMPLES,
        method="basic", rng=np.random.default_rng(0),
    )  # fmt: skip
    assert found.gain_se == pytest.approx(float(paired.standard_error), rel=CLOSE)
    # Not paired it would be far more: problems differ more than settings do.
    assert math.sqrt((covariance[0, 0] + covariance[1, 1]) / PROBLEMS) > 1.5 * closed


def test_a_gain_is_over_the_problems_that_both_have() -> None:
    reference = {"a": of([0.0, 0.0]), "b": of([None, None]), "c": of([1.0, 0.0])}
    guided = {"a": of([1.0, 1.0]), "b": of([1.0, 1.0]), "c": of([1.0, None])}
    found = summary(guided, reference, 2)
    assert found.gain == pytest.approx((1.0 + 0.5) / 2)
    assert found.gain_se == pytest.approx(math.sqrt(0.125 / 2))  # of 1 and 0.5
    assert found.accuracy == found.full == 1.0
    assert (found.problems, found.n, found.unjudged) == (3, 5, 1)
    assert summary({"a": of([0.9, 1.0, 0.0, None])}, reference, 4).full == pytest.approx(1 / 3)


FIGURES: dict[str, Callable[[list[JudgedSample]], float]] = {
    "accuracy": lambda group: fmean(s.reward or 0.0 for s in group),
    "full": lambda group: fmean(float(s.reward == 1) for s in group),
    "kl": lambda group: fmean(s.kl for s in group),
    "tokens": lambda group: fmean(s.tokens for s in group),
    "oracle": lambda group: max(s.reward or 0.0 for s in group),
    "best_of": lambda group: max(group, key=lambda s: s.score or 0.0).reward or 0.0,
    "majority": lambda group: by_hand(group, lambda s: 1.0),
    "weighted_majority": lambda group: by_hand(group, lambda s: s.score or 0.0),
}


def by_hand(group: list[JudgedSample], weight: Callable[[JudgedSample], float]) -> float:
    """The mean reward of the answers that no other answer outweighs."""
    answers = {s.vote for s in group}
    weights = {answer: sum(weight(s) for s in group if s.vote == answer) for answer in answers}
    winners = [answer for answer in answers if weights[answer] == max(weights.values())]
    return fmean(float(answer == "right") for answer in winners)


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, list[JudgedSample]], Figures]:
    problems = draws(3, 5)
    return problems, summary(problems, problems, 5)


@pytest.mark.parametrize("name", FIGURES)
def test_means_and_errors_of_all_figures(name: str, measured: tuple[dict[str, list[JudgedSample]], Figures]) -> None:
    problems, figures = measured
    values = [FIGURES[name](group) for group in problems.values()]
    mean, error = figures.figure(name)
    assert mean == pytest.approx(fmean(values))
    assert error == pytest.approx(bootstrapped(PROBLEMS, lambda chosen: fmean(values[i] for i in chosen)), rel=CLOSE)


def test_the_best_of_all_subsets() -> None:
    """Of every subset of k the sample with the greatest key counts, and of those that tie their mean."""
    keys, values = [0.1, 0.5, 0.5, 0.9, 0.5, 0.1], [1.0, 0.0, 1.0, 0.3, 0.5, 0.0]
    for k in range(1, 7):
        outcomes = []
        for subset in combinations(range(6), k):
            best = max(keys[i] for i in subset)
            outcomes.append(fmean(values[i] for i in subset if keys[i] == best))
        assert expected_best(keys, values, k) == pytest.approx(fmean(outcomes)), k


@pytest.mark.parametrize("wins", range(9))
def test_pass_at_k_is_the_unbiased_estimator(wins: int) -> None:
    """1 − C(n − c, k) / C(n, k) (Chen et al., 2021)."""
    rewards = [1.0] * wins + [0.0] * (8 - wins)
    for k in range(1, 9):
        closed = 1 - math.comb(8 - wins, k) / math.comb(8, k)
        assert expected_best(rewards, rewards, k) == pytest.approx(closed)
    # What does not tell right from wrong is as good as a single sample.
    assert expected_best([0.5] * 8, rewards, 5) == pytest.approx(wins / 8)


@pytest.mark.parametrize("p", [0.1, 0.4, 0.5, 0.8])
@pytest.mark.parametrize("voters", [1, 2, 3, 4, 5])
def test_majorities_of_two_answers_are_binomial(p: float, voters: int) -> None:
    """Condorcet's jury: P(more than half are right), ties counting half, over all ways to vote."""
    expected = sum(
        math.comb(voters, right) * p**right * (1 - p) ** (voters - right) * (1.0 if 2 * right > voters else 0.5)
        for right in range(math.ceil(voters / 2), voters + 1)
    )
    found = 0.0
    for votes in product((True, False), repeat=voters):
        chance = math.prod(p if vote else 1 - p for vote in votes)
        found += chance * majority([str(vote) for vote in votes], [float(vote) for vote in votes])
    assert found == pytest.approx(expected)


def test_weights_abstentions_and_ties() -> None:
    assert majority(["a", "b", "b"], [1.0, 0.0, 0.0]) == 0.0
    assert majority(["a", "b", "b"], [1.0, 0.0, 0.0], [3.0, 1.0, 1.0]) == 1.0
    assert majority(["a", None, None], [1.0, 0.0, 0.0]) == 1.0  # who gives no answer has no vote
    assert majority([None, None], [1.0, 0.0]) == 0.5
    assert majority(["a", "b", "c"], [1.0, 0.5, 0.0]) == pytest.approx(0.5)
    assert majority(["a", "a", "b"], [1.0, 0.0, 0.0]) == 0.5  # an answer that is not always judged alike


def test_weights_are_what_scores_exceed_the_least_reward_by() -> None:
    """Rewards from −1 to 1: a score of −1 has no weight, where it would outweigh others by its size."""
    group = [
        JudgedSample(reward=-1.0, kl=0.0, tokens=1, vote="wrong", score=-0.9),
        JudgedSample(reward=-1.0, kl=0.0, tokens=1, vote="wrong", score=-0.9),
        JudgedSample(reward=1.0, kl=0.0, tokens=1, vote="right", score=-0.5),
    ]
    assert summary({"a": group}, {"a": group}, 3, least_reward=-1.0).weighted_majority == 1.0
    assert summary({"a": group}, {"a": group}, 3).majority == -1.0


def test_what_takes_all_samples_leaves_out_problems_with_unjudged_ones() -> None:
    judged = [JudgedSample(reward=r, kl=1.0, tokens=1, vote=str(r), score=r) for r in (1.0, 0.0)]
    unjudged = [judged[0], JudgedSample(reward=None, kl=3.0, tokens=1, vote="x", score=0.5)]
    unscored = [JudgedSample(reward=1.0, kl=1.0, tokens=1, vote="1.0") for _ in range(2)]
    found = summary({"a": judged, "b": unjudged, "c": unscored}, {}, 2)
    assert found.accuracy == pytest.approx((0.5 + 1.0 + 1.0) / 3)
    assert found.kl == pytest.approx((1.0 + 2.0 + 1.0) / 3)  # an unjudged completion has a KL all the same
    assert found.majority == pytest.approx((0.5 + 1.0) / 2)  # a and c
    assert found.best_of == 1.0  # a alone, which the scores tell apart
    assert (found.gain, found.gain_se) == (None, None)


@pytest.mark.parametrize(("samples", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_the_numbers_that_best_of_k_is_reported_for(samples: int, expected: list[int]) -> None:
    assert sizes(samples) == expected
    problems = draws(4, samples)
    found = summary(problems, problems, samples)
    for name in ("oracle", "best_of"):
        by_k = found.by_k[name]
        assert list(by_k) == [str(k) for k in expected]
        assert by_k["1"].mean == pytest.approx(found.accuracy)
        assert by_k["1"].mean_se == pytest.approx(found.accuracy_se)
        assert by_k[str(samples)].mean == found.figure(name)[0]
