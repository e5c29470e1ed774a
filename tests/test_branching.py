"""Where branches leave a completion, against the law that they are drawn from."""

import random
from collections import Counter
from typing import Any

import pytest
import torch

from trainer.branching import TOP, Place, branch, places_of


def listed(logits: torch.Tensor, most: int, drawn: int) -> dict[str, dict[str, Any]]:
    """As vLLM lists them: the likeliest tokens, and the one that stands there whatever its rank."""
    log_probs = logits.log_softmax(-1)
    order = log_probs.argsort(descending=True).tolist()
    ranked = {token: rank for rank, token in enumerate(order, start=1)}
    return {
        str(token): {"logprob": float(log_probs[token]), "rank": ranked[token], "decoded_token": f"<{token}>"}
        for token in {*order[:most], drawn}
    }


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_places_have_the_entropy_of_the_policy(temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 16) * 2
    places = places_of([None, *(listed(row, 16, 3) for row in logits)], 2, temperature, ["<9>"])
    expected = torch.distributions.Categorical(logits=logits[1:] / temperature).entropy()
    assert [place.entropy for place in places] == pytest.approx(expected.tolist(), abs=1e-5)
    for place, row in zip(places, logits[1:], strict=True):
        assert list(place.candidates) == row.topk(TOP).indices.tolist()
        assert place.endings == {9} & set(place.candidates)


def test_a_token_that_was_drawn_beyond_those_listed_is_no_candidate() -> None:
    logits = torch.arange(40, 0, -1.0)
    (place,) = places_of([None, listed(logits, 20, 39)], 1, 1.0, [])
    assert place.candidates == tuple(range(TOP))


def test_branches_are_drawn_by_entropy_and_evenly_among_candidates() -> None:
    places = [Place(0.0, (1, 2), frozenset()), Place(0.5, (3, 4), frozenset()), Place(1.5, (5, 6, 7), frozenset({6}))]
    draws = 20_000
    dice = random.Random(0)
    found = Counter(branch(places, [7], dice) for _ in range(draws))
    expected = {(1, 3): 1 / 8, (1, 4): 1 / 8, (2, 5): 3 / 4}
    assert set(found) == set(expected)
    for way, chance in expected.items():
        assert found[way] / draws == pytest.approx(chance, abs=4 * (chance * (1 - chance) / draws) ** 0.5)


def test_there_may_be_no_way_out() -> None:
    dice = random.Random(0)
    assert branch([], [], dice) is None
    assert branch([Place(0.0, (1,), frozenset())], [], dice) is None
    assert branch([Place(1.0, (1, 2), frozenset({1}))], [2], dice) is None
