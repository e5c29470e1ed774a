"""Where branches leave a completion, against the law that they are drawn from."""

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from trainer.rollouts.branching import LISTED, TOP, Listed, Place, branch, listed_in_choice, listed_in_prompt, place_of


def listed(logits: torch.Tensor, most: int, drawn: int) -> dict[int, float]:
    """What vLLM lists: the likeliest tokens, and the one that stands there whatever its rank, in any order."""
    log_probs = logits.log_softmax(-1)
    order = log_probs.argsort(descending=True).tolist()
    return {token: float(log_probs[token]) for token in {*order[:most], drawn}}


def in_prompt(places: list[dict[int, float]]) -> list[Listed]:
    return listed_in_prompt([None, *({str(t): {"logprob": v} for t, v in place.items()} for place in places)], 1)


def in_completion(places: list[dict[int, float]]) -> list[Listed]:
    named = [{f"token_id:{t}": v for t, v in place.items()} for place in places]
    return listed_in_choice({"logprobs": {"top_logprobs": named}})


def in_chat(places: list[dict[int, float]]) -> list[Listed]:
    named = [[{"token": f"token_id:{t}", "logprob": v} for t, v in place.items()] for place in places]
    return listed_in_choice({"logprobs": {"content": [{"top_logprobs": one} for one in named]}})


FORMS = pytest.mark.parametrize("form", [in_prompt, in_completion, in_chat])
Form = Callable[[list[dict[int, float]]], list[Listed]]


@FORMS
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_places_have_the_entropy_of_the_policy(temperature: float, form: Form) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 16) * 2
    places = [place_of(one, temperature) for one in form([listed(row, 16, 3) for row in logits])]
    expected = torch.distributions.Categorical(logits=logits / temperature).entropy()
    assert [place.entropy for place in places] == pytest.approx(expected.tolist(), abs=1e-5)
    for place, row in zip(places, logits, strict=True):
        assert list(place.candidates) == row.topk(TOP).indices.tolist()


@FORMS
def test_a_token_that_was_drawn_beyond_those_listed_is_no_candidate(form: Form) -> None:
    logits = torch.arange(40, 0, -1.0)
    (one,) = form([listed(logits, LISTED, 39)])
    assert list(one) == list(range(LISTED))
    assert place_of(one, 1.0).candidates == tuple(range(TOP))


def test_branches_are_drawn_by_entropy_and_evenly_among_candidates() -> None:
    places = [Place(0.0, (1, 2)), Place(0.5, (3, 4)), Place(1.5, (5, 6, 7))]
    draws = 20_000
    dice = random.Random(0)
    found = Counter(branch(places, [6, 7], dice) for _ in range(draws))
    expected = {(1, 3): 1 / 8, (1, 4): 1 / 8, (2, 5): 3 / 4}
    assert set(found) == set(expected)
    for way, chance in expected.items():
        assert found[way] / draws == pytest.approx(chance, abs=4 * (chance * (1 - chance) / draws) ** 0.5)


def test_there_may_be_no_way_out() -> None:
    dice = random.Random(0)
    assert branch([], [], dice) is None
    assert branch([Place(0.0, (1,))], [], dice) is None
    assert branch([Place(1.0, (1, 2))], [1, 2], dice) is None
