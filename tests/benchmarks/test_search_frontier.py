"""What is made of samples and searches: groups, means, tokens, and gains at as many tokens."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.search_frontier.choosing import Point, Rule, Sample, gain, plain, searched
from qsharp_core.wire.search import BEST, Best

PROBLEMS = ("p", "q", "r")


def drawn(dice: random.Random, count: int) -> list[Sample]:
    return [
        Sample(
            text=f"It is {dice.randrange(3)}",
            reward=float(dice.random() < 0.5),
            estimate=dice.choice([None, dice.random()]),
            tokens=dice.randrange(1, 9),
        )
        for _ in range(count)
    ]


def best(by: Best, group: Sequence[Sample]) -> float:
    """The reward of the best sample, by the words of the documentation."""
    known = [one.estimate for one in group if one.estimate is not None]
    mean = sum(known) / len(known) if known else 0.0
    values = [mean if one.estimate is None else one.estimate for one in group]
    if by == "value":
        return group[values.index(max(values))].reward
    weight = {one.text: 0.0 for one in group}
    for one, value in zip(group, values, strict=True):
        weight[one.text] += value if by == "weighted" else 1.0
    most = max(weight.values())
    text = next(one.text for one in group if weight[one.text] == most)
    of_text = [i for i, one in enumerate(group) if one.text == text]
    return group[max(of_text, key=lambda i: values[i])].reward


@pytest.mark.parametrize("seed", range(20))
def test_plain_samples_are_chosen_among_groups_that_share_nothing(seed: int) -> None:
    dice = random.Random(seed)
    length, repeats = dice.randrange(1, 17), dice.randrange(1, 4)
    pools = {problem: [drawn(dice, length) for _ in range(repeats)] for problem in PROBLEMS}
    size = dice.randrange(1, length + 1)
    for by in BEST:
        point = plain("guided", pools, size, Rule(by=by, vote="number", reward_range=(0.0, 1.0)))
        groups = [
            [pool[k * size : (k + 1) * size] for pool in pools[problem] for k in range(length // size)]
            for problem in PROBLEMS
        ]
        assert point.answers == len(PROBLEMS) * repeats * (length // size)
        assert point.rewards == pytest.approx([np.mean([best(by, group) for group in dealt]) for dealt in groups])
        assert point.tokens == pytest.approx(np.mean([sum(o.tokens for o in g) for dealt in groups for g in dealt]))


def test_searches_are_means_by_problem() -> None:
    answers = {
        "p": [
            Sample(text="", reward=1.0, estimate=None, tokens=10),
            Sample(text="", reward=0, estimate=0.1, tokens=30),
        ],
        "q": [Sample(text="", reward=1.0, estimate=None, tokens=20)] * 2,
    }
    point = searched("particles", "weighted", 4, answers)
    assert (list(point.rewards), point.tokens, point.answers) == ([0.5, 1.0], 20, 4)
    assert point.accuracy == pytest.approx((0.75, 0.25))


def test_gains_are_at_as_many_tokens_and_paired() -> None:
    def at(tokens: float, *rewards: float) -> Point:
        return Point("guided", "value", 1, tokens, np.array(rewards), len(rewards))

    others = [at(400, 0.9, 0.5), at(25, 0.1, 0.1), at(100, 0.5, 0.3)]
    # 200 is halfway from 100 to 400 on a logarithmic axis: 0.7 and 0.4.
    assert gain(at(200, 0.8, 0.5), others) == pytest.approx((0.1, 0.0), abs=1e-12)
    assert gain(at(100, 0.5, 0.5), others) == pytest.approx((0.1, 0.1))
    assert gain(at(9000, 0.9, 0.5), others) == pytest.approx((0.0, 0.0), abs=1e-12)
