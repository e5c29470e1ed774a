"""What the run of many budgets asks for, and what it would notice."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.budgets import Spent, request
from server.request.schema import GuidanceOptions

PAIR: Any = SimpleNamespace(vocabulary=100)


def test_requests_are_of_all_kinds() -> None:
    dice, seen = random.Random(1), set()
    for _ in range(500):
        asked = request(dice, PAIR, ["a", "b"])
        options = GuidanceOptions.model_validate(asked["guidance"])
        assert options.has_budget
        seen |= {(options.critic, options.tail, options.method), (options.kl_total is None, options.kl_token is None)}
    assert len(seen) == 2 * 3 * 2 + 3


@pytest.mark.parametrize(
    ("options", "over"),
    [
        ({"kl_total": 0.3}, False),
        ({"kl_total": 0.2999}, True),
        ({"kl_token": 0.2}, False),
        ({"kl_token": 0.1999}, True),
        ({"kl_total": 1.0, "kl_token": 0.1999}, True),
    ],
)
def test_what_exceeds_a_budget_is_noticed(options: dict[str, float], over: bool) -> None:
    spent = Spent()
    spent.take(options, {"kl": 0.3, "tokens_total": 2, "steps_clipped": 1, "tokens": [{"kl": 0.1}, {"kl": 0.2}]})
    assert bool(spent.over) == over
    assert spent.counts["completions held back"] == 1
