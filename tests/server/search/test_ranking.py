"""Which of several completions are the best, against counting by hand."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.request.search.ranking import ranked, with_mean

VALUES = st.one_of(st.none(), st.floats(-2, 3))


@given(st.lists(VALUES, min_size=1, max_size=12))
def test_by_value(estimates: list[float | None]) -> None:
    order = ranked("value", [""] * len(estimates), estimates)
    filled = with_mean(estimates)
    assert sorted(order) == list(range(len(estimates)))
    assert [filled[i] for i in order] == sorted(filled, reverse=True)
    known = [value for value in estimates if value is not None]
    assert all(
        filled[i] == pytest.approx(sum(known) / len(known) if known else 0) for i in order if estimates[i] is None
    )


@given(st.lists(st.tuples(st.sampled_from(["1", "2.0", "2", "x", "so 1"]), VALUES), min_size=1, max_size=15))
def test_by_majority(samples: list[tuple[str, float | None]]) -> None:
    texts, estimates = [text for text, _ in samples], [value for _, value in samples]
    answers = [{"1": 1, "so 1": 1, "2": 2, "2.0": 2, "x": None}[text] for text in texts]
    counts = Counter(answer for answer in answers if answer is not None)
    order = ranked("majority", texts, estimates)
    if counts:
        assert counts.most_common(1)[0][1] == answers.count(answers[order[0]])
    filled = with_mean(estimates)
    winners = [i for i in order if answers[i] == answers[order[0]]]
    assert order[: len(winners)] == winners
    assert [filled[i] for i in winners] == sorted((filled[i] for i in winners), reverse=True)
    assert all(answers[i] is None for i in order[len([a for a in answers if a is not None]) :])


def test_weighted_votes_are_shares_of_the_rewards_range() -> None:
    texts, estimates = ["1", "1", "1", "2"], [-0.8, -0.7, -0.9, 0.0]
    assert ranked("majority", texts, estimates, reward_range=(-1, 1))[0] == 1
    assert ranked("weighted", texts, estimates, reward_range=(-1, 1))[0] == 3  # 0.5 against 0.1 + 0.15 + 0.05
    assert ranked("weighted", texts, estimates, reward_range=(-3, 1))[0] == 1
    assert ranked("weighted", ["1", "2"], [0.4, 0.5], reward_range=(1.0, 1.0)) == [0, 1]


def test_weights_count_besides() -> None:
    texts, estimates = ["1", "1", "2"], [0.5, 0.5, 0.5]
    assert ranked("majority", texts, estimates, weights=[0.2, 0.2, 1.0])[0] == 2
    assert ranked("weighted", texts, [0.9, 0.9, 0.3], weights=[0.2, 0.2, 1.0])[0] == 0


@pytest.mark.parametrize(("vote", "first"), [("number", 0), ("text", 2), ("boxed", 1)])
def test_what_a_text_votes_for(vote: str, first: int) -> None:
    texts = ["it is 4", r"4, or \boxed{7}", "same", "same", r"\boxed{7} 5", "4"]
    texts = texts if vote != "number" else [texts[0], texts[5], "5"]
    estimates = [random.Random(0).random()] * len(texts)
    assert ranked("majority", texts, estimates, vote=vote)[0] == first  # type: ignore[arg-type]
