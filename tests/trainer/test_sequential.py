"""The sequential test keeps its error however often one looks, and sees what is there."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.loop.sequential import LEAST, RewardComparison, compare

RUNS, LOOKS = 200, 1500


def traffic(seed: int, chances: tuple[float, float], share: float) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Arms and rewards of so many requests: whether the trial took each, and whether the answer was right."""
    dice = np.random.default_rng(seed)
    arms = dice.random(LOOKS) < share
    return arms, (dice.random(LOOKS) < np.where(arms, *chances)).astype(float)


def verdicts(chances: tuple[float, float], share: float, every: int = 10) -> list[tuple[str, int]]:
    """Of each run the verdict at the first look that has one, and the number of rewards until then."""
    found: list[tuple[str, int]] = []
    for seed in range(RUNS):
        arms, rewards = traffic(seed, chances, share)
        for t in range(2 * LEAST, LOOKS + 1, every):
            seen = compare(arms[:t], rewards[:t], np.full(t, share))
            if seen.verdict != "undecided":
                break
        found.append((seen.verdict, t))
    return found


@pytest.mark.parametrize(("chance", "share"), [(0.5, 0.5), (0.8, 0.1), (0.05, 0.3)])
def test_between_equals_it_seldom_decides(chance: float, share: float) -> None:
    wrong = [verdict for verdict, _ in verdicts((chance, chance), share) if verdict != "undecided"]
    assert len(wrong) <= 0.05 * RUNS + 2 * math.sqrt(0.05 * 0.95 * RUNS)  # 10, and two standard deviations


@pytest.mark.parametrize(("chances", "right"), [((0.7, 0.45), "better"), ((0.2, 0.45), "worse")])
def test_a_difference_is_seen(chances: tuple[float, float], right: str) -> None:
    found = verdicts(chances, 0.5)
    assert sum(verdict == right for verdict, _ in found) >= 0.98 * RUNS
    assert not [verdict for verdict, _ in found if verdict not in (right, "undecided")]
    assert np.median([t for _, t in found]) < 500


def test_the_estimate_is_right_whatever_the_shares_were() -> None:
    """Also where the share changed while the rewards did, which a difference of plain means would get wrong."""
    dice = np.random.default_rng(3)
    differences, plain = [], []
    for _ in range(400):
        shares = np.where(np.arange(1000) < 500, 0.1, 0.9)
        arms = dice.random(1000) < shares
        level = np.where(np.arange(1000) < 500, 0.2, 0.6)  # easy problems came later
        seen = compare(arms, (dice.random(1000) < level + 0.1 * arms).astype(float), shares)
        differences.append(seen.difference)
        plain.append(seen.means[0] - seen.means[1])
    error = float(np.std(differences)) / math.sqrt(len(differences))
    assert abs(np.mean(differences) - 0.1) < 4 * error
    assert abs(np.mean(plain) - 0.1) > 0.1


def test_too_few_rewards_decide_nothing() -> None:
    arms = np.arange(200) >= 200 - (LEAST - 1)
    seen = compare(arms, arms.astype(float), np.full(200, 0.5))
    assert seen == RewardComparison(
        "undecided", (LEAST - 1, 200 - LEAST + 1), (1.0, 0.0), 1.0, -math.inf, math.inf, 0.05
    )
    assert math.isnan(compare([], [], []).difference)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_without_the_other_arm_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        compare([True], [1.0], [share])
